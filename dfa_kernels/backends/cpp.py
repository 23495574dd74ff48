"""The "cpp" backend: SIMD kernels on the CPU, compiled from `csrc`.

Importing the extension registers its kernels for the operators of `dfa_kernels.ops`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import torch

from dfa_kernels import stream as definition

DEVICES = ("cpu",)
RANK = 0
DISTRIBUTIONS = definition.DISTRIBUTIONS
PROVEN = {"cpu": DISTRIBUTIONS}
TAGS: tuple[torch.Tag, ...] = ()

_INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "portable")


@functools.cache
def _missing() -> str | None:
    """Load the extension; why it cannot be loaded, or None."""
    try:
        importlib.import_module("dfa_kernels._C")
    except ImportError as error:
        return f"the compiled extension is not there ({error})"
    return None


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device type, or None."""
    if device_type != "cpu":
        return "it serves the CPU only"
    return _missing()


def modes() -> Iterator[str]:
    """Switch to each instruction set that runs here in turn, and yield its name."""
    force = torch.ops.dfa_kernels.cpu_isa
    try:
        for name in _INSTRUCTION_SETS:
            try:
                force(name)
            except RuntimeError:
                continue
            yield name
    finally:
        force("")
