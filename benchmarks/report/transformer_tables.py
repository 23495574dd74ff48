"""Markdown tables of the experiments on residual networks, a function for each table."""

from __future__ import annotations

from benchmarks.harness import provenance
from benchmarks.report.texts import deviating


def transformer_recipes(measured: dict) -> list[str]:
    """One network, every recipe: loss, the way closed, alignment by point and its null value."""
    part = _part(measured, "recipes")
    points = max((row.get("alignment", {}) for row in part["rows"]), key=len)
    names = [name.replace("blocks.", "block ") for name in points]
    lines = [
        f"| trained by | test loss | way closed | {' | '.join(names)} | null |",
        f"|---|---:|---:|{'---:|' * len(names)}---:|",
    ]
    for row in part["rows"]:
        angles = [_angle(row, point) for point in points]
        nulls = [abs(null["mean"]) for null in row.get("null", {}).values()]
        cells = (row["recipe"]["name"], deviating(*row["loss"].values()), _closed(row), *angles)
        lines.append(f"| {' | '.join(cells)} | {f'{max(nulls):.2f}' if nulls else ''} |")
    return [*lines, "", _runs(part)]


def transformer_sizes(measured: dict) -> list[str]:
    """The same recipes for other depths, widths and lengths of training."""
    return _grid(_part(measured, "sizes"))


def transformer_others(measured: dict) -> list[str]:
    """Other networks, by accuracy too."""
    return _grid(_part(measured, "others"), accuracy=True)


def transformer_tuning(measured: dict) -> list[str]:
    """Networks that backpropagation has trained already."""
    return _grid(_part(measured, "fine-tuning"))


def _grid(part: dict, accuracy: bool = False) -> list[str]:
    """A row for each setting and recipe."""
    title = "test loss | test accuracy, %" if accuracy else "test loss"
    lines = [
        f"| network | trained by | {title} | way closed | alignment, first to last point |",
        f"|---|---|{'---:|' * (2 + accuracy)}---|",
    ]
    before = None
    for row in part["rows"]:
        name = setting(row["setting"])
        cells = [name if name != before else "", row["recipe"]["name"]]
        cells.append(deviating(*row["loss"].values()))
        if accuracy:
            mean, deviation = (100 * value for value in row["accuracy"].values())
            cells.append(f"{mean:.1f} ({deviation:.1f})")
        angles = [_angle(row, point) for point in row.get("alignment", {})]
        lines.append(f"| {' | '.join((*cells, _closed(row), ' '.join(angles)))} |")
        before = name
    return [*lines, "", _runs(part)]


def setting(one: dict) -> str:
    """What was trained, in words."""
    sizes = f"{one['depth']} x {one['width']}"
    return f"{one['network']} {sizes}, {one['data']}, {one['steps']:,} steps"


def _part(measured: dict, name: str) -> dict:
    return next(part for part in measured["parts"] if part["name"] == name)


def _closed(row: dict) -> str:
    if "closed" not in row:
        return ""
    mean, deviation = (100 * value for value in row["closed"].values())
    return f"{mean:.0f} % ({deviation:.0f})"


def _angle(row: dict, point: str) -> str:
    angle = row.get("alignment", {}).get(point)
    return f"{angle['mean']:.2f}" if angle else ""


def _runs(part: dict) -> str:
    seeds = sorted({row["seeds"] for row in part["rows"]})
    count = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    commits = ", ".join(map(provenance.short, part["run_commits"]))
    return f"{count}, trained at commit {commits}."
