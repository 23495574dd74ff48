"""The "torch" backend: the definition in plain PyTorch, on any device, always available."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dfa_kernels import hadamard
from dfa_kernels import stream as definition
from dfa_kernels.backends import slabs
from dfa_kernels.layers import Layers
from dfa_kernels.stream import Stream

DEVICES: tuple[str, ...] = ()  # it serves every device where no other backend does
RANK = 9
DISTRIBUTIONS = definition.DISTRIBUTIONS
PROVEN = {"cpu": DISTRIBUTIONS}
TAGS: tuple[torch.Tag, ...] = ()


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device type, or None. This one serves all."""
    return None


def feedback_matrix(
    rows: int,
    columns: int,
    row_offset: int,
    stream: Stream,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`rows` rows of U from `row_offset` on, and `columns` of its columns, made slab by slab."""
    if stream.distribution in definition.STRUCTURED:
        return hadamard.feedback_matrix(rows, columns, row_offset, stream, dtype, device)
    matrix = torch.empty(rows, columns, dtype=dtype, device=device)
    if matrix.numel() == 0:
        return matrix
    # Both ends may cut a Philox block, which is made whole.
    padding = 2 * definition.DENSE[stream.distribution].block
    slab_rows, slab_columns = slabs.slab_shape(columns, matrix.device, padding=padding)
    for top, bottom in slabs.cut(rows, slab_rows):
        for left, right in slabs.cut(columns, slab_columns):
            matrix[top:bottom, left:right] = definition.entries(
                bottom - top,
                right - left,
                row_offset + top,
                stream.after(left),
                dtype,
                matrix.device,
            )
    return matrix


def project(error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype) -> list[Tensor]:
    """The signals of an error [batch, n]: one [batch, size] per layer."""
    if stream.distribution in definition.STRUCTURED:
        return hadamard.project(error, layers, stream, dtype)
    generate = functools.partial(feedback_matrix, device=error.device)
    return slabs.project(generate, error, layers, stream, dtype)


structured_adjoint = hadamard.project_adjoint
