"""Every GPU kernel at small awkward shapes, for compute-sanitizer; the large ones for a profiler.

    compute-sanitizer --tool memcheck python tests/small_shapes.py [--large]

Imports only the package: under a sanitizer every import costs.
"""

import importlib
import sys

import torch

import dfa_kernels

# By backend, where it is decided which way a projection takes, and what decides for slabs.
CHOICES = {
    "cuda": ("cuda", "prefers_slabs", lambda *_: True),
    "triton": ("triton.projection", "_FUSED_COLUMNS", -1),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def small(backend):
    """Batches around every tile's edge, odd columns, unequal layers, all dtypes."""
    layers = [33, 7, 130, 1, 257]
    for distribution in dfa_kernels.stream.BLOCK:
        for dtype in DTYPES:
            for count, n in ((1, 1), (3, 9), (17, 129), (65, 40), (130, 10)):
                storage = torch.randn(count * n + 1, device="cuda").to(dtype)
                error = storage[1:].view(count, n)  # aligned to one element only
                dfa_kernels.project(error, layers, distribution=distribution, backend=backend)
            dfa_kernels.feedback_matrix(
                37,
                131,
                row_offset=5,
                column_offset=3,
                distribution=distribution,
                dtype=dtype,
                device="cuda",
                backend=backend,
            )
    many = [1 + i % 40 for i in range(1100)]
    dfa_kernels.project(torch.randn(5, 10, device="cuda"), many, backend=backend)
    by_slabs(backend)
    # So many entries that an fp32 error's terms are made beforehand.
    dfa_kernels.project(torch.randn(3, 1001, device="cuda"), [2**25 // 1000], backend=backend)


def by_slabs(backend):
    """The other way of 16-bit products, which of itself only a long error takes."""
    ways = importlib.import_module(f"dfa_kernels.backends.{CHOICES[backend][0]}")
    choice, slabs_always = CHOICES[backend][1:]
    before = getattr(ways, choice)
    setattr(ways, choice, slabs_always)
    for distribution in dfa_kernels.stream.BLOCK:
        for dtype in DTYPES[:3]:
            error = torch.randn(70, 37, device="cuda").to(dtype)
            for sizes in ([130], [33, 7, 129]):
                dfa_kernels.project(error, sizes, distribution=distribution, backend=backend)
    setattr(ways, choice, before)


def large(backend):
    """The fused kernel where generation costs most, in bf16 and fp32, and blocks of U for slabs."""
    for dtype in (torch.bfloat16, torch.float32):
        error = torch.randn(128, 1000, device="cuda", dtype=dtype)
        for distribution in ("normal", "rademacher"):
            dfa_kernels.project(error, [200_000], distribution=distribution, backend=backend)
    dfa_kernels.feedback_matrix(2**15, 1000, dtype=torch.bfloat16, device="cuda", backend=backend)


if __name__ == "__main__":
    for name in CHOICES:  # one that is not available says why
        (large if "--large" in sys.argv else small)(name)
        torch.cuda.synchronize()
