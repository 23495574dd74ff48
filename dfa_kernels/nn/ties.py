"""What ties the activations of a forward pass to the network's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfa_kernels.layers import Layers
from dfa_kernels.nn.functions import Feedback, Signals, apply
from dfa_kernels.nn.plan import Plan
from dfa_kernels.nn.sources import Source


class Tie(NamedTuple):
    """The activations of a pass that get signals, and what makes these.

    `layers` and `dtype` are those of the signals that `source` is asked for. `signals` makes them
    of the error and hands them out; with `keep` it gets the activations, for their shapes.
    """

    plan: Plan
    layers: Layers
    dtype: torch.dtype
    source: Source
    signals: Signals
    keep: bool
    activations: Sequence[Tensor]
    anchors: Sequence[Tensor]

    def apply(self, output: Tensor) -> Tensor:
        """`output`, whose gradient sends the signals."""
        how = (self.signals, self.keep, len(self.anchors))
        tied: Tensor = apply(Feedback, *how, output, *self.tensors)
        return tied

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a Function ties to the output."""
        return *self.activations, *self.anchors
