"""Markdown tables of `python -m benchmarks.compare`, a function for each table."""

from __future__ import annotations

import statistics

from benchmarks.harness import provenance
from benchmarks.harness.shapes import TITLES
from benchmarks.report.texts import time_text, times_text

SIDES = ("before", "after")
CALLS = {  # by their names in the JSON
    "operator": "the operator",
    "project": "`project`",
    "DFA": "DFA",
    "backprop": "backpropagation",
    **{name: TITLES[name] for name in ("views", "stored")},
}
OURS = ("operator", "project", "DFA")  # the others are the same before and after
RIVALS = {"project": ("views", "stored"), "DFA": ("backprop",)}  # of ours


def compare(measured: dict) -> list[str]:
    """Each call before and after, and its instructions where they were counted."""
    calls = [row for case in measured["cases"] for row in case["calls"].values()]
    counted = any("instructions" in row for row in calls)
    found = [line for case in measured["cases"] for line in rows(case, counted)]
    return [*titles(counted), *found, "", about(measured)] if found else []


def titles(counted: bool = False) -> list[str]:
    """The head of that table."""
    names = ["case", "call", "before", "after", "faster by"]
    names += ["instructions before", "after", "fewer by"] * counted
    return [f"| {' | '.join(names)} |", "|---|---|" + "---:|" * (len(names) - 2)]


def rows(case: dict, counted: bool = False) -> list[str]:
    """The lines of a case."""
    lines = []
    for call, row in case["calls"].items():
        cells = [case["case"], CALLS[call]]
        cells += [time_text(row["seconds"][side]) for side in SIDES]
        cells.append(times_text(row["faster"]))
        if counted:
            cells += _instructions(row.get("instructions", {}))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _instructions(counts: dict) -> list[str]:
    """Before, after, and how many times fewer."""
    if not counts:  # of a product with a stored matrix
        return [""] * 3
    cells = [f"{counts[side]:,.0f}" for side in SIDES]
    return [*cells, times_text(counts["before"] / counts["after"])]


def compare_rivals(measured: dict) -> list[str]:
    """How many times faster ours is than what it replaces, before and after."""
    lines = []
    for case in measured["cases"]:
        for ours, rivals in RIVALS.items():
            for rival in rivals:
                if {ours, rival} <= case["calls"].keys():
                    cells = [case["case"], CALLS[ours], CALLS[rival]]
                    cells += [times_text(_faster(case, ours, rival, side)) for side in SIDES]
                    lines.append(f"| {' | '.join(cells)} |")
    names = "| case | ours | how many times faster than | before | after |"
    return [names, "|---|---|---|---:|---:|", *lines] if lines else []


def _faster(case: dict, ours: str, rival: str, side: str) -> float:
    """The median of the ratios within rounds."""
    own, theirs = (case["calls"][name]["times"][side] for name in (ours, rival))
    return statistics.median(their / one for one, their in zip(own, theirs, strict=True))


def about(measured: dict) -> str:
    """What was compared, and how far what is the same in both differs."""
    calls = [item for case in measured["cases"] for item in case["calls"].items()]
    counts = {len(row["times"]["after"]) for _, row in calls}
    rounds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    same = [row["faster"] for name, row in calls if name not in OURS]
    before, after = (provenance.short(one["commit"]) for one in (measured["before"], measured))
    return (
        f"Before: commit {before}; after: commit {after}. Medians of {rounds} rounds; threads: "
        f"{measured['threads']}; backend: `{measured['backend']}`. What is the same in both is "
        f"faster by {times_text(min(same))} to {times_text(max(same))}."
    )
