"""The results drawn."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.paper import published
from benchmarks.paper.architectures import STORAGES
from benchmarks.paper.report import MODES


def save(figure: plt.Figure, path: Path) -> None:
    """Write a PNG and forget the figure."""
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bars(axes: Axes, groups: list[str], series: dict[str, list[dict | None]]) -> None:
    """A bar for each group and series, with its deviation; None leaves a gap."""
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


def practices(summary: dict, path: Path) -> None:
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
    save(figure, path)


def figure4(summary: dict, path: Path) -> None:
    """Accuracy and the second layer's alignment against the bottleneck, beside the published."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rows = {(row["practice"], row["mode"]): row for row in summary["rows"]}
    sizes = published.BOTTLENECKS
    for kind in ("masked", "narrow"):
        for mode in MODES:
            if (f"{kind} {sizes[0]}", mode) not in rows:
                continue
            chosen = [rows[f"{kind} {size}", mode] for size in sizes]
            label = f"{kind}, {MODES[mode]}, {summary['data']}"
            points(left, label, [row["test_accuracy"] for row in chosen])
            if mode == "dfa":
                points(right, label, [row["alignment"]["layer 2"] for row in chosen])
    style = {"color": "gray", "marker": "x", "label": "masked, DFA, CIFAR-10, as published"}
    left.plot(sizes, [accuracy / 100 for accuracy in published.TEST_ACCURACY], **style)
    right.plot(sizes, published.ALIGNMENT, **style)
    left.set(ylabel="test accuracy", xscale="log", xlabel="bottleneck", title=summary["title"])
    right.set(ylabel="cos(beta) of layer 2", xscale="log", xlabel="bottleneck")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save(figure, path)


def points(axes: Axes, label: str, values: list[dict]) -> None:
    """Means with deviations over the published bottlenecks."""
    means, deviations = ([value[key] for value in values] for key in ("mean", "deviation"))
    axes.errorbar(published.BOTTLENECKS, means, yerr=deviations, marker=".", capsize=2, label=label)


def memory(rows: list[dict], path: Path) -> None:
    """Table 1: bytes stored, and the measured peaks where there are any."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for index, storage in enumerate(STORAGES):
        places = [i + (index - 1) * 0.27 for i in range(len(rows))]
        stored = [row[storage]["stored"] for row in rows]
        bar = axes.bar(places, stored, 0.25, label=f"{storage}, stored")
        peaks = [row[storage].get("peak", float("nan")) for row in rows]
        style = {"color": bar[0].get_facecolor(), "edgecolor": "black", "zorder": 3}
        axes.scatter(places, peaks, label=f"{storage}, measured peak", **style)
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=20, ha="right")
    axes.set(yscale="log", ylabel="bytes", title="Feedback matrices in fp32 (from a seed: none)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    save(figure, path)


def vgg16(summary: dict, path: Path) -> None:
    """Peak memory and time of a step, of the ways that fit."""
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
    save(figure, path)
