"""Projections whose signals are known, for proving a kernel.

`Case` builds one error whose rows fail in different ways, layers that overlap, begin at odd rows
and lie far out, and says what is wrong with the signals a kernel made of them.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dfa_kernels import stream

# A factor sqrt(3) that is left out of uniform entries makes them multiples of 1/256.
_UNIT = {"normal": 1.0, "uniform": math.sqrt(3), "rademacher": 1.0}
# All 24 bits of it count, also where it is the sum of three numbers of 8 bits.
_NEEDLE = 1 + 2**-6 + 2**-12 + 2**-20

# Rows of U, sizes and scales of the layers. The first two cross row 2**32, and two are one range of
# rows. Scales are powers of two, which round nothing.
LAYERS = (
    (2**32 - 150, 301, 1.0),
    (2**32 - 20, 77, -0.5),
    (2**32 - 20, 77, 4.0),
    (5, 33, 2.0),
    (2**63 - 9, 9, 1.0),
)
_SEED = -0x61C8864680B583EB  # both halves of the key have their upper bit set
_COLUMN_OFFSET = 2**20 + 77
_UNIT_ROWS = 141


class Signal(NamedTuple):
    """A layer's signal in fp64 [M, size], and how far off each number may be."""

    values: Tensor
    bounds: Tensor


class Case(NamedTuple):
    """One projection: an error [M, n], the layers, and where in U they are.

    `rows` names the kinds of the error's rows, each a slice of them:

    - "unit": a single 1, so that the signals are entries of U, bit for bit.
    - "integer": small integers. Sums of signs, and of uniform entries without their factor, are
      exact in every order of summation, and so the same bits in every kernel.
    - "needle": a single number of 24 significant bits, which a lost term of an fp32 error changes.
    - "random": normal numbers, held to the a priori bound of a sum.
    """

    error: Tensor
    row_offsets: list[int]
    sizes: list[int]
    scales: list[float]
    seed: int
    column_offset: int
    distribution: str
    rows: dict[str, slice]

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        distribution: str,
        columns: int = 1041,
        unit_rows: int = _UNIT_ROWS,
        layers: tuple[tuple[int, int, float], ...] = LAYERS,
    ) -> Case:
        """A case with an error of `dtype` and `columns` columns, on the CPU.

        1041 columns are three steps or more of every tile. At most `unit_rows` rows are unit
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
        row_offsets, sizes, scales = (list(column) for column in zip(*layers, strict=True))
        return cls(error, row_offsets, sizes, scales, _SEED, _COLUMN_OFFSET, distribution, rows)

    @property
    def arguments(self) -> tuple[list[int], list[int], list[float], int, int, str]:
        """What a backend's `project` takes between the error and the dtype."""
        return self[1:7]

    def expected(self, dtype: torch.dtype, *, terms: int, lattice: bool) -> list[Signal]:
        """The signals in `dtype`, one per layer.

        `terms`: how many numbers of 8 bits the kernel makes of each fp32 number; 3 where it is
        taken as it is. `lattice`: uniform entries get their factor after the sum.
        """
        return [self._signal(layer, dtype, terms, lattice) for layer in range(len(self.sizes))]

    def mistake(self, signals: list[Tensor], expected: list[Signal]) -> str | None:
        """What is wrong with the signals, one [M, size] per layer, or None."""
        if len(signals) != len(expected):
            return f"{len(signals)} signals for {len(expected)} layers"
        for layer, (signal, (values, bounds)) in enumerate(zip(signals, expected, strict=True)):
            if signal.shape != values.shape:
                return (
                    f"layer {layer} has a signal of shape {tuple(signal.shape)}, "
                    f"not {tuple(values.shape)}"
                )
            found = signal.cpu().double()
            wrong = ~((found - values).abs() <= bounds)  # NaN is wrong
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
        scale, where = self.scales[layer], self._where(layer)
        arithmetic = torch.float64 if self.error.dtype == torch.float64 else torch.float32
        error, entries = self.error.double(), _entries(*where, arithmetic).double()
        values = error @ entries.T * scale
        unit = torch.finfo(arithmetic).eps / 2
        left_out = 2.0 ** (-8 * terms) if self.error.dtype == torch.float32 and terms < 3 else 0.0
        relative = torch.full((len(error), 1), 2 * terms * (error.shape[1] + 3) * unit)
        relative[self.rows["needle"]] = 8 * unit
        bounds = (relative + left_out) * (error.abs() @ entries.abs().T * abs(scale))
        info = torch.finfo(dtype)
        bounds += info.eps / 2 * values.abs() + info.smallest_normal * info.eps
        exact = ["unit"]
        if self.distribution == "rademacher" or (self.distribution == "uniform" and lattice):
            exact.append("integer")
            factor = torch.tensor(_UNIT[self.distribution] * scale, dtype=arithmetic)
            rows = self.rows["integer"]
            values[rows] = ((error[rows] @ _lattice(*where).T).to(arithmetic) * factor).double()
        for kind in exact:
            rows = self.rows[kind]
            values[rows], bounds[rows] = values[rows].to(dtype).double(), 0.0
        return Signal(values, bounds)

    def _where(self, layer: int) -> tuple[str, int, int, int, int, int]:
        size, row_offset = self.sizes[layer], self.row_offsets[layer]
        columns = self.error.shape[1]
        return self.distribution, size, columns, self.seed, row_offset, self.column_offset


def _at(columns: Tensor, count: int, value: float) -> Tensor:
    """Rows of `count` columns, each with `value` in one of `columns` and zeros elsewhere."""
    rows = torch.zeros(len(columns), count, dtype=torch.float64)
    rows[torch.arange(len(columns)), columns] = value
    return rows


@functools.lru_cache(maxsize=64)
def _entries(
    distribution: str,
    rows: int,
    columns: int,
    seed: int,
    row_offset: int,
    column_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    return stream.entries(
        rows,
        columns,
        seed=seed,
        row_offset=row_offset,
        column_offset=column_offset,
        distribution=distribution,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def _lattice(distribution: str, *where: int) -> Tensor:
    """Entries without the factor of uniform ones, exact: multiples of 1/256, or +-1."""
    entries = _entries(distribution, *where, torch.float64)
    if distribution != "uniform":
        return entries
    return (entries / math.sqrt(3) * 256).round() / 256
