"""A run's results as data for tables, pages and figures.

Each contender's time is the median of its rounds; "faster" is the median over the rounds of the two
times of a round. Each contender's limit is that of its own work: what it has to write and read,
multiply and generate, at the best rates that this machine has shown in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict

from benchmarks.harness import roofs
from benchmarks.harness.race import LeftOut, Result
from benchmarks.harness.shapes import Case
from dfa_kernels.backends.registry import BACKENDS

# --- from what a race returns to what is kept ---


def row(result: Result, machine: roofs.Roofs) -> dict:
    """One contender in one case."""
    median = statistics.median(result.times)
    bound, limit = roofs.bound(result.work, machine)
    return {
        "seconds": median,
        "rounds": len(result.times),
        "bound_seconds": bound,
        "fraction_of_bound": bound / median,
        "limit": limit,
        "stored_bytes": result.stored_bytes,
        "peak_bytes": result.peak_bytes,
        "work": asdict(result.work),
        "times": [float(f"{time:.5g}") for time in result.times],
    }


def case_results(case: Case, outcome: dict[str, Result | Exception], machine: roofs.Roofs) -> dict:
    """All contenders of one case, those left out, and what was promised."""
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
    """Everything a run has measured, as JSON's types."""
    return {
        "roofs": {str(threads): asdict(one) for threads, one in machine.items()},
        "cases": [
            case_results(cases[name], outcome, machine[cases[name].threads])
            for name, outcome in outcomes.items()
        ],
    }


# --- what follows from it ---


def ratio(case: dict, ours: str, rival: str) -> float | None:
    """How many times faster `ours` is, or None where one of them was not timed."""
    rows = case["contenders"]
    if ours not in rows or rival not in rows:
        return None
    pairs = zip(rows[rival]["times"], rows[ours]["times"], strict=True)
    return statistics.median(theirs / own for theirs, own in pairs)


def reached(case: dict, ours: str, rival: str) -> float | None:
    """What a promise is held to: a ratio, or entries made and used a second."""
    if rival != "entries/s":
        return ratio(case, ours, rival)
    row = case["contenders"].get(ours)
    return row and row["work"]["entries"] / row["seconds"]


def fastest(case: dict, names: Iterable[str]) -> str | None:
    """Of those that were timed in a case, or None."""
    rows = case["contenders"]
    timed = [name for name in names if name in rows]
    return min(timed, key=lambda name: rows[name]["seconds"], default=None)


def best_of_ours(case: dict) -> str | None:
    """The fastest of our backends in a case."""
    return fastest(case, BACKENDS)


def fastest_stored(case: dict) -> str | None:
    """The fastest of those that keep a matrix."""
    return fastest(case, [name for name, row in case["contenders"].items() if row["stored_bytes"]])


def memory(row: dict) -> int | None:
    """Bytes that a contender keeps, and takes beyond that in a call, signals included."""
    return None if row["peak_bytes"] is None else row["stored_bytes"] + row["peak_bytes"]
