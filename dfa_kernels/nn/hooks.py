"""The hooks by which `attach` trains a model that it does not edit.

They are objects, not closures: a copied or pickled model gets hooks of its own.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dfa_kernels.nn import guards, ranks
from dfa_kernels.nn.chunks import needs_whole_logits
from dfa_kernels.nn.dfa import DFA
from dfa_kernels.nn.layer import DFALayer
from dfa_kernels.nn.lazy_logits import Hidden, Logits, is_plain


class _PointHook:
    """Passes one tensor of a module through a `DFALayer` or a `DFA`."""

    def __init__(self, name: str, target: DFALayer | DFA):
        self.name = name
        self.target = target


class OutputHook(_PointHook):
    """A forward hook for the tensor in a module's output."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """`output` with its tensor replaced."""
        if isinstance(self.target, DFA) and holds_loss(output):
            raise ValueError(
                f"attach: {self.name!r} returns its loss, which no signal would reach; give "
                "output=..., the submodule that makes the logits, or head=... for a loss without "
                "whole logits"
            )
        return through(self.target, output, self.name)


class InputHook(_PointHook):
    """A forward pre-hook for the first tensor among a module's arguments."""

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments with that tensor replaced."""
        return with_first_tensor(self.target, args, kwargs, self.name)


def with_first_tensor(
    function: Callable[[Tensor], Tensor], args: tuple, kwargs: dict[str, Any], name: str
) -> tuple[tuple, dict[str, Any]]:
    """A module's arguments with the first tensor among them passed through `function`."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:index], function(value), *args[index + 1 :]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, key: function(value)}
    got = ", ".join(type(value).__name__ for value in (*args, *kwargs.values()))
    raise TypeError(f"attach: {name!r} must be called with a tensor, got ({got})")


class HeadInputHook:
    """A forward pre-hook of the output layer, by which it returns `Logits` where it can."""

    def __init__(self, name: str, dfa: DFA):
        self.name = name
        self.dfa = dfa

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """The arguments with the first tensor as `Hidden`."""
        if torch.compiler.is_compiling() or self.dfa._group.record is not None:
            return None
        if ranks.fully_sharded() and module in ranks.fully_sharded_modules(module):
            return None  # its weights are gone once it has run

        def hidden(value: Tensor) -> Tensor:
            if not is_plain(value) or needs_whole_logits(value, *module.parameters()):
                return value
            return Hidden.of(value)

        return with_first_tensor(hidden, args, kwargs, self.name)


class HeadOutputHook(OutputHook):
    """A forward hook of the output layer, where the pass reaches the `DFA`."""

    target: DFA

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """`Logits`, or the output with its tensor passed through the `DFA`."""
        if not torch.compiler.is_compiling() and isinstance(output, Logits):
            tied = output.tied_to(self.target, self.name)
            if tied is not None:
                return tied
            output = output.made()
        group = self.target._group
        if torch.is_grad_enabled() and group.record is None and not torch.jit.is_tracing():
            guards.warn_of_a_whole_head(group.said, self.name)
        return super().__call__(module, args, output)


class OutsideLossHook:
    """A forward hook of a model with a head, whose loss may be outside of it.

    A DistributedDataParallel that looks for unused parameters follows the graph of the outputs, and
    `Logits` have none.
    """

    def __init__(self, name: str, dfa: DFA):
        self.name = name
        self.dfa = dfa

    def __call__(self, model: nn.Module, args: Any, output: Any) -> Any:
        """The output with whole logits, if the loss is still to be made of them."""
        if torch.compiler.is_compiling() or not ranks.inside_search_for_unused():
            return None
        logits = _entry(output, "logits")
        if isinstance(logits, Logits):  # for a dataclass of one's own is no tree
            return _with_logits(output, self._whole(logits))
        return tree_map_only(Logits, self._whole, output)

    def _whole(self, logits: Logits) -> Tensor:
        if logits.origin.has_loss or not logits.requires_grad:
            return logits
        guards.warn_of_a_search_for_unused(self.dfa._group.said, self.name)
        return logits.made()


class CutHook:
    """A forward pre-hook that detaches a module's tensors while the `DFA` trains."""

    def __init__(self, dfa: DFA):
        self.dfa = dfa

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """The arguments, with tensors that require no gradient."""
        if not self.dfa.sends_signals:
            return None
        detached = tuple(map(_detached, args))
        return detached, {key: _detached(value) for key, value in kwargs.items()}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


class SaveHook:
    """A hook after `state_dict`, which adds the state of a `DFA` that is no submodule.

    A model on the meta device has no values to keep, and what fills it may take its parameters'
    alone, as accelerate's cpu_ram_efficient_loading does.
    """

    def __init__(self, name: str, dfa: DFA):
        self.name = name
        self.dfa = dfa

    def __call__(self, module: nn.Module, state: dict, prefix: str, metadata: Any) -> None:
        """Adds its entries under the name."""
        on_meta = [parameter.is_meta for parameter in module.parameters()]
        if on_meta and all(on_meta):
            return
        self.dfa.state_dict(destination=state, prefix=f"{prefix}{self.name}.")


class LoadHook:
    """A hook before `load_state_dict`, which takes out what `SaveHook` added, and loads it.

    A state without it leaves the `DFA` as it is.
    """

    def __init__(self, name: str, dfa: DFA):
        self.name = name
        self.dfa = dfa

    def __call__(
        self,
        module: nn.Module,
        state: dict,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Reports as torch does: through the lists."""
        self.dfa.compare_ranks_again()
        whole = f"{prefix}{self.name}."
        ours = {key: state[key] for key in state if key.startswith(whole)}
        if not ours or module._modules.get(self.name) is self.dfa:  # then torch loads it
            return

        assign = "assign_to_params_buffers"
        given = {assign: metadata[assign]} if assign in metadata else {}

        def load(part: nn.Module, prefix: str) -> None:
            part._load_from_state_dict(ours, prefix, given, strict, missing, unexpected, errors)
            for name, child in part._modules.items():
                if child is not None:
                    load(child, f"{prefix}{name}.")

        load(self.dfa, whole)
        for key in ours:
            del state[key]


def keep_state(model: nn.Module, name: str, dfa: DFA) -> list[Any]:
    """Puts the state of a `DFA` into the model's state_dict; returns the hooks' handles."""
    # No submodule: a Sequential would call it. What saves by names looks for the attribute.
    model.__dict__[name] = dfa
    return [
        model.register_state_dict_post_hook(SaveHook(name, dfa)),
        model.register_load_state_dict_pre_hook(LoadHook(name, dfa)),
    ]


def through(function: Callable[[Tensor], Tensor], output: Any, name: str) -> Any:
    """`output` with the tensor in it passed through `function`.

    The tensor is the output itself, the first element of a tuple or list (transformer blocks), or
    the entry "logits" of a mapping or the field of a dataclass (Hugging Face).
    """
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        elements = [function(output[0]), *output[1:]]
        named = hasattr(output, "_fields")
        return type(output)(*elements) if named else type(output)(elements)
    logits = _entry(output, "logits")
    if isinstance(logits, Tensor):
        return _with_logits(output, function(logits))
    raise TypeError(
        f"attach: {name!r} must return a tensor, a tuple or list that begins with one, or a "
        f"mapping or dataclass with 'logits', got {type(output).__name__}"
    )


def _entry(output: Any, name: str) -> Any:
    """An entry of a mapping, or a field of a dataclass, or None."""
    if isinstance(output, Mapping):
        return output.get(name)
    return getattr(output, name, None) if dataclasses.is_dataclass(output) else None


def _with_logits(output: Any, logits: Tensor) -> Any:
    """A copy of a mapping or dataclass with other logits."""
    kind: Any = type(output)
    if not isinstance(output, Mapping):
        return dataclasses.replace(output, logits=logits)
    if kind in (dict, OrderedDict):
        replaced = kind(output)
    elif dataclasses.is_dataclass(output):  # a mapping too: Hugging Face's
        replaced = kind(**output)
    else:
        replaced = copy.copy(output)
    replaced["logits"] = logits
    return replaced


def holds_loss(output: Any) -> bool:
    """Whether a model's output is, or begins with, a loss to run backward."""
    if isinstance(output, Mapping) or dataclasses.is_dataclass(output):
        first = _entry(output, "loss")
    else:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(first, Tensor) and first.dim() > 0:
            return False
    return isinstance(first, Tensor) and first.requires_grad
