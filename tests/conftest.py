"""Shared by the tests: the backends to run on, fixtures, and the error bound of a projection."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests import reference

# Without a GPU the Triton kernels are tested in Triton's interpreter, which is selected when Triton
# is imported. It is too slow to be a target.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import dfa_kernels
from dfa_kernels.backends import cpp
from dfa_kernels.backends.registry import BACKENDS

# Unit roundoff: the largest relative error of one rounding.
EPSILON = {dtype: torch.finfo(dtype).eps / 2 for dtype in dfa_kernels.checks.DTYPES}
AVAILABLE = [
    status
    for status in dfa_kernels.backends()
    if status.available and (status.name, status.device) != ("triton", "cpu")
]


COMPILER = shutil.which("c++")


def needs(what, is_here):
    """Skip what this machine cannot test; fail if DFA_KERNELS_SKIP_NOTHING is set."""
    if not is_here:
        assert "DFA_KERNELS_SKIP_NOTHING" not in os.environ, f"{what} must be here"
        pytest.skip(f"needs {what}", allow_module_level=True)


def marked(value, status):
    """A parameter marked with its backend and device, so that `pytest -m gpu` selects it."""
    marks = [pytest.mark.gpu] if status.device == "cuda" else []
    marks += [pytest.mark.triton] if status.name == "triton" else []
    return pytest.param(value, marks=marks)


@pytest.fixture(
    params=[marked(status, status) for status in AVAILABLE],
    ids=lambda status: f"{status.name}-{status.device}",
)
def target(request):
    """Every backend on every device it serves here: has `.name` and `.device`."""
    return request.param


ON_CPU = [status.name for status in AVAILABLE if status.device == "cpu"]
# For heavy tests: the definition (the torch backend) runs only in the battery.
definition_is_slow = pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=[pytest.mark.battery] * (name == "torch")) for name in ON_CPU],
    indirect=True,
)


@pytest.fixture(params=ON_CPU)
def backend(request):
    """Every backend that serves the CPU."""
    return request.param


STRUCTURED = [status for status in AVAILABLE if "hadamard" in BACKENDS[status.name].DISTRIBUTIONS]


@pytest.fixture(
    params=[marked(status, status) for status in STRUCTURED],
    ids=lambda status: f"{status.name}-{status.device}",
)
def structured(request):
    """As `target`, of the backends that make the structured distribution."""
    return request.param


@pytest.fixture(
    params=[marked(status.name, status) for status in AVAILABLE if status.device == "cuda"]
)
def gpu_backend(request):
    """Every backend that serves the GPU; none where there is no GPU."""
    return request.param


def run(program, **variables):
    """What a program prints, in a process of its own with these environment variables too."""
    environment = {**os.environ, **variables}
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, timeout=300
    ).stdout


# Runs in its own process, because resident memory is measured per process: for each request, in a
# child that has imported torch already.
MEMORY = """
import json, os, sys, torch, dfa_kernels
def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
def extra_bytes(batch, layer, n, distribution, backend):
    error = torch.randn(batch, n)
    options = {"distribution": distribution, "backend": backend}
    dfa_kernels.project(error[:1, :1], [8], **options)
    before = status("VmRSS")
    (signal,) = dfa_kernels.project(error, [layer], **options)
    return status("VmHWM") - before - signal.nbytes
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        print(extra_bytes(*json.loads(line)), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="session")
def extra_bytes():
    """Measures what one projection takes beyond its signal, at its peak."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", MEMORY], **pipes) as process:

        def of(backend, layer, n, distribution="normal", batch=4):
            request = json.dumps([batch, layer, n, distribution, backend])
            print(request, file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield of
    assert process.returncode == 0


@pytest.fixture
def resources(record_property):
    """Records what compiled kernels use, for the summary of a verbose or skip-nothing run."""
    return functools.partial(record_property, "resources")


def pytest_terminal_summary(terminalreporter, config):
    reports = terminalreporter.stats.get("passed", [])
    lines = [line for one in reports for name, line in one.user_properties if name == "resources"]
    if lines and (config.option.verbose > 0 or "DFA_KERNELS_SKIP_NOTHING" in os.environ):
        terminalreporter.section("what the GPU kernels compile to")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is NaN: an element that a kernel leaves unwritten fails its comparison."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by the next line
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    if cpp.unavailable("cpu") is None:  # whose signals are not from torch.empty
        torch.ops.dfa_kernels.fill_signals(True)
    yield
    torch.use_deterministic_algorithms(False)
    if cpp.unavailable("cpu") is None:
        torch.ops.dfa_kernels.fill_signals(False)


@pytest.fixture(autouse=True)
def seeded():
    """Unseeded random numbers are the same in every run, process and order of tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For small tensors: on shared cores, waiting for a second thread would cost the most."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def precision():
    """Sets the precision of fp32 products and restores it after the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def assert_projected(signals, error, sizes, scales, *, dtype=None, **where):
    """Signals equal the float64 ones within the a priori bound of a sum of n products.

    |signal - exact| <= (n + 3) u |scale| (|e| @ |U|^T), with u the unit roundoff of the sums (fp64
    for fp64 errors, else fp32), plus one rounding to the signal's dtype and its underflow. For fp32
    sums on a GPU u counts twice, because the matrix units' adders truncate (Fasi, Higham, Mikaitis,
    Pranesh 2021, "Numerical behavior of NVIDIA tensor cores"), and six times for an fp32 error,
    which is summed as three terms.
    """
    dtype = dtype or error.dtype
    error = error.cpu()
    exact, magnitudes = reference.signals(error, sizes, scales, **where)
    sums = torch.float64 if error.dtype == torch.float64 else torch.float32
    unit = EPSILON[sums]
    if signals[0].is_cuda and sums == torch.float32:
        unit *= 6 if error.dtype == torch.float32 else 2
    underflow = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert len(signals) == len(sizes)
    for signal, expected, magnitude in zip(signals, exact, magnitudes, strict=True):
        assert signal.shape == expected.shape
        assert signal.dtype == dtype
        assert signal.is_contiguous()
        bound = (error.shape[-1] + 3) * unit * magnitude
        bound += EPSILON[dtype] * expected.abs() + underflow
        difference = (signal.cpu().double() - expected).abs()
        assert (difference <= bound).all(), f"off by {(difference / bound).max():.3g} bounds"
