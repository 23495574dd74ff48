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

from dfa_kernels import checks, functional, hadamard, sharding, stream
from dfa_kernels.layers import Layers
from dfa_kernels.nn.plan import Plan
from dfa_kernels.nn.sources import INDEPENDENT_ROWS, Seeded, Source, Stored, matrix_of

# Entries of the matrix that are made at a time, but no less than a structured block of columns.
CHUNK = 2**24
LARGEST = 32  # No distribution has larger entries: rows of a structured block have this length.
WHERE = "DFA.match_output_"


class Span(NamedTuple):
    """The rows or columns [first, stop) of a feedback matrix.

    `whole` is False if other weights may have the ones from `stop` on.
    """

    first: int
    stop: int
    whole: bool

    def check(self, what: str, size: int, ends: str, way_out: str) -> None:
        """Raise where a layer, or the error, is not as large as the output layer's `ends`."""
        if size < self.stop or (self.whole and size != self.stop):
            at_least = "" if self.whole else "at least "
            raise ValueError(
                f"{WHERE}: {what} must have the size of the output layer's {ends}, "
                f"{at_least}{self.stop}, got {size}; batch_dims says that every token is a row, "
                f"{way_out}"
            )


class Part(NamedTuple):
    """The entries of the layers' matrix that the weights of an output layer are, transposed."""

    rows: Span  # the output layer's inputs
    columns: Span  # its outputs


class Match(NamedTuple):
    """What an output layer was set for: that layers and error are as large as its weights."""

    layers: tuple[int, ...]  # by index in the `DFA`
    part: Part

    def check(self, plan: Plan) -> None:
        """Raise where a forward pass has other sizes, or masks the signals of these layers."""
        way_out = "and a new output layer has to be matched again"
        self.part.columns.check("the error", plan.error_size, "outputs", way_out)
        for index in self.layers:
            self.check_layer(index, plan.own_sizes.get(index), plan.masks)

    def check_layer(self, index: int, size: int | None, masks: Mapping[int, Tensor]) -> None:
        """Raise where a layer has another size than the output layer's input, or a mask."""
        if size is not None:
            way_out = "and `layers` names those that are to match"
            self.part.rows.check(f"dfa_layers[{index}]", size, "inputs", way_out)
        if index in masks:
            raise ValueError(f"{WHERE}: dfa_layers[{index}] must have no mask, got one")


def same_matrix(one: Source, other: Source) -> bool:
    """Whether two sources are known to have the same feedback matrix."""
    if isinstance(one, Seeded) and isinstance(other, Seeded):
        return one.describe() == other.describe()
    if isinstance(one, Stored) and isinstance(other, Stored):
        return len(one.matrices) == len(other.matrices) and all(
            (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            and torch.equal(mine, theirs.to(mine.device))
            for mine, theirs in zip(one.matrices, other.matrices, strict=True)
        )
    return one is other


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
    weight = linear._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"{WHERE}: linear.weight must be a parameter, got one that is computed from others"
        )
    if isinstance(weight, nn.UninitializedParameter) or weight.is_meta:
        raise ValueError(
            f"{WHERE}: linear.weight must have entries, got none yet; call it once they are made"
        )
    checks.error(WHERE, weight, "linear.weight")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"{WHERE}: linear.weight must be entries [outputs, inputs], got {list(weight.shape)}; "
            "of sharded weights, give a DTensor, as fully_shard makes"
        )
    return weight


def part_of(weight: Tensor, row_offset: int | None, column_offset: int | None) -> Part:
    """What of the feedback matrix the weights [outputs, inputs] are to be."""
    outputs, inputs = weight.shape
    row, column = (
        0 if offset is None else checks.integer(WHERE, name, offset, low=0, high=high)
        for name, offset, high in (
            ("row_offset", row_offset, stream.ROWS - 1),
            ("column_offset", column_offset, stream.COLUMNS),
        )
    )
    checks.rows(WHERE, "row_offset", row, inputs)
    checks.columns(WHERE, "column_offset", column, outputs)
    return Part(
        Span(row, row + inputs, row_offset is None),
        Span(column, column + outputs, column_offset is None),
    )


def scale_of(scale: float | None, part: Part, dtype: torch.dtype) -> float:
    """The factor of the weights; None is 1/sqrt(l)."""
    if scale is None:
        if not part.rows.whole:
            raise ValueError(
                f"{WHERE}: scale must be given with row_offset, which leaves the whole layer's "
                "number of inputs open, got None"
            )
        return 1 / math.sqrt(part.rows.stop)
    if checks.is_boolean(scale) or not isinstance(scale, Real):
        raise TypeError(
            f"{WHERE}: scale must be a number or None, got {type(scale).__name__} {scale!r}"
        )
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    low, high = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max / LARGEST
    if not low <= value <= high:
        raise ValueError(
            f"{WHERE}: scale must be above 0, as signals of the other sign would raise the loss, "
            f"and between {low:.3g} and {high:.3g} for weights of {dtype}, got {scale!r}"
        )
    return value


def fill(weight: Tensor, source: Source, row_offset: int, part: Part, scale: float) -> None:
    """Set the weights [outputs, inputs] to `scale` times their part of the matrix, transposed.

    A seed's matrix is made a piece at a time, and of sharded weights only what is here.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        local, below, beside = _local(weight)
        outputs, inputs = local.shape
        row, column = part.rows.first + beside, part.columns.first + below
        if not isinstance(source, Seeded):
            matrix = _unscaled(source, row_offset, part, dtype, local.device)
            matrix = matrix[row : row + inputs, column : column + outputs]
            local.copy_(matrix.T * scale)
            return
        step = max(hadamard.BLOCK, CHUNK // max(inputs, 1) // hadamard.BLOCK * hadamard.BLOCK)
        for first in range(0, outputs, step):
            matrix = functional.feedback_matrix(
                inputs,
                min(step, outputs - first),
                seed=source.seed,
                distribution=source.distribution,
                row_offset=row_offset + row,
                column_offset=column + first,
                dtype=dtype,
                device=local.device,
                backend=source.backend,
            )
            local[first : first + step] = matrix.T * scale


def _unscaled(
    source: Source, row_offset: int, part: Part, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The rows of a matrix that no seed makes, as far as `part` reaches, and all columns."""
    columns = part.columns.stop
    if not part.columns.whole:
        if not isinstance(source, Stored):
            raise ValueError(
                f"{WHERE}: column_offset must be None for a {type(source).__name__}, which does "
                f"not say how many columns it has, got {part.columns.first}"
            )
        columns = source.matrices[row_offset // INDEPENDENT_ROWS].shape[1]
        if columns < part.columns.stop:
            raise ValueError(
                f"{WHERE}: column_offset must leave the outputs in the {columns} columns of the "
                f"stored matrix, got {part.columns.first} with "
                f"{part.columns.stop - part.columns.first} outputs"
            )
    layers = Layers((row_offset,), (part.rows.stop,), (1.0,))
    return matrix_of(source, layers, columns, dtype, device)


def _local(weight: Tensor) -> tuple[Tensor, int, int]:
    """What is here of a weight: itself or a shard, and its first row and column in the whole."""
    if not hasattr(weight, "placements"):
        return weight, 0, 0
    from torch.distributed.tensor import DTensor

    assert isinstance(weight, DTensor)
    if any(place.is_partial() for place in weight.placements):
        raise ValueError(f"{WHERE}: linear.weight must be no partial sum, got {weight.placements}")
    refuse_uneven_twice(weight.shape, weight.device_mesh.shape, weight.placements)
    _, (below, beside) = sharding.part_of(weight.shape, weight.device_mesh, weight.placements)
    return weight.to_local(), below, beside


def refuse_uneven_twice(
    shape: Sequence[int], mesh: Sequence[int], placements: Sequence[Any]
) -> None:
    """Raise where fully_shard has split a dimension unevenly that tensor parallelism split before.

    Of such shards torch does not know where they begin.
    """
    for axis, place in enumerate(placements):
        strided: int = getattr(place, "split_factor", 1)
        if strided == 1:
            continue
        dim, rest = place.dim, range(axis + 1, len(mesh))
        inner = math.prod(mesh[i] for i in rest if getattr(placements[i], "dim", None) == dim)
        if inner != strided or shape[dim] % (mesh[axis] * inner):
            raise ValueError(
                f"{WHERE}: linear.weight must be sharded evenly where two kinds of parallelism "
                f"shard one dimension, got {list(shape)} on a mesh {list(mesh)} with {placements}; "
                "call it before fully_shard"
            )
