"""Outputs and activations of which each process has a part, as tensor parallelism makes them.

They are DTensors, or what `DTensor.to_local` made of one: the plain tensors that `ColwiseParallel`
returns by default, and what activation functions make of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfa_kernels import sharding
from dfa_kernels.nn import guards

# What autograd calls the nodes after which a part is no part any more: DTensors, collectives.
_ENDS = (
    *("torchtensor", "stopped"),
    *("c10d", "allreduce", "allgather", "alltoall", "reducescatter", "reduce_scatter"),
)
# Those of products and of lookups: their results are not split as their operands are. Of "mm" there
# are addmm, bmm, baddbmm.
_MIXES = (*_ENDS, "mm", "linear", "conv", "embedding", "scaleddotproduct")
_MOST_NODES = 200
_said: set[str] = set()


class Layout(NamedTuple):
    """How processes share a tensor of a global `shape`.

    `local` says that it is a plain tensor, this process's part, and not a DTensor.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    local: bool

    @property
    def wanted(self) -> tuple[Any, ...]:
        """The placements of a signal: where the activation is a sum, the same for each summand."""
        from torch.distributed.tensor import Replicate

        return tuple(Replicate() if place.is_partial() else place for place in self.placements)


def layout_of(function: str, argument: str, tensor: Tensor, *, warn: bool = True) -> Layout | None:
    """How processes share a tensor, or None where it is whole as far as can be known.

    A plain tensor is known to be a part by autograd's graph. With `warn`, which takes a longer look
    at it, one that might be a part is told of.

    Raises:
        ValueError: it is made of parts that are split differently, or a plain part in what
            torch.compile compiles.
    """
    if sharding.is_dtensor(tensor):
        dtensor: Any = tensor
        return Layout(dtensor.device_mesh, tuple(dtensor.placements), dtensor.shape, False)
    if not sharding.in_use():
        return None
    if torch.compiler.is_compiling():
        _refuse_traced_part(function, argument, tensor)
        return None
    found = dict.fromkeys(
        Layout(spec.mesh, tuple(spec.placements), spec.shape, True)
        for spec in _made_of(function, argument, tensor)
    )
    if len(found) > 1:
        got = " and ".join(f"{list(one.shape)} as {one.placements}" for one in found)
        raise ValueError(
            f"{function}: {argument} must be split in one way, got a part of {got}; make the "
            "outputs of parallelized modules DTensors with use_local_output=False"
        )
    if not found and warn:
        _warn_of_what_is_made_of_parts(function, argument, tensor)
    return next(iter(found), None)


def _refuse_traced_part(function: str, argument: str, tensor: Tensor) -> None:
    """Raise while tracing where a plain tensor is a part: graphs do not know how it is split."""
    from torch._dynamo.comptime import comptime

    comptime(_look)


def _look(context: Any) -> None:
    function, argument = (
        context.get_local(name).as_python_constant() for name in ("function", "argument")
    )
    if _made_of(function, argument, context.get_local("tensor").as_fake()):
        raise ValueError(
            f"{function}: {argument} must be a DTensor where torch.compile compiles it, got this "
            "process's part of one as a plain tensor; parallelize its module with "
            "use_local_output=False"
        )


def meshes_behind(tensors: Sequence[Any]) -> list[Any]:
    """The device meshes of tensors and of the DTensors that they are made of, whole or not."""
    found: dict[Any, None] = {}
    for tensor in tensors:
        if sharding.is_dtensor(tensor):
            found[tensor.device_mesh] = None
            continue
        for node in _behind(tensor, lambda node: not _is(node, _ENDS)):
            if "ToTorchTensor" in node.name():
                found[node.dtensor_spec.mesh] = None
    return list(found)


def mesh_of(layouts: Sequence[Layout | None]) -> Any:
    """The one mesh of DTensors, or None where all tensors are whole."""
    meshes = [layout.mesh for layout in layouts if layout is not None]
    for mesh in meshes[1:]:
        if mesh != meshes[0]:
            raise ValueError(
                "DFA: output and activations must be DTensors on one device mesh, got "
                f"{meshes[0]} and {mesh}"
            )
    return meshes[0] if meshes else None


def _made_of(function: str, argument: str, tensor: Tensor) -> list[Any]:
    """What DTensors a plain tensor is made of by functions of each number, where they are split.

    Such functions keep the shape, so only nodes of that shape are followed. Returns the DTensors'
    specs: mesh, placements, shape.
    """
    specs: list[Any] = []
    for node in _behind(tensor, lambda node: not _is(node, _MIXES) and _makes(node, tensor.shape)):
        if _is(node, ("compiledfunction",)):
            _warn_of_compiled_code(function, argument, tensor, node)
        elif (spec := _split_spec(node)) and _local_shape(spec) == tensor.shape:
            specs.append(spec)
    return specs


def _behind(tensor: Tensor, passes: Callable[[Any], bool]) -> Iterator[Any]:
    """Nodes that a tensor is made by, through those that `passes` says."""
    seen: set[Any] = set()
    todo: list[Any] = [tensor.grad_fn]
    while todo and len(seen) < _MOST_NODES:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not _is(node, ("compiledfunction",)) and passes(node):
            todo += [next_node for next_node, _ in node.next_functions]


def _is(node: Any, words: tuple[str, ...]) -> bool:
    return _has(node.name(), words)


@functools.cache
def _has(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name.lower() for word in words)


def _makes(node: Any, shape: torch.Size) -> bool:
    return any(tuple(one.shape) == shape for one in node._input_metadata)


def _split_spec(node: Any) -> Any:
    """The spec of the DTensor that a node gives the part of, if it is split, or None."""
    if "ToTorchTensor" not in node.name():
        return None
    spec = node.dtensor_spec
    return None if all(place.is_replicate() for place in spec.placements) else spec


def _warn_of_what_is_made_of_parts(function: str, argument: str, tensor: Tensor) -> None:
    """Warn of a part that went through functions which do not keep its shape, as heads do.

    How the result is split cannot be known. A part of the batch may be trained as a whole.
    """
    for node in _behind(tensor, lambda node: not _is(node, _ENDS)):
        spec = _split_spec(node)
        if spec and any(place.is_shard() and place.dim > 0 for place in spec.placements):
            guards.warn_once(
                _said,
                f"made of parts {argument}",
                f"{function}: {argument} is taken to be whole, got {list(tensor.shape)} made of "
                f"this process's part of {list(spec.shape)} as {tuple(spec.placements)}; if it is "
                "a part, make it a DTensor, as by use_local_output=False of the module before",
            )
            return


def _warn_of_compiled_code(function: str, argument: str, tensor: Tensor, node: Any) -> None:
    """Warn where a compiled graph may have returned a part: it has such a layer's weights."""
    for inner, _ in node.next_functions:
        weight: Any = getattr(inner, "variable", None)
        if tensor.dim() == 0 or not sharding.is_dtensor(weight) or weight.dim() != 2:
            continue
        size, here = weight.shape[0], weight.to_local().shape[0]
        if here == tensor.shape[-1] != size:
            guards.warn_once(
                _said,
                f"compiled {argument}",
                f"{function}: {argument} is taken to be whole, got {here} features out of compiled "
                f"code that has this process's part of a layer of {size}; if it is a part, "
                "parallelize its module with use_local_output=False",
            )


def _local_shape(spec: Any) -> tuple[int, ...]:
    return sharding.part_of(spec.shape, spec.mesh, spec.placements)[0]
