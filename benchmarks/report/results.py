"""A run's results as data, and what follows from them.

A contender's time is the median of its rounds. How many times faster one is than another is the
median, over the rounds, of the ratio of their times in the same round. A contender's bound is that
of its own work: what it must move, multiply and generate, under the roofs measured in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict

from benchmarks.harness import roofs
from benchmarks.harness.race import LeftOut, Result
from benchmarks.harness.shapes import RATE, WRITE_ROOF, Case
from dfa_kernels.backends.registry import BACKENDS

# --- from a race to JSON ---


def row(result: Result, machine: roofs.Roofs) -> dict:
    """One contender in one case."""
    median = statistics.median(result.times)
    parts = roofs.limits(result.work, machine)
    bound, limit = roofs.bound(result.work, machine)
    return {
        "seconds": median,
        "rounds": len(result.times),
        "bound_seconds": bound,
        "fraction_of_bound": bound / median,
        "limit": limit,
        "fraction_of_write_roof": parts["write bandwidth"] / median,
        "stored_bytes": result.stored_bytes,
        "peak_bytes": result.peak_bytes,
        "work": asdict(result.work),
        "times": [float(f"{time:.5g}") for time in result.times],
    }


def case_results(case: Case, outcome: dict[str, Result | Exception], machine: roofs.Roofs) -> dict:
    """One case: its contenders, those left out and why, and its promises."""
    entry = {
        "case": case.name,
        "layers": len(case.sizes),
        "largest": max(case.sizes),
        "units": sum(case.sizes),
        "batch": case.batch,
        "n": case.n,
        "dtype": roofs.NAMES[case.dtype],
        "precision": case.precision,
        "distribution": case.distribution,
        "graph": case.graph,
        "matrix": case.matrix,
        "threads": machine.threads,
        "signal_bytes": case.written_bytes,
        "series": case.series,
        "x": case.x,
        "contenders": {},
        "left_out": {},
    }
    for name, one in outcome.items():
        if isinstance(one, Result):
            entry["contenders"][name] = row(one, machine)
        elif isinstance(one, LeftOut):
            least = roofs.expected_seconds(one.work, machine)
            facts = {"stored_bytes": one.stored_bytes, "least_seconds": least}
            entry["left_out"][name] = {"reason": one.reason} | facts
        else:
            entry["left_out"][name] = {"reason": f"{type(one).__name__}: {one}"[:300]}
    entry["promises"] = [
        asdict(promise) | {"reached": reached(entry, promise.ours, promise.rival)}
        for promise in case.all_promises
    ]
    return entry


def measured(
    outcomes: dict[str, dict[str, Result | Exception]],
    cases: dict[str, Case],
    machine: dict[int, roofs.Roofs],
) -> dict:
    """Everything that a run has measured, in types of JSON."""
    return {
        "roofs": {str(threads): asdict(one) for threads, one in machine.items()},
        "cases": [
            case_results(cases[name], outcome, machine[cases[name].threads])
            for name, outcome in outcomes.items()
        ],
    }


# --- what follows ---


def ratio(case: dict, ours: str, rival: str) -> float | None:
    """How many times faster `ours` is, or None if one of the two was not timed."""
    rows = case["contenders"]
    if ours not in rows or rival not in rows:
        return None
    pairs = zip(rows[rival]["times"], rows[ours]["times"], strict=True)
    return statistics.median(theirs / own for theirs, own in pairs)


def reached(case: dict, ours: str, rival: str) -> float | None:
    """What a promise is compared with.

    A ratio, the entries generated and used a second, or the fraction of the write bandwidth.
    """
    if rival not in (RATE, WRITE_ROOF):
        return ratio(case, ours, rival)
    row = case["contenders"].get(ours)
    if rival == RATE:
        return row and row["work"]["entries"] / row["seconds"]
    return row and row["fraction_of_write_roof"]


def fastest(case: dict, names: Iterable[str]) -> str | None:
    """The fastest of `names` in a case, or None if none was timed."""
    rows = case["contenders"]
    timed = [name for name in names if name in rows]
    return min(timed, key=lambda name: rows[name]["seconds"], default=None)


def best_of_ours(case: dict) -> str | None:
    """The fastest of our backends in a case; the structured projection is apart from them."""
    return fastest(case, BACKENDS)


def fastest_stored(case: dict) -> str | None:
    """The fastest contender with a stored matrix."""
    return fastest(case, [name for name, row in case["contenders"].items() if row["stored_bytes"]])


def memory(row: dict) -> int | None:
    """Bytes of a contender's matrices, plus the peak of a call beyond them."""
    return None if row["peak_bytes"] is None else row["stored_bytes"] + row["peak_bytes"]
