"""Launches of structured feedback: the projection, its transpose and pieces of the matrix.

An error that lies in one block of columns is one launch (unless fp64 is to become 16 bits). Others
are transformed once, as many rows of the batch at a time as a bounded workspace holds, and then
take one launch for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dfa_kernels.backends.triton import launch
from dfa_kernels.backends.triton import structured_kernels as kernels
from dfa_kernels.backends.triton.launch import DTYPES, INTERPRETED, TARGET, Launch
from dfa_kernels.backends.triton.plan import Kept, Plan, plan_for
from dfa_kernels.hadamard import BLOCK, FACTOR
from dfa_kernels.layers import Layers
from dfa_kernels.stream import Stream, arithmetic

WORKSPACE_BYTES = 2**25  # or what one row of the error takes
# Rows of the error, or output blocks, of a program. A program is one warp, so more of them need
# more registers: a row is 32 numbers a lane. Of AMD's 64 lanes two rows fill a warp. The
# interpreter takes as long for many.
ROWS = 8 if INTERPRETED else 2 if TARGET == "hip" else 1
# A row of the error is transformed for each `_WALK` output blocks, or fewer if programs are few.
_WALK = 16
_PROGRAMS = 2**13
# Output blocks of a program that share what it reads of the workspace. With two in fp64 it spills.
BLOCKS = {torch.float32: 4, torch.float64: 1}


def options(kernel: object, wide: torch.dtype, target: str) -> dict[str, object]:
    """What a kernel is compiled with. A product is rounded before it is added.

    ptxas limits itself to 168 registers, with which an output block in fp64 would spill.
    """
    spills = kernel is kernels.outer_kernel and wide == torch.float64 and target == "cuda"
    return {"enable_fp_fusion": False, **({"maxnreg": 255} if spills else {})}


def _launch(
    kernel: object, grid: int, *constants: object, wide: torch.dtype = torch.float32
) -> Launch:
    """One warp a program."""
    return Launch(kernel, grid, constants, 1, **options(kernel, wide, TARGET))


def _quad(dtype: torch.dtype) -> int:
    """Numbers in 16 bytes, which a lane reads at once from a workspace."""
    return 16 // dtype.itemsize


def _cut(batch: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """The batch in parts that a workspace holds: the first row, and how many."""
    step = max(WORKSPACE_BYTES // max(row_bytes, 1), 1)
    return ((first, min(step, batch - first)) for first in range(0, batch, step))


def _plan(layers: Layers, dtype: torch.dtype, device: torch.device) -> Plan:
    return plan_for(layers, FACTOR, BLOCK, device, dtype, whole=True)


class Structured:
    """The projection of errors of one shape, layout and device into a set of layers.

    As `launch.Fused`, of any dtype, with a batch of at least one. `by_workspace`: use one also
    where a single launch would do.
    """

    def __init__(
        self,
        error: Tensor,
        layers: Layers,
        column_offset: int,
        distribution: str,
        dtype: torch.dtype,
        *,
        by_workspace: bool = False,
    ) -> None:
        batch, columns = error.shape
        sizes = layers.sizes
        first_block, shift = divmod(column_offset, BLOCK)
        blocks = -(-(shift + columns) // BLOCK) if columns else 0
        wide = arithmetic(error.dtype)
        plan = _plan(layers, wide, error.device)
        tiles = plan.tiles.shape[0]
        self._plan = plan
        self._batch, self._sizes = batch, sizes
        self._like = error.new_empty(0, dtype=dtype)
        self._stream = launch.stream_of(error.device)
        self._wide, self._blocks, self._first_block = wide, blocks, first_block
        self._columns, self._shift = columns, shift
        self._strides = error.stride()
        outputs = len(sizes) if len(sizes) <= launch.OUTPUTS else 0
        constants = outputs, DTYPES[dtype], DTYPES[wide], TARGET
        self._tables = plan.tiles, plan.layers, plan.scales, tiles
        # To round fp64 to 16 bits at once takes registers that z in fp64 does not leave.
        spills = wide == torch.float64 and dtype.itemsize == 2
        self._direct = blocks == 1 and not by_workspace and not spills
        if self._direct:
            rows = -(-batch // ROWS)
            self._walk = min(max(rows * tiles // _PROGRAMS, 1), _WALK)
            if INTERPRETED:
                self._walk = _WALK
            grid = rows * -(-tiles // self._walk)
            self._project = _launch(kernels.project_kernel, grid, *constants, ROWS)
            return
        quad, together = _quad(wide), BLOCKS[wide]
        self._passes = [
            (
                first,
                count,
                _launch(kernels.inner_kernel, -(-count // ROWS) * blocks, DTYPES[wide], quad, ROWS),
                _launch(
                    kernels.outer_kernel,
                    count * -(-tiles // together),
                    *constants,
                    quad,
                    together,
                    wide=wide,
                ),
            )
            for first, count in _cut(batch, blocks * BLOCK * wide.itemsize)
        ]

    def __call__(self, error: Tensor, seed: int) -> list[Tensor]:
        """One signal [batch, size] per layer."""
        batch, new = self._batch, self._like.new_empty
        signals = [new(batch, size) for size in self._sizes]
        stream_id = self._stream()
        capturing = launch.capturing()
        self._plan.read_by(stream_id, capturing)
        ordered = [signals[i] for i in self._plan.order]
        outputs = launch.outputs_of(ordered, stream_id, capturing)
        where = self._columns, self._shift, self._first_block
        if self._direct:
            self._project(
                stream_id,
                error,
                outputs,
                *self._tables,
                self._walk,
                batch,
                *where,
                seed,
                *self._strides,
            )
            return signals
        blocks = self._blocks
        most = self._passes[0][1]
        z = error.new_empty(most, blocks, BLOCK, dtype=self._wide)
        for first, count, inner, outer in self._passes:
            if blocks:
                inner(stream_id, error, z, first, count, *where, blocks, seed, *self._strides)
            outer(stream_id, z, outputs, *self._tables, first, self._first_block, blocks, seed)
        return signals


def project_adjoint(
    signals: Sequence[Tensor], layers: Layers, stream: Stream, columns: int, dtype: torch.dtype
) -> Tensor:
    """The transpose of the projection: one signal [batch, size] per layer -> [batch, columns]."""
    batch, device = signals[0].shape[0], signals[0].device
    error = signals[0].new_empty(batch, columns, dtype=dtype)
    if error.numel() == 0:
        return error
    wide = arithmetic(dtype)
    first_block, shift = divmod(stream.column_offset, BLOCK)
    blocks = -(-(shift + columns) // BLOCK)
    capturing = launch.capturing()
    layout = tuple((one.dtype, one.is_contiguous(), one.data_ptr() % 16) for one in signals)
    key = device, layers, batch, columns, dtype, stream.column_offset, layout
    plan = _adjoints.get(key) if capturing else _plan(layers, wide, device)
    if plan is None:
        raise RuntimeError(
            "project_adjoint: call it once with such signals before capturing a CUDA graph, so "
            "that what runs is compiled and what it reads is on the device"
        )
    tiles = plan.tiles.shape[0]
    stream_id = launch.stream_of(device)()
    plan.read_by(stream_id, capturing)
    given = signals[0].dtype if len({one.dtype for one in signals}) == 1 else wide
    read = [signals[i].to(given).contiguous() for i in plan.order]
    addresses = launch.outputs_of(read, stream_id, capturing)
    count = len(read) if len(read) <= launch.OUTPUTS else 0
    quad = _quad(wide)
    block_bytes = BLOCK * wide.itemsize
    # A half of the workspace is for the output blocks, the other for the sums.
    for first, some in _cut(batch, 2 * blocks * block_bytes):
        rows = -(-some // ROWS)
        step = min(max(WORKSPACE_BYTES // (2 * some * block_bytes), 1), tiles)
        v = error.new_empty(some, step, BLOCK, dtype=wide)
        sums = error.new_empty(some if step < tiles else 0, blocks, BLOCK, dtype=wide)
        for tile in range(0, tiles, step):
            those = min(step, tiles - tile)
            spread = _kept(
                device,
                kernels.spread_kernel,
                rows * those,
                (count, DTYPES[given], DTYPES[wide], TARGET, quad, ROWS),
                aligned=tuple(one.data_ptr() % 16 == 0 for one in read[:count]),
            )
            tables = plan.tiles, plan.layers, plan.scales
            spread(stream_id, addresses, v, *tables, tile, those, first, some)
            last = tile + those == tiles
            collect = _kept(
                device,
                kernels.collect_kernel,
                rows * blocks,
                (DTYPES[dtype], DTYPES[wide], TARGET, quad, ROWS, tile == 0, last),
                aligned=(error[first:].data_ptr() % 16 == 0,),
            )
            where = columns, shift, first_block, blocks, stream.seed
            collect(stream_id, v, sums, error[first:], plan.tiles, tile, those, some, *where)
    _adjoints.keep(key, plan)
    return error


def fill(matrix: Tensor, row_offset: int, stream: Stream) -> Tensor:
    """Fill a contiguous matrix with U from row `row_offset` on, and return it."""
    if matrix.numel() == 0:
        return matrix
    rows, columns = matrix.shape
    first_block, shift = divmod(stream.column_offset, BLOCK)
    blocks = -(-(shift + columns) // BLOCK)
    grid = -(-rows // ROWS) * blocks
    constants = (DTYPES[matrix.dtype], TARGET, ROWS)
    write = _kept(matrix.device, kernels.matrix_kernel, grid, constants)
    unit = matrix.new_zeros(2 * BLOCK - 1, dtype=torch.float32)
    unit[BLOCK - 1 : BLOCK].fill_(1.0)
    numbers = (rows, row_offset, columns, shift, first_block, blocks, stream.seed, columns)
    write(launch.stream_of(matrix.device)(), unit, matrix, *numbers)
    return matrix


_launches = Kept()
_adjoints = Kept()  # the plans of what has been called, so that a CUDA graph can hold it


def _kept(
    device: torch.device, kernel: object, grid: int, constants: tuple, aligned: tuple = ()
) -> Launch:
    """A launch that is kept from call to call."""
    key = (device, kernel, grid, constants, aligned)
    found = _launches.get(key)
    if found is None:
        found = _launch(kernel, grid, *constants)
        _launches.keep(key, found)
    return found
