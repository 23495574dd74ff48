"""The projection under torch.func's transforms and in forward mode.

It is linear in the error, so every derivative is a projection or its transpose. The rule for plain
reverse mode is registered with the operators, in `ops`, where torch.compile sees it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dfa_kernels.layers import Layers, overload_for
from dfa_kernels.stream import Stream


def transformed() -> bool:
    """Whether forward mode is on, or a transform of torch.func that differentiates or maps.

    Raises NotImplementedError if functionalize is combined with one of them: torch has no rule for
    a Function there, and an operator alone would have no derivatives.
    """
    dual_level = forward_ad._current_level >= 0
    if not torch._C._are_functorch_transforms_active():
        return dual_level
    names = _transforms()
    if "Functionalize" not in names:
        return True
    if dual_level or len(set(names)) > 1:
        raise NotImplementedError(
            "project: torch.func.functionalize cannot be combined with another transform or "
            f"forward mode around a projection, got {' around '.join(names)}"
        )
    return False


def forward_mode() -> bool:
    """Whether forward mode is on, plainly or by a transform of torch.func."""
    if forward_ad._current_level >= 0:
        return True
    return torch._C._are_functorch_transforms_active() and "Jvp" in _transforms()


@torch.compiler.assume_constant_result  # while tracing, torch.compile enters transforms
def _transforms() -> tuple[str, ...]:
    """The names of torch.func's transforms around this call, outermost first."""
    return tuple(level.key().name for level in torch._C._functorch.get_interpreter_stack() or ())


def project(
    error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype | None, backend: str
) -> list[Tensor]:
    """The signals, with all derivatives; see `Projection`."""
    if torch.compiler.is_compiling() and _transforms()[:1] in ((), ("Vmap",)):
        return _uncompiled(error, layers, stream, dtype, backend)
    return _one_node(error, *layers, *stream, dtype, backend)


@torch.compiler.allow_in_graph
def _one_node(error: Tensor, *arguments: Any) -> list[Tensor]:
    """One node of a compiled graph, which keeps its derivatives for the transforms around it.

    torch.compile itself would trace only the forward of `Projection`. A graph holds an operator's
    arguments, no NamedTuples of them.
    """
    layers, stream = Layers.of(*arguments[:3]), Stream(*arguments[3:6])
    return list(Projection.apply(error, layers, stream, *arguments[6:]))


_eager = torch.compiler.disable(
    reason="dfa_kernels: a projection in forward mode or under vmap cannot be compiled"
)


def requires_gradient(tensor: Tensor) -> bool:
    """Whether a tensor requires a gradient, also of what is outside a vmap, which hides that.

    Under vmap torch.compile breaks its graph here.
    """
    if tensor.requires_grad or "Vmap" not in _transforms():
        return tensor.requires_grad
    return _hidden_requires_gradient(tensor)


@_eager
def _hidden_requires_gradient(tensor: Tensor) -> bool:
    while not tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


@_eager
def _uncompiled(error: Tensor, *arguments: Any) -> list[Tensor]:
    """A call that stays out of compiled graphs.

    In a graph, forward mode without a transform would lose its tangents, and if vmap is outermost,
    a trainer's Function would lose its rule. Not for use inside vjp and jacrev: there, torch before
    2.12 makes the gradients of calls outside the graph zero (pytorch/pytorch#172386).
    """
    return list(Projection.apply(error, *arguments))


class Projection(torch.autograd.Function):
    """error [batch, n] -> a tuple of signals [batch, sizes[i]]."""

    @staticmethod
    def forward(
        error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype | None, backend: str
    ) -> tuple[Tensor, ...]:
        """Calls the operator."""
        operator = getattr(torch.ops.dfa_kernels.project, overload_for(layers.scales))
        return tuple(operator(error, *layers, *stream, dtype, backend))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keeps no tensor."""
        error, ctx.layers, ctx.stream, ctx.output_dtype, ctx.backend = inputs
        ctx.columns, ctx.dtype = error.shape[1], error.dtype

    @staticmethod
    @_eager
    def backward(ctx, *signals: Tensor) -> tuple[Tensor | None, ...]:
        """The transpose."""
        where = (ctx.layers, ctx.stream, ctx.columns, ctx.dtype, ctx.backend)
        return Adjoint.apply(*where, *signals), None, None, None, None

    @staticmethod
    @_eager
    def jvp(ctx, tangent: Tensor, *_: None) -> tuple[Tensor, ...]:
        """The projection of the tangent."""
        return Projection.apply(tangent, ctx.layers, ctx.stream, ctx.output_dtype, ctx.backend)

    @staticmethod
    @_eager
    def vmap(info, in_dims, error: Tensor, *arguments: Any):
        """All calls' errors become one batch."""
        errors = _stacked(error, in_dims[0], info.batch_size)
        signals = Projection.apply(errors.flatten(0, 1), *arguments)
        stacks = tuple(signal.unflatten(0, errors.shape[:2]) for signal in signals)
        return stacks, (0,) * len(stacks)


class Adjoint(torch.autograd.Function):
    """Signals [batch, sizes[i]] -> [batch, columns] of `dtype`: the transpose of `Projection`."""

    @staticmethod
    def forward(
        layers: Layers,
        stream: Stream,
        columns: int,
        dtype: torch.dtype,
        backend: str,
        *signals: Tensor,
    ) -> Tensor:
        """Calls the operator."""
        row_offsets, _, scales = layers
        where = (row_offsets, scales, *stream)
        operator = getattr(torch.ops.dfa_kernels.project_adjoint, overload_for(scales))
        return operator(list(signals), *where, columns, dtype, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keeps no tensor."""
        ctx.layers, ctx.stream, ctx.columns, ctx.output_dtype, ctx.backend, *signals = inputs
        ctx.dtype = signals[0].dtype

    @staticmethod
    @_eager
    def backward(ctx, error: Tensor) -> tuple[Tensor | None, ...]:
        """The projection."""
        signals = Projection.apply(error, ctx.layers, ctx.stream, ctx.dtype, ctx.backend)
        return None, None, None, None, None, *signals

    @staticmethod
    @_eager
    def jvp(ctx, *tangents: Tensor | None) -> Tensor:
        """The transpose of the tangents."""
        where = (ctx.layers, ctx.stream, ctx.columns, ctx.output_dtype, ctx.backend)
        return Adjoint.apply(*where, *tangents[len(where) :])

    @staticmethod
    @_eager
    def vmap(info, in_dims, *arguments: Any):
        """All calls' signals become one batch."""
        where, signals = arguments[:5], arguments[5:]
        pairs = zip(signals, in_dims[5:], strict=True)
        stacks = [_stacked(*pair, info.batch_size) for pair in pairs]
        error = Adjoint.apply(*where, *(stack.flatten(0, 1) for stack in stacks))
        return error.unflatten(0, stacks[0].shape[:2]), 0


def _stacked(tensor: Tensor, dim: int | None, calls: int) -> Tensor:
    """[calls, batch, size] from calls along `dim`, or from one [batch, size] for all of them."""
    return tensor.expand(calls, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
