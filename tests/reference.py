"""A second implementation of stream v1 and the projection, in NumPy uint64 and float64.

Shares only the definition with the package; every backend is compared with it.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

KNOWN = json.loads((Path(__file__).parent / "known_answers.json").read_text())
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
