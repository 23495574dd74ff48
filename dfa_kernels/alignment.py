"""The angle between the signals of Direct Feedback Alignment and of backpropagation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfa_kernels.nn import DFA
from dfa_kernels.rows import to_rows


class Alignment(NamedTuple):
    """Mean and standard deviation of cos(beta_i) over the rows of a batch."""

    mean: float
    std: float


def alignment(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Alignment]:
    """The alignment cosine of every DFA layer (Launay, Poli, Krzakala 2019, eq. 6), by one
    backpropagation pass.

    cos(beta_i) is taken between B_i e and the gradient that backpropagation gives the same
    activation, after the non-linearity, row by row. Parameters' gradients, buffers and random
    number generators stay as they are.

    Args:
        model: holds one `DFA`; any module around it, or the `DFA` itself where it alone has random
            layers and buffers.
        loss: runs the model forward on a batch and returns the scalar loss, as in
            `lambda: F.cross_entropy(model(x), y)`.

    Returns:
        By layer, in order: its name in `DFALayer(name=...)`, else its index in the `DFA`.

    Raises:
        ValueError: the model holds no `DFA` or several, or the loss did not reach it.
    """
    found = [module for module in model.modules() if isinstance(module, DFA)]
    if len(found) != 1:
        raise ValueError(f"alignment: model must hold one DFA, got {len(found)}")
    dfa = found[0]
    with torch.enable_grad(), _undisturbed(model), dfa.recording() as record:
        value = loss()
        if record.output is None:
            raise ValueError(
                "alignment: loss must run the model's forward pass to its DFA, gradients enabled"
            )
        error, *gradients = torch.autograd.grad(
            value, [record.output, *record.activations], materialize_grads=True
        )
    cosines: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        signals = dfa.signals(record.places, error)
        for place, signal, gradient in zip(record.places, signals, gradients, strict=True):
            ours, theirs = (
                to_rows(tensor, place.batch_dims, "alignment").double()
                for tensor in (signal, gradient)
            )
            name = dfa.dfa_layers[place.layer].name or str(place.layer)
            cosines.setdefault(name, []).append(torch.cosine_similarity(ours, theirs))
    joined = {name: torch.cat(values) for name, values in cosines.items()}
    return {
        name: Alignment(value.mean().item(), value.std(correction=0).item())
        for name, value in joined.items()
    }


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Buffers and random number generators come out as they went in."""
    devices = {
        tensor.device
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.device.type == "cuda"
    }
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices):
        yield
    with torch.no_grad():
        for buffer, saved in buffers:
            buffer.copy_(saved)
