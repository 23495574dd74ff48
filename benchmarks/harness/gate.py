"""Checks every result against float64 before timing it, and raises `Wrong` if it is not right.

Signals are compared on a sample of the batch and of the rows of U: a few rows that all layers have,
and the last rows of up to 16 layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from dfa_kernels import feedback_matrix

# Relative to the norm of the compared signals; an fp32 sum's rounding grows as sqrt(n).
TOLERANCES = {
    (torch.float32, "highest"): 1e-5,
    (torch.float32, "high"): 2e-3,  # TF32 keeps 11 bits
    (torch.float32, "medium"): 1e-2,
    (torch.bfloat16, "highest"): 1e-2,
}


class Wrong(Exception):
    """A contender's result is not what it has to be."""


def tolerance(dtype: torch.dtype, precision: str, n: int) -> float:
    """The largest relative error of signals [M, l] from an error [M, n] of `dtype`."""
    return TOLERANCES[dtype, precision] * max(1.0, math.sqrt(n / 1000))


@cache
def exact_row(index: int, n: int, distribution: str) -> Tensor:
    """U[index, :n] in float64, from the definition."""
    options = {"distribution": distribution, "dtype": torch.float64, "backend": "torch"}
    return feedback_matrix(1, n, row_offset=index, device="cpu", **options)[0]


def check_signals(
    signals: Sequence[Tensor],
    error: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float],
    row: Callable[[int], Tensor],
    relative: float,
) -> None:
    """Signal i is scales[i] * error @ U[:sizes[i]].T, with `row(r)` the row U[r] in float64."""
    if len(signals) != len(sizes):
        raise Wrong(f"{len(signals)} signals for {len(sizes)} layers")
    batch = sorted({round(i * (len(error) - 1) / 31) for i in range(32)})
    exact_error = error[batch].double().cpu()
    row = cache(row)  # it may have to make a whole block, and all layers ask for the same few
    smallest = min(sizes)
    common = sorted({0, smallest // 3, smallest // 2, smallest - 1})
    with_last = {round(i * (len(sizes) - 1) / 15) for i in range(16)}
    with_last.add(list(sizes).index(max(sizes)))
    for layer, (signal, size, scale) in enumerate(zip(signals, sizes, scales, strict=True)):
        if signal.shape != (len(error), size):
            shape = tuple(signal.shape)
            raise Wrong(f"signal {layer} is {shape}, not {(len(error), size)}")
        rows = [*common, size - 1] if layer in with_last else common
        matrix = torch.stack([row(index) for index in rows])  # [rows, n]
        expected = scale * exact_error @ matrix.T
        sample = signal[batch][:, rows].double().cpu()
        difference = (sample - expected).norm() / expected.norm()
        if not difference <= relative:  # NaN is wrong too
            raise Wrong(f"signal {layer} is off by {difference:.2g} of its norm")


def check_entries(matrix: Tensor, expected: Callable[[int], Tensor]) -> None:
    """Sampled rows of a matrix equal `expected(r)`, bit for bit."""
    for index in {0, len(matrix) // 2, len(matrix) - 1}:
        if not torch.equal(matrix[index].cpu(), expected(index)):
            raise Wrong(f"row {index} differs from the definition")


def check_normal(matrix: Tensor) -> None:
    """Mean 0 and variance 1, each within six standard errors."""
    count = matrix.numel()
    variance, mean = torch.var_mean(matrix.double(), correction=0)
    if not abs(mean) <= 6 / math.sqrt(count):
        raise Wrong(f"the mean is {mean:.3g}")
    if not abs(variance - 1) <= 6 * math.sqrt(2 / count):
        raise Wrong(f"the variance is {variance:.6g}")
