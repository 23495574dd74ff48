"""The "triton" backend: fused kernels for CUDA and ROCm tensors; `projection` says what runs.

Under Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported) the same kernels serve CPU
tensors, slowly, for tests. Triton is imported when the backend is first asked about.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dfa_kernels.backends import tensor_cores


@functools.cache
def _kernels() -> types.ModuleType | str:
    """The module with the kernels, or why there is none."""
    try:
        return importlib.import_module("dfa_kernels.backends.triton.projection")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device type, or None."""
    if device_type not in ("cpu", "cuda"):
        return "it serves CUDA and ROCm devices only"
    kernels = _kernels()
    if isinstance(kernels, str):
        return kernels
    if device_type == "cpu":
        if kernels.launch.INTERPRETED:
            return None
        return "it serves GPUs (and the CPU in Triton's interpreter, with TRITON_INTERPRET=1)"
    if kernels.launch.INTERPRETED:
        return "TRITON_INTERPRET=1 keeps it on the CPU"
    if not torch.cuda.is_available():
        return "there is no GPU"
    return None if torch.version.hip else tensor_cores.too_old()


def project(
    error: Tensor,
    row_offsets: list[int],
    sizes: list[int],
    scales: list[float],
    seed: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """scales[i] * error @ U[rows of layer i, columns].T: [M, n] -> one [M, sizes[i]] per layer."""
    return _kernels().project(  # type: ignore[union-attr]
        error, row_offsets, sizes, scales, seed, column_offset, distribution, dtype or error.dtype
    )


def ways(error: Tensor, distribution: str) -> Iterator[tuple[str, Callable[..., list[Tensor]]]]:
    """Every way that a projection of such an error can go here: its name, and it, as `project`.

    "fused R x M" in tiles of R rows of U and M of the error, also with the terms of an fp32 error
    "split beforehand"; and "slabs", but for what is always fused. For any shape of the error that
    is not longer, and the current precision of fp32 products.
    """
    return _kernels().ways(error, distribution)  # type: ignore[union-attr]


def feedback_matrix(
    rows: int,
    columns: int,
    seed: int,
    row_offset: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The block of U with its first entry at (row_offset, column_offset)."""
    matrix = torch.empty(rows, columns, dtype=dtype, device=device)
    if matrix.numel() > 0:
        launch = _kernels().launch  # type: ignore[union-attr]
        with launch.on(matrix.device):
            launch.fill(matrix, seed, row_offset, column_offset, distribution)
    return matrix
