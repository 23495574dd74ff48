"""Launches of the Triton kernels: tile sizes, arguments, and what a launch is compiled for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfa_kernels import stream
from dfa_kernels.backends.triton import kernels
from dfa_kernels.backends.triton.plan import Kept, plan_for

INTERPRETED = not isinstance(kernels.project_kernel, triton.runtime.JITFunction)
TARGET = "interpreter" if INTERPRETED else "hip" if torch.version.hip else "cuda"
_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_OUTPUTS = 4  # passed as arguments of their own; more go through a table
STAGES = 2  # of the error's way to shared memory
_NARROW = 2**31 - 2**7  # elements of a tile's outputs that 32 bits can count
_ADDRESSES = 64  # arguments of one launch that fills the table


class Tile(NamedTuple):
    """Shape of a program's tile: rows of U, rows of the error, columns at a time, and warps."""

    l: int
    m: int
    k: int
    warps: int


# For an error of up to so many rows. Chosen from compiled sm_90 and sm_80 code: no spills, and as
# many warps on a multiprocessor as the registers of a tile's sums allow.
_TILES = {
    16: Tile(128, 16, 32, 4),
    32: Tile(128, 32, 32, 4),
    64: Tile(128, 64, 32, 4),
    128: Tile(64, 128, 64, 4),
}
# The terms of an fp32 error are made in every program: more rows of U share them.
_TILE_OF_TERMS = Tile(128, 128, 32, 8)


def tile_for(count: int, distribution: str, terms: int, fragments: bool) -> Tile:
    """The tile for an error of `count` rows that is the sum of `terms` terms."""
    if distribution == "rademacher":  # one Philox block is 128 columns of a row
        return Tile(128, min(max(16, triton.next_power_of_2(count)), 64), 128, 4)
    most = 128 if fragments else 64
    bucket = min(max(16, triton.next_power_of_2(count)), most)
    if bucket == 128 and terms > 1:
        return _TILE_OF_TERMS
    return _TILES[bucket]


def matrix_tile(distribution: str) -> tuple[int, int, int]:
    """Rows, columns and warps of a program that fills a part of a matrix."""
    return (128, 128, 4) if distribution == "rademacher" else (32, 128, 4)


def terms_of(error: Tensor) -> int:
    """How many numbers of bf16 an error is the sum of; 0 if it is an operand as it is.

    As PyTorch's own products do, an fp32 error follows torch.get_float32_matmul_precision().
    """
    if error.dtype != torch.float32:
        return 0
    return {"highest": 3, "high": 2, "medium": 1}[torch.get_float32_matmul_precision()]


def operand_of(error: Tensor) -> torch.dtype:
    """The dtype of the entries that an error is multiplied with; they are exact in all."""
    if INTERPRETED:  # its product of bf16 numbers is wrong
        return torch.float32
    return torch.float16 if error.dtype == torch.float16 else torch.bfloat16


def uses_fragments(device: torch.device) -> bool:
    """Whether a product takes entries from the registers they were made in (on sm_90).

    There the warps divide a tile's rows of U among them. Before, they divide the error as well, and
    would make an entry more than once; it goes through shared memory instead.
    """
    if INTERPRETED:
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


_compiled: dict[tuple, Any] = {}


def run(kernel: Any, grid: int, arguments: tuple, constants: tuple, warps: int, key: tuple) -> None:
    """Launch on the current device and stream.

    `key` says what is compiled: it must differ wherever Triton would compile anew. So a launch
    after the first goes straight to the compiled kernel, past the search of Triton's own cache.
    """
    if not INTERPRETED:
        key = (kernel, warps, torch.cuda.current_device(), *constants, *key)
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[(grid, 1, 1)](*arguments, *constants)
            return
    compiled = kernel[(grid,)](*arguments, *constants, num_warps=warps)
    if not INTERPRETED:
        _compiled[key] = compiled


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


def _outputs(signals: list[Tensor], stream_id: int, capturing: bool) -> tuple[tuple, int]:
    """The kernel's argument `outputs`, and how many of its parts are signals; 0: it is a table.

    Signals are tensors of their own, so a call has new addresses, and they must reach the device
    without a copy from the host: that would wait, or leave a captured graph reading host memory
    that is gone. Few signals are arguments. More go into a table, which a small kernel fills from
    its arguments; the table of addresses that recur, as they do from step to step, is kept for the
    stream it was filled on. A graph's own addresses never change, and its table is memory of its
    pool.
    """
    if len(signals) <= _OUTPUTS:
        padded = signals + signals[-1:] * (triton.next_power_of_2(len(signals)) - len(signals))
        return tuple(padded), len(padded)
    addresses = tuple(signal.data_ptr() for signal in signals)
    key = (signals[0].device, stream_id, addresses)
    table = None if capturing else _tables.get(key)
    if table is None:
        padding = addresses[-1:] * (-len(addresses) % _ADDRESSES)
        table = signals[0].new_empty(len(addresses + padding), dtype=torch.int64)
        for left in range(0, len(addresses), _ADDRESSES):
            some = (addresses + padding)[left : left + _ADDRESSES]
            run(kernels.addresses_kernel, 1, (table[left:], some), (_ADDRESSES,), 1, ())
        if not capturing:
            _tables.keep(key, table)
    return (table,), 0


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
    """The fused projection, on the error's device, which is current. The error is not fp64."""
    count, columns = error.shape
    signals = [error.new_empty(count, size, dtype=dtype) for size in sizes]
    if count == 0:
        return signals
    terms = terms_of(error)
    fragments = uses_fragments(error.device)
    tile = tile_for(count, distribution, terms, fragments)
    stream_id, capturing = 0, False
    if not INTERPRETED:
        stream_id = triton.runtime.driver.active.get_current_stream(error.device.index)
        capturing = torch.cuda.is_current_stream_capturing()
    factor = math.sqrt(3) if distribution == "uniform" else 1.0
    plan = plan_for(
        row_offsets, sizes, scales, factor, tile.l, error.device, stream_id, capturing
    )
    outputs, by_value = _outputs([signals[i] for i in plan.order], stream_id, capturing)
    width = stream.BLOCK[distribution]
    shift = column_offset % width
    row_stride, column_stride = error.stride()
    unit = column_stride == 1
    vector = _vector(error, row_stride, columns, shift) if unit else 1
    tile_count = plan.tiles.shape[0]
    constants = (
        distribution,
        width,
        by_value,
        _DTYPES[dtype],
        _DTYPES[operand_of(error)],
        terms,
        vector,
        unit,
        tl.int32 if plan.largest * tile.m < _NARROW else tl.int64,
        TARGET,
        fragments,
        tile.l,
        tile.m,
        tile.k,
        STAGES,
    )
    run(
        kernels.project_kernel,
        tile_count * -(-count // tile.m),
        (
            error,
            outputs,
            plan.tiles,
            plan.layers,
            plan.scales,
            tile_count,
            count,
            columns,
            shift,
            column_offset // width,
            seed,
            row_stride,
            column_stride,
        ),
        constants,
        tile.warps,
        (error.dtype, error.data_ptr() % 16 == 0),
    )
    return signals


def fill(
    matrix: Tensor,
    seed: int,
    row_offset: int,
    column_offset: int,
    distribution: str,
    lattice: bool = False,
) -> None:
    """Make the block of U that begins at (row_offset, column_offset); rows may have a stride.

    With `lattice`, uniform entries are made without their factor sqrt(3), which makes them exact.
    """
    rows, columns = matrix.shape
    width = stream.BLOCK[distribution]
    shift = column_offset % width
    row_stride = matrix.stride(0)
    block_rows, block_columns, warps = matrix_tile(distribution)
    grid = -(-rows // block_rows) * -(-(shift + columns) // block_columns)
    constants = (
        distribution,
        width,
        _DTYPES[matrix.dtype],
        lattice,
        _vector(matrix, row_stride, columns, shift),
        TARGET,
        block_rows,
        block_columns,
    )
    arguments = (
        matrix,
        rows,
        columns,
        row_stride,
        shift,
        column_offset // width,
        row_offset,
        seed,
    )
    key = (matrix.dtype, matrix.data_ptr() % 16 == 0)
    run(kernels.matrix_kernel, grid, arguments, constants, warps, key)
