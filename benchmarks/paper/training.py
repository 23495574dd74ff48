"""Trains one network once, and stores such runs so that an interrupted experiment can go on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import provenance
from benchmarks.paper import networks
from benchmarks.paper.data import Data
from benchmarks.paper.networks import Practice
from dfa_kernels import alignment, attach

# The alignment is measured on at most this many test images.
ALIGNMENT_IMAGES = 1024

Network = Callable[[tuple[int, int, int], int, Practice], nn.Sequential]


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of SGD without momentum on the mean cross-entropy, in full batches only.

    The published code trains hidden layers with softmax - one-hot, undivided by the batch size, and
    the last layer with the gradient of the mean. With one learning rate for both, hidden layers
    learn `batch` times as fast. Two rates for one loss are the same arithmetic, but here
    backpropagation gets the hidden rate too; in the published code it has the small one.
    """

    epochs: int
    batch: int
    hidden_rate: float
    output_rate: float
    side: int  # of the images


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
        described = asdict(self)
        text = json.dumps(described, sort_keys=True)
        parts = (self.data, self.experiment, self.practice.name, self.mode, str(self.seed))
        readable = re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower())
        return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


class Store:
    """A folder with one file for each finished job."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, job: Job) -> dict | None:
        """The result of a job, or None if it is still to be done."""
        path = self.folder / job.file_name
        return json.loads(path.read_text()) if path.exists() else None

    def put(self, job: Job, result: dict) -> None:
        """Store a result; an interruption leaves the whole file or none."""
        path = self.folder / job.file_name
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"job": asdict(job)} | result, indent=2) + "\n")
        partial.replace(path)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The fraction of images that a model in evaluation mode classifies correctly."""
    with torch.no_grad():
        right = sum(
            int((model(images).argmax(1) == labels).sum())
            for images, labels in zip(x.split(1024), y.split(1024), strict=True)
        )
    return right / len(y)


def train(network: Network, job: Job, data: Data, tick: Callable[[], None]) -> dict:
    """Train, and return accuracies in [0, 1] and, for DFA, the alignment of each layer.

    `tick` is called after every epoch.
    """
    settings = job.settings
    torch.manual_seed(job.seed)
    model = network(data.shape, data.classes, job.practice).to(data.train_x.device)
    handle = attach(
        model, networks.points(model), normalization=job.practice.normalization, seed=job.seed
    )
    handle.mode = job.mode
    output = list(model.get_submodule("output").parameters())
    hidden = [p for p in model.parameters() if all(p is not other for other in output)]
    optimizer = torch.optim.SGD(
        [
            {"params": hidden, "lr": settings.hidden_rate},
            {"params": output, "lr": settings.output_rate},
        ]
    )
    for _ in range(settings.epochs):
        model.train()
        order = torch.randperm(len(data.train_y)).to(data.train_y.device)
        for batch in order.split(settings.batch)[: len(order) // settings.batch]:
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
        tick()
    model.eval()
    result: dict = {
        "commit": provenance.commit(),
        "train_accuracy": accuracy(model, data.train_x, data.train_y),
        "test_accuracy": accuracy(model, data.test_x, data.test_y),
    }
    if job.mode == "dfa":
        x, y = data.test_x[:ALIGNMENT_IMAGES], data.test_y[:ALIGNMENT_IMAGES]
        angles = alignment(model, lambda: F.cross_entropy(model(x), y))
        result["alignment"] = {name: angle._asdict() for name, angle in angles.items()}
    return result
