"""Writes the README's tables of figures from the committed results; figures are never typed.

    python benchmarks/readme_tables.py

A table stands in the README between `<!-- table NAME FILE -->` and `<!-- end -->`, where NAME is a
function below and FILE a result under benchmarks/results/.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def source(measured: dict) -> str:
    """Where and when the figures of a table come from."""
    return (
        f"{measured['device']}; torch {measured['versions']['torch']}, "
        f"{measured['date']}, commit {measured['commit'][:9]}."
    )


def cpu_kernels(measured: dict) -> list[str]:
    """`benchmarks/cpu_kernels.py`: times against what is replaced, and against the limit."""
    lines = [
        "| case | replaces | time | faster | of the limit, which is |",
        "|---|---|---:|---:|---|",
    ]
    for case in measured["cases"]:
        threads = "" if case["threads"] == 2 else ", one thread"
        lines.append(
            f"| {case['name']}{threads} | {case['against']} | {1e3 * case['seconds']:.3g} ms "
            f"| {case['speedup']:.2f}x | {case['fraction_of_limit']:.0%}, {case['limit']} |"
        )
    memory = measured["peak_memory"]
    roofs = measured["roofs"]["2"]
    return [
        *lines,
        "",
        f"A layer of 3,211,264 with n = 1000 and M = 4 takes {memory['seconds']:.2f} s and "
        f"{max(memory['extra_mib'], 0):.1f} MiB beyond its signal; the stored matrix would take "
        f"12.8 GB. This machine, two threads: {roofs['write'] / 1e9:.0f} GB/s written, "
        f"{2 * roofs['multiply fp32'] / 1e9:.0f} GFLOP/s in fp32, {roofs['normal'] / 1e9:.1f}e9 "
        f"normal and {roofs['rademacher'] / 1e9:.0f}e9 rademacher entries made and used a second.",
    ]


def training_step(measured: dict) -> list[str]:
    """`benchmarks/training_step.py`: a step by DFA as a fraction of one by backpropagation."""
    lines = [
        "| network | backpropagation | DFA | of it | a free projection would make it |",
        "|---|---:|---:|---:|---:|",
    ]
    for case in measured["cases"]:
        lines.append(
            f"| {case['case']}, batch {case['batch']} | {1e3 * case['seconds']['backprop']:.0f} ms "
            f"| {1e3 * case['seconds']['DFA']:.0f} ms | {case['ratio']['DFA']:.2f} "
            f"| {case['limit']:.2f} |"
        )
    return lines


def render(readme: str) -> str:
    """The README with every table made anew."""

    def table(match: re.Match) -> str:
        measured = json.loads((RESULTS / match[3]).read_text())
        lines = [*globals()[match[2]](measured), "", source(measured), ""]
        return match[1] + "\n" + "\n".join(lines) + "\n" + match[4]

    return BLOCK.sub(table, readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
