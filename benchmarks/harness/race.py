"""Times all contenders of a case in interleaved rounds, so background load affects all alike.

Every result is checked before its contender is timed. A contender is left out, with the reason, if
it does not fit into memory, or if even the least time of a call is longer than the run allows. The
machine's roofs are raised to the best that any round shows.
"""

from __future__ import annotations

import gc
import random
import time
import traceback
from dataclasses import dataclass, field

import torch

from benchmarks.harness import roofs
from benchmarks.harness.contenders import Contender, Storage, contender
from benchmarks.harness.measure import available_bytes, is_out_of_memory, peak_bytes, seconds
from benchmarks.harness.shapes import Case

SLOW = 0.2  # seconds; a call that takes longer at least is not warmed up
ROUND = 0.02  # seconds; a shorter call is repeated within a round until it takes as long


@dataclass(frozen=True)
class Limits:
    """How long a run may take.

    Rounds of a case go on until they are the `most`, or have taken `budget` seconds and are not
    too `few`, or have taken `patience` seconds. A call may take `slowest` seconds.
    """

    budget: float
    patience: float
    few: int
    most: int
    slowest: float

    def are_over(self, rounds: int, elapsed: float) -> bool:
        enough = rounds >= self.few and elapsed > self.budget
        return enough or rounds >= self.most or (rounds > 0 and elapsed > self.patience)


QUICK = Limits(budget=1.0, patience=40.0, few=5, most=15, slowest=4.0)
FULL = Limits(budget=2.0, patience=120.0, few=5, most=41, slowest=15.0)


@dataclass
class Result:
    """One contender in one case. `times`: seconds a call, round by round, as all had them."""

    case: Case
    contender: str
    work: roofs.Work
    stored_bytes: int
    peak_bytes: int | None  # beyond the stored matrices, signals included
    times: list[float] = field(default_factory=list)


class LeftOut(Exception):
    """Why a contender does not take part, and what it would have stored and done."""

    def __init__(self, reason: str, contender: Contender):
        super().__init__(reason)
        self.reason, self.stored_bytes = reason, contender.stored_bytes
        self.work = contender.work()


class Race:
    """Runs cases on one device and keeps what came out."""

    def __init__(self, limits: Limits, machine: dict[int, roofs.Roofs] | None = None):
        self.limits = limits
        self.machine = machine or {}  # by threads; 0 for torch's own choice
        self.threads = torch.get_num_threads()

    def roofs(self, case: Case) -> roofs.Roofs:
        """The machine's, with the case's number of threads; measured when first asked for."""
        if case.threads not in self.machine:
            torch.set_num_threads(case.threads or self.threads)
            self.machine[case.threads] = roofs.measure(case.device_type)
        return self.machine[case.threads]

    def run(self, case: Case, names: list[str]) -> dict[str, Result | Exception]:
        """By name, what was measured or why nothing was."""
        machine = self.roofs(case)
        precision = torch.get_float32_matmul_precision()
        torch.set_num_threads(case.threads or self.threads)
        torch.set_float32_matmul_precision(case.precision)
        try:
            return self._run(case, names, machine)
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.set_num_threads(self.threads)
            gc.collect()  # matrices in cycles of closures
            if case.device_type == "cuda":
                torch.cuda.empty_cache()

    def _run(
        self, case: Case, names: list[str], machine: roofs.Roofs
    ) -> dict[str, Result | Exception]:
        torch.manual_seed(0)
        error = torch.randn(case.batch, case.n, device=case.device_type).to(case.dtype)
        storage = Storage(case, _fastest(machine, case.distribution))
        outcome: dict[str, Result | Exception] = {}
        entrants: list[tuple[Contender, int, list[float]]] = []
        for name in names:
            entrant = contender(name, case)
            try:
                result, once = self._qualify(entrant, error, storage, machine)
            except Exception as reason:  # its own benchmark reports it, the others go on
                if not isinstance(reason, LeftOut):
                    traceback.print_exc()
                outcome[name] = reason.with_traceback(None)  # whose frames hold the matrices
                reason.__context__ = None  # so do those of what it came from
                continue
            outcome[name] = result
            entrants.append((entrant, max(1, round(ROUND / once)), result.times))
        shuffle = random.Random(0).shuffle
        began, rounds = time.perf_counter(), 0
        while not self.limits.are_over(rounds, time.perf_counter() - began):
            rounds += 1
            shuffle(entrants)  # nobody always follows the same one
            for entrant, repeats, times in entrants:
                times.append(seconds(entrant, case.device_type, repeats))
        for result in outcome.values():
            if isinstance(result, Result):
                roofs.raise_to(machine, result.work, min(result.times))
        return outcome

    def _qualify(
        self, entrant: Contender, error: torch.Tensor, storage: Storage, machine: roofs.Roofs
    ) -> tuple[Result, float]:
        """The result, still without times, of a contender that fits and is right.

        And about its seconds a call.
        """
        case, work = entrant.case, entrant.work()
        least = roofs.expected_seconds(work, machine)
        needed = entrant.stored_bytes if entrant.name == "naive" or not storage.is_made else 0
        needed += 2 * max(work.written, case.all_signals_bytes) + 2**29
        if needed > available_bytes(case.device_type):
            raise LeftOut("does not fit into memory", entrant)
        if least > self.limits.slowest:
            raise LeftOut("takes too long for this run", entrant)
        try:
            entrant.prepare(error, storage)
            signals, peak = peak_bytes(entrant, case.device_type)
        except ModuleNotFoundError as missing:
            raise LeftOut(f"{missing}", entrant) from None
        except (RuntimeError, MemoryError) as failure:
            if not is_out_of_memory(failure):
                raise
            raise LeftOut("runs out of memory", entrant) from None
        entrant.check(error, signals)
        del signals
        once = least
        if least < SLOW:  # else neither compiling nor warming up matters
            _, peak = peak_bytes(entrant, case.device_type)
            once = min(seconds(entrant, case.device_type) for _ in range(2))
        # A replay allocates nothing; what its graph holds is not the call's.
        measured = None if case.graph else peak + entrant.kept_bytes
        return Result(case, entrant.name, work, entrant.stored_bytes, measured), once


def _fastest(machine: roofs.Roofs, distribution: str) -> str:
    """The backend that makes entries fastest."""
    rates = {name: r[distribution] for name, r in machine.generation.items() if distribution in r}
    rates.pop("torch.randn", None)
    return max(rates, key=rates.__getitem__)
