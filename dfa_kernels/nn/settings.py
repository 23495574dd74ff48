"""What a `DFA` was built with, as attributes that take what its arguments take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfa_kernels import checks
from dfa_kernels.nn.guards import warn_of_another_matrix
from dfa_kernels.nn.layer import DFALayer, FeedbackPointsHandling, Group, Through, check_dims
from dfa_kernels.nn.matching import Match, same_matrix
from dfa_kernels.nn.scripting import Scriptable
from dfa_kernels.nn.signals import check_masks
from dfa_kernels.nn.sources import (
    INDEPENDENT_ROWS,
    Scales,
    Seeded,
    Slicing,
    Source,
    Stored,
    check_matrix,
    check_normalization,
    check_seeded,
)

MODES = ("dfa", "backprop", "shallow")


class Settings(Scriptable):
    """The attributes of a `DFA` that say how its signals are made.

    Setting one checks it as the constructor does, and leaves all as it was where that fails.
    """

    _group: Group
    _source: Source
    _error_transform: Callable[[Tensor], Tensor] | None
    _signal_transform: Callable[[Tensor, DFALayer], Tensor] | None
    _layers: tuple[DFALayer, ...]
    _slicing: Slicing
    _match: Match | None = None  # what match_output_ has to find in the forward passes
    _chosen: dict[str, Any]  # the arguments that a loaded state may contradict, where given

    @property
    def dfa_layers(self) -> tuple[DFALayer, ...]:
        """The layers, in the order given. Read-only."""
        return self._layers

    @property
    def source(self) -> Source:
        """What makes the signals; `matrix` is the same.

        Takes what the argument `matrix` takes, or the `source` of another `DFA`.
        """
        return self._source

    @source.setter
    def source(self, matrix: Tensor | Sequence[Tensor] | Source) -> None:
        if matrix is None:
            raise TypeError("DFA: matrix must be stored matrices or a Source, got None")
        count, device = len(self.dfa_layers), self.rp_device
        seeded = Seeded(0, "normal", None)
        if isinstance(self.source, (Seeded, Stored)):
            seeded = Seeded(self.source.seed, self.source.distribution, None)
        source, shared = check_matrix(matrix, self.shared, seeded, count, device)
        self._share(shared)
        self._exchange(source)
        for name in ("seed", "distribution"):
            self._choose(name, isinstance(source, Seeded))
        if isinstance(source, Stored):
            self._choose("shared", False)

    matrix = source

    @property
    def seed(self) -> int | None:
        """The source's, if it has one."""
        return getattr(self.source, "seed", None)

    @seed.setter
    def seed(self, seed: int | None) -> None:
        _, distribution, backend = self._seeded("seed")
        self._exchange(check_seeded(seed, distribution, backend))
        self._choose("seed", seed is not None)

    @property
    def distribution(self) -> str | None:
        """The source's, if it has one."""
        return getattr(self.source, "distribution", None)

    @distribution.setter
    def distribution(self, distribution: str | None) -> None:
        seed, _, backend = self._seeded("distribution")
        self._exchange(check_seeded(seed, distribution, backend))
        self._choose("distribution", distribution is not None)

    @property
    def backend(self) -> str | None:
        """The source's, if it has one; None chooses automatically."""
        return getattr(self.source, "backend", None)

    @backend.setter
    def backend(self, backend: str | None) -> None:
        seed, distribution, _ = self._seeded("backend")
        self._hold("source", check_seeded(seed, distribution, backend))

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """The stored matrices, if those make the signals. Read-only: set `source`."""
        return self.source.matrices if isinstance(self.source, Stored) else ()

    @property
    def row_offsets(self) -> tuple[int, ...]:
        """Where each layer's rows of U begin. Read-only: set `shared`."""
        return self._slicing.row_offsets

    @property
    def shared(self) -> bool:
        """Whether all layers slice one matrix."""
        return not any(self.row_offsets)

    @shared.setter
    def shared(self, shared: bool | None) -> None:
        if isinstance(self.source, Stored):
            raise AttributeError(
                "DFA: shared follows from the number of stored matrices; set source to others"
            )
        before = self.row_offsets
        self._share(shared is None or checks.boolean("DFA", "shared", shared))
        self._choose("shared", shared is not None)
        matched = () if self._match is None else self._match.layers
        if any(self.row_offsets[index] != before[index] for index in matched):
            self._unmatch()

    @property
    def lean(self) -> bool:
        """Whether one signal is kept and scaled for each layer."""
        return self._group.lean

    @lean.setter
    def lean(self, lean: bool) -> None:
        lean = checks.boolean("DFA", "lean", lean)
        self._check_lean(lean, self.shared)
        self._group.lean = lean

    @property
    def normalization(self) -> str | float | Scales:
        """The law's name, the scale or the function."""
        return self._slicing.normalization

    @normalization.setter
    def normalization(self, normalization: bool | str | float | Scales) -> None:
        law = check_normalization(normalization)
        self._slicing = self._slicing._replace(normalization=law)
        self._submodule("normalization", law)
        chosen = not checks.is_boolean(normalization) or not normalization
        self._choose("normalization", chosen)

    @property
    def error_transform(self) -> Callable[[Tensor], Tensor] | None:
        """As given."""
        return self._error_transform

    @error_transform.setter
    def error_transform(self, function: Callable[[Tensor], Tensor] | None) -> None:
        checks.function("DFA", "error_transform", function)
        self._hold("error_transform", function)

    @property
    def signal_transform(self) -> Callable[[Tensor, DFALayer], Tensor] | None:
        """As given."""
        return self._signal_transform

    @signal_transform.setter
    def signal_transform(self, function: Callable[[Tensor, DFALayer], Tensor] | None) -> None:
        checks.function("DFA", "signal_transform", function)
        self._hold("signal_transform", function)

    @property
    def scale_repeats(self) -> bool:
        """Whether signals that serve k rows are divided by sqrt(k)."""
        return self._scale_repeats

    @scale_repeats.setter
    def scale_repeats(self, scale_repeats: bool) -> None:
        self._scale_repeats = checks.boolean("DFA", "scale_repeats", scale_repeats)

    @property
    def requires_grad(self) -> bool:
        """Whether layers pass on activations that require a gradient, where they do not say."""
        return self._group.requires_grad

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self._group.requires_grad = checks.boolean("DFA", "requires_grad", requires_grad)

    @property
    def through(self) -> Through | None:
        """What signals come back through, of layers that do not say; as given."""
        return self._group.through

    @through.setter
    def through(self, through: Through | None) -> None:
        checks.function("DFA", "through", through)
        self._group.through = through

    @property
    def rp_device(self) -> torch.device | None:
        """As given."""
        return self._rp_device

    @rp_device.setter
    def rp_device(self, device: torch.device | str | None) -> None:
        try:
            place = None if device is None else torch.device(device)
        except (TypeError, RuntimeError) as refusal:
            raise type(refusal)(
                f"DFA: rp_device must be a device or None, got {device!r}"
            ) from refusal
        if isinstance(self.source, Stored):
            self._source = self.source.to(place)
        self._rp_device = place

    @property
    def masks(self) -> dict[int, Tensor]:
        """By index; `mask` is the same. Takes what the argument takes."""
        return self._masks

    @masks.setter
    def masks(self, mask: Mapping[str | int, Tensor] | Sequence[Tensor | None] | None) -> None:
        self._masks = check_masks(mask, [layer.name for layer in self.dfa_layers])

    mask = masks

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

    @property
    def no_training(self) -> bool:
        """tinydfa's name for mode "shallow"; False sets mode "dfa"."""
        return self.mode == "shallow"

    @no_training.setter
    def no_training(self, value: bool) -> None:
        self.mode = "shallow" if checks.boolean("DFA", "no_training", value) else "dfa"

    @property
    def feedback_points_handling(self) -> FeedbackPointsHandling:
        """As given, or LAST; a change takes effect with the next forward pass."""
        return self._group.handling or FeedbackPointsHandling.LAST

    @feedback_points_handling.setter
    def feedback_points_handling(self, handling: FeedbackPointsHandling | str | None) -> None:
        if handling is None:
            self._group.handling = None
            return
        if isinstance(handling, str) and handling in FeedbackPointsHandling.__members__:
            handling = FeedbackPointsHandling[handling]
        if not isinstance(handling, FeedbackPointsHandling):
            names = ", ".join(map(repr, FeedbackPointsHandling.__members__))
            raise TypeError(
                f"DFA: feedback_points_handling must be a FeedbackPointsHandling or one of {names},"
                f" got {handling!r}"
            )
        self._group.handling = handling

    @property
    def batch_dims(self) -> tuple[int, ...]:
        """As given, or (0,); a change takes effect with the next forward pass."""
        return (0,) if self._group.batch_dims is None else self._group.batch_dims

    @batch_dims.setter
    def batch_dims(self, dims: Sequence[int] | None) -> None:
        self._group.batch_dims = None if dims is None else check_dims("DFA", dims)

    def _choose(self, name: str, chosen: bool) -> None:
        """Remember what was asked for, beside which a loaded state may be another."""
        if chosen:
            self._chosen[name] = getattr(self, name)
        else:
            self._chosen.pop(name, None)

    def _seeded(self, argument: str) -> Seeded:
        """The source, where it is one that `argument` belongs to."""
        if isinstance(self.source, Seeded):
            return self.source
        stored = isinstance(self.source, Stored)
        kind = "stored matrices" if stored else f"a {type(self.source).__name__}"
        raise AttributeError(
            f"DFA: {argument} cannot be set, since {kind} and no seed make the signals; "
            f"set source, for which another DFA's will do: DFA([], {argument}=...).source"
        )

    def _share(self, shared: bool) -> None:
        """Let the layers read one matrix, or each its own."""
        self._check_lean(self.lean, shared)
        if shared != self.shared:
            count = len(self.dfa_layers)
            offsets = tuple(0 if shared else index * INDEPENDENT_ROWS for index in range(count))
            self._slicing = self._slicing._replace(row_offsets=offsets)

    @staticmethod
    def _check_lean(lean: bool, shared: bool) -> None:
        if lean and not shared:
            raise ValueError("DFA: lean needs one matrix for all layers, got independent ones")

    def _exchange(self, source: Source) -> None:
        """Take another source, which an output layer that was set from the old one misses."""
        before = self.source
        self._hold("source", source)
        if self._match is not None and not same_matrix(before, source):
            self._unmatch()

    def _unmatch(self) -> None:
        self._match = None
        warn_of_another_matrix()

    def _hold(self, name: str, value: Any) -> None:
        """Keep an attribute, and a module among the submodules too."""
        self.__dict__[f"_{name}"] = value
        self._submodule(name, value)

    def _submodule(self, name: str, value: Any) -> None:
        self._modules.pop(name, None)
        if isinstance(value, nn.Module):
            self._modules[name] = value
