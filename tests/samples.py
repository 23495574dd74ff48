"""Errors, layers and arguments that many tests use."""

import math

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random_error(*shape, dtype=torch.float32, seed=0, device="cpu"):
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def layer_scales(sizes, n):
    """The scales of `normalization="layer"` for an error of n columns."""
    return [1 / math.sqrt(size * n) for size in sizes]


def project_samples(device="cpu", distribution=None):
    """Arguments of the operators project.<backend>, without a dtype and with one.

    Of several distributions, or all of one.
    """
    samples = [
        # error's shape and dtype, row_offsets, sizes, distribution, dtype
        ((3, 10), torch.float32, [0], [7], "normal", None),
        ((1, 9), torch.float64, [0, 0, 5], [7, 30, 11], "normal", None),
        ((4, 129), torch.bfloat16, [2**63 - 40, 3], [40, 8], "uniform", torch.float32),
        ((2, 1), torch.float16, [2**32 - 2], [5], "rademacher", None),
        ((0, 10), torch.float32, [0, 0], [4, 2], "normal", torch.bfloat16),
    ]
    generator = torch.Generator().manual_seed(0)
    for shape, error_dtype, row_offsets, sizes, given, dtype in samples:
        error = torch.randn(shape, generator=generator).to(device, error_dtype)
        scales = [0.5 / (1 + i) for i in range(len(sizes))]
        yield error, row_offsets, sizes, scales, -3, 5, distribution or given, dtype


def feedback_matrix_samples(device="cpu", distribution=None):
    """Arguments of the operators feedback_matrix.<backend>, as for `project_samples`."""
    device = torch.device(device)
    yield 5, 9, 0, 0, 0, distribution or "normal", torch.float32, device
    last = distribution or "rademacher"
    yield 3, 130, -1, 2**63 - 3, 2**34 - 130, last, torch.bfloat16, device
    yield 0, 4, 7, 1, 1, distribution or "uniform", torch.float64, device
