"""The backends, a module or a folder each, and `registry`, which says what each one serves.

This module can be called: `dfa_kernels.backends()` lists them.
"""

from __future__ import annotations

import importlib
import sys
import types

from dfa_kernels.backends import registry


class _Callable(types.ModuleType):
    """A package that lists the backends when it is called."""

    def __call__(self) -> list[registry.BackendStatus]:
        """See `registry.backends`."""
        return registry.backends()

    def __reduce__(self) -> tuple:
        # Copied and pickled by its name, as a function is.
        return importlib.import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Callable
