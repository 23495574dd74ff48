"""`DFALayer`, and what the layers of one `DFA` share during a forward pass."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfa_kernels import checks, derivatives
from dfa_kernels.nn import guards, ranks
from dfa_kernels.nn.functions import Factor, Scaled, Stopped, apply
from dfa_kernels.nn.plan import Plan
from dfa_kernels.nn.scripting import Scriptable, tracing
from dfa_kernels.nn.sources import Source


class FeedbackPointsHandling(enum.Enum):
    """Which activations are trained when a `DFALayer` is called more than once in a forward pass.

    LAST: the last one. REDUCE: all of them, each by its own signal. MINIBATCH: the same as LAST. In
    tinydfa it is for several forward passes before their backward passes; here those work with all
    three.
    """

    LAST = "LAST"
    MINIBATCH = "MINIBATCH"
    REDUCE = "REDUCE"


# A function of an activation, of which the signal is.
Through = Callable[[Tensor], Tensor]


class Waiting(NamedTuple):
    """A layer's activation until the forward pass reaches the output; only lean has a factor.

    `before` is what the layer got, of which `activation` is a function if it has a `through`.
    """

    layer: int
    activation: Tensor
    factor: Factor | None
    before: Tensor


@dataclasses.dataclass
class Record:
    """A forward pass under `DFA.recording`: its output, and the activations it would train.

    Signals are of `activations`; backpropagation has gradients of those `before` any `through`.
    `source` makes the signals where the `DFA`'s own no longer could.
    """

    output: Tensor | None = None
    activations: Sequence[Tensor] = ()
    before: Sequence[Tensor] = ()
    plan: Plan | None = None
    source: Source | None = None


@dataclasses.dataclass
class Group:
    """What a `DFA` and its layers share.

    `handling` and `batch_dims` are None where nobody chose them. `waiting` has the activations of
    each layer until the forward pass reaches the output, `idle` the layers that no signal can train
    in this pass, and why, `anchors` the scalars of `fully_sharded`. `said` has the warnings that
    were given. `under_way` says whether a call of the model is, or is None without `DFA.watch`;
    `ends_model` whether that model's own output is known to be what the `DFA` gets.
    """

    mode: str
    handling: FeedbackPointsHandling | None
    batch_dims: tuple[int, ...] | None
    lean: bool
    requires_grad: bool
    through: Through | None = None
    under_way: bool | None = None
    ends_model: bool = False
    error_size: int | None = None  # n in the last forward pass that trained, or in a loaded state
    record: Record | None = None
    waiting: dict[int, list[Waiting]] = dataclasses.field(default_factory=dict)
    idle: dict[int, str] = dataclasses.field(default_factory=dict)
    anchors: list[Tensor] = dataclasses.field(default_factory=list)
    said: set[str] = dataclasses.field(default_factory=set)
    planned: tuple[Any, Plan] | None = None  # what the last plan was made of, and that plan

    @property
    def sends_signals(self) -> bool:
        """Whether a forward pass that begins now trains layers by signals."""
        return self.mode == "dfa" and self.record is None

    def wait(self, layer: int, before: Tensor, through: Through | None) -> None:
        """Keep an activation, or a function of it, until the forward pass reaches the output."""
        if self.ends_model and not self.under_way:
            guards.warn_of_a_pass_without_hooks(self.said)
            return
        if not self.waiting:
            # A new one: a compiled pass would have to return what it puts into an old one.
            self.waiting = {}
        activation = before if through is None else _carried(through, before)
        factor = None
        if self.lean and self.record is None and not torch.compiler.is_compiling():
            factor = Factor()
            activation = apply(Scaled, activation, factor)
        item = Waiting(layer, activation, factor, before)
        if layer in self.waiting:
            if self.handling is FeedbackPointsHandling.REDUCE:
                self.waiting[layer].append(item)
                return
            if self.handling is None and self.record is None:
                guards.warn_of_a_second_call(self.said, layer)
        self.waiting[layer] = [item]

    def pass_over(self, layer: int) -> None:
        """Note that no signal can train a layer in this pass, and why."""
        if not self.idle:
            self.idle = {}
        self.idle[layer] = "frozen" if torch.is_grad_enabled() else "no_grad"

    def items(self) -> list[Waiting]:
        """What waits, in the order of the layers."""
        return [item for layer in sorted(self.waiting) for item in self.waiting[layer]]

    def take(self) -> tuple[list[Waiting], dict[int, str], list[Tensor]]:
        """Hand over what waits, in the order of the layers, what layers are idle, and anchors."""
        items, waiting, idle, anchors = self.items(), self.waiting, self.idle, self.anchors
        self.forget()
        return items, {layer: why for layer, why in idle.items() if layer not in waiting}, anchors

    def forget(self) -> None:
        """Drop what waits."""
        self.waiting, self.idle, self.anchors = {}, {}, []

    def begin(self, *_: Any) -> None:
        """A forward pass of the model begins. Takes a forward pre-hook's arguments."""
        self.forget()
        self.under_way = True

    def end(self, *_: Any) -> None:
        """It ends. Takes a forward hook's arguments."""
        self.forget()
        self.under_way = False

    def warn_of_waiting(self, *_: Any) -> None:
        """Warn at the end of a forward pass of layers that nothing will train. A forward hook."""
        if self.waiting:
            guards.warn_of_waiting(self.said, sorted(self.waiting))

    def __getstate__(self) -> dict:
        # A copy takes no part in the forward pass under way.
        fresh: dict = {"waiting": {}, "idle": {}, "anchors": [], "record": None, "planned": None}
        fresh["under_way"] = None if self.under_way is None else False
        return {**self.__dict__, **fresh}


class DFALayer(Scriptable):
    """Marks a hidden activation, after its non-linearity, for the `DFA` it is given to.

    Without a `DFA` it cuts backpropagation, and warns once: nothing trains what is before it.

    Args:
        name: for messages and tables.
        batch_dims: the activation's batch dimensions; the others, flattened, are the layer. (0,)
            for [batch, features] and [batch, channels, height, width]; (0, 1) for [batch, tokens,
            features], (1, 0) for [tokens, batch, features]. None: those of the `DFA`.
        passthrough: True lets backpropagation through and sends no signal.
        requires_grad: True passes on an activation that requires a gradient, although none is sent
            back; see `DFA`. None: as the `DFA` says.
        through: a function of the activation that the signal is of; see `DFA`. None: the `DFA`'s.

    Attributes:
        size: l_i in the last forward pass that trained the layer, or in a loaded state. None before
            both. Read-only.
        name, batch_dims, passthrough, requires_grad, through: as given. A change takes effect with
            the next forward pass; the name stays once a `DFA` has the layer.
    """

    def __init__(
        self,
        name: str | None = None,
        batch_dims: Sequence[int] | None = None,
        passthrough: bool = False,
        *,
        requires_grad: bool | None = None,
        through: Through | None = None,
    ):
        super().__init__()
        self._group: Group | None = None
        self._index = 0
        self._size: int | None = None
        self._said: set[str] = set()
        self.name = name
        self.batch_dims = batch_dims
        self.passthrough = passthrough
        self.requires_grad = requires_grad
        self.through = through

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
        self._passthrough = checks.boolean("DFALayer", "passthrough", passthrough)

    @property
    def requires_grad(self) -> bool | None:
        """As given; a change takes effect with the next forward pass."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool | None) -> None:
        self._requires_grad = (
            None
            if requires_grad is None
            else checks.boolean("DFALayer", "requires_grad", requires_grad)
        )

    @property
    def through(self) -> Through | None:
        """As given; a change takes effect with the next forward pass."""
        through: Through | None = self.__dict__["_through"]
        return through

    @through.setter
    def through(self, through: Through | None) -> None:
        checks.function("DFALayer", "through", through)
        # No submodule: the parameters of one that is a module belong to the model.
        self.__dict__["_through"] = through

    @property
    def size(self) -> int | None:
        """l_i in the last forward pass that trained the layer, or in a loaded state. Read-only."""
        return self._size

    def forward(self, activation: Tensor) -> Tensor:
        """`activation`, detached unless backpropagation is to pass."""
        if torch.jit.is_scripting():
            if self.training and torch.is_grad_enabled() and activation.requires_grad:
                raise RuntimeError(
                    "DFALayer: a model by torch.jit.script does not train; "
                    "call eval() for inference"
                )
            return activation
        return self._mark(activation)

    @torch.jit.unused
    def _mark(self, activation: Tensor) -> Tensor:
        if not isinstance(activation, Tensor):
            raise TypeError(
                f"DFALayer: activation must be a tensor, got {type(activation).__name__}"
            )
        if self._passthrough:
            return activation
        group = self._group
        if group is None:
            if torch.is_grad_enabled() and derivatives.requires_gradient(activation):
                guards.warn_of_a_layer_alone(self._said, self.name)
            return activation.detach()
        mode, recorded = group.mode, group.record is not None
        if mode == "backprop" and not recorded:
            return activation
        if tracing("DFALayer", self.training, activation):
            return activation
        through = self.__dict__["_through"] or group.through
        learns = torch.is_grad_enabled() and derivatives.requires_gradient(activation)
        if mode != "dfa" and not recorded:
            pass
        elif recomputing("DFALayer"):
            if through is not None and learns:
                through(activation)  # saves again what it saved in the first pass
        else:
            if derivatives.forward_mode():
                raise NotImplementedError(
                    "DFALayer: there are no forward-mode derivatives of DFA (torch.func.jvp, "
                    "jacfwd, hessian, forward_ad): its gradients are of no function; use reverse "
                    'mode, or mode "backprop"'
                )
            if learns:
                group.wait(self._index, activation, through)
            else:
                group.pass_over(self._index)
        if recorded:
            return activation
        if mode != "dfa":
            return activation.detach()
        wanted = group.requires_grad if self._requires_grad is None else self._requires_grad
        if not wanted and group.under_way is None and learns and ranks.fully_sharded():
            guards.warn_of_an_unwatched_sharded_model(group.said)
            wanted = True
        return apply(Stopped, activation) if wanted else activation.detach()

    @property
    def row_dims(self) -> tuple[int, ...]:
        """The batch dimensions in force: this layer's, else those of its `DFA`."""
        if self._batch_dims is not None:
            return self._batch_dims
        group = self._group
        return (0,) if group is None or group.batch_dims is None else group.batch_dims

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        names = ("name", "batch_dims", "passthrough", "requires_grad")
        facts = {name: getattr(self, name) for name in names}
        return ", ".join(f"{key}={value!r}" for key, value in facts.items() if value)


def _carried(through: Through, before: Tensor) -> Tensor:
    """What `through` makes of an activation. Raises where no signal could come back."""
    activation = through(before)
    if not isinstance(activation, Tensor):
        got = f"a {type(activation).__name__}"
    elif not derivatives.requires_gradient(activation):
        got = "a tensor that requires no gradient"
    else:
        return activation
    raise TypeError(f"DFALayer: through must return a tensor made of the activation, got {got}")


def check_dims(function: str, dims: Sequence[int]) -> tuple[int, ...]:
    """The argument `batch_dims` as a tuple; a forward pass checks that tensors have them."""
    return tuple(checks.integers(function, "batch_dims", dims, low=-64, high=63))


def inside_backward() -> bool:
    """Whether a backward pass runs this code. What is compiled is taken to be outside."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def recomputing(function: str) -> bool:
    """Whether activation checkpointing is repeating a forward pass.

    Raises RuntimeError in a reentrant checkpoint: its first forward pass builds no graph, so no
    signal could train it.
    """
    if not inside_backward():
        return False
    if type(torch._C._current_autograd_node()).__name__ == "CheckpointFunctionBackward":
        raise RuntimeError(
            f"{function}: cannot be inside checkpoint(..., use_reentrant=True); "
            "use use_reentrant=False"
        )
    return True
