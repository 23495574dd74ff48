"""Errors and signals of which each process has a part: DTensors of `torch.distributed.tensor`.

A projection is linear in the error, and a seed makes any columns of the matrix anywhere. So each
process projects what it has of an error: a part of its columns gives a summand of the signals, a
part of its batch gives that part of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


@torch.compiler.assume_constant_result
def in_use() -> bool:
    """Whether any tensor in this process can be a DTensor, or made of one."""
    return (
        "torch.distributed.tensor" in sys.modules
        and distributed.is_available()
        and distributed.is_initialized()
    )


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    kind = type(tensor)
    if kind is Tensor or kind is torch.nn.Parameter:
        return False
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def project(local: Callable[[Tensor, int], list[Tensor]], error: Any) -> list[Tensor]:
    """Signals of an error that is a DTensor, by `local(its part here, that part's first column)`.

    They are DTensors (..., l_i). Where the error is sharded by its columns, its last dimension, the
    signals are `Partial`, to be summed; by another dimension, they are sharded by it as well.
    """
    error = splittable(error, error.dim() - 1, range(error.dim() - 1))
    _, (*_, first) = part_of(error.shape, error.device_mesh, error.placements)
    placements = [_of_signals(place, error.dim() - 1) for place in error.placements]
    return [
        dtensor(part, error.device_mesh, placements, (*error.shape[:-1], part.shape[-1]))
        for part in local(error.to_local(), first)
    ]


def splittable(error: Any, columns: int | None, rows: Iterable[int], *, sums: bool = True) -> Any:
    """The error, gathered where it is not split by the dimension `columns` or one of `rows`.

    With `sums` it may also be a sum of what the processes have.
    """
    from torch.distributed.tensor import Replicate

    dims = {*rows} if columns is None else {*rows, columns}
    kept = tuple(
        place
        if place.is_replicate() or (sums and _is_sum(place)) or is_split(place, dims)
        else Replicate()
        for place in error.placements
    )
    return error if kept == tuple(error.placements) else error.redistribute(placements=kept)


def part_of(
    shape: Sequence[int], mesh: Any, placements: Sequence[Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of this process's part of a tensor, and where it begins in the whole."""
    if any(getattr(place, "split_factor", 1) != 1 for place in placements):  # fully_shard's
        from torch.distributed.tensor import _utils

        return _utils.compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    # As torch does, but in numbers that torch.compile can trace.
    sizes, offsets = [*shape], [0] * len(shape)
    for axis, (place, rank) in enumerate(zip(placements, mesh.get_coordinate(), strict=True)):
        if place.is_shard():
            chunk = -(-sizes[place.dim] // mesh.size(axis))
            first = min(chunk * rank, sizes[place.dim])
            offsets[place.dim] += first
            sizes[place.dim] = min(chunk, sizes[place.dim] - first)
    return tuple(sizes), tuple(offsets)


def dtensor(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]
) -> DTensor:
    """A DTensor of a global shape from the part of it that is here; sends nothing."""
    from torch.distributed.tensor import DTensor

    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )


def _of_signals(place: Placement, columns: int) -> Placement:
    from torch.distributed.tensor import Partial

    return Partial() if place.is_shard(columns) else place


def _is_sum(place: Any) -> bool:
    """Whether the whole is the sum of what the processes have."""
    return place.is_partial() and place.reduce_op == "sum"


def is_split(place: Any, dims: set[int]) -> bool:
    """Whether the processes have consecutive parts along one of `dims`."""
    return place.is_shard() and place.dim in dims and getattr(place, "split_factor", 1) == 1
