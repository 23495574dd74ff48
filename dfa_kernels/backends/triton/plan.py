"""The tiles of U's rows and the layers that each is for, as tensors on the device."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from dfa_kernels.layers import Layers

_KEPT = 256


class Plan(NamedTuple):
    """A set of layers cut into tiles of rows, on a device.

    tiles: int64 [tiles, 4], the first row, the number of rows, and the range of layers to look at.
    layers: int64 [layers, 2], the first row and the size. scales: [layers], fp32 or fp64.
    Layers are in the order of `order`, which indexes the list of outputs.
    """

    tiles: Tensor
    layers: Tensor
    scales: Tensor
    order: list[int]
    readers: set[int]
    copied: torch.cuda.Event | None

    def read_by(self, stream: int, capturing: bool) -> None:
        """Let launches on the current stream, `stream`, read the plan, and keep it for them.

        A stream other than the one it was copied on first waits for the copy. A launch captured in
        a CUDA graph reads it whenever the graph is replayed, so the plan is kept for good.
        """
        if capturing:
            _captured[id(self)] = self
        elif stream not in self.readers and self.copied is not None:
            current = torch.cuda.current_stream(self.tiles.device)
            current.wait_event(self.copied)
            for tensor in (self.tiles, self.layers, self.scales):
                tensor.record_stream(current)
            self.readers.add(stream)


_captured: dict[int, Plan] = {}


def cut_into_tiles(layers: Layers, rows: int) -> tuple[Tensor, list[int]]:
    """Tiles [tiles, 4] of at most `rows` rows, and the order of the layers they refer to.

    Every row of the union is in one tile, however many layers contain it. Layers are sorted by
    first row, the longest first, so those that share rows with a tile are few and neighbours.
    """
    row_offsets, sizes, _ = layers
    order = sorted(range(len(sizes)), key=lambda i: (row_offsets[i], -sizes[i]))
    return _tiles(layers, rows, order), order


def cut_into_blocks(layers: Layers, rows: int) -> tuple[Tensor, list[int]]:
    """Tiles [tiles, 4] that are the whole `layers.blocks(rows)`, and the order of the layers.

    It is that in which the transpose of structured feedback adds layers up.
    """
    order = layers.order()
    return _tiles(layers.whole(rows), rows, order), order


def _tiles(layers: Layers, rows: int, order: list[int]) -> Tensor:
    """The union of the layers' rows in tiles, for layers in an order of rising first rows.

    A tile's range of layers is the narrowest that holds them all. Rows end at 2**63, so the end of
    a range of rows may not fit an int64, and is never stored.
    """
    row_offsets, sizes, _ = layers
    pieces, starts, total = [], [], 0
    for first, last in layers.unions():
        count = -(-(last - first) // rows)
        piece = torch.zeros(count, 4, dtype=torch.int64, device="cpu")
        piece[:, 0] = first + rows * torch.arange(count, device="cpu")
        piece[:, 1] = rows
        piece[-1, 1] = last - first - rows * (count - 1)
        pieces.append(piece)
        starts.append((first, total))
        total += count
    tiles = torch.cat(pieces)
    covered, union = [], -1
    for layer in order:
        first, size = row_offsets[layer], sizes[layer]
        while union + 1 < len(starts) and starts[union + 1][0] <= first:
            union += 1
        start, base = starts[union]
        left, right = (first - start) // rows, (first + size - 1 - start) // rows
        covered.append(slice(base + left, base + right + 1))
    for place, span in enumerate(covered):
        tiles[span, 3] = place + 1
    for place, span in reversed(list(enumerate(covered))):
        tiles[span, 2] = place
    return tiles


class Kept(dict):
    """A bounded dictionary that drops its oldest entries. Several threads may use one."""

    def keep(self, key: Hashable, value: object) -> None:
        """Remember `value`."""
        with _keeping:
            while len(self) >= _KEPT:
                del self[next(iter(self))]
            self[key] = value


_keeping = threading.Lock()


_plans = Kept()


def plan_for(
    layers: Layers,
    factor: float,
    rows: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    whole: bool = False,
) -> Plan:
    """The plan of a set of layers, in tiles of `rows` rows. `factor` multiplies every scale.

    The products are rounded to `dtype`. `whole`: the tiles are all of the blocks that layers read.
    """
    key = (device, rows, factor, dtype, whole, layers)
    plan = _plans.get(key)
    if plan is not None:
        return plan
    tiles, order = (cut_into_blocks if whole else cut_into_tiles)(layers, rows)
    ranges = [(layers.row_offsets[i], layers.sizes[i]) for i in order]
    scales = [layers.scales[i] * factor for i in order]
    rounded = torch.tensor(scales, dtype=torch.float64, device="cpu").to(dtype)
    plan = Plan(tiles, torch.tensor(ranges, device="cpu"), rounded, order, set(), None)
    if device.type == "cuda":  # from pinned memory, so that the host does not wait
        there = [table.pin_memory().to(device, non_blocking=True) for table in plan[:3]]
        copied = torch.cuda.Event()
        copied.record()
        plan = Plan(there[0], there[1], there[2], order, set(), copied)
    _plans.keep(key, plan)
    return plan
