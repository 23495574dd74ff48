"""The output layer, its loss and the layers' signals, by chunks of tokens.

The logits of a vocabulary are by far the largest tensor of a language model. Here those of a chunk
are made, turned into losses and, in the same memory, into the error, and what the step needs of
that is kept: the gradients of the output layer, its input's, and the signals, which are linear in
the error and so need not wait for the backward pass. That only multiplies them by the gradient of
the loss. Where more than a factor depends on that gradient, it makes the logits again.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfa_kernels import checks, sharding
from dfa_kernels.backends.slabs import cut
from dfa_kernels.cross_entropy import cross_entropy_
from dfa_kernels.layers import Layers
from dfa_kernels.nn import signals as delivery
from dfa_kernels.nn.rows import order
from dfa_kernels.nn.shards import layout_of
from dfa_kernels.nn.sources import LINEAR, Source
from dfa_kernels.stream import arithmetic

WHERE = "DFA.linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")
# Bytes that the logits of a chunk may take, on a CPU and elsewhere.
BUDGET_CPU, BUDGET = 128 * 2**20, 256 * 2**20
# Sums over the tokens of a chunk stay in the range of fp16: of so many, and made so much smaller.
_FP16_ROWS, _FP16_SHRINK = 2**10, 2.0**-6


class Loss(NamedTuple):
    """The arguments of a cross-entropy, as `torch.nn.functional.cross_entropy` has them.

    It is of logits times `factor`, which `softcap`, if given, then keeps within plus or minus it by
    its tanh.
    """

    ignore_index: int
    reduction: str
    label_smoothing: float
    softcap: float | None
    factor: float = 1.0

    @classmethod
    def checked(cls, ignore_index: Any, reduction: Any, label_smoothing: Any, softcap: Any) -> Loss:
        """Raises where an argument is none."""
        index = checks.integer(WHERE, "ignore_index", ignore_index, low=-(2**63), high=2**63 - 1)
        if reduction not in REDUCTIONS:
            raise ValueError(f"{WHERE}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
        smoothing = checks.number(WHERE, "label_smoothing", label_smoothing, low=0.0, high=1.0)
        if softcap is not None:
            softcap = checks.number(WHERE, "softcap", softcap, low=-math.inf)
            if softcap <= 0:
                raise ValueError(
                    f"{WHERE}: softcap must be above 0, or None for none, got {softcap}"
                )
        return cls(index, reduction, smoothing, softcap)

    def of(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of whole logits [tokens, n] or [..., n]."""
        if self.factor != 1:
            logits = self.factor * logits
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        loss = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            target.reshape(-1),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
        return loss.view(target.shape) if self.reduction == "none" else loss


class Head(NamedTuple):
    """The output layer and its input: [..., d], [n, d] and [n]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def check(self, target: Tensor) -> None:
        """Raise where these make no logits of the target's tokens."""
        hidden, weight, bias = self
        named = {"hidden": hidden, "weight": weight, "target": target, "bias": bias}
        for argument, given in named.items():
            if not isinstance(given, Tensor) and not (argument == "bias" and given is None):
                got = type(given).__name__
                if isinstance(given, nn.Module):
                    got += "; give its weight, and its bias as bias="
                raise TypeError(f"{WHERE}: {argument} must be a tensor, got {got}")
        if len({sharding.is_dtensor(given) for given in self.tensors}) > 1:
            raise ValueError(
                f"{WHERE}: hidden, weight and bias must be DTensors all or none, got "
                f"{', '.join(type(given).__name__ for given in self.tensors)}; with fully_shard "
                "leave the output layer to the root module, or call the DFA on its output"
            )
        if weight.dim() != 2 or weight.shape[0] == 0:
            raise ValueError(f"{WHERE}: weight must be [n, d], got {tuple(weight.shape)}")
        n, d = weight.shape
        if hidden.dim() < 1 or hidden.shape[-1] != d:
            raise ValueError(
                f"{WHERE}: hidden must be [..., {d}], as weight {tuple(weight.shape)} has it, got "
                f"{tuple(hidden.shape)}"
            )
        if bias is not None and tuple(bias.shape) != (n,):
            raise ValueError(f"{WHERE}: bias must be [{n}], got {tuple(bias.shape)}")
        if target.shape != hidden.shape[:-1] or target.dtype is not torch.int64:
            raise ValueError(
                f"{WHERE}: target must be the int64 index of a word for each token, "
                f"{tuple(hidden.shape[:-1])}, got {target.dtype} of {tuple(target.shape)}; tokens "
                "without a word to predict get ignore_index"
            )
        if self.autocast is None:
            for argument in ("hidden", "weight", "bias"):
                given = named[argument]
                if given is not None and given.dtype is not weight.dtype:
                    got = ", ".join(str(one.dtype) for one in self.tensors)
                    raise ValueError(
                        f"{WHERE}: hidden, weight and bias must have one dtype, got {got}"
                    )
        checks.dtype(WHERE, "hidden.dtype", hidden.dtype)
        devices = {given.device for given in named.values() if given is not None}
        if len(devices) > 1:
            raise ValueError(
                f"{WHERE}: all tensors must be on one device, got {sorted(map(str, devices))}"
            )

    def check_rows(self, batch_dims: Sequence[int]) -> None:
        """Raise where not every token has a row of the error."""
        shape = self.hidden.shape
        _, rest = order(shape, batch_dims, WHERE)
        if rest != [len(shape) - 1]:
            raise ValueError(
                f"{WHERE}: batch_dims must be all dimensions of hidden but the last, so that every "
                f"token is a row, got {tuple(batch_dims)} beside hidden of shape {tuple(shape)}"
            )

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype in which autocast multiplies, or None where it is off."""
        kind = self.hidden.device.type
        if self.hidden.dtype is torch.float64 or not torch.amp.is_autocast_available(kind):
            return None
        if not torch.is_autocast_enabled(kind):
            return None
        return torch.get_autocast_dtype(kind)

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits."""
        return self.autocast or self.hidden.dtype

    def without_autocast(self) -> torch.autocast:
        """A context that multiplies in the dtypes given. Devices without autocast need none."""
        kind = self.hidden.device.type
        available = torch.amp.is_autocast_available(kind)
        return torch.autocast(kind if available else "cpu", enabled=False)

    def logits(self) -> Tensor:
        """The whole of them."""
        return F.linear(*self)

    def stand_in(self) -> Tensor:
        """A tensor of the logits' shape, dtype and device, and of no memory."""
        hidden, weight, _ = self
        scalar = torch.zeros((), dtype=self.dtype, device=hidden.device)
        return scalar.expand(*hidden.shape[:-1], weight.shape[0])

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are given."""
        return [given for given in self if given is not None]


def needs_whole_logits(hidden: Tensor, *weights: Tensor | None) -> bool:
    """Whether torch has to see the logits: to transform functions, to trace, or as DTensors."""
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch.jit.is_tracing() or any(map(sharding.is_dtensor, (hidden, *weights))):
        return True
    return sharding.in_use() and layout_of(WHERE, "hidden", hidden, warn=False) is not None


class Wanted(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, head: Head) -> Wanted:
        """Of those that require one."""
        grad = torch.is_grad_enabled()
        return cls(*(grad and one is not None and one.requires_grad for one in head))


class Projection(NamedTuple):
    """What makes the signals of `layers` of an error of some tokens, on `device`.

    `by_weight` is for signals W^T e by the output layer's own weights: by how much each is longer.
    """

    source: Source
    layers: Layers
    dtype: torch.dtype
    device: torch.device
    transform: Callable[[Tensor], Tensor] | None
    by_weight: Sequence[float] | None

    @property
    def is_linear(self) -> bool:
        """Whether an error of zeros, as of ignored tokens, is known to make signals of zeros."""
        return self.transform is None and isinstance(self.source, LINEAR)

    def new(self, tokens: int, *, zeros: bool) -> list[Tensor]:
        """Memory for the signals."""
        make = torch.zeros if zeros else torch.empty
        return [
            make(tokens, size, dtype=self.dtype, device=self.device) for size in self.layers.sizes
        ]

    def signals(self, error: Tensor, back: Tensor | None) -> list[Tensor]:
        """Those of an error [tokens, n], which is `back` [tokens, d] through the output layer."""
        if self.by_weight is not None:
            assert back is not None
            return [back * scale for scale in self.by_weight]
        if self.transform is not None:
            error = self.transform(error)
        elif not self.is_linear:
            error = error.clone()  # a user's source may keep it; the next chunk takes its memory
        return delivery.project(self.source, error.to(self.device), self.layers, self.dtype)


class Results(NamedTuple):
    """What a pass over all tokens makes; gradients and signals are of the sum of losses."""

    losses: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    signals: Sequence[Tensor]

    @classmethod
    def of(cls, wanted: Wanted, tensors: Sequence[Tensor]) -> Results:
        """From `tensors`."""
        losses, *others = tensors
        hidden, weight, bias = (others.pop(0) if one else None for one in wanted)
        return cls(losses, hidden, weight, bias, others)

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are, in order."""
        return [one for one in self[:4] if one is not None] + [*self.signals]


def run(
    head: Head,
    target: Tensor,
    loss: Loss,
    dtype: torch.dtype,
    wanted: Wanted,
    projection: Projection | None,
    scale: float | Tensor,
) -> Results:
    """Losses [tokens], and what is wanted of the error, times `scale`: a number, or [tokens].

    hidden is [tokens, d]. `dtype` is the logits'.
    """
    hidden, weight, bias = head
    tokens, (n, d) = len(target), weight.shape
    wide = arithmetic(dtype)
    _check_words(target, n, loss.ignore_index)
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    is_linear = projection is None or projection.is_linear
    most = _chunk_rows(hidden.device, n, dtype)
    chunks = list(_chunks(target, loss.ignore_index if is_linear else None, most))
    whole = sum(map(_length, chunks)) == tokens
    new = hidden.new_empty if whole else hidden.new_zeros

    losses = new(tokens, dtype=wide)
    of_hidden = new(tokens, d) if wanted.hidden else None
    first = hidden.new_empty if chunks else hidden.new_zeros
    of_weight = first(n, d, dtype=wide) if wanted.weight else None
    of_bias = hidden.new_zeros(n, dtype=wide) if wanted.bias else None
    signals = [] if projection is None else projection.new(tokens, zeros=not whole)
    through = wanted.hidden or (projection is not None and projection.by_weight is not None)

    scale = scale * loss.factor  # the error is by logits before the factor
    gradient = any(wanted) or projection is not None
    # On a GPU rows begin on 16 bytes, for fast loads.
    columns = n if hidden.device.type == "cpu" else -(-n // 16) * 16
    longest = max(map(_length, chunks), default=0)
    logits = hidden.new_empty(longest, columns, dtype=dtype)[:, :n]
    for index, chunk in enumerate(chunks):
        rows = hidden[chunk].detach().to(dtype)
        error = logits[: len(rows)]
        plus, beta = (error, 0.0) if bias is None else (bias, loss.factor)
        torch.addmm(plus, rows, weight.T, beta=beta, alpha=loss.factor, out=error)
        losses[chunk] = cross_entropy_(
            error,
            target[chunk],
            ignore_index=loss.ignore_index,
            label_smoothing=loss.label_smoothing,
            softcap=loss.softcap,
            scale=scale[chunk] if isinstance(scale, Tensor) else scale,
            gradient=gradient,
        )
        back = error @ weight if through else None
        if of_hidden is not None and back is not None:
            of_hidden[chunk] = back.to(of_hidden.dtype)
        if of_weight is not None:
            _add_product(of_weight, error.T, rows, first=index == 0)
        if of_bias is not None:
            of_bias += error.sum(0)
        if projection is not None:
            for signal, part in zip(signals, projection.signals(error, back), strict=True):
                signal[chunk] = part.to(signal.device, signal.dtype)
    return Results(losses, of_hidden, of_weight, of_bias, signals)


def budget(device: torch.device) -> int:
    """Bytes for a chunk: DFA_KERNELS_LOGITS_BYTES, or what suits the kind of device."""
    given = os.environ.get("DFA_KERNELS_LOGITS_BYTES", "")
    if not given:
        return BUDGET_CPU if device.type == "cpu" else BUDGET
    if not given.isdecimal() or int(given) == 0:
        raise ValueError(
            f"{WHERE}: DFA_KERNELS_LOGITS_BYTES must be a number of bytes above 0, as "
            f"67108864, got {given!r}"
        )
    return int(given)


def _chunk_rows(device: torch.device, n: int, dtype: torch.dtype) -> int:
    """How many tokens' logits fit in the budget; at least one."""
    most = _FP16_ROWS if dtype is torch.float16 else sys.maxsize
    return min(max(budget(device) // (n * dtype.itemsize), 1), most)


def _chunks(target: Tensor, ignore_index: int | None, rows: int) -> Iterator[slice | Tensor]:
    """The tokens of each chunk. On a CPU without the ignored: elsewhere to know them is to wait."""
    if _readable(target) and ignore_index is not None:
        kept = (target != ignore_index).nonzero().squeeze(1)
        if len(kept) < len(target):
            yield from kept.tensor_split(-(-len(kept) // rows) or 1) if len(kept) else ()
            return
    count = -(-len(target) // rows)
    step = -(-len(target) // max(count, 1))  # evened out
    yield from (slice(*ends) for ends in cut(len(target), step or 1))


def _length(chunk: slice | Tensor) -> int:
    return chunk.stop - chunk.start if isinstance(chunk, slice) else len(chunk)


def _readable(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are here, with no wait. Those of a FakeTensor are nowhere."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor


def _check_words(target: Tensor, n: int, ignore_index: int) -> None:
    """Raise, on a GPU later, where a token is no word of the vocabulary."""
    fits = ((target >= 0) & (target < n)) | (target == ignore_index)
    if _readable(target):
        if not fits.all():
            got = target[~fits][0].item()
            raise IndexError(
                f"{WHERE}: target must be in [0, {n}) or ignore_index ({ignore_index}), got {got}"
            )
    elif target.device.type != "meta":
        torch._assert_async(fits.all(), f"{WHERE}: target must be in [0, {n}) or ignore_index")


def check_row_by_row(transform: Callable[[Tensor], Tensor], error: Tensor) -> bool:
    """Raise where what an error_transform makes of a row depends on the others.

    Returns whether this error could show it. A transform that draws random numbers is not checked.
    """
    if error.is_meta or type(error) is not Tensor:  # a FakeTensor has no numbers
        return False
    sample = error[:: max(len(error) // 8, 1)][:8]
    on_gpu = [sample.device] if sample.device.type == "cuda" else []
    with torch.random.fork_rng(on_gpu):
        states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, on_gpu)]
        alone = transform(sample)
        later = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, on_gpu)]
        if not all(map(torch.equal, states, later)):
            return True
        beside = transform(torch.cat([2 * sample.flip(0), sample]))[-len(sample) :]
    if not (sample.isfinite().all() and sample.any()):  # too large a scale of fp16, or no loss
        return False
    tolerance = 30 * torch.finfo(sample.dtype).eps
    most = tolerance * float(alone.abs().nan_to_num().max())
    if not torch.allclose(alone, beside, rtol=tolerance, atol=most, equal_nan=True):
        raise ValueError(
            f"{WHERE}: error_transform must treat each row by itself, since it gets a chunk of "
            "tokens at a time, got one that makes a row another beside others, as e * len(e) "
            "does; call the DFA on whole logits for that"
        )
    return True


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left @ right, or = for the first. Sums of 16-bit products are in fp32."""
    if total.dtype is left.dtype:
        if first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
        return
    step = max(budget(total.device) // max(right.shape[1] * left.element_size(), 1), 1)
    shrink = _FP16_SHRINK if left.dtype is torch.float16 else 1.0
    if shrink != 1:
        right = right * shrink
    if first:
        total.zero_()
    for start, stop in cut(len(left), step):
        total[start:stop].add_(left[start:stop] @ right, alpha=1 / shrink)
