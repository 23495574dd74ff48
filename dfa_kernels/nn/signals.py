"""From an error to the gradients of hidden activations: one projection, a signal for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfa_kernels import checks
from dfa_kernels.layers import Layers
from dfa_kernels.nn.rows import beside_rows, from_rows
from dfa_kernels.nn.shards import Layout
from dfa_kernels.nn.sources import LINEAR, Source


class Place(NamedTuple):
    """The activation that a signal goes to, and the layer that makes it.

    `layer` is an index in the `Layers` of the forward pass, which are distinct. `mask` is the index
    of the `DFALayer`, if it has a mask. Equal places get the same tensor.
    """

    layer: int
    shape: torch.Size
    batch_dims: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: Layout | None
    mask: int | None


def distinct(places: Sequence[Place]) -> tuple[list[Place], list[int]]:
    """The distinct places, and for each given place its index among them."""
    found: list[Place] = []
    positions: list[int] = []
    of_layer: dict[int, list[int]] = {}
    for place in places:
        alike = of_layer.setdefault(place.layer, [])
        equal = [position for position in alike if found[position] == place]
        if not equal:
            equal = [len(found)]
            alike.append(len(found))
            found.append(place)
        positions.append(equal[0])
    return found, positions


def deliver(
    source: Source,
    error: Tensor,
    layers: Layers,
    places: Sequence[Place],
    masks: Mapping[int, Tensor],
    *,
    share: bool = True,
) -> list[Tensor]:
    """The signal for every place, each of its activation's shape and dtype.

    error is [batch, n]. Different tensors never share memory, because autograd may keep a signal as
    some parameter's gradient. With `share`, rows of one may share memory.
    """
    made = project(source, error, layers, dtype_of(places, error.dtype))
    handed_out: set[int] = set()  # the layers whose signal a place has, by itself
    signals: list[Tensor] = []
    for place in places:
        rows = made[place.layer]
        if place.mask is None:
            if place.layer in handed_out:
                rows = rows.clone()
            handed_out.add(place.layer)
        signal = from_rows(rows, place.shape, place.batch_dims, "DFA")
        signal = signal.to(place.device, place.dtype)
        if not share:
            signal = signal.contiguous()  # k rows of one signal share memory
        if place.mask is not None:
            signal = signal * mask_for(place, masks)
        signals.append(signal)
    return signals


def deliver_views(
    source: Source,
    error: Tensor,
    layers: Layers,
    places: Sequence[Place],
    longest: Layers,
    own: Mapping[int, Callable[[Tensor], Tensor]],
) -> list[Tensor]:
    """For every place a view of the one signal of `longest`; `Scaled` makes it that of the place.

    The signal has the activations' dtype where they agree, else autograd casts. The places in `own`
    have no `Scaled`: the functions there make their signals at once.
    """
    (buffer,) = project(source, error, longest, dtype_of(places, error.dtype))
    buffers = {place.device: buffer.to(place.device) for place in places}
    views = [
        from_rows(
            # No slice: a full one is an alias, for which the vmap of torch.autograd has no rule.
            buffers[place.device].narrow(1, 0, layers.sizes[place.layer]),
            place.shape,
            place.batch_dims,
            "DFA",
        )
        for place in places
    ]
    return [own[index](view) if index in own else view for index, view in enumerate(views)]


def dtype_of(places: Sequence[Place], of_error: torch.dtype) -> torch.dtype:
    """In which dtype to project: the places' where they agree, else the error's."""
    dtypes = {place.dtype for place in places}
    return dtypes.pop() if len(dtypes) == 1 else of_error


def project(
    source: Source, error: Tensor, layers: Layers, dtype: torch.dtype, first_column: int = 0
) -> list[Tensor]:
    """The source's signals. An error from another column than 0 on is a part of the whole one."""
    if isinstance(source, LINEAR):
        return source.project(error, layers, dtype, first_column)
    watched = not torch.compiler.is_compiling()  # tracing finds no versions
    version = error._version if watched else 0
    signals = source.project(error, layers, dtype)
    if watched and error._version != version:
        raise ValueError("DFA: matrix.project must not change the error in place")
    wanted = [(error.shape[0], size) for size in layers.sizes]
    got = [tuple(signal.shape) for signal in signals]
    if got != wanted:
        raise ValueError(f"DFA: matrix.project must make signals of the shapes {wanted}, got {got}")
    return signals


def mask_for(place: Place, masks: Mapping[int, Tensor]) -> Tensor:
    """The place's mask as a factor of its signal."""
    assert place.mask is not None
    mask = masks[place.mask].to(place.device, place.dtype)
    return beside_rows(mask, place.shape, place.batch_dims, "DFA")


def check_masks(
    mask: Mapping[str | int, Tensor] | Sequence[Tensor | None] | None, names: Sequence[str | None]
) -> dict[int, Tensor]:
    """`DFA`'s argument `mask` by layer index."""
    if mask is None:
        return {}
    if not isinstance(mask, Mapping):
        given = checks.listed(mask)
        if given is None or len(given) != len(names):
            length = "" if given is None else f" of length {len(given)}"
            raise ValueError(
                f"DFA: mask must be a mapping or have one entry per layer ({len(names)}), "
                f"got {type(mask).__name__}{length}"
            )
        mask = {index: one for index, one in enumerate(given) if one is not None}
    masks = {}
    for key, one in mask.items():
        if key not in (names if isinstance(key, str) else range(len(names))):
            raise ValueError(f"DFA: mask must be for layers' names or indices, got {key!r}")
        if not isinstance(one, Tensor):
            raise TypeError(f"DFA: mask[{key!r}] must be a tensor, got {type(one).__name__}")
        masks[names.index(key) if isinstance(key, str) else key] = one.detach()
    return masks
