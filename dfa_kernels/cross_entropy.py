"""Cross entropy of logits, and in their place its gradient by them."""

from __future__ import annotations

import warnings
from types import ModuleType

import torch
from torch import Tensor

from dfa_kernels.backends import triton
from dfa_kernels.stream import arithmetic

# Of rows that are worked on at a time, for each thread of the CPU, whose cache keeps them from pass
# to pass; and on another device.
_CACHED_BYTES = 2**21
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
    number or with one for each row. Nothing waits for the device, but for the check of a Triton
    kernel before its first use; while a CUDA graph is captured, what is not checked yet is not
    used.

    Raises TypeError if logits are not floating-point. A target that is neither a column nor
    `ignore_index` is an error of `gather`'s, or a loss of NaN by the kernel.
    """
    if not logits.is_floating_point():
        raise TypeError(f"cross_entropy_: logits must be floating-point, got {logits.dtype}")
    options = ignore_index, label_smoothing, softcap, scales_of(scale, logits), gradient
    real = logits.is_cuda and type(logits) is Tensor  # a FakeTensor has no memory
    losses = by_kernel(logits, target, *options) if real else None
    return plain(logits, target, *options) if losses is None else losses


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
    """`cross_entropy_` in PyTorch, a few rows at a time. Scales are [rows].

    As in torch, an ignored row with NaN or +inf has a gradient of NaN; by the kernel it has 0.
    """
    rows, n = logits.shape
    wide = arithmetic(logits.dtype)
    losses = logits.new_empty(rows, dtype=wide)
    ignored = (target == ignore_index)[:, None]
    index = target[:, None].masked_fill(ignored, 0)
    scales = scales[:, None].masked_fill(ignored, 0.0)
    on_cpu = logits.device.type == "cpu"
    most = _CACHED_BYTES * torch.get_num_threads() if on_cpu else _DEVICE_BYTES
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


# Whether a kernel is right, by the device and what it is compiled for.
_checked: dict[tuple, bool] = {}


def by_kernel(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    scales: Tensor,
    gradient: bool,
) -> Tensor | None:
    """As `plain`, by the Triton kernel, or None if it cannot serve.

    Before its first use on a device, a kernel is compared with `plain`, which waits for the device.
    Warns once about one that is wrong or fails.
    """
    if triton.unavailable(logits.device.type) is not None:
        return None
    from dfa_kernels.backends.triton import cross_entropy as kernel

    if not kernel.serves(logits):
        return None
    vector = kernel.vector_of(logits)
    flags = bool(label_smoothing), softcap is not None, gradient
    key = (logits.device, logits.dtype, vector, *flags)
    if key not in _checked:
        if logits.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        try:
            wrong = _fault(kernel, logits, vector, *flags)
        except Exception as error:  # of a compiler or a driver: any kind
            wrong = f"{type(error).__name__}: {error}"
        _checked[key] = wrong is None
        if wrong is not None:
            warnings.warn(
                f"dfa_kernels: the Triton kernel of cross entropy for {logits.dtype} on "
                f"{logits.device} failed its check ({wrong}); plain PyTorch serves in its place",
                RuntimeWarning,
                stacklevel=3,
            )
    if not _checked[key]:
        return None
    return kernel.cross_entropy_(
        logits, target, ignore_index, label_smoothing, softcap, scales, gradient
    )


def _fault(
    kernel: ModuleType, logits: Tensor, vector: int, smoothed: bool, capped: bool, gradient: bool
) -> str | None:
    """What is wrong with a kernel, as compiled for such logits, or None: a few rows of its own.

    They go over two blocks and the rest of a third; some numbers are -inf, and a row is ignored.
    """
    device, dtype, wide = logits.device, logits.dtype, arithmetic(logits.dtype)
    block = kernel.block_of(dtype, vector)
    rows, n = 4, 2 * block + 77
    stride = n + 51 + (vector == 1)
    generator = torch.Generator().manual_seed(0)
    given = 2 * torch.randn(rows, stride, generator=generator, dtype=torch.float64, device="cpu")
    given[1, 5 : block + 5] = given[3, :block] = -torch.inf
    whole = given.to(device, dtype, copy=True)
    exact = whole.to(torch.float64, copy=True)
    target = torch.tensor([n - 1, 2, -7, block + 9], device=device)
    scales = torch.tensor([0.5, 2.0, 1.0, 1.0], dtype=wide, device=device)
    smoothing, softcap = 0.1 * smoothed, 4.0 if capped else None
    options = target, -7, smoothing, softcap
    losses = kernel.cross_entropy_(whole[:, :n], *options, scales, gradient)
    right = plain(exact[:, :n], *options, scales.double(), gradient)
    unit, stored = torch.finfo(wide).eps, torch.finfo(dtype)
    least = stored.smallest_normal * stored.eps
    for what, found, expected, relative, absolute in (
        ("losses", losses, right, 0.0, 0.0),
        ("gradients", whole, exact, stored.eps, least + 512 * unit / n),
    ):
        close = torch.isclose(found.double(), expected, relative + 256 * unit, absolute)
        if not close.all():
            return f"{close.logical_not().sum()} of {close.numel()} {what} are wrong"
    return None
