"""Results as tables for people and as data for README and figures.

    python benchmarks/report.py FILE    shows a run's JSON again and draws its figures beside it

Each contender's time is the median of its rounds; "faster" is the median over the rounds of the two
times of a round. Each contender's limit is that of its own work: what it has to write and read,
multiply and generate, at the best rates that this machine has shown in the same run.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import roofs
from race import LeftOut, Result
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from shapes import Case, title

from dfa_kernels.ops import BACKENDS

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


# --- tables ---


def time_text(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def bytes_text(count: float | None) -> str:
    """Three digits and a decimal unit."""
    if count is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def times_text(times: float) -> str:
    """How many times faster; a small fraction keeps a digit."""
    return f"{times:.2f}x" if times > 0.1 else f"{times:.1g}x"


def progress(case: dict) -> Table:
    """One case, as soon as it has been run."""
    best = best_of_ours(case)
    columns = ("contender", "time", "rounds", "memory", "of its limit, which is")
    table = Table(*columns, box=None, padding=(0, 2))
    table.add_column(f"{best} is faster by" if best else "")
    for name, row in sorted(case["contenders"].items(), key=lambda item: item[1]["seconds"]):
        faster = ratio(case, best, name) if best and name != best else None
        table.add_row(
            f"[bold green]{name}[/]" if name in BACKENDS else title(name),
            time_text(row["seconds"]),
            str(row["rounds"]),
            bytes_text(memory(row)),
            f"{row['fraction_of_bound']:.0%} {row['limit']}",
            "" if faster is None else times_text(faster),
        )
    for name, why in case["left_out"].items():
        reason = why["reason"]
        if "stored_bytes" in why:
            reason += f" (stores {bytes_text(why['stored_bytes'])}, "
            reason += f"at least {time_text(why['least_seconds'])})"
        table.add_row(f"[dim]{title(name)}", "[dim]-", "", "", f"[dim]{escape(reason)}")
    return table


def promises(results: dict) -> Table:
    """Every promised ratio with its target."""
    table = Table("case", "ours", "against", "faster", "asked", "aim", title="promises")
    for case in results["cases"]:
        for promise in case["promises"]:
            is_rate = promise["rival"] == "entries/s"
            show = (lambda x: f"{x:.2g}/s") if is_rate else times_text
            value, asked = promise["reached"], promise["at_least"]
            color = "" if value is None else "[green]" if value >= asked else "[red]"
            table.add_row(
                case["case"],
                promise["ours"],
                title(promise["rival"]),
                "not measured" if value is None else color + show(value),
                show(asked),
                show(promise["aim"]) if promise["aim"] else "",
            )
    return table


def machine(results: dict) -> Table:
    """The roofs of the machine."""
    table = Table("threads", "roof", "rate", title="this machine at its best in this run")
    for one in results["roofs"].values():
        threads = str(one["threads"])
        for launch, latency in one["latency"].items():
            table.add_row(threads, f"a {launch}", time_text(latency))
        for kind in ("write", "memory"):
            rates = {int(size): rate for size, rate in one[kind].items()}
            for size in (2**16, 2**25, roofs.BEYOND_CACHES):
                rate = roofs.bandwidth(rates, size) / 1e9
                table.add_row(threads, f"{kind}, {bytes_text(size)}", f"{rate:.0f} GB/s")
        for name, rate in one["multiply"].items():
            table.add_row(threads, f"products, {name}", f"{2 * rate / 1e12:.3g} TFLOP/s")
        for source, rates in one["generation"].items():
            for distribution, rate in rates.items():
                table.add_row(threads, f"{distribution} entries, {source}", f"{rate:.2g}/s")
    return table


def console() -> Console:
    """As wide as the terminal; wide enough for a table where there is none."""
    return Console(width=None if sys.stdout.isatty() else 120)


def show(console: Console, results: dict) -> None:
    """What a run ends with."""
    console.print(machine(results))
    if any(case["promises"] for case in results["cases"]):
        console.print(promises(results))


def draw(console: Console, results: dict, path: Path) -> None:
    """Draw the figures beside the file of a run, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print(f"no matplotlib here; where it is: python benchmarks/report.py {path}")
        return
    import figures

    for drawn in figures.draw(results, path.parent):
        console.print(f"drawn: {drawn}")


def main(path: Path) -> None:
    results = json.loads(path.read_text())
    out = console()
    for case in results["cases"]:
        out.print(f"\n[bold]{case['case']}[/]")
        out.print(progress(case))
    show(out, results)
    draw(out, results, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
