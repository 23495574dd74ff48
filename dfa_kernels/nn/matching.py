"""The output layer's weights, set from the feedback matrix: see `DFA.match_output_`.

What sends an activation of a residual network its gradient is mostly the skip connections to the
output layer. So the right signal is nearly W^T e, with W the weights of that layer. From the start
on the signals are of that direction if W is a multiple of the transposed feedback matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dfa_kernels import checks, functional, hadamard, stream
from dfa_kernels.layers import Layers
from dfa_kernels.nn.plan import Plan
from dfa_kernels.nn.sources import INDEPENDENT_ROWS, Seeded, Source, Stored, matrix_of

# Entries of the matrix that are made at a time, but no less than a structured block of columns.
CHUNK = 2**24
WHERE = "DFA.match_output_"


class Part(NamedTuple):
    """The entries of a feedback matrix that the weights of an output layer are, transposed.

    The first is in row `row` and column `column` of the layers' matrix, the last before
    (row_stop, column_stop). `whole` is False if other weights are the rest of it.
    """

    row: int
    row_stop: int
    column: int
    column_stop: int
    whole: bool


class Match(NamedTuple):
    """A promise about the forward passes to come: that layers and error are as large as these."""

    layers: tuple[int, ...]  # by index in the `DFA`
    part: Part

    def check(self, plan: Plan) -> None:
        """Raise where a forward pass has other sizes, or masks the signals of these layers."""
        *_, columns, whole = self.part
        check_size("the error", plan.error_size, columns, whole, "outputs")
        for index in self.layers:
            self.check_layer(index, plan.own_sizes.get(index), plan.masks)

    def check_layer(self, index: int, size: int | None, masks: Mapping[int, Tensor]) -> None:
        """Raise where a layer has another size than the output layer's input, or a mask."""
        if size is not None:
            _, rows, _, _, whole = self.part
            check_size(f"dfa_layers[{index}]", size, rows, whole, "inputs")
        if index in masks:
            raise ValueError(f"{WHERE}: dfa_layers[{index}] must have no mask, got one")


def check_size(what: str, size: int, needed: int, whole: bool, ends: str) -> None:
    """Raise where a layer or the error has other sizes than the output layer's weights."""
    if size < needed or (whole and size != needed):
        raise ValueError(
            f"{WHERE}: {what} must have the size of the output layer's {ends}, {needed}, got "
            f"{size}; `layers` names those that are to match, and batch_dims says that every token "
            "is a row"
        )


def one_matrix(layers: Sequence[int], row_offsets: Sequence[int]) -> int:
    """The row offset that the layers share."""
    offsets = {row_offsets[index] for index in layers}
    if len(offsets) != 1:
        got = f"{len(offsets)} matrices" if layers else "no layers"
        raise ValueError(
            f"{WHERE}: layers must be of one feedback matrix (shared=True), or one alone by "
            f"`layers`, got {got}"
        )
    return offsets.pop()


def weight_of(linear: nn.Module) -> Tensor:
    """The weights [n, l] of an output layer. Raises where they cannot be set in place."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{WHERE}: linear must be an nn.Linear, got {type(linear).__name__}")
    weight: Any = linear._parameters.get("weight")
    if weight is None or parametrize.is_parametrized(linear, "weight"):
        raise ValueError(
            f"{WHERE}: linear.weight must be a parameter, got one that is computed from others"
        )
    if isinstance(weight, nn.UninitializedParameter) or weight.is_meta or weight.dim() != 2:
        got = "none yet" if weight.dim() == 2 or weight.is_meta else tuple(weight.shape)
        raise ValueError(f"{WHERE}: linear.weight must be entries [outputs, inputs], got {got}")
    checks.dtype(WHERE, "linear.weight", weight.dtype)
    return weight


def part_of(weight: Tensor, row_offset: int | None, column_offset: int | None) -> Part:
    """What of the feedback matrix the weights [outputs, inputs] are to be."""
    columns, rows = weight.shape
    row, column = (
        0 if offset is None else checks.integer(WHERE, name, offset, low=0, high=high)
        for name, offset, high in (
            ("row_offset", row_offset, stream.ROWS - 1),
            ("column_offset", column_offset, stream.COLUMNS),
        )
    )
    checks.rows(WHERE, "row_offset", row, rows)
    checks.columns(WHERE, "column_offset", column, columns)
    whole = row_offset is None and column_offset is None
    return Part(row, row + rows, column, column + columns, whole)


def scale_of(scale: float | None, part: Part) -> float:
    """The factor of the weights; None is 1/sqrt(l)."""
    if scale is None:
        if part.row:
            raise ValueError(f"{WHERE}: scale must be given with row_offset, got None")
        return 1 / math.sqrt(part.row_stop)
    if checks.is_boolean(scale) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"{WHERE}: scale must be a finite number or None, got {scale!r}")
    return float(scale)


def fill(weight: Tensor, source: Source, row_offset: int, part: Part, scale: float) -> None:
    """Set the weights [outputs, inputs] to `scale` times their part of the matrix, transposed.

    A seed's matrix is made a piece at a time, and of sharded weights only what is here.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if not isinstance(source, Seeded):
        whole = _stored(source, row_offset, part, dtype, weight.device)
    with torch.no_grad():
        local, below, beside = _local(weight)
        outputs, inputs = local.shape
        row, column = part.row + beside, part.column + below
        step = max(hadamard.BLOCK, CHUNK // max(inputs, 1) // hadamard.BLOCK * hadamard.BLOCK)
        for first in range(0, outputs, step):
            count = min(step, outputs - first)
            if isinstance(source, Seeded):
                matrix = functional.feedback_matrix(
                    inputs,
                    count,
                    seed=source.seed,
                    distribution=source.distribution,
                    row_offset=row_offset + row,
                    column_offset=column + first,
                    dtype=dtype,
                    device=local.device,
                    backend=source.backend,
                )
            else:
                matrix = whole[row : row + inputs, column + first : column + first + count]
            local[first : first + count] = matrix.T * scale


def _stored(
    source: Source, row_offset: int, part: Part, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The unscaled rows of a matrix that no seed makes, as far as `part` reaches."""
    columns = part.column_stop
    if isinstance(source, Stored):
        columns = source.matrices[row_offset // INDEPENDENT_ROWS].shape[1]
    if not part.whole and (columns < part.column_stop or not isinstance(source, Stored)):
        raise ValueError(
            f"{WHERE}: column_offset must leave the columns in the matrix, got {part.column} with "
            f"{part.column_stop - part.column} columns of a {type(source).__name__}"
        )
    layers = Layers((row_offset,), (part.row_stop,), (1.0,))
    return matrix_of(source, layers, part.column_stop if part.whole else columns, dtype, device)


def _local(weight: Tensor) -> tuple[Tensor, int, int]:
    """What is here of a weight: itself or a shard, and its first row and column in the whole."""
    if not hasattr(weight, "placements"):
        return weight, 0, 0
    from torch.distributed.tensor import DTensor, _utils

    assert isinstance(weight, DTensor)
    if any(place.is_partial() for place in weight.placements):
        raise ValueError(f"{WHERE}: linear.weight must be no partial sum, got {weight.placements}")
    _, offsets = _utils.compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    below, beside = offsets
    return weight.to_local(), below, beside
