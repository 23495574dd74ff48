"""Trains one network once, and stores such runs so that an interrupted experiment can go on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import provenance
from benchmarks.paper import networks
from benchmarks.paper.data import Data
from benchmarks.paper.networks import Practice
from dfa_kernels import alignment, attach

# Measured on at most this many images, the first ones.
ALIGNMENT_IMAGES = 1024
EVALUATION_IMAGES = 10_000

Network = Callable[[tuple[int, ...], int, Practice], nn.Sequential]


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of training on the mean cross-entropy, in full batches only.

    The optimizer is SGD without momentum, unless it is Adam.

    The published code trains hidden layers with softmax - one-hot, undivided by the batch size, and
    the last layer with the gradient of the mean. With one learning rate for both, hidden layers
    learn `batch` times as fast. Two rates for one loss are the same arithmetic, but here
    backpropagation gets the hidden rate too; in the published code it has the small one.
    """

    epochs: int
    batch: int
    hidden_rate: float
    output_rate: float
    side: int | None  # of the images
    adam: bool = False
    steps: int | None = None  # in an epoch, if not the whole of the data


@dataclass(frozen=True)
class Job:
    """One training run: what to train, in which mode of `DFA`, from which seed."""

    experiment: str
    practice: Practice
    mode: str
    seed: int
    settings: Settings
    data: str

    @property
    def file_name(self) -> str:
        """A readable name that differs for every job."""
        return name_of(self, self.data, self.experiment, self.practice.name, self.mode, self.seed)


def name_of(run: Any, *parts: str | int) -> str:
    """The name of the file for what came of a run, a dataclass: readable, another for every run."""
    text = json.dumps(asdict(run), sort_keys=True)
    readable = re.sub(r"[^a-z0-9.]+", "-", "-".join(map(str, parts)).lower())
    return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


class Run(Protocol):
    """A dataclass that says how a network is trained, and the name of the file for what came."""

    __dataclass_fields__: ClassVar[dict]

    @property
    def file_name(self) -> str:
        """Another for every run."""


class Store:
    """A folder with one file for each finished job."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, job: Run) -> dict | None:
        """The result of a job, or None if it is still to be done."""
        path = self.folder / job.file_name
        return json.loads(path.read_text()) if path.exists() else None

    def put(self, job: Run, result: dict) -> None:
        """Store a result; an interruption leaves the whole file or none."""
        path = self.folder / job.file_name
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"job": asdict(job)} | result, indent=2) + "\n")
        partial.replace(path)


def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1024) -> tuple[float, float]:
    """The mean cross-entropy of a model in evaluation mode, and the fraction it gets right.

    Of all rows of the output: one for each image, or for each token.
    """
    x, y = x[:EVALUATION_IMAGES], y[:EVALUATION_IMAGES]
    loss, right = 0.0, 0
    with torch.no_grad():
        for inputs, labels in zip(x.split(batch), y.split(batch), strict=True):
            output, wanted = model(inputs).flatten(0, -2), labels.flatten()
            loss += F.cross_entropy(output, wanted, reduction="sum").item()
            right += int((output.argmax(1) == wanted).sum())
    return loss / y.numel(), right / y.numel()


class Trainee:
    """A network as a job wants it, with its optimizer."""

    def __init__(self, network: Network, job: Job, data: Data):
        torch.manual_seed(job.seed)
        self.model = network(data.shape, data.classes, job.practice).to(data.train_x.device)
        handle = attach(
            self.model,
            networks.points(self.model),
            normalization=job.practice.normalization,
            distribution=job.practice.distribution,
            seed=job.seed,
        )
        handle.mode = job.mode
        output = list(self.model.get_submodule("output").parameters())
        hidden = [p for p in self.model.parameters() if all(p is not other for other in output)]
        optimizer = torch.optim.Adam if job.settings.adam else torch.optim.SGD
        self.optimizer = optimizer(
            [
                {"params": hidden, "lr": job.settings.hidden_rate},
                {"params": output, "lr": job.settings.output_rate},
            ]
        )

    def step(self, x: Tensor, y: Tensor) -> None:
        """Learn from one batch."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()


def train(network: Network, job: Job, data: Data, tick: Callable[[], None]) -> dict:
    """Train, and return losses, accuracies in [0, 1] and, for DFA, the alignment of each layer.

    `tick` is called after every epoch.
    """
    settings = job.settings
    trainee = Trainee(network, job, data)
    model = trainee.model
    for _ in range(settings.epochs):
        model.train()
        order = torch.randperm(len(data.train_y)).to(data.train_y.device)
        steps = settings.steps or len(order) // settings.batch
        for batch in order[: steps * settings.batch].split(settings.batch):
            trainee.step(data.train_x[batch], data.train_y[batch])
        tick()
    model.eval()
    result: dict = {"commit": provenance.commit()}
    for part, x, y in (
        ("train", data.train_x, data.train_y),
        ("test", data.test_x, data.test_y),
    ):
        result[f"{part}_loss"], result[f"{part}_accuracy"] = evaluate(model, x, y)
    if job.mode == "dfa":
        x, y = data.test_x[:ALIGNMENT_IMAGES], data.test_y[:ALIGNMENT_IMAGES]
        angles = alignment(model, lambda: F.cross_entropy(model(x), y))
        result["alignment"] = {name: angle._asdict() for name, angle in angles.items()}
    return result


def step_seconds(network: Network, jobs: Sequence[Job], data: Data, rounds: int) -> list[float]:
    """The median time of a training step of each job, over rounds in which they take turns."""
    device = data.train_x.device
    trainees = [Trainee(network, job, data) for job in jobs]
    batch = torch.arange(jobs[0].settings.batch).to(device)
    x, y = data.train_x[batch], data.train_y[batch]
    times: list[list[float]] = [[] for _ in jobs]
    for _ in range(rounds + 1):  # the first warms up
        for trainee, taken in zip(trainees, times, strict=True):
            start = time.perf_counter()
            trainee.step(x, y)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]
