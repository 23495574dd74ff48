"""Cross entropy of logits, and in their place its gradient by them."""

from __future__ import annotations

import torch
from torch import Tensor

from dfa_kernels.stream import arithmetic

# What is worked on at a time: on the CPU it stays in a core's cache from pass to pass.
_CACHED_BYTES = 2**22
_DEVICE_BYTES = 2**28


def cross_entropy_(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float | Tensor = 1.0,
    gradient: bool = True,
) -> Tensor:
    """The losses of all rows [rows], in fp32 (fp64 for fp64 logits).

    With `gradient`, logits [rows, n] become `scale` times the gradient of each row's loss by them;
    otherwise they stay as they are. Rows whose target [rows] is `ignore_index` have a loss of 0 and
    a gradient of 0. `label_smoothing` is as in `torch.nn.functional.cross_entropy`. With a softcap
    c, the loss is of c tanh(logits / c). `scale` is a number, or a tensor on the device with one
    number or with one for each row. Nothing waits for the device.
    """
    scales = scales_of(scale, logits)
    return plain(logits, target, ignore_index, label_smoothing, softcap, scales, gradient)


def scales_of(scale: float | Tensor, logits: Tensor) -> Tensor:
    """A scale for each row [rows], in the dtype of the arithmetic."""
    wide = arithmetic(logits.dtype)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=wide, device=logits.device)
    return scale.to(wide).expand(logits.shape[0])


def plain(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    scales: Tensor,
    gradient: bool,
) -> Tensor:
    """`cross_entropy_` in PyTorch, a few rows at a time. Scales are [rows]."""
    rows, n = logits.shape
    wide = arithmetic(logits.dtype)
    losses = logits.new_empty(rows, dtype=wide)
    ignored = (target == ignore_index)[:, None]
    index = target[:, None].masked_fill(ignored, 0)
    scales = scales[:, None].masked_fill(ignored, 0.0)
    most = _CACHED_BYTES if logits.device.type == "cpu" else _DEVICE_BYTES
    step = max(most // max(n * wide.itemsize, 1), 1)
    for first in range(0, rows, step):
        some = slice(first, first + step)
        x = logits[some].to(wide, copy=not gradient)
        slope = None
        if softcap is not None:
            x.div_(softcap).tanh_()
            slope = 1 - x.square() if gradient else None
            x.mul_(softcap)
        # What is ignored becomes exp(-inf) = 0.
        top = x.amax(1, keepdim=True).masked_fill_(ignored[some], torch.inf)
        loss = (top - x.gather(1, index[some])) * (1 - label_smoothing)
        if label_smoothing:
            loss += (top - x.mean(1, keepdim=True)) * label_smoothing
        total = x.sub_(top).exp_().sum(1, keepdim=True)
        losses[some] = (loss + total.log()).masked_fill_(ignored[some], 0.0)[:, 0]
        if not gradient:
            continue
        x.mul_((scales[some] / total).masked_fill_(ignored[some], 0.0))
        x.scatter_add_(1, index[some], scales[some] * (label_smoothing - 1))
        if label_smoothing:
            x.sub_(scales[some] * (label_smoothing / n))
        if slope is not None:
            x.mul_(slope)
        if x.dtype != logits.dtype:
            logits[some] = x
    return losses
