"""Times all contenders of a case in interleaved rounds, so background load affects all alike.

A contender is timed only after its result has passed the correctness check. One that does not fit
into memory, or whose least time is longer than the run allows, is left out with the reason. The
roofs are raised to the best rates that any round shows.
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

SLOW = 0.2  # seconds; a call that must take longer is not warmed up
ROUND = 0.02  # seconds; a shorter call is repeated within a round to take about as long

# Why a contender is left out. A missing module is named instead.
NO_ROOM = "does not fit into memory"
OUT_OF_MEMORY = "runs out of memory"
TOO_LONG = "takes too long for this run"


@dataclass(frozen=True)
class Limits:
    """How long a run may take.

    A case ends after `most` rounds, or once it has had `few` rounds and `budget` seconds, or after
    `patience` seconds. A contender whose call takes more than `slowest` seconds is left out, unless
    a promise is about it.
    """

    budget: float
    patience: float
    few: int
    most: int
    slowest: float

    def are_over(self, rounds: int, elapsed: float) -> bool:
        enough = rounds >= self.few and elapsed > self.budget
        return enough or rounds >= self.most or (rounds > 0 and elapsed > self.patience)


QUICK = Limits(budget=1.0, patience=20.0, few=5, most=15, slowest=8.0)
FULL = Limits(budget=2.0, patience=120.0, few=5, most=41, slowest=15.0)


@dataclass
class Result:
    """One contender in one case. `times` are seconds a call, in rounds that all shared."""

    case: Case
    contender: str
    work: roofs.Work
    stored_bytes: int
    peak_bytes: int | None  # beyond the stored matrices, with the signals
    times: list[float] = field(default_factory=list)


class LeftOut(Exception):
    """Why a contender does not take part, with its stored bytes and its work."""

    def __init__(self, reason: str, contender: Contender):
        super().__init__(reason)
        self.reason, self.stored_bytes = reason, contender.stored_bytes
        self.work = contender.work()


class Race:
    """Runs cases on one device, under roofs that the cases share."""

    def __init__(self, limits: Limits, machine: dict[int, roofs.Roofs] | None = None):
        self.limits = limits
        self.machine = machine or {}  # by threads; 0 for torch's own choice
        self.threads = torch.get_num_threads()

    def roofs(self, case: Case) -> roofs.Roofs:
        """The roofs with the case's number of threads, measured when first needed."""
        if case.threads not in self.machine:
            torch.set_num_threads(case.threads or self.threads)
            self.machine[case.threads] = roofs.measure(case.device_type)
        return self.machine[case.threads]

    def run(self, case: Case, names: list[str]) -> dict[str, Result | Exception]:
        """The result of each contender, or the exception that says why there is none."""
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
            except Exception as reason:  # its own benchmark reports it, and the others go on
                if not isinstance(reason, LeftOut):
                    traceback.print_exc()
                # The frames of a traceback, its own or its context's, would hold the matrices.
                outcome[name] = reason.with_traceback(None)
                reason.__context__ = None
                continue
            outcome[name] = result
            entrants.append((entrant, max(1, round(ROUND / once)), result.times))
        shuffle = random.Random(0).shuffle
        began, rounds = time.perf_counter(), 0
        while not self.limits.are_over(rounds, time.perf_counter() - began):
            rounds += 1
            shuffle(entrants)  # so that none always follows the same other one
            for entrant, repeats, times in entrants:
                times.append(seconds(entrant, case.device_type, repeats))
        for result in outcome.values():
            if isinstance(result, Result):
                roofs.raise_to(machine, result.work, min(result.times))
        return outcome

    def _qualify(
        self, entrant: Contender, error: torch.Tensor, storage: Storage, machine: roofs.Roofs
    ) -> tuple[Result, float]:
        """Check that a contender fits and is right; its result without times, its seconds a call.

        The seconds are a first estimate, for the number of repeats in a round.
        """
        case, work = entrant.case, entrant.work()
        least = roofs.expected_seconds(work, machine)
        needed = entrant.stored_bytes if entrant.name == "naive" or not storage.is_made else 0
        needed += 2 * max(work.written, case.all_signals_bytes) + 2**29
        if needed > available_bytes(case.device_type):
            raise LeftOut(NO_ROOM, entrant)
        asked = {name for one in case.all_promises for name in (one.ours, one.rival)}
        if least > self.limits.slowest and entrant.name not in asked:
            raise LeftOut(TOO_LONG, entrant)
        try:
            entrant.prepare(error, storage)
            signals, peak = peak_bytes(entrant, case.device_type)
        except ModuleNotFoundError as missing:
            raise LeftOut(f"{missing}", entrant) from None
        except (RuntimeError, MemoryError) as failure:
            if not is_out_of_memory(failure):
                raise
            raise LeftOut(OUT_OF_MEMORY, entrant) from None
        entrant.check(error, signals)
        del signals
        once = least
        if least < SLOW:  # a longer call hides what compiling and warming up cost
            _, peak = peak_bytes(entrant, case.device_type)
            once = min(seconds(entrant, case.device_type) for _ in range(2))
        # A replay allocates nothing: the graph holds the memory, not the call.
        measured = None if case.graph else peak + entrant.kept_bytes
        return Result(case, entrant.name, work, entrant.stored_bytes, measured), once


def _fastest(machine: roofs.Roofs, distribution: str) -> str | None:
    """The backend that generates entries fastest; None for the preferred one, if none was timed."""
    rates = {name: r[distribution] for name, r in machine.generation.items() if distribution in r}
    rates.pop("torch.randn", None)
    return max(rates, key=rates.__getitem__, default=None)
