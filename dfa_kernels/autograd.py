"""The one autograd Function of the trainer: it sends the projected error to the hidden
activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# signals(error) -> one gradient per activation
Signals = Callable[[Tensor], Sequence[Tensor | None]]


class Feedback(torch.autograd.Function):
    """Identity on the network's output whose backward gives every hidden activation its feedback
    signal.

    forward(signals, output, *activations) returns the output. backward(error) returns the error for
    the output, which trains the last layer as backpropagation does, and signals(error) for the
    activations, which trains the hidden layers (Launay, Poli, Krzakala 2019, eq. 3). Only shapes
    are kept, no activation.
    """

    @staticmethod
    def forward(ctx, signals: Signals, output: Tensor, *activations: Tensor) -> Tensor:
        """`output`, from now on tied to the activations."""
        ctx.signals = signals
        return output.view_as(output)

    @staticmethod
    def backward(ctx, error: Tensor) -> tuple[Tensor | None, ...]:
        """The error for the output, the signals for the activations."""
        return (None, error, *ctx.signals(error))
