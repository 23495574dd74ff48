"""The projection under torch.func's transforms and in forward mode.

It is linear in the error, so every derivative is a projection again, or its transpose. What reverse
mode alone needs is registered with the operators, in `ops`, where torch.compile sees it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether forward mode is on, or a transform of torch.func that differentiates or maps.

    Raises NotImplementedError for functionalize together with one of them: torch has no rule for a
    Function there, and an operator alone would have no derivatives.
    """
    forward_mode = forward_ad._current_level >= 0
    if not torch._C._are_functorch_transforms_active():
        return forward_mode
    names = _transforms()
    if "Functionalize" not in names:
        return True
    if forward_mode or len(set(names)) > 1:
        raise NotImplementedError(
            "project: torch.func.functionalize cannot be combined with another transform or "
            f"forward mode around a projection, got {' around '.join(names)}"
        )
    return False


@torch.compiler.assume_constant_result  # torch.compile enters transforms as it traces
def _transforms() -> tuple[str, ...]:
    """The names of torch.func's transforms around this call, the outermost first."""
    return tuple(level.key().name for level in torch._C._functorch.get_interpreter_stack() or ())


def project(error: Tensor, *arguments: Any) -> list[Tensor]:
    """The signals, with all derivatives; see `Projection`."""
    if torch.compiler.is_compiling() and _transforms()[:1] in ((), ("Vmap",)):
        return _uncompiled(error, *arguments)
    return _one_node(error, *arguments)


@torch.compiler.allow_in_graph
def _one_node(error: Tensor, *arguments: Any) -> list[Tensor]:
    """One node of a compiled graph, which keeps its derivatives for where it meets the transforms.

    torch.compile itself would trace the forward of `Projection` alone.
    """
    return list(Projection.apply(error, *arguments))


_eager = torch.compiler.disable(
    reason="dfa_kernels: a projection in forward mode or under vmap cannot be compiled"
)


@_eager
def _uncompiled(error: Tensor, *arguments: Any) -> list[Tensor]:
    """A call that is left out of compiled graphs.

    In them, forward mode without a transform would lose its tangents, and under vmap outermost a
    trainer's Function its rule. Inside vjp and jacrev it must not be used: for what is left out
    there, torch before 2.12 makes zeros of the gradients (pytorch/pytorch#172386).
    """
    return list(Projection.apply(error, *arguments))


class Projection(torch.autograd.Function):
    """error [M, n] -> a tuple of signals [M, sizes[i]]; `arguments` are those of the operator."""

    @staticmethod
    def forward(error: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """By the operator."""
        return tuple(torch.ops.dfa_kernels.project.default(error, *arguments))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """No tensor is kept."""
        error, *ctx.arguments = inputs
        ctx.columns, ctx.dtype = error.shape[1], error.dtype

    @staticmethod
    @_eager
    def backward(ctx, *signals: Tensor) -> tuple[Tensor | None, ...]:
        """The transpose."""
        *layers_and_stream, _, backend = ctx.arguments
        arguments = (*layers_and_stream, ctx.columns, ctx.dtype, backend)
        return Adjoint.apply(arguments, *signals), *[None] * len(ctx.arguments)

    @staticmethod
    @_eager
    def jvp(ctx, tangent: Tensor, *_: None) -> tuple[Tensor, ...]:
        """The projection of the tangent."""
        return Projection.apply(tangent, *ctx.arguments)

    @staticmethod
    @_eager
    def vmap(info, in_dims, error: Tensor, *arguments: Any):
        """All calls' errors are rows of one."""
        errors = _stacked(error, in_dims[0], info.batch_size)
        signals = Projection.apply(errors.flatten(0, 1), *arguments)
        stacks = tuple(signal.unflatten(0, errors.shape[:2]) for signal in signals)
        return stacks, (0,) * len(stacks)


class Adjoint(torch.autograd.Function):
    """Signals [M, sizes[i]] -> [M, columns]: the transpose of `Projection`.

    `arguments`: row_offsets, sizes, scales, seed, column_offset, distribution, columns, dtype,
    backend.
    """

    @staticmethod
    def forward(arguments: tuple, *signals: Tensor) -> Tensor:
        """By the operator."""
        row_offsets, _, *others = arguments
        return torch.ops.dfa_kernels.project_adjoint(list(signals), row_offsets, *others)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """No tensor is kept."""
        ctx.arguments, *signals = inputs
        ctx.dtype = signals[0].dtype

    @staticmethod
    @_eager
    def backward(ctx, error: Tensor) -> tuple[Tensor | None, ...]:
        """The projection."""
        *layers_and_stream, _, _, backend = ctx.arguments
        return None, *Projection.apply(error, *layers_and_stream, ctx.dtype, backend)

    @staticmethod
    @_eager
    def jvp(ctx, _: None, *tangents: Tensor) -> Tensor:
        """The transpose, of the tangents."""
        return Adjoint.apply(ctx.arguments, *tangents)

    @staticmethod
    @_eager
    def vmap(info, in_dims, arguments: tuple, *signals: Tensor):
        """All calls' signals are rows of one."""
        dims = in_dims[1:]
        stacks = [_stacked(*pair, info.batch_size) for pair in zip(signals, dims, strict=True)]
        error = Adjoint.apply(arguments, *(stack.flatten(0, 1) for stack in stacks))
        return error.unflatten(0, stacks[0].shape[:2]), 0


def _stacked(tensor: Tensor, dim: int | None, calls: int) -> Tensor:
    """[M, size] of each of the calls, along `dim` or the same for all, as [calls, M, size]."""
    return tensor.expand(calls, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
