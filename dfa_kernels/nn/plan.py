"""Which layer's signal goes to which activation of a forward pass, and how it is scaled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfa_kernels.layers import Layers
from dfa_kernels.nn.rows import beside_rows, row_ratio, split_shape
from dfa_kernels.nn.shards import Layout, mesh_of
from dfa_kernels.nn.signals import Place, distinct
from dfa_kernels.nn.sources import Slicing


class Target(NamedTuple):
    """An activation that gets a signal, by the index of its `DFALayer`, and the signal's kind.

    `shape` is that of the whole, where processes share it.
    """

    dfa_layer: int
    shape: torch.Size
    batch_dims: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: Layout | None


class Plan(NamedTuple):
    """The distinct layers of a forward pass, the places that their signals go to, and sizes.

    `distinct` has the places that differ, and `positions` the index among them of each place.
    `indices` has the index of each place's `DFALayer`, `own_sizes` the size that each had last.
    `batch_dims` and `layout` are the output's. They and `masks` stay, whatever the `DFA` gets
    before the backward pass. `mesh` is the device mesh of the output or the activations that
    processes share, or None.
    """

    layers: Layers
    places: list[Place]
    distinct: list[Place]
    positions: list[int]
    indices: list[int]
    own_sizes: dict[int, int]
    error_size: int
    batch_dims: Sequence[int]
    masks: Mapping[int, Tensor]
    layout: Layout | None
    mesh: Any


def make_plan(
    targets: Sequence[Target],
    output_shape: torch.Size,
    output_dims: Sequence[int],
    output_layout: Layout | None,
    slicing: Slicing,
    count: int,
    known_size: Callable[[int], int | None],
    masks: Mapping[int, Tensor],
    scale_repeats: bool,
) -> Plan:
    """Lines the targets up with the rows of the output. Raises where they do not fit.

    `known_size` gives the size that a `DFALayer` had before this pass, of `count`: laws of
    normalization may depend on the sizes of layers that a pass skips. It is not asked for others,
    because torch.compile would compile anew whenever their sizes change.
    """
    batch, rest = split_shape(output_shape, output_dims, "DFA")
    error_size = math.prod(rest)
    if error_size == 0:
        raise ValueError(
            f"DFA: output must have at least one element a row, got {tuple(output_shape)}"
        )
    split = [split_target(target) for target in targets]
    own = {target.dfa_layer: size for target, (_, size) in zip(targets, split, strict=True)}
    all_sizes = [own[index] if index in own else known_size(index) or 1 for index in range(count)]
    scales = slicing.scales(all_sizes, error_size)
    wanted = []
    for target, (own_batch, size) in zip(targets, split, strict=True):
        index = target.dfa_layer
        repeats = row_ratio(own_batch, batch, f"DFA: dfa_layers[{index}]")
        scale = scales[index]
        if size != all_sizes[index]:  # the layer was called again, with another size
            others = [*all_sizes[:index], size, *all_sizes[index + 1 :]]
            scale = slicing.scales(others, error_size)[index]
        if scale_repeats and repeats != 1:
            scale = scale / math.sqrt(repeats)
        wanted.append((slicing.row_offsets[index], size, scale))
        if index in masks:
            where = f"DFA: mask[{index}]"
            beside_rows(masks[index], target.shape, target.batch_dims, where)
    layers, positions = Layers.distinct(*zip(*wanted, strict=True))
    places = [
        Place(position, *target[1:], target.dfa_layer if target.dfa_layer in masks else None)
        for position, target in zip(positions, targets, strict=True)
    ]
    indices = [target.dfa_layer for target in targets]
    mesh = mesh_of([output_layout, *(target.layout for target in targets)])
    ends = (layers, places, *distinct(places), indices)
    return Plan(*ends, own, error_size, output_dims, masks, output_layout, mesh)


def split_target(target: Target) -> tuple[list[int], int]:
    """The batch sizes and l_i of an activation, which must have units beside its batch.

    Without any it most likely is one sample in a model for batches. Its units would count as its
    batch, and could even line up with the output's.
    """
    where = f"DFA: dfa_layers[{target.dfa_layer}]"
    batch, rest = split_shape(target.shape, target.batch_dims, where)
    size = math.prod(rest)
    if size == 0 or not rest:
        raise ValueError(
            f"{where} must have units beside its batch_dims {target.batch_dims}, got shape "
            f"{tuple(target.shape)}; unsqueeze(-1) is for a layer of one unit, batch_dims=() for "
            "one sample alone"
        )
    return batch, size
