"""Warnings about what does not train, or trains otherwise than asked. Each is given once."""

from __future__ import annotations

import os
import sys
import warnings

import torch

# What a warning points at is the first caller outside these folders.
_INSIDE = tuple(
    os.path.dirname(sys.modules[name].__file__ or "") + os.sep for name in ("torch", "dfa_kernels")
)
_said_while_tracing: set[str] = set()


def warn_once(said: set[str], fact: str, message: str) -> None:
    """Warn of `fact` unless it is in `said`, which remembers it.

    While torch.compile traces, each message is given once in the process, and is a constant.
    """
    if torch.compiler.is_compiling():
        _warn_while_tracing(message)
    elif fact not in said:
        said.add(fact)
        warnings.warn(message, UserWarning, stacklevel=_level())


@torch.compiler.assume_constant_result  # so it runs as it is while tracing
def _warn_while_tracing(message: str) -> None:
    if message not in _said_while_tracing:
        _said_while_tracing.add(message)
        warnings.warn(message, UserWarning, stacklevel=_level())


def _level() -> int:
    """The `stacklevel` of the first frame outside torch and this library, for the caller."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    return level
