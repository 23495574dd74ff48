"""The layers that a projection makes signals for, and the slabs of rows that they read.

Each row in the union of the layers' rows is made once, however many layers read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value, statically_known_true

_SYMBOLS = {torch.SymInt, torch.SymFloat}


def symbolic(numbers: Iterable[Any]) -> bool:
    """Whether a number is a symbol of a graph that is being traced, not a value."""
    if torch.compiler.is_compiling():  # torch.compile shows its symbols as ints and floats
        return not all(has_static_value(number) for number in numbers)
    return not _SYMBOLS.isdisjoint(map(type, numbers))


class Layers(NamedTuple):
    """Layer i reads rows [row_offsets[i], row_offsets[i] + sizes[i]) of U, times scales[i].

    Three tuples of equal length: operators take them as they are, and they hash faster than a tuple
    of records. While a graph is traced, each number may be a symbol.
    """

    row_offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(
        cls, row_offsets: Sequence[int], sizes: Sequence[int], scales: Sequence[float]
    ) -> Layers:
        """Layers from any sequences."""
        return cls(tuple(row_offsets), tuple(sizes), tuple(scales))

    @classmethod
    def distinct(
        cls, row_offsets: Sequence[int], sizes: Sequence[int], scales: Sequence[float]
    ) -> tuple[Layers, list[int]]:
        """The distinct layers, and for each given layer its index among them.

        Symbolic layers are equal if they are for all values of the symbols.
        """
        given = zip(row_offsets, sizes, scales, strict=True)
        if torch.compiler.is_compiling() or any(map(symbolic, (row_offsets, sizes, scales))):
            return cls._distinct_symbols([*given])
        places: dict[tuple[int, int, float], int] = {}
        found = [places.setdefault(layer, len(places)) for layer in given]
        return cls(*zip(*places, strict=True)), found

    @classmethod
    def _distinct_symbols(cls, given: list[tuple[int, int, float]]) -> tuple[Layers, list[int]]:
        """As `distinct`. A symbol has no hash but that of its value, which a graph would keep."""
        layers: list[tuple[int, int, float]] = []
        places: dict[tuple[int, int, float], int] = {}
        symbols: list[int] = []  # the places of symbolic layers
        found = []
        for layer in given:
            if not symbolic(layer):
                place = places.setdefault(layer, len(layers))
            else:
                equal = [place for place in symbols if _equal(layers[place], layer)]
                place = equal[0] if equal else len(layers)
                if not equal:
                    symbols.append(place)
            if place == len(layers):
                layers.append(layer)
            found.append(place)
        return cls(*zip(*layers, strict=True)), found

    def unions(self) -> list[tuple[int, int]]:
        """The union of the layers' rows as disjoint ranges (first, last), ascending."""
        merged: list[tuple[int, int]] = []
        for first, size in sorted(zip(self.row_offsets, self.sizes, strict=True)):
            if merged and first <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], first + size)
            else:
                merged.append((first, first + size))
        return merged

    def union_rows(self) -> int:
        """The number of rows in the union of the layers' rows."""
        return sum(last - first for first, last in self.unions())

    def slabs(self, rows: int) -> Iterator[Slab]:
        """Cut the union of the layers' rows into slabs of at most `rows` rows.

        Every row of the union is in exactly one slab. Slabs have no other rows. A slab's layers
        are in an order that does not depend on the given one, unless they are equal, so sums over
        them do not either.
        """
        ends, waiting = self._ends_and_order()
        active: list[int] = []
        position = 0
        while waiting or active:
            if not active:
                position = self.row_offsets[waiting[-1]]
            reach = max((ends[layer] for layer in active), default=position)
            while waiting:
                first = self.row_offsets[waiting[-1]]
                if first > reach or first >= position + rows:
                    break
                active.append(waiting.pop())
                reach = max(reach, ends[active[-1]])
            slab = Slab(position, min(position + rows, reach), active)
            yield slab
            position = slab.last
            active = [layer for layer in active if ends[layer] > position]

    def blocks(self, rows: int) -> Iterator[Slab]:
        """The blocks of `rows` rows that layers read, ascending: block i begins at i * rows.

        They are whole, also where layers read a part of their rows. A block's layers are in the
        order of their rows, sizes and scales; equal ones as they are given.
        """
        ends, waiting = self._ends_and_order()
        active: list[int] = []
        last = 0
        while waiting or active:
            first = last if active else self.row_offsets[waiting[-1]] // rows * rows
            last = first + rows
            while waiting and self.row_offsets[waiting[-1]] < last:
                active.append(waiting.pop())
            yield Slab(first, last, active)
            active = [layer for layer in active if ends[layer] > last]

    def order(self) -> list[int]:
        """The layers in the order of their rows, sizes and scales; equal ones as they are given."""
        return sorted(
            range(len(self.sizes)),
            key=lambda i: (self.row_offsets[i], self.sizes[i], self.scales[i]),
        )

    def whole(self, rows: int) -> Layers:
        """The layers with all rows of the blocks of `rows` rows that they read; see `blocks`."""
        firsts = [first // rows * rows for first in self.row_offsets]
        pairs = zip(self.row_offsets, self.sizes, strict=True)
        ends = [-(-(first + size) // rows) * rows for first, size in pairs]
        sizes = [end - first for first, end in zip(firsts, ends, strict=True)]
        return Layers.of(firsts, sizes, self.scales)

    def _ends_and_order(self) -> tuple[list[int], list[int]]:
        """The end of every layer's rows, and the layers in order: the first to begin is last."""
        ends = [first + size for first, size in zip(self.row_offsets, self.sizes, strict=True)]
        return ends, self.order()[::-1]

    def overlap(self, layer: int, slab: Slab) -> tuple[slice, slice]:
        """The rows that a layer and a slab share, counted from the first row of each."""
        begin = self.row_offsets[layer]
        first, last = max(slab.first, begin), min(slab.last, begin + self.sizes[layer])
        return slice(first - begin, last - begin), slice(first - slab.first, last - slab.first)


class Slab(NamedTuple):
    """Rows [first, last) of U, and the layers that read some of them, by their index."""

    first: int
    last: int
    layers: list[int]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.last - self.first


def _equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two symbolic layers are equal for all values of their symbols; adds no guard."""
    return all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))
