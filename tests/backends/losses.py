"""What cross entropy with its gradient in place is tested on, and against."""

import torch
from torch.nn.functional import cross_entropy

from dfa_kernels.stream import arithmetic
from tests.conftest import EPSILON
from tests.samples import random_error

INF, NAN = torch.inf, torch.nan
# Logits that are not finite, or far apart.
STRANGE = [[INF, 0, 1], [NAN, 0, 1], [-INF] * 3, [-INF, 1, 2], [1e30, -1e30, 0], [2, -INF, -INF]]


def exact(logits, target, scale, *, label_smoothing=0.0, softcap=None, ignore_index=-100):
    """Losses and scaled gradients by torch, in fp64."""
    x = logits.double().requires_grad_()
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    losses = cross_entropy(z, target, reduction="none", **options)
    (gradient,) = torch.autograd.grad((losses * scale).sum(), x)
    return losses.detach(), gradient


def assert_right(found, logits, before, target, scale, **options):
    """Losses and gradients are rounded ones of a few operations in fp32 (fp64 for fp64)."""
    losses, gradient = exact(before, target, scale, **options)
    unit, stored = EPSILON[arithmetic(logits.dtype)], torch.finfo(logits.dtype)
    assert found.dtype == arithmetic(logits.dtype)
    slack = unit * (256 if logits.dtype == torch.float64 else 16)  # torch's own in fp64, too
    torch.testing.assert_close(found.double(), losses, rtol=slack, atol=slack, equal_nan=True)
    close = {"rtol": EPSILON[logits.dtype] + 4 * slack, "atol": slack}
    close["atol"] += stored.smallest_normal * stored.eps
    torch.testing.assert_close(logits.double(), gradient, **close, equal_nan=True)


def samples(dtype, n=301, device="cpu"):
    """Logits with a stride and masked words, targets, some ignored, and a scale for each row."""
    logits = 3 * random_error(6, n + 4, device=device)
    if n > 8:
        logits[1, 3:] = -INF
        logits[2, : n // 2] = -INF
    target = torch.tensor([n - 1, min(2, n - 1), n - 1, -100, 0, n // 2], device=device)
    scale = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 1e-3], device=device)
    return logits.to(dtype), target, scale
