"""Trains one residual network by one recipe, and keeps what it learned and how well it aligned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import provenance
from benchmarks.paper.data import Data
from benchmarks.paper.training import evaluate, name_of
from benchmarks.paper.transformers.feedback import exchange, feedback_of
from benchmarks.paper.transformers.residual import NETWORKS, Add, Residual
from dfa_kernels import DFA, Attachment, alignment, attach

OTHER_SEED = 2**32  # added to a seed, it makes the matrix of the null values
EVALUATION = 4096  # rows of the output to measure the loss on
ALIGNMENT = 512  # and the alignment
CURVE = 8  # measurements of a run


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: a row of a table.

    Rates and decay are AdamW's. `scale` is that of the output layer's first weights, in units of
    1/sqrt(width); those of an unmatched one are independent normal numbers. Branches that start at
    0 are scaled by 1/sqrt(their number).
    """

    name: str
    mode: str = "dfa"
    matched: bool = True
    distribution: str = "normal"
    scale: float = 1.0
    output_rate: float = 3e-3
    hidden_rate: float = 1e-3
    output_decay: float = 0.0
    pull: float = 0.0  # decay of the output layer towards its first weights instead of 0
    schedule: str = "constant"  # or "cosine"
    warmup: int = 0  # steps in which the rates rise
    frozen: int = 0  # steps before the output layer learns; -1: it never does
    points: str = "blocks"  # see `Residual.points`
    through_norm: bool = True  # signals come back through a norm like the last one
    feedback: str = "seed"  # see `feedback_of`
    embedding_rate: float = 3e-3
    zero: bool = True  # whether each branch starts at 0
    learns: str = "all"  # or "embedding": of what is before the last norm
    backprop_every: int = 0  # steps; one of so many is backpropagation's
    optimizer: str = "adam"  # or "sgd", with momentum 0.9


@dataclass(frozen=True)
class Setting:
    """What is trained: a network, on some data, for some steps."""

    network: str
    data: str
    depth: int
    width: int
    steps: int
    batch: int
    before: str | None = None  # data of which backpropagation has learned
    before_steps: int = 0


@dataclass(frozen=True)
class Trial:
    """One training run."""

    setting: Setting
    recipe: Recipe
    seed: int

    @property
    def file_name(self) -> str:
        """A readable name that differs for every trial."""
        return name_of(self, self.setting.network, self.setting.data, self.recipe.name, self.seed)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of all rows of the output."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


class Trainee:
    """A network as a trial wants it, with its optimizer."""

    def __init__(self, trial: Trial, data: Data, learned: dict | None = None):
        setting, recipe = trial.setting, trial.recipe
        torch.manual_seed(trial.seed)
        network = NETWORKS[setting.network]
        self.model = network(data.shape, data.classes, setting.width, setting.depth)
        self.model.to(data.train_x.device)
        scale = recipe.scale / math.sqrt(setting.width)
        branches = [module for module in self.model.modules() if isinstance(module, Add)]
        for module in branches if recipe.zero else ():
            module.start_at_zero(scale=1 / math.sqrt(len(branches)))
        if recipe.learns == "embedding":
            self.model.blocks.requires_grad_(False)
        self.handle = _attached(self.model, trial, scale)
        weight = self.model.output.weight
        if recipe.matched:
            self.handle.dfa.match_output_(self.model.output, scale)
        else:
            nn.init.normal_(weight, std=scale)
        if learned is not None:
            self.model.load_state_dict(learned)
        if recipe.feedback != "seed":
            dfa = self.handle.dfa
            exchange(dfa, feedback_of(recipe.feedback, self.model.output, dfa))
        self.handle.mode = recipe.mode
        self.start = weight.detach().clone()
        self.trial = trial
        self.order = torch.Generator().manual_seed(trial.seed)
        parts = (
            (self.model.blocks, recipe.hidden_rate, 0.0),
            (self.model.embed, recipe.embedding_rate, 0.0),
            (self.model.norm, recipe.output_rate, 0.0),
            (self.model.output, recipe.output_rate, recipe.output_decay),
        )
        groups = [
            {"params": [*part.parameters()], "lr": rate, "weight_decay": decay}
            for part, rate, decay in parts
        ]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, momentum=0.9)
            if recipe.optimizer == "sgd"
            else torch.optim.AdamW(groups)
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)

    def _factor(self, step: int) -> float:
        recipe, steps = self.trial.recipe, self.trial.setting.steps
        factor = min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else 1.0
        if recipe.schedule == "cosine":
            factor *= (1 + math.cos(math.pi * step / steps)) / 2
        return factor

    def learn(self, data: Data, steps: range) -> None:
        """Learn from random batches."""
        self.model.train()
        for step in steps:
            batch = torch.randint(
                len(data.train_y), (self.trial.setting.batch,), generator=self.order
            ).to(data.train_y.device)
            self.step(step, data.train_x[batch], data.train_y[batch])
        self.model.eval()

    def step(self, step: int, x: Tensor, y: Tensor) -> None:
        """Learn from one batch."""
        recipe, weight = self.trial.recipe, self.model.output.weight
        weight.requires_grad_(recipe.frozen >= 0 and step >= recipe.frozen)
        if recipe.backprop_every:
            exact = step % recipe.backprop_every == 0
            self.handle.mode = "backprop" if exact else recipe.mode
        self.optimizer.zero_grad()
        loss_of(self.model, x, y).backward()
        self.optimizer.step()
        if recipe.pull:
            rate = self.optimizer.param_groups[-1]["lr"]
            with torch.no_grad():
                weight.lerp_(self.start, rate * recipe.pull)
        self.scheduler.step()


def _attached(model: Residual, trial: Trial, scale: float) -> Attachment:
    recipe = trial.recipe
    # Where steps depend on it, signals are as long as gradients.
    alike = recipe.optimizer == "sgd" or recipe.backprop_every > 0
    return attach(
        model,
        dict.fromkeys(model.points(recipe.points), model.dims),
        batch_dims=model.output_dims,
        seed=trial.seed,
        distribution=recipe.distribution,
        normalization=scale if alike else True,
        through=model.through if recipe.through_norm else None,
    )


def measure(trainee: Trainee, data: Data, null: bool = True) -> dict:
    """The test loss and accuracy and, of DFA, the alignment by point and the output layer's.

    "null" is the alignment that signals of another seed would have. "output" is the cosine of the
    output layer's weights with its first ones.
    """
    trial, model = trainee.trial, trainee.model
    found: dict = {}
    found["loss"], found["accuracy"] = evaluate(model, *sample(data, EVALUATION), batch=128)
    weight = model.output.weight.detach()
    found["output"] = F.cosine_similarity(weight.flatten(), trainee.start.flatten(), 0).item()
    if trial.recipe.mode != "dfa":
        return found
    x, y = sample(data, ALIGNMENT)
    dfa = trainee.handle.dfa
    mode, source = dfa.mode, dfa.source
    dfa.mode = "dfa"
    other = DFA([], seed=trial.seed + OTHER_SEED, distribution=trial.recipe.distribution)
    for key, its in (("alignment", source), ("null", other.source))[: 1 + null]:
        exchange(dfa, its)
        angles = alignment(model, lambda: loss_of(model, x, y))
        found[key] = {name: angle.mean for name, angle in angles.items()}
    exchange(dfa, source)
    dfa.mode = mode
    return found


def sample(data: Data, rows: int) -> tuple[Tensor, Tensor]:
    """Test data that make so many rows of the output, evenly from all there are."""
    wanted = rows // math.prod(data.test_y.shape[1:])
    apart = max(1, len(data.test_y) // wanted)
    return data.test_x[::apart][:wanted], data.test_y[::apart][:wanted]


def measured_steps(steps: int) -> list[int]:
    """After which steps a network is measured, the last among them."""
    return sorted({max(1, round(steps * part / CURVE)) for part in range(1, CURVE + 1)})


def before_of(trial: Trial, data: Data) -> Trial:
    """The training by backpropagation that a trial goes on from."""
    steps = trial.setting.before_steps
    setting = replace(trial.setting, data=data.name, steps=steps, before=None, before_steps=0)
    return Trial(setting, Recipe("before", mode="backprop", matched=False), trial.seed)


def learned_before(trial: Trial, data: Data) -> dict:
    """The state of a network after backpropagation on other data."""
    before = before_of(trial, data)
    trainee = Trainee(before, data)
    trainee.learn(data, range(before.setting.steps))
    trainee.handle.detach()
    return trainee.model.state_dict()


def train(trial: Trial, data: Data, tick: Callable[[], None], learned: dict | None = None) -> dict:
    """Train one network; what was measured on the way, by step. `tick` is called every time.

    `learned` is the state to begin with.
    """
    trainee, setting = Trainee(trial, data, learned), trial.setting
    curve = []
    begin = 0
    for end in measured_steps(setting.steps):
        trainee.learn(data, range(begin, end))
        curve.append({"step": end} | measure(trainee, data, null=end == setting.steps))
        begin = end
        tick()
    return {"commit": provenance.commit(), "curve": curve}
