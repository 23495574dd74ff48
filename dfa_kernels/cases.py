"""Projections with known signals, to check kernels against.

A `Case` has an error whose batch mixes kinds that catch different mistakes, and layers that
overlap, begin at odd rows and lie far out. It says what is wrong with a kernel's signals.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dfa_kernels import hadamard
from dfa_kernels import stream as definition
from dfa_kernels.layers import Layers
from dfa_kernels.stream import DENSE, STRUCTURED, Stream

# All 24 bits count, also if it is split into three numbers of 8 bits.
_NEEDLE = 1 + 2**-6 + 2**-12 + 2**-20

# The first three cross row 2**32, and two of them read the same rows. Scales are powers of two, so
# that scaling is exact.
LAYERS = Layers(
    row_offsets=(2**32 - 150, 2**32 - 20, 2**32 - 20, 5, 2**63 - 9),
    sizes=(301, 77, 77, 33, 9),
    scales=(1.0, -0.5, 4.0, 2.0, 1.0),
)
# Of structured feedback, more blocks than a kernel makes at once. They are as many layers as above,
# for which Triton compiles nothing new.
MANY_BLOCKS = Layers(
    row_offsets=(900, 10_000, 900, 5, 10_300),
    sizes=(8_000, 2_048, 40, 77, 300),
    scales=(1.0, -0.37, 2.0, 0.11, -1.0),
)
LONE_LAYER = Layers(LAYERS.row_offsets[:1], LAYERS.sizes[:1], LAYERS.scales[:1])
_SEED = -0x61C8864680B583EB  # both halves of the key have their upper bit set
_COLUMN_OFFSET = 2**20 + 77
_UNIT_ROWS = 141


class Signal(NamedTuple):
    """A layer's signal in fp64 [batch, size], and how far off each number may be."""

    values: Tensor
    bounds: Tensor


class Case(NamedTuple):
    """One projection: an error [batch, n], the layers, and where in U they are.

    `rows` gives the slice of the batch that each kind of error has:

    - "unit": a single 1, so the signals are entries of U, bit for bit.
    - "integer": small integers. Sums of signs, and of uniform entries without their factor, are
      exact in any order of summation, so every kernel gives the same bits.
    - "needle": a single number of 24 significant bits, which a lost term of an fp32 error changes.
    - "random": normal numbers, held to the a priori bound of a sum.
    """

    error: Tensor
    layers: Layers
    stream: Stream
    rows: dict[str, slice]

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        distribution: str,
        columns: int = 1041,
        unit_rows: int = _UNIT_ROWS,
        layers: Layers = LAYERS,
    ) -> Case:
        """A case with an error of `dtype` and `columns` columns, on the CPU.

        1041 columns take every tile at least three steps. At most `unit_rows` of the batch are unit
        vectors, spread over all columns.
        """
        generator = torch.Generator().manual_seed(columns)
        ones = torch.linspace(0, columns - 1, min(unit_rows, columns)).round().long()
        needles = torch.tensor([0, columns // 2, columns - 1])
        parts = {
            "unit": _at(ones, columns, 1.0),
            "integer": torch.randint(-8, 9, (8, columns), generator=generator).double(),
            "needle": _at(needles, columns, _NEEDLE),
            "random": torch.randn(16, columns, generator=generator, dtype=torch.float64),
        }
        rows, first = {}, 0
        for kind, part in parts.items():
            rows[kind] = slice(first, first + len(part))
            first += len(part)
        error = torch.cat(list(parts.values())).to(dtype)
        return cls(error, layers, Stream(_SEED, _COLUMN_OFFSET, distribution), rows)

    def expected(self, dtype: torch.dtype, *, terms: int, lattice: bool) -> list[Signal]:
        """The expected signals in `dtype`, one per layer.

        `terms`: how many numbers of 8 bits the kernel splits each fp32 number into; 3 if it takes
        fp32 as it is. `lattice`: the kernel applies the factor of uniform entries after the sum.
        """
        if self.stream.distribution in STRUCTURED:  # the definition fixes every bit
            exact = hadamard.project(self.error, self.layers, self.stream, dtype)
            return [
                Signal(one.double(), torch.zeros_like(one, dtype=torch.float64)) for one in exact
            ]
        return [
            self._signal(layer, dtype, terms, lattice) for layer in range(len(self.layers.sizes))
        ]

    def mistake(self, signals: list[Tensor], expected: list[Signal]) -> str | None:
        """What is wrong with the signals, one [batch, size] per layer, or None."""
        if len(signals) != len(expected):
            return f"{len(signals)} signals for {len(expected)} layers"
        for layer, (signal, (values, bounds)) in enumerate(zip(signals, expected, strict=True)):
            if signal.shape != values.shape:
                return (
                    f"layer {layer} has a signal of shape {tuple(signal.shape)}, "
                    f"not {tuple(values.shape)}"
                )
            found = signal.cpu().double()
            wrong = ~((found - values).abs() <= bounds)  # NaN counts as wrong
            if wrong.any():
                row, unit = (int(i) for i in wrong.nonzero()[0])
                kind = next(name for name, rows in self.rows.items() if row < rows.stop)
                return (
                    f"{int(wrong.sum())} of {wrong.numel()} signals in layer {layer}, the first of "
                    f"error {row} ({kind}) and unit {unit}: {found[row, unit]:.9g} instead of "
                    f"{values[row, unit]:.9g}"
                )
        return None

    def _signal(self, layer: int, dtype: torch.dtype, terms: int, lattice: bool) -> Signal:
        scale, row_offset = self.layers.scales[layer], self.layers.row_offsets[layer]
        piece = (self.layers.sizes[layer], self.error.shape[1], row_offset, self.stream)
        facts = DENSE[self.stream.distribution]
        arithmetic = definition.arithmetic(self.error.dtype)
        error, entries = self.error.double(), _entries(*piece, arithmetic).double()
        values = error @ entries.T * scale
        unit = torch.finfo(arithmetic).eps / 2
        left_out = 2.0 ** (-8 * terms) if self.error.dtype == torch.float32 and terms < 3 else 0.0
        relative = torch.full((len(error), 1), 2 * terms * (error.shape[1] + 3) * unit)
        relative[self.rows["needle"]] = 8 * unit
        bounds = (relative + left_out) * (error.abs() @ entries.abs().T * abs(scale))
        info = torch.finfo(dtype)
        bounds += info.eps / 2 * values.abs() + info.smallest_normal * info.eps
        exact = ["unit"]
        if facts.bits <= 8 and (lattice or facts.factor == 1.0):  # few bits: sums are exact
            exact.append("integer")
            factor = torch.tensor(facts.factor * scale, dtype=arithmetic)
            rows = self.rows["integer"]
            values[rows] = ((error[rows] @ _lattice(*piece).T).to(arithmetic) * factor).double()
        for kind in exact:
            rows = self.rows[kind]
            values[rows], bounds[rows] = values[rows].to(dtype).double(), 0.0
        return Signal(values, bounds)


def _at(columns: Tensor, count: int, value: float) -> Tensor:
    """An error for each of `columns`: `count` numbers, all 0 but `value` in that column."""
    rows = torch.zeros(len(columns), count, dtype=torch.float64)
    rows[torch.arange(len(columns)), columns] = value
    return rows


@functools.lru_cache(maxsize=64)
def _entries(
    rows: int, columns: int, row_offset: int, stream: Stream, dtype: torch.dtype
) -> Tensor:
    cpu = torch.device("cpu")
    return definition.entries(rows, columns, row_offset, stream, dtype, cpu)


def _lattice(rows: int, columns: int, row_offset: int, stream: Stream) -> Tensor:
    """Entries without the factor of uniform ones, which is exact: multiples of 1/256, or +-1."""
    entries = _entries(rows, columns, row_offset, stream, torch.float64)
    return (entries / DENSE[stream.distribution].factor * 256).round() / 256
