"""Training runs summarized as tables in the paper's layout, and compared with its claims."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from rich.table import Table
from scipy.stats import spearmanr, t

from benchmarks.paper import published
from benchmarks.paper.experiments import Claim, Experiment
from benchmarks.paper.networks import Practice
from benchmarks.paper.training import Job
from benchmarks.report.texts import STORAGES, bytes_text, deviating, peak, time_text, way

Runs = list[tuple[Job, dict]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation, which is 0 for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation}


def row_of(practice: Practice, mode: str, results: list[dict]) -> dict:
    """One row over all seeds. The deviation of a cosine is over the test images, as in eq. 6.

    That of its mean over the seeds is beside it.
    """
    row: dict = {"practice": practice.name, "mode": mode, "seeds": len(results)}
    for part in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        row[part] = spread([result[part] for result in results])
    if mode == "dfa":
        row["alignment"] = {
            layer: {
                "mean": over_seeds["mean"],
                "deviation": statistics.fmean(r["alignment"][layer]["std"] for r in results),
                "over_seeds": over_seeds["deviation"],
            }
            for layer in results[0]["alignment"]
            for over_seeds in [spread([r["alignment"][layer]["mean"] for r in results])]
        }
    return row


def seed_alignments(runs: Runs) -> dict[str, dict[int, float]]:
    """The alignment averaged over layers, by practice and seed."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for job, result in runs:
        if job.mode == "dfa":
            angles = [angle["mean"] for angle in result["alignment"].values()]
            found[job.practice.name][job.seed] = statistics.fmean(angles)
    return dict(found)


def hold(claim: Claim, alignments: dict[str, dict[int, float]]) -> dict:
    """Whether a claim of the paper holds here, from the differences seed by seed.

    "yes" or "no" if their 95 % confidence interval (Student's t) excludes zero, else "unclear"; so
    a single seed is "unclear".
    """
    better, worse = alignments[claim.better], alignments[claim.worse]
    difference = spread([better[seed] - worse[seed] for seed in better])
    count = len(better)
    error = difference["deviation"] / math.sqrt(count) * t.ppf(0.975, count - 1)  # NaN for one
    clear = abs(difference["mean"]) > error
    holds = ("yes" if difference["mean"] > 0 else "no") if clear else "unclear"
    return {"better": claim.better, "worse": claim.worse, "difference": difference, "holds": holds}


def rank_agreement(rows: list[dict]) -> dict[str, float | None]:
    """Spearman's rank correlation of figure 4's masked bottlenecks here with the published ones.

    None if all values here are equal. Narrow layers have no published counterpart.
    """
    chosen = {row["practice"]: row for row in rows if row["mode"] == "dfa"}
    ours = [chosen[f"masked {size}"] for size in published.BOTTLENECKS]
    accuracies = [row["test_accuracy"]["mean"] for row in ours]
    angles = [row["alignment"]["layer 2"]["mean"] for row in ours]
    pairs = {
        "test_accuracy": (accuracies, published.TEST_ACCURACY),
        "alignment": (angles, published.ALIGNMENT),
    }
    return {
        name: float(spearmanr(mine, theirs).statistic) if len(set(mine)) > 1 else None
        for name, (mine, theirs) in pairs.items()
    }


def summarize(experiment: Experiment, runs: Runs) -> dict:
    """What the results of an experiment keep of its runs."""
    grouped: dict[tuple[Practice, str], list[dict]] = defaultdict(list)
    for job, result in runs:
        grouped[job.practice, job.mode].append(result)
    rows = [row_of(practice, mode, results) for (practice, mode), results in grouped.items()]
    alignments = seed_alignments(runs)
    summary = {
        "title": experiment.title,
        "data": runs[0][0].data,
        "settings": vars(runs[0][0].settings),
        "run_commits": sorted({result["commit"] for _, result in runs}),
        "rows": rows,
        "claims": [hold(claim, alignments) for claim in experiment.claims],
    }
    if experiment.name == "figure4":
        summary["rank_agreement"] = rank_agreement(rows)
        summary["published"] = {
            "data": "CIFAR-10",
            "bottlenecks": published.BOTTLENECKS,
            "test_accuracy": published.TEST_ACCURACY,
            "alignment": published.ALIGNMENT,
        }
    return summary


MODES = {"backprop": "BP", "shallow": "shallow", "dfa": "DFA"}


def percent(value: dict[str, float]) -> str:
    """Mean (standard deviation) of an accuracy."""
    return f"{100 * value['mean']:.1f} ({100 * value['deviation']:.1f})"


def cosine(value: dict[str, float]) -> str:
    """Mean (standard deviation) of a cosine."""
    return f"{value['mean']:.3f} ({value['deviation']:.3f})"


def tables(summary: dict) -> list[Table]:
    """A summary for the terminal."""
    layers = next(row["alignment"] for row in summary["rows"] if "alignment" in row)
    columns = ["practice", "trained by", "train, %", "test, %", *layers]
    title = f"{summary['title']}, on {summary['data']}: accuracy, and cos(beta) by layer"
    results = Table(*columns, title=title)
    for row in summary["rows"]:
        angles = [cosine(angle) for angle in row.get("alignment", {}).values()]
        accuracies = [percent(row["train_accuracy"]), percent(row["test_accuracy"])]
        results.add_row(row["practice"], MODES[row["mode"]], *accuracies, *angles)
    found = [results]
    if summary["claims"]:
        claims = Table("aligns better", "than", "by", "as the paper says", title="Orderings")
        for claim in summary["claims"]:
            by = f"{claim['difference']['mean']:+.3f} ({claim['difference']['deviation']:.3f})"
            claims.add_row(claim["better"], claim["worse"], by, claim["holds"])
        found.append(claims)
    if "rank_agreement" in summary:
        title = "Order of masked bottlenecks, rank correlation with the published on CIFAR-10"
        agreement = Table("test accuracy", "alignment of layer 2", title=title)
        values = summary["rank_agreement"].values()
        agreement.add_row(*("-" if value is None else f"{value:+.3f}" for value in values))
        found.append(agreement)
    return found


def distributions_table(summary: dict) -> Table:
    """One kind of data of the experiment on distributions, for the terminal."""
    layers = next(row["alignment"] for row in summary["rows"] if "alignment" in row)
    title = f"{summary['title']}, on {summary['data']}: test set, and cos(beta) by layer"
    found = Table("trained by", "loss", "accuracy, %", *layers, "a step", title=title)
    for row in summary["rows"]:
        angles = row.get("alignment", {}).values()
        cosines = [deviating(angle["mean"], angle["over_seeds"]) for angle in angles]
        cosines += [""] * (len(layers) - len(cosines))
        loss = deviating(*row["test_loss"].values())
        found.add_row(
            way(row), loss, percent(row["test_accuracy"]), *cosines, time_text(row["step_seconds"])
        )
    return found


def memory_table(rows: list[dict]) -> Table:
    """Table 1 for the terminal."""
    title = "Table 1: feedback matrices in fp32, and the peak of making and using them once, M = 4"
    columns = [*STORAGES.values(), *(f"peak, {title}" for title in STORAGES.values())]
    found = Table("network", *columns, title=title)
    for row in rows:
        stored = [bytes_text(row[storage]["stored"]) for storage in STORAGES]
        found.add_row(row["name"], *stored, *(peak(row[storage]) for storage in STORAGES))
    return found


def vgg16_table(summary: dict) -> Table:
    """The VGG-16 demonstration for the terminal."""
    title = f"VGG-16, {summary['resolution']} x {summary['resolution']}, batch {summary['batch']}"
    found = Table("trained by", "matrices", "peak memory", "s per step", "losses", title=title)
    for row in summary["rows"]:
        losses = ", ".join(f"{loss:.3f}" for loss in row.get("losses", ()))
        seconds = f"{row['seconds']:.3f}" if "seconds" in row else "-"
        found.add_row(row["name"], bytes_text(row["stored"]), peak(row), seconds, losses)
    return found
