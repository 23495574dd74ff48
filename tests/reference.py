"""A second implementation of stream v1 and the projection, in NumPy.

Shares only the definition with the package; every backend is compared with it. Entries, of every
distribution, and their products are exact or in float64. Projections with the structured matrix,
`structured_*`, are made in the arithmetic that its definition fixes, for comparison bit for bit.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

KNOWN = json.loads((Path(__file__).parent / "known_answers.json").read_text())
KNOWN_HADAMARD = json.loads((Path(__file__).parent / "known_answers_hadamard.json").read_text())
WIDTH = {"normal": 8, "uniform": 8, "rademacher": 128}  # columns of a Philox block
DENSE = tuple(WIDTH)
COEFFICIENTS = (
    float.fromhex("0x1.40ce28p+0"),
    float.fromhex("0x1.d4d196p-3"),
    float.fromhex("0x1.d99812p-8"),
    float.fromhex("-0x1.3fc906p-10"),
    float.fromhex("0x1.73c782p-15"),
)


def philox(counter, key):
    """Four uint64 arrays of 32-bit values and two Python ints -> four such arrays."""
    x = [np.asarray(word, dtype=np.uint64) for word in counter]
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    for _ in range(10):
        a = np.uint64(0xD2511F53) * x[0]
        b = np.uint64(0xCD9E8D57) * x[2]
        x = [
            (b >> shift) ^ x[1] ^ np.uint64(k0),
            b & low,
            (a >> shift) ^ x[3] ^ np.uint64(k1),
            a & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x


def codebook():
    """[4096] float64, each a bfloat16 number: evaluated in float64, rounded to nearest even."""
    p = (2 * np.arange(4096) + 1) / 4096 - 1
    w = -np.log2(1 - p * p)
    c0, c1, c2, c3, c4 = COEFFICIENTS
    values = p * (c0 + w * (c1 + w * (c2 + w * (c3 + w * c4))))
    bits = values.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def codebook_digest(values):
    """SHA-256 of the bf16 patterns of [4096] float64 codebook values, as in known_answers.json."""
    patterns = (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    return hashlib.sha256(patterns.tobytes()).hexdigest()


CODEBOOK = codebook()


def indices(rows, columns, *, seed=0, distribution="normal", row_offset=0, column_offset=0):
    """[rows, columns] int64: k of normal and uniform entries, the bit of rademacher ones."""
    column = column_offset + np.arange(columns)[None, :]
    row = [row_offset + r for r in range(rows)]
    low = np.array([r & 0xFFFFFFFF for r in row], dtype=np.uint64)[:, None]
    high = np.array([r >> 32 for r in row], dtype=np.uint64)[:, None]
    zero = np.zeros((rows, columns), dtype=np.uint64)
    block, place = column // WIDTH[distribution], column % WIDTH[distribution]
    counter = (block.astype(np.uint64) + zero, zero, low + zero, high + zero)
    words = np.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32)))  # [4, rows, columns]
    of_place = place // (32 if distribution == "rademacher" else 2) + zero.astype(int)
    word = np.take_along_axis(words, of_place[None], 0)[0].astype(int)
    if distribution == "rademacher":
        return (word >> (place % 32) // 2 + 16 * (place % 2)) & 1
    half = (word >> (16 * (place % 2))) & 0xFFFF
    return half >> (4 if distribution == "normal" else 8)


def lattice(rows, columns, *, distribution="normal", **where):
    """[rows, columns] float64: the normal value, (2k - 255)/256, or +-1."""
    k = indices(rows, columns, distribution=distribution, **where)
    if distribution == "normal":
        return CODEBOOK[k]
    return (2.0 * k - 255) / 256 if distribution == "uniform" else 1.0 - 2 * k


def matrix(rows, columns, *, dtype=torch.float64, distribution="normal", **where):
    """U [rows, columns], rounded as defined: exact, or one product with sqrt(3)."""
    if distribution == "hadamard":
        return torch.from_numpy(structured_matrix(rows, columns, **where)).to(dtype)
    values = lattice(rows, columns, distribution=distribution, **where)
    if distribution == "uniform":
        wide = np.float64 if dtype == torch.float64 else np.float32
        values = values.astype(wide) * np.sqrt(wide(3))
    return torch.from_numpy(values).to(dtype)


def project(error, sizes, scales, **where):
    """The signals in float64, by one product with each layer's rows of U."""
    return signals(error, sizes, scales, **where)[0]


def signals(error, sizes, scales, *, row_offsets=None, **where):
    """The signals in float64, and their magnitudes: the same sums of absolute values."""
    row_offsets = row_offsets or [0] * len(sizes)
    exact, magnitudes = [], []
    for size, scale, row_offset in zip(sizes, scales, row_offsets, strict=True):
        u = matrix(size, error.shape[-1], row_offset=row_offset, **where)
        exact.append(scale * (error.double() @ u.T))
        magnitudes.append(abs(scale) * (error.double().abs() @ u.abs().T))
    return exact, magnitudes


# --- structured: the distribution "hadamard" ---

BLOCK = 1024
HADAMARD = np.ones((1, 1))
while len(HADAMARD) < BLOCK:
    HADAMARD = np.block([[HADAMARD, HADAMARD], [HADAMARD, -HADAMARD]])


def diagonal(domain, seed, input_block, output_block=0):
    """[1024] float64, +1 and -1: 8 Philox blocks of 128 bits, read as rademacher entries."""
    group = np.uint64(8 * input_block) + np.arange(8, dtype=np.uint64)
    counter = (group, domain, output_block & 0xFFFFFFFF, output_block >> 32)
    words = np.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32)), 1)  # [8, 4]
    place = np.arange(32)
    bits = words[..., None] >> (place // 2 + 16 * (place % 2)).astype(np.uint64) & np.uint64(1)
    return 1 - 2.0 * bits.ravel()


def pieces(first, count):
    """The blocks that [first, first + count) touches: index, slice of the block, and of `count`."""
    last = first + count
    for block in range(first // BLOCK, -(-last // BLOCK) if count else 0):
        a, b = max(first, block * BLOCK), min(last, (block + 1) * BLOCK)
        yield block, slice(a - block * BLOCK, b - block * BLOCK), slice(a - first, b - first)


def structured_matrix(rows, columns, *, seed=0, row_offset=0, column_offset=0):
    """U [rows, columns] float64 by products with H itself: integers over 1024, all exact."""
    u = np.empty((rows, columns))
    for b, place, here in pieces(column_offset, columns):
        d1, d2 = (diagonal(domain, seed, b) for domain in (1, 2))
        inner = (HADAMARD * d2) @ (HADAMARD * d1)[:, place]
        for block, row, there in pieces(row_offset, rows):
            u[there, here] = (HADAMARD[row] * diagonal(3, seed, b, block)) @ inner / BLOCK
    return u


def fwht(x):
    """The Walsh-Hadamard transform along the last axis: pairs at distance 1 first, 512 last."""
    x = x.copy()
    place = np.arange(BLOCK)
    for stage in range(10):
        a = place[place >> stage & 1 == 0]
        b = a + 2**stage
        x[..., a], x[..., b] = x[..., a] + x[..., b], x[..., a] - x[..., b]
    return x


def arithmetic(dtype):
    """What an error of this dtype is projected in."""
    return np.float64 if dtype == torch.float64 else np.float32


def rounded(values, dtype):
    """A NumPy array as a tensor of `dtype`, rounded once, to nearest even."""
    wide = values.astype(np.float64)  # exact
    if dtype != torch.float64:
        bits, least = {
            torch.float32: (24, -126),
            torch.float16: (11, -14),
            torch.bfloat16: (8, -126),
        }[dtype]
        exponent = np.frexp(wide)[1] - 1
        step = np.ldexp(1.0, np.maximum(exponent, least) - (bits - 1))
        wide = np.rint(wide / step) * step  # now a number of `dtype`, or too large for it
    return torch.from_numpy(wide).to(dtype)


@np.errstate(invalid="ignore", over="ignore")
def structured_signals(error, sizes, scales, *, seed=0, row_offsets=None, column_offset=0):
    """The signals of an error [batch, n] as NumPy arrays in the error's arithmetic."""
    wide = arithmetic(error.dtype)
    e = error.cpu().double().numpy().astype(wide)
    z = {}
    for b, place, here in pieces(column_offset, e.shape[1]):
        x = np.zeros((len(e), BLOCK), wide)
        x[:, place] = e[:, here]
        d1, d2 = (diagonal(domain, seed, b).astype(wide) for domain in (1, 2))
        z[b] = fwht(d2 * fwht(d1 * x))
    signals = []
    for size, scale, first in zip(sizes, scales, row_offsets or [0] * len(sizes), strict=True):
        signal = np.empty((len(e), size), wide)
        for block, row, there in pieces(first, size):
            s = np.zeros((len(e), BLOCK), wide)
            for b in sorted(z):
                s = s + diagonal(3, seed, b, block).astype(wide) * z[b]
            signal[:, there] = fwht(s)[:, row] * wide(scale * 2.0**-10)
        signals.append(signal)
    return signals


@np.errstate(invalid="ignore", over="ignore")
def structured_adjoint(
    signals, scales, columns, dtype, *, seed=0, row_offsets=None, column_offset=0
):
    """The transpose, for an error of `columns` columns and of `dtype`: NumPy, in its arithmetic."""
    wide = arithmetic(dtype)
    signals = [signal.cpu().double().numpy().astype(wide) for signal in signals]
    w = {}
    layers = zip(row_offsets or [0] * len(signals), scales, range(len(signals)), strict=True)
    for first, scale, i in sorted(layers, key=lambda x: (x[0], signals[x[2]].shape[1], x[1])):
        for block, row, there in pieces(first, signals[i].shape[1]):
            w.setdefault(block, np.zeros((len(signals[i]), BLOCK), wide))
            w[block][:, row] += signals[i][:, there] * wide(scale * 2.0**-10)
    error = np.empty((len(signals[0]), columns), wide)
    for b, place, here in pieces(column_offset, columns):
        a = np.zeros((len(error), BLOCK), wide)
        for block in sorted(w):
            a = a + diagonal(3, seed, b, block).astype(wide) * fwht(w[block])
        d1, d2 = (diagonal(domain, seed, b).astype(wide) for domain in (1, 2))
        error[:, here] = (d1 * fwht(d2 * fwht(a)))[:, place]
    return error
