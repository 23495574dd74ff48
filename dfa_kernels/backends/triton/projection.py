"""Which way a projection goes, fused or by slabs, and the way by slabs.

The fused kernel makes every entry once per tile of the error's rows, and multiplies it where it was
made. By slabs, every entry is made once and stored in 16 bits in a bounded workspace, which the
vendor's matrix product reads. `Cost` says which is quicker; fp32 errors at the highest precision
are fused whatever it says, because a vendor's product keeps less of them. An fp64 error is nothing
for tensor cores, and goes through `dfa_kernels.backends.slabs` with entries made here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dfa_kernels.backends import slabs
from dfa_kernels.backends.triton import launch
from dfa_kernels.backends.triton.plan import Kept, unions

_log = logging.getLogger("dfa_kernels")

# Entries a second, from instruction counts of compiled sm_90 code at the issue rate of an H200, and
# the rate of its matrix product. The choice needs only their ratio, which other GPUs come close to.
_GENERATION = {"normal": 1.5e12, "uniform": 2.5e12, "rademacher": 6e12}
_MULTIPLICATION = 6e14
_BYTES = 4e12  # a second, read or written
_SLAB_SECONDS = 20e-6  # to launch what one slab takes

_FUSED_COLUMNS = 2**30  # the fused kernel counts columns in 32 bits
_ERROR_ROWS = 2**14  # that one slab is made for


class Cost(NamedTuple):
    """Estimated seconds of both ways."""

    fused: float
    by_slabs: float

    @classmethod
    def of(
        cls,
        tile: launch.Tile,
        count: int,
        columns: int,
        rows: int,
        distribution: str,
        terms: int,
        scaled_apart: bool,
    ) -> Cost:
        """For an error [count, columns] of `terms` terms, `rows` rows of U and the fused `tile`.

        `scaled_apart`: by slabs, the signals take a pass of their own to be scaled.
        """
        generation, products = _GENERATION[distribution], max(terms, 1)
        # What is shorter than the fused kernel's tile takes its time too.
        entries = rows * -(-columns // tile.columns) * tile.columns
        tiles = -(-count // tile.error_rows)
        made = entries * tiles / generation
        multiplied = 2 * entries * tiles * tile.error_rows * products / _MULTIPLICATION
        slab_rows, slab_columns = slab_shape(columns, products)
        slab_count = -(-rows // slab_rows) * -(-columns // slab_columns)
        by_slabs = rows * columns / generation + slab_count * _SLAB_SECONDS
        by_slabs += 2 * rows * columns * count * products / _MULTIPLICATION
        by_slabs += 8 * rows * count * scaled_apart / _BYTES
        return cls(max(made, multiplied), by_slabs)


def slab_shape(columns: int, terms: int) -> tuple[int, int]:
    """Rows and columns of a slab, which takes half the workspace."""
    entries = slabs.WORKSPACE_BYTES // 4 // terms
    rows = max(entries // max(-(-columns // 8) * 8, 8), 64)
    return rows, min(max(columns, 1), entries // rows // 8 * 8)


def project(
    error: Tensor,
    row_offsets: list[int],
    sizes: list[int],
    scales: list[float],
    seed: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    """scales[i] * error @ U[rows of layer i, columns].T: [M, n] -> one [M, sizes[i]] per layer."""
    key = (
        error.shape,
        error.stride(),
        error.dtype,
        error.device,
        error.data_ptr() % 16 == 0,
        tuple(row_offsets),
        tuple(sizes),
        tuple(scales),
        column_offset,
        distribution,
        dtype,
        torch.get_float32_matmul_precision(),
    )
    with launch.on(error.device):
        way = _ways.get(key)
        if way is None:
            way = _way(error, row_offsets, sizes, scales, column_offset, distribution, dtype)
            _ways.keep(key, way)
        return way(error, seed)


_ways = Kept()


def _way(
    error: Tensor,
    row_offsets: list[int],
    sizes: list[int],
    scales: list[float],
    column_offset: int,
    distribution: str,
    dtype: torch.dtype,
) -> Callable[[Tensor, int], list[Tensor]]:
    """The function of an error and a seed that projects errors like this one; logged."""
    layers = (row_offsets, sizes, scales)
    options = (column_offset, distribution, dtype)
    count, columns = error.shape
    if count == 0:
        return lambda error, seed: [error.new_empty(0, size, dtype=dtype) for size in sizes]
    if error.dtype == torch.float64:
        return lambda error, seed: _in_float64(error, *layers, seed, *options)
    terms = launch.terms_of(error)
    tile = launch.tile_for(count, distribution, terms, launch.uses_fragments(error.device))
    scaled_apart = len(sizes) > 1 or dtype != launch.operand_of(error)
    rows = sum(last - first for first, last in unions(row_offsets, sizes))
    cost = Cost.of(tile, count, columns, rows, distribution, terms, scaled_apart)
    one_tile = count <= tile.error_rows  # both ways make every entry once
    # A vendor's product of three terms adds up all columns in the tensor cores, which loses what
    # the third is there for; see `project_kernel`.
    fused_anyway = one_tile or terms == 3
    fused = columns <= _FUSED_COLUMNS and (fused_anyway or cost.fused <= cost.by_slabs)
    _log.debug(
        "project: %s, by estimates of %.3g ms fused and %.3g ms by slabs, for an error of "
        "%d x %d and %d rows of U",
        "fused" if fused else "by slabs",
        1e3 * cost.fused,
        1e3 * cost.by_slabs,
        count,
        columns,
        rows,
    )
    if fused:
        return launch.Fused(error, *layers, *options)
    return lambda error, seed: project_by_slabs(error, *layers, seed, *options)


def _in_float64(
    error, row_offsets, sizes, scales, seed, column_offset, distribution, dtype
) -> list[Tensor]:
    def generate(
        rows: int, columns: int, row_offset: int, column_offset: int, dtype: torch.dtype
    ) -> Tensor:
        matrix = error.new_empty(rows, columns, dtype=dtype)
        if matrix.numel() > 0:
            launch.fill(matrix, seed, row_offset, column_offset, distribution)
        return matrix

    return slabs.project(generate, error, row_offsets, sizes, scales, column_offset, dtype)


def split(error: Tensor, terms: int) -> list[Tensor]:
    """The numbers of bf16 whose sum an fp32 error is, the largest first; see `_accumulate`."""
    parts = []
    for _ in range(terms - 1):
        head = (error.view(torch.int32) & -0x10000).view(torch.float32)
        parts.append(head.bfloat16())
        error = torch.where(error.isinf(), 0.0, error - head)
    return [*parts, error.bfloat16()]


def project_by_slabs(
    error: Tensor,
    row_offsets: list[int],
    sizes: list[int],
    scales: list[float],
    seed: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The projection by slabs; the error is not fp64.

    The terms of an fp32 error stand side by side, and the slab of U as often: one product adds them
    up in fp32. Where a slab is for one layer, whose dtype is the operands', the product goes there.
    """
    signals = [error.new_empty(error.shape[0], size, dtype=dtype) for size in sizes]
    for top, bottom in slabs.cut(error.shape[0], _ERROR_ROWS):
        block = [signal[top:bottom] for signal in signals]
        _block_by_slabs(
            error[top:bottom], block, row_offsets, sizes, scales, seed, column_offset, distribution
        )
    return signals


def _block_by_slabs(
    error, signals, row_offsets, sizes, scales, seed, column_offset, distribution
) -> None:
    count, columns = error.shape
    terms = launch.terms_of(error)
    operand = launch.operand_of(error)
    parts = [part.to(operand) for part in (split(error, terms) if terms else [error])]
    factor = math.sqrt(3) if distribution == "uniform" else 1.0
    slab_rows, slab_columns = slab_shape(columns, max(terms, 1))
    chunks = list(slabs.cut(columns, slab_columns))
    errors = [torch.cat([part[:, slice(*chunk)] for part in parts], 1) for chunk in chunks]
    copies = len(parts)
    del parts
    stride = -(-slab_columns * copies // 8) * 8
    workspace = error.new_empty(slab_rows, stride, dtype=operand)
    sums_rows = max(slabs.WORKSPACE_BYTES // 2 // (8 * count), 1)

    for slab in slabs.union_slabs(row_offsets, sizes, scales, slab_rows):
        rows = slab.last - slab.first
        sums = None
        for some, (left, right) in zip(errors, chunks, strict=True):
            width = right - left
            entries = workspace[:rows, : width * copies]
            first, *others = entries.split(width, 1)
            launch.fill(first, seed, slab.first, column_offset + left, distribution, True)
            for other in others:
                other.copy_(first)
            if len(chunks) > 1:
                product = _product(some, entries)
                sums = product if sums is None else sums.add_(product)
            elif not _into_layers(slab, signals, some, entries, factor):
                for top, bottom in slabs.cut(rows, sums_rows):
                    piece = slab._replace(first=slab.first + top, last=slab.first + bottom)
                    _scale(piece, signals, _product(some, entries[top:bottom]), factor)
        if sums is not None:
            _scale(slab, signals, sums, factor)


def _product(error: Tensor, entries: Tensor, out: Tensor | None = None) -> Tensor:
    """error @ entries.T in fp32."""
    if error.dtype == torch.float32:
        return torch.mm(error, entries.T, out=out)
    return torch.mm(error, entries.T, out_dtype=torch.float32, out=out)


def _scale(slab: slabs.Slab, signals: list[Tensor], sums: Tensor, factor: float) -> None:
    """sums [M, rows of the slab], scaled, into all of its layers."""
    for layer in slab.layers:
        if layer.first < slab.last and slab.first < layer.last:
            in_slab, in_layer = slab.overlap(layer)
            signal = signals[layer.place][:, in_layer]
            torch.mul(sums[:, in_slab], layer.scale * factor, out=signal)


def _into_layers(
    slab: slabs.Slab, signals: list[Tensor], error: Tensor, entries: Tensor, factor: float
) -> bool:
    """The product with a slab where it needs no other place than a signal; else False.

    One layer of the operands' dtype is written by the product alone. In fp32, the product goes into
    a layer that holds the whole slab, and from there to the others; that layer is scaled last.
    """
    dtype = signals[0].dtype
    holders = [
        layer for layer in slab.layers if layer.first <= slab.first and slab.last <= layer.last
    ]
    if not holders:
        return False
    holder = holders[0]
    signal = signals[holder.place][:, slab.overlap(holder)[1]]
    scale = holder.scale * factor
    if dtype == error.dtype and len(slab.layers) == 1:
        torch.addmm(signal, error, entries.T, beta=0, alpha=scale, out=signal)
        return True
    if dtype == torch.float32:
        _product(error, entries, out=signal)
        others = [layer for layer in slab.layers if layer is not holder]
        _scale(slab._replace(layers=others), signals, signal, factor)
        signal.mul_(scale)
        return True
    return False
