"""The CUDA kernels of structured feedback, run on the CPU by the emulator in `cuda_host`.

Every number is compared with the definition, `dfa_kernels.hadamard`, bit for bit.
"""

import itertools
import struct

import pytest
import torch

from dfa_kernels import hadamard
from dfa_kernels.layers import Layers
from dfa_kernels.stream import Stream
from tests.backends.emulation import ORDERS, SHARED, TYPES, as_tensors, build, run, words
from tests.projection.test_hadamard import LAYERS, PLACES, assert_same
from tests.samples import random_error

# Of every kind, and so many that there are two groups of targets.
MANY = Layers.of(
    [*LAYERS, 100, 0, 100],
    [*LAYERS.values(), 50, 3000, 50],
    [(-1) ** i * 0.37 / (i + 1) for i in range(len(LAYERS) + 3)],
)
FEW = Layers.of([2**32 - 900, 2**32 - 20, 2**32 - 20], [1100, 50, 50], [0.3, -2.0, -2.0])


@pytest.fixture(scope="module")
def emulator(tmp_path_factory, pytestconfig):
    return build("structured", ["structured", "table"], tmp_path_factory, pytestconfig)


def layer_words(layers, i):
    scale = layers.scales[i] * hadamard.FACTOR
    return words(
        layers.row_offsets[i], layers.sizes[i], *struct.unpack("<q", struct.pack("<d", scale))
    )


def project(
    emulator,
    error,
    layers,
    *,
    seed=3,
    column_offset=0,
    dtype=None,
    processors=0,
    workspace=32 << 20,
    shared=SHARED["sm_86"],
    misaligned=0,
    order="late",
):
    """The signals, and (launches, thread blocks of the last one, bytes of workspace)."""
    storage, dtype = error.untyped_storage(), dtype or error.dtype
    request = words(0, seed, column_offset, *error.shape, *error.stride())
    request += words(TYPES.index(error.dtype), TYPES.index(dtype))
    request += words(processors, workspace, shared, misaligned)
    request += words(storage.nbytes())
    request += torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
    request += words(len(layers.sizes))
    request += b"".join(layer_words(layers, i) for i in range(len(layers.sizes)))
    data = run(emulator, request, ORDERS[order])
    shapes = [(error.shape[0], size) for size in layers.sizes]
    return as_tensors(data[24:], dtype, shapes), struct.unpack("<3q", data[:24])


def check(emulator, error, layers, *, seed=3, column_offset=0, dtype=None, **options):
    where = {"seed": seed, "column_offset": column_offset}
    found, log = project(emulator, error, layers, dtype=dtype, **where, **options)
    stream = Stream(seed, column_offset, "hadamard")
    assert_same(found, hadamard.project(error, layers, stream, dtype or error.dtype))
    return log


@pytest.mark.parametrize("layers", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(("columns", "column_offset"), PLACES)
def test_every_place(emulator, columns, column_offset, layers):
    """One input block and several; targets in one group and in two."""
    error = random_error(3, columns)
    launches, _, workspace = check(
        emulator, error, layers, seed=2**63 + 5, column_offset=column_offset
    )
    blocks = -(-(column_offset % 1024 + columns) // 1024)
    by_workspace = blocks > 1 and layers is MANY
    assert launches == 1 + by_workspace
    assert workspace == 3 * blocks * 4096 * by_workspace


@pytest.mark.parametrize("columns", [700, 1700])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("error_type", TYPES, ids=str)
def test_types(emulator, error_type, dtype, columns):
    error = random_error(3, columns, dtype=error_type)
    check(emulator, error, FEW, dtype=dtype)
    check(emulator, error, Layers.of([7], [4000], [0.1]), dtype=dtype, misaligned=8)


ROWS_AND_BLOCKS = list(itertools.product([1, 2, 4, 5, 11], [1, 5, 9], [700, 1700]))
EVERY_ORDER = [(1, 9, 700), (5, 5, 1700), (11, 5, 700)]


@pytest.mark.parametrize(
    ("outputs", "batch", "columns", "order"),
    [
        *((*shape, "late") for shape in ROWS_AND_BLOCKS),
        *((*shape, order) for shape in EVERY_ORDER for order in ORDERS if order != "late"),
    ],
)
def test_every_number_of_rows_and_blocks(emulator, outputs, batch, columns, order):
    """Thread blocks share rows in four ways, and take one item each or several."""
    layers = Layers.of([1024 * 3], [1024 * outputs - 5], [0.5])
    for processors in (0, 1):
        check(emulator, random_error(batch, columns), layers, processors=processors, order=order)


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("shared", ["sm_86", "sm_90"])
def test_the_memory_of_a_block_limits_how_many_rows_share_it(emulator, shared, outputs):
    """In fp64 up to eight rows of the error, if a block of threads may have as much memory."""
    layers = Layers.of([0], [1024 * outputs], [0.5])
    error = random_error(9, 300, dtype=torch.float64)
    _, blocks, _ = check(emulator, error, layers, shared=SHARED[shared], processors=1)
    if outputs == 1:
        assert blocks == (5 if shared == "sm_86" else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_and_misaligned_errors(emulator, dtype):
    wide = random_error(9, 2100, dtype=dtype)
    views = [wide[:, :897], wide[::2, ::3], wide.T[:900], wide[:1].expand(4, 2100), wide[:, :0]]
    for view in views:
        check(emulator, view, FEW, misaligned=2 * (dtype == torch.bfloat16))


@pytest.mark.parametrize("layers", [1, 33, 88, 300])
def test_any_number_of_layers(emulator, layers):
    generator = torch.Generator().manual_seed(layers)
    sizes = torch.randint(1, 50 + 3000 // layers, (layers,), generator=generator).tolist()
    rows = torch.randint(0, 5000, (layers,), generator=generator).tolist()
    scales = [1 / (1 + i) for i in range(layers)]
    launches, _, _ = check(emulator, random_error(2, 90), Layers.of(rows, sizes, scales))
    assert launches == 1 + (layers > 87) * -(-(5 * layers + 3) // 500)


@pytest.mark.parametrize("columns", [10, 1500])
def test_half_a_warp_without_a_layer_forms_no_address(emulator, columns):
    """The others of its warp have one, and the first layer is as far away as can be."""
    for rows, sizes in (([0, 0, 2**62], [1, 2, 1]), ([0, 2**63 - 2, 2**63 - 2], [2000, 2, 1])):
        check(emulator, random_error(5, columns), Layers.of(rows, sizes, [1.0, 0.5, 0.25]))


def test_extreme_errors(emulator):
    """Infinities, NaN, huge and subnormal numbers: what the definition's additions give."""
    for columns in (90, 1500):
        for value in (float("inf"), float("nan"), 3e38, 1e-45):
            error = torch.zeros(3, columns)
            error[1, 4:7] = value
            check(emulator, error, FEW)
        error = torch.full((2, columns), 5e-324, dtype=torch.float64)
        for dtype in TYPES:
            check(emulator, error, FEW, dtype=dtype)
            check(emulator, error + 1e-40, FEW, dtype=dtype)


def test_fp64_is_rounded_once(emulator):
    """Sums just beside the middle between two 16-bit numbers, which fp32 would move there."""
    for dtype in (torch.bfloat16, torch.float16):
        near = 1 + torch.finfo(dtype).eps / 2
        error = torch.tensor(
            [[near + 2**-40], [near - 2**-40], [-near + 2**-40]], dtype=torch.float64
        )
        layers = Layers.of([0], [1024], [1.0])
        check(emulator, error, layers, dtype=dtype)


@pytest.mark.parametrize(("workspace", "rows"), [(1, 1), (5 * 8192, 5), (6 * 8192 - 1, 5)])
def test_the_workspace_cuts_the_batch(emulator, workspace, rows):
    """Two input blocks take 8 KiB a row. However little there is, one row is transformed."""
    error = random_error(12, 1700)
    launches, _, taken = check(emulator, error, MANY, workspace=workspace)
    assert taken == rows * 8192
    assert launches == 2 * -(-12 // rows)


# Its transpose


def adjoint(
    emulator, signals, layers, columns, *, seed=3, column_offset=0, dtype=None, order="late"
):
    dtype = dtype or signals[0].dtype
    batch = signals[0].shape[0]
    request = words(2, seed, column_offset, batch, columns)
    request += words(TYPES.index(signals[0].dtype), TYPES.index(dtype), len(signals))
    request += b"".join(layer_words(layers, i) for i in range(len(signals)))
    for signal in signals:
        request += signal.contiguous().view(torch.uint8).numpy().tobytes()
    (error,) = as_tensors(run(emulator, request, ORDERS[order]), dtype, [(batch, columns)])
    stream = Stream(seed, column_offset, "hadamard")
    assert_same([error], [hadamard.project_adjoint(signals, layers, stream, columns, dtype)])


def random_signals(batch, layers, dtype=torch.float32):
    return [random_error(batch, size, dtype=dtype, seed=i) for i, size in enumerate(layers.sizes)]


@pytest.mark.parametrize(("columns", "column_offset"), PLACES)
def test_transpose_in_every_place(emulator, columns, column_offset):
    where = {"seed": 2**63 + 5, "column_offset": column_offset}
    adjoint(emulator, random_signals(2, MANY), MANY, columns, **where)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("signal_type", TYPES, ids=str)
def test_types_of_the_transpose(emulator, signal_type, dtype):
    adjoint(emulator, random_signals(3, FEW, signal_type), FEW, 4500, dtype=dtype)


@pytest.mark.parametrize("order", ORDERS)
def test_many_sources(emulator, order):
    """Three batches of output blocks, and two groups of input blocks."""
    layers = Layers.of([100, 0], [1024 * 17, 3000], [0.3, 0.7])
    adjoint(emulator, random_signals(3, layers), layers, 4500, order=order)


# The matrix and the memory


def test_lanes_access_different_banks(emulator):
    """8 lanes access 16 bytes each at once, or 32 lanes 4 bytes."""
    data = torch.frombuffer(
        bytearray(run(emulator, words(3), ORDERS["at-once"])), dtype=torch.int64
    )
    pieces, single = data[: 32 * 32].view(-1, 8), data[32 * 32 :].view(-1, 32)
    assert (pieces // 16 % 8).sort().values.eq(torch.arange(8)).all()
    assert (single // 4 % 32).sort().values.eq(torch.arange(32)).all()


def test_feedback_matrices(emulator):
    """Any shape, place, type and alignment."""
    stream_of = lambda seed, column: Stream(seed, column, "hadamard")  # noqa: E731
    for i, (rows, columns) in enumerate([(1, 1), (40, 1500), (3, 1024), (17, 9), (2, 2600)]):
        row, column = ((0, 0), (1000, 700), (2**32 - 1, 1024), (2**63 - 17, 2**34 - 9), (5, 3))[i]
        for dtype in TYPES:
            request = words(1, 2**64 - 5, column, row, rows, columns, TYPES.index(dtype), 8 * i)
            data = run(emulator, request, ORDERS["late"])
            (matrix,) = as_tensors(data, dtype, [(rows, columns)])
            where = (stream_of(2**64 - 5, column), dtype, torch.device("cpu"))
            assert_same([matrix], [hadamard.feedback_matrix(rows, columns, row, *where)])
