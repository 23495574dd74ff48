"""The demo trains the paper's kind of fully connected network on real data in three ways.

Needs the `demo` extra (scikit-learn for the digits, rich, matplotlib).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from dfa_kernels.demo.common import Run, angles, draw, take_turns, timed
from dfa_kernels.nn import DFA, DFALayer
from dfa_kernels.nn.angles import alignment

HIDDEN = (800, 800, 800)
CLASSES = 10
BATCH = 128
LEARNING_RATE = 1e-3
LABELS = {"backprop": "backpropagation", "dfa": "DFA", "shallow": "hidden layers frozen"}
TITLE = "Digits, 3x800 tanh network"


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


def train(
    mode: str,
    data: Data,
    epochs: int,
    seed: int,
    backend: str | None,
    run: Run,
    distribution: str = "normal",
) -> Iterator[None]:
    """Train one network in one mode, yielding after every epoch; accuracies go into `run`."""
    torch.manual_seed(seed)
    model = Perceptron(data.train_x.shape[1], mode, seed, backend, distribution)
    model.to(data.train_x.device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_x), generator=order).split(BATCH):
            x, y = data.train_x[batch], data.train_y[batch]
            with timed(run, x.device):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        with torch.no_grad():
            right = model(data.test_x).argmax(1) == data.test_y
            run.note(right.double().mean().item())
        yield
    if mode == "dfa":
        run.alignments = alignment(model, lambda: F.cross_entropy(model(data.test_x), data.test_y))


def report(runs: dict[str, Run]) -> list[Table]:
    """The tables: the three ways of training, the alignment, the memory for feedback."""
    training = Table("trained by", "test accuracy", "ms per step", title=TITLE)
    for mode, run in runs.items():
        training.add_row(LABELS[mode], f"{100 * run.values[-1]:.2f} %", run.milliseconds)
    storage = Table("feedback matrices", "bytes stored", title="Memory for feedback, fp32")
    element = torch.float32.itemsize
    storage.add_row("one per layer", f"{element * sum(HIDDEN) * CLASSES:,}")
    storage.add_row("one, shared", f"{element * max(HIDDEN) * CLASSES:,}")
    storage.add_row("dfa_kernels, from the seed", "0")
    return [training, angles({"DFA": runs["dfa"].alignments}), storage]


def run(
    epochs: int,
    seed: int,
    backend: str | None,
    device: torch.device,
    figure: Path,
    distribution: str = "normal",
) -> dict[str, Run]:
    """Train in the three ways, print the tables, write the figure; returns their results.

    The ways take turns, epoch by epoch.
    """
    console = Console()
    data = Data.load(device)
    runs = {mode: Run() for mode in LABELS}
    ways = {
        LABELS[mode]: train(mode, data, epochs, seed, backend, run, distribution)
        for mode, run in runs.items()
    }
    take_turns(console, ways, epochs)
    for table in report(runs):
        console.print(table)
    passes = range(1, epochs + 1)
    curves = {LABELS[m]: (passes, [100 * v for v in run.values]) for m, run in runs.items()}
    draw(curves, figure, across="epoch", up="test accuracy (%)", title=TITLE)
    console.print(f"Learning curves: {figure}")
    return runs
