"""A run's results in the terminal."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.harness import roofs
from benchmarks.harness.shapes import is_ours, title
from benchmarks.report import compare_tables, vocabulary_tables
from benchmarks.report.results import best_of_ours, memory, ratio
from benchmarks.report.texts import bytes_text, promise_text, rate_text, time_text, times_text


def progress(case: dict) -> Table:
    """One case, shown as soon as it has been run."""
    best = best_of_ours(case)
    columns = ("contender", "time", "rounds", "memory", "of roofline, bound by")
    table = Table(*columns, box=None, padding=(0, 2))
    table.add_column(f"{best} is faster by" if best else "")
    for name, row in sorted(case["contenders"].items(), key=lambda item: item[1]["seconds"]):
        faster = ratio(case, best, name) if best and name != best else None
        table.add_row(
            f"[bold green]{name}[/]" if is_ours(name) else title(name),
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
    """Each promised ratio, what was reached, and what was asked."""
    table = Table("case", "ours", "against", "faster", "asked", "aim", title="promises")
    for case in results["cases"]:
        for promise in case["promises"]:
            value, asked, rival = promise["reached"], promise["at_least"], promise["rival"]
            color = "" if value is None else "[green]" if value >= asked else "[red]"
            table.add_row(
                case["case"],
                promise["ours"],
                title(rival),
                "not measured" if value is None else color + promise_text(rival, value),
                promise_text(rival, asked),
                promise_text(rival, promise["aim"]) if promise["aim"] else "",
            )
    return table


def machine(results: dict) -> Table:
    """The roofs: the best rates seen in this run."""
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
        added = roofs.addition_rate(one["multiply"], one.get("addition", {}))
        table.add_row(threads, "additions, fp32", rate_text(added))
        for source, rates in one["generation"].items():
            for distribution, rate in rates.items():
                table.add_row(threads, f"{distribution} entries, {source}", rate_text(rate))
    return table


def console() -> Console:
    """As wide as the terminal, or wide enough for a table where there is none."""
    return Console(width=None if sys.stdout.isatty() else 120)


def show(console: Console, results: dict) -> None:
    """The tables at the end of a run."""
    console.print(machine(results))
    if any(case["promises"] for case in results["cases"]):
        console.print(promises(results))


def draw(console: Console, results: dict, path: Path) -> None:
    """Draw the figures beside the file of a run, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print(f"no matplotlib here; where it is: python -m benchmarks.report {path}")
        return
    from benchmarks.report import figures

    for drawn in figures.draw(results, path.parent):
        console.print(f"drawn: {drawn}")


def show_all(console: Console, results: dict) -> None:
    """A whole run, as it was shown while it ran; of `large_vocabulary` and `compare` the tables."""
    lines = []
    if "vocabulary" in results:
        lines = vocabulary_tables.large_vocabulary(results)
    elif "before" in results:
        lines = [*compare_tables.compare(results), "", *compare_tables.compare_rivals(results)]
    if lines:
        return console.print("\n".join(lines), soft_wrap=True, markup=False)
    for case in results["cases"]:
        console.print(f"\n[bold]{case['case']}[/]")
        console.print(progress(case))
    show(console, results)
