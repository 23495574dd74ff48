"""Stream v1: every entry of the feedback matrix as a pure function of (seed, row, column).

This is the specification, in integer tensor operations that run on any torch device. U has `ROWS`
rows and `COLUMNS` columns. One Philox4x32-10 block (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3") gives the entries of one row in one block of consecutive columns:

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (column_block, 0, row & 0xffffffff, row >> 32)

    normal      8 columns a block, one halfword each: k = halfword >> 4, U = codebook[k]
    uniform     8 columns a block, one halfword each: k = halfword >> 8,
        U = sqrt(3) * (2k - 255)/256
    rademacher  128 columns a block, one bit each: U = 1 - 2*bit
    hadamard    structured: see `dfa_kernels.hadamard`

Halfword 2j of a block is the low half of word j, halfword 2j+1 its high half. Within word j of a
rademacher block, column 2i is bit i and column 2i+1 is bit 16+i. `DENSE` holds these
facts for the rest of the package.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

VERSION = 1
ROWS = 2**63
COLUMNS = 2**34

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

CODEBOOK_LEVELS = 4096
CODEBOOK_COEFFICIENTS = tuple(
    float.fromhex(c)
    for c in (
        "0x1.40ce28p+0",
        "0x1.d4d196p-3",
        "0x1.d99812p-8",
        "-0x1.3fc906p-10",
        "0x1.73c782p-15",
    )
)


class Stream(NamedTuple):
    """Which matrix U is, and the first of its columns that is read.

    `seed` is unsigned, or in two's complement, which fits an operator's int64.
    """

    seed: int
    column_offset: int
    distribution: str

    def after(self, columns: int) -> Stream:
        """The same matrix, `columns` columns further on."""
        return Stream(self.seed, self.column_offset + columns, self.distribution)


_MASK32 = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of four counter words: int64 tensors below 2^32, with shapes that broadcast.

    Returns four int64 tensors of values below 2^32. The int64 product wraps modulo 2^64, and its
    upper half is read through an arithmetic shift and a mask, so the sign bit never matters.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        product0 = c0 * PHILOX_MULTIPLIERS[0]
        product1 = c2 * PHILOX_MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_and_(_MASK32) ^ (c1 ^ k0)
        c2 = (product0 >> 32).bitwise_and_(_MASK32) ^ (c3 ^ k1)
        c1 = product1.bitwise_and_(_MASK32)
        c3 = product0.bitwise_and_(_MASK32)
        k0 = (k0 + PHILOX_KEY_STEPS[0]) & _MASK32
        k1 = (k1 + PHILOX_KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def codebook_values(
    arithmetic: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """The codebook's 4096 normal quantiles by their formula, before rounding to bfloat16."""
    return _quantiles(torch.arange(CODEBOOK_LEVELS, dtype=arithmetic, device=device))


def _quantiles(k: Tensor) -> Tensor:
    """Normal quantiles by their index k, in k's dtype, before rounding to bfloat16.

    p = (2k + 1)/4096 - 1,  w = -log2(1 - p*p),  value = p * (C0 + w*(C1 + w*(C2 + w*(C3 + w*C4))))

    The coefficients keep every exact value at least 2^-16.77 (relative) away from a bfloat16
    rounding tie, so fp32 evaluation (error near 2^-22) always rounds to the same 4096 numbers
    (`tests/stream/codebook_guard_band.py`).
    """
    p = (2 * k + 1) / CODEBOOK_LEVELS - 1
    w = -torch.log2(1 - p * p)
    polynomial = torch.zeros_like(w)
    for coefficient in reversed(CODEBOOK_COEFFICIENTS):
        polynomial = polynomial * w + coefficient
    return p * polynomial


class Distribution(NamedTuple):
    """The facts of a distribution of independent entries.

    Attributes:
        block: columns of a row whose entries one Philox block gives.
        bits: of an entry's level index k. There are 2**bits levels.
        lattice: the levels' lattice values, which are exact in 16 bits, as a function of k, fp32
            [2**bits].
        factor: an entry is its lattice value times this.
        slots: issue slots that an entry takes on a GPU in Triton's fused kernel, by instruction
            counts. It estimates from it which way is faster.
    """

    block: int
    bits: int
    lattice: Callable[[Tensor], Tensor]
    factor: float
    slots: float


DENSE = {
    "normal": Distribution(
        block=8,
        bits=12,
        lattice=lambda k: _quantiles(k).bfloat16(),
        factor=1.0,
        slots=19.3,
    ),
    "uniform": Distribution(
        block=8,
        bits=8,
        lattice=lambda k: (2 * k - 255) / 256,
        factor=math.sqrt(3),
        slots=11.6,
    ),
    "rademacher": Distribution(
        block=128,
        bits=1,
        lattice=lambda k: 1 - 2 * k,
        factor=1.0,
        slots=4.8,
    ),
}
STRUCTURED = ("hadamard",)
DISTRIBUTIONS = (*DENSE, *STRUCTURED)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products and sums for an error of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def levels(distribution: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values that an entry can take, by its index k: [4096] normal, [256] uniform, [2] signs.

    Normal and rademacher levels are exact in every dtype. A uniform level is sqrt(3) times the
    exact lattice value (2k - 255)/256, multiplied in fp64 for fp64; for the other dtypes in fp32,
    then rounded.
    """
    if device.type == "cpu":
        return _levels_on_cpu(distribution, dtype)
    # Made anew on the device: the host would wait for a copy, and a table kept from the capture of
    # a CUDA graph would lie in the graph's own memory.
    return _make_levels(distribution, dtype, device)


@functools.cache
def _levels_on_cpu(distribution: str, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # the table outlives the caller's mode
        return _make_levels(distribution, dtype, torch.device("cpu"))


def _make_levels(distribution: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    facts = DENSE[distribution]
    k = torch.arange(2**facts.bits, dtype=torch.float32, device=device)
    values = facts.lattice(k).to(arithmetic(dtype))
    if facts.factor != 1.0:
        values = values * facts.factor  # the factor is rounded to that dtype first
    return values.to(dtype)


def indices(words: Words, distribution: str) -> Tensor:
    """Level indices k of each block's entries: four words [...] -> [..., columns a block]."""
    facts = DENSE[distribution]
    if facts.bits == 1:
        column = torch.arange(32, device=words[0].device)
        bit = column // 2 + 16 * (column % 2)
        return ((torch.stack(words, -1)[..., None] >> bit) & 1).flatten(-2)
    shift, mask = 16 - facts.bits, 2**facts.bits - 1
    halves = [half for word in words for half in ((word >> shift) & mask, word >> (16 + shift))]
    return torch.stack(halves, -1)


def entries(
    rows: int,
    columns: int,
    row_offset: int,
    stream: Stream,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`rows` rows of U from `row_offset` on, and `columns` columns from the stream's on, at once.

    Temporaries are int64 and take about 30 bytes per entry, so callers ask for a slab at a time.
    """
    seed, column_offset, distribution = stream
    seed &= 2**64 - 1
    width = DENSE[distribution].block
    first_block = column_offset // width
    last_block = (column_offset + columns - 1) // width if columns else first_block - 1
    row = row_offset + torch.arange(rows, device=device)[:, None]  # [rows, 1]
    block = torch.arange(first_block, last_block + 1, device=device)[None, :]  # [1, blocks]
    counter = (block, torch.zeros_like(block), row & _MASK32, row >> 32)
    words = philox(counter, (seed & _MASK32, seed >> 32))
    index = indices(words, distribution).flatten(1)  # [rows, blocks * width]
    index = index.narrow(1, column_offset - first_block * width, columns)
    return levels(distribution, dtype, device)[index]
