"""The "cpp" backend: SIMD kernels on the CPU, compiled from `csrc`.

Importing the extension registers its kernels for the operators of `dfa_kernels.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "portable")

try:
    import dfa_kernels._C  # noqa: F401

    _missing = None
except ImportError as error:
    _missing = f"the compiled extension is not there ({error})"


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device type, or None."""
    if device_type != "cpu":
        return "it serves the CPU only"
    return _missing


def modes() -> Iterator[str]:
    """Every instruction set that runs here, by name, each in use while it is the current one."""
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


def ways(error: Tensor, distribution: str) -> Iterator[tuple[str, Callable]]:
    """The ways a projection of such an error can go here, by name: one in every mode."""
    yield "fused", torch.ops.dfa_kernels.project.cpp
