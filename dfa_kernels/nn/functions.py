"""The trainer's autograd Functions.

`Feedback` ties activations to the output, `Scaled` scales a shared signal, and `Stopped` passes on
an activation that requires a gradient and sends none back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

# signals(error, activations if they are kept, source if it is another than the pass's) -> one
# gradient per activation
Signals = Callable[..., Sequence[Tensor | None]]


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`; all arguments are given.

    torch looks for default ones in each call, which takes 40 us. Graphs and torch.func need that.
    Tensors that outlive a transform of torch.func are unwrapped, as torch does.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    of_torch: Any = super(torch.autograd.Function, function)
    return of_torch.apply(*unwrap_dead_wrappers(arguments))


class Feedback(torch.autograd.Function):
    """Identity on the network's output; its backward sends feedback signals to the activations.

    forward(signals, keep, anchors, output, *activations, *anchors) returns the output; `anchors` is
    the number of those. backward(error) gives the output the error, which trains the last layer as
    backpropagation does, and the activations their signals, which train the hidden layers (Launay,
    Poli, Krzakala 2019, eq. 3). Anchors are scalars (see `fully_sharded`) and get zeros: on the
    error's device, in whose queue autograd then runs them in turn with all else. It keeps no
    activation. With `keep`, which is for torch.compile, signals gets the activations to take their
    shapes: the graph of a backward cannot use sizes that the forward computed. What it keeps in the
    end are sizes.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        signals: Signals, keep: bool, anchors: int, output: Tensor, *tied: Tensor
    ) -> Tensor:
        """`output`, tied to the activations and anchors."""
        return output.detach()  # no view: those of a custom Function cannot be changed in place

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keeps the activations if asked to."""
        ctx.signals, keep, ctx.anchors, _, *tied = inputs
        if keep:
            ctx.save_for_backward(*tied[: len(tied) - ctx.anchors])

    @staticmethod
    def backward(ctx, error: Tensor) -> tuple[Tensor | None, ...]:
        """The error for the output, the signals for the activations."""
        signals = ctx.signals(error, ctx.saved_tensors)
        return (None, None, None, error, *signals, *for_anchors(ctx.anchors, error))


def for_anchors(count: int, error: Tensor) -> list[Tensor]:
    """The gradients of anchors."""
    return [torch.zeros((), device=error.device)] * count if count else []


def drops_graph() -> bool:
    """Whether the backward pass under way drops what it needs, as the last one does."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()


class Factor:
    """What `Scaled` does to a gradient; set after its forward, before its backward.

    It multiplies by `value`, and passes the product through `transform`.
    """

    value: Tensor | float = 1.0
    transform: Callable[[Tensor], Tensor] | None = None

    def apply(self, signal: Tensor) -> Tensor:
        """The gradient it makes, in memory of its own."""
        signal = signal * self.value
        return signal if self.transform is None else self.transform(signal)


class Scaled(torch.autograd.Function):
    """Identity whose backward multiplies the gradient by `factor.value`, and transforms it.

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
        return ctx.factor.apply(signal), None


class Stopped(torch.autograd.Function):
    """Identity that requires a gradient as its input does, and sends none back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(activation: Tensor) -> Tensor:
        """`activation`."""
        return activation.detach()  # no view, as above

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """No tensor is kept, and no gradient of zeros is made."""
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, gradient: Tensor | None) -> None:
        """Nothing."""
        return None
