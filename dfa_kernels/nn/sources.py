"""Where the feedback signals come from, and how the layers share one matrix.

A `Source` projects the error: `Seeded` from a seed, `Stored` by stored matrices, or a user's own.
`Slicing` says which rows of the matrix each layer reads and by what factor it scales them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from dfa_kernels import checks, functional, ops, sharding
from dfa_kernels.backends import registry
from dfa_kernels.layers import Layers
from dfa_kernels.stream import Stream

# With a matrix of its own for every layer, layer i's rows of U begin at i times this.
INDEPENDENT_ROWS = 2**40

_WITH_SHARDS = (
    "with fully_shard attach first, and leave the output layer to the root module; with tensor "
    "parallelism leave the output sharded as its weights are; match_output_ takes any shards"
)

# scales(sizes of the layers, size of the error) -> one scale per layer
Scales = Callable[[list[int], int], Sequence[float]]


class Source(Protocol):
    """What makes the feedback signals: the argument `matrix` of a `DFA`.

    A source of your own has these two methods; it needs no base class. This one stores no matrix
    and has entries of +1 and -1, the signs of a seed's:

        class Signs:
            def __init__(self, seed):
                self.seed = seed

            def project(self, error, layers, dtype):
                signals = []
                for row_offset, size, scale in zip(*layers):
                    U = feedback_matrix(
                        size, error.shape[1], seed=self.seed, row_offset=row_offset,
                        dtype=error.dtype, device=error.device,
                    )
                    signals.append((scale * error @ U.sign().T).to(dtype))
                return signals

            def describe(self):
                return {"signs": self.seed}

        dfa = DFA(dfa_layers, matrix=Signs(seed=1))
    """

    def project(self, error: Tensor, layers: Layers, dtype: torch.dtype) -> list[Tensor]:
        """The signal of every layer in `layers`, which are distinct.

        torch.compile traces it with the model, so there it must change nothing outside itself.

        Args:
            error: [batch, n], on the device where to project.
            layers: `row_offsets`, `sizes` and `scales`, a tuple each. Layer i's signal is
                scales[i] * error @ U[row_offsets[i] : row_offsets[i] + sizes[i]].T, with U of unit
                variance. All offsets are 0 where the layers share one matrix; with independent ones
                layer i of the `DFA` has i * `INDEPENDENT_ROWS`.
            dtype: of the signals.

        Returns:
            One tensor [batch, sizes[i]] per layer, no two of which share memory.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What tells this source from another, in JSON values that training does not change.

        The state_dict holds it, and loads only into a `DFA` whose source describes itself alike.
        """
        ...


class Seeded(NamedTuple):
    """The matrix of a seed, which is made while it multiplies."""

    seed: int
    distribution: str
    backend: str | None

    def project(
        self, error: Tensor, layers: Layers, dtype: torch.dtype, first_column: int = 0
    ) -> list[Tensor]:
        """All signals by one projection, of an error from the matrix's `first_column` on."""
        checks.error("project", error)  # `DFA`'s error_transform may have made it
        checks.dtype("project", "dtype", dtype)
        for first, size in zip(layers.row_offsets, layers.sizes, strict=True):
            checks.rows("project", "row_offsets", first, size)  # a state's may be any
        stream = Stream(checks.seed("project", self.seed), first_column, self.distribution)
        backend = registry.choose_for_call("project", error.device, self.backend, self.distribution)
        return ops.project(error, layers, stream, dtype, backend)

    def describe(self) -> dict[str, Any]:
        """What a state restores."""
        return {"seed": self.seed, "distribution": self.distribution, "stored": False}


class Stored(NamedTuple):
    """Explicit matrices [rows, n], of unit variance like a seed's.

    Layers with a row offset of i * `INDEPENDENT_ROWS` multiply by the first rows of matrix i. The
    seed and the distribution make nothing; states have always held them. Matrices may change
    between signals, but none of these sends them a gradient.
    """

    matrices: tuple[Tensor, ...]
    seed: int = 0
    distribution: str = "normal"

    def to(self, device: torch.device | None) -> Stored:
        """The same with its matrices on `device`; None leaves them where they are."""
        moved = tuple(
            matrix if device in (None, matrix.device) else matrix.detach().to(device)
            for matrix in self.matrices
        )
        return Stored(moved, self.seed, self.distribution)

    def check(self, layers: Layers, error_size: int) -> None:
        """Raise where a matrix is too small for its layers or for an error of that size."""
        for row_offset, size in zip(layers.row_offsets, layers.sizes, strict=True):
            rows, columns = self.matrices[row_offset // INDEPENDENT_ROWS].shape
            if rows < size or columns != error_size:
                raise ValueError(
                    f"DFA: matrix must have at least {size} rows (the layer's size) and exactly "
                    f"{error_size} columns (the error's size), got {[rows, columns]}"
                )

    def project(
        self, error: Tensor, layers: Layers, dtype: torch.dtype, first_column: int = 0
    ) -> list[Tensor]:
        """One product for each matrix, in that matrix's dtype, sliced and scaled for its layers."""
        last_column = first_column + error.shape[1]
        of_matrix: dict[int, list[int]] = {}
        for layer, row_offset in enumerate(layers.row_offsets):
            of_matrix.setdefault(row_offset // INDEPENDENT_ROWS, []).append(layer)
        signals: dict[int, Tensor] = {}
        for index, ours in of_matrix.items():
            matrix = self.matrices[index].detach()
            width = max([layers.sizes[layer] for layer in ours])
            scale = max([abs(layers.scales[layer]) for layer in ours]) or 1.0
            nothing = matrix.new_zeros(())
            product = torch.addmm(
                nothing,
                error.to(matrix.dtype),
                matrix[:width, first_column:last_column].T,
                beta=0,
                alpha=scale,
            )
            for layer in ours:
                signal, size, own = product, layers.sizes[layer], layers.scales[layer]
                if size != width or own != scale:
                    signal = product[:, :size] * (own / scale)
                signals[layer] = signal.to(dtype)
        return [signals[layer] for layer in range(len(layers.sizes))]

    def describe(self) -> dict[str, Any]:
        """What a state holds: no matrix."""
        return {"seed": self.seed, "distribution": self.distribution, "stored": True}


class OutputWeights:
    """Signals W^T e, by the weights W [n, l] that the output layer has in that pass.

    A `Source` for residual networks whose layers have the size l of the output layer's input, as
    transformers, from the start or to fine-tune: `DFA(layers, matrix=OutputWeights(model.head))`.
    The skip connections carry most of backpropagation's gradient, and this is what they carry. No
    matrix is stored beside the weights, and all layers share one product.

    The matrix is W^T sqrt(l n), so that the default normalization, eq. 8, makes signals W^T e, as
    long as backpropagation's gradients where a layer has one row for each of the error.

    Args:
        linear: the layer whose outputs are the `DFA`'s input. It stays the model's, with weights
            that are whole in each process, or a DTensor that is sharded as the output is. Where
            another takes its place, set `dfa.matrix` again.

    Raises:
        TypeError, ValueError: it is no nn.Linear, or another layer or error has other sizes.
    """

    def __init__(self, linear: nn.Linear):
        if not isinstance(linear, nn.Linear):
            got = type(linear).__name__
            raise TypeError(f"OutputWeights: linear must be an nn.Linear, got {got}")
        self.linear = linear
        self._weight: Tensor | None = None

    def of_this_pass(self, keep: bool = False) -> OutputWeights:
        """The same with the weights of now, which torch.func.functional_call soon takes back.

        So does `fully_shard` once it has run backward: `keep` copies them.
        """
        found, weight = OutputWeights(self.linear), self.linear.weight
        found._weight = weight.detach().clone() if keep else weight
        return found

    def scales_by(self, weight: Tensor, layers: Layers) -> list[float] | None:
        """If signals are W^T e by these weights: by how much each layer's is longer than that."""
        mine = self.linear.weight if self._weight is None else self._weight
        n, size = weight.shape
        if mine is not weight or any(own != size for own in layers.sizes):
            return None
        return [scale * math.sqrt(size * n) for scale in layers.scales]

    def project(
        self, error: Tensor, layers: Layers, dtype: torch.dtype, first_column: int = 0
    ) -> list[Tensor]:
        """See `Source`. Of an error from `first_column` on, these weights' part of the signals."""
        weight: Any = self.linear.weight if self._weight is None else self._weight
        if self._weight is not None and _without_memory(weight):
            raise ValueError(
                "OutputWeights: linear.weight must be whole in each process, got one that "
                f"fully_shard has taken back; {_WITH_SHARDS}"
            )
        n, size = weight.shape
        last_column = first_column + error.shape[1]
        whole = first_column == 0 and not sharding.is_dtensor(weight)
        fits = last_column == n if whole else last_column <= n
        if not fits or any(own != size for own in layers.sizes):
            raise ValueError(
                f"OutputWeights: linear must have the layers' size as its input and the error's as "
                f"its output, got {size} and {n} beside layers of {list(layers.sizes)} and an "
                f"error of {error.shape[1]}; batch_dims says that every token is a row"
            )
        rows = _rows_of(weight, first_column, last_column)
        product = error @ rows.detach().to(error.device, error.dtype)
        unit = math.sqrt(size * n)
        return [(product * (scale * unit)).to(dtype) for scale in layers.scales]

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {"output weights": [self.linear.out_features, self.linear.in_features]}


def _rows_of(weight: Any, first: int, last: int) -> Tensor:
    """The rows [first, last) of weights [n, l], of which a DTensor may hold a part here."""
    begin, here = 0, weight
    if sharding.is_dtensor(weight):
        (rows, columns), (begin, _) = sharding.part_of(
            weight.shape, weight.device_mesh, weight.placements
        )
        if columns != weight.shape[1] or not begin <= first <= last <= begin + rows:
            raise ValueError(
                f"OutputWeights: linear.weight must be here for the error's columns {first} to "
                f"{last}, got {rows} x {columns} of {list(weight.shape)}, from row {begin} on; "
                f"{_WITH_SHARDS}"
            )
        here = weight.to_local()
    return here[first - begin : last - begin]


def _without_memory(weight: Tensor) -> bool:
    """Whether fully_shard has taken back the weights that it had gathered in a tensor."""
    if torch._C._functorch.is_functorch_wrapped_tensor(weight) or hasattr(weight, "placements"):
        return False
    return weight.untyped_storage().size() == 0 != weight.numel()


# The sources that are known to be linear in the error, and to take a part of its columns.
LINEAR = (Seeded, Stored, OutputWeights)


@dataclasses.dataclass
class Received:
    """The `Source` of one pass of a `FeedbackStage`: what was made of the error elsewhere.

    It is filled before the backward pass: `rows` are the error as it is projected [batch, n], or
    anything with as many rows beside `signals`, which are those of the layers to be asked for.
    """

    source: Source | None = None
    rows: Tensor | None = None
    signals: list[Tensor] | None = None

    def project(self, error: Tensor, layers: Layers, dtype: torch.dtype) -> list[Tensor]:
        """See `Source`."""
        if self.signals is not None:
            return self.signals
        assert self.source is not None
        return self.source.project(error, layers, dtype)

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {} if self.source is None else self.source.describe()


class Slicing(NamedTuple):
    """Which rows of the feedback matrix each layer of a `DFA` reads, and how it is scaled.

    Layer i's rows begin at row_offsets[i]. `normalization` is "layer", "shared", a number or a
    function, as for `DFA`.
    """

    row_offsets: tuple[int, ...]
    normalization: str | float | Scales

    def scales(self, sizes: list[int], error_size: int) -> list[float]:
        """The scale of each layer."""
        normalization: Any = self.normalization
        if callable(normalization):
            normalization = normalization(sizes, error_size)
        return checks.scales("DFA", normalization, sizes, error_size)


def matrix_of(
    source: Source,
    layers: Layers,
    error_size: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    """The scaled feedback matrix [size, error_size] of the one layer in `layers`."""
    (row_offset,), (size,), (scale,) = layers
    if isinstance(source, Seeded):
        matrix = functional.feedback_matrix(
            size,
            error_size,
            seed=source.seed,
            distribution=source.distribution,
            row_offset=row_offset,
            dtype=dtype,
            device=device,
            backend=source.backend,
        )
        return matrix.mul_(scale)
    if isinstance(source, Stored):
        source.check(layers, error_size)
        matrix = source.matrices[row_offset // INDEPENDENT_ROWS].detach()[:size]
        return (matrix * scale).to(device, dtype)
    checks.dtype("DFA.feedback_matrix", "dtype", dtype)
    (signal,) = source.project(torch.eye(error_size, dtype=dtype, device=device), layers, dtype)
    return signal.T


def tinydfa_scales(sizes: list[int], error_size: int) -> list[float]:
    """tinydfa's normalization: with `distribution="uniform"`, entries in (-1, 1) over sqrt(l_max).

    The library's uniform entries have unit variance, hence a further 1/sqrt(3).
    """
    return [1 / math.sqrt(3 * max(sizes))] * len(sizes)


tinydfa_scales.__module__ = "dfa_kernels.nn"  # its public name, which states hold


def check_seeded(
    seed: int | None, distribution: str | None, backend: str | None, function: str = "DFA"
) -> Seeded:
    """`DFA`'s arguments of these names as a source; None is the default."""
    seed = 0 if seed is None else seed
    checks.seed(function, seed)
    distribution = "normal" if distribution is None else distribution
    checks.distribution(function, distribution)
    known = [None, *registry.BACKENDS]
    if not isinstance(backend, str | None) or backend not in known:
        names = ", ".join(map(repr, registry.BACKENDS))
        raise ValueError(f"{function}: backend must be one of {names} or None, got {backend!r}")
    return Seeded(operator.index(seed), distribution, backend)  # numpy's ints are no JSON


def check_normalization(
    normalization: bool | str | float | Scales, function: str = "DFA"
) -> str | float | Scales:
    """`DFA`'s argument `normalization` as a name, a float or a function."""
    if checks.is_boolean(normalization):
        return "layer" if normalization else "shared"
    if isinstance(normalization, (str, Real)):
        (scale,) = checks.scales(function, normalization, [1], 1)
        return normalization if isinstance(normalization, str) else scale
    if not callable(normalization):
        raise TypeError(
            f"{function}: normalization must be a name, a number or a function, "
            f"got {type(normalization).__name__} {normalization!r}"
        )
    return normalization


def check_matrix(
    matrix: Tensor | Sequence[Tensor] | Source | None,
    shared: bool,
    seeded: Seeded,
    layers: int,
    device: torch.device | None,
) -> tuple[Source, bool]:
    """`DFA`'s argument `matrix` as a source, and whether the layers share one matrix.

    Without one the source is `seeded`. Stored matrices are moved to `device`.
    """
    if matrix is None:
        return seeded, shared
    if isinstance(matrix, Seeded):  # of another DFA
        return check_seeded(*matrix), shared
    if isinstance(matrix, Stored):  # of another DFA
        matrix = matrix.matrices[0] if len(matrix.matrices) == 1 else matrix.matrices
    elif not isinstance(matrix, Tensor) and _is_source(matrix):
        return matrix, shared
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
    # A parameter itself, not its memory, of which its module gives it another in `.to()`.
    kept = tuple(one if isinstance(one, nn.Parameter) else one.detach() for one in matrices)
    stored = Stored(kept, seeded.seed, seeded.distribution)
    return stored.to(device), isinstance(matrix, Tensor)


def _is_source(matrix: Any) -> TypeGuard[Source]:
    """Whether an object is a `Source`; raises where it is half of one."""
    methods = ("project", "describe")
    missing = [name for name in methods if not callable(getattr(matrix, name, None))]
    if len(missing) == 1:
        raise TypeError(
            f"DFA: matrix must have the methods project and describe to be a source of signals, "
            f"got {type(matrix).__name__} without {missing[0]}"
        )
    if missing:
        return False
    facts = matrix.describe()
    try:
        json.dumps(facts)
    except (TypeError, ValueError):
        fits = False
    else:
        fits = isinstance(facts, dict)
    if not fits:
        raise TypeError(f"DFA: matrix.describe() must return a dict of JSON values, got {facts!r}")
    return True
