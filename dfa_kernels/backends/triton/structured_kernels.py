"""The Triton kernels of structured feedback: `dfa_kernels.hadamard`, addition by addition.

A block of 1024 numbers is a tuple of 32 tensors [ROWS, 32], so that the butterflies between tuples'
elements are plain additions in registers. Element r of the tuple holds, at its lane l, number

    32 l + r    "by lane": stages 1 to 16 are in registers, and lane l's signs are word l
    32 r + l    "by place": stages 32 to 512 are in registers, and 32 lanes are neighbours in memory

With one warp to a program, to turn the one into the other takes a few vector accesses of shared
memory and no barrier between warps. Numbers of a launch are never specialised, as in `kernels`.
A compiler that is free to choose layouts makes every element's move between threads a shuffle of
its own. It does not where loads fix the layout of what is turned. So a loop carries a block from
one turn to the next, and its first numbers come from a load; see `_passed`.

Workspaces hold blocks by lane, in the order of QUAD numbers of each lane in turn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dfa_kernels import hadamard
from dfa_kernels.backends.triton.entries import philox, rounded, widened
from dfa_kernels.backends.triton.kernels import address_of, end

_BLOCK = tl.constexpr(hadamard.BLOCK)
_GROUPS = tl.constexpr(hadamard.BLOCK // 128)  # Philox blocks of one diagonal

_INTEGERS = (
    "tile_count",
    "walk",
    "batch",
    "columns",
    "shift",
    "first_block",
    "block_count",
    "first_m",
    "first_row",
    "rows",
    "seed",
    "row_stride",
    "column_stride",
    "first_tile",
)


@triton.jit
def _butterflies(x):
    """Five stages of a transform, between the tuple's elements at distance 1, 2, 4, 8 and 16."""
    for stage in tl.static_range(5):
        y = ()
        for i in tl.static_range(32):
            if (i >> stage) & 1 == 0:
                y += (x[i] + x[i + (1 << stage)],)
            else:
                y += (x[i - (1 << stage)] - x[i],)
        x = y
    return x


@triton.jit
def _parted(square):
    """[ROWS, 32, 32] as a tuple, by its last dimension."""
    x = (tl.reshape(square, [square.shape[0], 32, 2, 2, 2, 2, 2]),)
    for stage in tl.static_range(5):
        even, odd = (), ()
        for i in tl.static_range(1 << stage):
            first, second = tl.split(x[i])
            even += (first,)
            odd += (second,)
        x = even + odd
    return x


@triton.jit
def _turned(x):
    """By lane to by place, and back: lanes become the tuple's elements."""
    for stage in tl.static_range(5):
        joined = ()
        for i in tl.static_range(16 >> stage):
            joined += (tl.join(x[i], x[i + (16 >> stage)]),)
        x = joined
    square = tl.reshape(x[0], [x[0].shape[0], 32, 32])
    return _parted(tl.permute(square, (0, 2, 1)))


@triton.jit
def _transformed(x):
    """The transform of a block by lane, which comes out by place."""
    return _butterflies(_turned(_butterflies(x)))


@triton.jit
def _words(block, input_block, key0, key1, DOMAIN: tl.constexpr):
    """The signs of a diagonal: word l at lane l. `block` int64 [R, 1] is the output block."""
    lane = tl.arange(0, 32)[None, :]
    group = _GROUPS * input_block.to(tl.uint32) + (lane // 4).to(tl.uint32)
    w0, w1, w2, w3 = philox(group, block, key0, key1, DOMAIN)
    low = tl.where(lane % 2 == 0, w0, w1)
    high = tl.where(lane % 2 == 0, w2, w3)
    return tl.where(lane % 4 < 2, low, high)


@triton.jit
def _inner_words(input_block, key0, key1, DOMAIN: tl.constexpr):
    """The signs of D1 and D2, which no output block has a part in."""
    none = tl.zeros([1, 1], tl.int64)
    return _words(none, input_block, key0, key1, DOMAIN)


@triton.jit
def _signed(value, words, PLACE: tl.constexpr):
    """Numbers `PLACE` of each word's 32, times their signs."""
    # Of a word, column 2i is bit i and column 2i + 1 bit 16 + i.
    shift: tl.constexpr = 31 - PLACE // 2 - 16 * (PLACE % 2)
    if value.dtype == tl.float64:
        sign = (words.to(tl.uint64) << (32 + shift)) & 0x8000000000000000
        value = (value.to(tl.uint64, bitcast=True) ^ sign).to(tl.float64, bitcast=True)
    else:
        sign = (words << shift) & 0x80000000
        value = (value.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _with_signs(x, words):
    """A block by lane, times a diagonal."""
    y = ()
    for i in tl.static_range(32):
        y += (_signed(x[i], words, i),)
    return y


@triton.jit
def _zeros(ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """A block of zeros."""
    x = ()
    for _ in tl.static_range(32):
        x += (tl.zeros([ROWS, 32], DTYPE),)
    return x


@triton.jit
def _plus_with_signs(sums, x, words):
    """The sums of blocks by lane, plus another times a diagonal."""
    y = ()
    for i in tl.static_range(32):
        y += (sums[i] + _signed(x[i], words, i),)
    return y


@triton.jit
def _passed(x, words, STEPS: tl.constexpr, BARE: tl.constexpr, FIRST: tl.constexpr):
    """A block after STEPS turns, with five stages before each but turn BARE.

    It is multiplied with the diagonals in `words` after turns FIRST, FIRST + 2 and so on.
    """
    for step in range(STEPS):
        if step != BARE:
            x = _butterflies(x)
        x = _turned(x)
        sign = tl.zeros([1, 32], tl.uint32)
        for k in tl.static_range(len(words)):
            sign = tl.where(step == FIRST + 2 * k, words[k], sign)
        if len(words) > 0:
            x = _with_signs(x, sign)
    return x


@triton.jit
def _places():
    """The numbers of a block, by place: [1, 32, 32]."""
    return 32 * tl.arange(0, 32)[None, :, None] + tl.arange(0, 32)[None, None, :]


@triton.jit
def _in_workspace(QUAD: tl.constexpr):
    """Where a block's numbers of lane l lie in a workspace: [1, 32 / QUAD, 32, QUAD]."""
    quad = tl.arange(0, 32 // QUAD)[None, :, None, None] * (32 * QUAD)
    lane = tl.arange(0, 32)[None, None, :, None] * QUAD
    return quad + lane + tl.arange(0, QUAD)[None, None, None, :]


@triton.jit
def _loaded(at, QUAD: tl.constexpr):
    """Blocks of a workspace, by lane. `at` [ROWS, 1]: where each begins."""
    values = tl.load(at[:, :, None, None] + _in_workspace(QUAD))
    values = tl.permute(values, (0, 2, 1, 3))
    return _parted(tl.reshape(values, [values.shape[0], 32, 32]))


@triton.jit
def _keep(at, x, mask, QUAD: tl.constexpr):
    """Write blocks by lane to a workspace."""
    lane = tl.arange(0, 32)[None, :] * QUAD
    for i in tl.static_range(32):
        tl.store(at + (i // QUAD * 32 * QUAD + i % QUAD) + lane, x[i], mask=mask)


@triton.jit
def _store(at, x, first, columns, mask, DTYPE: tl.constexpr, TARGET: tl.constexpr):
    """Write a block by place to rows that begin at `at`; its number 0 is column `first`."""
    for i in tl.static_range(32):
        column = first + i * 32 + tl.arange(0, 32)[None, :]
        here = (column >= 0) & (column < columns) & mask
        tl.store(at + column, rounded(x[i], DTYPE, TARGET), mask=here)


@triton.jit
def _inner(error, b, columns, shift, first_block, column_stride, in_batch, key0, key1, ARITHMETIC):
    """z of input block b of the rows at `error` [ROWS, 1], by lane."""
    column = b * _BLOCK - shift + _places()
    here = (column >= 0) & (column < columns) & in_batch[:, :, None]
    x = tl.load(error[:, :, None] + column * column_stride, mask=here, other=0.0)
    x = _parted(tl.permute(widened(x, ARITHMETIC), (0, 2, 1)))
    first = _inner_words(first_block + b, key0, key1, 1)
    second = _inner_words(first_block + b, key0, key1, 2)
    return _passed(x, (first, second), 5, 0, 0)


@triton.jit
def _write(
    s,
    first_row,
    m,
    valid,
    first_layer,
    last_layer,
    outputs,
    layers,
    scales,
    OUTPUTS: tl.constexpr,
    OUTPUT_DTYPE: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Scale output blocks, by place, for every layer that reads some of their rows.

    first_row, m, valid: the first row of U, the row of the error, and whether there is such a
    block, of each [ROWS, 1], or of all [1, 1].
    """
    lane = tl.arange(0, 32)[None, :]
    for layer in range(end(first_layer, TARGET), end(last_layer, TARGET)):
        size = tl.load(layers + 2 * layer + 1)
        # Rows of the block before the layer's first; negative if the layer began before.
        before = tl.load(layers + 2 * layer) - first_row
        low = tl.maximum(before, 0)
        high = tl.minimum(before + size, _BLOCK)
        place = (lane - low).to(tl.uint32)
        count = tl.where(valid, tl.maximum(high - low, 0), 0).to(tl.uint32)
        scale = tl.load(scales + layer)
        output = address_of(outputs, layer, OUTPUTS).to(tl.pointer_type(OUTPUT_DTYPE))
        at = output + (m * size - before) + lane
        for i in tl.static_range(32):
            value = rounded(s[i] * scale, OUTPUT_DTYPE, TARGET)
            tl.store(at + i * 32, value, mask=place + i * 32 < count)


@triton.jit(do_not_specialize=_INTEGERS)
def project_kernel(
    error,
    outputs,
    tiles,
    layers,
    scales,
    tile_count: tl.int64,
    walk: tl.int64,
    batch: tl.int64,
    columns: tl.int64,
    shift: tl.int64,
    first_block: tl.int64,
    seed: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    OUTPUTS: tl.constexpr,
    OUTPUT_DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    TARGET: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The signals of ROWS rows of an error [batch, columns], in `walk` output blocks.

    All columns are in input block `first_block`, the first is its number `shift`. tiles, layers
    and scales: see `plan.Plan`. outputs: see `launch.outputs_of`.
    """
    program = tl.program_id(0).to(tl.int64)
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    walks = tl.cdiv(tile_count, walk)
    first = program % walks * walk
    m = program // walks * ROWS + tl.arange(0, ROWS)[:, None]
    in_batch = m < batch
    z = _inner(
        error + m * row_stride,
        tl.zeros([], tl.int64),
        columns,
        shift,
        first_block,
        column_stride,
        in_batch,
        key0,
        key1,
        ARITHMETIC,
    )
    last = tl.minimum(first + walk, tile_count)
    for place in range(end(first, TARGET), end(last, TARGET)):
        tile = tiles + 4 * place
        first_row = tl.load(tile + tl.zeros([1, 1], tl.int32))
        words = _words(first_row // _BLOCK, first_block, key0, key1, 3)
        s = _transformed(_with_signs(z, words))
        _write(
            s,
            first_row,
            m,
            in_batch,
            tl.load(tile + 2),
            tl.load(tile + 3),
            outputs,
            layers,
            scales,
            OUTPUTS,
            OUTPUT_DTYPE,
            TARGET,
        )


@triton.jit(do_not_specialize=_INTEGERS)
def inner_kernel(
    error,
    z,
    first_m: tl.int64,
    batch: tl.int64,
    columns: tl.int64,
    shift: tl.int64,
    first_block: tl.int64,
    block_count: tl.int64,
    seed: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    ARITHMETIC: tl.constexpr,
    QUAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """z [batch, block_count, 1024] of the rows of an error [.., columns] from `first_m` on."""
    program = tl.program_id(0).to(tl.int64)
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    b = program % block_count
    m = program // block_count * ROWS + tl.arange(0, ROWS)[:, None]
    x = _inner(
        error + (first_m + m) * row_stride,
        b,
        columns,
        shift,
        first_block,
        column_stride,
        m < batch,
        key0,
        key1,
        ARITHMETIC,
    )
    _keep(z + (m * block_count + b) * _BLOCK, x, m < batch, QUAD)


@triton.jit(do_not_specialize=_INTEGERS)
def outer_kernel(
    z,
    outputs,
    tiles,
    layers,
    scales,
    tile_count: tl.int64,
    first_m: tl.int64,
    first_block: tl.int64,
    block_count: tl.int64,
    seed: tl.int64,
    OUTPUTS: tl.constexpr,
    OUTPUT_DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    TARGET: tl.constexpr,
    QUAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The signals of one row of z [batch, block_count, 1024], in ROWS output blocks.

    It is row `first_m`, or one after it, of the signals.
    """
    program = tl.program_id(0).to(tl.int64)
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    groups = tl.cdiv(tile_count, ROWS)
    place = program % groups * ROWS + tl.arange(0, ROWS)[:, None]
    m = program // groups
    valid = place < tile_count
    tile = tiles + 4 * tl.minimum(place, tile_count - 1)
    first_row = tl.load(tile)
    at = z + (m * block_count * _BLOCK + tl.zeros([1, 1], tl.int64))
    sums = _zeros(ROWS, ARITHMETIC)
    for b in range(end(block_count, TARGET)):
        words = _words(first_row // _BLOCK, first_block + b, key0, key1, 3)
        sums = _plus_with_signs(sums, _loaded(at + b * _BLOCK, QUAD), words)
    first_layer = tl.min(tl.load(tile + 2))
    last_layer = tl.max(tl.load(tile + 3))
    _write(
        _transformed(sums),
        first_row,
        first_m + m,
        valid,
        first_layer,
        last_layer,
        outputs,
        layers,
        scales,
        OUTPUTS,
        OUTPUT_DTYPE,
        TARGET,
    )


@triton.jit(do_not_specialize=_INTEGERS)
def spread_kernel(
    signals,
    v,
    tiles,
    layers,
    scales,
    first_tile: tl.int64,
    tile_count: tl.int64,
    first_m: tl.int64,
    batch: tl.int64,
    SIGNALS: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    TARGET: tl.constexpr,
    QUAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """v [batch, tile_count, 1024]: the transform of w of output blocks, in rows of the signals.

    The first block is that of tile `first_tile`, the first row `first_m`. signals: see
    `launch.outputs_of`.
    """
    program = tl.program_id(0).to(tl.int64)
    place = program % tile_count
    tile = tiles + 4 * (first_tile + place)
    m = program // tile_count * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, 32)[None, :]
    first_row = tl.load(tile)
    w = _zeros(ROWS, ARITHMETIC)
    for layer in range(end(tl.load(tile + 2), TARGET), end(tl.load(tile + 3), TARGET)):
        size = tl.load(layers + 2 * layer + 1)
        before = tl.load(layers + 2 * layer) - first_row
        scale = tl.load(scales + layer)
        signal = address_of(signals, layer, SIGNALS).to(tl.pointer_type(DTYPE))
        at = signal + ((first_m + m) * size - before) + lane
        added = ()
        for i in tl.static_range(32):
            number = i * 32 + lane
            here = (number >= before) & (number < before + size) & (m < batch)
            value = tl.load(at + i * 32, mask=here, other=0.0)
            added += (w[i] + widened(value, ARITHMETIC) * scale,)
        w = added
    _keep(v + (m * tile_count + place) * _BLOCK, _passed(w, (), 3, 0, 0), m < batch, QUAD)


@triton.jit(do_not_specialize=_INTEGERS)
def collect_kernel(
    v,
    sums,
    error,
    tiles,
    first_tile: tl.int64,
    tile_count: tl.int64,
    batch: tl.int64,
    columns: tl.int64,
    shift: tl.int64,
    first_block: tl.int64,
    block_count: tl.int64,
    seed: tl.int64,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    TARGET: tl.constexpr,
    QUAD: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """Add D3 v to the sums [batch, block_count, 1024], block by block; from the LAST, the error.

    FIRST: there are no sums yet. v: see `spread_kernel`. error: [batch, columns].
    """
    program = tl.program_id(0).to(tl.int64)
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    b = program % block_count
    m = program // block_count * ROWS + tl.arange(0, ROWS)[:, None]
    row = tl.minimum(m, batch - 1)
    if FIRST:
        x = _zeros(ROWS, ARITHMETIC)
    else:
        x = _loaded(sums + (row * block_count + b) * _BLOCK, QUAD)
    for place in range(end(tile_count, TARGET)):
        first_row = tl.load(tiles + 4 * (first_tile + place) + tl.zeros([1, 1], tl.int32))
        words = _words(first_row // _BLOCK, first_block + b, key0, key1, 3)
        y = _loaded(v + (row * tile_count + place) * _BLOCK, QUAD)
        x = _plus_with_signs(x, y, words)
    if LAST:
        second = _inner_words(first_block + b, key0, key1, 2)
        first = _inner_words(first_block + b, key0, key1, 1)
        x = _passed(x, (second, first), 5, 4, 1)
        _store(error + m * columns, x, b * _BLOCK - shift, columns, m < batch, DTYPE, TARGET)
    else:
        _keep(sums + (m * block_count + b) * _BLOCK, x, m < batch, QUAD)


@triton.jit(do_not_specialize=_INTEGERS)
def matrix_kernel(
    unit,
    matrix,
    rows: tl.int64,
    first_row: tl.int64,
    columns: tl.int64,
    shift: tl.int64,
    first_block: tl.int64,
    block_count: tl.int64,
    seed: tl.int64,
    row_stride: tl.int64,
    DTYPE: tl.constexpr,
    TARGET: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of a matrix [rows, columns] in one input block, from row `first_row` of U on.

    Row r of U is the adjoint of a signal that is 1 at r. All numbers are integers, exact in fp32.
    unit: fp32 [2047], 1 in the middle and 0 elsewhere.
    """
    program = tl.program_id(0).to(tl.int64)
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    b = program % block_count
    r = program // block_count * ROWS + tl.arange(0, ROWS)[:, None]
    row = first_row + tl.minimum(r, rows - 1)
    at = unit + (_BLOCK - 1 - row % _BLOCK) + 32 * tl.arange(0, 32)[None, :]
    x = ()
    for i in tl.static_range(32):
        x += (tl.load(at + i),)
    outer = _words(row // _BLOCK, first_block + b, key0, key1, 3)
    second = _inner_words(first_block + b, key0, key1, 2)
    first = _inner_words(first_block + b, key0, key1, 1)
    x = _passed(x, (outer, second, first), 7, 6, 1)
    y = ()
    for i in tl.static_range(32):
        y += (x[i] * (1 / _BLOCK),)
    _store(matrix + r * row_stride, y, b * _BLOCK - shift, columns, r < rows, DTYPE, TARGET)
