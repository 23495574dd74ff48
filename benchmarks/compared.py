"""What `python -m benchmarks.compare` measures, and the process that measures one checkout.

The process takes requests from its standard input, one a line, and answers each with a line of
JSON. The code that measures is the same for all checkouts; `dfa_kernels` is the checkout's.
"""

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dfa_kernels
from benchmarks import bench_networks, bench_sweeps, training_step
from benchmarks.harness import contenders, measure
from benchmarks.harness.shapes import Case
from benchmarks.training_step import PAPER, Perceptron
from dfa_kernels import project
from dfa_kernels.backends import registry

RIVALS = ("views", "stored")
# Cases of the benchmark, and the distributions to measure beside its own.
SHAPES = {
    "3x800 (the paper's), n=10, M=1": (),
    "3x800 (the paper's), n=10, M=32": (),
    "3x800 (the paper's), n=10, M=128": ("rademacher", "hadamard"),
    "M=32, n=10, one layer of 20,000": (),
    "M=32, n=100, one layer of 20,000": (),
    "M=4, n=1,000, one layer of 1,000": ("rademacher", "hadamard"),
    "M=1, n=1,000, one layer of 100,000": ("rademacher", "uniform", "hadamard"),
    "M=4, n=1,000, one layer of 100,000": (),
    "48 unequal layers up to 4,096, n=1,000, M=32": (),
}


def shapes() -> Iterator[Case]:
    """Those cases, with the same rivals."""
    modules = (bench_networks, bench_sweeps)
    known = {case.name: case for module in modules for case in module.cases("cpu", full=True)}
    for name, distributions in SHAPES.items():
        yield replace(known[name], rivals=RIVALS)
        for kind in distributions:
            title = f"{name}, {kind}"
            yield replace(known[name], name=title, distribution=kind, rivals=RIVALS)


STEPS = {name: case for name, case in training_step.CASES.items() if PAPER in name}
for _count in (3, 100):  # so narrow that a step is what happens between the kernels
    STEPS[f"{_count} x 32, n = 10, batch 4"] = Perceptron(32, (32,) * _count, batch=4, n=10)
CASES: dict[str, Case | Perceptron] = {case.name: case for case in shapes()}
CASES |= {f"training step, {name}": case for name, case in STEPS.items()}


class Projected(contenders.Seeded):
    """`project`, called as in its documentation."""

    def __init__(self, case: Case):
        super().__init__(case, "project")

    def prepare(self, error: torch.Tensor, storage: contenders.Storage) -> None:
        sizes, distribution = list(self.case.sizes), self.case.distribution
        self.prepared = partial(project, error, sizes, distribution=distribution)


class Recorder(TorchDispatchMode):
    """Keeps the calls of this project's operators."""

    def __init__(self):
        super().__init__()
        self.calls: list[partial] = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        call = partial(operator, *arguments, **(options or {}))
        if operator.namespace == "dfa_kernels":
            self.calls.append(call)
        return call()


def calls(case: Case | Perceptron, device_type: str, counted: bool = False) -> dict:
    """What is measured of a case, by name. What is wrong is not measured: it raises gate.Wrong.

    `counted` leaves out products with a stored matrix, and the check, which the timed ones passed.
    """
    torch.manual_seed(0)
    if isinstance(case, Perceptron):
        new = partial(training_step.Step, case, torch.device(device_type), torch.float32)
        return {"DFA": new("dfa").run, "backprop": new("backprop").run}
    case = replace(case, device_type=device_type)
    error = torch.randn(case.batch, case.n, device=device_type)
    storage = contenders.Storage(case, None)
    entrants = {"project": Projected(case)}
    if not counted:
        entrants |= {name: contenders.contender(name, case) for name in case.rivals}
    for entrant in entrants.values():
        entrant.prepare(error, storage)
        if not counted:
            entrant.check(error, entrant())
    with Recorder() as recorder:
        entrants["project"]()
    # One operator makes all signals. A checkout may do without.
    recorded = {"operator": recorder.calls[0]} if len(recorder.calls) == 1 else {}
    return recorded | entrants


class Instructions:
    """Counts the instructions of calls in this process, which callgrind runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.toggle = torch._C._valgrind_toggle
            self.dump = torch._C._valgrind_toggle_and_dump_stats
        except AttributeError:
            raise RuntimeError(
                f"compare: torch {torch.__version__} has no _C._valgrind_toggle: "
                "leave out --instructions"
            ) from None

    def a_call(self, call) -> float:
        """Instructions of a call: the difference of two counts, over that of their calls.

        Of a call of seconds just a count, in which what counting takes is nothing.
        """
        began, warmed = time.perf_counter(), 0
        while warmed < 10 and (warmed == 0 or time.perf_counter() - began < 2):
            call()  # Python specializes code in its first calls
            warmed += 1
        gc.collect()
        gc.disable()
        try:
            if warmed == 1:
                return self.total(call, 1)
            return (self.total(call, 10) - self.total(call, 5)) / 5
        finally:
            gc.enable()

    def total(self, call, times: int) -> int:
        """Instructions of so many calls, and of what counting them takes."""
        self.toggle()
        for _ in range(times):
            call()
        self.dump()
        (dump,) = self.folder.glob("counts.*")
        counted = re.search(r"^(?:summary|totals): *(\d+)", dump.read_text(), re.MULTILINE)
        dump.unlink()
        return int(counted[1])


class Checkout:
    """Answers the requests about one checkout."""

    def __init__(self, device_type: str, counts: Path | None):
        self.device_type, self.calls = device_type, {}
        self.instructions = Instructions(counts) if counts else None

    def about(self) -> dict:
        """The checkout that was imported, and how it computes."""
        device = torch.device(self.device_type)
        return {
            "source": dfa_kernels.__file__,
            "version": dfa_kernels.__version__,
            "backend": registry.choose("compare", device, None),  # DFA_KERNELS_BACKEND or the best
            "threads": torch.get_num_threads(),
        }

    def prepare(self, name: str) -> dict[str, float]:
        """Set up a case; the seconds of each call, as a first estimate."""
        self.calls = {}  # frees its matrices
        self.calls = calls(CASES[name], self.device_type)
        return {name: min(self.time(name, 1) for _ in range(3)) for name in self.calls}

    def time(self, name: str, repeats: int) -> float:
        """Mean seconds of a call of the case, over `repeats` in a row."""
        return measure.seconds(self.calls[name], self.device_type, repeats)

    def count(self, name: str) -> dict[str, float]:
        """The instructions of each call of a case."""
        found = calls(CASES[name], self.device_type, counted=True)
        return {name: self.instructions.a_call(call) for name, call in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--counts", type=Path, help="the folder of counts, under callgrind")
    options = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # what anything prints is no answer
    measure.keep_freed_memory()
    checkout = Checkout(options.device, options.counts)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(checkout, name)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
