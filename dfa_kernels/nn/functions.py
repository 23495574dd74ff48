"""The trainer's autograd Functions.

`Feedback` ties activations to the output; `Scaled` scales a shared signal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# signals(error) -> one gradient per activation
Signals = Callable[[Tensor], Sequence[Tensor | None]]


class Feedback(torch.autograd.Function):
    """Identity on the network's output; its backward sends feedback signals to the activations.

    forward(signals, output, *activations) returns the output. backward(error) gives the output the
    error, which trains the last layer as backpropagation does, and the activations signals(error),
    which trains the hidden layers (Launay, Poli, Krzakala 2019, eq. 3). It keeps shapes only, no
    activation.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(signals: Signals, output: Tensor, *activations: Tensor) -> Tensor:
        """`output`, tied to the activations."""
        return output.detach()  # no view: those of a custom Function cannot be changed in place

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """No tensor is kept."""
        ctx.signals = inputs[0]

    @staticmethod
    def backward(ctx, error: Tensor) -> tuple[Tensor | None, ...]:
        """The error for the output, the signals for the activations."""
        return (None, error, *ctx.signals(error))


class Factor:
    """What `Scaled` multiplies a gradient by; set after its forward, before its backward."""

    value: Tensor | float = 1.0


class Scaled(torch.autograd.Function):
    """Identity whose backward multiplies the gradient by `factor.value`.

    It is made right after the activation, so it runs right before the activation's own backward:
    the scaled copy of a shared signal lives only while its layer is trained.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(activation: Tensor, factor: Factor) -> Tensor:
        """`activation`."""
        return activation.detach()  # no view, as above

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """No tensor is kept."""
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, signal: Tensor) -> tuple[Tensor, None]:
        """The scaled signal, in memory of its own."""
        return signal * ctx.factor.value, None
