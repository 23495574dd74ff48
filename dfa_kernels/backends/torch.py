"""The "torch" backend: the definition in plain PyTorch, on any device, always available."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dfa_kernels import stream
from dfa_kernels.backends import slabs


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device type, or None. This one serves all."""
    return None


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
    """The block of U with its first entry at (row_offset, column_offset), made a slab at a time."""
    matrix = torch.empty(rows, columns, dtype=dtype, device=device)
    if matrix.numel() == 0:
        return matrix
    padding = 2 * stream.BLOCK[distribution]  # whole blocks are made, at both ends
    slab_rows, slab_columns = slabs.slab_shape(columns, matrix.device, padding=padding)
    for top, bottom in slabs.cut(rows, slab_rows):
        for left, right in slabs.cut(columns, slab_columns):
            matrix[top:bottom, left:right] = stream.entries(
                bottom - top,
                right - left,
                seed=seed,
                row_offset=row_offset + top,
                column_offset=column_offset + left,
                distribution=distribution,
                dtype=dtype,
                device=matrix.device,
            )
    return matrix


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

    def generate(
        rows: int, columns: int, row_offset: int, column_offset: int, dtype: torch.dtype
    ) -> Tensor:
        return feedback_matrix(
            rows, columns, seed, row_offset, column_offset, distribution, dtype, error.device
        )

    return slabs.project(
        generate, error, row_offsets, sizes, scales, column_offset, dtype or error.dtype
    )


def ways(error: Tensor, distribution: str) -> Iterator[tuple[str, Callable]]:
    """The ways a projection of such an error can go here, by name: one."""
    yield "slabs", project
