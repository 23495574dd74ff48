"""Trials run, and summarized by how much of the way to backpropagation they close."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from rich.table import Table

from benchmarks.paper.data import Data
from benchmarks.paper.tables import spread
from benchmarks.paper.training import Store
from benchmarks.paper.transformers.trials import (
    Recipe,
    Setting,
    Trial,
    before_of,
    learned_before,
    measured_steps,
    train,
)
from benchmarks.report import transformer_tables
from benchmarks.report.texts import deviating

QUICK_STEPS, QUICK_RECIPES = 2, 5
# The recipes that others are compared with.
BACKPROP, FROZEN, ONLY_EMBEDDING = "backpropagation", "blocks frozen", "only the embedding"


@dataclass(frozen=True)
class Part:
    """A table: every setting trained by every recipe, from several seeds."""

    name: str
    title: str
    settings: tuple[Setting, ...]
    recipes: tuple[Recipe, ...]
    seeds: int

    def trials(self, quick: bool, seeds: int | None) -> Iterator[Trial]:
        """All of them; one seed of everything before a second. `quick` shows that they run."""
        few = slice(1 if quick else None)
        for seed in range(seeds or (1 if quick else self.seeds)):
            for setting in self.settings[few]:
                if quick:
                    before = min(setting.before_steps, QUICK_STEPS)
                    setting = replace(setting, steps=QUICK_STEPS, before_steps=before)
                for recipe in self.recipes[: QUICK_RECIPES if quick else None]:
                    yield Trial(setting, recipe, seed)


def run(
    part: Part,
    trials: list[Trial],
    load: Callable[[str], Data],
    store: Store,
    tick: Callable[[int], None],
    stored: bool = False,
) -> dict:
    """The summary of a part. Trials that are not in the store are trained and stored.

    `load` gives the data of a setting by name; `tick` is called with the number of measurements
    just made. With `stored`, nothing is trained, and what is not there is left out.
    """
    results = []
    for trial in trials:
        result = store.get(trial)
        if result is None and stored:
            continue
        if result is None:
            before = trial.setting.before
            learned = None if before is None else _learned(trial, load(before), store)
            result = train(trial, load(trial.setting.data), lambda: tick(1), learned)
            store.put(trial, result)
        else:
            tick(len(measured_steps(trial.setting.steps)))
        results.append((trial, result))
    return summarize(part, results)


def _learned(trial: Trial, data: Data, store: Store) -> dict:
    """What backpropagation learned of `data` with that seed; it is stored too."""
    path = store.folder / f"learned-{before_of(trial, data).file_name}.pt"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.partial")
        torch.save(learned_before(trial, data), partial)
        partial.replace(path)
    return torch.load(path)


def summarize(part: Part, results: list[tuple[Trial, dict]]) -> dict:
    """Rows by setting and recipe."""
    curves = {trial: result["curve"] for trial, result in results}
    kinds = dict.fromkeys((trial.setting, trial.recipe) for trial in curves)
    rows = [_row(setting, recipe, curves) for setting, recipe in kinds]
    commits = sorted({result["commit"] for _, result in results})
    return {"name": part.name, "title": part.title, "run_commits": commits, "rows": rows}


def _row(setting: Setting, recipe: Recipe, curves: dict[Trial, list[dict]]) -> dict:
    """One setting and recipe over the seeds."""
    ours = {
        trial.seed: curve
        for trial, curve in curves.items()
        if (trial.setting, trial.recipe) == (setting, recipe)
    }
    last = [curve[-1] for curve in ours.values()]
    row: dict = {"setting": asdict(setting), "recipe": asdict(recipe), "seeds": len(ours)}
    for key in ("loss", "accuracy", "output"):
        row[key] = spread([end[key] for end in last])
    others = {
        (trial.recipe.name, trial.seed): curve[-1]["loss"]
        for trial, curve in curves.items()
        if trial.setting == setting
    }
    for key, floor in (("closed", FROZEN), ("beyond", ONLY_EMBEDDING)):
        ways = [
            (others[floor, seed] - curve[-1]["loss"])
            / (others[floor, seed] - others[BACKPROP, seed])
            for seed, curve in ours.items()
            if (floor, seed) in others and (BACKPROP, seed) in others
        ]
        if recipe.name not in (BACKPROP, floor) and ways:
            row[key] = spread(ways)
    row["curve"] = [_mean(measured) for measured in zip(*ours.values(), strict=True)]
    for key in ("alignment", "null"):
        if key in last[0]:
            row[key] = {
                point: spread([_cosine(end[key][point], key) for end in last])
                for point in last[0][key]
            }
    return row


def _cosine(value: float, key: str) -> float:
    """A cosine; a null value without its sign, which would cancel over the seeds."""
    return abs(value) if key == "null" else value


def _mean(measured: tuple[dict, ...]) -> dict:
    """What the seeds measured after one step, averaged."""
    found: dict = {"step": measured[0]["step"]}
    found["loss"] = statistics.fmean(one["loss"] for one in measured)
    if "alignment" in measured[0]:
        found["alignment"] = {
            point: statistics.fmean(one["alignment"][point] for one in measured)
            for point in measured[0]["alignment"]
        }
    return found


def table(summary: dict) -> Table:
    """A part for the terminal."""
    columns = [
        "network",
        "trained by",
        "test loss",
        "accuracy",
        "way closed",
        "beyond",
        "alignment",
    ]
    found = Table(*columns, title=summary["title"])
    for row in summary["rows"]:
        closed, beyond = (row.get(key) for key in ("closed", "beyond"))
        angles = [f"{angle['mean']:.2f}" for angle in row.get("alignment", {}).values()]
        found.add_row(
            transformer_tables.setting(row["setting"]),
            row["recipe"]["name"],
            deviating(*row["loss"].values()),
            f"{row['accuracy']['mean']:.1%}",
            f"{closed['mean']:.0%}" if closed else "",
            f"{beyond['mean']:.0%}" if beyond else "",
            " ".join(angles),
        )
    return found
