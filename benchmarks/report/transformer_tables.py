"""Markdown tables of the experiments on residual networks, a function for each table."""

from __future__ import annotations

from benchmarks.harness import provenance
from benchmarks.report.texts import deviating

SHOWN = 6  # points
RESULTS = "test loss | accuracy, % | way closed, % | beyond the embedding, % | alignment by point"
ALIGN = "---:|---:|---:|---:|---|"


def transformer_main(measured: dict) -> list[str]:
    """One network, trained for two lengths in the main ways."""
    return _grid(_part(measured, "main"))


def transformer_variants(measured: dict) -> list[str]:
    """The same network by recipes with one thing changed; also null values and the output layer."""
    part = _part(measured, "variants")
    lines = [
        f"| trained by | {RESULTS} | null | output |",
        f"|---|{ALIGN}---:|---:|",
    ]
    for row in part["rows"]:
        nulls = [null["mean"] for null in row.get("null", {}).values()]
        null, output = f"{max(nulls):.2f}" if nulls else "", f"{row['output']['mean']:.2f}"
        cells = (row["recipe"]["name"], *_results(row), null, output)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _runs(part)]


def transformer_sizes(measured: dict) -> list[str]:
    """Other depths and widths."""
    return _grid(_part(measured, "sizes"))


def transformer_others(measured: dict) -> list[str]:
    """Other networks."""
    residual, plain = (_part(measured, name) for name in ("others", "perceptron"))
    commits = sorted({*residual["run_commits"], *plain["run_commits"]})
    return _grid({"rows": residual["rows"] + plain["rows"], "run_commits": commits})


def transformer_tuning(measured: dict) -> list[str]:
    """Networks that backpropagation has trained already."""
    return _grid(_part(measured, "fine-tuning"))


def _grid(part: dict) -> list[str]:
    """A row for each setting and recipe."""
    lines = [f"| network | trained by | {RESULTS} |", f"|---|---|{ALIGN}"]
    before = None
    for row in part["rows"]:
        name = setting(row["setting"])
        cells = [name if name != before else "", row["recipe"]["name"], *_results(row)]
        lines.append(f"| {' | '.join(cells)} |")
        before = name
    return [*lines, "", _runs(part)]


def _results(row: dict) -> list[str]:
    """The cells of RESULTS."""
    loss = row["loss"]["mean"]
    cells = [deviating(*row["loss"].values()) if row["seeds"] > 1 else f"{loss:.3f}"]
    cells.append(_percent(row, "accuracy", digits=1))
    return [*cells, _percent(row, "closed"), _percent(row, "beyond"), _angles(row)]


def setting(one: dict) -> str:
    """What was trained, in words."""
    return f"{one['network']} {one['depth']} x {one['width']}, {one['steps']:,} steps"


def _part(measured: dict, name: str) -> dict:
    return next(part for part in measured["parts"] if part["name"] == name)


def _percent(row: dict, key: str, digits: int = 0) -> str:
    """Mean in percent, and the deviation if there are several seeds."""
    if key not in row:
        return ""
    mean, deviation = (100 * value for value in row[key].values())
    return f"{mean:.{digits}f}" + f" ({deviation:.{digits}f})" * (row["seeds"] > 1)


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
