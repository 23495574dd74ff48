"""What the tests share: backends to run on, sample inputs, and the bound that sums are held to."""

import pytest
import reference
import torch

import dfa_kernels

AVAILABLE = [status for status in dfa_kernels.backends() if status.available]


@pytest.fixture(params=AVAILABLE, ids=lambda status: f"{status.name}-{status.device}")
def target(request):
    """Every backend on every device it serves here: has `.name` and `.device`."""
    return request.param


@pytest.fixture(params=[status.name for status in AVAILABLE if status.device == "cpu"])
def backend(request):
    """Every backend that serves the CPU."""
    return request.param


def assert_projected(signals, error, sizes, scales, **stream):
    """Signals equal the float64 ones within the a priori bound of a sum of n products.

    |signal - exact| <= scale * (n + 2) * u * (|e| @ |U|^T) with u the unit roundoff of the sums
    (fp32, or fp64 for fp64 errors), plus one rounding to the signal's dtype.
    """
    exact = reference.project(error.cpu(), sizes, scales, **stream)
    sums = torch.float64 if error.dtype == torch.float64 else torch.float32
    magnitudes = reference.project(error.cpu().abs(), sizes, scales, absolute=True, **stream)
    for signal, expected, magnitude in zip(signals, exact, magnitudes, strict=True):
        assert signal.shape == expected.shape
        bound = (error.shape[-1] + 2) * torch.finfo(sums).eps * magnitude
        if signal.dtype != sums:
            info = torch.finfo(signal.dtype)
            bound = bound * 1.01 + info.eps / 2 * expected.abs() + info.smallest_normal * info.eps
        difference = (signal.cpu().double() - expected).abs()
        assert (difference <= bound).all(), f"off by {(difference / bound).max():.3g} bounds"
