"""What only a GPU shows: streams, graphs, launches, memory, timed races, and agreement with cuRAND.

The tests of values also run on a GPU, through the fixture `target`.
"""

import dataclasses
import importlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import DeviceType, ProfilerActivity, profile

from benchmarks.harness import race
from benchmarks.harness.shapes import STORED
from dfa_kernels import attach, cross_entropy, feedback_matrix, hadamard, project, stream
from dfa_kernels.backends import tensor_cores
from dfa_kernels.backends.registry import BACKENDS
from dfa_kernels.layers import Layers
from tests import reference
from tests.benchmarks.races import ONCE, SMALL, machine
from tests.conftest import assert_projected

SIZES = [700, 33, 700, 1, 129]
# Batch and columns of a 16-bit error, and sizes of layers, that are projected by slabs.
BY_SLABS = (4096, 300, [70_000])
FUSED = ("cuda", "triton")  # the backends that make entries in registers
# Kernels that may run before the projection's: for the error's terms and a long table of layers.
BEFORE = ("prepare", "upload", "split_kernel", "addresses_kernel")


@pytest.fixture
def unpoisoned(poison):
    """Leaves fresh memory as it is: no fill kernels, no deterministic substitutes."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["normal", *stream.STRUCTURED])
def distribution(request, gpu_backend):
    """Dense feedback, and structured of the backends that make it."""
    if request.param not in BACKENDS[gpu_backend].DISTRIBUTIONS:
        pytest.skip("the backend does not make it")
    return request.param


@pytest.fixture
def much_memory():
    """Frees the memory afterwards, for other test processes on the same GPU."""
    yield
    torch.cuda.empty_cache()


def random_error(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def kernels_of(call):
    """The names of the kernels and copies that a call runs on the GPU."""
    call()
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as recorded:
        call()
        torch.cuda.synchronize()
    return [event.name for event in recorded.events() if event.device_type == DeviceType.CUDA]


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [[800], SIZES, [1 + 37 * i % 4001 for i in range(1100)]])
@pytest.mark.parametrize("count", [16, 128])
def test_all_layers_are_one_launch(gpu_backend, distribution, count, dtype, sizes):
    """A 16-bit error is read where it lies, unless warpgroups multiply, which want it permuted."""
    if gpu_backend not in FUSED:
        pytest.skip("it is not a fused backend")
    error = random_error(count, 1000, dtype=dtype)
    options = {"backend": gpu_backend, "distribution": distribution}
    kernels = kernels_of(lambda: project(error, sizes, **options))
    projections = [name for name in kernels if not any(part in name for part in BEFORE)]
    assert len(projections) == 1, kernels
    if dtype != torch.float32 and len(sizes) < 50 and count < 64:
        assert kernels == projections
    assert len(kernels) <= 2 + len(sizes) / 32


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("count", "n", "sizes"), [(3, 100, SIZES), BY_SLABS])
def test_nothing_waits_for_the_gpu(gpu_backend, distribution, dtype, count, n, sizes):
    error = random_error(count, n, dtype=dtype)
    options = {"backend": gpu_backend, "distribution": distribution}
    project(error, sizes, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        project(error, sizes, **options)
        project(error, [123, 45], seed=2, **options)  # layers not seen before
        feedback_matrix(10, 10, device="cuda", **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("count", "n", "sizes"),
    [
        (5, 77, SIZES),
        (5, 77, [1 + i % 50 for i in range(1100)]),
        (4096, 77, SIZES),
        BY_SLABS,
        (5, 1500, SIZES),  # two input blocks of structured feedback
    ],
)
def test_graph_replays_read_the_new_error(gpu_backend, distribution, dtype, count, n, sizes):
    error = random_error(count, n, dtype=dtype)
    options = {"backend": gpu_backend, "distribution": distribution}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and cache before the capture
        project(error, sizes, seed=3, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = project(error, sizes, seed=3, **options)
    project(error, [8, 9], seed=4, **options)  # other calls come between
    for seed in (1, 2):
        error.copy_(random_error(count, n, dtype=dtype, seed=seed))
        graph.replay()
        expected = project(error, sizes, seed=3, **options)
        assert all(map(torch.equal, captured, expected))


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_first_call_inside_a_capture_says_what_to_do(gpu_backend, distribution, dtype):
    """Only "triton" must compile or copy first; "cuda" and "torch" may begin inside."""
    error = random_error(5, 61, dtype=dtype)
    if gpu_backend != "triton":
        pytest.skip("it needs no first call")
    with (
        pytest.raises(RuntimeError, match=r"project: call it once .* before capturing a CUDA"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        project(error, [61, 7], backend=gpu_backend, distribution=distribution)


FIRST_CALL = """
import sys
import torch
from dfa_kernels import feedback_matrix, project
backend, dtype = sys.argv[1], getattr(torch, sys.argv[2])
options = {"distribution": sys.argv[4]}
error = torch.ones(5, 61, dtype=dtype, device="cuda")
if sys.argv[3] == "warm":
    torch.mm(error, error.T)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    signals = project(error, [61, 7], backend=backend, **options)
    matrix = feedback_matrix(9, 33, dtype=dtype, device="cuda", backend=backend, **options)
graph.replay()
torch.cuda.synchronize()
expected = project(error.cpu(), [61, 7], backend="torch", **options)
for found, exact in zip(signals, expected):
    torch.testing.assert_close(found.cpu(), exact)
exact = feedback_matrix(9, 33, dtype=dtype, device="cpu", backend="torch", **options)
assert torch.equal(matrix.cpu(), exact)
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_first_call_of_a_process_may_be_captured(gpu_backend, distribution, dtype):
    """In a new process: what earlier calls loaded, compiled or kept would hide a failure.

    cuBLAS, which multiplies for all but the fused kernels, begins with the first product that a
    process computes, and that product cannot be captured, whoever asks for it.
    """
    by_cublas = gpu_backend == "torch" or dtype == "float64"
    before = "warm" if by_cublas else "cold"
    command = [sys.executable, "-c", FIRST_CALL, gpu_backend, dtype, before, distribution]
    ended = subprocess.run(command, capture_output=True, text=True)
    if gpu_backend == "triton":
        assert "before capturing a CUDA" in ended.stderr
    else:
        assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch captures one first
@pytest.mark.parametrize("number", [3, 6])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_graphs_that_torch_compile_captures(gpu_backend, distribution, number, requires_grad):
    """More than four signals need a table of addresses."""
    torch.compiler.reset()
    sizes = [50 + i for i in range(number)]

    def step(error):
        options = {"backend": gpu_backend, "distribution": distribution}
        return [2 * signal for signal in project(3 * error, sizes, **options)]

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):  # warms up, captures, replays
        error = random_error(8, 40, dtype=torch.float32, seed=seed).requires_grad_(requires_grad)
        found = compiled(error)
        torch.testing.assert_close(found, step(error))
        if requires_grad:
            sum(signal.sum() for signal in found).backward()
            expected = torch.autograd.grad(sum(signal.sum() for signal in step(error)), error)
            torch.testing.assert_close(error.grad, expected[0])


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("count", "n", "sizes"), [(5, 50, SIZES), BY_SLABS])
def test_work_goes_to_the_current_stream(gpu_backend, distribution, dtype, count, n, sizes):
    """On any other stream, the projection would read the error before the sleep lets it be copied.

    If the host waited for the projection, the stream is idle on return. It may also be idle
    because a busy host outlasted the sleep; a longer sleep tells the two apart.
    """
    fresh = random_error(count, n, dtype=dtype)
    options = {"backend": gpu_backend, "distribution": distribution}
    # Compile first: that would outlast the sleep.
    expected = project(fresh, sizes, **options)
    expected_matrix = feedback_matrix(50, 50, device="cuda", **options)
    for cycles in (400_000_000, 6_000_000_000):  # about 0.2 s and 3 s
        stale = torch.full_like(fresh, torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(cycles)
            stale.copy_(fresh)
            found = project(stale, sizes, **options)
            matrix = feedback_matrix(50, 50, device="cuda", **options)
            held_back = not torch.cuda.current_stream().query()
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))
        assert torch.equal(matrix, expected_matrix)
        if held_back:
            return
    pytest.fail("the host waited for the stream")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_goes_to_the_errors_device(gpu_backend, distribution):
    error = random_error(5, 50).to("cuda:1").requires_grad_()
    options = {"backend": gpu_backend, "distribution": distribution}
    signals = project(error, SIZES, **options)
    sum(signal.sum() for signal in signals).backward()
    assert torch.cuda.current_device() == 0
    assert all(signal.device == error.device for signal in signals)
    there = error.detach().to("cuda:0").requires_grad_()
    expected = project(there, SIZES, **options)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(signals, expected, strict=True))
    sum(signal.sum() for signal in expected).backward()
    assert torch.equal(error.grad.cpu(), there.grad.cpu())
    matrix = feedback_matrix(9, 50, device="cuda:1", **options)
    options["backend"] = "torch"
    assert torch.equal(matrix.cpu(), feedback_matrix(9, 50, device="cpu", **options))


@pytest.mark.usefixtures("unpoisoned")
def test_a_race_of_graph_replays(gpu_backend):
    """Timed as the benchmarks do, beside stored matrices in TF32: all are correct and get times."""
    case = dataclasses.replace(SMALL, device_type="cuda", precision="high", graph=True)
    roofs = dataclasses.replace(
        machine(),
        device_type="cuda",
        multiply=dict.fromkeys(("fp32", "tf32", "bf16"), 1e12),
        generation={gpu_backend: dict.fromkeys(stream.DENSE, 1e9)},
    )
    names = [gpu_backend, *STORED]
    outcome = race.Race(ONCE, {0: roofs}).run(case, names)
    for name in names:
        assert isinstance(outcome[name], race.Result), outcome[name]
        assert len(outcome[name].times) == 2
        assert all(time > 0 for time in outcome[name].times)
        assert outcome[name].peak_bytes is None  # a replay allocates nothing
    assert outcome[gpu_backend].stored_bytes == 0


@pytest.mark.usefixtures("unpoisoned")
def test_a_stream_waits_for_what_another_has_not_yet_copied(gpu_backend):
    """Layers are first seen on a stream that is held back, then used on one that is not."""
    error = random_error(5, 50)
    project(error, [31, 17], backend=gpu_backend)  # compiles
    torch.cuda.synchronize()
    slow, quick = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(slow):
        torch.cuda._sleep(400_000_000)
        project(error, [33, 15], backend=gpu_backend)
    with torch.cuda.stream(quick):
        found = project(error, [33, 15], backend=gpu_backend)
    torch.cuda.synchronize()
    assert_projected(found, error, [33, 15], [(size * 50) ** -0.5 for size in (33, 15)])


@pytest.mark.parametrize("columns", [40, 41])
def test_the_error_may_begin_anywhere(gpu_backend, distribution, columns):
    """Neither the address nor the rows need any alignment.

    The best-aligned error comes first: the kernel compiled for it must not serve the others.
    """
    scales = [(size * columns) ** -0.5 for size in SIZES]
    for offset in (0, 1, 3, 8):
        storage = random_error(20 * columns + offset)
        error = storage[offset:].view(20, columns)
        options = {"backend": gpu_backend, "distribution": distribution}
        signals = project(error, SIZES, **options)
        assert_projected(signals, error, SIZES, scales, distribution=distribution)


@pytest.mark.parametrize("count", [16, 64, 100])
def test_an_fp32_error_loses_no_more_than_in_an_fp32_product(gpu_backend, count):
    """Long sums left to the tensor cores alone would lose tens of times more."""
    rows, n = 2000, 8000
    error = random_error(count, n, dtype=torch.float32)
    (signal,) = project(error, [rows], normalization=1.0, backend=gpu_backend)
    u = feedback_matrix(rows, n, device="cuda", backend=gpu_backend)
    exact = error.double() @ u.double().T
    lost, usual = ((found.double() - exact).square().mean() for found in (signal, error @ u.T))
    assert lost <= 3**2 * usual


@pytest.mark.parametrize(
    ("dtype", "distribution", "precision", "n", "sizes"),
    [
        (torch.bfloat16, "normal", "highest", 1000, [2500, 1500, 700]),  # sums in fp32
        (torch.bfloat16, "uniform", "highest", 1000, [3000]),  # written in place
        (torch.float32, "normal", "high", 8000, [1000]),  # two terms
        (torch.bfloat16, "normal", "highest", 50_000, [300]),  # too many columns to write in place
    ],
)
def test_values_by_slabs(gpu_backend, dtype, distribution, precision, n, sizes, monkeypatch):
    """Against float64, even where another way would be quicker. In several slabs."""
    monkeypatch.setattr(tensor_cores, "WORKSPACE_BYTES", 2**24)
    backend = importlib.import_module(f"dfa_kernels.backends.{gpu_backend}")
    scales = [(size * n) ** -0.5 for size in sizes]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    error = random_error(4096, n, dtype=dtype)
    by_slabs = backend.project
    layers = Layers.of([0] * len(sizes), sizes, scales)
    try:
        if gpu_backend in FUSED:
            by_slabs = next(
                way for name, way in backend.ways(error, distribution) if "slabs" in name
            )
        signals = by_slabs(error, layers, stream.Stream(0, 0, distribution), dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    rows = slice(0, 4096, 511)
    some = [signal[rows].contiguous() for signal in signals]
    if precision == "highest":
        assert_projected(some, error[rows], sizes, scales, distribution=distribution)
    else:  # two terms leave out 2^-16; TF32, which "torch" is left to, 2^-12 of each factor
        relative = 2**-15 if gpu_backend in FUSED else 2**-11
        expected = reference.project(error[rows].cpu(), sizes, scales)
        for signal, exact in zip(some, expected, strict=True):
            assert (signal.cpu().double() - exact).norm() <= relative * exact.norm()


@pytest.mark.usefixtures("unpoisoned")
def test_failed_allocations_are_torchs_own_errors(gpu_backend):
    error = random_error(2**12, 8, dtype=torch.float32)  # has three terms: always fused
    with pytest.raises(torch.OutOfMemoryError):
        project(error, [2**28] * 2 + [2**28 - 1], backend=gpu_backend)
    if gpu_backend in FUSED:
        with pytest.raises(torch.OutOfMemoryError):
            feedback_matrix(2**36, 2**10, device="cuda", backend=gpu_backend)
    project(error, [8], backend=gpu_backend)  # the failures leave nothing behind


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("count", [32, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extra_memory_is_bounded(gpu_backend, distribution, count, dtype):
    """Only the workspace and the error's terms, beside the signals. The matrix would take 1 GB."""
    error = random_error(count, 5000, dtype=dtype)
    options = {"backend": gpu_backend, "distribution": distribution}
    project(error[:, :8], [8], **options)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (signal,) = project(error, [100_000], **options)
    extra = torch.cuda.max_memory_allocated() - before - signal.nbytes
    if distribution == "hadamard" and gpu_backend in FUSED:  # all transformed would be 42 MB
        assert extra <= 2**25 + 2**22
        return
    error_copies = 2 * 4 * error.numel()
    assert extra <= 2 * tensor_cores.WORKSPACE_BYTES + error_copies


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [700, 4500])
def test_transposes_of_structured_feedback(gpu_backend, columns, dtype):
    """Its bits, in a graph that is replayed too. Nothing waits, and the workspace is bounded."""
    if "hadamard" not in BACKENDS[gpu_backend].DISTRIBUTIONS:
        pytest.skip("the backend does not make it")
    layers = Layers.of([900, 10_000, 900, 5, 2**40], [8000, 2048, 40, 77, 300], [1.0, 0.3, 2, 1, 3])
    where = (layers.row_offsets, layers.scales, 3, 5, "hadamard", columns, dtype)

    def transpose(signals):
        return torch.ops.dfa_kernels.project_adjoint(signals, *where, gpu_backend)

    def signals_of(seed):
        return [random_error(9, size, dtype=dtype, seed=seed) for size in layers.sizes]

    signals = signals_of(0)
    transpose(signals)
    torch.cuda.set_sync_debug_mode("error")
    try:
        transpose(signals)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = transpose(signals)
    for seed in (1, 2):
        for one, other in zip(signals, signals_of(seed), strict=True):
            one.copy_(other)
        graph.replay()
        assert torch.equal(captured, transpose(signals))
        given = [one.cpu() for one in signals]
        definition = hadamard.project_adjoint(given, layers, stream.Stream(*where[2:5]), *where[5:])
        assert torch.equal(captured.cpu(), definition)


@pytest.mark.slow
@pytest.mark.usefixtures("unpoisoned", "much_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_than_two_to_the_31_elements(gpu_backend, dtype):
    """VGG-16's largest layer for 1024 images: 3.3e9 elements."""
    if gpu_backend not in FUSED:
        pytest.skip("minutes in plain PyTorch")
    count, size, n = 1024, 3_211_264, 40
    error = random_error(count, n, dtype=dtype)
    (signal,) = project(error, [size], normalization=1.0, backend=gpu_backend)
    for row_offset in (0, 2**31 // count - 5, size - 300):
        part = signal[:, row_offset : row_offset + 300].contiguous()
        assert_projected([part], error, [300], [1.0], row_offsets=[row_offset])
    rows = torch.tensor([0, 668, 669, count - 1])  # 2^31 elements end within row 668
    u = feedback_matrix(size, n, dtype=torch.float64, device="cuda", backend=gpu_backend)
    expected = error[rows].double() @ u.T
    close = {"rtol": 2**-7, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(signal[rows].double(), expected, **close)


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("columns", [1000, 1003])
def test_a_matrix_of_more_than_two_to_the_31_entries(gpu_backend, columns):
    if gpu_backend not in FUSED:
        pytest.skip("minutes in plain PyTorch")
    rows, dtype = 2**31 // 1000 + 4096, torch.bfloat16
    matrix = feedback_matrix(rows, columns, dtype=dtype, device="cuda", backend=gpu_backend)
    for row_offset in (0, 2**31 // columns - 2, rows - 8):
        expected = feedback_matrix(8, columns, row_offset=row_offset, dtype=dtype, backend="torch")
        assert torch.equal(matrix[row_offset : row_offset + 8].cpu(), expected)


@pytest.fixture
def by_kernel(gpu_backend, monkeypatch):
    """Cross entropy by the Triton kernel, not by what takes its place."""
    if gpu_backend != "triton":
        pytest.skip("it has no kernel for it")
    monkeypatch.setattr(cross_entropy, "_checked", {})

    def call(logits, target, scale=1.0, label_smoothing=0.0, softcap=None):
        options = (label_smoothing, softcap, cross_entropy.scales_of(scale, logits), True)
        return cross_entropy.by_kernel(logits, target, -100, *options)

    return call


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_entropy_is_one_launch_and_waits_for_nothing(by_kernel, dtype):
    logits, target = random_error(64, 50_264, dtype=dtype), torch.arange(64, device="cuda")
    scale = torch.tensor(0.5, device="cuda")
    assert kernels_of(lambda: by_kernel(logits, target, scale)) == ["cross_entropy_kernel"]
    other = random_error(7, 130_000, dtype=dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert by_kernel(other, target[3:10], scale) is not None
        cross_entropy.cross_entropy_(other, target[:7], scale=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cross_entropy_in_a_graph(by_kernel):
    """A check would wait, so before it a graph holds what takes the kernel's place."""
    given, target = random_error(5, 1000), torch.tensor([1, 2, -100, 3, 999], device="cuda")
    captured = given.clone()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert by_kernel(captured, target) is None
    expected = given.clone()
    losses = by_kernel(expected, target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = by_kernel(captured, target)
    graph.replay()
    assert torch.equal(found, losses)
    assert torch.equal(captured, expected)


@pytest.mark.usefixtures("unpoisoned", "much_memory")
@pytest.mark.parametrize("n", [50_257, 50_264])  # rows begin on 2 or on 16 bytes
def test_cross_entropy_of_more_than_two_to_the_31_logits(by_kernel, n):
    count = 2**31 // n + 8
    logits = torch.empty(count, n, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.randint(n, (count,), device="cuda")
    ends = slice(0, count, count - 1)  # the first row and the last
    expected, ones = logits[ends].clone(), torch.ones(2, device="cuda")
    losses = cross_entropy.plain(expected, target[ends], -100, 0.1, 20.0, ones, True)
    found = by_kernel(logits, target, 1.0, 0.1, 20.0)
    torch.testing.assert_close(found[ends], losses)
    torch.testing.assert_close(logits[ends], expected)


@pytest.mark.usefixtures("unpoisoned", "much_memory")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_without_whole_logits_waits_for_nothing(gpu_backend, monkeypatch):
    monkeypatch.setenv("DFA_KERNELS_LOGITS_BYTES", str(2**23))
    tokens, words = 4096, 8000
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, words)).cuda()
    x, target = torch.randn(tokens, 64, device="cuda"), torch.arange(tokens, device="cuda")

    def step():
        model.zero_grad()
        F.cross_entropy(model(x), target).backward()
        return [parameter.grad for parameter in model.parameters()]

    options = {"seed": 1, "backend": gpu_backend}
    handle = attach(model, ["1"], head="2", **options)
    step()  # the first one checks the kernel of cross entropy
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < tokens * words * 4 / 2
    handle.detach()
    attach(model, ["1"], "2", **options)
    for one, other in zip(found, step(), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345])
@pytest.mark.parametrize("block", [0, 1, 1000])
def test_blocks_are_those_of_curand(gpu_backend, seed, block):
    """torch's CUDA generator is cuRAND's Philox4x32-10; its thread t draws from subsequence t.

    With `random_` over all 64-bit integers, each draw is one block: element t holds words 0 and 1
    of row t's block, and element threads + t holds words 2 and 3.
    """
    device = torch.cuda.get_device_properties("cuda")
    threads = device.multi_processor_count * (device.max_threads_per_multi_processor // 256) * 256
    generator = torch.Generator("cuda").manual_seed(seed)
    generator.set_offset(4 * block)
    drawn = torch.empty(2, threads, dtype=torch.int64, device="cuda")
    drawn.random_(-(2**63), None, generator=generator)
    words = [(drawn[i // 2] >> (0 if i % 2 else 32)) & 0xFFFFFFFF for i in range(4)]
    signs = feedback_matrix(
        threads,
        128,
        seed=seed,
        column_offset=128 * block,
        distribution="rademacher",
        device="cuda",
        backend=gpu_backend,
    )
    bits = (
        (signs < 0).long().view(threads, 4, 16, 2)
    )  # column 2i is bit i, column 2i + 1 bit 16 + i
    places = torch.arange(16, device="cuda")[:, None] + torch.tensor([0, 16], device="cuda")
    found = (bits << places).sum((2, 3))
    assert torch.equal(found, torch.stack(words, dim=1))
