"""Refuses activations of which each process has a part, as tensor parallelism makes them.

The signal of a part would be that of other features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def refuse_shards(function: str, argument: str, tensor: Tensor) -> None:
    """Raise ValueError where a tensor is a DTensor that is not whole in each process."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return
    placements: Any = getattr(tensor, "placements", None)  # only a DTensor's
    if placements is None or all(place.is_replicate() for place in placements):
        return
    got = ", ".join(map(str, placements))
    raise ValueError(
        f"{function}: {argument} must be whole in each process, got a DTensor with the placements "
        f"({got}); make its module's output whole with output_layouts=Replicate()"
    )


def refuse_a_shard(name: str, module: nn.Module, tensor: Tensor, is_input: bool = False) -> None:
    """Raise ValueError where `module`'s output, or input, has only this process's part of features.

    So it is with the output of `ColwiseParallel` and the input of `RowwiseParallel`, plain tensors.
    Looks at a linear module, an embedding or the last of them in a Sequential; others do not tell.
    """
    last = module if is_input else _last(module)
    if isinstance(last, nn.Linear):
        dim = 1 if is_input else 0
    elif isinstance(last, nn.Embedding) and not is_input:
        dim = 1
    else:
        return
    weight: Any = last.weight
    placements = getattr(weight, "placements", ())
    if tensor.dim() == 0 or not any(place.is_shard(dim) for place in placements):
        return
    features, whole = tensor.shape[-1], weight.shape[dim]
    # Sharded weights alone say nothing: fully_shard makes them whole for the forward pass.
    if features < whole and features == weight.to_local().shape[dim]:
        does, layouts = ("get", "input") if is_input else ("return", "output")
        raise ValueError(
            f"attach: {name!r} must {does} all {whole} features in each process, got {features}, "
            f"of a weight that is sharded; parallelize with {layouts}_layouts=Replicate()"
        )


def _last(module: nn.Module) -> nn.Module:
    """The last submodule of a Sequential with parameters, or the module itself."""
    while isinstance(module, nn.Sequential):
        parts = [part for part in module if next(part.parameters(), None) is not None]
        if not parts:
            break
        module = parts[-1]
    return module
