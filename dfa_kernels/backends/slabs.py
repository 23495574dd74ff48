"""The projection and its adjoint by slabs: a bounded piece of U is made, multiplied, and dropped.

Any backend that can generate entries gets both operations from here. Every entry in the union of
the layers' rows is made exactly once. Beyond the outputs the extra memory stays within
`WORKSPACE_BYTES`, independent of the layers; a 16-bit error also needs an fp32 copy, and a batch of
millions one sum for each of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dfa_kernels.layers import Layers
from dfa_kernels.stream import Stream, arithmetic

WORKSPACE_BYTES = 64 * 2**20

# Entries of U made at once. On a CPU the temporaries of one slab should stay in cache; an
# accelerator wants large launches and is bounded by the workspace.
_SLAB_ENTRIES_CPU = 2**17
_SLAB_ENTRIES_ACCELERATOR = 2**20
# For a long error a slab takes part of the columns rather than fewer rows, so that its product
# remains one of matrices.
_SLAB_ROWS = 64
# Elements of the [batch, slab rows] tile of sums.
_TILE_ELEMENTS = 2**21

# generate(rows, columns, row_offset, stream, dtype) -> those entries of U, [rows, columns]
Generate = Callable[[int, int, int, Stream, torch.dtype], Tensor]


def cut(total: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, stop) pairs that cover range(total) in steps."""
    return ((start, min(start + step, total)) for start in range(0, total, step))


def slab_shape(
    columns: int, device: torch.device, batch: int = 1, padding: int = 0
) -> tuple[int, int]:
    """Rows and columns of one slab of U for an error of shape [batch, columns].

    `padding`: how many columns beyond these are made for each row of a slab.
    """
    entries = _SLAB_ENTRIES_CPU if device.type == "cpu" else _SLAB_ENTRIES_ACCELERATOR
    rows = max(entries // (max(columns, 1) + padding), _SLAB_ROWS)
    rows = max(min(rows, _TILE_ELEMENTS // max(batch, 1)), 1)
    return rows, max(entries // rows, 1)


def project(
    generate: Generate, error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype
) -> list[Tensor]:
    """The signals of an error [batch, n]: one [batch, size] of `dtype` per layer."""
    batch, columns = error.shape
    signals = [error.new_empty(batch, size, dtype=dtype) for size in layers.sizes]
    if batch == 0:
        return signals
    error = error.to(arithmetic(error.dtype))
    slab_rows, slab_columns = slab_shape(columns, error.device, batch)
    for slab in layers.slabs(slab_rows):
        sums = error.new_zeros(batch, slab.rows)
        for left, right in cut(columns, slab_columns):
            some = (slab.rows, right - left, slab.first, stream.after(left), error.dtype)
            sums.addmm_(error[:, left:right], generate(*some).T)
        for layer in slab.layers:
            in_layer, in_slab = layers.overlap(layer, slab)
            torch.mul(sums[:, in_slab], layers.scales[layer], out=signals[layer][:, in_layer])
    return signals


def project_adjoint(
    generate: Generate,
    signals: Sequence[Tensor],
    layers: Layers,
    stream: Stream,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The transpose of `project`: signals back to an error.

    One signal [batch, size] per layer -> [batch, columns] of `dtype`: the sum over layers of
    scale * signal @ U[the layer's rows, the error's columns].
    """
    batch, device = signals[0].shape[0], signals[0].device
    total = torch.zeros(batch, columns, dtype=arithmetic(dtype), device=device)
    if total.numel() == 0:
        return total.to(dtype)
    slab_rows, slab_columns = slab_shape(columns, device, batch)
    for slab in layers.slabs(slab_rows):
        weights = total.new_zeros(batch, slab.rows)
        for layer in slab.layers:
            in_layer, in_slab = layers.overlap(layer, slab)
            weights[:, in_slab].add_(signals[layer][:, in_layer], alpha=layers.scales[layer])
        for left, right in cut(columns, slab_columns):
            some = (slab.rows, right - left, slab.first, stream.after(left), total.dtype)
            total[:, left:right].addmm_(weights, generate(*some))
    return total.to(dtype)
