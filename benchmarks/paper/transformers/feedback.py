"""Feedback matrices made from an output layer that is trained already."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from dfa_kernels import DFA, feedback_matrix
from dfa_kernels.layers import Layers
from dfa_kernels.nn import OutputWeights, Source

RANK = 16


class LowRank:
    """A source of signals whose matrix is a product [l, rank] @ [rank, n], beside a seed's."""

    def __init__(self, weight: Tensor, seeded: Source | None):
        self.seeded = seeded
        left, values, right = torch.linalg.svd(weight.T, full_matrices=False)
        self.rows, self.columns = left[:, :RANK] * values[:RANK], right[:RANK]

    def project(self, error: Tensor, layers: Layers, dtype: torch.dtype) -> list[Tensor]:
        """See `Source`."""
        inner = error @ self.columns.T
        signals = [
            inner @ (scale * self.rows[:size].T) for _, size, scale in zip(*layers, strict=True)
        ]
        if self.seeded is not None:
            others = self.seeded.project(error, layers, dtype)
            signals = [signal + other for signal, other in zip(signals, others, strict=True)]
        return [signal.to(dtype) for signal in signals]

    def describe(self) -> dict:
        """See `Source`."""
        return {"rank": RANK}


def feedback_of(name: str, output: nn.Linear, dfa: DFA) -> Tensor | Source:
    """What makes the signals, by the weights that the output layer begins with.

    "output weights": as they change; "their start": a copy, which stays; "rank 16": the best
    approximation of that rank; "seed and rank 16": a seed's matrix, and the best correction of it.
    """
    if name == "output weights":
        return OutputWeights(output)
    start = output.weight.detach().clone()
    start /= start.std()  # to unit variance
    if name == "their start":
        return start.T
    if name == f"rank {RANK}":
        return LowRank(start, None)
    assert name == f"seed and rank {RANK}", name
    n, size = start.shape
    matrix = feedback_matrix(
        size, n, seed=dfa.seed, distribution=dfa.distribution, device=start.device
    )
    return LowRank(start - matrix.T, dfa.source)


def exchange(dfa: DFA, matrix: Source | Tensor) -> None:
    """Give a `DFA` another matrix; that the output layer was set from the one before is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DFA: the output layer was set")
        dfa.matrix = matrix
