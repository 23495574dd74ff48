"""Tables 2 and 4 and figure 4: what they compare, how it is trained, and what the paper claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks.paper import networks
from benchmarks.paper.data import Data
from benchmarks.paper.networks import Practice
from benchmarks.paper.published import BOTTLENECKS
from benchmarks.paper.training import Job, Network, Settings, Store, train


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: `better` aligns better than `worse`."""

    better: str
    worse: str


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper."""

    name: str
    title: str
    network: Network
    rows: tuple[tuple[Practice, tuple[str, ...]], ...]  # each with its modes of training
    claims: tuple[Claim, ...]
    settings: dict[str, Settings]  # by data
    seeds: dict[str, int]

    def jobs(self, data: str, quick: bool, seeds: int | None, epochs: int | None) -> Iterator[Job]:
        """Every training run. `quick` has one seed and one epoch, to show that everything runs."""
        settings = self.settings[data]
        settings = replace(settings, epochs=epochs or (1 if quick else settings.epochs))
        for seed in range(seeds or (1 if quick else self.seeds[data])):
            for practice, modes in self.rows:
                for mode in modes:
                    yield Job(self.name, practice, mode, seed, settings, data)

    def run(
        self, jobs: list[Job], data: Data, store: Store, tick: Callable[[int], None]
    ) -> list[tuple[Job, dict]]:
        """The results of all jobs. Those not in the store are trained and stored.

        `tick` is called with the number of epochs just finished.
        """
        results = []
        for job in jobs:
            result = store.get(job)
            if result is None:
                resized = data.resized(job.settings.side)
                result = train(self.network, job, resized, lambda: tick(1))
                store.put(job, result)
            else:
                tick(job.settings.epochs)
            results.append((job, result))
        return results


EVERY = ("backprop", "shallow", "dfa")
TRAINED = ("backprop", "dfa")
# The paper's "no norm", as in the published code: U itself, with entries of variance 1. Eq. 7 alone
# is normalization="shared", which equals eq. 8 where all layers have the same size.
UNNORMALIZED = Practice("no norm", normalization=1.0)
LIGHT_DROPOUT, HEAVY_DROPOUT = (0.1, 0.1), (0.1, 0.5)
SHARED_CLAIMS = (
    Claim("tanh", "no norm"),
    Claim("tanh", "batch norm"),
    Claim("tanh", "dropout 0.5"),
    Claim("dropout 0.1", "dropout 0.5"),
)

# 50 epochs, batch 128, learning rate 5e-4: best_practices.py and bottleneck.py.
CIFAR10 = Settings(epochs=50, batch=128, hidden_rate=128 * 5e-4, output_rate=5e-4, side=32)
# Our own: 1,198 images make 9 batches of 128 an epoch, CIFAR-10 makes 390. 9 are too few to align.
DIGITS = Settings(epochs=15, batch=32, hidden_rate=0.1, output_rate=0.01, side=8)

TABLE2 = Experiment(
    name="table2",
    title="Table 2: 3x800, fully connected",
    network=networks.perceptron,
    rows=(
        (Practice("tanh"), EVERY),
        (UNNORMALIZED, ("dfa",)),
        (Practice("batch norm", batch_norm=True), TRAINED),
        # The published code has slopes 0.5, 0.1 and 0.01; -0.5 and |x| (slope -1) are the paper's.
        (Practice("|x|", activation="|x|"), TRAINED),
        (Practice("leaky ReLU -0.5", activation="leaky ReLU -0.5"), TRAINED),
        (Practice("ReLU", activation="ReLU"), TRAINED),
        (Practice("leaky ReLU 0.01", activation="leaky ReLU 0.01"), TRAINED),
        (Practice("dropout 0.5", dropout=HEAVY_DROPOUT), TRAINED),
        (Practice("dropout 0.1", dropout=LIGHT_DROPOUT), TRAINED),
    ),
    claims=(
        *SHARED_CLAIMS,
        Claim("tanh", "ReLU"),
        Claim("tanh", "leaky ReLU 0.01"),
        Claim("leaky ReLU -0.5", "ReLU"),
        Claim("leaky ReLU -0.5", "leaky ReLU 0.01"),
    ),
    settings={"CIFAR-10": CIFAR10, "digits": DIGITS},
    seeds={"CIFAR-10": 10, "digits": 3},
)

TABLE4 = Experiment(
    name="table4",
    title="Table 4: three convolutions",
    network=networks.convolutional,
    rows=(
        (Practice("tanh"), EVERY),
        (Practice("eq. 7 alone", normalization="shared"), ("dfa",)),
        (UNNORMALIZED, ("dfa",)),
        (Practice("batch norm", batch_norm=True), TRAINED),
        (Practice("dropout 0.5", dropout=HEAVY_DROPOUT), TRAINED),
        (Practice("dropout 0.1", dropout=LIGHT_DROPOUT), TRAINED),
    ),
    claims=(*SHARED_CLAIMS, Claim("tanh", "eq. 7 alone")),
    settings={"CIFAR-10": CIFAR10, "digits": replace(DIGITS, epochs=10, side=16)},
    seeds={"CIFAR-10": 10, "digits": 3},
)


def bottlenecks() -> tuple[tuple[Practice, tuple[str, ...]], ...]:
    """Bottlenecks in the second layer: only b/800 of its weights learn, or it has only b units.

    The first is the published code's, the second what the name suggests.
    """
    rows: list[tuple[Practice, tuple[str, ...]]] = []
    for size in BOTTLENECKS:
        rows.append((Practice(f"masked {size}", masked=size / 800), ("dfa",)))
        rows.append((Practice(f"narrow {size}", narrow=size), TRAINED))
    return tuple(rows)


FIGURE4 = Experiment(
    name="figure4",
    title="Figure 4: a bottleneck in the second of three layers of 800",
    network=networks.perceptron,
    rows=bottlenecks(),
    claims=(),
    settings={"CIFAR-10": CIFAR10, "digits": replace(DIGITS, epochs=10)},
    seeds={"CIFAR-10": 1, "digits": 2},
)

EXPERIMENTS = {experiment.name: experiment for experiment in (TABLE2, TABLE4, FIGURE4)}
