"""The angle between the signals of Direct Feedback Alignment and of backpropagation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfa_kernels.nn.attachment import find_dfas
from dfa_kernels.nn.dfa import DFA
from dfa_kernels.nn.rows import to_rows
from dfa_kernels.nn.sharded import whole


class Alignment(NamedTuple):
    """Mean and standard deviation of cos(beta_i) over the rows of a batch."""

    mean: float
    std: float


def alignment(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Alignment]:
    """The alignment cosine of every DFA layer, by one backpropagation pass.

    cos(beta_i) (Launay, Poli, Krzakala 2019, eq. 6) is that of the angle between B_i e and the
    gradient that backpropagation gives the same activation, after the non-linearity, for each row
    of the batch. With `through`, B_i e is carried back through it first. A row where either is zero
    has no angle and does not count. Works in every mode, also between a forward pass and its
    backward pass: parameters, their gradients, buffers and torch's random number generators stay as
    they are. Compiled models run uncompiled.

    Args:
        model: any module that holds a `DFA` or has one attached. With several, as of two heads,
            one pass measures all, and the error of each is the gradient that backpropagation gives
            its output. The `DFA` itself will do where nothing outside it is random or has buffers.
            Of DistributedDataParallel, which awaits a backward pass of the whole, pass the
            `.module`, and use that in `loss`.
        loss: runs the model forward on a batch and returns the scalar loss, as in
            `lambda: F.cross_entropy(model(x), y)`.

    Returns:
        By layer, in order, under its name in `DFALayer(name=...)` or else its index in the `DFA`.
        Where the model has several `DFA`s, that comes after the `DFA`'s own name in the model and a
        dot, as in "head.dfa.0", or after "attached[i]." for one that is attached, the i-th of all.
        nan for a layer without a single angle. Without the layers, and the `DFA`s, that the pass
        skips.

    Raises:
        ValueError: the model holds no `DFA`, or the loss reached none.
        TypeError: `loss` did not return a scalar with a gradient.
    """
    found = find_dfas(model)
    if not found:
        raise ValueError("alignment: model must hold a DFA or have one attached, got none")
    # A compiled graph returns the activations, but has no path from the loss to them.
    eager = torch.compiler.set_stance("force_eager")
    with torch.enable_grad(), eager, _undisturbed(model), contextlib.ExitStack() as stack:
        records = [stack.enter_context(dfa.recording()) for dfa in found]
        value = loss()
        reached = {
            prefix: (dfa, record.plan, record.output, record)
            for prefix, dfa, record in zip(_prefixes(model, found), found, records, strict=True)
            if record.output is not None and record.plan is not None
        }
        if not reached:
            raise ValueError(
                "alignment: loss must run the model's forward pass to its DFA, gradients enabled"
            )
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
            got = f"{value!r} (it must not run backward itself)" if value is None else repr(value)
            raise TypeError(
                f"alignment: loss must return a scalar tensor that requires a gradient, got {got}"
            )
        wanted = [
            tensor for *_, output, record in reached.values() for tensor in (output, *record.before)
        ]
        gradients = iter(torch.autograd.grad(value, wanted, materialize_grads=True))
    cosines: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for prefix, (dfa, plan, _, record) in reached.items():
            signals = dfa.signals(plan, next(gradients), record.source)
            carried = map(_carried, record.activations, record.before, signals)
            for index, place, signal in zip(plan.indices, plan.places, carried, strict=True):
                ours, theirs = (
                    to_rows(whole(tensor, place.layout), place.batch_dims, "alignment").double()
                    for tensor in (signal, next(gradients))
                )
                lengths = ours.norm(dim=1) * theirs.norm(dim=1)
                cosine = ((ours * theirs).sum(1) / lengths)[lengths != 0]  # keeps nan
                name = dfa.dfa_layers[index].name or str(index)
                cosines.setdefault(prefix + name, []).append(cosine)
    return {name: _summary(torch.cat(values)) for name, values in cosines.items()}


def _carried(activation: Tensor, before: Tensor, signal: Tensor) -> Tensor:
    """The signal as it reaches what a layer got, through its `through`."""
    if activation is before:
        return signal
    (carried,) = torch.autograd.grad(activation, before, signal)
    return carried


def _prefixes(model: nn.Module, dfas: list[DFA]) -> list[str]:
    """What tells the layers of one `DFA` from another's: nothing where there is one `DFA`."""
    if len(dfas) == 1:
        return [""]
    names = {module: name for name, module in model.named_modules()}
    return [f"{names.get(dfa, f'attached[{index}]')}." for index, dfa in enumerate(dfas)]


def _summary(cosines: Tensor) -> Alignment:
    if not len(cosines):
        return Alignment(math.nan, math.nan)
    return Alignment(cosines.mean().item(), cosines.std(correction=0).item())


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores buffers and random number generators."""
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    tensors = (*model.parameters(), *model.buffers())
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, name, buffer, saved in buffers:
            if buffer is not None and saved is not None:
                # By `.data`: a pending backward pass may hold the buffer, and its values are back.
                buffer.data.copy_(saved)
            module._buffers[name] = buffer
