"""`attach` trains a model by Direct Feedback Alignment without editing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dfa_kernels.nn.dfa import DFA
from dfa_kernels.nn.hooks import (
    CutHook,
    HeadInputHook,
    HeadOutputHook,
    InputHook,
    OutputHook,
    OutsideLossHook,
    keep_state,
)
from dfa_kernels.nn.layer import DFALayer, FeedbackPointsHandling, Through
from dfa_kernels.nn.points import Names, Points
from dfa_kernels.nn.recompile import forget_compiled
from dfa_kernels.nn.sources import Scales, Source


class Attachment:
    """A model trained by Direct Feedback Alignment until `detach()`.

    Attributes:
        dfa: the `DFA`. It is no submodule of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Mapping[str, DFALayer],
        inputs: Mapping[str, DFALayer],
        output: str | None,
        cut: Sequence[str],
        state: str | None,
        dfa: DFA,
        head: bool,
    ):
        self.dfa = dfa
        self._model, self._state = model, state
        modules = dict(model.named_modules())
        self._handles: list[Any] = [
            modules[name].register_forward_hook(OutputHook(name, layer))
            for name, layer in points.items()
        ]
        # Of a module with both hooks, its input is a point before it is cut.
        before: list[tuple[str, Any]] = [
            (name, InputHook(name, layer)) for name, layer in inputs.items()
        ]
        before += [(name, CutHook(dfa)) for name in cut]
        if head and output is not None:
            before.append((output, HeadInputHook(output, dfa)))
        self._handles += [
            modules[name].register_forward_pre_hook(hook, with_kwargs=True) for name, hook in before
        ]
        ends = model if output is None else modules[output]
        if output is None:
            dfa._group.ends_model = True
        kind = HeadOutputHook if head else OutputHook
        hook = kind(output or type(model).__name__, dfa)
        self._handles += [ends.register_forward_hook(hook), *dfa.watch(model)]
        if head and output is not None:
            self._handles.append(model.register_forward_hook(OutsideLossHook(output, dfa)))
        if state is not None:
            self._handles += keep_state(model, state, dfa)
        forget_compiled()

    @property
    def mode(self) -> str:
        """How the next forward passes train; see `DFA.mode`."""
        return self.dfa.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self.dfa.mode = mode

    def detach(self) -> None:
        """Undo `attach`; the model keeps what it has learned."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            forget_compiled()
        self._handles = []
        if self._state is not None:
            self._model.__dict__.pop(self._state, None)
            if self._model._modules.get(self._state) is self.dfa:  # by model.dfa = handle.dfa
                del self._model._modules[self._state]


def attach(
    model: nn.Module,
    points: Points = (),
    output: str | nn.Module | None = None,
    *,
    head: str | nn.Module | None = None,
    inputs: Points = (),
    cut: Sequence[str | nn.Module] = (),
    state: str | None = "dfa",
    normalization: bool | str | float | Scales = True,
    rp_device: torch.device | str | None = None,
    no_training: bool = False,
    feedback_points_handling: FeedbackPointsHandling | str | None = None,
    batch_dims: Sequence[int] | None = None,
    seed: int | None = None,
    distribution: str | None = None,
    shared: bool | None = None,
    matrix: Tensor | Sequence[Tensor] | Source | None = None,
    error_transform: Callable[[Tensor], Tensor] | None = None,
    signal_transform: Callable[[Tensor, DFALayer], Tensor] | None = None,
    mask: Mapping[str | int, Tensor] | Sequence[Tensor | None] | None = None,
    scale_repeats: bool = True,
    lean: bool = False,
    requires_grad: bool | None = None,
    through: Through | None = None,
    backend: str | None = None,
    match_output: str | nn.Linear | None = None,
) -> Attachment:
    """Train a model by Direct Feedback Alignment without editing it.

        handle = attach(model, ["layer1", "layer2", "layer3"], seed=1)
        ...  # train as ever
        handle.detach()

    Args:
        model: any module. Of a DistributedDataParallel or a compiled wrapper, the module inside. If
            anything in the process ran compiled already, all of it is compiled anew, since compiled
            code does not look at hooks; so it is with `detach()`.
        points: the submodules whose outputs are trained by a signal, by name or as modules, in any
            order. Each should end in its non-linearity or residual sum, and returns a tensor, or a
            tuple or list that begins with it. Gradients end there: what lies between two points is
            trained by backpropagation from the signal of the second. A mapping gives each name the
            batch dimensions of its output. For one that is called several times in a forward pass
            see `FeedbackPointsHandling`.
        output: the submodule that makes the output whose gradient is the error, such as the last
            linear layer of a model that returns its loss. It runs after all points. None: the model
            itself, which returns a tensor, a tuple or list that begins with it, or a mapping or
            dataclass with "logits".
        head: an nn.Linear that makes the logits of a vocabulary, in place of `output`. A model that
            computes its loss by `F.cross_entropy` of its outputs, in itself as Hugging Face's
            causal models called with `labels`, or outside, then gets that of
            `DFA.linear_cross_entropy`: equal to rounding, and without whole logits. See below.
        inputs: the submodules whose first tensor argument is trained by a signal, as `points` are
            by their output. So `F.relu(self.fc1(x))`, which goes to `fc2`, is a point by
            `inputs=["fc2"]`. Their layers come after those of `points`, with names such as
            "fc2.input".
        cut: the submodules whose tensor arguments are detached while the `DFA` trains: those that
            come after a point with `requires_grad`, so that they make no product for a gradient
            that nobody needs. All tensors among the arguments are detached, none inside tuples.
        state: the name under which the model's state_dict holds the state of the `DFA`: "dfa" adds
            "dfa._extra_state", some hundred bytes. Loading it restores the seed. `model.dfa` is the
            `DFA`, though it is no submodule. None: the model's state_dict stays as it is.
        requires_grad: as for `DFA`. None: where `cut` is given.
        match_output: the output layer, an nn.Linear, by name or as a module. Its weights are set
            from the feedback matrix, as by `DFA.match_output_`, so that residual networks as
            transformers learn. `detach()` leaves them so.

    All others are those of `DFA`; `mask` goes by the points' names.

    Raises:
        TypeError, ValueError: naming the argument and what was got; also where the model already
            has a DFA, and where it returns its loss and `output` is not given.

    Warns where a forward pass ends with points that no `output` came after.

    Logits by `head` are a tensor that makes itself when a function needs its numbers. On their way
    to the loss they may be converted to fp32, get another shape, lose tokens by an index, and be
    softcapped as c * tanh(logits / c). All else makes them whole: for good and with a warning where
    gradients are enabled, for a moment under `torch.no_grad()`, as for measures. They are made of
    the weights, so look at them before the optimizer's step; later is an error. So is the gradient
    of a `torch.autograd.Function` of your own. With a warning, logits are whole from the start in
    code that torch.compile compiles (compile the blocks instead of the model), of DTensors or
    quantized weights, where `fully_shard` was called on the head itself, and where the head does
    more than F.linear. `batch_dims` must make each token a row.

    A copy of the model alone has its hooks but no handle to detach them: copy or pickle (model,
    handle) together.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: model must be a module, got {type(model).__name__}")
    model = unwrapped(model)
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "attach: model must not be an nn.DataParallel, whose copies run at the same time; use "
            "DistributedDataParallel"
        )
    for inner in model.modules():
        if isinstance(inner, DistributedDataParallel) and inner.find_unused_parameters:
            raise ValueError(
                "attach: model must not hold a DistributedDataParallel with "
                "find_unused_parameters=True, which would not find what the DFA trains; wrap the "
                "whole model"
            )
    if find_dfas(model):
        raise ValueError("attach: model must have no DFA yet; detach the other one first")
    names = Names(model)
    layers = names.layers("points", points, "")
    input_layers = names.layers("inputs", inputs, ".input")
    if not layers and not input_layers:
        raise ValueError(
            "attach: points must be one or more distinct submodules, got [] and no inputs"
        )
    end = None if output is None else names.of("output", output)
    if head is not None:
        last = names.of("head", head)
        if end not in (None, last):
            raise ValueError(
                f"attach: head takes the place of output, got head {last!r} and output {end!r}"
            )
        end = last
    if end in layers:
        which = "output" if head is None else "head"
        raise ValueError(f"attach: {which} must not be one of the points, got {end!r}")
    cuts = list(dict.fromkeys(names.listed("cut", cut)))
    matched = None if match_output is None else names.module("match_output", match_output)
    check_state(model, state)
    dfa = DFA(
        [*layers.values(), *input_layers.values()],
        normalization,
        rp_device,
        no_training,
        feedback_points_handling,
        batch_dims,
        seed=seed,
        distribution=distribution,
        shared=shared,
        matrix=matrix,
        error_transform=error_transform,
        signal_transform=signal_transform,
        mask=mask,
        scale_repeats=scale_repeats,
        lean=lean,
        requires_grad=bool(cuts) if requires_grad is None else requires_grad,
        through=through,
        backend=backend,
    )
    attachment = Attachment(model, layers, input_layers, end, cuts, state, dfa, head is not None)
    if matched is not None:
        try:
            dfa.match_output_(matched)  # type: ignore[arg-type]  # which it checks
        except BaseException:
            attachment.detach()
            raise
    return attachment


def find_dfas(model: nn.Module) -> list[DFA]:
    """The `DFA`s that train a model, as submodules or attached."""
    found: dict[DFA, None] = {}
    for module in model.modules():
        if isinstance(module, DFA):
            found[module] = None
        for hook in module._forward_hooks.values():
            if isinstance(hook, OutputHook) and isinstance(hook.target, DFA):
                found[hook.target] = None
    return list(found)


def has_points(model: nn.Module) -> bool:
    """Whether hooks of an attachment, or of a stage, are on submodules."""
    return any(
        isinstance(hook, (InputHook, OutputHook))
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers that look for what the output depends on, or compile it."""
    while True:
        compiled = sys.modules.get("torch._dynamo.eval_frame")
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif compiled is not None and isinstance(model, compiled.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def check_state(model: nn.Module, state: str | None, function: str = "attach") -> None:
    """Raise where a state_dict of the model cannot hold a `DFA` under that name."""
    if state is None:
        return
    if not isinstance(state, str) or not state or "." in state:
        raise ValueError(f"{function}: state must be a name without dots or None, got {state!r}")
    if hasattr(model, state):
        raise ValueError(
            f"{function}: state must be a name that the model does not use, got {state!r}; choose "
            "another, or None to leave the model's state_dict as it is"
        )
