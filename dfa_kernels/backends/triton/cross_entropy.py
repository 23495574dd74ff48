"""Cross entropy of logits and, in their place, its gradient: one launch, a program for each row.

A row is read twice and written once, so memory bandwidth bounds it. On an H100 two programs of 16
warps share a multiprocessor, and one's loads hide behind the other's reductions. The rows under way
(some 50 MB for 50,000 columns in fp32, half of it in 16 bits) are about what L2 holds, so the
second pass goes backwards, from what was read last.

Sizes and strides are never specialised, and the softcap and the smoothing are numbers of the
launch: a kernel is compiled for a dtype, what is asked for, and whether all rows begin on 16 bytes.
If they do not, threads read one element at a time, which is slower.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfa_kernels.backends.triton.entries import rounded, widened
from dfa_kernels.backends.triton.kernels import end
from dfa_kernels.backends.triton.launch import DTYPES, TARGET, on
from dfa_kernels.stream import arithmetic

WARPS = 16
_MOST_COLUMNS = 2**31 - 1  # counted in 32 bits

_NUMBERS = (
    "columns",
    "row_stride",
    "target_stride",
    "scale_stride",
    "ignore_index",
    "label_smoothing",
    "cap",
)


@triton.jit
def _tanh(x):
    """To a few roundings: near 0, where 1 - exp(-2x) cancels, by a quotient of Cephes."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = tl.minimum(x * x, 1.0)  # of use only below 1
    above = (-0.964399179425052238628 * s - 99.2877231001918586564) * s - 1614.68768441708447952
    below = (s + 112.811678491632931402) * s + 2235.48839060100448583
    near = x * (1.0 + s * (above / (below * s + 4844.06305325125486048)))
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    """The logits that the loss is of, and their slope by the given ones."""
    slope = x
    if CAPPED:
        t = _tanh(x / softcap)
        slope = 1.0 - t * t
        x = softcap * t
    return x, slope


@triton.jit
def _block(
    place,
    columns,
    softcap,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    LAST: tl.constexpr,
    POLICY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `_capped`, the block of a row that begins at `place`. The last has `columns` of its own.

    What is beyond is -inf.
    """
    lane = tl.arange(0, BLOCK)
    if LAST:
        x = tl.load(place + lane, mask=lane < columns, other=0.0, eviction_policy=POLICY)
    else:
        x = tl.load(place + lane, eviction_policy=POLICY)
    z, slope = _capped(widened(x, WIDE), softcap, CAPPED)
    if LAST:
        z = tl.where(lane < columns, z, -float("inf"))
    return z, slope


@triton.jit
def _base(top):
    """What is subtracted before exp: the maximum, or 0 while that is -inf."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _add(
    place,
    columns,
    top,
    exponentials,
    numbers,
    softcap,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take a block into the maximum, and into each lane's sums of exp(z - base) and of z."""
    z, _ = _block(place, columns, softcap, WIDE, CAPPED, LAST, "evict_last", BLOCK)
    before = top
    top = tl.maximum(before, tl.max(z, 0))
    base = _base(top)
    exponentials = exponentials * tl.exp(before - base) + tl.exp(z - base)
    if SMOOTHED:
        if LAST:
            z = tl.where(tl.arange(0, BLOCK) < columns, z, 0.0)
        numbers += z
    return top, exponentials, numbers


@triton.jit
def _replace(
    place,
    columns,
    word,
    base,
    factor,
    peak,
    floor,
    softcap,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    LAST: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient over a block; `word` is the target's place in it, `peak` its share."""
    z, slope = _block(place, columns, softcap, WIDE, CAPPED, LAST, "evict_first", BLOCK)
    lane = tl.arange(0, BLOCK)
    word = tl.where((word >= 0) & (word < BLOCK), word, -1).to(tl.int32)
    gradient = tl.exp(z - base) * factor - tl.where(lane == word, peak, 0.0) - floor
    if CAPPED:
        gradient *= slope
    gradient = rounded(gradient, place.dtype.element_ty, TARGET)
    if LAST:
        tl.store(place + lane, gradient, mask=lane < columns)
    else:
        tl.store(place + lane, gradient)


@triton.jit(
    do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=("target", "losses", "scales")
)
def cross_entropy_kernel(
    logits,
    target,
    losses,
    scales,
    columns: tl.int32,
    row_stride: tl.int64,
    target_stride: tl.int64,
    scale_stride: tl.int64,
    ignore_index: tl.int64,
    label_smoothing: tl.float64,
    cap: tl.float64,
    WIDE: tl.constexpr,
    GRADIENT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of a row and, with GRADIENT, the gradient in its place.

    Rows begin at multiples of VECTOR elements. A target that is no column has a loss of NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * (row_stride // VECTOR * VECTOR)
    word = tl.load(target + row * target_stride)
    whole = columns // BLOCK * BLOCK
    rest = columns - whole
    if word == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            lane = tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], logits.dtype.element_ty)
            for left in range(0, end(whole, TARGET), BLOCK):
                tl.store(logits + left + lane, zeros)
            tl.store(logits + whole + lane, zeros, mask=lane < rest)
    else:
        smoothing = tl.full([], label_smoothing, WIDE)
        softcap = tl.full([], cap, WIDE)
        # Read here, before any thread writes: the reductions below wait for all threads.
        inside = (word >= 0) & (word < columns)
        chosen, _ = _capped(
            widened(tl.load(logits + word, mask=inside, other=0.0), WIDE), softcap, CAPPED
        )
        chosen = tl.where(inside, chosen, float("nan"))

        top = tl.full([], -float("inf"), WIDE)
        exponentials = tl.zeros([BLOCK], WIDE)
        numbers = exponentials
        for left in range(0, end(whole, TARGET), BLOCK):
            top, exponentials, numbers = _add(
                logits + left,
                BLOCK,
                top,
                exponentials,
                numbers,
                softcap,
                WIDE,
                CAPPED,
                SMOOTHED,
                False,
                BLOCK,
            )
        top, exponentials, numbers = _add(
            logits + whole,
            rest,
            top,
            exponentials,
            numbers,
            softcap,
            WIDE,
            CAPPED,
            SMOOTHED,
            True,
            BLOCK,
        )
        base = _base(top)
        total = tl.sum(exponentials, 0)
        kept = 1.0 - smoothing
        loss = tl.log(total) + kept * (base - chosen)
        if SMOOTHED:
            loss += smoothing * (base - tl.sum(numbers, 0) / columns.to(WIDE))
        tl.store(losses + row, loss)

        if GRADIENT:
            scale = tl.load(scales + row * scale_stride)
            factor = scale / total
            peak = scale * kept
            floor = scale * smoothing / columns.to(WIDE)
            _replace(
                logits + whole,
                rest,
                word - whole,
                base,
                factor,
                peak,
                floor,
                softcap,
                WIDE,
                CAPPED,
                True,
                TARGET,
                BLOCK,
            )
            for back in range(0, end(whole, TARGET), BLOCK):
                left = whole - BLOCK - back
                _replace(
                    logits + left,
                    BLOCK,
                    word - left,
                    base,
                    factor,
                    peak,
                    floor,
                    softcap,
                    WIDE,
                    CAPPED,
                    False,
                    TARGET,
                    BLOCK,
                )


def options(target: str) -> dict[str, int]:
    """What the kernel is compiled with: the registers that let two programs share."""
    return {"maxnreg": 64} if target == "cuda" else {}


def block_of(dtype: torch.dtype, vector: int) -> int:
    """Columns of a row that a program has in registers at a time."""
    block = 1024 if dtype == torch.float64 else 4096
    return block if vector > 1 else block // 2


def vector_of(logits: Tensor) -> int:
    """Elements in 16 bytes if all rows begin on 16 bytes, else 1."""
    bytes_of = logits.data_ptr(), logits.stride(0) * logits.element_size()
    return 1 if any(number % 16 for number in bytes_of) else 16 // logits.element_size()


def serves(logits: Tensor) -> bool:
    """Whether the kernel is for logits of this dtype and layout."""
    rows, columns = logits.shape
    row_stride, column_stride = logits.stride()
    in_rows = (column_stride == 1 or columns == 1) and (row_stride >= columns or rows == 1)
    return logits.dtype in DTYPES and in_rows and 0 < columns <= _MOST_COLUMNS


def cross_entropy_(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    scales: Tensor,
    gradient: bool,
) -> Tensor:
    """As `dfa_kernels.cross_entropy.plain`, for logits that `serves` takes."""
    wide = arithmetic(logits.dtype)
    rows, columns = logits.shape
    losses = logits.new_empty(rows, dtype=wide)
    if rows == 0:
        return losses
    vector = vector_of(logits)
    with on(logits.device):
        cross_entropy_kernel[(rows,)](
            logits,
            target,
            losses,
            scales,
            columns,
            logits.stride(0),
            target.stride(0),
            scales.stride(0),
            ignore_index,
            float(label_smoothing),
            1.0 if softcap is None else float(softcap),
            DTYPES[wide],
            gradient,
            bool(label_smoothing),
            softcap is not None,
            vector,
            TARGET,
            block_of(logits.dtype, vector),
            num_warps=WARPS,
            **options(TARGET),
        )
    return losses
