"""Checks every result against float64 before timing it.

Signals are compared on samples: up to 32 of the batch, a few rows of the matrix that all layers
share, and the last row of the largest and of up to 16 others. A wrong result raises `Wrong`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from dfa_kernels import feedback_matrix, hadamard
from dfa_kernels.layers import Layers
from dfa_kernels.stream import STRUCTURED, Stream

# Relative to the norm of the compared signals, for n = 1000. Rounding grows as sqrt(n).
TOLERANCES = {
    (torch.float32, "highest"): 1e-5,
    (torch.float32, "high"): 2e-3,  # TF32 keeps 11 bits
    (torch.float32, "medium"): 1e-2,
    (torch.bfloat16, "highest"): 1e-2,
}


class Wrong(Exception):
    """A contender's result differs from the exact one."""


def tolerance(dtype: torch.dtype, precision: str, n: int) -> float:
    """The largest relative error of signals [M, l] from an error [M, n] of `dtype`."""
    return TOLERANCES[dtype, precision] * max(1.0, math.sqrt(n / 1000))


@cache
def exact_row(index: int, n: int, distribution: str) -> Tensor:
    """U[index, :n] in float64, from the definition; a structured row by the transpose."""
    if distribution in STRUCTURED:
        layer, one = Layers((index,), (1,), (1.0,)), torch.ones(1, 1, dtype=torch.float64)
        options = {"columns": n, "dtype": torch.float64}
        return hadamard.project_adjoint([one], layer, Stream(0, 0, distribution), **options)[0]
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
    """Check that signal i is scales[i] * error @ U[:sizes[i]].T; `row(r)` is U[r] in float64."""
    if len(signals) != len(sizes):
        raise Wrong(f"{len(signals)} signals for {len(sizes)} layers")
    batch = sorted({round(i * (len(error) - 1) / 31) for i in range(32)})
    exact_error = error[batch].double().cpu()
    row = cache(row)  # may have to generate a whole block; all layers ask for the same few rows
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
    """Check that sampled rows r of a matrix equal `expected(r)`, bit for bit."""
    for index in {0, len(matrix) // 2, len(matrix) - 1}:
        if not torch.equal(matrix[index].cpu(), expected(index)):
            raise Wrong(f"row {index} differs from the definition")


def check_normal(matrix: Tensor) -> None:
    """Check for mean 0 and variance 1, each within six standard errors."""
    count = matrix.numel()
    variance, mean = torch.var_mean(matrix.double(), correction=0)
    if not abs(mean) <= 6 / math.sqrt(count):
        raise Wrong(f"the mean is {mean:.3g}")
    if not abs(variance - 1) <= 6 * math.sqrt(2 / count):
        raise Wrong(f"the variance is {variance:.6g}")
