"""The demo trains the paper's kind of fully connected network on real data in three ways.

Needs the `demo` extra (scikit-learn for the digits, rich, matplotlib).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from dfa_kernels.nn import DFA, DFALayer
from dfa_kernels.nn.angles import Alignment, alignment

HIDDEN = (800, 800, 800)
CLASSES = 10
BATCH = 128
LEARNING_RATE = 1e-3
LABELS = {"backprop": "backpropagation", "dfa": "DFA", "shallow": "hidden layers frozen"}


class Perceptron(nn.Module):
    """Fully connected, tanh; a `DFALayer` after every hidden layer, a `DFA` after the last."""

    def __init__(
        self, inputs: int, mode: str, seed: int, backend: str | None, distribution: str = "normal"
    ):
        super().__init__()
        widths = (inputs, *HIDDEN)
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, HIDDEN, strict=False))
        points = [DFALayer(name=f"hidden {i + 1}") for i in range(len(HIDDEN))]
        self.points = nn.ModuleList(points)
        self.output = nn.Linear(widths[-1], CLASSES)
        self.dfa = DFA(points, seed=seed, backend=backend, distribution=distribution)
        self.dfa.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs] -> logits [batch, classes]."""
        for linear, point in zip(self.hidden, self.points, strict=True):
            x = point(torch.tanh(linear(x)))
        return self.dfa(self.output(x))


@dataclass
class Data:
    """The digits: 8x8 images in [-1, 1], flattened, and their classes. A third is held out."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls, device: torch.device) -> Data:
        """From scikit-learn, which ships them."""
        digits = load_digits()
        split = train_test_split(
            digits.data / 8 - 1,
            digits.target,
            test_size=1 / 3,
            random_state=0,
            stratify=digits.target,
        )
        train_x, test_x = (torch.tensor(x, dtype=torch.float32, device=device) for x in split[:2])
        train_y, test_y = (torch.tensor(y, device=device) for y in split[2:])
        return cls(train_x, train_y, test_x, test_y)


@dataclass
class Run:
    """The results of one way of training."""

    accuracies: list[float] = field(default_factory=list)  # on the test set, after each epoch
    step_seconds: list[float] = field(default_factory=list)
    alignments: dict[str, Alignment] = field(default_factory=dict)


def train(
    mode: str,
    data: Data,
    epochs: int,
    seed: int,
    backend: str | None,
    run: Run,
    distribution: str = "normal",
) -> Iterator[None]:
    """Train one network in one mode, yielding after every epoch; results go into `run`."""
    torch.manual_seed(seed)
    model = Perceptron(data.train_x.shape[1], mode, seed, backend, distribution)
    model.to(data.train_x.device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_x), generator=order).split(BATCH):
            x, y = data.train_x[batch], data.train_y[batch]
            start = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            run.step_seconds.append(time.perf_counter() - start)
        with torch.no_grad():
            run.accuracies.append(
                (model(data.test_x).argmax(1) == data.test_y).double().mean().item()
            )
        yield
    if mode == "dfa":
        run.alignments = alignment(model, lambda: F.cross_entropy(model(data.test_x), data.test_y))


def report(runs: dict[str, Run]) -> list[Table]:
    """The tables: the three ways of training, the alignment, the memory for feedback."""
    training = Table(
        "trained by", "test accuracy", "ms per step", title="Digits, 3x800 tanh network"
    )
    for mode, run in runs.items():
        milliseconds = 1e3 * statistics.median(run.step_seconds)
        training.add_row(LABELS[mode], f"{100 * run.accuracies[-1]:.2f} %", f"{milliseconds:.2f}")
    angles = Table(
        "layer", "mean of cos(beta)", "std", title="Alignment of DFA with backpropagation (eq. 6)"
    )
    for name, value in runs["dfa"].alignments.items():
        angles.add_row(name, f"{value.mean:.3f}", f"{value.std:.3f}")
    storage = Table("feedback matrices", "bytes stored", title="Memory for feedback, fp32")
    element = torch.float32.itemsize
    storage.add_row("one per layer", f"{element * sum(HIDDEN) * CLASSES:,}")
    storage.add_row("one, shared", f"{element * max(HIDDEN) * CLASSES:,}")
    storage.add_row("dfa_kernels, from the seed", "0")
    return [training, angles, storage]


def draw(runs: dict[str, Run], figure: Path) -> None:
    """Test accuracy against epochs, as a PNG."""
    fig, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for mode, run in runs.items():
        axes.plot(
            range(1, len(run.accuracies) + 1), [100 * a for a in run.accuracies], label=LABELS[mode]
        )
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", title="Digits, 3x800 tanh network")
    axes.grid(alpha=0.3)
    axes.legend()
    fig.savefig(figure, dpi=150)
    plt.close(fig)


def run(
    epochs: int,
    seed: int,
    backend: str | None,
    device: torch.device,
    figure: Path,
    distribution: str = "normal",
) -> dict[str, Run]:
    """Train in the three ways, print the tables, write the figure; returns their results.

    The ways take turns, epoch by epoch, so background load affects all alike.
    """
    console = Console()
    data = Data.load(device)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    runs = {mode: Run() for mode in LABELS}
    with Progress(*columns, console=console) as progress:
        tasks = [progress.add_task(label, total=epochs) for label in LABELS.values()]
        ways = [
            train(mode, data, epochs, seed, backend, run, distribution)
            for mode, run in runs.items()
        ]
        for _ in zip(*ways, strict=True):  # strict: each runs to its end and measures alignment
            for task in tasks:
                progress.advance(task)
    for table in report(runs):
        console.print(table)
    draw(runs, figure)
    console.print(f"Learning curves: {figure}")
    return runs
