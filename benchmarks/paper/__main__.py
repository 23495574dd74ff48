"""The command line; the package's docstring describes it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.harness import provenance
from benchmarks.paper import data, distributions, drawings, table1, tables, vgg16
from benchmarks.paper.architectures import ARCHITECTURES, STORAGES
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.training import Store
from benchmarks.paper.transformers import recipes, summary
from benchmarks.paper.transformers.trials import measured_steps
from dfa_kernels.backends import registry

RUNS = Path(__file__).parents[2] / "paper-runs"
CHOICES = ("table1", *EXPERIMENTS, "distributions", "transformers", "vgg16")
QUICK_BYTES = 10**8  # of stored matrices; --quick measures no more


def positive(text: str) -> int:
    """A count given on the command line."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {count}")
    return count


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("what", nargs="*", metavar="what", help=f"{', '.join(CHOICES)}; all")
    parser.add_argument(
        "--quick", action="store_true", help="one seed and one epoch, to show that it runs"
    )
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; without it, the digits")
    parser.add_argument("--seeds", type=positive, help="runs of each variant")
    parser.add_argument("--epochs", type=positive)
    parser.add_argument(
        "--stored", action="store_true", help="of transformers: what was trained so far, no more"
    )
    parser.add_argument("--resolution", type=positive, help="of VGG-16's images")
    parser.add_argument("--batch", type=positive, help="of VGG-16's images")
    parser.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--runs", type=Path, default=RUNS, help="finished trainings are kept here and not repeated"
    )
    parser.add_argument("--output", type=Path, help="write JSON and PNG to this folder")
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.what) - set(CHOICES)
    if unknown:
        parser.error(f"what must be among {', '.join(CHOICES)}, got {', '.join(sorted(unknown))}")
    return parsed


def run_experiment(
    name: str, options: argparse.Namespace, console: Console, progress: Progress
) -> dict:
    """Run table 2, table 4 or figure 4; print and return its summary."""
    experiment = EXPERIMENTS[name]
    images = data.load(options.data, options.device)
    jobs = list(experiment.jobs(images.name, options.quick, options.seeds, options.epochs))
    task = progress.add_task(experiment.title, total=sum(job.settings.epochs for job in jobs))
    store = Store(options.runs / options.device.type)
    runs = experiment.run(jobs, images, store, lambda n: progress.advance(task, n))
    summary = tables.summarize(experiment, runs)
    for table in tables.tables(summary):
        console.print(table)
    return summary


def run_distributions(options: argparse.Namespace, console: Console, progress: Progress) -> dict:
    """Every distribution of U, on images and on text; print and return the summaries."""
    store = Store(options.runs / options.device.type)
    summaries = []
    for experiment, part in distributions.parts(options.data, options.device):
        jobs = list(experiment.jobs(part.name, options.quick, options.seeds, options.epochs))
        title = f"{experiment.title}, {part.name}"
        task = progress.add_task(title, total=sum(job.settings.epochs for job in jobs))
        summary = distributions.run(
            experiment, jobs, part, store, lambda n, task=task: progress.advance(task, n)
        )
        console.print(tables.distributions_table(summary))
        summaries.append(summary)
    return {"parts": summaries}


def run_transformers(options: argparse.Namespace, console: Console, progress: Progress) -> dict:
    """Residual networks whose output layer starts as the feedback; print and return summaries."""
    store = Store(options.runs / options.device.type)
    images, load = recipes.loader(options.data, options.device)
    summaries = []
    for part in (*recipes.FIRST_PARTS, *recipes.others(images)):
        trials = list(part.trials(options.quick, options.seeds))
        count = sum(len(measured_steps(trial.setting.steps)) for trial in trials)
        task = progress.add_task(part.title, total=count)
        done = summary.run(
            part,
            trials,
            load,
            store,
            lambda n, task=task: progress.advance(task, n),
            options.stored,
        )
        console.print(summary.table(done))
        summaries.append(done)
    return {"parts": summaries}


def run_table1(options: argparse.Namespace, console: Console, progress: Progress) -> dict:
    """Table 1: stored bytes and measured peaks."""
    task = progress.add_task("Table 1", total=len(ARCHITECTURES) * len(STORAGES))
    largest = QUICK_BYTES if options.quick else 2**63
    rows = table1.run(options.device, largest, lambda: progress.advance(task))
    console.print(tables.memory_table(rows))
    return {"rows": rows}


def run_vgg16(options: argparse.Namespace, console: Console, progress: Progress) -> dict:
    """The VGG-16 demonstration, by default at 224 x 224 on a GPU and 112 x 112 on a CPU."""
    task = progress.add_task("VGG-16", total=len(vgg16.WAYS))
    gpu = options.device.type == "cuda"
    resolution = options.resolution or (32 if options.quick else 224 if gpu else 112)
    batch, steps = options.batch or (32 if gpu else 4), 3 if options.quick else 5
    rows = vgg16.run(options.device, resolution, batch, steps, lambda: progress.advance(task))
    summary = {"resolution": resolution, "batch": batch, "steps": steps, "rows": rows}
    console.print(tables.vgg16_table(summary))
    return summary


def main(arguments: list[str] | None = None) -> None:
    """Run the experiments asked for, one after the other."""
    options = parse(arguments)
    console = Console(width=max(120, Console().width))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    # Before the run, because files may be edited while it goes on.
    origin = provenance.origin(options.device.type)
    others: dict[str, Callable[..., dict]] = {
        "table1": run_table1,
        "distributions": run_distributions,
        "transformers": run_transformers,
        "vgg16": run_vgg16,
    }
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn())
    columns += (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for name in options.what or CHOICES:
            if name in others:
                found = others[name](options, console, progress)
            else:
                found = run_experiment(name, options, console, progress)
            if options.output:
                how = {"threads": torch.get_num_threads(), "quick": options.quick}
                how["backend"] = registry.choose("project", options.device, None)
                results = origin | how | found
                provenance.save(options.output / f"paper_{name}.json", results)
                if name in drawings.DRAWINGS:
                    drawings.draw(name, results, options.output)


if __name__ == "__main__":
    main()
