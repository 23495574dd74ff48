"""Writes the README's tables of figures from the committed results; figures are never typed.

    python benchmarks/readme_tables.py

A table stands in the README between `<!-- table NAME FILE -->` and `<!-- end -->`, where NAME is a
function below or in speed_tables.py and FILE a result under benchmarks/results/.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import provenance
from shapes import TITLES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What the paper's tables of memory call the ways to store.
STORAGES = {"naive": TITLES["naive"], "shared": TITLES["stored"], "seeded": "from the seed"}
# Bytes below which resident memory says more of the allocator than of the work.
LEAST_PEAK = 1e6
BLOCK = re.compile(r"(<!-- table (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


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


def size(count: float) -> str:
    """Bytes to read."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((f"{count / u:.3g} {name}" for name, u in units if count >= u), f"{count:.0f} B")


def peak(cell: dict) -> str:
    """A measured peak, or why there is none."""
    if "does not fit" in cell:
        return f"does not fit ({size(cell['does not fit'])})"
    if "peak" not in cell:
        return "not measured"
    return size(cell["peak"]) if cell["peak"] >= LEAST_PEAK else f"under {size(LEAST_PEAK)}"


def paper_table1(measured: dict) -> list[str]:
    """`python -m benchmarks.paper table1`: bytes of feedback matrices, and measured peaks."""
    titles = " | peak | ".join(STORAGES.values())
    lines = [f"| network | {titles} | peak |", "|---|---:|---:|---:|---:|---:|---:|"]
    for row in measured["rows"]:
        cells = [f"{size(row[way]['stored'])} | {peak(row[way])}" for way in STORAGES]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def runs(measured: dict) -> str:
    """How much training is behind a table, and by which code; the table itself may be younger."""
    seeds, epochs = measured["rows"][0]["seeds"], measured["settings"]["epochs"]
    commits = ", ".join(map(provenance.short, measured["run_commits"]))
    return f"{seeds} seeds, {epochs} epochs, trained at commit {commits}."


def paper_practices(measured: dict) -> list[str]:
    """`python -m benchmarks.paper table2 table4`: accuracy, alignment, and the paper's claims."""
    rows = {(row["practice"], row["mode"]): row for row in measured["rows"]}
    practices = dict.fromkeys(row["practice"] for row in measured["rows"])
    layers = rows[next(iter(practices)), "dfa"]["alignment"]

    def percent(practice: str, mode: str) -> str:
        if (practice, mode) not in rows:
            return ""
        accuracy = rows[practice, mode]["test_accuracy"]
        return f"{100 * accuracy['mean']:.1f} ({100 * accuracy['deviation']:.1f})"

    lines = [
        f"| {measured['data']}: test accuracy, % | BP | DFA | shallow | {' | '.join(layers)} |",
        f"|---|---:|---:|---:|{'---:|' * len(layers)}",
    ]
    for practice in practices:
        angles = rows[practice, "dfa"]["alignment"].values()
        cosines = (f"{angle['mean']:.2f} ({angle['deviation']:.2f})" for angle in angles)
        accuracies = (percent(practice, mode) for mode in ("backprop", "dfa", "shallow"))
        name = practice.replace("|", "\\|")
        lines.append(f"| {name} | {' | '.join((*accuracies, *cosines))} |")
    found: dict[str, list[str]] = {"yes": [], "no": [], "unclear": []}
    for claim in measured["claims"]:
        found[claim["holds"]].append(f"{claim['better']} over {claim['worse']}")
    names = {"yes": "As the paper says", "no": "The other way round", "unclear": "Unclear"}
    held = (f"{names[key]}: {', '.join(claims)}." for key, claims in found.items() if claims)
    return [*lines, "", f"{runs(measured)} Alignment by practice. " + " ".join(held)]


def paper_figure4(measured: dict) -> list[str]:
    """`python -m benchmarks.paper figure4`: beside what was published for other data."""
    rows = {(row["practice"], row["mode"]): row for row in measured["rows"]}
    published, agreement = measured["published"], measured["rank_agreement"]
    data, theirs = measured["data"], published["data"]
    lines = [
        f"| b | {data}: accuracy, cos(beta) | {theirs}, as published | {data}: b units, DFA "
        "| accuracy by BP |",
        "|---:|---:|---:|---:|---:|",
    ]
    numbers = zip(
        *(published[key] for key in ("bottlenecks", "test_accuracy", "alignment")), strict=True
    )
    for size_of, accuracy, angle in numbers:
        masked, narrow = (
            f"{100 * row['test_accuracy']['mean']:.1f}, {row['alignment']['layer 2']['mean']:.3f}"
            for row in (rows[f"{kind} {size_of}", "dfa"] for kind in ("masked", "narrow"))
        )
        backprop = rows[f"narrow {size_of}", "backprop"]["test_accuracy"]["mean"]
        cells = (masked, f"{accuracy:.1f}, {angle:.3f}", narrow, f"{100 * backprop:.1f}")
        lines.append(f"| {size_of} | {' | '.join(cells)} |")
    found = {key: "none" if v is None else f"{v:+.3f}" for key, v in agreement.items()}
    ranks = f"{found['test_accuracy']} for accuracy, {found['alignment']} for alignment"
    return [*lines, "", f"{runs(measured)} Rank correlation with the published over b: {ranks}."]


def paper_vgg16(measured: dict) -> list[str]:
    """`python -m benchmarks.paper vgg16`: peak memory and time of a training step."""
    side, batch = measured["resolution"], measured["batch"]
    lines = [
        f"| VGG-16, {side}x{side}, batch {batch} | matrices | peak memory | a step |",
        "|---|---:|---:|---:|",
    ]
    for row in measured["rows"]:
        seconds = f"{row['seconds']:.2f} s" if "seconds" in row else ""
        lines.append(f"| {row['name']} | {size(row['stored'])} | {peak(row)} | {seconds} |")
    return lines


def render(readme: str) -> str:
    """The README with every table made anew."""
    import speed_tables  # here, because benchmarks.paper takes only the formats of this module

    tables = globals() | vars(speed_tables)

    def table(match: re.Match) -> str:
        measured = json.loads((RESULTS / match[3]).read_text())
        lines = [*tables[match[2]](measured), "", f"{provenance.source(measured)}.", ""]
        return match[1] + "\n" + "\n".join(lines) + "\n" + match[4]

    return BLOCK.sub(table, readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
