"""From an error to the gradients of hidden activations.

Where each signal comes from, a seed or a stored matrix, and where it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from dfa_kernels import checks, functional
from dfa_kernels.nn.rows import beside_rows, from_rows

# scales(sizes of the layers, size of the error) -> one scale per layer
Scales = Callable[[list[int], int], Sequence[float]]


class Block(NamedTuple):
    """`size` rows of a feedback matrix from row `first` on, times `scale`.

    `matrix` says which matrix, where several are stored.
    """

    matrix: int
    first: int
    size: int
    scale: float


class Place(NamedTuple):
    """The block that makes an activation's signal, and the activation it goes to.

    `mask` is the layer's index, if it has a mask. Equal places get the same tensor.
    """

    block: Block
    shape: torch.Size
    batch_dims: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    mask: int | None


class Seeded(NamedTuple):
    """The matrix that `functional.project` makes from a seed and never stores."""

    seed: int
    distribution: str
    backend: str | None

    def project(self, error: Tensor, blocks: Sequence[Block], dtype: torch.dtype) -> list[Tensor]:
        """The signal of every block, [M, size] of `dtype`, by one projection of `error` [M, n]."""
        return functional.project(
            error,
            [block.size for block in blocks],
            seed=self.seed,
            distribution=self.distribution,
            normalization=[block.scale for block in blocks],
            row_offsets=[block.first for block in blocks],
            dtype=dtype,
            backend=self.backend,
        )


class Stored(NamedTuple):
    """Explicit matrices [rows, n], of unit variance like those of a seed."""

    matrices: tuple[Tensor, ...]

    def check(self, block: Block, error_size: int) -> None:
        """Raise where there is no such block for an error of that size."""
        rows, columns = self.matrices[block.matrix].shape
        if rows < block.size or columns != error_size:
            raise ValueError(
                f"DFA: matrix must have at least {block.size} rows (the layer's size) and exactly "
                f"{error_size} columns (the error's size), got {[rows, columns]}"
            )

    def project(self, error: Tensor, blocks: Sequence[Block], dtype: torch.dtype) -> list[Tensor]:
        """As `Seeded.project`, by one product for each stored matrix, in that matrix's dtype."""
        signals: dict[Block, Tensor] = {}
        for index, matrix in enumerate(self.matrices):
            ours = list(dict.fromkeys(block for block in blocks if block.matrix == index))
            if not ours:
                continue
            width = max(block.size for block in ours)
            scale = max(abs(block.scale) for block in ours) or 1.0
            rows = error.to(matrix.dtype)
            nothing = matrix.new_zeros(())
            product = torch.addmm(nothing, rows, matrix[:width].T, beta=0, alpha=scale)
            for block in ours:
                if block.size == width and block.scale == scale:
                    signals[block] = product.to(dtype)
                else:
                    signals[block] = (product[:, : block.size] * (block.scale / scale)).to(dtype)
        return [signals[block] for block in blocks]


def deliver(
    source: Seeded | Stored,
    error: Tensor,
    places: Sequence[Place],
    masks: Mapping[int, Tensor],
) -> list[Tensor]:
    """The signal for every place, from an error [M, n], each of its activation's shape and dtype.

    Autograd may keep a signal as some parameter's gradient, so that different tensors never share
    memory.
    """
    dtypes = {place.dtype for place in places}
    dtype = dtypes.pop() if len(dtypes) == 1 else error.dtype
    made = source.project(error, [place.block for place in places], dtype)
    signals: list[Tensor] = []
    for index, (rows, place) in enumerate(zip(made, places, strict=True)):
        first = places.index(place)
        if first < index:
            signals.append(signals[first])
            continue
        if place.mask is None and any(other.block == place.block for other in places[:index]):
            rows = rows.clone()
        signal = from_rows(rows, place.shape, place.batch_dims, "DFA")
        signal = signal.to(place.device, place.dtype)
        if place.mask is not None:
            signal = signal * mask_for(place, masks)
        signals.append(signal)
    return signals


def deliver_views(
    source: Seeded | Stored, error: Tensor, places: Sequence[Place], block: Block
) -> list[Tensor]:
    """For every place a view of one [M, block.size] signal; scales and masks are left to `Scaled`.

    The signal has the activations' dtype where they agree, else autograd casts.
    """
    dtypes = {place.dtype for place in places}
    dtype = dtypes.pop() if len(dtypes) == 1 else error.dtype
    (buffer,) = source.project(error, [block], dtype)
    buffers = {place.device: buffer.to(place.device) for place in places}
    return [
        from_rows(
            buffers[place.device][:, : place.block.size], place.shape, place.batch_dims, "DFA"
        )
        for place in places
    ]


def mask_for(place: Place, masks: Mapping[int, Tensor]) -> Tensor:
    """The place's mask as a factor of its signal."""
    assert place.mask is not None
    mask = masks[place.mask].to(place.device, place.dtype)
    return beside_rows(mask, place.shape, place.batch_dims, "DFA")


def check_normalization(normalization: bool | str | float | Scales) -> str | float | Scales:
    """`DFA`'s argument `normalization` as a name, a float or a function."""
    if isinstance(normalization, bool):
        return "layer" if normalization else "shared"
    if isinstance(normalization, (str, Real)):
        (scale,) = checks.scales("DFA", normalization, [1], 1)
        return normalization if isinstance(normalization, str) else scale
    if not callable(normalization):
        raise TypeError(
            "DFA: normalization must be a name, a number or a function, "
            f"got {type(normalization).__name__} {normalization!r}"
        )
    return normalization


def check_matrices(
    matrix: Tensor | Sequence[Tensor] | None, layers: int, device: torch.device | None
) -> tuple[Tensor, ...]:
    """`DFA`'s argument `matrix` as a tuple, on the device where the projection runs."""
    if matrix is None:
        return ()
    matrices = [matrix] if isinstance(matrix, Tensor) else checks.listed(matrix)
    if matrices is None or (not isinstance(matrix, Tensor) and len(matrices) != layers):
        got = type(matrix).__name__ if matrices is None else len(matrices)
        raise ValueError(f"DFA: matrix must be one tensor or one per layer ({layers}), got {got}")
    for one in matrices:
        if not isinstance(one, Tensor):
            raise TypeError(f"DFA: matrix must be made of tensors, got {type(one).__name__}")
        checks.dtype("DFA", "matrix", one.dtype)
        if one.dim() != 2:
            raise ValueError(f"DFA: matrix must be [rows, n], got {list(one.shape)}")
    return tuple(one.detach().to(device) for one in matrices)


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
