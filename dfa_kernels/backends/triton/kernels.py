"""The Triton kernels: the fused projection, and pieces of U.

Sizes, seeds and strides are never specialised, so a new one compiles nothing. The compile-time
arguments are dtypes, the distribution, tile sizes, and VECTOR: a power of two that divides the
numbers in an address, so that accesses of that many elements are aligned.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dfa_kernels.backends.triton.entries import (
    entries,
    fragment_order,
    pinned,
    rounded,
    to_bfloat16,
)

_INTEGERS = (
    "width",
    "rows",
    "first_row",
    "tile_count",
    "batch",
    "columns",
    "shift",
    "first_block",
    "seed",
    "row_stride",
    "column_stride",
    "term_stride",
)


@triton.jit
def _cut(error):
    """The upper 8 bits of fp32 numbers, which fit bf16, and the rest. Infinity leaves none."""
    head = (error.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return head, tl.where(tl.abs(error) == float("inf"), 0.0, error - head)


@triton.jit
def _accumulate(
    sums,
    matrix,
    error,
    TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
    PINNED: tl.constexpr,
    TARGET: tl.constexpr,
):
    """sums + matrix @ error. An fp32 error is a sum of TERMS bf16 numbers, added smallest first.

    The smallest term is rounded. The others are truncated, so no finite error becomes infinite, and
    three terms hold all 24 bits.
    """
    if TERMS == 0:
        operand = error
    elif TERMS == 1:
        operand = to_bfloat16(error, TARGET)
    else:
        head, rest = _cut(error)
        sums = _accumulate(sums, matrix, rest, TERMS - 1, OPERAND, PINNED, TARGET)
        operand = head.to(tl.bfloat16)
    if PINNED and TERMS > 0:
        operand = pinned(operand)
    return tl.dot(matrix, operand.to(OPERAND), sums, input_precision="ieee")


@triton.jit(do_not_specialize=_INTEGERS)
def split_kernel(
    error,
    terms,
    batch: tl.int64,
    columns: tl.int32,
    shift: tl.int32,
    row_stride: tl.int64,
    column_stride: tl.int64,
    width: tl.int32,
    TERMS: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split an fp32 error [batch, columns]: terms [TERMS, batch, width], after `shift` zeros."""
    width = width // 8 * 8
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0).to(tl.int64) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    column = at - shift
    here = (column >= 0) & (column < columns)
    rest = tl.load(error + row * row_stride + column * column_stride, mask=here, other=0.0)
    for term in tl.static_range(TERMS):
        if term < TERMS - 1:
            head, rest = _cut(rest)
        else:
            head = rest
        place = terms + (term * batch + row) * width + at
        tl.store(place, to_bfloat16(head, TARGET), mask=at < width)


@triton.jit
def end(number, TARGET: tl.constexpr):
    """The first or last number of a loop.

    With NumPy 2.4 and newer, Triton 3.6's interpreter does not make a number of a tensor itself.
    """
    if TARGET == "interpreter":
        return number.handle.data.item()
    return number


@triton.jit
def address_of(outputs, layer, OUTPUTS: tl.constexpr):
    """The address of a layer's signal; see `launch.outputs_of`."""
    if OUTPUTS == 0:
        address = tl.load(outputs[0] + layer)
    else:
        address = outputs[0].to(tl.int64)
        for place in tl.static_range(1, OUTPUTS):
            address = tl.where(layer == place, outputs[place].to(tl.int64), address)
    return address


@triton.jit
def addresses_kernel(table, addresses, COUNT: tl.constexpr):
    """Write addresses, which come as arguments of the launch, to a table on the device."""
    for place in tl.static_range(COUNT):
        tl.store(table + place, addresses[place])


@triton.jit(do_not_specialize=_INTEGERS)
def project_kernel(
    error,
    outputs,
    tiles,
    layers,
    scales,
    tile_count: tl.int64,
    batch: tl.int64,
    columns: tl.int32,
    shift: tl.int32,
    first_block: tl.int64,
    seed: tl.int64,
    row_stride: tl.int64,
    term_stride: tl.int64,
    DISTRIBUTION: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OUTPUT_DTYPE: tl.constexpr,
    OPERAND: tl.constexpr,
    TERMS: tl.constexpr,
    SPLIT: tl.constexpr,
    VECTOR: tl.constexpr,
    OFFSET: tl.constexpr,
    TARGET: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    PINNED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of the union's rows times one tile of the batch, into every layer with such rows.

    error: [batch, columns] or, with SPLIT, its terms in bf16 [TERMS, batch, columns]; columns are
    contiguous, and column 0 is entry `shift` of block `first_block`. tiles, layers and scales: see
    `plan.Plan`. outputs: see `launch.outputs_of`.
    """
    program = tl.program_id(0).to(tl.int64)
    tile = tiles + 4 * (program % tile_count)
    first_row = tl.load(tile)
    rows = tl.load(tile + 1)
    l = tl.arange(0, BLOCK_L)  # noqa: E741
    row = first_row + l
    first_m = program // tile_count * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    in_batch = m < tl.minimum(batch - first_m, BLOCK_M).to(tl.int32)

    columns = columns // VECTOR * VECTOR
    shift = shift // VECTOR * VECTOR
    row_stride = row_stride // VECTOR * VECTOR
    if SPLIT:
        term_stride = term_stride // VECTOR * VECTOR
    k = tl.arange(0, BLOCK_K)
    at = error + (first_m * row_stride - shift) + m[None, :] * row_stride + k[:, None]

    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    blocks = tl.arange(0, BLOCK_K // WIDTH)[None, :]
    sums = tl.zeros([BLOCK_L, BLOCK_M], tl.float32)
    for left in tl.range(0, end(shift + columns, TARGET), BLOCK_K, num_stages=STAGES):
        column = left - shift + k
        here = (column >= 0) & (column < columns)
        mask = here[:, None] & in_batch[None, :]
        block = (first_block + left // WIDTH + blocks).to(tl.uint32)
        matrix = entries(block, row[:, None], key0, key1, DISTRIBUTION, TARGET, OPERAND)
        if FRAGMENTS:
            matrix = tl.trans(fragment_order(tl.trans(matrix)))
        if PINNED:
            matrix = pinned(matrix)
        # Tensor cores truncate a sum each time they add to it: over all columns that makes many
        # fp32 roundings. Three terms promise fp32's accuracy, so each step sums them apart.
        apart = tl.zeros([BLOCK_L, BLOCK_M], tl.float32) if TERMS == 3 else sums
        for term in tl.static_range(TERMS if SPLIT else 1):
            behind = (TERMS - 1 - term) * term_stride if SPLIT else 0
            part = tl.load(at + behind, mask=mask, other=0.0)
            if FRAGMENTS:
                part = fragment_order(part)
            apart = _accumulate(apart, matrix, part, 0 if SPLIT else TERMS, OPERAND, PINNED, TARGET)
        sums = sums + apart if TERMS == 3 else apart
        at += BLOCK_K

    for layer in range(end(tl.load(tile + 2), TARGET), end(tl.load(tile + 3), TARGET)):
        first = tl.load(layers + 2 * layer)
        size = tl.load(layers + 2 * layer + 1)
        # Rows of the tile before the layer's first; negative if the layer began in another tile.
        before = first - first_row
        output = address_of(outputs, layer, OUTPUTS).to(tl.pointer_type(OUTPUT_DTYPE))
        output += first_m * size - before
        offset = m[None, :].to(OFFSET) * size.to(OFFSET) + l[:, None].to(OFFSET)
        low = tl.maximum(before, 0).to(tl.int32)
        # A layer that ended 2^31 or more rows before has no rows here; its end exceeds 32 bits.
        high = tl.maximum(tl.minimum(before + size, rows), 0).to(tl.int32)
        in_layer = (l >= low) & (l < high)
        signal = rounded(sums * tl.load(scales + layer), OUTPUT_DTYPE, TARGET)
        tl.store(output + offset, signal, mask=in_layer[:, None] & in_batch[None, :])


@triton.jit(do_not_specialize=_INTEGERS)
def matrix_kernel(
    matrix,
    rows: tl.int64,
    columns: tl.int64,
    row_stride: tl.int64,
    shift: tl.int64,
    first_block: tl.int64,
    first_row: tl.int64,
    seed: tl.int64,
    DISTRIBUTION: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    FACTOR: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Fill matrix [rows, columns] from U; column 0 is entry `shift` of block `first_block`.

    FACTOR is the distribution's, or 1.0 for the lattice alone.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, BLOCK_R)
    top = program % tiles * BLOCK_R
    left = program // tiles * BLOCK_C
    columns = columns // VECTOR * VECTOR
    shift = shift // VECTOR * VECTOR
    row_stride = row_stride // VECTOR * VECTOR
    r = top + tl.arange(0, BLOCK_R)[:, None]
    c = left - shift + tl.arange(0, BLOCK_C)[None, :]
    block = first_block + left // WIDTH + tl.arange(0, BLOCK_C // WIDTH)[None, :]
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    values = entries(
        block.to(tl.uint32), first_row + r, key0, key1, DISTRIBUTION, TARGET, tl.float32
    )
    if FACTOR != 1.0:
        if tl.float64 == DTYPE:
            values = values.to(tl.float64)
        values = values * FACTOR
    inside = (r < rows) & (c >= 0) & (c < columns)
    tl.store(matrix + r * row_stride + c, rounded(values, DTYPE, TARGET), mask=inside)
