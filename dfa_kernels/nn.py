"""The trainer's glue: `DFALayer` marks a hidden activation, `DFA` marks the output and trains the
marked ones.

    self.dfa1, self.dfa2 = DFALayer(), DFALayer()
    self.dfa = DFA([self.dfa1, self.dfa2])
    ...
    x = self.dfa1(torch.tanh(self.fc1(x)))
    x = self.dfa2(torch.tanh(self.fc2(x)))
    x = self.dfa(self.fc3(x))

A `DFALayer` passes its activation on detached and not requiring a gradient, so that no product is
computed to carry one back through the next layer. The activation itself waits in the layer until
the forward pass reaches the `DFA`, which ties all of them to the output in one autograd Function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfa_kernels import checks, functional
from dfa_kernels.autograd import Feedback
from dfa_kernels.rows import count_rows, from_rows, to_rows

MODES = ("dfa", "backprop", "shallow")
# With independent matrices, layer i's rows of U begin at i times this.
INDEPENDENT_ROWS = 2**40


class FeedbackPointsHandling(enum.Enum):
    """Which activations are trained when a `DFALayer` is called more than once in a forward pass.

    LAST: the last one. REDUCE: all of them. MINIBATCH is LAST: tinydfa needs it where several
    forward passes precede their backward passes, which works here in every mode.
    """

    LAST = "LAST"
    MINIBATCH = "MINIBATCH"
    REDUCE = "REDUCE"


class Place(NamedTuple):
    """A signal's rows of U and scale, and the layer's activation it goes to."""

    layer: int
    row_offset: int
    size: int
    scale: float
    shape: torch.Size
    batch_dims: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass
class Record:
    """A forward pass under `DFA.recording`: the output, and the activations that would be
    trained."""

    output: Tensor | None = None
    activations: Sequence[Tensor] = ()
    places: Sequence[Place] = ()


@dataclasses.dataclass
class _Group:
    """What a `DFA` and its layers share."""

    mode: str
    handling: FeedbackPointsHandling
    batch_dims: tuple[int, ...]
    record: Record | None = None


class DFALayer(nn.Module):
    """Marks a hidden activation, after its non-linearity, for the `DFA` that this layer is given
    to.

    Args:
        name: for messages and tables.
        batch_dims: the activation's batch dimensions; the others, flattened, are the layer. None:
            those of the `DFA`. (0,) for [batch, features] and [batch, channels, height, width]; (0,
            1) for [batch, tokens, features].
        passthrough: True lets backpropagation through.

    Attributes:
        size: l_i, known from the first forward pass on.
    """

    def __init__(
        self,
        name: str | None = None,
        batch_dims: Sequence[int] | None = None,
        passthrough: bool = False,
    ):
        super().__init__()
        self.name = name
        self.batch_dims = None if batch_dims is None else tuple(batch_dims)
        self.passthrough = passthrough
        self.size: int | None = None
        self._group: _Group | None = None
        self._waiting: list[Tensor] = []

    def forward(self, activation: Tensor) -> Tensor:
        """`activation` detached, or as it is where backpropagation is wanted."""
        if not isinstance(activation, Tensor):
            raise TypeError(
                f"DFALayer: activation must be a tensor, got {type(activation).__name__}"
            )
        group = self._group
        if group is None:
            raise RuntimeError(
                "DFALayer: no DFA trains this layer; give it to one, as in DFA([layer, ...])"
            )
        _, self.size = count_rows(activation.shape, self.row_dims, "DFALayer")
        if self.passthrough or (group.mode == "backprop" and group.record is None):
            return activation
        if torch.is_grad_enabled() and activation.requires_grad:
            if group.handling is not FeedbackPointsHandling.REDUCE:
                self._waiting = []
            self._waiting.append(activation)
        return activation.detach() if group.record is None else activation

    @property
    def row_dims(self) -> tuple[int, ...]:
        """The batch dimensions in force: this layer's, else those of its `DFA`."""
        if self.batch_dims is not None:
            return self.batch_dims
        return self._group.batch_dims if self._group is not None else (0,)

    def take(self) -> list[Tensor]:
        """The activations that wait for the output; they wait no longer."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def __getstate__(self) -> dict:
        # What waits belongs to a forward pass, not to a copy.
        return {**self.__dict__, "_waiting": []}

    def extra_repr(self) -> str:
        """The arguments that were given."""
        facts = {"name": self.name, "batch_dims": self.batch_dims, "passthrough": self.passthrough}
        return ", ".join(f"{key}={value!r}" for key, value in facts.items() if value)


class DFA(nn.Module):
    """Trains the given layers by Direct Feedback Alignment; goes after the network's last layer.

    In the backward pass every marked activation gets B_i e as its gradient (Launay, Poli, Krzakala
    2019, eq. 3), where e is the gradient of the loss by this module's output and B_i is made from
    the seed. What lies between an activation and the `DFALayer` before it is trained through that
    gradient by autograd.

    Args:
        dfa_layers: the network's `DFALayer`s.
        normalization: True or "layer": 1/sqrt(l_i n) (eq. 8). False or "shared": 1/sqrt(l_max n)
            for all (eq. 7, the paper's "no norm"). A number: that scale for all.
        rp_device: where to project; signals go to their activations' devices. None: where all of
            them and the error are.
        no_training: True starts in mode "shallow".
        feedback_points_handling: see `FeedbackPointsHandling`.
        batch_dims: the output's batch dimensions, and the default of the layers; the output's
            others, flattened, are the error. A layer may have k times the error's rows: each row of
            the error then serves k consecutive rows of the activation, scaled by 1/sqrt(k).
        seed, distribution, backend: as for `dfa_kernels.project`.
        shared: True: one matrix, sliced for every layer (eq. 8). False: rows of its own for every
            layer.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument and what was got, when built or in
            the forward pass.
    """

    def __init__(
        self,
        dfa_layers: Iterable[DFALayer],
        normalization: bool | str | float = True,
        rp_device: torch.device | str | None = None,
        no_training: bool = False,
        feedback_points_handling: FeedbackPointsHandling = FeedbackPointsHandling.LAST,
        batch_dims: Sequence[int] = (0,),
        *,
        seed: int = 0,
        distribution: str = "normal",
        shared: bool = True,
        backend: str | None = None,
    ):
        super().__init__()
        if isinstance(normalization, bool):
            normalization = "layer" if normalization else "shared"
        checks.scales("DFA", normalization, [1], 1)
        checks.seed("DFA", seed)
        checks.distribution("DFA", distribution)
        if not isinstance(feedback_points_handling, FeedbackPointsHandling):
            raise TypeError(
                "DFA: feedback_points_handling must be a FeedbackPointsHandling, "
                f"got {feedback_points_handling!r}"
            )
        self.dfa_layers = tuple(dfa_layers)
        self.normalization = normalization
        self.rp_device = None if rp_device is None else torch.device(rp_device)
        self.seed = seed
        self.distribution = distribution
        self.shared = shared
        self.backend = backend
        self._group = _Group(
            "shallow" if no_training else "dfa", feedback_points_handling, tuple(batch_dims)
        )
        for index, layer in enumerate(self.dfa_layers):
            if not isinstance(layer, DFALayer):
                raise TypeError(
                    f"DFA: dfa_layers[{index}] must be a DFALayer, got {type(layer).__name__}"
                )
            if layer._group is not None:
                raise ValueError(f"DFA: dfa_layers[{index}] already belongs to a DFA")
            layer._group = self._group

    @property
    def mode(self) -> str:
        """How the next forward passes train: "dfa", "backprop" or "shallow".

        In "backprop" this module and its layers are the identity; in "shallow" nothing before the
        last `DFALayer` is trained.
        """
        return self._group.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(
                f"DFA: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}"
            )
        self._group.mode = mode

    def forward(self, output: Tensor) -> Tensor:
        """`output`, tied to the activations that wait in the layers."""
        if not isinstance(output, Tensor):
            raise TypeError(f"DFA: output must be a tensor, got {type(output).__name__}")
        waiting = [
            (index, activation)
            for index, layer in enumerate(self.dfa_layers)
            for activation in layer.take()
        ]
        if not waiting or not torch.is_grad_enabled():
            return output
        activations = [activation for _, activation in waiting]
        _, error_size = count_rows(output.shape, self._group.batch_dims, "DFA")
        sizes = [layer.size or 1 for layer in self.dfa_layers]
        scales = checks.scales("DFA", self.normalization, sizes, error_size)
        places = [self._place(index, a, output, scales[index]) for index, a in waiting]
        record = self._group.record
        if record is not None:
            record.output, record.activations, record.places = output, activations, places
            return output
        if self.mode == "shallow":
            return output
        return Feedback.apply(functools.partial(self.signals, places), output, *activations)

    def signals(self, places: Sequence[Place], error: Tensor) -> list[Tensor]:
        """B_i e for every place, by one projection, each of its activation's shape and dtype."""
        signals = functional.project(
            to_rows(error, self._group.batch_dims, "DFA").to(self.rp_device),
            [place.size for place in places],
            seed=self.seed,
            distribution=self.distribution,
            normalization=[place.scale for place in places],
            row_offsets=[place.row_offset for place in places],
            backend=self.backend,
        )
        return [
            from_rows(signal, place.shape, place.batch_dims, "DFA").to(place.device, place.dtype)
            for signal, place in zip(signals, places, strict=True)
        ]

    @contextlib.contextmanager
    def recording(self) -> Iterator[Record]:
        """Forward passes within are those of backpropagation; the last stays in the record."""
        self._group.record = Record()
        try:
            yield self._group.record
        finally:
            self._group.record = None
            for layer in self.dfa_layers:
                layer.take()

    def _place(self, index: int, activation: Tensor, output: Tensor, scale: float) -> Place:
        """Where the signal for an activation of this layer comes from and goes to."""
        layer = self.dfa_layers[index]
        if self.rp_device is None and activation.device != output.device:
            raise ValueError(
                f"DFA: dfa_layers[{index}] is on {activation.device}, the output on "
                f"{output.device}; give rp_device to say where to project"
            )
        error_rows, _ = count_rows(output.shape, self._group.batch_dims, "DFA")
        rows, size = count_rows(activation.shape, layer.row_dims, "DFA")
        repeats = rows // error_rows if error_rows else 1
        if repeats * error_rows != rows or repeats == 0:
            raise ValueError(
                f"DFA: dfa_layers[{index}] must have a multiple of the output's {error_rows} rows, "
                f"got {rows}; batch_dims says which dimensions are rows"
            )
        return Place(
            layer=index,
            row_offset=0 if self.shared else index * INDEPENDENT_ROWS,
            size=size,
            scale=scale / math.sqrt(repeats),
            shape=activation.shape,
            batch_dims=layer.row_dims,
            dtype=activation.dtype,
            device=activation.device,
        )
