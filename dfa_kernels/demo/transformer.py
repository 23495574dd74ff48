"""The demo trains a small causal language model on Python's own sources in four ways."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from dfa_kernels.demo.common import Run, angles, draw, peak_bytes, take_turns, timed
from dfa_kernels.nn import Attachment, OutputWeights, attach
from dfa_kernels.nn.angles import alignment

BYTES = 256
CONTEXT = 64
WIDTH = 64
HEADS = 4
BLOCKS = 4
BEGINNING = 5_000  # bytes of each module, so that none is most of the text
HELD_OUT = 128  # windows to measure the loss on
BATCH = 16
EVALUATIONS = 20  # in an epoch
LEARNING_RATE = 2e-3
OUTPUT_RATE = 3e-3  # of the output layer and the norm before it
TITLE = f"Next byte of Python's sources, {BLOCKS} residual blocks of width {WIDTH}"
LABELS = {
    "backprop": "backpropagation",
    "weights": "DFA, by the output layer's weights",
    "matched": "DFA, output layer started as the feedback",
    "shallow": "blocks frozen",
}


class Embedding(nn.Module):
    """Bytes and their places as vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(BYTES, WIDTH)
        self.place = nn.Embedding(CONTEXT, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length] -> [batch, length, WIDTH]."""
        return self.token(tokens) + self.place.weight[: tokens.shape[1]]


class Block(nn.Module):
    """Causal attention and a perceptron, each normalized before and added to its input.

    Starts as the identity, unless it starts at random.
    """

    def __init__(self, random: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        if not random:
            for parameter in (*self.mix.parameters(), *self.down.parameters()):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, WIDTH] of both."""
        heads = self.attention(self.norm1(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2)) / math.sqrt(2 * BLOCKS)
        return x + self.down(F.gelu(self.up(self.norm2(x)))) / math.sqrt(2 * BLOCKS)


class Transformer(nn.Module):
    """A causal language model of bytes, without a trace of DFA. Its blocks start as the identity.

    Frozen blocks must not: they start at random.
    """

    def __init__(self, random: bool = False) -> None:
        super().__init__()
        self.embed = Embedding()
        self.blocks = nn.Sequential(*(Block(random) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length] -> logits of the next byte [batch, length, BYTES]."""
        return self.output(self.norm(self.blocks(self.embed(tokens))))


@dataclass
class Text:
    """Windows of CONTEXT + 1 bytes [count, CONTEXT + 1]. Every tenth module is held out."""

    train: Tensor
    test: Tensor

    @classmethod
    def load(cls, device: torch.device) -> Text:
        """From the modules at the top of the standard library of the Python that runs."""
        folder = Path(sysconfig.get_path("stdlib"))
        modules = [path.read_bytes()[:BEGINNING] for path in sorted(folder.glob("*.py"))]
        test = windows(b"".join(modules[9::10])).to(device)
        rest = [module for index, module in enumerate(modules, 1) if index % 10]
        train = windows(b"".join(rest)).to(device)
        if len(train) < BATCH or not len(test):
            raise FileNotFoundError(
                f"demo: the standard library's sources must be files with some text in {folder}, "
                f"got {len(modules)} files"
            )
        return cls(train, test[:: math.ceil(len(test) / HELD_OUT)])


def windows(text: bytes) -> Tensor:
    """Bytes, cut [count, CONTEXT + 1]; the last of each window is the first of the next."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0)
    if len(tokens) <= CONTEXT:
        return torch.empty(0, CONTEXT + 1, dtype=torch.long)
    return tokens.unfold(0, CONTEXT + 1, CONTEXT).long()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean cross-entropy of the next byte, in nats."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def feedback(
    model: Transformer, way: str, seed: int, backend: str | None, distribution: str
) -> Attachment:
    """Attach DFA to every block, and switch it to a way of training.

    "weights" has the output layer's weights as the feedback, "matched" a seed's matrix, which the
    output layer starts as.
    """
    options: dict[str, dict[str, Any]] = {
        "weights": {"matrix": OutputWeights(model.output)},
        "matched": {
            "match_output": "output",
            "seed": seed,
            "backend": backend,
            "distribution": distribution,
        },
    }
    handle = attach(
        model,
        [f"blocks.{index}" for index in range(BLOCKS)],
        batch_dims=(0, 1),
        through=normalized,
        **options.get(way, {}),
    )
    if way in ("backprop", "shallow"):
        handle.mode = way
    return handle


def normalized(x: Tensor) -> Tensor:
    """The norm before the output layer, without its weights."""
    return F.layer_norm(x, x.shape[-1:])


def turns(batches: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """The batches of an epoch in EVALUATIONS parts, or fewer where there are fewer batches."""
    length = math.ceil(len(batches) / EVALUATIONS)
    return (batches[first : first + length] for first in range(0, len(batches), length))


def train(
    way: str,
    text: Text,
    epochs: int,
    seed: int,
    backend: str | None,
    run: Run,
    distribution: str = "normal",
) -> Iterator[None]:
    """Train one network in one way, yielding after every turn; held-out losses go into `run`."""
    torch.manual_seed(seed)
    device = text.train.device
    model = Transformer(random=way == "shallow").to(device)
    feedback(model, way, seed, backend, distribution)
    last = [*model.norm.parameters(), *model.output.parameters()]
    before = [*model.embed.parameters(), *model.blocks.parameters()]
    optimizer = torch.optim.Adam(
        [{"params": last, "lr": OUTPUT_RATE}, {"params": before, "lr": LEARNING_RATE}],
        betas=(0.9, 0.99),
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in turns(torch.randperm(len(text.train), generator=order).split(BATCH)):
            for batch in part:
                windows = text.train[batch]
                with timed(run, device):
                    optimizer.zero_grad()
                    loss(model, windows).backward()
                    optimizer.step()
            with torch.no_grad():
                run.note(loss(model, text.test).item())
            yield
    optimizer.zero_grad()
    run.peak_bytes = peak_bytes(lambda: loss(model, text.train[:BATCH]).backward(), device)
    if way in ("weights", "matched"):
        run.alignments = alignment(model, lambda: loss(model, text.test))


def closed(runs: dict[str, Run], way: str) -> str:
    """How much of the way from frozen blocks to backpropagation a way of training has come."""
    frozen, backprop, ours = (runs[name].values[-1] for name in ("shallow", "backprop", way))
    return f"{100 * (frozen - ours) / (frozen - backprop):.0f} %" if frozen > backprop else "-"


def report(runs: dict[str, Run]) -> list[Table]:
    """The tables: the four ways of training, and the alignment of those by DFA."""
    steps = runs["backprop"].steps[-1]
    training = Table(
        Column("trained by", width=len(LABELS["backprop"])),
        "held-out loss",
        "way from frozen to backprop",
        "ms per step",
        "tokens per second",
        "peak MB",
        title=f"{TITLE}, {steps:,} steps",
        caption="Memory is that of a forward and backward pass, beyond the weights.",
    )
    for way, run in runs.items():
        speed = f"{BATCH * CONTEXT / run.seconds:,.0f}"
        memory = f"{run.peak_bytes / 1e6:.2f}"
        cells = (f"{run.values[-1]:.3f}", closed(runs, way), run.milliseconds, speed, memory)
        training.add_row(LABELS[way], *cells)
    by_way = {"weights": runs["weights"].alignments, "started": runs["matched"].alignments}
    return [training, angles(by_way)]


def run(
    epochs: int,
    seed: int,
    backend: str | None,
    device: torch.device,
    figure: Path,
    distribution: str = "normal",
) -> dict[str, Run]:
    """Train in the four ways, print the tables, write the figure; returns their results.

    The ways take turns, EVALUATIONS of them in an epoch.

    Raises:
        FileNotFoundError: this Python has no sources of its standard library.
    """
    console = Console()
    text = Text.load(device)
    runs = {way: Run() for way in LABELS}
    ways = {
        LABELS[way]: train(way, text, epochs, seed, backend, run, distribution)
        for way, run in runs.items()
    }
    batches = torch.arange(len(text.train)).split(BATCH)
    take_turns(console, ways, epochs * len(list(turns(batches))))
    for table in report(runs):
        console.print(table)
    curves = {LABELS[way]: (run.steps, run.values) for way, run in runs.items()}
    draw(curves, figure, across="step", up="held-out loss (nats per byte)", title=TITLE)
    console.print(f"Learning curves: {figure}")
    return runs
