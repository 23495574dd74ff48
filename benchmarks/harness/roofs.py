"""The roofs of this machine, and the least time that a piece of work can take under them.

    t >= max(calls x latency, bytes / bandwidth, multiplications / rate, entries / generation rate,
             additions / rate)

The parts compete for the same ports of a core or an SM, so the bound is reached only where one part
dominates. Bandwidths are measured for several sizes, because small pieces stay in a cache. Each
roof is the best rate of a library's kernel or ours, and `raise_to` lifts it to the best that any
call in the run reaches.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.harness.measure import seconds, stream_writes
from dfa_kernels import backends, project, stream
from dfa_kernels.backends.registry import BACKENDS
from dfa_kernels.hadamard import BLOCK

# What matrix units compute in, for a stored fp32 matrix under each float32_matmul_precision.
PRECISIONS = {"highest": "fp32", "high": "tf32", "medium": "tf32"}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

STREAMED = 2**25  # bytes, from which on streaming stores are measured, too
BEYOND_CACHES = 2**28  # bytes; anything larger moves at the same rate


@dataclass(frozen=True)
class Work:
    """The least that one call must do.

    `written` and `read` are bytes. `multiplications` are multiply-adds, counted once for each pass
    over the operands; `additions` are those of Hadamard transforms. `source` is what generates the
    entries or transforms: a backend, or "torch.randn". `launch` is "call" or "replay".
    """

    calls: int = 1
    written: int = 0
    read: int = 0
    multiplications: int = 0
    arithmetic: str = "fp32"
    additions: int = 0
    entries: int = 0
    source: str | None = None
    distribution: str = "normal"
    launch: str = "call"


@dataclass
class Roofs:
    """Seconds a call; bytes, multiply-adds, additions and entries a second.

    `write` and `memory` go by the number of bytes moved, `multiply` by the operands' type,
    `addition` by source, `generation` by source and then by distribution.
    """

    device_type: str
    threads: int
    latency: dict[str, float] = field(default_factory=dict)
    write: dict[int, float] = field(default_factory=dict)
    memory: dict[int, float] = field(default_factory=dict)
    multiply: dict[str, float] = field(default_factory=dict)
    addition: dict[str, float] = field(default_factory=dict)
    generation: dict[str, dict[str, float]] = field(default_factory=dict)

    def best_generation(self, work: Work) -> float:
        """Entries a second: of torch.randn for torch.randn, else of the fastest backend."""
        if work.source == "torch.randn":
            return self.generation[work.source][work.distribution]
        return max(
            rates.get(work.distribution, 0.0)
            for source, rates in self.generation.items()
            if source != "torch.randn"
        )


def projection_additions(batch: int, rows: int, n: int) -> int:
    """Additions of a structured projection of an error [batch, n] to `rows` rows.

    A transform takes 10 of each number, padded to whole blocks: two of the error, and one of the
    signals. Each input block but the first is added to each number of the signals.
    """
    stages, blocks = BLOCK.bit_length() - 1, -(-n // BLOCK)
    padded = -(-rows // BLOCK) * BLOCK
    return batch * (padded * (stages + blocks - 1) + 2 * stages * blocks * BLOCK)


def addition_rate(multiply: dict[str, float], addition: dict[str, float]) -> float:
    """Additions a second, fp32: a core adds as often as it multiplies and adds in one step.

    Or more, if a transform has shown so.
    """
    return max(multiply["fp32"], *addition.values(), 0.0)


def bandwidth(rates: dict[int, float], size: int) -> float:
    """The best rate at which `size` bytes or more have been moved."""
    return max(rate for moved, rate in rates.items() if moved >= min(size, BEYOND_CACHES))


def limits(work: Work, roofs: Roofs) -> dict[str, float]:
    """Seconds that each part of the work takes at best, by the name of its roof."""
    moved = work.written + work.read
    parts = {
        "latency": work.calls * roofs.latency[work.launch],
        "write bandwidth": work.written / bandwidth(roofs.write, work.written),
        "memory bandwidth": moved / bandwidth(roofs.memory, moved),
        "multiplication": work.multiplications / roofs.multiply[work.arithmetic],
    }
    if work.additions:
        parts["addition"] = work.additions / addition_rate(roofs.multiply, roofs.addition)
    if work.entries:
        parts["generation"] = work.entries / roofs.best_generation(work)
    return parts


def bound(work: Work, roofs: Roofs) -> tuple[float, str]:
    """The least seconds that the work can take, and the roof it is bound by."""
    parts = limits(work, roofs)
    name = max(parts, key=parts.__getitem__)
    return parts[name], name


def expected_seconds(work: Work, roofs: Roofs) -> float:
    """As `bound`, with entries and additions at the rate of their source, not at the best one."""
    made = roofs.generation.get(work.source or "", {}).get(work.distribution, math.inf)
    added = roofs.addition.get(work.source or "", math.inf)
    return max(bound(work, roofs)[0], work.entries / made, work.additions / added)


def raise_to(roofs: Roofs, work: Work, reached: float) -> None:
    """Lift the roofs to what a call of `reached` seconds has shown to be possible."""

    def lift(rates: dict, key: object, amount: float) -> None:
        rates[key] = max(rates.get(key, 0.0), amount / reached)

    for rates, moved in ((roofs.write, work.written), (roofs.memory, work.written + work.read)):
        if moved:
            lift(rates, min(moved, BEYOND_CACHES), moved)
    lift(roofs.multiply, work.arithmetic, work.multiplications)
    if work.additions:
        lift(roofs.addition, work.source, work.additions)
    if work.entries:
        lift(roofs.generation.setdefault(work.source, {}), work.distribution, work.entries)
    roofs.latency[work.launch] = min(roofs.latency[work.launch], reached / work.calls)


# --- measuring them ---


def measure(device_type: str, rounds: int = 5, patience: float = 0.5) -> Roofs:
    """Measure a device's roofs; on the CPU, with the threads that torch uses now.

    Each takes `rounds` rounds, or fewer if they take `patience` seconds.
    """
    roofs = Roofs(device_type, torch.get_num_threads())

    def best(call: Callable[[], object], repeats: int = 1) -> float:
        call()
        times: list[float] = []
        while len(times) < rounds and sum(times) * repeats < patience:
            times.append(seconds(call, device_type, repeats))
        return min(times)

    _measure_latency(roofs, best)
    _measure_bandwidth(roofs, best)
    _measure_multiplication(roofs, best)
    _measure_generation(roofs, best)
    _measure_addition(roofs, best)
    return roofs


def _measure_latency(roofs: Roofs, best: Callable) -> None:
    one = torch.empty(1, device=roofs.device_type)
    roofs.latency["call"] = best(lambda: one.fill_(1), 1000)
    if roofs.device_type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one.fill_(1)
        roofs.latency["replay"] = best(graph.replay, 1000)


def _measure_bandwidth(roofs: Roofs, best: Callable) -> None:
    largest = 28 if roofs.device_type == "cpu" else 31
    for exponent in range(16, largest + 1, 3):
        size, repeats = 2**exponent, 2 ** max(0, 24 - exponent)
        source = torch.ones(size // 4, device=roofs.device_type)
        target = torch.empty_like(source)
        writes = [best(lambda out=target: out.fill_(1), repeats)]
        if roofs.device_type == "cpu" and size >= STREAMED:
            with stream_writes(target, roofs.threads) as write:
                writes.append(best(write, repeats))
        roofs.write[size] = size / min(writes)
        moves = {
            size: best(source.sum, repeats),  # reading alone
            2 * size: best(partial(target.copy_, source), repeats),
        }
        for moved, time in moves.items():
            roofs.memory[moved] = max(roofs.memory.get(moved, 0.0), moved / time)
        roofs.memory[size] = max(roofs.memory[size], roofs.write[size])


_MOST_SECONDS = 5.0  # of one product


def _measure_multiplication(roofs: Roofs, best: Callable) -> None:
    side = 2048 if roofs.device_type == "cpu" else 8192
    square = torch.randn(side, side, device=roofs.device_type)
    settings = [("fp32", torch.float32, "highest"), ("bf16", torch.bfloat16, "highest")]
    if roofs.device_type == "cuda":
        settings += [("tf32", torch.float32, "high"), ("fp16", torch.float16, "highest")]
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in settings:
        torch.set_float32_matmul_precision(precision)
        for part in (side // 4, side):
            operand = square[:part, :part].to(dtype).contiguous()
            time = best(partial(torch.mm, operand, operand, out=torch.empty_like(operand)))
            roofs.multiply[name] = max(roofs.multiply.get(name, 0.0), part**3 / time)
            if 4**3 * time > _MOST_SECONDS:  # the library has no kernel for this type
                break
    torch.set_float32_matmul_precision(before)
    # Our own product may be faster than the library's.
    if "cpp" in sources(roofs.device_type):
        error, size = torch.randn(512, 1000), 20_000
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            time = best(partial(project, error.to(dtype), [size], backend="cpp"))
            roofs.multiply[name] = max(roofs.multiply[name], error.numel() * size / time)


def _measure_generation(roofs: Roofs, best: Callable) -> None:
    """By projections of a batch of one, which use each entry once."""
    error = torch.randn(1, 1000, device=roofs.device_type)
    rows = 100_000 if roofs.device_type == "cpu" else 1_000_000
    for source in sources(roofs.device_type):
        size = rows // 200 if source == "torch" else rows

        def rate(distribution: str, source: str = source, size: int = size) -> float:
            options = {"distribution": distribution, "backend": source}
            dtypes = (torch.float32, torch.bfloat16)
            calls = (partial(project, error.to(dtype), [size], **options) for dtype in dtypes)
            return size * error.shape[1] / min(map(best, calls))

        try:
            roofs.generation[source] = {name: rate(name) for name in stream.DENSE}
        except Exception:  # its own benchmarks will report it, and the others go on
            traceback.print_exc()
    out = torch.empty(rows // 10, 1000, device=roofs.device_type)
    roofs.generation["torch.randn"] = {"normal": out.numel() / best(out.normal_)}


def _measure_addition(roofs: Roofs, best: Callable) -> None:
    """By structured projections, of which additions are the most work."""
    for source in sources(roofs.device_type, "hadamard"):
        batch, rows = (8, 2**13) if source == "torch" else (64, 2**17)
        error = torch.randn(batch, 1000, device=roofs.device_type)
        call = partial(project, error, [rows], distribution="hadamard", backend=source)
        try:
            roofs.addition[source] = projection_additions(batch, rows, 1000) / best(call)
        except Exception:  # as above
            traceback.print_exc()


def sources(device_type: str, distribution: str = "normal") -> list[str]:
    """The available backends of a device type that make a distribution, the preferred first.

    Without Triton's interpreter on the CPU.
    """
    found = [
        status.name
        for status in backends()
        if status.device == device_type
        and status.available
        and distribution in BACKENDS[status.name].DISTRIBUTIONS
        and not (status.name == "triton" and device_type == "cpu")
    ]
    return sorted(found, key=lambda name: BACKENDS[name].RANK)
