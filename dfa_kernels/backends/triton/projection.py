"""Which way a projection goes, fused or by slabs.

The fused kernel makes every entry once per tile of the error's rows, and multiplies it where it was
made. By slabs, every entry is made once and stored in 16 bits in a bounded workspace, which the
vendor's matrix product reads: see `tensor_cores`. `Cost` says which is quicker; fp32 errors at the
highest precision are fused whatever it says, because a vendor's product keeps less of them. An fp64
error is nothing for tensor cores, and goes through `dfa_kernels.backends.slabs`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dfa_kernels.backends import slabs, tensor_cores
from dfa_kernels.backends.triton import launch
from dfa_kernels.backends.triton.plan import Kept

_log = logging.getLogger("dfa_kernels")

# Entries a second, from instruction counts of compiled sm_90 code at the issue rate of an H200, and
# the rate of its matrix product. The choice needs only their ratio, which other GPUs come close to.
_GENERATION = {"normal": 1.5e12, "uniform": 2.5e12, "rademacher": 6e12}
_MULTIPLICATION = 6e14
_BYTES = 4e12  # a second, read or written
_SLAB_SECONDS = 20e-6  # to launch what one slab takes

_FUSED_COLUMNS = 2**30  # the fused kernel counts columns in 32 bits


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
        slab_count = tensor_cores.slab_count(rows, count, columns, products, not scaled_apart)
        by_slabs = rows * columns / generation + slab_count * _SLAB_SECONDS
        by_slabs += 2 * rows * columns * count * products / _MULTIPLICATION
        by_slabs += 8 * rows * count * scaled_apart / _BYTES
        return cls(max(made, multiplied), by_slabs)


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
    index = error.get_device()
    arguments = (row_offsets, sizes, scales, seed, column_offset, distribution, dtype)
    if launch.is_current(index):
        return _project(index, error, *arguments)
    with torch.cuda.device(index):
        return _project(index, error, *arguments)


def _project(
    index: int,
    error: Tensor,
    row_offsets: list[int],
    sizes: list[int],
    scales: list[float],
    seed: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    """`project` on the current device, whose number is `index`."""
    key = (
        error.shape,
        error.stride(),
        error.dtype,
        index,
        error.data_ptr() % 16 == 0,
        tuple(row_offsets),
        tuple(sizes),
        tuple(scales),
        column_offset,
        distribution,
        dtype,
        error.dtype is torch.float32 and torch.get_float32_matmul_precision(),
    )
    way = _ways.get(key)
    if way is None:
        if error.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "project: call it once with such an error and these layers before capturing a "
                "CUDA graph, so that what runs is compiled and what it reads is on the device"
            )
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
        return _by_slabs(error, *layers, *options)
    terms = launch.terms_of(error)
    tile = launch.tile_for(count, distribution, terms, launch.Operands.on(error.device).fragments)
    scaled_apart = not tensor_cores.written_in_place(error, len(sizes), dtype)
    rows = slabs.union_rows(row_offsets, sizes)
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
    return _by_slabs(error, *layers, *options)


def _by_slabs(
    error: Tensor,
    row_offsets: list[int],
    sizes: list[int],
    scales: list[float],
    column_offset: int,
    distribution: str,
    dtype: torch.dtype,
) -> Callable[[Tensor, int], list[Tensor]]:
    """The function of an error and a seed that projects errors like this one by slabs."""
    layers = (row_offsets, sizes, scales)
    if error.dtype == torch.float64:
        return lambda error, seed: slabs.project(
            _generator(error.device, seed, distribution, False),
            error,
            *layers,
            column_offset,
            dtype,
        )
    return lambda error, seed: tensor_cores.project(
        _generator(error.device, seed, distribution, True),
        error,
        *layers,
        column_offset,
        distribution,
        dtype,
    )


def ways(error: Tensor, distribution: str) -> Iterator[tuple[str, Callable[..., list[Tensor]]]]:
    """See `dfa_kernels.backends.triton.ways`."""
    short = error.shape[1] <= _FUSED_COLUMNS
    if error.dtype != torch.float64 and short:
        terms = launch.terms_of(error)
        fragments = launch.Operands.on(error.device).fragments
        for split in (False, True) if terms > 1 else (False,):
            for tile in launch.tiles(distribution, terms, fragments):
                name = f"fused {tile.rows} x {tile.error_rows}"
                fused = functools.partial(launch.Fused, tile=tile, split=split)
                yield (
                    f"{name}, split beforehand" if split else name,
                    functools.partial(_through, fused),
                )
        if terms == 3:
            return
    yield "slabs", functools.partial(_through, _by_slabs)


def _through(
    way: Callable[..., Callable[[Tensor, int], list[Tensor]]],
    error: Tensor,
    row_offsets: list[int],
    sizes: list[int],
    scales: list[float],
    seed: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`project` by one way."""
    with launch.on(error.device):
        options = (column_offset, distribution, dtype or error.dtype)
        return way(error, row_offsets, sizes, scales, *options)(error, seed)


def _generator(device: torch.device, seed: int, distribution: str, lattice: bool) -> slabs.Generate:
    """Makes blocks of U; `lattice` leaves out the factor of uniform entries."""

    def generate(
        rows: int, columns: int, row_offset: int, column_offset: int, dtype: torch.dtype
    ) -> Tensor:
        matrix = torch.empty(rows, columns, dtype=dtype, device=device)
        if matrix.numel() > 0:
            launch.fill(matrix, seed, row_offset, column_offset, distribution, lattice)
        return matrix

    return generate
