"""The structured projection: the same numbers as NumPy's, bit for bit, on every backend."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch

from dfa_kernels import project
from tests import reference
from tests.samples import DTYPES, layer_scales, random_error

# Layers that share rows, nest, overlap, lie in one block without touching, cross blocks and row
# 2**32, and have matrices of their own, in no particular order. The last begin at a block's end.
LAYERS = {
    2**62 + 7: 40,
    0: 1500,
    100: 50,
    120: 2000,
    5 * 1024 + 10: 20,
    5 * 1024 + 700: 100,
    2**32 - 5: 12,
    2**40: 33,
    2**41: 1024,
    7 * 1024 - 1: 1,
    8 * 1024 - 1: 1026,
    2**63 - 1200: 1200,
}
OFFSETS = [*LAYERS, 100, 0, 100]
SIZES = [*LAYERS.values(), 50, 3000, 50]
SCALES = [(-1) ** i * 0.37 / (i + 1) for i in range(len(SIZES))]
PLACES = [  # (columns, column_offset)
    (1, 0),
    (1023, 0),
    (1024, 1024),
    (1025, 0),
    (3000, 0),
    (1, 1023),
    (2, 2**32 - 1),
    (1500, 700),
    (1300, 2**34 - 1300),
    (1, 2**34 - 1),
]


def signals_of(error, sizes, scales, target, **options):
    """The signals on the CPU: `project` with explicit scales."""
    options = {"distribution": "hadamard", "backend": target.name, **options}
    error = error.to(target.device)
    size = options.get("column_offset", 0) + error.shape[-1]
    signals = project(error, sizes, normalization=scales, error_size=max(size, 1), **options)
    assert all(signal.is_contiguous() for signal in signals)
    return [signal.cpu() for signal in signals]


def assert_same(found, expected):
    """Equal numbers: NaN is NaN, and zeros of either sign are equal."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def assert_the_references(target, error, sizes, scales, dtypes=DTYPES, **where):
    exact = reference.structured_signals(error, sizes, scales, **where)
    for dtype in dtypes:
        found = signals_of(error, sizes, scales, target, dtype=dtype, **where)
        assert_same(found, [reference.rounded(signal, dtype) for signal in exact])


def known_error():
    m, c = torch.arange(2)[:, None], torch.arange(1500)
    return ((7919 * (1500 * m + c)) % 2001 - 1000).float()


@pytest.mark.parametrize(
    ("known", "error", "scale"),
    [
        ("signals_integer_error", known_error(), 2.0**-10),
        ("signals_fp32_error", known_error() / 2001, 1 / math.sqrt(1100 * 1500)),
    ],
)
def test_signals_are_the_known_answers(structured, known, error, scale):
    known = reference.KNOWN_HADAMARD[known]
    (found,) = signals_of(error, [1100], [scale], structured, seed=known["seed"])
    (second,) = reference.structured_signals(error, [1100], [scale], seed=known["seed"])
    for signal in (found.numpy(), second):
        bits = hashlib.sha256((signal + np.float32(0)).astype("<f4").tobytes()).hexdigest()
        assert bits == known["sha256_of_fp32_little_endian_2x1100_after_adding_0"]
        first = [[float.fromhex(value) for value in row] for row in known["first_8"]]
        assert signal[:, :8].tolist() == first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "column_offset"), PLACES)
def test_bits_in_every_dtype_and_place(structured, columns, column_offset, dtype):
    error = random_error(3, columns, dtype=dtype)
    where = {"seed": 2**63 + 5, "row_offsets": OFFSETS, "column_offset": column_offset}
    assert_the_references(structured, error, SIZES, SCALES, **where)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 37])
def test_a_batch_is_its_rows(structured, count):
    """Bits of a row do not depend on the other rows."""
    error = random_error(count, 1500)
    assert_the_references(structured, error, SIZES, SCALES, [torch.float32], row_offsets=OFFSETS)
    whole = signals_of(error, SIZES, SCALES, structured, row_offsets=OFFSETS)
    for i in range(count):
        one = signals_of(error[i : i + 1], SIZES, SCALES, structured, row_offsets=OFFSETS)
        assert_same([signal[i : i + 1] for signal in whole], one)


def test_a_layer_is_the_same_in_any_company(structured):
    error = random_error(3, 1500)
    together = signals_of(error, SIZES, SCALES, structured, row_offsets=OFFSETS)
    for order in (range(len(SIZES)), range(1, len(SIZES), 2), reversed(range(len(SIZES)))):
        some = list(order)
        found = signals_of(
            error,
            [SIZES[i] for i in some],
            [SCALES[i] for i in some],
            structured,
            row_offsets=[OFFSETS[i] for i in some],
        )
        assert_same(found, [together[i] for i in some])
    for i, expected in enumerate(together):
        where = {"row_offsets": OFFSETS[i : i + 1]}
        alone = signals_of(error, SIZES[i : i + 1], SCALES[i : i + 1], structured, **where)
        assert_same(alone, [expected])


def test_a_thousand_layers(structured):
    error = random_error(2, 10)
    sizes = [1 + 37 * i % 1301 for i in range(1000)]
    exact = reference.structured_signals(error, [1301], [1.0])[0]
    found = signals_of(error, sizes, [1.0] * 1000, structured)
    assert_same(found, [torch.from_numpy(exact[:, :size]) for size in sizes])


@pytest.mark.parametrize(("count", "columns"), [(1, 10), (7, 1500), (64, 1024)])
def test_threads_do_not_show(structured, count, columns):
    error = random_error(count, columns)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in range(1, 9):
            torch.set_num_threads(threads)
            found.append(signals_of(error, [30_000, 777], [1.0, 0.3], structured))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(other, found[0])


def test_strides_do_not_show(structured):
    wide = random_error(1100, 3, 2300, device=structured.device)
    for error in (
        wide[0, :, ::2],
        wide[0, :, 1:1300],
        wide[:, :, 0].T,
        wide[0, :1, :1500].expand(5, 1500),
        wide[0, :, :1].expand(3, 1500),
        wide[:2, :, 5::7],
        wide.flip(2)[0],
        wide[2, 1],
    ):
        found = signals_of(error, [40, 1030], [1.0, 2.0], structured)
        expected = signals_of(error.contiguous(), [40, 1030], [1.0, 2.0], structured)
        assert_same(found, expected)
        rows = error.reshape(-1, error.shape[-1])
        exact = reference.structured_signals(rows, [40], [1.0])
        assert_same([found[0].reshape(-1, 40)], map(torch.from_numpy, exact))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_numbers(structured, dtype):
    """Subnormal and huge numbers, infinities, NaN and zeros of both signs."""
    facts = torch.finfo(dtype)
    tiny = facts.smallest_normal
    error = random_error(12, 1100, dtype=torch.float64)
    error[0] *= tiny
    error[1] *= tiny * facts.eps * 3
    error[2] *= facts.max / 4
    error[3] = 0.0
    error[4] = -0.0
    error[5, ::2] = -0.0
    error[6, 700] = math.inf
    error[7, [3, 1050]] = -math.inf
    error[8, 1099] = math.nan
    error[9] = tiny
    error[10] = facts.max
    error = error.to(dtype)
    assert (error[1] != 0).any()
    least = 1e-300 if dtype == torch.float64 else 2.0**-116
    for scale in (1.0, 2.0**-20, 1e30, -1e-30, 0.0, least):
        assert_the_references(structured, error, [40, 1500], [scale, 2.5], row_offsets=[0, 1000])


def test_fp64_is_rounded_to_16_bits_at_once(structured):
    """By way of fp32, numbers just beyond the middle of two fp16 or bf16 numbers would be wrong."""
    for dtype, bits in ((torch.float16, 11), (torch.bfloat16, 8)):
        error = torch.tensor([[1 + 2.0**-bits + 2.0**-30]], dtype=torch.float64)
        assert_the_references(structured, error, [5000], [1.0], [dtype])
        (wide,) = signals_of(error, [5000], [1.0], structured)
        (found,) = signals_of(error, [5000], [1.0], structured, dtype=dtype)
        assert not torch.equal(found, wide.float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_projects_in_its_dtype(structured, dtype):
    error = random_error(3, 1100)
    with torch.autocast(structured.device, dtype=dtype):
        found = signals_of(error, [1030], [0.1], structured)
    (exact,) = reference.structured_signals(error.to(dtype), [1030], [0.1])
    assert_same(found, [reference.rounded(exact, dtype)])


@pytest.mark.parametrize(("wide", "columns"), [(torch.float32, 3000), (torch.float64, 1500)])
def test_signals_are_those_of_the_matrix_to_rounding(structured, wide, columns):
    """A transform is sqrt(1024) times orthogonal, and each of its ten stages rounds once.

    So the rounding errors of a block of output, three transforms and the sum over input blocks, are
    in norm at most (32 + blocks) u times the sum of the norms that come from each input block.
    """
    error = random_error(4, columns, dtype=wide)
    (found,) = signals_of(error, [2048], [0.3], structured, seed=6)
    u = reference.matrix(2048, columns, seed=6, distribution="hadamard")
    expected = 0.3 * error.double() @ u.T
    norms = sum(part.double().norm(dim=1) for part in error.split(1024, 1))
    bound = (32 + math.ceil(columns / 1024)) * torch.finfo(wide).eps / 2 * 0.3 * 32 * norms
    for block in (found - expected).split(1024, 1):
        assert (block.norm(dim=1) <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shards_of_the_error_sum_to_the_whole(structured, dtype):
    error = random_error(3, 2600, dtype=dtype)
    whole = signals_of(error, [1300, 12], [1.0, 1.0], structured)
    shards = [
        signals_of(error[:, a:b], [1300, 12], [1.0, 1.0], structured, column_offset=a)
        for a, b in itertools.pairwise([0, 1, 700, 1024, 1024, 2047, 2600])
    ]
    tolerance = 100 * torch.finfo(dtype).eps
    for layer, expected in enumerate(whole):
        found = sum(shard[layer] for shard in shards)
        scale = error.norm(dim=1, keepdim=True)
        assert ((found - expected).abs() <= tolerance * scale).all()
    for empty in shards[3]:
        assert torch.equal(empty, torch.zeros_like(empty))


def test_nothing_to_make_takes_no_time(structured):
    """These would take years."""
    error = torch.empty(0, 10)
    (signal,) = signals_of(error, [2**45], [1.0], structured)
    assert signal.shape == (0, 2**45)


def test_equal_layers_are_one_tensor_and_the_error_is_left_alone(structured):
    error = random_error(2, 1100, device=structured.device)
    before = error.clone()
    options = {"distribution": "hadamard", "backend": structured.name}
    first, other, again = project(error, [8, 9, 8], **options)
    assert first is again
    assert first is not other
    assert torch.equal(error, before)
    expected = reference.structured_signals(before, [8, 9], layer_scales([8, 9], 1100))
    assert_same([first.cpu(), other.cpu()], map(torch.from_numpy, expected))
