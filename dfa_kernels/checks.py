"""Checks of public arguments. Errors name the function, the argument and what it got."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence, Set
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dfa_kernels import hadamard, stream
from dfa_kernels.layers import symbolic, tracing

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def integer(function: str, argument: str, value: int, *, low: int, high: int) -> int:
    """`value` as an int in [low, high]. Takes numpy's integers, but no booleans."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(
                f"{function}: {argument} must be an int, got {type(value).__name__} {value!r}"
            )
        value = operator.index(value)
    if not low <= value <= high:
        raise ValueError(f"{function}: {argument} must be in [{low}, {high}], got {value}")
    return value


def number(
    function: str, argument: str, value: float, *, low: float, high: float = math.inf
) -> float:
    """`value` as a finite float in [low, high]. Takes numpy's numbers, but no booleans."""
    if is_boolean(value) or not isinstance(value, (int, float, Real)):
        raise TypeError(
            f"{function}: {argument} must be a number, got {type(value).__name__} {value!r}"
        )
    if not (low <= value <= high and value < math.inf):
        raise ValueError(
            f"{function}: {argument} must be finite and in [{low}, {high}], got {value}"
        )
    return float(value)


def boolean(function: str, argument: str, value: bool) -> bool:
    """`value`, True or False, as a bool. Takes numpy's, but nothing else that counts as true."""
    if is_boolean(value):
        return bool(value)
    raise TypeError(
        f"{function}: {argument} must be True or False, got {type(value).__name__} {value!r}"
    )


def is_boolean(value: Any) -> bool:
    """Whether this is a bool, Python's or numpy's."""
    kind = type(value)
    return kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))


def function(caller: str, argument: str, value: Any) -> None:
    """Check that this is a function or None."""
    if value is not None and not callable(value):
        raise TypeError(f"{caller}: {argument} must be a function, got {value!r}")


def integers(
    function: str, argument: str, values: Sequence[int], *, low: int, high: int
) -> list[int]:
    """A sequence of ints, each in [low, high], as a list."""
    found = listed(values)
    if found is None:
        raise TypeError(
            f"{function}: {argument} must be a sequence of ints, "
            f"got {type(values).__name__} {values!r}"
        )
    for i, value in enumerate(found):
        if type(value) is not int or not low <= value <= high:  # thousands of layers are common
            found[i] = integer(function, f"{argument}[{i}]", value, low=low, high=high)
    return found


def rows(function: str, argument: str, first: int, count: int) -> None:
    """Check that the rows [first, first + count) are rows of U."""
    if first + count > stream.ROWS:
        raise ValueError(
            f"{function}: {argument} must leave the rows below 2**63, got {first} with {count} rows"
        )


def columns(function: str, argument: str, first: int, count: int) -> None:
    """Check that the columns [first, first + count) are columns of U."""
    if first + count > stream.COLUMNS:
        raise ValueError(
            f"{function}: {argument} must leave the columns below 2**34, "
            f"got {first} with {count} columns"
        )


def seed(function: str, value: int) -> int:
    """A seed in [0, 2**64) as its two's complement, which fits an operator's int64."""
    value = integer(function, "seed", value, low=0, high=2**64 - 1)
    return value - 2**64 if value >= 2**63 else value


def distribution(function: str, value: str) -> None:
    """Check that this is the name of a distribution of the stream."""
    if not isinstance(value, str) or value not in stream.DISTRIBUTIONS:
        names = ", ".join(map(repr, stream.DISTRIBUTIONS))
        raise ValueError(f"{function}: distribution must be one of {names}, got {value!r}")


def dtype(function: str, argument: str, value: torch.dtype) -> None:
    """Check that this is a floating-point dtype the library computes in."""
    if value not in DTYPES:
        raise TypeError(
            f"{function}: {argument} must be float16, bfloat16, float32 or float64, got {value!r}"
        )


def error(function: str, value: Tensor, argument: str = "error") -> None:
    """Check that this is a strided tensor of a dtype the library computes in."""
    if not isinstance(value, Tensor):
        way_out = ""
        if type(value).__module__ == "numpy":
            way_out = "; torch.from_numpy makes one, and .numpy() an array of each signal"
        raise TypeError(
            f"{function}: {argument} must be a tensor, got {type(value).__name__}{way_out}"
        )
    dtype(function, argument, value.dtype)
    # A Function's backward cannot ask for the layout while it is compiled.
    compiling = torch.compiler.is_compiling()
    if not compiling and (value.is_nested or value.layout != torch.strided):
        kind = "a nested one" if value.is_nested else value.layout
        raise TypeError(f"{function}: {argument} must be a strided tensor, got {kind}")


def scales(
    function: str,
    normalization: str | float | Sequence[float],
    sizes: Sequence[int],
    error_size: int,
) -> list[float]:
    """Each layer's factor of U @ e: 1/sqrt(l_i n), 1/sqrt(l_max n), or the given one."""
    if isinstance(normalization, str):
        if normalization == "layer":
            root = _root(sizes, error_size)
            return [1 / root(size * error_size) for size in sizes]
        if normalization == "shared":
            root = _root(sizes, error_size)
            return [1 / root(max(sizes) * error_size)] * len(sizes)
        raise ValueError(
            f"{function}: normalization must be 'layer', 'shared', a number or a sequence of "
            f"numbers, got {normalization!r}"
        )
    if isinstance(normalization, (int, float, Real)):
        return [_finite(function, normalization)] * len(sizes)
    given = listed(normalization)
    if given is None:
        raise _not_a_number(function, normalization)
    if len(given) != len(sizes):
        raise ValueError(
            f"{function}: normalization must have one scale per size ({len(sizes)}), "
            f"got {len(given)}"
        )
    return [_finite(function, scale) for scale in given]


def scale_range(
    function: str, argument: str, values: Sequence[float], error_dtype: torch.dtype, matrix: str
) -> None:
    """Check that the arithmetic of such an error holds these scales of a distribution `matrix`.

    It multiplies sums by the scale, or by the scale times the distribution's factor. While a graph
    is traced, all pass: the operators check again when it runs.
    """
    arithmetic = stream.arithmetic(error_dtype)
    if arithmetic == torch.float64 or tracing():
        return
    structured = matrix in stream.STRUCTURED
    factor = hadamard.FACTOR if structured else stream.DENSE[matrix].factor
    limits = torch.finfo(arithmetic)
    low, high = limits.smallest_normal / min(factor, 1.0), limits.max / max(factor, 1.0)
    for value in values:
        if value != 0 and not low <= abs(value) <= high:
            raise ValueError(
                f"{function}: {argument} must be 0 or between {low:.3g} and {high:.3g} in size for "
                f"an error of {error_dtype} and {matrix!r}, got {value!r}"
            )


def _root(sizes: Sequence[int], error_size: int) -> Callable[[int], float]:
    """The square root; one that keeps symbols of a graph that is being traced, if there are any."""
    return torch.sym_sqrt if tracing() and symbolic((*sizes, error_size)) else math.sqrt


def _finite(function: str, scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float, Real)):
        raise _not_a_number(function, scale)
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not -math.inf < value < math.inf:  # math.isfinite cannot take torch.compile's symbols
        raise ValueError(f"{function}: normalization must be finite, got {scale!r}")
    return value


def _not_a_number(function: str, got: Any) -> TypeError:
    return TypeError(
        f"{function}: normalization must be made of numbers, got {type(got).__name__} {got!r}"
    )


def listed(values: Any) -> list[Any] | None:
    """A sequence as a list; None for what only looks like one, or has no order."""
    if type(values) in (list, tuple):  # at once: asking whether it is a Mapping takes a microsecond
        return list(values)
    if isinstance(values, (str, bytes, Mapping, Set, Tensor)):
        return None
    try:
        return list(values)
    except TypeError:
        return None
