"""The layers that a projection makes signals for: which rows of U each of them reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Layers(NamedTuple):
    """Layer i reads rows [row_offsets[i], row_offsets[i] + sizes[i]) of U, times scales[i].

    Tuples side by side, of equal length: they are an operator's arguments as they are, and hash
    faster than a tuple of records.
    """

    row_offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(
        cls, row_offsets: Sequence[int], sizes: Sequence[int], scales: Sequence[float]
    ) -> Layers:
        """From any sequences."""
        return cls(tuple(row_offsets), tuple(sizes), tuple(scales))
