"""Cross-entropy of the output layer whose logits are never whole, as autograd and graphs see it.

`DFA.linear_cross_entropy` is what users call; `chunks` has the computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfa_kernels import checks
from dfa_kernels.layers import Layers
from dfa_kernels.nn.chunks import WHERE, Head, Loss, Projection, Results, Wanted, run
from dfa_kernels.nn.functions import drops_graph, for_anchors
from dfa_kernels.nn.rows import from_rows, order, to_rows
from dfa_kernels.nn.sources import Received, Seeded, Source, Stored
from dfa_kernels.nn.ties import Tie
from dfa_kernels.stream import arithmetic

# Errors and signals are made before the gradient of the loss is known. This keeps them in the range
# of fp16.
_FP16_SCALE = 16.0


class Work(NamedTuple):
    """A loss to compute: what `run` needs beside tensors, and whom the signals go to.

    `logits` and `result` are the dtypes of those and of the loss. `batch_dims` has the tokens'
    dimensions in the order of the signals' rows. With `again` the logits are made again in the
    backward pass, which knows how often each token's loss counts.
    """

    loss: Loss
    logits: torch.dtype
    result: torch.dtype
    batch_dims: Sequence[int]
    wanted: Wanted
    projection: Projection | None
    tie: Tie | None
    again: bool

    @classmethod
    def of(
        cls,
        head: Head,
        loss: Loss,
        batch_dims: Sequence[int],
        projection: Projection | None,
        tie: Tie | None,
        again: bool,
        dtypes: tuple[torch.dtype, torch.dtype] | None = None,
    ) -> Work:
        """With wishes as the head has them, and dtypes too if they are not given."""
        result = head.hidden.dtype if head.autocast is None else torch.float32
        logits, result = dtypes or (head.dtype, result)
        return cls(loss, logits, result, batch_dims, Wanted.of(head), projection, tie, again)

    @property
    def scale(self) -> float:
        """What errors are multiplied by until the gradient of the loss is known."""
        signals = None if self.projection is None else self.projection.dtype
        return _FP16_SCALE if torch.float16 in (self.logits, signals) else 1.0

    def apply(self, head: Head, target: Tensor) -> Tensor:
        """The loss, tied to the activations."""
        tied = () if self.tie is None else self.tie.tensors
        return LinearCrossEntropy.apply(self, *head, target, *tied)

    def run(self, head: Head, target: Tensor, learn: bool, scale: Tensor | None = None) -> Results:
        """As the function, of tokens in any dimensions. None is the scale for the time being."""
        hidden, weight, bias = head
        dims, _ = order(hidden.shape, self.batch_dims, WHERE)
        rows = Head(to_rows(hidden, dims, WHERE), weight, bias)
        wanted = self.wanted if learn else Wanted(False, False, False)
        call = _run_compiled if torch.compiler.is_compiling() else run
        with head.without_autocast():
            return call(
                rows,
                target.permute(dims).reshape(-1),
                self.loss,
                self.logits,
                wanted,
                self.projection if learn else None,
                self.scale if scale is None else scale,
            )

    def reduced(self, losses: Tensor, count: Tensor, shape: torch.Size) -> Tensor:
        """The loss of all tokens, or one for each; hidden has that shape."""
        if self.loss.reduction == "none":
            shape = torch.Size((*shape[:-1], 1))
            losses = from_rows(losses[:, None], shape, self.batch_dims, WHERE).squeeze(-1)
            losses = losses.clone()  # no view: those of a Function cannot be changed in place
        else:
            losses = losses.sum()
            if self.loss.reduction == "mean":
                losses = losses / count
        return losses.to(self.result)

    def factor(self, gradient: Tensor, count: Tensor) -> Tensor:
        """How often each loss counts, by the gradient of what `reduced` returned.

        A number, or one for each row.
        """
        gradient = gradient.to(arithmetic(self.logits))
        if self.loss.reduction == "none":
            return to_rows(gradient[..., None], self.batch_dims, WHERE).squeeze(1)
        if self.loss.reduction == "mean":
            gradient = gradient / count.clamp(min=1)  # of no token all gradients are zero
        return gradient


class LinearCrossEntropy(torch.autograd.Function):
    """The loss; its backward sends gradients to the output layer and signals to the activations.

    forward(work, hidden, weight, bias, target, *activations, *anchors). Without `work.again`
    everything but a factor is there when the forward pass ends. It is kept as no saved tensor, so
    that a last backward pass may change it in place; torch.compile, which plans memory, saves it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        work: Work,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        *tied: Tensor,
    ) -> Tensor:
        """The loss of all tokens, or one for each."""
        results = work.run(Head(hidden, weight, bias), target, learn=not work.again)
        count = (target != work.loss.ignore_index).sum()
        inputs = [hidden, weight, target] if work.again else []
        if work.again and bias is not None:
            inputs.append(bias)
        made = [count] if work.again else [count, *results.tensors[1:]]
        # Without the tie, which has the activations: they would live as long as the loss.
        ctx.work, ctx.shape, ctx.n = work._replace(tie=None), hidden.shape, weight.shape[0]
        ctx.dtype, ctx.signals = weight.dtype, None
        kept: tuple[Tensor, ...] = ()
        if work.tie is not None:
            ctx.signals, ctx.anchors = work.tie.signals, len(work.tie.anchors)
            kept = tied[: len(work.tie.activations)]
        ctx.compiled = torch.compiler.is_compiling()  # compiled autograd takes eager passes, too
        if ctx.compiled:
            ctx.inputs, ctx.made = len(inputs), len(made)
            ctx.save_for_backward(hidden, *inputs, *made, *kept)
        else:
            ctx.made = made
            ctx.save_for_backward(*inputs)
        return work.reduced(results.losses, count, hidden.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for the output layer and its input, and the signals."""
        if not torch.is_grad_enabled():
            return LinearCrossEntropy.first_backward(ctx, gradient)
        with torch.no_grad():
            given = LinearCrossEntropy.first_backward(ctx, gradient)
        present = iter(_Last.apply(*(one.requires_grad_() for one in given if one is not None)))
        return tuple(None if one is None else next(present) for one in given)

    @staticmethod
    def first_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """See `backward`."""
        work, shape, inputs, made, kept = ctx.work, ctx.shape, ctx.saved_tensors, ctx.made, ()
        if ctx.compiled:  # the graph of a backward cannot use sizes that the forward computed
            hidden, *saved = ctx.saved_tensors
            shape, ends = hidden.shape, (ctx.inputs, ctx.inputs + ctx.made)
            inputs, made, kept = saved[: ends[0]], saved[ends[0] : ends[1]], saved[ends[1] :]
        if made is None:
            raise RuntimeError(
                f"{WHERE}: backward ran a second time, after what it needs was dropped; the first "
                "one needs retain_graph=True"
            )
        count, *tensors = made
        factor = work.factor(gradient, count)
        if work.again:
            hidden, weight, target, *bias = inputs
            head = Head(hidden, weight, bias[0] if bias else None)
            results = work.run(head, target, learn=True, scale=factor.expand(target.numel()))
        else:
            alone = not torch.compiler.is_compiling() and drops_graph()
            if alone:
                ctx.made = None
            factor = factor / work.scale
            tensors = [_times(tensor, factor, alone) for tensor in tensors]
            results = Results.of(work.wanted, [count, *tensors])
        _, of_hidden, of_weight, of_bias, signals = results
        if of_hidden is not None:
            of_hidden = from_rows(of_hidden, shape, work.batch_dims, WHERE)
        if of_weight is not None:
            of_weight = of_weight.to(ctx.dtype)
        if of_bias is not None:
            of_bias = of_bias.to(ctx.dtype)
        gradients = (None, of_hidden, of_weight, of_bias, None)
        if ctx.signals is None:
            return gradients
        error = torch.zeros((), dtype=work.logits, device=gradient.device)  # of no memory
        error = error.expand(*shape[:-1], ctx.n)
        source = Received(rows=signals[0][:, :0], signals=[*signals])
        sent = ctx.signals(error, kept, source)
        return (*gradients, *sent, *for_anchors(ctx.anchors, error))


class _Last(torch.autograd.Function):
    """Identity, which no derivative goes through."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors, as others."""
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        """Raises."""
        raise NotImplementedError(
            f"{WHERE}: it has no second derivatives; F.cross_entropy(dfa(logits), target) has them"
        )


# --- in graphs ---

_library = torch.library.Library("dfa_kernels", "FRAGMENT")
_library.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor? scales, float scale, int ignore_index, float label_smoothing, float? softcap, "
    "float factor, ScalarType logits, bool[] wanted, SymInt[] row_offsets, SymInt[] sizes, "
    "Scalar[] layer_scales, ScalarType signals, Device? device, Tensor[]? matrices, "
    "bool by_weight, SymInt seed, str distribution, str backend) -> Tensor[]"
)
_NOTHING = (), (), (), torch.float32, None, None, False, 0, "normal", ""


def _run_compiled(
    head: Head,
    target: Tensor,
    loss: Loss,
    dtype: torch.dtype,
    wanted: Wanted,
    projection: Projection | None,
    scale: float | Tensor,
) -> Results:
    """`run` as one node of a graph, of a `Projection` that `graph_takes`."""
    scales, scale = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    how: tuple[Any, ...] = _NOTHING
    if projection is not None:
        layer_scales: Sequence[float]
        (row_offsets, sizes, layer_scales), source = projection.layers, projection.source
        matrices, by_weight, seeded = None, projection.by_weight, (0, "normal", "")
        if by_weight is not None:
            layer_scales = by_weight
        elif isinstance(source, Stored):
            matrices = [matrix.detach() for matrix in source.matrices]
        elif isinstance(source, Seeded):
            seed = checks.seed(WHERE, source.seed)  # fits int64
            seeded = seed, source.distribution, source.backend or ""
        layers = row_offsets, sizes, layer_scales
        where = projection.dtype, projection.device, matrices
        how = *layers, *where, by_weight is not None, *seeded
    operator = torch.ops.dfa_kernels.linear_cross_entropy
    loss_arguments = loss.ignore_index, loss.label_smoothing, loss.softcap, loss.factor
    return Results.of(
        wanted, operator(*head, target, scales, scale, *loss_arguments, dtype, wanted, *how)
    )


def graph_takes(projection: Projection | None) -> bool:
    """Whether a projection can be part of one node of a graph."""
    if projection is None or projection.by_weight is not None:
        return True
    return projection.transform is None and isinstance(projection.source, (Seeded, Stored))


def _operator(
    hidden,
    weight,
    bias,
    target,
    scales,
    scale,
    ignore_index,
    label_smoothing,
    softcap,
    factor,
    logits,
    wanted,
    row_offsets,
    sizes,
    layer_scales,
    signals,
    device,
    matrices,
    by_weight,
    seed,
    distribution,
    backend,
) -> list[Tensor]:
    projection = None
    if sizes:
        layer_scales = [*map(float, layer_scales)]
        source: Source = Seeded(seed % 2**64, distribution, backend or None)
        if matrices is not None:
            source = Stored(tuple(matrices))
        projection = Projection(
            source,
            Layers.of(row_offsets, sizes, layer_scales),
            signals,
            device or hidden.device,
            None,
            layer_scales if by_weight else None,
        )
    loss = Loss(ignore_index, "none", label_smoothing, softcap, factor)
    results = run(
        Head(hidden, weight, bias),
        target,
        loss,
        logits,
        Wanted(*wanted),
        projection,
        scale if scales is None else scales,
    )
    return results.tensors


def _operator_fake(
    hidden,
    weight,
    bias,
    target,
    scales,
    scale,
    ignore_index,
    label_smoothing,
    softcap,
    factor,
    logits,
    wanted,
    row_offsets,
    sizes,
    layer_scales,
    signals,
    device,
    *_,
) -> list[Tensor]:
    wide = arithmetic(logits)
    tokens = hidden.shape[0]
    of_hidden, of_weight, of_bias = wanted
    results = [hidden.new_empty(tokens, dtype=wide)]
    results += [hidden.new_empty(hidden.shape)] if of_hidden else []
    results += [weight.new_empty(weight.shape, dtype=wide)] if of_weight else []
    results += [weight.new_empty(weight.shape[:1], dtype=wide)] if of_bias else []
    device = device or hidden.device
    return results + [
        hidden.new_empty(tokens, size, dtype=signals, device=device) for size in sizes
    ]


_library.impl("linear_cross_entropy", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("dfa_kernels::linear_cross_entropy", _operator_fake, lib=_library)


def _times(tensor: Tensor, factor: Tensor, alone: bool) -> Tensor:
    """A product, in place if nobody else will need the tensor."""
    factor = factor.to(tensor.device).view(1)  # a scalar would be rounded to the tensor's dtype
    return tensor.mul_(factor) if alone else (tensor * factor).to(tensor.dtype)
