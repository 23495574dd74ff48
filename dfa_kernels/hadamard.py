"""Structured feedback: the distribution "hadamard" of stream v1, and its projection by definition.

U is made of blocks of 1024 x 1024 entries. With H the Sylvester-Hadamard matrix in natural order,
H[i, j] = (-1)^popcount(i & j), and D diagonal matrices of seeded signs, the block of output block B
= row // 1024 and input block b = column // 1024 is

    U[B, b] = H D3(B, b) H D2(b) H D1(b) / 1024

(the SORF of Yu et al. 2016, "Orthogonal random features", in blocks; Fastfood's idea of Le, Sarlos,
Smola 2013). The 1024 signs of a diagonal are the Philox blocks g = 0..7 of 128 bits each, read as
rademacher entries, with the key of every distribution and

    counter = (8 b + g, domain, c2, c3)
    D1(b): domain 1, c2 = c3 = 0       D2(b): domain 2, c2 = c3 = 0
    D3(B, b): domain 3, c2 = B & 0xffffffff, c3 = B >> 32

The projection's arithmetic is part of the definition, so signals are equal everywhere. All is fp32,
fp64 for fp64 errors; each addition is rounded to nearest, in this order:

    x  = e's columns of block b, zeros in the block's other columns
    z_b = fwht(D2(b) * fwht(D1(b) * x))
    s_B = fwht(D3(B, b_0) * z_{b_0} + D3(B, b_0 + 1) * z_{b_0 + 1} + ..)     summed in rising b
    signal[row] = s_B[row % 1024] * f,   f = scale * 2^-10 in fp64, then rounded to the arithmetic

and rounded to the dtype of the signals. fwht replaces (a, b), at a distance of h, by (a + b, a - b)
for h = 1, 2, 4, .., 512. "Equal" is equality of numbers: zeros of either sign are equal, and NaN
is NaN. The adjoint is

    w_B = sum over layers of f_i * signal_i, each product rounded, layers in the order of their
          rows, sizes and scales
    a_b = D3(B_0, b) * fwht(w_{B_0}) + D3(B_1, b) * fwht(w_{B_1}) + ..       summed in rising B
    error = D1(b) * fwht(D2(b) * fwht(a_b))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from dfa_kernels import stream as definition
from dfa_kernels.layers import Layers, Slab
from dfa_kernels.stream import Stream, arithmetic

BLOCK = 1024
FACTOR = 2.0**-10

_GROUPS = 8  # Philox blocks of one diagonal
_WORK = 2**20  # numbers in one temporary; a few of them exist at once


def fwht(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform along the last dimension, of 1024: a new tensor."""
    shape = x.shape
    for h in (1 << stage for stage in range(BLOCK.bit_length() - 1)):
        a, b = x.reshape(*shape[:-1], -1, 2, h).unbind(-2)
        x = torch.stack((a + b, a - b), -2)
    return x.reshape(shape)


def signs(domain: int, outputs: Tensor, inputs: Tensor, seed: int) -> Tensor:
    """Diagonals as int64 +-1: [output blocks, input blocks, 1024].

    Domains 1 and 2 have no output blocks: `outputs` is [0].
    """
    group = torch.arange(_GROUPS, device=inputs.device)
    column_block = _GROUPS * inputs[None, :, None] + group
    output = outputs[:, None, None]
    counter = (
        column_block,
        torch.full_like(column_block, domain),
        output & 0xFFFFFFFF,
        output >> 32,
    )
    words = definition.philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return (1 - 2 * definition.indices(words, "rademacher")).flatten(-2)


def project(error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype) -> list[Tensor]:
    """The signals of an error [batch, n]: one [batch, size] of `dtype` per layer.

    Temporaries take a few times `_WORK` numbers, or the size of one row of the error.
    """
    signals = [error.new_empty(error.shape[0], size, dtype=dtype) for size in layers.sizes]
    inputs = _Inputs(stream, error.shape[1], arithmetic(error.dtype), error.device)
    for rows in _cut(error.shape[0], _WORK // inputs.width):
        z = inputs.transformed(error[rows])
        for blocks in _batches(layers.blocks(BLOCK), _WORK // (len(z) * BLOCK)):
            s = z.new_zeros(len(z), len(blocks), BLOCK)
            outer = inputs.outer_diagonals([block.first // BLOCK for block in blocks])
            for b, diagonal in enumerate(outer):
                s += diagonal * z[:, b, None]
            for place, block in enumerate(blocks):
                sums = fwht(s[:, place])
                for layer in block.layers:
                    in_layer, in_block = layers.overlap(layer, block)
                    signal = sums[:, in_block] * (layers.scales[layer] * FACTOR)
                    signals[layer][rows, in_layer] = _rounded(signal, dtype)
    return signals


def project_adjoint(
    signals: Sequence[Tensor], layers: Layers, stream: Stream, columns: int, dtype: torch.dtype
) -> Tensor:
    """The transpose of `project`: one signal [batch, size] per layer -> [batch, columns]."""
    batch, device = signals[0].shape[0], signals[0].device
    error = signals[0].new_empty(batch, columns, dtype=dtype)
    inputs = _Inputs(stream, columns, arithmetic(dtype), device)
    for rows in _cut(batch, _WORK // inputs.width):
        total = error.new_zeros(rows.stop - rows.start, inputs.count, BLOCK, dtype=inputs.dtype)
        for block in layers.blocks(BLOCK):
            weights = total.new_zeros(len(total), BLOCK)
            for layer in block.layers:
                in_layer, in_block = layers.overlap(layer, block)
                signal = signals[layer][rows, in_layer].to(weights.dtype)
                weights[:, in_block] += signal * (layers.scales[layer] * FACTOR)
            weights = fwht(weights)
            for b, diagonal in enumerate(inputs.outer_diagonals([block.first // BLOCK])):
                total[:, b] += diagonal[0] * weights
        error[rows] = _rounded(inputs.transformed_back(total), dtype)
    return error


def feedback_matrix(
    rows: int,
    columns: int,
    row_offset: int,
    stream: Stream,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`rows` rows of U from `row_offset` on, and `columns` of its columns, from unit vectors.

    Entries are integers over 1024, exact in fp32 and rounded to 16 bits.
    """
    matrix = torch.empty(rows, columns, dtype=dtype, device=device)
    if matrix.numel() == 0:
        return matrix
    units = 256
    for some in _cut(columns, units):
        unit = torch.eye(some.stop - some.start, dtype=torch.float32, device=device)
        for part in _cut(rows, _WORK // units):
            layer = Layers((row_offset + part.start,), (part.stop - part.start,), (1.0,))
            (signal,) = project(unit, layer, stream.after(some.start), torch.float32)
            matrix[part, some] = signal.T
    return matrix


class _Inputs:
    """The blocks of U's columns in which an error of `columns` columns lies."""

    def __init__(self, stream: Stream, columns: int, dtype: torch.dtype, device: torch.device):
        first, self.head = divmod(stream.column_offset, BLOCK)
        self.columns, self.seed = columns, stream.seed
        self.count = -(-(self.head + columns) // BLOCK) if columns else 0
        self.width = max(self.count, 1) * BLOCK
        self.dtype = dtype
        self.blocks = torch.arange(first, first + self.count, device=device)

    def transformed(self, error: Tensor) -> Tensor:
        """z of each block: [batch, columns] -> [batch, blocks, 1024]."""
        z = error.new_zeros(len(error), self.width, dtype=self.dtype)
        z[:, self.head : self.head + self.columns] = error
        z = z.unflatten(1, (-1, BLOCK))
        for some in _cut(self.count, _WORK // (max(len(z), 1) * BLOCK)):
            first, second = self._inner_diagonals(some)
            z[:, some] = fwht(second * fwht(first * z[:, some]))
        return z

    def transformed_back(self, total: Tensor) -> Tensor:
        """The transpose of `transformed`."""
        for some in _cut(self.count, _WORK // (max(len(total), 1) * BLOCK)):
            first, second = self._inner_diagonals(some)
            total[:, some] = first * fwht(second * fwht(total[:, some]))
        return total.flatten(1)[:, self.head : self.head + self.columns]

    def outer_diagonals(self, outputs: list[int]) -> Iterator[Tensor]:
        """D3 of each input block in turn, rising: [output blocks, 1024]."""
        # Filled on the device: it would wait for a copy, which a CUDA graph could not hold.
        of = torch.cat([self.blocks.new_full((1,), output) for output in outputs])
        for b in range(self.count):
            yield signs(3, of, self.blocks[b : b + 1], self.seed)[:, 0].to(self.dtype)

    def _inner_diagonals(self, some: slice) -> tuple[Tensor, Tensor]:
        blocks = self.blocks[some]
        none = blocks.new_zeros(1)
        first, second = (signs(domain, none, blocks, self.seed)[0] for domain in (1, 2))
        return first.to(self.dtype), second.to(self.dtype)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded once. Torch goes from 64 bits to 16 by way of fp32, so that is made odd before."""
    if values.dtype != torch.float64 or dtype.itemsize != 2:
        return values.to(dtype)
    near = values.float()
    bits = near.view(torch.int32)
    too_far = near.double().abs() > values.abs()
    odd = torch.where(near.double() == values, bits, (bits - too_far.int()) | 1)
    return torch.where(values.isnan(), near, odd.view(torch.float32)).to(dtype)


def _cut(total: int, step: int) -> Iterator[slice]:
    """Slices that cover range(total), of at least one."""
    step = max(step, 1)
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _batches(blocks: Iterator[Slab], size: int) -> Iterator[list[Slab]]:
    """Lists of `size` blocks, at least one."""
    while some := list(islice(blocks, max(size, 1))):
        yield some
