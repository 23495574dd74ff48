"""Table 1: bytes of feedback matrices by way of storing, and the peak memory that confirms them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.paper import memory
from benchmarks.paper.architectures import ARCHITECTURES, STORAGES, Architecture
from dfa_kernels import feedback_matrix, project

BATCH = 4


def projected(storage: str, error: Tensor, sizes: Sequence[int]) -> tuple[list[Tensor], list]:
    """The signals of eq. 8 by one way of storing, and the matrices kept for the next step."""
    n = error.shape[1]
    if storage == "seeded":
        return project(error, sizes), []
    if storage == "shared":
        matrix = feedback_matrix(max(sizes), n, device=error.device)
        longest = error @ matrix.T
        return [longest[:, :size] / math.sqrt(size * n) for size in sizes], [matrix]
    if storage == "naive":
        matrices = [
            feedback_matrix(size, n, seed=i, device=error.device) for i, size in enumerate(sizes)
        ]
        signals = [error @ matrix.T for matrix in matrices]
        return [
            signal.div_(math.sqrt(size * n)) for signal, size in zip(signals, sizes, strict=True)
        ], matrices
    raise ValueError(f"storage must be one of {STORAGES}, got {storage!r}")


def measure(storage: str, sizes: list[int], n: int, batch: int, device: torch.device) -> dict:
    """Peak bytes of generating the matrices and projecting once; runs in a child process."""
    error = torch.randn(batch, n, device=device)
    projected(storage, error[:, :8], [8])
    with memory.Peak(device) as peak:
        signals, matrices = projected(storage, error, sizes)
    assert all(signal.isfinite().all() for signal in signals)
    return {"peak": peak.bytes, "stored": sum(matrix.nbytes for matrix in matrices)}


def run(device: torch.device, largest: int, tick: Callable[[], None]) -> list[dict]:
    """A row for each architecture; matrices of more than `largest` bytes are not measured."""
    rows = []
    for architecture in ARCHITECTURES:
        row: dict = {"name": architecture.name, "n": architecture.n, "batch": BATCH}
        row["layers"] = len(architecture.sizes)
        for storage in STORAGES:
            row[storage] = cell(architecture, storage, device, largest)
            tick()
        rows.append(row)
    return rows


def cell(architecture: Architecture, storage: str, device: torch.device, largest: int) -> dict:
    """Bytes of matrices and of signals, and the measured peak, or the bytes it would need."""
    stored = architecture.feedback_bytes(storage)
    signals = architecture.signal_bytes(storage, BATCH)
    counted = {"stored": stored, "signals": signals}
    if stored > largest:
        return counted
    measured = memory.in_child(
        measure,
        stored + signals,
        device,
        storage=storage,
        sizes=architecture.sizes,
        n=architecture.n,
        batch=BATCH,
    )
    return measured | counted
