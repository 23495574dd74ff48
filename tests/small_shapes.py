"""Every GPU kernel at small awkward shapes, for compute-sanitizer; the large ones for a profiler.

    compute-sanitizer --tool memcheck python tests/small_shapes.py [--large]

Imports only the package: under a sanitizer every import costs.
"""

import sys

import torch

import dfa_kernels

BACKENDS = ("cuda", "triton")
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
    dfa_kernels.project(torch.randn(3000, 100, device="cuda"), layers, backend=backend)
    # So many entries that an fp32 error's terms are made beforehand.
    dfa_kernels.project(torch.randn(3, 1001, device="cuda"), [2**25 // 1000], backend=backend)


def large(backend):
    """The fused kernel where generation costs most, in bf16 and fp32."""
    for dtype in (torch.bfloat16, torch.float32):
        error = torch.randn(128, 1000, device="cuda", dtype=dtype)
        for distribution in ("normal", "rademacher"):
            dfa_kernels.project(error, [200_000], distribution=distribution, backend=backend)


for name in BACKENDS:  # one that is not available says why
    (large if "--large" in sys.argv else small)(name)
    torch.cuda.synchronize()
