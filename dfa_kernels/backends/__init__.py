"""The backends, a module or a folder each, and `registry`, which says what each one serves.

This module can be called: `dfa_kernels.backends()` lists them.
"""

from __future__ import annotations

import sys
import types

from dfa_kernels.backends import registry


class _Callable(types.ModuleType):
    """A package that lists the backends when it is called."""

    def __call__(self) -> list[registry.BackendStatus]:
        """See `registry.backends`."""
        return registry.backends()


sys.modules[__name__].__class__ = _Callable
