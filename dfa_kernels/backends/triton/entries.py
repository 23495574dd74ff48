"""Entries of U in registers: stream v1 (`dfa_kernels.stream`) in Triton, for other kernels to call.

TARGET is "cuda", "hip" or "interpreter".

A Philox block stays in the thread that made it: its 8 (or 128) entries are neighbours in the last
dimension of the result, over which the callers contract.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dfa_kernels import stream

_MULTIPLIER0, _MULTIPLIER1 = map(tl.constexpr, stream.PHILOX_MULTIPLIERS)
_STEP0, _STEP1 = map(tl.constexpr, stream.PHILOX_KEY_STEPS)
_ROUNDS = tl.constexpr(stream.PHILOX_ROUNDS)
# For powers of log2(1 - p*p), which is -w. Odd coefficients change sign; no bit of a value changes.
_C0, _C1, _C2, _C3, _C4 = (
    tl.constexpr(coefficient * (-1) ** power)
    for power, coefficient in enumerate(stream.CODEBOOK_COEFFICIENTS)
)


@triton.jit
def philox(block, row, key0, key1, DOMAIN: tl.constexpr = 0):
    """Four words [R, B] of the blocks at columns `block` uint32 [1, B] of rows `row` int64 [R, 1].

    DOMAIN is 0 for entries, and a diagonal's number for structured feedback. Through the first two
    rounds, what depends on the row or the block alone keeps its smaller shape, and a loop over
    blocks makes the row's part once.
    """
    c0 = block
    c1 = tl.full(block.shape, DOMAIN, tl.uint32)
    c2 = row.to(tl.uint32)
    c3 = (row >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        product0 = c0.to(tl.uint64) * _MULTIPLIER0
        product1 = c2.to(tl.uint64) * _MULTIPLIER1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        key0 += _STEP0
        key1 += _STEP1
    return c0, c1, c2, c3


@triton.jit
def to_bfloat16(values, TARGET: tl.constexpr):
    """fp32 to the nearest bf16, ties to even.

    By itself the interpreter truncates, and loses subnormal numbers.
    """
    if TARGET == "interpreter":
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(values == values, bits, 0x7FC0)
        result = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = values.to(tl.bfloat16)
    return result


@triton.jit
def widened(values, DTYPE: tl.constexpr):
    """Values in fp32 or fp64. By itself the interpreter loses bf16's subnormal numbers."""
    if values.dtype == tl.bfloat16:
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32)
        values = (bits << 16).to(tl.float32, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def to_odd(values):
    """fp64 to fp32 so that another rounding, to 16 bits, is the only one: inexact ones are odd."""
    near = values.to(tl.float32)
    back = near.to(tl.float64)
    bits = near.to(tl.int32, bitcast=True)
    odd = (bits - (tl.abs(back) > tl.abs(values)).to(tl.int32)) | 1
    return tl.where(back == values, bits, odd).to(tl.float32, bitcast=True)


@triton.jit
def rounded(values, DTYPE: tl.constexpr, TARGET: tl.constexpr):
    """fp32 or fp64 to the nearest of DTYPE."""
    if values.dtype == tl.float64 and DTYPE.primitive_bitwidth == 16:
        values = to_odd(values)
    if tl.bfloat16 == DTYPE:
        values = to_bfloat16(values, TARGET)
    return values.to(DTYPE)


@triton.jit
def _level(bits, DISTRIBUTION: tl.constexpr, TARGET: tl.constexpr):
    """The level in fp32, unrounded, of an index whose highest bit is bit 22 of `bits`.

    At bit 22 the index is the top of a mantissa: a normal k gives 2 + (2k + 1)/4096, which is
    p + 3, and a uniform k gives 2 + 2k/256.
    """
    if DISTRIBUTION == "uniform":
        return ((bits & 0x7F8000) | 0x40000000).to(tl.float32, bitcast=True) - 767 / 256
    p = ((bits & 0x7FF800) | 0x40000400).to(tl.float32, bitcast=True) - 3.0
    t = 1.0 - p * p
    if TARGET == "cuda":  # t is at least 2^-11.1, so it is never subnormal
        t = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        t = tl.log2(t)
    return p * (_C0 + t * (_C1 + t * (_C2 + t * (_C3 + t * _C4))))


@triton.jit
def _interleave8(x0, x1, x2, x3, x4, x5, x6, x7):
    """Eight [R, B] -> [R, 8 B], with x_i in the columns c where c % 8 == i."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    whole = tl.join(even, odd)  # [R, B, 2, 2, 2]: bits 2, 1, 0 of i
    return tl.reshape(whole, [x0.shape[0], 8 * x0.shape[1]])


@triton.jit
def _signs(word, COLUMN: tl.constexpr):
    """Two entries of +-1, columns 2 COLUMN and 2 COLUMN + 1 of a word's 32, as bf16 patterns."""
    return ((word << (15 - COLUMN)) & 0x80008000) | 0x3F803F80


@triton.jit
def _eight_signs(word, FIRST: tl.constexpr):
    return _interleave8(
        _signs(word, FIRST),
        _signs(word, FIRST + 2),
        _signs(word, FIRST + 4),
        _signs(word, FIRST + 6),
        _signs(word, FIRST + 8),
        _signs(word, FIRST + 10),
        _signs(word, FIRST + 12),
        _signs(word, FIRST + 14),
    )


@triton.jit
def _interleave2(x0, x1):
    """Two [R, B] -> [R, 2 B], with x_i in the columns c where c % 2 == i."""
    return tl.reshape(tl.join(x0, x1), [x0.shape[0], 2 * x0.shape[1]])


@triton.jit
def fragment_order(values):
    """[K, N] with K in the order in which a tensor core's registers hold it.

    Of 32 numbers along the contraction, thread 4g + q of a warp holds the pairs 2q, 2q + 8, 2q + 16
    and 2q + 24 of its row g. They become the numbers 8q to 8q + 7, which are one Philox block, so
    an entry is made in the register from which it is multiplied.
    """
    K: tl.constexpr = values.shape[0]
    N: tl.constexpr = values.shape[1]
    values = tl.reshape(values, [K // 32, 4, 4, 2, N])
    return tl.reshape(tl.permute(values, (0, 2, 1, 3, 4)), [K, N])


@triton.jit
def pinned(values):
    """16-bit values as they are. Until here the compiler must not change their layout.

    To the compiler this has a side effect. Without it, the layout that a product wants for its
    operand moves up to where the operand is made, and every warp that reads a value makes it again.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [values], dtype=values.dtype, is_pure=False, pack=2
    )


@triton.jit
def entries(
    block,
    row,
    key0,
    key1,
    DISTRIBUTION: tl.constexpr,
    TARGET: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """U's rows `row` int64 [R, 1] and blocks `block` uint32 [1, B]: [R, B * columns a block].

    Exact in every DTYPE: a uniform entry comes without its factor, as (2k - 255)/256.
    """
    w0, w1, w2, w3 = philox(block, row, key0, key1)
    R: tl.constexpr = w0.shape[0]
    B: tl.constexpr = w0.shape[1]
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [R, B, 2, 2]
    if DISTRIBUTION == "rademacher":
        words = tl.reshape(words, [R, 4 * B])
        pairs = _interleave2(_eight_signs(words, 0), _eight_signs(words, 1))
        low = pairs.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        values = tl.reshape(tl.join(low, high), [R, 128 * B])
    else:
        low = _level(words << 7, DISTRIBUTION, TARGET)
        high = _level(words >> 9, DISTRIBUTION, TARGET)
        values = to_bfloat16(tl.reshape(tl.join(low, high), [R, 8 * B]), TARGET)
    return values.to(DTYPE)
