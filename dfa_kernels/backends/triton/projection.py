"""Chooses which way a projection goes, fused or by slabs.

The fused kernel makes every entry once per tile of the batch, and multiplies it where it was made.
By slabs, every entry is made once and stored in 16 bits in a bounded workspace, which the vendor's
matrix product reads: see `tensor_cores`. `Cost` estimates which is faster. fp32 errors at the
highest precision are always fused, because a vendor's product is less accurate. Tensor cores
multiply no fp64 here; such errors go through `dfa_kernels.backends.slabs`. Structured feedback has
its own way: see `structured`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dfa_kernels.backends import slabs, tensor_cores
from dfa_kernels.backends.triton import launch, structured
from dfa_kernels.backends.triton.plan import Kept
from dfa_kernels.layers import Layers
from dfa_kernels.stream import DENSE, STRUCTURED, Stream

_log = logging.getLogger("dfa_kernels")

# Of an H200: the issue slots of its lanes per second, and the rate of its matrix product. The
# choice needs only their ratio, which is similar on other GPUs.
_SLOTS = 2.9e13
_MULTIPLICATION = 6e14
_BYTES = 4e12  # a second, read or written
_SLAB_SECONDS = 20e-6  # to launch the kernels of one slab

_FUSED_COLUMNS = 2**30  # the fused kernel counts columns in 32 bits

# Projects errors of one shape and layout: (error, seed) -> signals.
Way = Callable[[Tensor, int], list[Tensor]]


class Cost(NamedTuple):
    """Estimated seconds of each way."""

    fused: float
    by_slabs: float

    @classmethod
    def of(
        cls,
        tile: launch.Tile,
        batch: int,
        columns: int,
        rows: int,
        distribution: str,
        terms: int,
        scaled_apart: bool,
    ) -> Cost:
        """For an error [batch, columns] of `terms` terms, `rows` rows of U and the fused `tile`.

        `scaled_apart`: slabs scale the signals in a separate pass.
        """
        generation = _SLOTS / DENSE[distribution].slots  # entries a second
        products = max(terms, 1)
        # A tile that the error fills only in part takes its full time.
        entries = rows * -(-columns // tile.columns) * tile.columns
        tiles = -(-batch // tile.batch)
        made = entries * tiles / generation
        multiplied = 2 * entries * tiles * tile.batch * products / _MULTIPLICATION
        slab_count = tensor_cores.slab_count(rows, batch, columns, products, not scaled_apart)
        by_slabs = rows * columns / generation + slab_count * _SLAB_SECONDS
        by_slabs += 2 * rows * columns * batch * products / _MULTIPLICATION
        by_slabs += 8 * rows * batch * scaled_apart / _BYTES
        return cls(max(made, multiplied), by_slabs)


def project(error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype) -> list[Tensor]:
    """The signals of an error [batch, n]: one [batch, size] per layer."""
    index = error.get_device()
    if launch.is_current(index):
        return _project(index, error, layers, stream, dtype)
    with torch.cuda.device(index):
        return _project(index, error, layers, stream, dtype)


def _project(
    index: int, error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype
) -> list[Tensor]:
    """`project` on the current device, whose number is `index`."""
    seed, column_offset, distribution = stream
    key = (
        error.shape,
        error.stride(),
        error.dtype,
        index,
        error.data_ptr() % 16 == 0,
        layers,
        column_offset,
        distribution,
        dtype,
        error.dtype is torch.float32 and torch.get_float32_matmul_precision(),
    )
    way = _ways.get(key)
    if way is None:
        if launch.capturing():
            raise RuntimeError(
                "project: call it once with such an error and these layers before capturing a "
                "CUDA graph, so that what runs is compiled and what it reads is on the device"
            )
        way = _way(error, layers, column_offset, distribution, dtype)
        _ways.keep(key, way)
    return way(error, seed)


_ways = Kept()


def _way(
    error: Tensor, layers: Layers, column_offset: int, distribution: str, dtype: torch.dtype
) -> Way:
    """Choose how to project errors like this one, and log it."""
    batch, columns = error.shape
    if batch == 0:
        return lambda error, seed: [error.new_empty(0, size, dtype=dtype) for size in layers.sizes]
    if distribution in STRUCTURED:
        return structured.Structured(error, layers, column_offset, distribution, dtype)
    if error.dtype == torch.float64:
        return _by_slabs(error, layers, column_offset, distribution, dtype)
    terms = launch.terms_of(error)
    tile = launch.tile_for(batch, distribution, terms, launch.Operands.on(error.device).fragments)
    scaled_apart = not tensor_cores.written_in_place(error, len(layers.sizes), dtype)
    rows = layers.union_rows()
    cost = Cost.of(tile, batch, columns, rows, distribution, terms, scaled_apart)
    one_tile = batch <= tile.batch  # both ways make every entry once
    # A vendor's product of three terms sums all columns in the tensor cores, which loses what the
    # third term adds; see `project_kernel`.
    fused_anyway = one_tile or terms == 3
    fused = columns <= _FUSED_COLUMNS and (fused_anyway or cost.fused <= cost.by_slabs)
    _log.debug(
        "project: %s, by estimates of %.3g ms fused and %.3g ms by slabs, for an error of "
        "%d x %d and %d rows of U",
        "fused" if fused else "by slabs",
        1e3 * cost.fused,
        1e3 * cost.by_slabs,
        batch,
        columns,
        rows,
    )
    way = launch.Fused if fused else _by_slabs
    return way(error, layers, column_offset, distribution, dtype)


def _by_slabs(
    error: Tensor, layers: Layers, column_offset: int, distribution: str, dtype: torch.dtype
) -> Way:
    """How to project errors like this one by slabs."""
    in_float64, device = error.dtype == torch.float64, error.device
    project_slabs = slabs.project if in_float64 else tensor_cores.project

    def generate(
        rows: int, columns: int, row_offset: int, stream: Stream, dtype: torch.dtype
    ) -> Tensor:
        matrix = torch.empty(rows, columns, dtype=dtype, device=device)
        return launch.fill(matrix, row_offset, stream, lattice=not in_float64)

    return lambda error, seed: project_slabs(
        generate, error, layers, Stream(seed, column_offset, distribution), dtype
    )


def ways(error: Tensor, distribution: str) -> Iterator[tuple[str, Callable[..., list[Tensor]]]]:
    """See `dfa_kernels.backends.triton.ways`."""
    if distribution in STRUCTURED:
        yield "transforms", functools.partial(_through, structured.Structured)
        through = functools.partial(structured.Structured, by_workspace=True)
        yield "transforms through a workspace", functools.partial(_through, through)
        return
    short = error.shape[1] <= _FUSED_COLUMNS
    if error.dtype != torch.float64 and short:
        terms = launch.terms_of(error)
        fragments = launch.Operands.on(error.device).fragments
        for split in (False, True) if terms > 1 else (False,):
            for tile in launch.tiles(distribution, terms, fragments):
                name = f"fused {tile.rows} x {tile.batch}"
                fused = functools.partial(launch.Fused, tile=tile, split=split)
                yield (
                    f"{name}, split beforehand" if split else name,
                    functools.partial(_through, fused),
                )
        if terms == 3:
            return
    yield "slabs", functools.partial(_through, _by_slabs)


def _through(
    way: Callable[..., Way], error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype
) -> list[Tensor]:
    """`project` by the given way."""
    seed, *where = stream
    with launch.on(error.device):
        return way(error, layers, *where, dtype)(error, seed)
