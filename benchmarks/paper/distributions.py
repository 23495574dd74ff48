"""Does a network learn as well, whatever the distribution of U? On images, and on text.

The images are the digits or CIFAR-10, of 10 classes. The text has as many classes as kinds of
token, one or two blocks of the structured distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.paper import data, networks, tables, text
from benchmarks.paper.experiments import CIFAR10, DIGITS, EVERY, Experiment
from benchmarks.paper.networks import Practice
from benchmarks.paper.training import Job, Settings, Store, step_seconds
from dfa_kernels.backends import registry
from dfa_kernels.stream import DISTRIBUTIONS

VOCABULARIES = (1024, 2048)
ROUNDS = 30  # of timed steps

IMAGES = Experiment(
    name="distributions",
    title="Distributions: 3x800",
    network=networks.perceptron,
    rows=tuple(
        (Practice(name, distribution=name), EVERY if name == "normal" else ("dfa",))
        for name in DISTRIBUTIONS
    ),
    claims=(),
    settings={"CIFAR-10": CIFAR10, "digits": DIGITS},
    seeds={"CIFAR-10": 3, "digits": 3},
)

# Adam, whose steps do not depend on the length of the signals: one rate for all.
NEXT_TOKEN = Settings(
    epochs=15, steps=100, batch=128, hidden_rate=1e-3, output_rate=1e-3, side=None, adam=True
)
SHORTER = replace(NEXT_TOKEN, epochs=6)
TEXT = replace(
    IMAGES,
    title="Distributions: 3x512",
    network=networks.next_token,
    settings={text.name(1024): NEXT_TOKEN, text.name(2048): SHORTER},
    seeds={text.name(1024): 3, text.name(2048): 2},
)


def parts(folder: Path | None, device: torch.device) -> Iterator[tuple[Experiment, data.Data]]:
    """What is run: the images of `folder` or else the digits, and the text."""
    yield IMAGES, data.load(folder, device)
    for size in VOCABULARIES:
        yield TEXT, text.load(size, device)


def run(
    experiment: Experiment,
    jobs: list[Job],
    data: data.Data,
    store: Store,
    tick: Callable[[int], None],
    rounds: int = ROUNDS,
) -> dict:
    """Train on one kind of data and time a step of each way; the summary of both."""
    summary = tables.summarize(experiment, experiment.run(jobs, data, store, tick))
    first = {(job.practice.name, job.mode): job for job in reversed(jobs)}
    ways = [first[row["practice"], row["mode"]] for row in summary["rows"]]
    resized = data.resized(jobs[0].settings.side)
    times = step_seconds(experiment.network, ways, resized, rounds)
    for row, job, seconds in zip(summary["rows"], ways, times, strict=True):
        row["step_seconds"] = seconds
        if job.mode == "dfa":
            distribution, device = job.practice.distribution, data.train_x.device
            row["backend"] = registry.choose("project", device, None, distribution)
    return summary | {"n": data.classes}
