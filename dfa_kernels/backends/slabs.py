"""The projection and its adjoint by slabs: a bounded piece of U is made, multiplied, and forgotten.

Any backend that can generate entries gets both operations from here. Every entry in the union of
the layers' row ranges is made exactly once. Beyond the outputs the extra memory stays within
`WORKSPACE_BYTES`, whatever the layers, plus what the error itself may need: an fp32 copy if it is
16-bit, and one sum for each of its rows where they are millions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 64 * 2**20

# Entries of U made at once. On a CPU the temporaries of one slab should stay in cache; an
# accelerator wants large launches and is bounded by the workspace.
_SLAB_ENTRIES_CPU = 2**17
_SLAB_ENTRIES_ACCELERATOR = 2**20
# For a long error a slab takes part of the columns rather than fewer rows, so that its product is a
# matrix product.
_SLAB_ROWS = 64
# Elements of the [error rows, slab rows] tile of sums.
_TILE_ELEMENTS = 2**21

# generate(rows, columns, row_offset, column_offset, dtype) -> U[...] of shape [rows, columns]
Generate = Callable[[int, int, int, int, torch.dtype], Tensor]


class Layer(NamedTuple):
    """Rows [first, last) of U, their signal's scale, and its place in the list of outputs."""

    first: int
    last: int
    scale: float
    place: int


class Slab(NamedTuple):
    """Rows [first, last) of U, and the layers that contain some of them."""

    first: int
    last: int
    layers: list[Layer]

    def overlap(self, layer: Layer) -> tuple[slice, slice]:
        """The rows it shares with a layer, counted from its own first row and from the layer's."""
        first, last = max(self.first, layer.first), min(self.last, layer.last)
        return slice(first - self.first, last - self.first), slice(
            first - layer.first, last - layer.first
        )


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products and sums for an error of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cut(total: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, stop) pairs that cover range(total) in steps."""
    return ((start, min(start + step, total)) for start in range(0, total, step))


def slab_shape(
    columns: int, device: torch.device, error_rows: int = 1, padding: int = 0
) -> tuple[int, int]:
    """Rows and columns of one slab of U for an error of shape [error_rows, columns].

    `padding` is how many columns beyond those asked for a row of a slab takes to make.
    """
    entries = _SLAB_ENTRIES_CPU if device.type == "cpu" else _SLAB_ENTRIES_ACCELERATOR
    rows = max(entries // (max(columns, 1) + padding), _SLAB_ROWS)
    rows = max(min(rows, _TILE_ELEMENTS // max(error_rows, 1)), 1)
    return rows, max(entries // rows, 1)


def union_slabs(
    row_offsets: Sequence[int], sizes: Sequence[int], scales: Sequence[float], rows: int
) -> Iterator[Slab]:
    """Cut the union of the layers' row ranges into slabs of at most `rows` rows.

    Every row of the union is in exactly one slab, and no other row is in any.
    """
    layers = [
        Layer(first, first + size, scale, place)
        for place, (first, size, scale) in enumerate(zip(row_offsets, sizes, scales, strict=True))
    ]
    layers.sort(reverse=True)  # the next one to begin is at the end
    active: list[Layer] = []
    position = 0
    while layers or active:
        if not active:
            position = layers[-1].first
        reach = max((layer.last for layer in active), default=position)
        while layers and layers[-1].first <= reach and layers[-1].first < position + rows:
            active.append(layers.pop())
            reach = max(reach, active[-1].last)
        slab = Slab(position, min(position + rows, reach), active)
        yield slab
        position = slab.last
        active = [layer for layer in active if layer.last > position]


def unions(row_offsets: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The union of the layers' rows as disjoint ranges (first, last), ascending."""
    merged: list[tuple[int, int]] = []
    for first, size in sorted(zip(row_offsets, sizes, strict=True)):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], first + size)
        else:
            merged.append((first, first + size))
    return merged


def union_rows(row_offsets: Sequence[int], sizes: Sequence[int]) -> int:
    """How many rows the union of the layers' row ranges has."""
    return sum(last - first for first, last in unions(row_offsets, sizes))


def project(
    generate: Generate,
    error: Tensor,
    row_offsets: Sequence[int],
    sizes: Sequence[int],
    scales: Sequence[float],
    column_offset: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """scales[i] * error @ U[rows of layer i, columns of the error].T for every layer i.

    error [M, n] -> one [M, sizes[i]] of `dtype` per layer.
    """
    count, columns = error.shape
    signals = [error.new_empty(count, size, dtype=dtype) for size in sizes]
    if count == 0:
        return signals
    error = error.to(arithmetic(error.dtype))
    slab_rows, slab_columns = slab_shape(columns, error.device, count)
    for slab in union_slabs(row_offsets, sizes, scales, slab_rows):
        rows = slab.last - slab.first
        sums = error.new_zeros(count, rows)
        for left, right in cut(columns, slab_columns):
            entries = generate(rows, right - left, slab.first, column_offset + left, error.dtype)
            sums.addmm_(error[:, left:right], entries.T)
        for layer in slab.layers:
            in_slab, in_layer = slab.overlap(layer)
            torch.mul(sums[:, in_slab], layer.scale, out=signals[layer.place][:, in_layer])
    return signals


def project_adjoint(
    generate: Generate,
    signals: Sequence[Tensor],
    row_offsets: Sequence[int],
    scales: Sequence[float],
    column_offset: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The transpose of `project`: signals back to an error.

    The sum over layers of scales[i] * signals[i] @ U[rows of layer i, columns].

    signals[i] [M, sizes[i]] -> [M, columns] of `dtype`.
    """
    count, device = signals[0].shape[0], signals[0].device
    sizes = [signal.shape[1] for signal in signals]
    total = torch.zeros(count, columns, dtype=arithmetic(dtype), device=device)
    if total.numel() == 0:
        return total.to(dtype)
    slab_rows, slab_columns = slab_shape(columns, device, count)
    for slab in union_slabs(row_offsets, sizes, scales, slab_rows):
        rows = slab.last - slab.first
        weights = total.new_zeros(count, rows)
        for layer in slab.layers:
            in_slab, in_layer = slab.overlap(layer)
            weights[:, in_slab].add_(signals[layer.place][:, in_layer], alpha=layer.scale)
        for left, right in cut(columns, slab_columns):
            entries = generate(rows, right - left, slab.first, column_offset + left, total.dtype)
            total[:, left:right].addmm_(weights, entries)
    return total.to(dtype)
