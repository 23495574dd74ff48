"""Figures of a run: cost as the shape grows, memory against depth, and a roofline.

Of a run of `large_vocabulary`, memory and time as tokens grow.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

from benchmarks.harness import provenance

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.roofs import BEYOND_CACHES, bandwidth
from benchmarks.harness.shapes import STRUCTURED, is_ours, title
from benchmarks.report import vocabulary_tables

AXES = {"batch": "batch M", "n": "length of the error n", "size": "layer size", "layers": "layers"}


def series(results: dict) -> dict[str, list[dict]]:
    """The cases of each series, sorted by x."""
    found: dict[str, list[dict]] = {}
    for case in results["cases"]:
        if case["series"]:
            found.setdefault(case["series"], []).append(case)
    return {name: sorted(cases, key=lambda case: case["x"]) for name, cases in found.items()}


def drawings(results: dict) -> dict[str, Figure]:
    """The figures that results have data for, by file name."""
    if "vocabulary" in results:
        return {"large_vocabulary.png": large_vocabulary(results)}
    if "before" in results:
        return {}
    found = series(results)
    drawn = {}
    if found:
        drawn["time.png"] = time(found)
    if "layers" in found:
        drawn["memory.png"] = memory(found["layers"])
    batches = {name: cases for name, cases in found.items() if name.startswith("batch")}
    if batches:
        drawn["roofline.png"] = roofline(batches, results)
    return drawn


def draw(results: dict, folder: Path) -> list[Path]:
    """Draw all figures of the results into a folder; return the files."""
    paths = []
    for name, figure in drawings(results).items():
        figure.suptitle(provenance.source(results), fontsize=8)
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)
        paths.append(folder / name)
    return paths


def _style(name: str, names: list[str]) -> dict:
    """A contender's style, the same in every panel. Our lines are thicker and on top."""
    ours = is_ours(name)
    color = f"C{names.index(name) % 10}"
    return {"color": color, "linewidth": 2.5 if ours else 1.2, "zorder": 3 if ours else 2}


def _names(cases: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for case in cases for name in case["contenders"]))


def time(found: dict[str, list[dict]]):
    """Time as one dimension of the shape grows; dashed, the bound of a contender's own work."""
    rows = -(-len(found) // 2)
    figure, panels = plt.subplots(
        rows, min(len(found), 2), figsize=(11, 4.2 * rows), squeeze=False, layout="constrained"
    )
    names = _names([case for cases in found.values() for case in cases])
    for panel, (grows, cases) in zip(panels.flat, found.items(), strict=False):
        for name in _names(cases):
            timed = [case for case in cases if name in case["contenders"]]
            x = [case["x"] for case in timed]
            style = _style(name, names)
            of = [case["contenders"][name] for case in timed]
            times = [1e3 * row["seconds"] for row in of]
            panel.plot(x, times, "o-", label=title(name), ms=3, **style)
            if is_ours(name) or name == "views":
                bounds = [1e3 * row["bound_seconds"] for row in of]
                # Where two bounds coincide, the dashes of each fill the other's gaps.
                dashes = (4 * (name == "views"), (4, 4))
                panel.plot(x, bounds, linestyle=dashes, **style | {"linewidth": 1})
        panel.set(xscale="log", yscale="log", xlabel=AXES[grows.split(",")[0]], ylabel="ms")
        panel.set_title(f"{grows} ({_fixed(cases)}; dashed: the limit)", fontsize=9)
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(found) :]:
        panel.remove()
    return figure


def _fixed(cases: list[dict]) -> str:
    """What stays constant along a series."""
    facts = {"batch": "M", "n": "n", "largest": "l"}
    same = {key: {case[key] for case in cases} for key in facts}
    known = [f"{facts[key]}={value.pop():,}" for key, value in same.items() if len(value) == 1]
    return ", ".join(known)


def memory(cases: list[dict]):
    """Memory of matrices, signals and workspace against depth; hollow, what was not run."""
    figure, panel = plt.subplots(figsize=(6, 4.2), layout="constrained")
    rivals = ("naive", "stored", "views")
    names = [name for name in _names(cases) if is_ours(name) or name in rivals]
    for name in names:
        style = _style(name, names)
        for timed, options in ((True, {"label": title(name)}), (False, {"mfc": "none", "ls": ":"})):
            points = []
            for case in cases:
                row = case["contenders"].get(name)
                if timed and row and row["peak_bytes"] is not None:
                    points.append((case["x"], row["stored_bytes"] + row["peak_bytes"]))
                left_out = case["left_out"].get(name, {})
                if not timed and "stored_bytes" in left_out:
                    points.append((case["x"], left_out["stored_bytes"] + case["signal_bytes"]))
            if points:
                x, y = zip(*points, strict=True)
                panel.plot(x, [value / 1e9 for value in y], marker="o", **options, **style)
    panel.set(xscale="log", yscale="log", xlabel="layers", ylabel="GB")
    said = f"memory against depth ({_fixed(cases)}; hollow: not run, by its matrices)"
    panel.set_title(said, fontsize=9)
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3)
    return figure


def roofline(found: dict[str, list[dict]], results: dict):
    """FLOP/s against FLOP a byte; hollow, what each contender's bound would allow.

    The structured projection is not there: it does no products.
    """
    figure, panel = plt.subplots(figsize=(6.5, 4.6), layout="constrained")
    machine = results["roofs"]["0"]
    memory = {int(size): rate for size, rate in machine["memory"].items()}
    stream = bandwidth(memory, BEYOND_CACHES)
    every = [case for cases in found.values() for case in cases]
    names, x = [name for name in _names(every) if name != STRUCTURED], []
    for name in names:
        points, timed = [], [case for case in every if name in case["contenders"]]
        for case in timed:
            row = case["contenders"][name]
            moved = row["work"]["written"] + row["work"]["read"]
            flops = 2 * case["batch"] * case["largest"] * case["n"]
            points.append((flops / moved, flops / row["seconds"], flops / row["bound_seconds"]))
        if points:
            intensity, done, allowed = zip(*points, strict=True)
            color = _style(name, names)["color"]
            panel.plot(intensity, done, "o", ms=5, color=color, label=title(name))
            panel.plot(intensity, allowed, "o", ms=5, mfc="none", color=color)
            x += intensity
            if is_ours(name):  # at nearly the same intensity for every batch size
                batches = [case["batch"] for case in timed]
                _name_batches(panel, sorted(zip(done, intensity, batches, strict=True)))
    ends = [min(x) / 2, max(x) * 3]
    for kind, rate in machine["multiply"].items():
        panel.axhline(2 * rate, color="gray", linewidth=0.8)
        panel.text(ends[0], 2 * rate, f"products in {kind}", fontsize=7, va="bottom")
    ridge = 2 * max(machine["multiply"].values()) / stream
    panel.plot([ends[0], ridge], [stream * ends[0], stream * ridge], color="gray", linewidth=0.8)
    panel.text(ends[0], stream * ends[0], "memory", fontsize=7, va="top")
    panel.set(xscale="log", yscale="log", xlabel="FLOP a byte moved", ylabel="FLOP/s")
    panel.set_xlim(ends[0] / 1.3, ends[1])
    panel.set_title("roofline of the batch sweep (hollow: the limit)", fontsize=9)
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3)
    return figure


def _name_batches(panel: Axes, points: list[tuple[float, float, int]]) -> None:
    """Write M beside the points, right and left in turns, because some lie close together."""
    for index, (y, x, batch) in enumerate(points):
        side, align = ((6, 0), "left") if index % 2 == 0 else ((-6, 0), "right")
        place = {"xytext": side, "textcoords": "offset points", "ha": align, "va": "center"}
        panel.annotate(f"M={batch:,}", (x, y), fontsize=7, **place)


def large_vocabulary(results: dict):
    """Memory and time of a step as tokens grow; dashed, with whole logits."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    cases = results["cases"]
    tokens = [case["tokens"] for case in cases]
    logits = [case["logit_bytes"] / 1e9 for case in cases]
    products = 3 * results["width"] * results["vocabulary"]
    limits = [products * count / results["rate"] for count in tokens]
    names = [whole["signals"] for whole, _ in vocabulary_tables.pairs(cases[0])]
    for panel, key, scale, unit, about, bound, least in (
        (panels[0], "peak", 1e9, "GB", "peak memory", "the logits alone", logits),
        (panels[1], "seconds", 1.0, "s", "time", "backpropagation's products alone", limits),
    ):
        for color, name in enumerate(names):
            for place, loss, style in ((0, ", whole logits", ("--", 1.2)), (1, "", ("-", 2.5))):
                rows = [vocabulary_tables.pairs(case)[color][place] for case in cases]
                timed = [i for i, row in enumerate(rows) if key in row]
                x, y = [tokens[i] for i in timed], [rows[i][key] / scale for i in timed]
                label = vocabulary_tables.SIGNALS[name].replace("`", "") + loss
                looks = {"ls": style[0], "lw": style[1], "color": f"C{color}"}
                panel.plot(x, y, marker="o", ms=4, label=label, **looks)
        panel.plot(tokens, least, color="gray", ls=":", label=bound)
        panel.set_xscale("log", base=2)
        panel.set(yscale="log", xlabel="tokens", ylabel=unit)
        panel.set_xticks(tokens, [f"{count:,}" for count in tokens])
        shape = f"vocabulary {results['vocabulary']:,}, width {results['width']:,}"
        panel.set_title(f"{about} of a step ({shape})", fontsize=9)
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    return figure
