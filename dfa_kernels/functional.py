"""The functions `project` and `feedback_matrix`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, overrides

from dfa_kernels import checks, ops, sharding, stream
from dfa_kernels.backends import registry
from dfa_kernels.layers import Layers, tracing
from dfa_kernels.stream import Stream


def project(
    error: Tensor,
    sizes: Sequence[int],
    *,
    seed: int = 0,
    distribution: str = "normal",
    normalization: str | float | Sequence[float] = "layer",
    row_offsets: Sequence[int] | None = None,
    column_offset: int = 0,
    error_size: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """The feedback signal B_i e of every layer, from a seed, without a stored matrix.

    Layer i's signal is `scale_i * error @ U[o_i : o_i + l_i, c : c + n].T`, with U the
    unit-variance matrix of `seed`, l_i = sizes[i], o_i = row_offsets[i], c = column_offset (Launay,
    Poli, Krzakala 2019, eqs. 7 and 8). By default that is, in plain PyTorch:

        U = feedback_matrix(max(sizes), n, seed=seed)
        [error @ U[:l].T / math.sqrt(l * n) for l in sizes]

    Args:
        error: (..., n), the gradient of the loss with respect to the output. fp16, bf16, fp32 or
            fp64, any strides; leading dimensions are batch dimensions. Differentiable. It may be a
            DTensor: of an error that is sharded over its last dimension, as that of an output layer
            over the vocabulary, each process projects its columns, and nothing is sent.
        sizes: the layers' sizes l_i, at least one, each at least 1.
        seed: selects the matrix, 0 <= seed < 2**64.
        distribution: of U's entries: "normal", "uniform" or "rademacher", independent, of mean 0
            and variance 1; or "hadamard", structured: entries look normal but depend on one
            another, a number of a signal costs 10 additions and one for each further 1024
            columns, and signals are the same bits on every backend (see `dfa_kernels.hadamard`).
        normalization: "layer" for 1/sqrt(l_i n) (eq. 8), "shared" for 1/sqrt(max(sizes) n) (eq. 7
            alone), a finite number for all layers (1.0: U itself, the paper's "no norm"), or one
            for each: 0 or what fp32 holds as a normal number, unless the error is fp64.
        row_offsets: each layer's first row of U, which has 2**63 rows. None: 0 for all, so layers
            share slices of one matrix, as in the paper. Disjoint ranges give every layer its own.
            Layer i of a `DFA` with shared=False has i * `dfa_kernels.nn.INDEPENDENT_ROWS`, 2**40.
        column_offset: the column of U for error[..., 0]. U has 2**34 columns.
        error_size: n of the whole error, for `normalization`, if `error` is a shard of it that
            begins at column_offset. The shards' signals add up to the whole error's. None:
            error.shape[-1], not a shard.
        dtype: of the signals. None: the error's (under autocast, the autocast dtype).
        backend: a name from `backends()`, or None for the best one available. On a kind of GPU
            where it is not proven, that one is checked at its first use, once per machine, which
            may take minutes.

    Returns:
        One tensor (..., l_i) per size. Layers with equal size, offset and scale share one tensor
        object. Of a DTensor they are DTensors: `Partial` where the error is sharded over its last
        dimension, for one all-reduce or reduce-scatter by `redistribute`; else placed like it.

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it and what it got.
        RuntimeError: the `backend` asked for cannot serve the error's device.
    """
    if not isinstance(error, Tensor) and overrides.has_torch_function_unary(error):
        # A tensor-like, such as the proxy by which torch.fx traces: one node of its graph.
        options = {"seed": seed, "distribution": distribution, "normalization": normalization}
        options |= {"row_offsets": row_offsets, "column_offset": column_offset}
        options |= {"error_size": error_size, "dtype": dtype, "backend": backend}
        return overrides.handle_torch_function(project, (error,), error, sizes, **options)
    checks.error("project", error)
    if error.dim() == 0:
        raise ValueError("project: error must have at least one dimension, got a scalar tensor")
    columns = error.shape[-1]
    if columns == 0 and error_size is None:
        raise ValueError(
            f"project: error must have a last dimension of at least 1, got {tuple(error.shape)}"
        )
    if dtype is not None:
        checks.dtype("project", "dtype", dtype)
    layers, places, matrix = (_checked if tracing() else _remembered)(
        columns,
        error.dtype,
        sizes,
        seed,
        distribution,
        normalization,
        row_offsets,
        column_offset,
        error_size,
    )
    backend = registry.choose_for_call("project", error.device, backend, distribution)
    if sharding.is_dtensor(error):

        def signals_of(part: Tensor, first: int) -> list[Tensor]:
            return _signals(part, layers, matrix.after(first), dtype, backend)

        signals = sharding.project(signals_of, error)
    else:
        signals = _signals(error, layers, matrix, dtype, backend)
    return [signals[place] for place in places]


def _checked(
    columns: int,
    error_dtype: torch.dtype,
    sizes: Sequence[int],
    seed: int,
    distribution: str,
    normalization: str | float | Sequence[float],
    row_offsets: Sequence[int] | None,
    column_offset: int,
    error_size: int | None,
) -> tuple[Layers, list[int], Stream]:
    """What `project` was asked for: the distinct layers, each given one's place, and the matrix.

    Raises where an argument is invalid. It depends on nothing but the arguments, and on whether a
    graph is being traced.
    """
    sizes = checks.integers("project", "sizes", sizes, low=1, high=stream.ROWS - 1)
    if not sizes:
        raise ValueError("project: sizes must hold at least one layer size, got none")
    if row_offsets is None:
        row_offsets = [0] * len(sizes)
    else:
        row_offsets = checks.integers(
            "project", "row_offsets", row_offsets, low=0, high=stream.ROWS - 1
        )
        if len(row_offsets) != len(sizes):
            raise ValueError(
                f"project: row_offsets must have one entry per size ({len(sizes)}), "
                f"got {len(row_offsets)}"
            )
        for first, size in zip(row_offsets, sizes, strict=True):
            checks.rows("project", "row_offsets", first, size)
    column_offset = checks.integer(
        "project", "column_offset", column_offset, low=0, high=stream.COLUMNS
    )
    checks.columns("project", "column_offset", column_offset, columns)
    if error_size is None:
        error_size = columns
    else:
        error_size = checks.integer("project", "error_size", error_size, low=1, high=stream.COLUMNS)
        if error_size < column_offset + columns:
            raise ValueError(
                f"project: error_size must be at least column_offset + error.shape[-1] = "
                f"{column_offset + columns}, got {error_size}"
            )
    scales = checks.scales("project", normalization, sizes, error_size)
    seed = checks.seed("project", seed)
    checks.distribution("project", distribution)
    if not isinstance(normalization, str):  # those of a law always fit
        checks.scale_range("project", "normalization", scales, error_dtype, distribution)
    # Equal layers share one output.
    layers, places = Layers.distinct(row_offsets, sizes, scales)
    return layers, places, Stream(seed, column_offset, distribution)


_kept = functools.lru_cache(maxsize=256, typed=True)(_checked)
_INTS, _NUMBERS = frozenset({int}), frozenset({int, float})
_HASHED = frozenset({int, float, str, type(None), torch.dtype, tuple})


def _remembered(
    columns: int,
    error_dtype: torch.dtype,
    sizes: Any,
    seed: int,
    distribution: str,
    normalization: Any,
    row_offsets: Any,
    column_offset: int,
    error_size: int | None,
) -> tuple[Layers, list[int], Stream]:
    """As `_checked`, once for equal arguments.

    True == 1 == 1.0, and numpy's numbers too, but not all are valid: what is kept is kept by the
    arguments' types, and in sequences only plain numbers are. Scales of 0.0 and -0.0 are equal:
    their signals are zeros, of the sign that was asked for first. Not for use while a graph is
    traced, whose symbols have no hash.
    """
    if row_offsets is not None:
        row_offsets = _frozen(row_offsets, _INTS)
    if type(normalization) is not str:
        normalization = _frozen(normalization, _NUMBERS)
    asked: tuple[Any, ...] = (columns, error_dtype, _frozen(sizes, _INTS), seed, distribution)
    asked += (normalization, row_offsets, column_offset, error_size)
    return (_kept if _HASHED.issuperset(map(type, asked)) else _checked)(*asked)


def _frozen(values: Any, kinds: frozenset[type]) -> Any:
    """A list or tuple as a tuple if it is made of numbers of these types, else as a list."""
    if type(values) not in (list, tuple):
        return values
    return tuple(values) if kinds.issuperset(map(type, values)) else list(values)


def _signals(
    error: Tensor, layers: Layers, matrix: Stream, dtype: torch.dtype | None, backend: str
) -> list[Tensor]:
    """Of an error (..., n); in a traced graph of any number of rows."""
    if error.dim() == 2:
        return ops.project(error, layers, matrix, dtype, backend)
    rows = error.flatten(0, -2) if error.dim() > 2 else error[None]
    signals = ops.project(rows, layers, matrix, dtype, backend)
    return [signal.view(*error.shape[:-1], signal.shape[1]) for signal in signals]


def feedback_matrix(
    rows: int,
    columns: int,
    *,
    seed: int = 0,
    distribution: str = "normal",
    row_offset: int = 0,
    column_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """A piece of U, unit variance, unscaled: [rows, columns].

    U[row_offset : row_offset + rows, column_offset : column_offset + columns].

    For inspection, or to store the matrix; `project` never makes it. An entry has the same bits on
    every backend and device, and in every piece. Normal and rademacher entries are exact in every
    dtype. A hadamard one is exact in fp32, and rounded to 16 bits; a uniform one is
    sqrt(3) * (2k - 255)/256, multiplied in fp32 (fp64 for fp64), then rounded to `dtype`.

    Args:
        rows, columns: shape of the piece, each at least 0.
        seed, distribution, row_offset, column_offset, backend: as for `project`.
        dtype: float16, bfloat16, float32 or float64.
        device: None for torch's default device.

    Raises:
        TypeError, ValueError, RuntimeError: as for `project`.
    """
    rows = checks.integer("feedback_matrix", "rows", rows, low=0, high=stream.ROWS - 1)
    columns = checks.integer("feedback_matrix", "columns", columns, low=0, high=stream.COLUMNS)
    seed = checks.seed("feedback_matrix", seed)
    checks.distribution("feedback_matrix", distribution)
    row_offset = checks.integer(
        "feedback_matrix", "row_offset", row_offset, low=0, high=stream.ROWS - 1
    )
    checks.rows("feedback_matrix", "row_offset", row_offset, rows)
    column_offset = checks.integer(
        "feedback_matrix", "column_offset", column_offset, low=0, high=stream.COLUMNS
    )
    checks.columns("feedback_matrix", "column_offset", column_offset, columns)
    checks.dtype("feedback_matrix", "dtype", dtype)
    # Not torch.get_default_device(), which torch.compile cannot trace.
    device = torch.empty(()).device if device is None else torch.device(device)
    backend = registry.choose_for_call("feedback_matrix", device, backend, distribution)
    matrix = Stream(seed, column_offset, distribution)
    return ops.feedback_matrix(rows, columns, row_offset, matrix, dtype, device, backend)
