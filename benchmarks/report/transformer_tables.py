"""Markdown tables of the experiments on residual networks, a function for each table."""

from __future__ import annotations

from benchmarks.harness import provenance
from benchmarks.report.texts import deviating

SHOWN = 6  # points


def transformer_main(measured: dict) -> list[str]:
    """One network, trained for two lengths in the main ways."""
    return _grid(_part(measured, "main"))


def transformer_variants(measured: dict) -> list[str]:
    """The same network by recipes with one thing changed; also null values and the output layer."""
    part = _part(measured, "variants")
    lines = [
        "| trained by | test loss | way closed | beyond the embedding "
        "| alignment, first to last point | null | output |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    for row in part["rows"]:
        nulls = [null["mean"] for null in row.get("null", {}).values()]
        cells = (
            row["recipe"]["name"],
            deviating(*row["loss"].values()),
            _percent(row, "closed"),
            _percent(row, "beyond"),
            _angles(row),
            f"{max(nulls):.2f}" if nulls else "",
            f"{row['output']['mean']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _runs(part)]


def transformer_sizes(measured: dict) -> list[str]:
    """Other depths and widths."""
    return _grid(_part(measured, "sizes"))


def transformer_others(measured: dict) -> list[str]:
    """Other networks, by accuracy too."""
    residual, plain = (_part(measured, name) for name in ("others", "perceptron"))
    return _grid(_joined(residual, plain), accuracy=True)


def transformer_tuning(measured: dict) -> list[str]:
    """Networks that backpropagation has trained already."""
    return _grid(_part(measured, "fine-tuning"))


def _grid(part: dict, accuracy: bool = False) -> list[str]:
    """A row for each setting and recipe."""
    title = "test loss | test accuracy, %" if accuracy else "test loss"
    lines = [
        f"| network | trained by | {title} | way closed | beyond the embedding "
        "| alignment, first to last point |",
        f"|---|---|{'---:|' * (3 + accuracy)}---|",
    ]
    before = None
    for row in part["rows"]:
        name = setting(row["setting"])
        cells = [name if name != before else "", row["recipe"]["name"]]
        cells.append(deviating(*row["loss"].values()))
        if accuracy:
            mean, deviation = (100 * value for value in row["accuracy"].values())
            cells.append(f"{mean:.1f} ({deviation:.1f})")
        cells += [_percent(row, "closed"), _percent(row, "beyond"), _angles(row)]
        lines.append(f"| {' | '.join(cells)} |")
        before = name
    return [*lines, "", _runs(part)]


def setting(one: dict) -> str:
    """What was trained, in words."""
    return f"{one['network']} {one['depth']} x {one['width']}, {one['steps']:,} steps"


def _part(measured: dict, name: str) -> dict:
    return next(part for part in measured["parts"] if part["name"] == name)


def _joined(*parts: dict) -> dict:
    commits = {commit for part in parts for commit in part["run_commits"]}
    return {"rows": [row for part in parts for row in part["rows"]], "run_commits": sorted(commits)}


def _percent(row: dict, key: str) -> str:
    if key not in row:
        return ""
    mean, deviation = (100 * value for value in row[key].values())
    return f"{mean:.0f} % ({deviation:.0f})"


def _angles(row: dict) -> str:
    """The alignment at each point; of many, at six that are evenly apart."""
    angles = [angle["mean"] for angle in row.get("alignment", {}).values()]
    if len(angles) > SHOWN:
        last = len(angles) - 1
        angles = [angles[round(place * last / (SHOWN - 1))] for place in range(SHOWN)]
    return " ".join(f"{angle:.2f}" for angle in angles)


def _runs(part: dict) -> str:
    seeds = sorted({row["seeds"] for row in part["rows"]})
    count = f"{seeds[-1]} seeds" if seeds[-1] > 1 else "1 seed"
    if len(seeds) > 1:
        count = f"{seeds[0]} to {count}"
    commits = ", ".join(map(provenance.short, part["run_commits"]))
    return f"{count}, trained at commit {commits}."
