"""The Triton kernels on a GPU, or in Triton's interpreter on the CPU: exact entries, and signals.

In the interpreter the tiles are as large as on a GPU, so that small shapes test the edges.
"""

import functools
import logging
import math

import pytest
import torch
from torch.library import opcheck

import dfa_kernels
from dfa_kernels import feedback_matrix, project
from tests import reference, samples
from tests.conftest import EPSILON, assert_projected
from tests.reference import DENSE
from tests.samples import DTYPES, layer_scales

pytest.importorskip("triton")

from dfa_kernels.backends import tensor_cores
from dfa_kernels.backends.triton import launch, plan, projection
from dfa_kernels.layers import Layers

pytestmark = [
    pytest.mark.triton,
    # Raised by Triton 3.6's interpreter.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES, OFFSETS = [33, 7, 129, 1, 5, 60], [0, 0, 0, 40, 2**63 - 5, 100]
random_error = functools.partial(samples.random_error, device=DEVICE)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Gives each test its own cache of ways."""
    monkeypatch.setattr(projection, "_ways", plan.Kept())


@pytest.fixture
def by_slabs(monkeypatch):
    """Slabs of 32 rows for all but fp64 errors."""
    monkeypatch.setattr(tensor_cores, "slab_rows", lambda *_: 32)
    monkeypatch.setattr(projection, "_FUSED_COLUMNS", -1)
    projection._ways.clear()
    yield
    projection._ways.clear()


def test_the_backend_is_there():
    states = {(status.name, status.device): status for status in dfa_kernels.backends()}
    assert states["triton", DEVICE].available


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DENSE)
def test_entries_are_the_definitions(distribution, dtype):
    for seed, row, column in [
        (0, 0, 0),
        (2**64 - 1, 2**63 - 9, 2**34 - 131),
        (2**63, 2**32 - 2, 2**31 - 3),
        (2**32, 5, 127),
    ]:
        where = {"seed": seed, "row_offset": row, "column_offset": column}
        where |= {"distribution": distribution, "dtype": dtype}
        entries = feedback_matrix(9, 131, backend="triton", device=DEVICE, **where)
        assert torch.equal(entries.cpu(), reference.matrix(9, 131, **where)), where


def test_every_level_of_the_codebook_is_exact():
    rows, columns = 200, 300
    assert len(set(reference.indices(rows, columns).flatten())) == 4096
    entries = feedback_matrix(rows, columns, backend="triton", device=DEVICE)
    assert torch.equal(entries.cpu().double(), reference.matrix(rows, columns))


def test_entries_are_exact_operands():
    """Every level is exact in bf16 and in fp16, and none is subnormal in fp16."""
    levels = torch.from_numpy(reference.CODEBOOK)
    assert torch.equal(levels.half().double(), levels)
    assert torch.equal(levels.bfloat16().double(), levels)
    assert levels.abs().min() >= torch.finfo(torch.float16).smallest_normal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DENSE)
@pytest.mark.parametrize("n", [1, 37, 136])
def test_definition(distribution, dtype, n):
    """Layers nested, disjoint, overlapping and at U's last rows; more than fit in the arguments."""
    error = random_error(5, n, dtype=dtype)
    where = {"seed": 2**63 + 11, "distribution": distribution, "row_offsets": OFFSETS}
    signals = project(error, SIZES, backend="triton", **where)
    assert_projected(signals, error, SIZES, layer_scales(SIZES, n), **where)


@pytest.mark.parametrize("offset", [5, 127, 128, 2**34 - 40])
@pytest.mark.parametrize("distribution", DENSE)
def test_column_offsets(distribution, offset):
    error = random_error(3, 40)
    where = {"distribution": distribution, "column_offset": offset}
    signals = project(error, [9], backend="triton", error_size=2**34, normalization=0.1, **where)
    assert_projected(signals, error, [9], [0.1], **where)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 70])
def test_any_number_of_layers(number):
    error = random_error(2, 10)
    sizes = [1 + 37 * i % 101 for i in range(number)]
    for _ in range(2):  # the second time, the table of addresses may exist
        signals = project(error, sizes, backend="triton")
        assert_projected(signals, error, sizes, layer_scales(sizes, 10))


def test_operand_order_does_not_matter(monkeypatch):
    """Columns in register order or in their own give the same sums, up to rounding."""
    error = random_error(5, 70)
    signals = []
    for fragments in (True, False):
        projection._ways.clear()
        way = launch.Operands(fragments, pinned=False)
        monkeypatch.setattr(launch.Operands, "on", lambda device, way=way: way)
        signals += project(error, [40], backend="triton")
    for signal in signals:
        assert_projected([signal], error, [40], layer_scales([40], 70))


@pytest.mark.parametrize("distribution", DENSE)
def test_offsets_of_64_bits(distribution, monkeypatch):
    """The kernel for outputs past 2^31 elements gives the same signals."""
    monkeypatch.setattr(launch, "_NARROW", 1)
    error = random_error(5, 9)
    signals = project(error, [130, 7], backend="triton", distribution=distribution)
    scales = layer_scales([130, 7], 9)
    assert_projected(signals, error, [130, 7], scales, distribution=distribution)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("error_dtype", DTYPES)
def test_output_dtype(error_dtype, dtype):
    error = random_error(3, 10, dtype=error_dtype)
    signals = project(error, [6, 4], dtype=dtype, backend="triton")
    assert_projected(signals, error, [6, 4], layer_scales([6, 4], 10), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_errors_of_any_strides_and_alignment(dtype):
    wide = random_error(12, 40, dtype=dtype)
    storage = random_error(500, dtype=dtype)
    errors = [wide[:, ::2], wide.T, wide[:, :1].expand(12, 24), wide[:, 3:27], wide[1:2, 8:]]
    # One shape and layout, best aligned first: the kernel for that one must not serve the others.
    errors += [storage[first : first + 120].view(5, 24) for first in (0, 1, 4, 8)]
    errors += [storage[:1].expand(3, 8)]
    for error in errors:
        n = error.shape[1]
        signals = project(error, [21], backend="triton")
        assert_projected(signals, error, [21], layer_scales([21], n))


@pytest.mark.parametrize(("name", "terms"), [("highest", 3), ("high", 2), ("medium", 1)])
def test_precision_of_fp32_follows_that_of_products(precision, name, terms):
    """The terms leave out at most 2^-9 (one, rounded), 2^-16 (two) or nothing (three)."""
    precision(name)
    error = random_error(6, 33)
    assert launch.terms_of(error) == terms
    (signal,) = project(error, [50], normalization=1.0, backend="triton")
    (exact,) = reference.project(error.cpu(), [50], [1.0])
    (magnitude,) = reference.signals(error.cpu(), [50], [1.0])[1]
    left_out = {3: 0, 2: 2**-16, 1: 2**-9}[terms]
    bound = (left_out + 36 * EPSILON[torch.float32]) * magnitude
    difference = (signal.cpu().double() - exact).abs()
    assert (difference <= bound).all()
    if terms < 3:  # and what is left out shows
        assert (difference > 36 * EPSILON[torch.float32] * magnitude).any()


@pytest.mark.parametrize(
    ("name", "distribution"),
    [("high", "normal"), *(("highest", name) for name in DENSE)],
)
def test_terms_made_beforehand_are_those_of_the_kernel(precision, monkeypatch, name, distribution):
    """The same bits, whatever the error's layout and first column."""
    precision(name)
    wide = random_error(6, 270)
    for error in wide, wide[:, 3:40], wide[:, ::3], wide.T[:17], wide[:1, :1].expand(5, 9):
        signals = []
        for entries in (2**62, 0):
            monkeypatch.setattr(launch, "_SPLIT_ENTRIES", entries)
            projection._ways.clear()
            options = {"distribution": distribution, "column_offset": 5, "error_size": 400}
            signals += project(error, [40], backend="triton", **options)
        assert torch.equal(*signals)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("name", ["highest", "high"])
def test_nan_inf_and_huge_numbers_as_in_a_matrix_product(precision, name):
    precision(name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        column = reference.matrix(40, 1, column_offset=4).flatten()
        for value in (math.nan, math.inf, -math.inf, torch.finfo(dtype).max):
            error = random_error(3, 10, dtype=dtype)
            error[1, 4] = value
            (signal,) = project(error, [40], normalization=0.1, backend="triton")
            signal = signal.cpu().double()
            assert signal[[0, 2]].isfinite().all()
            if math.isnan(value):
                assert signal[1].isnan().all()
            elif math.isinf(value):
                assert torch.equal(signal[1], value * column)
            else:  # finite, as the sum is, though bf16 rounds an fp32 of this size to infinity
                small = column.abs() < 0.9
                expected = 0.1 * value * column[small]
                assert torch.allclose(signal[1][small], expected, rtol=2**-7, atol=1)


@pytest.mark.usefixtures("by_slabs")
@pytest.mark.parametrize("distribution", DENSE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_by_slabs(dtype, distribution):
    """One layer, several that share rows, and several that do not."""
    error = random_error(5, 37, dtype=dtype)
    for sizes, offsets in ([70], [3]), (SIZES, OFFSETS), ([30, 30], [0, 15]):
        where = {"distribution": distribution, "row_offsets": offsets, "column_offset": 3}
        signals = project(error, sizes, backend="triton", normalization=0.2, error_size=40, **where)
        assert_projected(signals, error, sizes, [0.2] * len(sizes), **where)


def test_the_choice_is_the_cheaper_one_and_is_logged(monkeypatch, caplog):
    """A small batch is fused. For a very large one, entries are generated only once."""
    cost = {
        count: projection.Cost.of(
            launch.tile_for(count, "normal", 0, True), count, 1000, 200_000, "normal", 0, False
        )
        for count in (64, 256, 4096, 65_536)
    }
    assert cost[64].fused < cost[64].by_slabs
    assert cost[256].fused < cost[256].by_slabs
    assert cost[4096].fused > cost[4096].by_slabs
    assert cost[65_536].fused > 1.5 * cost[65_536].by_slabs
    error = random_error(300, 4, dtype=torch.bfloat16)
    for estimate, way in ((projection.Cost(1, 2), "fused"), (projection.Cost(2, 1), "by slabs")):
        projection._ways.clear()
        monkeypatch.setattr(projection.Cost, "of", lambda *_, estimate=estimate: estimate)
        with caplog.at_level(logging.DEBUG, "dfa_kernels"):
            signals = project(error, [5], backend="triton")
        assert f"project: {way}, by estimates of" in caplog.messages[-1]
        assert_projected(signals, error, [5], layer_scales([5], 4))
    projection._ways.clear()
    with caplog.at_level(logging.DEBUG, "dfa_kernels"):  # three terms never use a vendor's sums
        project(error.float(), [5], backend="triton")
    assert "project: fused" in caplog.messages[-1]


def test_long_errors_do_not_go_to_the_fused_kernel(monkeypatch, caplog):
    monkeypatch.setattr(projection, "_FUSED_COLUMNS", 30)
    error = random_error(2, 31)
    with caplog.at_level(logging.DEBUG, "dfa_kernels"):
        signals = project(error, [5], backend="triton")
    assert "by slabs" in caplog.messages[-1]
    assert_projected(signals, error, [5], layer_scales([5], 31))


@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
def test_nothing_to_multiply(shape):
    error = torch.empty(shape, device=DEVICE)
    (signal,) = project(error, [6], error_size=10, backend="triton")
    assert torch.equal(signal, torch.zeros(shape[0], 6, device=DEVICE))
    assert feedback_matrix(0, 7, backend="triton", device=DEVICE).shape == (0, 7)


def test_operators_keep_their_promises():
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for arguments in samples.project_samples(DEVICE):
        opcheck(torch.ops.dfa_kernels.project.triton, arguments, test_utils=checks)
    for arguments in samples.feedback_matrix_samples(DEVICE):
        opcheck(torch.ops.dfa_kernels.feedback_matrix.triton, arguments, test_utils=checks)


def test_offsets_have_64_bits_where_a_signal_needs_them():
    """Built, not launched: tens of millions of units are too many for the interpreter."""
    error = random_error(128, 8, dtype=torch.bfloat16)
    for size, wanted in ((2**24 - 2, launch.tl.int32), (2**24, launch.tl.int64)):
        made = launch.Fused(error, Layers((0,), (size,), (1.0,)), 0, "normal", error.dtype)
        assert wanted in made._launch._constants


def test_operators_that_keep_tables_are_left_out_of_captured_graphs():
    """If torch.compile captured them, the tables would lie in a graph's memory."""
    operators = torch.ops.dfa_kernels
    for operator, keeps in (
        (operators.project.triton, True),
        (operators.project.default, True),
        (operators.project.cuda, False),
        (operators.project_adjoint.default, True),
        (operators.structured_adjoint.triton, True),
        (operators.structured_adjoint.cuda, False),
    ):
        assert (torch.Tag.cudagraph_unsafe in operator.tags) == keeps


def test_a_device_without_an_index_is_the_current_one():
    with launch.on(torch.device("cuda")):
        pass


def test_a_compiled_call_is_one_graph():
    torch.compiler.reset()

    def step(error):
        return project(2 * error, [30, 7], seed=2**64 - 1, backend="triton")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (3, 4):
        error = random_error(count, 10)
        for one, other in zip(step(error), compiled(error), strict=True):
            assert torch.equal(one, other)


def test_autocast_and_gradients():
    error = random_error(3, 10).requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        (signal,) = project(error, [20], backend="triton")
    assert signal.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(signal.sum(), error)
    expected = reference.matrix(20, 10).sum(0).expand(3, 10) / math.sqrt(200)
    assert torch.allclose(gradient.cpu().double(), expected, rtol=0.02, atol=0.02)


def test_calls_leave_a_bounded_trace():
    for size in range(1, 20):
        for _ in range(2):
            project(random_error(1, 4), [size], normalization=size / 7, backend="triton")
        assert len(projection._ways) == size
    assert isinstance(projection._ways, plan.Kept)
    assert isinstance(launch._tables, plan.Kept)
    assert isinstance(launch._fills, plan.Kept)
