"""Memory: the workspace is bounded, and outputs may be larger than 2^31 elements."""

import subprocess
import sys

import reference
import torch

from dfa_kernels import project
from dfa_kernels.backends import slabs

# In a process of its own, because resident memory has no owner.
PROGRAM = """
import sys, torch, dfa_kernels
layer, backend = int(sys.argv[1]), sys.argv[2]
error = torch.randn(4, 10)
dfa_kernels.project(error, [64], backend=backend)
def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
before = status("VmRSS")
(signal,) = dfa_kernels.project(error, [layer], backend=backend)
print(status("VmHWM") - before - signal.nbytes)
"""


def extra_bytes(layer, backend):
    command = [sys.executable, "-c", PROGRAM, str(layer), backend]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_extra_memory_is_bounded_and_does_not_grow_with_the_layer(backend):
    small, large = extra_bytes(200_000, backend), extra_bytes(3_211_264, backend)
    assert small <= slabs.WORKSPACE_BYTES
    assert large <= slabs.WORKSPACE_BYTES
    assert large - small <= 16 * 2**20  # the stored matrix would have added 120 MB


def test_more_than_two_to_the_31_elements(backend):
    count, size = 4097, 2**19
    error = torch.linspace(-2, 2, count, dtype=torch.bfloat16)[:, None]
    (signal,) = project(error, [size], normalization=1.0, backend=backend)
    assert signal.numel() > 2**31
    u = reference.matrix(size, 1).flatten()
    for row in (0, 1, 2048, count - 1):
        expected = (error[row].double() * u).to(torch.bfloat16)
        torch.testing.assert_close(signal[row], expected)
    torch.testing.assert_close(signal[:, -1], (error[:, 0].double() * u[-1]).to(torch.bfloat16))
