"""What lets `torch.jit` take `DFA` and `DFALayer`, as identities, for inference."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Scriptable(nn.Module):
    """A module of which `torch.jit.script` takes the `forward`, and no other attribute.

    Its properties are set as those of any object.
    """

    __jit_unused_properties__: ClassVar[list[str]]
    __jit_ignored_attributes__: ClassVar[list[str]]

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        ours = [base for base in cls.__mro__ if issubclass(base, Scriptable)]
        names = {name for base in ours for name in vars(base)}
        properties = [name for name in names if isinstance(getattr(cls, name), property)]
        annotated = {name for base in ours for name in vars(base).get("__annotations__", ())}
        cls.__jit_unused_properties__ = sorted(properties)
        cls.__jit_ignored_attributes__ = sorted({*properties, *annotated})

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any object where the class has a property: torch would pass it by for modules."""
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def tracing(function: str, training: bool, tensor: Tensor) -> bool:
    """Whether `torch.jit.trace` runs this pass. Raises RuntimeError where it would train."""
    if not torch.jit.is_tracing():
        return False
    if training and torch.is_grad_enabled() and tensor.requires_grad:
        raise RuntimeError(
            f"{function}: a model by torch.jit.trace does not train; call eval() for inference"
        )
    return True
