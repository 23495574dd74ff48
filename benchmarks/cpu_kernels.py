"""The "cpp" kernels against what they replace on a CPU, and against what this machine can do.

    python benchmarks/cpu_kernels.py [--rounds N] [--json FILE]

Contenders are called alternately and a ratio is the median over the rounds of the two times of a
round, so that a neighbour's burst of work hits both or is voted out. Times are minima. Each case is
checked against float64 before it is timed. The limit of a case is the largest of the times that its
bytes written, its multiplications and its entries would take at the best rates that anything in
this run reached; the three share a core's execution ports, so a limit is reached only where it is
far above the others.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import provenance
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dfa_kernels import feedback_matrix, project, stream

N = 1000  # length of the error
LAYER = 100_000

Call = Callable[[], object]


@dataclass
class Case:
    """Ours against a contender; `at_least` is the speed-up that the project asks of itself."""

    name: str
    against: str
    ours: Call
    theirs: Call
    at_least: float | None
    threads: int = 2
    bytes_written: int = 0
    multiplications: int = 0
    entries: int = 0
    distribution: str = "normal"
    arithmetic: str = "fp32"


@dataclass
class Result:
    """Seconds of both, how many times faster ours is, and the fraction of the limit it reaches."""

    name: str
    against: str
    threads: int
    seconds: float
    contender_seconds: float
    speedup: float
    at_least: float | None
    limit_seconds: float
    limit: str

    @property
    def fraction(self) -> float:
        return self.limit_seconds / self.seconds


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def roofs(threads: int, rounds: int) -> dict[str, float]:
    """Bytes written, multiply-adds and entries a second, each the best of what was tried.

    Entries are made, and used once, by the projection of a single error row.
    """
    torch.set_num_threads(threads)
    out = torch.empty(2**26)
    square, product = torch.randn(2048, 2048), torch.empty(2048, 2048)
    low, low_product = square.bfloat16(), product.bfloat16()
    many, one = torch.randn(512, N), torch.randn(1, N)

    def rate(work: float, call: Call) -> float:
        return work / min(seconds(call) for _ in range(rounds))

    rates = {
        "write": rate(out.nbytes, lambda: out.fill_(1)),
        "torch.mm": rate(2048**3, lambda: torch.mm(square, square, out=product)),
        "torch.mm bf16": rate(2048**3, lambda: torch.mm(low, low, out=low_product)),
    }
    own = {"own product": many, "own product bf16": many.bfloat16()}
    for name, error in own.items():
        call = partial(project, error, [LAYER // 2], backend="cpp")
        rates[name] = rate(len(many) * N * (LAYER // 2), call)
    for distribution in stream.BLOCK:
        call = partial(project, one, [LAYER], distribution=distribution, backend="cpp")
        rates[distribution] = rate(N * LAYER, call)
    rates["multiply fp32"] = max(rates["torch.mm"], rates["own product"])
    rates["multiply bf16"] = max(rates["torch.mm bf16"], rates["own product bf16"])
    return rates


def stored(rows: int) -> Tensor:
    """The scaled matrix as plain PyTorch stores it, [rows, N] fp32."""
    return feedback_matrix(rows, N) / (rows * N) ** 0.5


def reseeded(error: Tensor, size: int, block: int = 4096) -> Tensor:
    """The projection by blocks of torch.randn from a reseeded generator."""
    generator = torch.Generator().manual_seed(0)
    out = torch.empty(len(error), size)
    for start in range(0, size, block):
        rows = min(block, size - start)
        matrix = torch.randn(rows, N, generator=generator)
        torch.mm(error, matrix.T, out=out[:, start : start + rows])
    return out.mul_(1 / (size * N) ** 0.5)


def naive(error: Tensor, matrices: list[Tensor]) -> list[Tensor]:
    """Naive dense storage: a matrix per layer, a product and a scaling for each."""
    return [(error @ u.T).mul_(1 / u.numel() ** 0.5) for u in matrices]


def check(signals: list[Tensor], error: Tensor, sizes: list[int]) -> None:
    """No time for a wrong result: the first rows of every signal, against float64."""
    for signal, size in zip(signals, sizes, strict=True):
        u = feedback_matrix(64, error.shape[1], dtype=torch.float64, backend="torch")
        expected = error.double() @ u.T / (size * error.shape[1]) ** 0.5
        tolerance = 1e-5 if signal.dtype == torch.float32 else 1e-2
        difference = (signal[:, :64].double() - expected).norm()
        assert difference <= tolerance * expected.norm(), f"off by {difference}"


def projection_cases() -> list[Case]:
    cases = []
    matrix = stored(LAYER)
    for count, at_least in ((512, 1 / 1.10), (128, 1 / 1.25), (8, 1.0), (1, None)):
        error, out = torch.randn(count, N), torch.empty(count, LAYER)
        ours = partial(project, error, [LAYER], backend="cpp")
        check(ours(), error, [LAYER])
        theirs = partial(torch.mm, error, matrix.T, out=out)
        work = {"bytes_written": out.nbytes, "multiplications": count * N * LAYER}
        name = f"M={count}, one layer of {LAYER:,}"
        against = "torch.mm on a stored fp32 matrix"
        cases.append(Case(name, against, ours, theirs, at_least, entries=N * LAYER, **work))
    error = torch.randn(128, N)
    work = {"bytes_written": 4 * 128 * LAYER, "multiplications": 128 * N * LAYER}
    ours, theirs = partial(project, error, [LAYER], backend="cpp"), partial(reseeded, error, LAYER)
    against = "torch.randn blocks + mm"
    cases.append(Case(cases[1].name, against, ours, theirs, 3.0, entries=N * LAYER, **work))
    low, low_matrix = error.bfloat16(), matrix.bfloat16()
    ours = partial(project, low, [LAYER], backend="cpp")
    check(ours(), low, [LAYER])
    theirs = partial(torch.mm, low, low_matrix.T)
    work["bytes_written"] //= 2
    against = "torch.mm on a stored bf16 matrix"
    case = Case(f"{cases[1].name}, bf16", against, ours, theirs, None, entries=N * LAYER, **work)
    case.arithmetic = "bf16"
    cases.append(case)
    sizes = [LAYER, LAYER - 1000, LAYER - 2000]
    matrices = [feedback_matrix(size, N) for size in sizes]
    ours = partial(project, error, sizes, backend="cpp")
    check(ours(), error, sizes)
    work = {"bytes_written": 4 * 128 * sum(sizes), "multiplications": 128 * N * LAYER}
    name, against = f"M=128, layers {sizes[0]:,}, {sizes[1]:,}, {sizes[2]:,}", "naive dense storage"
    theirs = partial(naive, error, matrices)
    cases.append(Case(name, against, ours, theirs, 2.0, entries=N * LAYER, **work))
    error, matrices = torch.randn(128, 10), [feedback_matrix(800, 10) for _ in range(3)]
    ours = partial(project, error, [800] * 3, backend="cpp")
    check(ours(), error, [800] * 3)
    theirs = partial(naive, error, matrices)
    work = {"bytes_written": 4 * 128 * 800, "multiplications": 128 * 8000, "entries": 8000}
    cases.append(
        Case("M=128, n=10, layers 3x800", "naive dense storage", ours, theirs, 1.0, **work)
    )
    return cases


def matrix_cases() -> list[Case]:
    cases = []
    for rows in (1_000, 10_000):
        for distribution, dtype, at_least in (
            ("normal", torch.float32, 4.0),
            ("normal", torch.bfloat16, None),
            ("uniform", torch.float32, None),
            ("rademacher", torch.bfloat16, 10.0),
        ):
            options = {"distribution": distribution, "dtype": dtype, "backend": "cpp"}
            ours = partial(feedback_matrix, rows, N, **options)
            name = f"feedback_matrix {rows:,} x {N:,}, {distribution} {str(dtype)[6:]}"
            theirs = partial(torch.randn, rows, N)
            case = Case(name, "torch.randn", ours, theirs, at_least, threads=1)
            case.bytes_written, case.entries = rows * N * dtype.itemsize, rows * N
            case.distribution = distribution
            cases.append(case)
    return cases


def measure(case: Case, rounds: int) -> tuple[float, float, float]:
    """Seconds of ours and of theirs, and how many times faster ours is."""
    torch.set_num_threads(case.threads)
    repeats = max(1, round(0.02 / min(seconds(case.ours) for _ in range(2))))

    def repeated(call: Call) -> float:
        return seconds(lambda: [call() for _ in range(repeats)]) / repeats

    repeated(case.theirs)
    pairs = [(repeated(case.ours), repeated(case.theirs)) for _ in range(rounds)]
    ours, theirs = zip(*pairs, strict=True)
    return min(ours), min(theirs), statistics.median(b / a for a, b in pairs)


def works(case: Case) -> dict[str, tuple[str, float]]:
    """The limits of a case: the name of the rate that bounds it, and how much it has to do."""
    return {
        "write bandwidth": ("write", case.bytes_written),
        "multiplication": (f"multiply {case.arithmetic}", case.multiplications),
        "generation": (case.distribution, case.entries),
    }


def results_of(cases: list[Case], rates: dict[int, dict[str, float]], rounds: int) -> list[Result]:
    """Measure every case and hold it against the machine: the best rates this run has seen."""
    times = [measure(case, rounds) for case in track(cases)]
    for case, (ours, _, _) in zip(cases, times, strict=True):
        reached = rates[case.threads]
        for rate, work in works(case).values():
            reached[rate] = max(reached[rate], work / ours)
    results = []
    for case, (ours, theirs, speedup) in zip(cases, times, strict=True):
        limits = {
            name: work / rates[case.threads][rate] for name, (rate, work) in works(case).items()
        }
        limit = max(limits, key=limits.__getitem__)
        facts = (case.name, case.against, case.threads, ours, theirs, speedup, case.at_least)
        results.append(Result(*facts, limits[limit], limit))
    return results


def peak_memory() -> dict[str, float]:
    """VGG-16 on ImageNet's largest layer, M=4, in a process of its own; naive storage: 12.8 GB."""
    program = """
import time, torch
from dfa_kernels import project
def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
error = torch.randn(4, 1000)
project(error[:, :8], [8], backend="cpp")
before, start = status("VmRSS"), time.perf_counter()
(signal,) = project(error, [3_211_264], backend="cpp")
print(status("VmHWM") - before - signal.nbytes, time.perf_counter() - start)
"""
    command = [sys.executable, "-c", program]
    extra, elapsed = subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.split()
    return {"extra_mib": int(extra) / 2**20, "seconds": float(elapsed)}


def report(
    results: list[Result], memory: dict[str, float], rates: dict[int, dict[str, float]]
) -> None:
    console = Console(width=160)
    for threads, rate in rates.items():
        console.print(
            f"{threads} threads: write {rate['write'] / 1e9:.1f} GB/s, "
            f"torch.mm {2 * rate['torch.mm'] / 1e9:.0f} GFLOP/s, "
            f"best product {2 * rate['multiply fp32'] / 1e9:.0f} (bf16 "
            f"{2 * rate['multiply bf16'] / 1e9:.0f}) GFLOP/s, "
            f"entries made and used once {rate['normal'] / 1e9:.2f}e9 normal/s, "
            f"{rate['rademacher'] / 1e9:.2f}e9 rademacher/s"
        )
    table = Table("case", "against", "ms", "theirs", "faster", "asked", "of the limit", "limit")
    for r in results:
        asked = "" if r.at_least is None else f"{r.at_least:.2f}x"
        color = "" if r.at_least is None else "[green]" if r.speedup >= r.at_least else "[red]"
        table.add_row(
            r.name,
            r.against,
            f"{1e3 * r.seconds:.3f}",
            f"{1e3 * r.contender_seconds:.3f}",
            f"{color}{r.speedup:.2f}x",
            asked,
            f"{r.fraction:.0%}",
            r.limit,
        )
    console.print(table)
    console.print(
        f"l=3,211,264, n=1000, M=4: {memory['extra_mib']:.1f} MiB beyond the outputs "
        f"(asked: <= 128), {memory['seconds']:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    arguments = parser.parse_args()
    rates = {threads: roofs(threads, arguments.rounds) for threads in (1, 2)}
    cases = projection_cases() + matrix_cases()
    results = results_of(cases, rates, arguments.rounds)
    memory = peak_memory()
    report(results, memory, rates)
    if arguments.json:
        measured = {
            "roofs": rates,
            "cases": [
                asdict(result) | {"fraction_of_limit": result.fraction} for result in results
            ],
            "peak_memory": memory,
        }
        provenance.write(arguments.json, measured)


if __name__ == "__main__":
    main()
