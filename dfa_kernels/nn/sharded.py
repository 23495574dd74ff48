"""Signals where processes share the output or the activations, as in tensor parallelism.

Each process projects what it has of the error, for what it has of the activations:

    error                       activation                  what is sent
    a part of the columns       whole                       one all-reduce of the longest signal
    a part of the columns       a part                      a reduce-scatter of each signal
    a part of the batch         the same part               nothing
    whole                       a part                      nothing: a seed makes these rows alone

The error itself is not gathered, unless a `Source` of the user's own is to project it, or the
batches do not go together. Whatever else is sent, `DTensor.redistribute` decides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfa_kernels import sharding
from dfa_kernels.layers import Layers
from dfa_kernels.nn.plan import Plan
from dfa_kernels.nn.rows import beside_rows, from_rows, order, to_rows
from dfa_kernels.nn.shards import Layout
from dfa_kernels.nn.signals import Place, dtype_of, project
from dfa_kernels.nn.sources import OutputWeights, Seeded, Source, Stored

_SUM = -1  # instead of a batch dimension


class Rows(NamedTuple):
    """What this process has of the error: [rows, columns], from `first_column` on.

    `splits` says for each dimension of the mesh what it splits: a batch dimension, by its position,
    _SUM where the processes' signals are to be summed, or None. `batch` and `own_batch` are the
    sizes of the batch dimensions of the whole and of what is here.
    """

    local: Tensor
    first_column: int
    splits: tuple[int | None, ...]
    batch: tuple[int, ...]
    own_batch: tuple[int, ...]


class Piece(NamedTuple):
    """The part of an activation that this process projects for.

    It is that of `placements`, of the sizes `shape` from `offsets` on: `size` rows of the layer's
    matrix, from `first_row` on. `narrow` has the batch dimensions that it has less of than the
    error, by position, with their first element and how many there are.
    """

    placements: tuple[Any, ...]
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    first_row: int
    size: int
    narrow: tuple[tuple[int, int, int], ...]


def deliver(
    source: Source,
    error: Tensor,
    plan: Plan,
    transform: Callable[[Tensor], Tensor] | None,
) -> list[Tensor]:
    """The signal for every place, shared between processes as its activation is.

    `transform` is the `DFA`'s error_transform: it gets a DTensor if the error is one.
    """
    mesh, places = plan.mesh, plan.places
    rows = _rows(source, error, plan, transform)
    pieces = [_piece(rows, place, mesh, isinstance(source, Seeded)) for place in places]
    dtype = dtype_of(places, error.dtype)
    signals: dict[int, Tensor] = {}
    for narrow in dict.fromkeys(piece.narrow for piece in pieces):
        ours = [index for index, piece in enumerate(pieces) if piece.narrow == narrow]
        wanted = [_layer_of(plan, index, pieces[index]) for index in ours]
        layers, positions = Layers.distinct(*zip(*wanted, strict=True))
        summed = {*positions} if _SUM in rows.splits else set()
        for index, layer in zip(ours, positions, strict=True):
            if _scattered(rows, places[index], mesh):
                summed.discard(layer)
        make = functools.partial(
            project, source, _narrowed(rows, narrow), dtype=dtype, first_column=rows.first_column
        )
        made = _made(make, layers, summed, rows, mesh)
        first: dict[int, int] = {}  # the place that has a layer's signal itself
        for index, layer in zip(ours, positions, strict=True):
            place, twin = places[index], first.setdefault(layer, index)
            if twin != index and places[twin] == place:
                signals[index] = signals[twin]
                continue
            piece = _after_sum(rows, pieces[index]) if layer in summed else pieces[index]
            part = made[layer] if twin == index else made[layer].clone()
            signals[index] = _placed(part, piece, place, mesh, plan.masks)
    return [signals[index] for index in range(len(places))]


def whole(tensor: Tensor, layout: Layout | None) -> Tensor:
    """A tensor that processes share, gathered."""
    if layout is None:
        return tensor
    if layout.local:
        tensor = sharding.dtensor(tensor, layout.mesh, layout.placements, layout.shape)
    shared: Any = tensor
    return shared.full_tensor()


def _rows(
    source: Source,
    error: Any,
    plan: Plan,
    transform: Callable[[Tensor], Tensor] | None,
) -> Rows:
    mesh = plan.mesh
    if plan.layout is not None and plan.layout.local and not sharding.is_dtensor(error):
        error = sharding.dtensor(error, mesh, plan.layout.wanted, plan.layout.shape)
    batch, rest = order(error.shape, plan.batch_dims, "DFA")
    sizes = tuple(error.shape[dim] for dim in batch)
    if not sharding.is_dtensor(error):
        local = to_rows(error, plan.batch_dims, "DFA")
        local = local if transform is None else transform(local)
        return Rows(local, 0, (None,) * mesh.ndim, sizes, sizes)
    known = isinstance(source, (Seeded, Stored, OutputWeights))
    columns = rest[0] if known and rest else None
    fitting = [dim for position, dim in enumerate(batch) if _go_together(plan, sizes, position)]
    error = sharding.splittable(error, columns, fitting, sums=known and transform is None)
    own, offsets = sharding.part_of(error.shape, mesh, error.placements)
    local = to_rows(error.to_local(), plan.batch_dims, "DFA")
    if transform is not None:
        local = _transformed(local, error, batch, columns, sizes, plan.error_size, transform)
    first = 0 if columns is None else offsets[columns]
    splits = tuple(
        batch.index(place.dim)
        if place.is_shard() and place.dim != columns
        else (None if place.is_replicate() else _SUM)
        for place in error.placements
    )
    beyond = math.prod(error.shape[dim] for dim in rest[1:])
    return Rows(local, first * beyond, splits, sizes, tuple(own[dim] for dim in batch))


def _transformed(
    local: Tensor,
    error: Any,
    batch: Sequence[int],
    columns: int | None,
    sizes: Sequence[int],
    error_size: int,
    transform: Callable[[Tensor], Tensor],
) -> Tensor:
    """The rows that are here of the transformed error: of the whole, which is a DTensor."""
    from torch.distributed.tensor import Shard

    placements = tuple(
        Shard(1 if place.dim == columns else 0) if place.is_shard() else place
        for place in error.placements
    )
    shape = (math.prod(sizes), error_size)
    rows: Any = transform(sharding.dtensor(local, error.device_mesh, placements, shape))
    if not sharding.is_dtensor(rows):
        raise TypeError(
            "DFA: error_transform must return a DTensor where the error is one, as functions of "
            f"torch do, got {type(rows).__name__}"
        )
    return rows.redistribute(placements=placements).to_local()


def _go_together(plan: Plan, sizes: Sequence[int], position: int) -> bool:
    """Whether every activation's batch is split as the error's is, by the dimension there."""
    return all(_alike(place, sizes, position) for place in plan.places)


def _alike(place: Place, sizes: Sequence[int], position: int) -> bool:
    batch, _ = order(place.shape, place.batch_dims, "DFA")
    ours = [place.shape[dim] for dim in batch[: position + 1]]
    return ours == list(sizes[: position + 1])


def _piece(rows: Rows, place: Place, mesh: Any, any_rows: bool) -> Piece:
    """What this process projects for a place; `any_rows` if the source makes any of a layer."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    batch, rest = order(place.shape, place.batch_dims, "DFA")
    placements: list[Any] = []
    narrowed = []
    for split, wanted in zip(rows.splits, _wanted(place, mesh), strict=True):
        if split == _SUM:
            placements.append(Partial())
        elif split is not None:
            placements.append(Shard(batch[split]))
        elif sharding.is_split(wanted, {rest[0]} if any_rows else set()):
            placements.append(wanted)
        elif sharding.is_split(wanted, set(batch)):
            position = batch.index(wanted.dim)
            fits = position not in rows.splits and _alike(place, rows.batch, position)
            placements.append(wanted if fits else Replicate())
            narrowed += [position] * fits
        else:
            placements.append(Replicate())
    shape, offsets = sharding.part_of(place.shape, mesh, placements)
    beyond = math.prod(shape[dim] for dim in rest[1:])
    narrow = tuple(
        (position, offsets[batch[position]], shape[batch[position]])
        for position in dict.fromkeys(narrowed)
    )
    first, size = offsets[rest[0]] * beyond, shape[rest[0]] * beyond
    return Piece(tuple(placements), shape, offsets, first, size, narrow)


def _wanted(place: Place, mesh: Any) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate

    return (Replicate(),) * mesh.ndim if place.layout is None else place.layout.wanted


def _narrowed(rows: Rows, narrow: Sequence[tuple[int, int, int]]) -> Tensor:
    """Those rows of the error that are of a part of the batch."""
    if not narrow:
        return rows.local
    split = rows.local.unflatten(0, rows.own_batch)
    for position, first, count in narrow:
        split = split.narrow(position, first, count)
    return split.flatten(0, len(rows.own_batch) - 1)


def _layer_of(plan: Plan, index: int, piece: Piece) -> tuple[int, int, float]:
    """The first row, the size and the scale of what this process projects for a place."""
    layer = plan.places[index].layer
    first = plan.layers.row_offsets[layer] + piece.first_row
    return first, max(piece.size, 1), plan.layers.scales[layer]


def _scattered(rows: Rows, place: Place, mesh: Any) -> bool:
    """Whether a signal that is to be summed is wanted in parts."""
    pairs = zip(rows.splits, _wanted(place, mesh), strict=True)
    return any(split == _SUM and not wanted.is_replicate() for split, wanted in pairs)


def _made(
    make: Callable[[Layers], list[Tensor]], layers: Layers, summed: set[int], rows: Rows, mesh: Any
) -> list[Tensor]:
    """The signals of distinct layers, those in `summed` summed for all processes.

    Of the layers that slice one matrix the longest is enough, and one all-reduce is for all.
    """
    each = [*zip(*layers, strict=True)]
    longest: dict[int, tuple[int, float]] = {}  # by the first row: the size and the scale
    for layer in sorted(summed):
        first, size, scale = each[layer]
        known_size, known_scale = longest.get(first, (size, scale))
        longest[first] = max(size, known_size), max(scale, known_scale, key=abs)
    alone = [layer for layer in range(len(each)) if layer not in summed]
    asked = [(first, *rest) for first, rest in longest.items()] + [each[layer] for layer in alone]
    signals = make(Layers.of(*zip(*asked, strict=True)))
    sums = dict(zip(longest, _sums(signals[: len(longest)], rows, mesh), strict=True))
    made = dict(zip(alone, signals[len(longest) :], strict=True))
    for layer in sorted(summed):
        first, size, scale = each[layer]
        part = sums[first]
        if (size, scale) != longest[first]:  # in memory of its own
            part = part[:, :size] * (scale / (longest[first][1] or 1.0))
        made[layer] = part
    return [made[layer] for layer in range(len(each))]


def _sums(signals: Sequence[Tensor], rows: Rows, mesh: Any) -> list[Tensor]:
    """The sums of signals [rows, size], by one all-reduce for each dimension of the mesh."""
    from torch.distributed.tensor import Partial, Replicate

    if not signals:
        return []
    joint = torch.cat(tuple(signals), 1) if len(signals) > 1 else signals[0]
    placements = [Partial() if split == _SUM else Replicate() for split in rows.splits]
    partial = sharding.dtensor(joint, mesh, placements, joint.shape)
    summed = partial.redistribute(placements=[Replicate()] * mesh.ndim).to_local()
    return list(summed.split([signal.shape[1] for signal in signals], 1))


def _after_sum(rows: Rows, piece: Piece) -> Piece:
    from torch.distributed.tensor import Replicate

    pairs = zip(rows.splits, piece.placements, strict=True)
    placements = tuple(Replicate() if split == _SUM else place for split, place in pairs)
    return piece._replace(placements=placements)


def _placed(part: Tensor, piece: Piece, place: Place, mesh: Any, masks: Any) -> Tensor:
    """A place's signal from the part of it that is here."""
    part = part[:, : piece.size]  # of one row where there is none
    part = from_rows(part, torch.Size(piece.shape), place.batch_dims, "DFA").to(place.dtype)
    if place.mask is not None:
        mask = masks[place.mask].to(place.device, place.dtype)
        mask = beside_rows(mask, place.shape, place.batch_dims, "DFA")
        for dim, (first, size) in enumerate(zip(piece.offsets, piece.shape, strict=True)):
            if mask.shape[dim] > 1:
                mask = mask.narrow(dim, first, size)
        part = part * mask
    signal: Any = sharding.dtensor(part.contiguous(), mesh, piece.placements, place.shape)
    wanted = _wanted(place, mesh)
    if wanted != piece.placements:
        signal = signal.redistribute(placements=wanted)
    return signal.to_local() if place.layout is None or place.layout.local else signal
