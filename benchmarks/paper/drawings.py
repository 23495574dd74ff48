"""Figures of the paper's experiments.

python -m benchmarks.paper.drawings FILE ...    draws results again from their JSON, beside it
"""

from __future__ import annotations

import json
import math
import sys
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import provenance
from benchmarks.paper import published
from benchmarks.paper.tables import MODES
from benchmarks.report.texts import LEAST_PEAK, STORAGES, bytes_text


def bars(axes: Axes, groups: list[str], series: dict[str, list[dict | None]]) -> None:
    """Draw a bar for each group and series, with its deviation; None leaves a gap."""
    width = 0.8 / len(series)
    for index, (label, values) in enumerate(series.items()):
        here = [(i, value) for i, value in enumerate(values) if value is not None]
        axes.bar(
            [i + (index - (len(series) - 1) / 2) * width for i, _ in here],
            [value["mean"] for _, value in here],
            width,
            yerr=[value["deviation"] for _, value in here],
            error_kw={"elinewidth": 0.8},
            label=label,
        )
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def practices(summary: dict) -> Figure:
    """Tables 2 and 4: accuracy by way of training, alignment by layer."""
    names = list(dict.fromkeys(row["practice"] for row in summary["rows"]))
    rows = {(row["practice"], row["mode"]): row for row in summary["rows"]}
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 8), layout="constrained")
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in summary["rows"])]
    accuracies = {
        MODES[mode]: [rows.get((name, mode), {}).get("test_accuracy") for name in names]
        for mode in modes
    }
    bars(above, names, accuracies)
    above.set(ylabel="test accuracy", title=f"{summary['title']}, on {summary['data']}")
    layers = next(row["alignment"] for row in summary["rows"] if "alignment" in row)
    angles = {layer: [rows[name, "dfa"]["alignment"][layer] for name in names] for layer in layers}
    bars(below, names, angles)
    below.set(ylabel="cos(beta), DFA with BP")
    return figure


def figure4(summary: dict) -> Figure:
    """Accuracy and the second layer's alignment against the bottleneck, beside the published."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rows = {(row["practice"], row["mode"]): row for row in summary["rows"]}
    sizes = published.BOTTLENECKS
    for index, (mode, kind) in enumerate(product(MODES, ("masked", "narrow"))):
        if (f"{kind} {sizes[0]}", mode) not in rows:
            continue
        chosen = [rows[f"{kind} {size}", mode] for size in sizes]
        style = {"label": f"{kind}, {MODES[mode]}, {summary['data']}", "color": f"C{index}"}
        points(left, [row["test_accuracy"] for row in chosen], (0, 1), **style)
        if mode == "dfa":
            points(right, [row["alignment"]["layer 2"] for row in chosen], (-1, 1), **style)
    style = {"color": "gray", "marker": "x", "label": "masked, DFA, CIFAR-10, as published"}
    left.plot(sizes, [accuracy / 100 for accuracy in published.TEST_ACCURACY], **style)
    right.plot(sizes, published.ALIGNMENT, **style)
    left.set(ylabel="test accuracy", xscale="log", xlabel="bottleneck", title=summary["title"])
    right.set(ylabel="cos(beta) of layer 2", xscale="log", xlabel="bottleneck")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def points(axes: Axes, values: list[dict], limits: tuple[int, int], **style: str) -> None:
    """Draw means by bottleneck, with deviations cut off at the limits of possible values."""
    means = [value["mean"] for value in values]
    low, high = limits
    below = [min(value["deviation"], value["mean"] - low) for value in values]
    above = [min(value["deviation"], high - value["mean"]) for value in values]
    style |= {"marker": "."}
    axes.errorbar(published.BOTTLENECKS, means, yerr=[below, above], capsize=2, **style)


def memory(results: dict) -> Figure:
    """Table 1: bytes of matrices, and the peaks that were measured."""
    rows = results["rows"]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for index, (storage, name) in enumerate(STORAGES.items()):
        style = {"color": f"C{index}"}
        places = [i + (index - 1) * 0.27 for i in range(len(rows))]
        stored = [row[storage]["stored"] for row in rows]
        if any(stored):
            axes.bar(places, stored, 0.25, label=f"{name}, counted", **style)
        peaks = [row[storage].get("peak", math.nan) for row in rows]
        large = [peak if peak >= LEAST_PEAK else math.nan for peak in peaks]
        small = [LEAST_PEAK if peak < LEAST_PEAK else math.nan for peak in peaks]
        style |= {"edgecolor": "black", "zorder": 3}
        axes.scatter(places, large, label=f"{name}, measured peak", **style)
        axes.scatter(places, small, marker="v", **style)
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=20, ha="right")
    title = f"Feedback matrices in fp32; triangles: a peak below {bytes_text(LEAST_PEAK)}"
    axes.set(yscale="log", ylabel="bytes", title=title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def vgg16(summary: dict) -> Figure:
    """Peak memory and time of a step, for the ways that fit."""
    rows = [row for row in summary["rows"] if "peak" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    names = [row["name"] for row in rows]
    left.barh(names, [row["peak"] / 1e9 for row in rows])
    right.barh(names, [row["seconds"] for row in rows])
    side, batch = summary["resolution"], summary["batch"]
    left.set(xlabel="peak memory, GB", title=f"VGG-16, {side} x {side}, batch {batch}")
    right.set(xlabel="seconds per step")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    left.invert_yaxis()
    return figure


def transformers(summary: dict) -> Figure:
    """Test loss and alignment over the steps, and what the blocks add, by depth."""
    parts = {part["name"]: part["rows"] for part in summary["parts"]}
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    left, middle, right = axes
    longest = max(row["setting"]["steps"] for row in parts["main"])
    longer = [row for row in parts["main"] if row["setting"]["steps"] == longest]
    for index, row in enumerate(longer):
        steps = [one["step"] for one in row["curve"]]
        style = {"color": f"C{index}", "label": row["recipe"]["name"]}
        left.plot(steps, [one["loss"] for one in row["curve"]], **style)
        curves = [one.get("alignment", {}).values() for one in row["curve"]]
        for place, cosines in enumerate(zip(*curves, strict=True)):
            own = style if place == 0 else {"color": f"C{index}"}
            middle.plot(steps, cosines, alpha=0.4 + 0.6 * place / max(1, len(curves[0]) - 1), **own)
        chosen = by_depth(parts["variants"] + parts["sizes"], row["recipe"])
        if len(chosen) > 1:
            right.errorbar(
                [one["setting"]["depth"] for one in chosen],
                [100 * one["beyond"]["mean"] for one in chosen],
                yerr=[100 * one["beyond"]["deviation"] for one in chosen],
                capsize=2,
                **style,
            )
    nulls = [one["mean"] for row in longer for one in row.get("null", {}).values()]
    middle.axhspan(-max(nulls), max(nulls), color="gray", alpha=0.3, label="another seed's")
    left.set(xlabel="step", ylabel="test loss")
    middle.set(xlabel="step", ylabel="cos(beta), deeper blocks darker")
    right.set(xlabel="blocks", ylabel="beyond the embedding, %", ylim=(-200, 110))
    for one in axes:
        one.grid(alpha=0.3)
        one.legend(fontsize="small")
    return figure


def by_depth(rows: list[dict], recipe: dict) -> list[dict]:
    """The rows of a recipe that differ from the first row's setting in depth at most."""
    base = rows[0]["setting"]
    chosen = [row for row in rows if row["recipe"] == recipe and "beyond" in row]
    chosen = [row for row in chosen if row["setting"] | {"depth": base["depth"]} == base]
    return sorted(chosen, key=lambda row: row["setting"]["depth"])


DRAWINGS = {
    "table1": memory,
    "table2": practices,
    "table4": practices,
    "figure4": figure4,
    "transformers": transformers,
    "vgg16": vgg16,
}


def draw(name: str, results: dict, folder: Path) -> Path:
    """Draw one table or figure and say where it was measured; return the file."""
    figure, path = DRAWINGS[name](results), folder / f"paper_{name}.png"
    figure.suptitle(provenance.source(results), fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        print(draw(file.stem.removeprefix("paper_"), json.loads(file.read_text()), file.parent))
