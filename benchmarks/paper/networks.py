"""The paper's networks, in the variants that its tables compare, and one for text."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.paper.architectures import he_initialization

HIDDEN = (800, 800, 800)
EMBEDDING = 64  # of a token
TEXT_HIDDEN = (512, 512, 512)


class Absolute(nn.Module):
    """|x|, the leaky ReLU with negative slope -1."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "|x|": Absolute,
    "ReLU": nn.ReLU,
    "leaky ReLU -0.5": functools.partial(nn.LeakyReLU, -0.5),
    "leaky ReLU 0.01": functools.partial(nn.LeakyReLU, 0.01),
}


@dataclass(frozen=True)
class Practice:
    """A variant of a network: a row of a table."""

    name: str
    activation: str = "tanh"
    normalization: str | float = "layer"
    distribution: str = "normal"
    batch_norm: bool = False
    dropout: tuple[float, float] = (0.0, 0.0)  # of the inputs, of fully connected hidden units
    masked: float | None = None  # fraction of the second layer's weights that learn
    narrow: int | None = None  # number of units in the second layer


def block(
    linear: nn.Module, practice: Practice, norm: Callable[[], nn.Module], dropout: float = 0.0
) -> list[nn.Module]:
    """A hidden layer in the published code's order: dropout, activation, batch norm."""
    modules = [linear, *([nn.Dropout(dropout)] if dropout else [])]
    modules.append(ACTIVATIONS[practice.activation]())
    return modules + ([norm()] if practice.batch_norm else [])


def perceptron(shape: tuple[int, ...], classes: int, practice: Practice) -> nn.Sequential:
    """Three hidden layers of 800; all modules but the last get feedback."""
    before, hidden = practice.dropout
    inputs = math.prod(shape)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for index, width in enumerate(HIDDEN, 1):
        if index == 2 and practice.narrow is not None:
            width = practice.narrow
        first = [nn.Flatten(), nn.Dropout(before)] if index == 1 else []
        norm = functools.partial(nn.BatchNorm1d, width)
        layer = block(nn.Linear(inputs, width), practice, norm, hidden)
        modules[f"layer {index}"] = nn.Sequential(*first, *layer)
        inputs = width
    modules["output"] = nn.Linear(inputs, classes)
    model = nn.Sequential(modules)
    he_initialization(model)
    if practice.masked is not None:
        freeze_most(model[1][0], practice.masked)
    return model


def freeze_most(linear: nn.Linear, fraction: float) -> None:
    """Let only a fixed random fraction of a layer's weights and biases learn."""
    for parameter in linear.parameters():
        learns = (torch.rand_like(parameter) < fraction).to(parameter.dtype)
        parameter.register_hook(functools.partial(_multiplied, learns))


def _multiplied(factor: Tensor, gradient: Tensor) -> Tensor:
    return gradient * factor.to(gradient.device)


def next_token(shape: tuple[int, ...], classes: int, practice: Practice) -> nn.Sequential:
    """Embedded tokens [tokens], side by side, through three hidden layers of 512.

    Small embeddings keep tanh near its linear part, where frozen layers tell most about tokens.
    """
    inputs = shape[0] * EMBEDDING
    embedding = nn.Embedding(classes, EMBEDDING)
    nn.init.normal_(embedding.weight, std=0.1)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for index, width in enumerate(TEXT_HIDDEN, 1):
        first = [embedding, nn.Flatten()] if index == 1 else []
        layer = [nn.Linear(inputs, width), ACTIVATIONS[practice.activation]()]
        modules[f"layer {index}"] = nn.Sequential(*first, *layer)
        inputs = width
    modules["output"] = nn.Linear(inputs, classes)
    model = nn.Sequential(modules)
    he_initialization(model)
    return model


def convolutional(shape: tuple[int, ...], classes: int, practice: Practice) -> nn.Sequential:
    """Three 5x5 convolutions with overlapping pooling, and a linear layer of 128."""
    before, hidden = practice.dropout
    channels, side = shape[0], shape[1]
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for index, width in enumerate((32, 64, 64), 1):
        first = [nn.Dropout2d(before)] if index == 1 else []
        convolution = nn.Conv2d(channels, width, 5, padding=2)
        layer = block(convolution, practice, functools.partial(nn.BatchNorm2d, width))
        modules[f"convolution {index}"] = nn.Sequential(*first, *layer, nn.MaxPool2d(3, 2))
        channels, side = width, (side - 3) // 2 + 1
    linear = nn.Linear(channels * side**2, 128)
    layer = block(linear, practice, functools.partial(nn.BatchNorm1d, 128), hidden)
    modules["linear"] = nn.Sequential(nn.Flatten(), *layer)
    modules["output"] = nn.Linear(128, classes)
    model = nn.Sequential(modules)
    he_initialization(model)
    return model


def points(model: nn.Sequential) -> list[str]:
    """The names of the hidden layers, which get feedback."""
    return [name for name, _ in model.named_children() if name != "output"]
