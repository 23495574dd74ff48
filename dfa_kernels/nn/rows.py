"""Activations and errors as matrices: one row for each element of the batch.

The batch dimensions are flattened in front, in the order given: (1, 0) takes [time, batch,
features] sample by sample. The others, flattened, make a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def order(
    shape: Sequence[int], batch_dims: Sequence[int], function: str
) -> tuple[list[int], list[int]]:
    """The batch dimensions of a shape in the order given, and the others, ascending."""
    batch = []
    for dim in batch_dims:
        if not -len(shape) <= dim < len(shape):
            raise ValueError(
                f"{function}: batch_dims {tuple(batch_dims)} must be dimensions of {tuple(shape)}"
            )
        if dim % len(shape) not in batch:
            batch.append(dim % len(shape))
    return batch, [dim for dim in range(len(shape)) if dim not in batch]


def split_shape(
    shape: Sequence[int], batch_dims: Sequence[int], function: str
) -> tuple[list[int], list[int]]:
    """The sizes of the batch dimensions in the order given, and of the others."""
    batch, rest = order(shape, batch_dims, function)
    return [shape[dim] for dim in batch], [shape[dim] for dim in rest]


def row_ratio(ours: list[int], theirs: list[int], function: str) -> int:
    """How many consecutive rows an activation has for each row of the error.

    Takes the sizes of the batch dimensions of both. The activation's must begin with the error's,
    or one of the two be flattened. Leading dimensions that both have cancel first: torch.compile
    then knows the ratio although it may not know the batch size.
    """
    if ours == theirs:
        return 1
    wanted, got = theirs, ours
    while ours and theirs and ours[0] == theirs[0]:
        ours, theirs = ours[1:], theirs[1:]
    rows, batch = math.prod(ours), math.prod(theirs)
    if rows == batch and min(len(ours), len(theirs)) <= 1:
        return 1
    if rows and batch and rows % batch == 0 and (not theirs or len(ours) == 1):
        return rows // batch
    raise ValueError(
        f"{function} must have the output's rows {wanted}, or several consecutive ones for each, "
        f"got {got}; batch_dims gives the dimensions of rows in order. Tokens without a target "
        "keep their rows: give them ignore_index"
    )


def to_rows(tensor: Tensor, batch_dims: Sequence[int], function: str) -> Tensor:
    """[rows, size] of a tensor; a view where its strides allow one."""
    if tensor.dim() == 2 and tuple(batch_dims) == (0,):
        return tensor
    batch, rest = order(tensor.shape, batch_dims, function)
    rows = math.prod([tensor.shape[dim] for dim in batch])
    size = math.prod([tensor.shape[dim] for dim in rest])
    return tensor.permute(batch + rest).reshape(rows, size)


def from_rows(rows: Tensor, shape: torch.Size, batch_dims: Sequence[int], function: str) -> Tensor:
    """The inverse of `to_rows`, to a tensor of `shape`.

    Where that has k times as many rows, each given row serves k consecutive ones.
    """
    if len(shape) == 2 and tuple(batch_dims) == (0,) and rows.shape[0] == shape[0]:
        return rows
    batch, rest = order(shape, batch_dims, function)
    count = math.prod([shape[dim] for dim in batch])
    if rows.shape[0] != count:
        rows = rows[:, None, :].expand(-1, count // rows.shape[0], -1)
    dims = batch + rest
    inverse = [dims.index(dim) for dim in range(len(shape))]
    return rows.reshape([shape[dim] for dim in dims]).permute(inverse)


def beside_rows(
    tensor: Tensor, shape: Sequence[int], batch_dims: Sequence[int], function: str
) -> Tensor:
    """A view of `tensor` that multiplies one of `shape`, the same for all its rows.

    `tensor` broadcasts to the dimensions of `shape` that are not batch dimensions.
    """
    batch, rest = order(shape, batch_dims, function)
    sizes = [1] * (len(rest) - tensor.dim()) + list(tensor.shape)
    wanted = [shape[dim] for dim in rest]
    if len(sizes) != len(rest) or any(
        size not in (1, full) for size, full in zip(sizes, wanted, strict=True)
    ):
        raise ValueError(f"{function} must broadcast to {wanted}, got {list(tensor.shape)}")
    tensor = tensor.reshape(sizes)
    for dim in sorted(batch):
        tensor = tensor.unsqueeze(dim)
    return tensor
