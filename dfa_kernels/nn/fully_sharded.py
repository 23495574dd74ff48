"""Lets `fully_shard` gather parameters and reduce gradients in time, module by module.

Its hooks wait for gradients of activations: a module's parameters are gathered when a gradient
comes to its output, and theirs are reduced when that of its input has been made. Under DFA no
activation between blocks has a gradient. So each sharded module gets one more input and one more
output in the passes that send signals: scalars that require a gradient, its anchors, which only
the hooks of fully_shard see. `Feedback` sends them zeros. Autograd runs what is ready from the last
made to the first made: the output's anchor before the whole module, the input's anchor after it,
and both before the module below.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from dfa_kernels.nn import ranks
from dfa_kernels.nn.functions import Stopped, apply
from dfa_kernels.nn.layer import Group, inside_backward

_eager = torch.compiler.disable(reason="dfa_kernels: the hooks of fully_shard run uncompiled")


class Anchored(NamedTuple):
    """A module's output, and its anchor."""

    output: Any
    anchor: Tensor


class Anchors:
    """Hooks around those of fully_shard on one module: two before them, two after."""

    def __init__(self, group: Group):
        self.group = group
        self._anchored = False  # whether the call of the module under way has anchors

    def install(self, module: nn.Module) -> list[RemovableHandle]:
        """Registers the hooks, and returns their handles."""
        inputs = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for hook in (self.anchor_input, self.tie_input)
        ]
        outputs = [
            module.register_forward_hook(hook) for hook in (self.anchor_output, self.tie_output)
        ]
        _around(module, module._forward_pre_hooks, *inputs)
        _around(module, module._forward_hooks, *outputs)
        return [*inputs, *outputs]

    @property
    def _name(self) -> str:
        return f"_dfa_kernels_anchor_{id(self)}"

    @_eager
    def anchor_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One more argument by name, an anchor, where the module has anything to learn or carry."""
        self._anchored = (
            self.group.under_way is True
            and self.group.sends_signals
            and torch.is_grad_enabled()
            and not inside_backward()
            and any(map(_requires_grad, (*module.parameters(), *tree_leaves((args, kwargs)))))
        )
        return (args, {**kwargs, self._name: _anchor(module)}) if self._anchored else None

    @_eager
    def tie_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The arguments without the anchor, which fully_shard has wrapped."""
        if self._name not in kwargs:
            return None
        kwargs = dict(kwargs)
        self.group.anchors.append(kwargs.pop(self._name))
        return args, kwargs

    @_eager
    def anchor_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The output, and an anchor."""
        if not self._anchored or output is None:
            return None
        return Anchored(output, _anchor(module))

    @_eager
    def tie_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The output without the anchor, on which fully_shard has put a hook."""
        if not isinstance(output, Anchored):
            return None
        self.group.anchors.append(output.anchor)
        return output.output


class AnchorsOfModel:
    """A forward pre-hook of a model: all its sharded modules have anchors from this pass on.

    Attributes:
        handles: those of the hooks it has put on them.
    """

    def __init__(self, group: Group):
        self.group = group
        self.handles: list[RemovableHandle] = []

    def __call__(self, model: nn.Module, *_: Any) -> None:
        """Of those sharded since the last call, in the first pass after."""
        if ranks.fully_sharded():
            self._install(model)

    @_eager
    def _install(self, model: nn.Module) -> None:
        for module in ranks.fully_sharded_modules(model):
            # The model's own output requires a gradient, and nothing is below its input.
            if module is not model and not self._has_anchors(module):
                self.handles += Anchors(self.group).install(module)

    def _has_anchors(self, module: nn.Module) -> bool:
        owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
        return any(isinstance(owner, Anchors) and owner.group is self.group for owner in owners)

    def remove(self) -> None:
        """Takes the sharded modules' hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _anchor(module: nn.Module) -> Tensor:
    """A scalar that requires a gradient and sends none back, where the module computes."""
    parameter = next(module.parameters(), None)
    mesh = getattr(parameter, "device_mesh", None)  # parameters may be offloaded
    device = None if parameter is None else parameter.device
    if mesh is not None:
        device = torch.device(mesh.device_type)
    anchor: Tensor = apply(Stopped, torch.empty((), device=device, requires_grad=True))
    return anchor


def _around(
    module: nn.Module,
    hooks: dict[int, Any],
    before: RemovableHandle,
    after: RemovableHandle,
) -> None:
    """Moves two hooks right before and right after those of fully_shard."""
    theirs = [
        key
        for key, hook in hooks.items()
        if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.")
    ]
    if not theirs:
        raise RuntimeError(
            f"DFA: found no hooks of fully_shard on a {type(module).__name__}; torch "
            f"{torch.__version__} has them elsewhere than this version of dfa_kernels knows"
        )
    order = [key for key in hooks if key not in (before.id, after.id)]
    order.insert(order.index(theirs[0]), before.id)
    order.insert(order.index(theirs[-1]) + 1, after.id)
    for key in order:
        hooks[key] = hooks.pop(key)
