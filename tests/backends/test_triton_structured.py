"""Structured feedback by Triton, on a GPU or in the interpreter: the bits of the definition.

In the interpreter a program takes as many rows as it likes at the price of one, and an output block
a tenth of a second, so there are few of both.
"""

import functools
import itertools
import math

import pytest
import torch
from torch.library import opcheck

from dfa_kernels import hadamard, project
from tests import samples
from tests.samples import DTYPES

pytest.importorskip("triton")

from dfa_kernels.backends import triton
from dfa_kernels.backends.triton import launch, plan, projection, structured
from dfa_kernels.layers import Layers
from dfa_kernels.stream import Stream

# In the interpreter, what shows the same again is tested on request.
again = pytest.mark.battery if not torch.cuda.is_available() else pytest.mark.gpu
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
    # Raised by Triton 3.6's interpreter.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
random_error = functools.partial(samples.random_error, device=DEVICE)
# More than fit in the arguments of a launch: they overlap, lie in a block without touching, cross a
# block's end and row 2**32, and one ends where U ends. Two are equal, in no order of rows.
LAYERS = Layers(
    (2**32 - 5, 1000, 7, 2**63 - 40, 1000), (12, 50, 20, 40, 50), (0.37, -1.7, 3e-20, 1.0, 0.2)
)
FEW = Layers((2**41, 2**41 + 1020), (30, 40), (1e-3, 2.5))
LONE = Layers((1020,), (9,), (0.7,))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Gives each test its own ways and launches."""
    monkeypatch.setattr(projection, "_ways", plan.Kept())
    monkeypatch.setattr(structured, "_launches", plan.Kept())


def assert_same(found, expected):
    """Equal numbers: NaN is NaN, and zeros of either sign are equal."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)


def assert_projected(error, layers, stream, dtype):
    found = triton.project(error, layers, stream, dtype)
    assert all(signal.is_contiguous() for signal in found)
    assert_same(found, hadamard.project(error.cpu(), layers, stream, dtype))


def special(count, columns, dtype):
    """Rows of usual, subnormal and huge numbers, and one each of an infinity and NaN."""
    error = random_error(count, columns, dtype=torch.float64)
    facts = torch.finfo(dtype)
    error[1:2] *= facts.smallest_normal * facts.eps * 3
    error[2:3] *= facts.max / 4
    error[3:4, -1] = -math.inf
    error[4:5, 0] = math.nan
    return error.to(dtype)


@pytest.mark.parametrize(
    ("count", "columns", "column_offset"),
    [(5, 700, 300), pytest.param(3, 1, 2**34 - 1, marks=again)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_input_block(dtype, count, columns, column_offset):
    error = special(count, columns, dtype)
    assert_projected(error, LAYERS, Stream(-3, column_offset, "hadamard"), dtype)


@pytest.mark.parametrize("layers", [FEW, pytest.param(LAYERS, marks=again)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_input_blocks(dtype, layers):
    """Three, of which the first and the last are not whole."""
    error = random_error(1, 1040, dtype=dtype)
    assert_projected(error, layers, Stream(2**62 + 5, 1020, "hadamard"), dtype)


@pytest.mark.parametrize(
    ("error_dtype", "dtype"),
    [
        pytest.param(*pair, marks=[again] * (pair not in itertools.pairwise(DTYPES)))
        for pair in itertools.permutations(DTYPES, 2)
    ],
)
def test_output_dtype(error_dtype, dtype):
    error = special(5, 9, error_dtype)
    assert_projected(error, Layers((1000,), (24,), (0.7,)), Stream(1, 0, "hadamard"), dtype)


def test_fp64_is_rounded_to_16_bits_at_once():
    """By way of fp32, numbers just beyond the middle of two fp16 or bf16 numbers would be wrong."""
    for dtype, bits in ((torch.float16, 11), (torch.bfloat16, 8)):
        error = torch.tensor([[1 + 2.0**-bits + 2.0**-30]], dtype=torch.float64, device=DEVICE)
        layers = Layers((0,), (900,), (1.0,))
        stream = Stream(0, 0, "hadamard")
        assert_projected(error, layers, stream, dtype)
        (wide,) = hadamard.project(error.cpu(), layers, stream, torch.float64)
        (exact,) = hadamard.project(error.cpu(), layers, stream, dtype)
        assert not torch.equal(exact, wide.float().to(dtype))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("transforms", 2),
        pytest.param("transforms", 1, marks=again),
        ("transforms through a workspace", 1),
        pytest.param("transforms through a workspace", 2, marks=again),
    ],
)
def test_every_way_and_number_of_rows(monkeypatch, name, rows):
    """As many rows to a program as on GPUs, for a batch that they do not divide."""
    monkeypatch.setattr(structured, "ROWS", rows)
    monkeypatch.setattr(structured, "BLOCKS", dict.fromkeys(DTYPES, 2))
    error, stream = random_error(3, 40), Stream(5, 1000, "hadamard")
    layers = Layers((1000, 5000), (30, 9), (2.0, 0.1))
    ways = dict(triton.ways(error, "hadamard"))
    assert list(ways) == ["transforms", "transforms through a workspace"]
    found = ways[name](error[:, :24], layers, stream, torch.float32)
    assert_same(found, hadamard.project(error[:, :24].cpu(), layers, stream, torch.float32))


@pytest.mark.parametrize("workspace", [1, pytest.param(2 * 2 * 4096, marks=again)])
def test_a_small_workspace_is_used_again(monkeypatch, workspace):
    """It holds one or two rows of the error, and as few output blocks of the transpose."""
    monkeypatch.setattr(structured, "WORKSPACE_BYTES", workspace)
    count = 2 if workspace == 1 else 5
    error, stream = random_error(count, 1030), Stream(5, 0, "hadamard")
    assert_projected(error, LONE, stream, torch.float32)
    signals = [random_error(count, 9)]
    found = triton.structured_adjoint(signals, LONE, stream, 20, torch.float32)
    cpu = [signal.cpu() for signal in signals]
    assert_same([found], [hadamard.project_adjoint(cpu, LONE, stream, 20, torch.float32)])


def test_strides_and_alignment():
    wide, storage = random_error(12, 40), random_error(500)
    errors = [wide.T[:, ::2], wide[:1, :1].expand(5, 24)]
    # One shape and layout, best aligned first: the kernel for that one must not serve the other.
    errors += [storage[first : first + 120].view(5, 24) for first in (0, 1)]
    for error in errors:
        assert_projected(error, Layers((3,), (21,), (1.0,)), Stream(0, 0, "hadamard"), error.dtype)


@pytest.mark.parametrize(
    ("given", "dtype", "layers"),
    [
        (torch.bfloat16, torch.float64, FEW),
        (torch.float16, torch.bfloat16, FEW),
        (torch.float32, torch.float32, LAYERS),
        (torch.float64, torch.float16, FEW),
        *(pytest.param(dtype, dtype, LAYERS, marks=again) for dtype in DTYPES),
    ],
)
def test_the_transpose(given, dtype, layers):
    """Products are rounded before they are added, in the order of the layers' rows."""
    stream = Stream(2**63 - 1, 2**20 + 1000, "hadamard")
    signals = [special(5, n, given) for n in layers.sizes]
    cpu = [signal.cpu() for signal in signals]
    expected = hadamard.project_adjoint(cpu, layers, stream, 40, dtype)
    found = triton.structured_adjoint(signals, layers, stream, 40, dtype)
    assert_same([found], [expected])


def test_the_transpose_of_signals_of_any_strides_and_dtypes():
    layers, stream = Layers((0, 5), (20, 9), (0.3, 2.0)), Stream(1, 0, "hadamard")
    signals = [random_error(20, 3).T, random_error(1, 1, dtype=torch.float64).expand(3, 9)]
    cpu = [signal.cpu() for signal in signals]
    found = triton.structured_adjoint(signals, layers, stream, 7, torch.float32)
    assert_same([found], [hadamard.project_adjoint(cpu, layers, stream, 7, torch.float32)])


@pytest.mark.parametrize(
    ("dtype", "seed", "row", "column"),
    [
        (torch.float16, 0, 1020, 1000),
        (torch.bfloat16, -1, 2**32 - 3, 2**34 - 30),
        (torch.float32, 7, 2**63 - 6, 0),
        (torch.float64, -(2**63), 0, 2**33 + 5),
    ],
)
def test_the_matrix(dtype, seed, row, column):
    where = (6, 30, row, Stream(seed, column, "hadamard"), dtype)
    expected = hadamard.feedback_matrix(*where, torch.device("cpu"))
    assert_same([triton.feedback_matrix(*where, DEVICE)], [expected])


@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_nothing_to_project(shape, dtype):
    error = torch.empty(shape, device=DEVICE, dtype=dtype)
    stream = Stream(0, 5, "hadamard")
    assert_projected(error, LONE, stream, dtype)
    signals = [torch.empty(shape[0], 9, device=DEVICE, dtype=dtype)]
    found = triton.structured_adjoint(signals, LONE, stream, shape[1], dtype)
    assert found.shape == shape
    none = triton.feedback_matrix(0, shape[1], 0, stream, dtype, DEVICE)
    assert none.shape == (0, shape[1])


def test_nothing_to_make_takes_no_time():
    """This would take years."""
    error = torch.empty(0, 10, device=DEVICE)
    layers = Layers((0,), (2**45,), (1.0,))
    (signal,) = triton.project(error, layers, Stream(0, 0, "hadamard"), torch.float32)
    assert signal.shape == (0, 2**45)


def test_the_gradient():
    """Through the public function: it is the operator's transpose."""
    error = random_error(2, 10).requires_grad_()
    options = {"distribution": "hadamard", "normalization": 0.5, "seed": 2**64 - 1}
    (signal,) = project(error, [20], backend="triton", **options)
    weights = random_error(2, 20, seed=1)
    (gradient,) = torch.autograd.grad(signal, error, weights)
    layers, stream = Layers((0,), (20,), (0.5,)), Stream(-1, 0, "hadamard")
    expected = hadamard.project_adjoint([weights.cpu()], layers, stream, 10, torch.float32)
    assert_same([gradient], [expected])


def test_operators_keep_their_promises():
    """Of no rows, where the interpreter would take long."""
    checks = ("test_schema", "test_faketensor")
    for arguments in list(samples.project_samples(DEVICE, "hadamard"))[-1:]:
        opcheck(torch.ops.dfa_kernels.project.triton, arguments, test_utils=checks)
        error, row_offsets, sizes, scales, *stream, _ = arguments
        signals = [random_error(len(error), size) for size in sizes]
        given = (signals, row_offsets, scales, *stream, error.shape[1], torch.float32)
        opcheck(torch.ops.dfa_kernels.structured_adjoint.triton, given, test_utils=checks)
    for arguments in list(samples.feedback_matrix_samples(DEVICE, "hadamard"))[-1:]:
        opcheck(torch.ops.dfa_kernels.feedback_matrix.triton, arguments, test_utils=checks)


def test_programs_walk_where_there_is_enough_for_all():
    """Built, not launched: the error is transformed for each output block, or for several."""
    for batch, size, walk in ((1, 2**10, 1), (2**13, 2**11, 2), (2**13, 2**20, 16)):
        error = torch.empty(1, 9, device=DEVICE).expand(batch, 9)
        made = structured.Structured(error, Layers((0,), (size,), (1.0,)), 0, "", torch.float32)
        assert made._walk == (walk if DEVICE.type == "cuda" else structured._WALK)


def test_calls_leave_a_bounded_trace():
    assert isinstance(structured._launches, plan.Kept)
    stream = Stream(0, 0, "hadamard")
    for _ in range(2):
        triton.feedback_matrix(1, 1, 0, stream, torch.float32, DEVICE)
    assert len(structured._launches) == 1
    assert len(LAYERS.sizes) > launch.OUTPUTS
