"""Structured feedback by the "cpp" kernels, on each instruction set: the definition's bits."""

import itertools
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dfa_kernels import hadamard
from dfa_kernels.backends import cpp, slabs
from dfa_kernels.layers import Layers
from dfa_kernels.stream import Stream
from tests import ROOT
from tests.backends.test_cpp_kernels import available, cpu_isa
from tests.conftest import COMPILER, needs
from tests.samples import DTYPES

needs("the compiled extension", cpp.unavailable("cpu") is None)

PLACES = list(itertools.product(available(), (1, 3)))


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0]}-{place[1]}")
def place(request):
    """Each instruction set, in one thread and in several."""
    isa, threads = request.param
    before = torch.get_num_threads()
    cpu_isa(isa)
    torch.set_num_threads(threads)
    yield request.param
    torch.set_num_threads(before)
    cpu_isa("")


def project(error, layers, stream, dtype):
    return torch.ops.dfa_kernels.project.cpp(error, *layers, *stream, dtype)


def adjoint(signals, layers, stream, columns, dtype):
    row_offsets, _, scales = layers
    where = (row_offsets, scales, *stream, columns, dtype)
    return torch.ops.dfa_kernels.structured_adjoint.cpp(signals, *where)


def assert_equal(found, expected):
    """As numbers: zeros of either sign are equal, and NaN is NaN."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def cases(count):
    """Errors, layers and streams of many shapes, the same in every run."""
    choose = random.Random(0)
    for _ in range(count):
        columns = choose.choice([1, 10, 1000, 1023, 1024, 1025, 2500])
        first = choose.choice([0, 7, 1020, 2**32 - 600, 2**63 - 9000])
        size = choose.choice([1, 2, 5])
        layers = Layers.of(
            [first + choose.choice([0, 1, 1000, 1024, 5000]) for _ in range(size)],
            [choose.choice([1, 5, 600, 1024, 2048, 3000]) for _ in range(size)],
            [choose.choice([1.0, -0.37, 1e-30, 3.0]) for _ in range(size)],
        )
        seed = choose.getrandbits(64) - 2**63
        stream = Stream(seed, choose.choice([0, 1, 500, 1024, 2**34 - columns]), "hadamard")
        error = torch.randn(choose.choice([1, 2, 5, 17]), columns, dtype=torch.float64)
        error *= choose.choice([1.0, 1.0, 1e-38, 1e5])
        yield error.to(choose.choice(DTYPES)), layers, stream, choose.choice(DTYPES)


def test_signals_have_the_bits_of_the_definition(place):
    for error, layers, stream, dtype in cases(25):
        if len(error) == 5:
            error[3, -1] = torch.inf
        found = project(error, layers, stream, dtype)
        expected = hadamard.project(error, layers, stream, dtype)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)


def test_the_transpose_has_the_bits_of_the_definition(place):
    for error, layers, stream, dtype in cases(25):
        signals = [torch.randn(len(error), size).to(dtype) for size in layers.sizes]
        where = (layers, stream, error.shape[1], error.dtype)
        assert_equal(adjoint(signals, *where), hadamard.project_adjoint(signals, *where))


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_have_the_bits_of_the_definition(place, dtype):
    stream = Stream(-3, 1000, "hadamard")
    for rows, columns, row_offset in ((1, 30, 1023), (70, 1100, 2**32 - 40), (5, 3, 2**63 - 5)):
        piece = (rows, columns, row_offset, stream, dtype, torch.device("cpu"))
        found = torch.ops.dfa_kernels.feedback_matrix.cpp(
            rows, columns, stream.seed, row_offset, stream.column_offset, "hadamard", *piece[4:]
        )
        assert_equal(found, hadamard.feedback_matrix(*piece))


def test_a_batch_is_cut_without_a_trace(place):
    """More rows than the workspace holds at once, and more output blocks than a task."""
    error = torch.randn(1100, 1500)
    layers, stream = Layers((5,), (3000,), (0.5,)), Stream(1, 900, "hadamard")
    (whole,) = project(error, layers, stream, None)
    for row in (0, 7, 348, 1099):
        (alone,) = project(error[row : row + 1], layers, stream, None)
        assert_equal(whole[row : row + 1], alone)
    assert_equal(whole[-3:], hadamard.project(error[-3:], layers, stream, torch.float32)[0])


def test_signals_past_the_caches_are_the_same(place):
    """Beyond 8 MiB of signals; rows that begin at a vector's alignment, and others."""
    error, stream = torch.randn(3, 40), Stream(9, 0, "hadamard")
    for size in (1_000_000, 1_000_001):
        (large,) = project(error, Layers((0,), (size,), (2.0,)), stream, None)
        for first in (0, 523_264, size - 2000):
            layer = Layers((first,), (2000,), (2.0,))
            assert_equal(large[:, first : first + 2000], project(error, layer, stream, None)[0])


def test_empty_calls(place):
    stream, none = Stream(0, 5, "hadamard"), Layers((), (), ())
    assert project(torch.randn(3, 4), none, stream, None) == []
    layers = Layers((0, 9), (3, 2000), (1.0, 2.0))
    for shape in ((0, 4), (2, 0)):
        found = project(torch.randn(shape), layers, stream, None)
        for signal, size in zip(found, layers.sizes, strict=True):
            assert_equal(signal, torch.zeros(shape[0], size))
        signals = [torch.randn(shape[0], size) for size in layers.sizes]
        assert adjoint(signals, layers, stream, shape[1], torch.float32).shape == shape


def test_subnormal_numbers_count_whatever_the_threads_mode(place):
    error, layers, stream = (
        torch.randn(4, 50) * 1e-40,
        Layers((0,), (2000,), (1.0,)),
        Stream(0, 0, "hadamard"),
    )
    expected = hadamard.project(error, layers, stream, torch.float32)[0]
    assert (expected != 0).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        (found,) = project(error, layers, stream, None)
        back = adjoint([error], Layers((9,), (50,), (1.0,)), stream, 2000, torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert_equal(found, expected)
    layers = Layers((9,), (50,), (1.0,))
    expected = hadamard.project_adjoint([error], layers, stream, 2000, torch.float32)
    assert (expected != 0).any()
    assert_equal(back, expected)


def test_equal_layers_are_summed_in_the_given_order(place):
    layers, stream = Layers((5,) * 40, (300,) * 40, (0.3,) * 40), Stream(2, 0, "hadamard")
    signals = [torch.randn(3, 300) for _ in range(40)]
    where = (layers, stream, 100, torch.float32)
    assert_equal(adjoint(signals, *where), hadamard.project_adjoint(signals, *where))


@pytest.mark.parametrize(("batch", "n", "layer"), [(600, 50_257, 10), (4, 1000, 3_211_264)])
def test_the_workspace_is_bounded(extra_bytes, batch, n, layer):
    extra = extra_bytes("cpp", layer, n, "hadamard", batch)
    assert extra <= slabs.WORKSPACE_BYTES / 2  # transformed at once, the first would take 123 MB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distribution": "normal"}, "distribution must be structured for this operator"),
        ({"scales": []}, "row_offsets and scales must have one entry per signal"),
        ({"signals": [torch.zeros(3)]}, "signals[0] must be [batch, size]"),
        ({"row_offsets": [-1]}, "row_offsets[0] must be in"),
    ],
)
def test_the_transpose_says_what_is_wrong(change, message):
    arguments = {
        "signals": [torch.zeros(2, 4)],
        "row_offsets": [0],
        "scales": [1.0],
        "seed": 0,
        "column_offset": 0,
        "distribution": "hadamard",
        "columns": 3,
        "dtype": torch.float32,
    }
    with pytest.raises(RuntimeError) as error:
        torch.ops.dfa_kernels.structured_adjoint.cpp(**(arguments | change))
    assert str(error.value).startswith("project_adjoint: ")
    assert message in str(error.value)


def test_sixteen_lanes_and_all_rows_in_registers(tmp_path):
    """What AVX-512 takes, on any CPU: transforms of 32 vectors of 16 lanes, and dot products."""
    needs("a C++ compiler", COMPILER is not None)
    source, binary = str(Path(__file__).parent / "sixteen_lanes.cpp"), tmp_path / "lanes"
    command = [shutil.which("c++"), "-std=c++17", "-O0", f"-I{ROOT}/csrc/cpu", "-Wno-psabi", source]
    subprocess.run([*command, "-o", str(binary)], check=True)
    assert subprocess.run([binary], check=True, capture_output=True, text=True).stdout == "equal\n"
