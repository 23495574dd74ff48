"""Stream v1: every entry of the feedback matrix as a pure function of (seed, row, column).

This is the specification in integer tensor operations; it runs on any torch device. U has `ROWS`
rows and `COLUMNS` columns. One Philox4x32-10 block (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3") gives the entries of one row in one block of `BLOCK[distribution]` consecutive
columns:

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (column_block, 0, row & 0xffffffff, row >> 32)

    normal      8 columns a block, one halfword each: k = halfword >> 4, U = codebook[k]
    uniform     8 columns a block, one halfword each: k = halfword >> 8, U = sqrt(3) * (2k -
        255)/256
    rademacher  128 columns a block, one bit each: U = 1 - 2*bit

Halfword 2j of a block is the low half of word j, halfword 2j+1 its high half. Within word j of a
rademacher block, column 2i is bit i and column 2i+1 is bit 16+i.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

VERSION = 1
ROWS = 2**63
COLUMNS = 2**34
BLOCK = {"normal": 8, "uniform": 8, "rademacher": 128}

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
    """Which matrix: its seed, the column that an error begins at, and its entries' distribution.

    The seed is in two's complement, as it fits an operator's int64.
    """

    seed: int
    column_offset: int
    distribution: str


_MASK32 = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of four counter words: int64 tensors below 2^32, of shapes that broadcast.

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
    """The codebook's formula, 4096 normal quantiles, before their rounding to bfloat16.

    p = (2k + 1)/4096 - 1,  w = -log2(1 - p*p),  value = p * (C0 + w*(C1 + w*(C2 + w*(C3 + w*C4))))

    The coefficients keep every exact value at least 2^-16.77 (relative) away from a bfloat16
    rounding tie, so fp32 evaluation (error near 2^-22) always rounds to the same 4096 numbers
    (`benchmarks/codebook_guard_band.py`).
    """
    k = torch.arange(CODEBOOK_LEVELS, dtype=arithmetic, device=device)
    p = (2 * k + 1) / CODEBOOK_LEVELS - 1
    w = -torch.log2(1 - p * p)
    polynomial = torch.zeros_like(w)
    for coefficient in reversed(CODEBOOK_COEFFICIENTS):
        polynomial = polynomial * w + coefficient
    return p * polynomial


def levels(distribution: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values an entry can take, by its index k: [4096] normal, [256] uniform, [2] rademacher.

    Normal and rademacher levels are exact in every dtype. A uniform level is one product of sqrt(3)
    and the exact lattice value (2k - 255)/256, in fp64 for fp64 and in fp32, then rounded, for the
    other dtypes.
    """
    if device.type == "cpu":
        return _levels_on_cpu(distribution, dtype)
    # Made where they are used: a copy from the host would wait for it, and a table that was kept
    # while a CUDA graph is captured would lie in the graph's own memory.
    return _make_levels(distribution, dtype, device)


@functools.cache
def _levels_on_cpu(distribution: str, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # the table outlives the mode of the call that made it
        return _make_levels(distribution, dtype, torch.device("cpu"))


def _make_levels(distribution: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    if distribution == "normal":
        values = codebook_values(device=device).bfloat16()
    elif distribution == "uniform":
        arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        lattice = (2 * torch.arange(256, dtype=arithmetic, device=device) - 255) / 256
        values = lattice * math.sqrt(3)  # rounded to the arithmetic first
    elif distribution == "rademacher":
        values = 1 - 2 * torch.arange(2, dtype=dtype, device=device)
    else:
        raise AssertionError(f"stream.levels: unknown distribution {distribution!r}")
    return values.to(dtype)


def indices(words: Words, distribution: str) -> Tensor:
    """Level indices k of each block's entries: four words [...] -> [..., columns a block]."""
    if distribution == "normal":
        halves = [half for word in words for half in ((word >> 4) & 0xFFF, word >> 20)]
        return torch.stack(halves, -1)
    if distribution == "uniform":
        halves = [half for word in words for half in ((word >> 8) & 0xFF, word >> 24)]
        return torch.stack(halves, -1)
    if distribution == "rademacher":
        column = torch.arange(32, device=words[0].device)
        bit = column // 2 + 16 * (column % 2)
        return ((torch.stack(words, -1)[..., None] >> bit) & 1).flatten(-2)
    raise AssertionError(f"stream.indices: unknown distribution {distribution!r}")


def entries(
    rows: int,
    columns: int,
    *,
    seed: int,
    row_offset: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """U[row_offset : row_offset + rows, column_offset : column_offset + columns], all at once.

    `seed` may be given as an unsigned or a two's-complement 64-bit integer. The temporaries are
    int64, about 30 bytes an entry, so callers ask for a slab at a time.
    """
    seed &= 2**64 - 1
    width = BLOCK[distribution]
    first_block = column_offset // width
    last_block = (column_offset + columns - 1) // width if columns else first_block - 1
    row = row_offset + torch.arange(rows, device=device)[:, None]  # [rows, 1]
    block = torch.arange(first_block, last_block + 1, device=device)[None, :]  # [1, blocks]
    counter = (block, torch.zeros_like(block), row & _MASK32, row >> 32)
    words = philox(counter, (seed & _MASK32, seed >> 32))
    index = indices(words, distribution).flatten(1)  # [rows, blocks * width]
    index = index.narrow(1, column_offset - first_block * width, columns)
    return levels(distribution, dtype, device)[index]
