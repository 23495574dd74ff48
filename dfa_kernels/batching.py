"""Operators on the batched gradients of torch.autograd: `is_grads_batched` and `vectorize=True`.

There a backward pass runs once for many gradients, on tensors that hide a batch dimension for each
level of such a call. All calls' rows become one batch. (`torch.func.vmap` has tensors of its own
kind; see `derivatives`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_BATCHED = torch._C._dispatch_key_parse("Batched")


def kernel(operator: Callable) -> Callable:
    """The rule of an operator of one tensor, or a list of them, [batch, size] -> the same."""

    def batched(given: Tensor | Sequence[Tensor], *arguments: Any) -> Tensor | list[Tensor]:
        calls, tensors = _revealed([given] if isinstance(given, Tensor) else list(given))
        shape = [*(size for _, size in calls), tensors[0].shape[-2]]
        rows = [tensor.expand(*shape, -1).flatten(0, -2) for tensor in tensors]
        made = operator(rows[0] if isinstance(given, Tensor) else rows, *arguments)
        if isinstance(made, Tensor):
            return _hidden(made.unflatten(0, shape), calls)
        return [_hidden(result.unflatten(0, shape), calls) for result in made]

    return batched


def _revealed(tensors: list[Tensor]) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Tensors with their hidden dimensions before the others, and each one's level and size.

    A tensor without a dimension that others have gets one of size 1.
    """
    calls: list[tuple[int, int]] = []
    level = 0
    while any(map(_hides, tensors)):
        level += 1
        tensors = [torch._remove_batch_dim(tensor, level, 1, 0) for tensor in tensors]
        size = next((len(tensor) for tensor in tensors if len(tensor) != 1), 1)
        calls.insert(0, (level, size))
    return calls, tensors


def _hidden(tensor: Tensor, calls: list[tuple[int, int]]) -> Tensor:
    """The tensor with its first dimensions hidden again. Of size 1 they serve all calls."""
    for dim, (level, size) in reversed([*enumerate(calls)]):  # from the outermost call inwards
        tensor = tensor.squeeze(dim) if size == 1 else torch._add_batch_dim(tensor, dim, level)
    return tensor


def _hides(tensor: Tensor) -> bool:
    return torch._C._dispatch_keys(tensor).has(_BATCHED)
