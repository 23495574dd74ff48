"""The backends: a module or a folder for each, and `registry`, which says which one serves what.

`dfa_kernels.backends()` lists them: this module can be called.
"""

from __future__ import annotations

import sys
import types

from dfa_kernels.backends import registry


class _Callable(types.ModuleType):
    """A module that lists the backends when it is called, and is still the package of theirs."""

    def __call__(self) -> list[registry.BackendStatus]:
        """See `registry.backends`."""
        return registry.backends()


sys.modules[__name__].__class__ = _Callable
