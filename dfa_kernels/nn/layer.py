"""`DFALayer`, and what the layers of one `DFA` share during a forward pass."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfa_kernels import checks
from dfa_kernels.layers import Layers
from dfa_kernels.nn.functions import Factor, Scaled
from dfa_kernels.nn.signals import Place


class FeedbackPointsHandling(enum.Enum):
    """Which activations are trained when a `DFALayer` is called more than once in a forward pass.

    LAST: the last one. REDUCE: all of them, each by its own signal. MINIBATCH: the same as LAST. In
    tinydfa it is for several forward passes before their backward passes; here those work with all
    three.
    """

    LAST = "LAST"
    MINIBATCH = "MINIBATCH"
    REDUCE = "REDUCE"


class Waiting(NamedTuple):
    """A layer's activation until the forward pass reaches the output; only lean has a factor."""

    layer: int
    activation: Tensor
    factor: Factor | None


@dataclasses.dataclass
class Record:
    """A forward pass under `DFA.recording`: its output, and the activations it would train.

    `indices` has the index of each activation's `DFALayer`, `places` its place, and `layers` what
    makes the signals of the places.
    """

    output: Tensor | None = None
    activations: Sequence[Tensor] = ()
    indices: Sequence[int] = ()
    places: Sequence[Place] = ()
    layers: Layers = dataclasses.field(default_factory=lambda: Layers((), (), ()))


@dataclasses.dataclass
class Group:
    """What a `DFA` and its layers share."""

    mode: str
    handling: FeedbackPointsHandling
    batch_dims: tuple[int, ...]
    lean: bool
    error_size: int | None = None  # n in the last forward pass that trained, or in a loaded state
    record: Record | None = None
    waiting: list[Waiting] = dataclasses.field(default_factory=list)

    def wait(self, layer: int, activation: Tensor) -> None:
        """Keep an activation until the forward pass reaches the output."""
        factor = None
        if self.lean and self.record is None and not torch.compiler.is_compiling():
            factor = Factor()
            activation = Scaled.apply(activation, factor)
        if self.handling is not FeedbackPointsHandling.REDUCE:
            self.waiting = [other for other in self.waiting if other.layer != layer]
        self.waiting.append(Waiting(layer, activation, factor))

    def take(self) -> list[Waiting]:
        """Hand over what waits, in the order of the layers."""
        waiting, self.waiting = self.waiting, []
        return sorted(waiting, key=lambda item: item.layer)

    def forget(self, *_: Any) -> None:
        """Drop what waits. Takes a forward hook's arguments."""
        self.waiting = []

    def warn_of_waiting(self, *_: Any) -> None:
        """Warn at the end of a forward pass of layers that nothing will train. A forward hook."""
        if self.waiting:
            indices = sorted({item.layer for item in self.waiting})
            warnings.warn(
                f"DFA: dfa_layers {indices} were called after the DFA, or it was not called; "
                "nothing trains what is before them",
                stacklevel=2,
            )

    def __getstate__(self) -> dict:
        # A copy takes no part in the forward pass under way.
        return {**self.__dict__, "waiting": [], "record": None}


class DFALayer(nn.Module):
    """Marks a hidden activation, after its non-linearity, for the `DFA` it is given to.

    Args:
        name: for messages and tables.
        batch_dims: the activation's batch dimensions; the others, flattened, are the layer. (0,)
            for [batch, features] and [batch, channels, height, width]; (0, 1) for [batch, tokens,
            features], (1, 0) for [tokens, batch, features]. None: those of the `DFA`.
        passthrough: True lets backpropagation through and sends no signal.

    Attributes:
        size: l_i in the last forward pass that trained the layer, or in a loaded state. None before
            both. Read-only.
        name, batch_dims, passthrough: as given. A change takes effect with the next forward pass;
            the name stays once a `DFA` has the layer.
    """

    def __init__(
        self,
        name: str | None = None,
        batch_dims: Sequence[int] | None = None,
        passthrough: bool = False,
    ):
        super().__init__()
        self._group: Group | None = None
        self._index = 0
        self._size: int | None = None
        self.name = name
        self.batch_dims = batch_dims
        self.passthrough = passthrough

    @property
    def name(self) -> str | None:
        """As given. It may be set until a `DFA` has the layer."""
        return self._name

    @name.setter
    def name(self, name: str | None) -> None:
        if self._group is not None:
            raise AttributeError(
                f"DFALayer: name must be set before the layer is given to a DFA, got {name!r}"
            )
        if name is not None and not isinstance(name, str):
            raise TypeError(f"DFALayer: name must be a str or None, got {name!r}")
        self._name = name

    @property
    def batch_dims(self) -> tuple[int, ...] | None:
        """As given; a change takes effect with the next forward pass."""
        return self._batch_dims

    @batch_dims.setter
    def batch_dims(self, dims: Sequence[int] | None) -> None:
        self._batch_dims = None if dims is None else check_dims("DFALayer", dims)

    @property
    def passthrough(self) -> bool:
        """As given; a change takes effect with the next forward pass."""
        return self._passthrough

    @passthrough.setter
    def passthrough(self, passthrough: bool) -> None:
        self._passthrough = bool(passthrough)

    @property
    def size(self) -> int | None:
        """l_i in the last forward pass that trained the layer, or in a loaded state. Read-only."""
        return self._size

    def forward(self, activation: Tensor) -> Tensor:
        """`activation`, detached unless backpropagation is to pass."""
        if not isinstance(activation, Tensor):
            raise TypeError(
                f"DFALayer: activation must be a tensor, got {type(activation).__name__}"
            )
        group = self._group
        if group is None:
            raise RuntimeError(
                "DFALayer: no DFA trains this layer; give it to one, as in DFA([layer, ...])"
            )
        recorded = group.record is not None
        if self.passthrough or (group.mode == "backprop" and not recorded):
            return activation
        if (
            (group.mode == "dfa" or recorded)
            and torch.is_grad_enabled()
            and activation.requires_grad
            and not recomputing("DFALayer")
        ):
            group.wait(self._index, activation)
        return activation if recorded else activation.detach()

    @property
    def row_dims(self) -> tuple[int, ...]:
        """The batch dimensions in force: this layer's, else those of its `DFA`."""
        if self.batch_dims is not None:
            return self.batch_dims
        return self._group.batch_dims if self._group is not None else (0,)

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        facts = {"name": self.name, "batch_dims": self.batch_dims, "passthrough": self.passthrough}
        return ", ".join(f"{key}={value!r}" for key, value in facts.items() if value)


def check_dims(function: str, dims: Sequence[int]) -> tuple[int, ...]:
    """The argument `batch_dims` as a tuple; a forward pass checks that tensors have them."""
    return tuple(checks.integers(function, "batch_dims", dims, low=-64, high=63))


def recomputing(function: str) -> bool:
    """Whether activation checkpointing is repeating a forward pass.

    Raises RuntimeError in a reentrant checkpoint: its first forward pass builds no graph, so no
    signal could train it.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    if type(torch._C._current_autograd_node()).__name__ == "CheckpointFunctionBackward":
        raise RuntimeError(
            f"{function}: cannot be inside checkpoint(..., use_reentrant=True); "
            "use use_reentrant=False"
        )
    return True
