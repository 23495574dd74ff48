"""Launches of the Triton kernels: tile sizes, arguments, and what a launch is compiled for."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfa_kernels.backends import tensor_cores
from dfa_kernels.backends.triton import kernels
from dfa_kernels.backends.triton.plan import Kept, plan_for
from dfa_kernels.layers import Layers
from dfa_kernels.stream import DENSE, Stream

INTERPRETED = not isinstance(kernels.project_kernel, triton.runtime.JITFunction)
TARGET = "interpreter" if INTERPRETED else "hip" if torch.version.hip else "cuda"
DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
OUTPUTS = 4  # signals passed as arguments of their own; more go through a table
STAGES = 2  # of the pipeline that loads the error to shared memory
_NARROW = 2**31 - 2**7  # elements of a tile's outputs that 32 bits can count
_ADDRESSES = 64  # that one launch writes to the table


class Tile(NamedTuple):
    """Shape of a program's tile: rows of U, batch, columns at a time, and warps."""

    rows: int
    batch: int
    columns: int
    warps: int


# Tiles by batch. Chosen from compiled sm_90 and sm_80 code: no spills, and as many warps on a
# multiprocessor as the registers of a tile's sums allow.
_TILES = (Tile(128, 16, 32, 4), Tile(128, 32, 32, 4), Tile(128, 64, 32, 4))
_WIDE = Tile(64, 128, 64, 4)
# Every program makes or reads the terms of an fp32 error, so more rows of U share them.
_WIDE_OF_TERMS = Tile(128, 128, 32, 8)
# For GPUs whose products are mma.sync: with 4 warps Triton 3.6 spills.
_MIDDLE_OF_TERMS = Tile(128, 64, 32, 8)
# One Philox block of signs is 128 columns of a row.
_TILES_OF_SIGNS = (Tile(128, 16, 128, 4), Tile(128, 32, 128, 4), Tile(128, 64, 128, 4))
_TILES_OF_SIGNS_AND_TERMS = (Tile(128, 16, 128, 8), Tile(128, 32, 128, 8))
# From this many entries of U on, a small kernel that makes the terms beforehand is worth its
# launch.
_SPLIT_ENTRIES = 2**25
_SPLIT_COLUMNS = 256


def tiles(distribution: str, terms: int, fragments: bool) -> tuple[Tile, ...]:
    """All tiles for errors of `terms` terms, smallest first."""
    if _of_signs(distribution):
        return _TILES_OF_SIGNS_AND_TERMS if terms > 1 else _TILES_OF_SIGNS
    if not fragments:
        return (*_TILES[:-1], _MIDDLE_OF_TERMS) if terms > 1 else _TILES
    return (*_TILES, _WIDE_OF_TERMS if terms > 1 else _WIDE)


def _of_signs(distribution: str) -> bool:
    """Whether a Philox block is so long that tiles must be long, too."""
    return DENSE[distribution].block > _TILES[0].columns


def tile_for(batch: int, distribution: str, terms: int, fragments: bool) -> Tile:
    """The tile for an error [batch, n] of `terms` terms."""
    fitting = tiles(distribution, terms, fragments)
    return next((tile for tile in fitting if batch <= tile.batch), fitting[-1])


def matrix_tile(distribution: str) -> tuple[int, int, int]:
    """Rows, columns and warps of a program that fills a part of a matrix."""
    return (128, 128, 4) if _of_signs(distribution) else (32, 128, 4)


def terms_of(error: Tensor) -> int:
    """How many bf16 terms an error is split into; 0 if it is an operand as it is."""
    return tensor_cores.terms_of(error) if error.dtype == torch.float32 else 0


def operand_of(error: Tensor) -> torch.dtype:
    """The dtype of the entries that an error is multiplied with. They are exact in all."""
    if INTERPRETED:  # its bf16 product is wrong
        return torch.float32
    return torch.float16 if error.dtype == torch.float16 else torch.bfloat16


class Operands(NamedTuple):
    """How entries get from where they are made to the tensor cores.

    `fragments`: in the registers they were made in. `pinned`: through shared memory, from registers
    whose layout the compiler must not choose; see `entries.pinned`.
    """

    fragments: bool
    pinned: bool

    @classmethod
    def on(cls, device: torch.device) -> Operands:
        """The way on a device.

        On sm_90 the warps share out a tile's rows of U, and take fragments. If products are
        mma.sync (sm_80 and sm_120), they share out the batch as well, and would make an entry more
        than once if it were not pinned. sm_100 and ROCm need neither.
        """
        if INTERPRETED:
            return cls(True, False)
        if torch.version.hip is not None:
            return cls(False, False)
        return cls.of(torch.cuda.get_device_capability(device)[0])

    @classmethod
    def of(cls, major: int) -> Operands:
        """The way on NVIDIA GPUs of compute capability `major`."""
        return cls(major == 9, major in (8, 12))


def is_current(index: int) -> bool:
    """Whether kernels are launched on a tensor's device, whose number is `index`."""
    return index < 0 or index == torch.cuda.current_device()  # the CPU's is -1


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which a tensor's device is the current one."""
    if device.type == "cpu" or device.index is None or is_current(device.index):
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> Callable[[], int]:
    """A function that gives the number of a device's current stream; 0 in the interpreter."""
    if INTERPRETED:
        return int
    return functools.partial(triton.runtime.driver.active.get_current_stream, device.index)


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return not INTERPRETED and torch.cuda.is_current_stream_capturing()


class Launch:
    """Launches of a kernel with one grid and one set of compile-time arguments.

    After the first, they go straight to the compiled kernel, without Triton's search for it. So all
    must be on one device, with arguments of the same types and pointers of the same alignment.
    """

    def __init__(
        self, kernel: Any, grid: int, constants: tuple, warps: int, **options: Any
    ) -> None:
        self._first = functools.partial(kernel[(grid,)], num_warps=warps, **options)
        self._grid = grid
        self._constants = constants
        self._again: Any = None

    def __call__(self, stream_id: int, *arguments: Any) -> None:
        """Launch on the current device and stream, which is `stream_id`."""
        if self._again is not None:
            self._again(*arguments, *self._constants, stream=stream_id)
            return
        compiled = self._first(*arguments, *self._constants)
        if not INTERPRETED:
            self._again = compiled[(self._grid, 1, 1)]


@functools.cache
def _write_addresses(device: torch.device) -> Launch:
    return Launch(kernels.addresses_kernel, 1, (_ADDRESSES,), 1)


def _vector(tensor: Tensor, *numbers: int) -> int:
    """The largest power of two, up to 16 bytes, that divides a tensor's address and the numbers.

    All in elements.
    """
    most = 16 // tensor.element_size()
    if tensor.data_ptr() % 16:
        return 1
    common = math.gcd(most, *numbers)
    return common & -common


_tables = Kept()
_fills = Kept()


def outputs_of(signals: list[Tensor], stream_id: int, capturing: bool) -> tuple[Tensor, ...]:
    """The kernel's argument `outputs`: the signals, or one table of their addresses.

    Signals are tensors of their own, so every call has new addresses. They must reach the device
    without a copy from the host, which would wait, or leave a captured graph reading host memory
    that is gone. Few signals are passed as arguments. The addresses of more go into a table, which
    a small kernel fills from its arguments. It is kept for the stream it was filled on, because
    addresses recur from step to step. A graph's own addresses never change, and its table lies in
    its memory pool.
    """
    if len(signals) <= OUTPUTS:
        return tuple(signals)
    addresses = tuple([signal.data_ptr() for signal in signals])
    key = (signals[0].device, stream_id, addresses)
    table = None if capturing else _tables.get(key)
    if table is None:
        padding = addresses[-1:] * (-len(addresses) % _ADDRESSES)
        table = signals[0].new_empty(len(addresses + padding), dtype=torch.int64)
        for left in range(0, len(addresses), _ADDRESSES):
            some = (addresses + padding)[left : left + _ADDRESSES]
            _write_addresses(table.device)(stream_id, table[left:], some)
        if not capturing:
            _tables.keep(key, table)
    return (table,)


class Fused:
    """The fused projection of errors of one shape, layout and device into a set of layers.

    Works out once what does not change from call to call. The error is not fp64, and calls must be
    made on its device. `tile` and `split` (whether the terms of an fp32 error are made beforehand)
    are chosen here if None.
    """

    def __init__(
        self,
        error: Tensor,
        layers: Layers,
        column_offset: int,
        distribution: str,
        dtype: torch.dtype,
        *,
        tile: Tile | None = None,
        split: bool | None = None,
    ) -> None:
        batch, columns = error.shape
        sizes = layers.sizes
        terms = terms_of(error)
        operands = Operands.on(error.device)
        if split is None:
            split = terms > 1 and layers.union_rows() * columns >= _SPLIT_ENTRIES
        if tile is None:
            tile = tile_for(batch, distribution, terms, operands.fragments)
        facts = DENSE[distribution]
        plan = plan_for(layers, facts.factor, tile.rows, error.device)
        block = facts.block
        shift = column_offset % block
        row_stride, column_stride = error.stride()
        tile_count = plan.tiles.shape[0]
        self._split = None
        self._copied = column_stride != 1 and not split
        if split:
            width = -(-(shift + columns) // 8) * 8
            self._terms = terms, batch, width
            grid = batch * -(-width // _SPLIT_COLUMNS)
            self._split = Launch(kernels.split_kernel, grid, (terms, TARGET, _SPLIT_COLUMNS), 4)
            self._split_numbers = batch, columns, shift, row_stride, column_stride, width
            row_stride, columns, shift, vector = width, width, 0, 8
        elif self._copied:
            row_stride = columns
            vector = _vector(error.new_empty(0), row_stride, columns, shift)
        else:
            vector = _vector(error, row_stride, columns, shift)
        self._plan = plan
        self._sorted = plan.order == list(range(len(sizes)))
        self._batch, self._sizes = batch, sizes
        self._like = error.new_empty(0, dtype=dtype)
        self._stream = stream_of(error.device)
        self._before_seed = (
            plan.tiles,
            plan.layers,
            plan.scales,
            tile_count,
            batch,
            columns,
            shift,
            column_offset // block,
        )
        self._strides = row_stride, batch * row_stride
        constants = (
            distribution,
            block,
            len(sizes) if len(sizes) <= OUTPUTS else 0,
            DTYPES[dtype],
            DTYPES[operand_of(error)],
            terms,
            split,
            vector,
            tl.int32 if max(sizes) * tile.batch < _NARROW else tl.int64,
            TARGET,
            *operands,
            *tile[:3],
            STAGES,
        )
        grid = tile_count * -(-batch // tile.batch)
        self._launch = Launch(kernels.project_kernel, grid, constants, tile.warps)

    def __call__(self, error: Tensor, seed: int) -> list[Tensor]:
        """One signal [batch, size] per layer."""
        batch, new = self._batch, self._like.new_empty  # no arguments, which take time to read
        signals = [new(batch, size) for size in self._sizes]
        stream_id = self._stream()
        graph = capturing()
        self._plan.read_by(stream_id, graph)
        if self._split is not None:
            terms = error.new_empty(self._terms, dtype=torch.bfloat16)
            self._split(stream_id, error, terms, *self._split_numbers)
            error = terms
        elif self._copied:
            error = error.contiguous()
        ordered = signals if self._sorted else [signals[i] for i in self._plan.order]
        outputs = outputs_of(ordered, stream_id, graph)
        self._launch(stream_id, error, outputs, *self._before_seed, seed, *self._strides)
        return signals


def fill(matrix: Tensor, row_offset: int, stream: Stream, lattice: bool = False) -> Tensor:
    """Fill `matrix`, whose rows may have a stride, with U from `row_offset` on, and return it.

    With `lattice`, uniform entries are made without their factor sqrt(3), which makes them exact.
    """
    if matrix.numel() == 0:
        return matrix
    rows, columns = matrix.shape
    seed, column_offset, distribution = stream
    facts = DENSE[distribution]
    width = facts.block
    shift = column_offset % width
    row_stride = matrix.stride(0)
    block_rows, block_columns, warps = matrix_tile(distribution)
    grid = -(-rows // block_rows) * -(-(shift + columns) // block_columns)
    constants = (
        distribution,
        width,
        DTYPES[matrix.dtype],
        1.0 if lattice else facts.factor,
        _vector(matrix, row_stride, columns, shift),
        TARGET,
        block_rows,
        block_columns,
    )
    key = (matrix.device, grid, matrix.data_ptr() % 16 == 0, *constants)
    launch = _fills.get(key)
    if launch is None:
        launch = Launch(kernels.matrix_kernel, grid, constants, warps)
        _fills.keep(key, launch)
    first_block = column_offset // width
    numbers = (rows, columns, row_stride, shift, first_block, row_offset, seed)
    launch(stream_of(matrix.device)(), matrix, *numbers)
    return matrix
