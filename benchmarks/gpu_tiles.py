"""Times every way that a projection can go on a GPU, beside the product with a stored matrix.

    python -m benchmarks.gpu_tiles [--json FILE] [--quick] [--backends cuda triton]

Each tile of the fused kernels, the slabs and each backend's own choice, for many batches, numbers
of rows, lengths of the error, distributions and operands. The cost models that choose a way are
fitted to the result. "stored" is `torch.mm` with a stored matrix, in bf16 or fp16 for such an
error, and in TF32 or true fp32 for an fp32 error, by its precision. Ways take turns, so that all
see the same clock; times are medians of a few rounds, by the GPU's clock.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import provenance
from benchmarks.harness.measure import seconds
from dfa_kernels import feedback_matrix
from dfa_kernels.backends import cuda, registry, tensor_cores, triton
from dfa_kernels.layers import Layers
from dfa_kernels.stream import DENSE, Stream

BATCHES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Rows of U and columns: what one layer of a network asks for, and enough to fill any GPU.
SHAPES = ((4096, 1000), (16_384, 1000), (200_000, 1000), (200_000, 100), (20_000, 10_000))
# An error's dtype, and torch's precision of products of fp32.
OPERANDS = (
    (torch.bfloat16, "highest"),
    (torch.float16, "highest"),
    (torch.float32, "medium"),
    (torch.float32, "high"),
    (torch.float32, "highest"),
)
ROUNDS = 3
ROUND = 2e-3  # seconds; a shorter call is repeated to take about as long
LONGEST = 0.1  # seconds; what takes longer once is not timed again

Way = Callable[[], object]


class Setting(NamedTuple):
    """One projection to time."""

    distribution: str
    dtype: torch.dtype
    precision: str
    batch: int
    rows: int
    columns: int


def settings(quick: bool) -> Iterator[Setting]:
    """What is timed; bf16, normal entries and the largest shape come first."""
    for shape, operand, distribution in itertools.product(
        sorted(SHAPES, key=lambda shape: -shape[0]), OPERANDS, DENSE
    ):
        plain = operand[0] == torch.bfloat16 or (
            operand[1] == "highest" and distribution == "normal"
        )
        if quick and (shape[1] != 1000 or not plain):
            continue
        for batch in BATCHES:
            yield Setting(distribution, *operand, batch, *shape)


def ways(setting: Setting, error: Tensor, backends: list[str]) -> Iterator[tuple[str, Way]]:
    """Every way to make one layer's signal, by name."""
    layers = Layers((0,), (setting.rows,), (1.0,))
    given = (error, layers, Stream(0, 0, setting.distribution), setting.dtype)
    terms = tensor_cores.terms_of(error)
    if "cuda" in backends:
        yield "cuda", functools.partial(cuda.project, *given)
        found = torch.ops.dfa_kernels.cuda_tiles(
            setting.distribution, setting.dtype, terms, error.device
        )
        for tile, name in zip(*found, strict=True):
            yield f"cuda fused {name}", functools.partial(cuda._fused, *given, tile=tile)
        if terms < 3:
            yield "cuda slabs", functools.partial(cuda._by_slabs, *given)
    if "triton" in backends:
        yield "triton", functools.partial(triton.project, *given)
        for name, way in triton.ways(error, setting.distribution):
            yield f"triton {name}", OnceMade(way.args[0], given)
    stored = feedback_matrix(
        setting.rows,
        setting.columns,
        distribution=setting.distribution,
        dtype=setting.dtype,
        device=error.device,
        backend=backends[0],
    )
    out = error.new_empty(setting.batch, setting.rows)
    yield "stored", lambda: torch.mm(error, stored.T, out=out)


class OnceMade:
    """A Triton way, which works out its launch at the first call."""

    def __init__(self, make: Callable, given: tuple):
        self.make, self.given = make, given
        self.way: Callable | None = None

    def __call__(self) -> object:
        error, layers, stream, dtype = self.given
        if self.way is None:
            self.way = self.make(error, layers, *stream[1:], dtype)
        return self.way(error, stream.seed)


def measure(setting: Setting, backends: list[str]) -> dict[str, float | None]:
    """Median seconds of each way; None for one that fails or is left out as too long."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting.precision)
    try:
        error = torch.randn(setting.batch, setting.columns, device="cuda").to(setting.dtype)
        entrants, times = [], {}
        for name, way in ways(setting, error, backends):
            times[name] = []
            try:
                way()
                once = min(seconds(way, "cuda") for _ in range(2))
            except RuntimeError as failure:
                print(f"{name}, {setting}: {failure}", file=sys.stderr)
                continue
            times[name].append(once)
            if once < LONGEST:
                times[name].clear()
                entrants.append((name, way, max(1, round(ROUND / once))))
        for _ in range(ROUNDS):
            for name, way, repeats in entrants:
                times[name].append(seconds(way, "cuda", repeats))
    finally:
        torch.set_float32_matmul_precision(before)
    return {name: statistics.median(found) if found else None for name, found in times.items()}


def line(setting: Setting, times: dict[str, float | None]) -> str:
    """One line: what was timed, the best way and how it compares."""
    known = {name: time for name, time in times.items() if time}
    stored = known.pop("stored", float("nan"))
    best = min(known, key=known.__getitem__)
    entries = setting.rows * setting.columns
    chosen = {name: time for name, time in known.items() if name in ("cuda", "triton")}
    parts = [
        f"{setting.distribution[:4]} {str(setting.dtype)[6:]}/{setting.precision}",
        f"{setting.rows} x {setting.columns} M={setting.batch}:",
        f"best {best} {1e6 * known[best]:.1f} us {entries / known[best]:.3g}/s",
        *(f"{name} {1e6 * time:.1f}" for name, time in chosen.items()),
        f"stored {1e6 * stored:.1f} us, {stored / known[best]:.2f}x",
    ]
    return "  ".join(parts)


def main() -> None:
    """Time all settings, or as many as the seconds allow; write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["cuda"], choices=["cuda", "triton"])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and operands")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args()
    for name in options.backends:
        if reason := registry.unavailable(name, "cuda"):  # to ask also loads its kernels
            parser.error(f"backend {name!r} cannot serve cuda: {reason}")
    origin, end, measured = provenance.origin("cuda"), time.monotonic() + options.seconds, []
    for setting in settings(options.quick):
        if time.monotonic() > end:
            print("the rest is left out: no time is left")
            break
        times = measure(setting, options.backends)
        print(line(setting, times), flush=True)
        named = setting._asdict() | {"dtype": str(setting.dtype)[6:]}
        measured.append(named | {"seconds": times})
        if options.json and len(measured) % 20 == 0:
            provenance.save(options.json, origin | {"timed": measured})
    if options.json:
        provenance.save(options.json, origin | {"timed": measured})


if __name__ == "__main__":
    main()
