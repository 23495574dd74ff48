"""The "cpp" kernels on each instruction set this CPU runs: entries bit for bit, sums to bounds."""

import math
import re

import numpy as np
import pytest
import torch

import dfa_kernels
from dfa_kernels.backends import cpp
from tests import reference
from tests.conftest import EPSILON, assert_projected, needs
from tests.reference import DENSE
from tests.samples import DTYPES

needs("the compiled extension", cpp.unavailable("cpu") is None)

CPU = torch.device("cpu")


def signed(seed):
    return seed - 2**64 if seed >= 2**63 else seed


def project(
    error, row_offsets, sizes, scales, seed=0, column_offset=0, distribution="normal", dtype=None
):
    return torch.ops.dfa_kernels.project.cpp(
        error, row_offsets, sizes, scales, signed(seed), column_offset, distribution, dtype
    )


def feedback_matrix(
    rows, columns, seed=0, row_offset=0, column_offset=0, distribution="normal", dtype=torch.float32
):
    return torch.ops.dfa_kernels.feedback_matrix.cpp(
        rows, columns, signed(seed), row_offset, column_offset, distribution, dtype, CPU
    )


def cpu_isa(force=None):
    return torch.ops.dfa_kernels.cpu_isa(force)


def available():
    """The instruction sets to test."""
    found = []
    for name in ("avx512_bf16", "avx512", "avx2", "portable"):
        try:
            cpu_isa(name)
            found.append(name)
        except RuntimeError:
            continue
    cpu_isa("")
    return found


@pytest.fixture(params=available())
def isa(request):
    assert cpu_isa(request.param) == request.param
    yield request.param
    cpu_isa("")


@pytest.fixture(params=(1, 2))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def expected(rows, columns, seed, row_offset, column_offset, distribution, dtype):
    """The unit-variance matrix as feedback_matrix defines it for the type."""
    return reference.matrix(
        rows,
        columns,
        seed=seed,
        row_offset=row_offset,
        column_offset=column_offset,
        distribution=distribution,
        dtype=dtype,
    )


def same(a, b):
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# The entries


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_codebook_values(isa, dtype):
    k = reference.indices(64, 4096, seed=5)
    assert np.unique(k).size == 4096
    want = torch.from_numpy(reference.CODEBOOK[k]).to(dtype)
    same(feedback_matrix(64, 4096, 5, dtype=dtype), want)
    (out,) = project(torch.eye(64, dtype=dtype), [0], [4096], [1.0], 5)
    same(out, expected(4096, 64, 5, 0, 0, "normal", dtype).T.contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DENSE)
def test_feedback_matrix(isa, threads, distribution, dtype):
    seed = 0x9E3779B97F4A7C15
    sizes = (1, 7, 8, 9, 127, 129)
    for i, (rows, columns) in enumerate((r, c) for r in sizes for c in sizes):
        row_offset = (0, 5, 2**32 - 3, 2**33 - 100, 2**63 - 130)[i % 5]
        column_offset = (0, 1, 7, 8, 100, 128, 129, 2**34 - 129)[i % 8]
        place = (rows, columns, seed, row_offset, column_offset, distribution, dtype)
        same(feedback_matrix(*place), expected(*place))


@pytest.mark.parametrize("distribution", DENSE)
def test_feedback_matrix_in_strips(isa, threads, distribution):
    place = (
        3,
        70_001,
        2,
        2**32 - 1,
        3,
        distribution,
        torch.float32,
    )  # one row is longer than a strip
    same(feedback_matrix(*place), expected(*place))
    place = (999, 131, 2, 2**32 - 500, 3, distribution, torch.float32)
    same(feedback_matrix(*place), expected(*place))


# The projection


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DENSE)
def test_projected_identity_is_the_matrix(isa, threads, distribution, dtype):
    """Bit for bit, through the projection's own generator: every sum has one nonzero term."""
    for i, size in enumerate((1, 7, 8, 9, 127, 129)):
        row_offset = (0, 5, 2**32 - 3, 2**33 - 100, 2**63 - 130, 17)[i]
        for n, column_offset in ((9, 0), (1, 7), (129, 127), (40, 2**34 - 40)):
            scale = 1 / math.sqrt(3) if distribution == "uniform" else 1.0
            (out,) = project(
                torch.eye(n, dtype=dtype),
                [row_offset],
                [size],
                [scale],
                3,
                column_offset,
                distribution,
            )
            lattice = reference.lattice(
                size,
                n,
                seed=3,
                row_offset=row_offset,
                column_offset=column_offset,
                distribution=distribution,
            )
            want = torch.from_numpy(lattice).T.contiguous()
            if distribution == "uniform":  # the scale is one rounding from 1
                torch.testing.assert_close(out.double(), want, rtol=2 * EPSILON[dtype], atol=0)
            else:
                same(out, want.to(dtype))


def check_projection(error, offsets, sizes, scales, seed, column_offset, distribution, dtype=None):
    outputs = project(error, offsets, sizes, scales, seed, column_offset, distribution, dtype)
    where = {"seed": seed, "column_offset": column_offset, "distribution": distribution}
    assert_projected(outputs, error, sizes, scales, row_offsets=offsets, dtype=dtype, **where)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DENSE)
def test_projection(isa, threads, distribution, dtype):
    for m in (*range(10), 12, 13, 25, 129):
        n = (10, 1, 8, 129, 600)[m % 5]
        offsets, sizes = [7, 2**32 - 5, 0, 7], [70, 40, 131, 70]
        error = torch.randn(m, n).to(dtype)
        check_projection(
            error, offsets, sizes, [0.5, -2.0, 1e-3, 0.25], 2**63 + 1, 3 * m, distribution
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_output_types(isa, dtype, out_dtype):
    error = torch.randn(5, 33).to(dtype)
    check_projection(error, [0, 3], [65, 1], [0.1, 1.0], 1, 1, "normal", out_dtype)


def test_column_tiles(isa, threads):
    """More columns than one tile, than several."""
    for m, n, size in ((3, 513, 70), (14, 1700, 300), (130, 1025, 150)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            check_projection(torch.randn(m, n).to(dtype), [1], [size], [0.1], 4, 5, "normal")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_streamed_error(dtype, threads):
    check_projection(torch.randn(1100, 8200).to(dtype), [9], [70], [0.1], 4, 5, "normal")
    check_projection(
        torch.randn(4200, 1537).to(dtype), [9, 0], [70, 10], [0.1, 1.0], 4, 0, "rademacher"
    )


def test_many_ranges(isa, threads):
    generator = torch.Generator().manual_seed(1)
    offsets = torch.randint(0, 3000, (2000,), generator=generator).tolist()
    sizes = torch.randint(1, 60, (2000,), generator=generator).tolist()
    scales = torch.rand(2000, generator=generator).tolist()
    error = torch.randn(3, 17, generator=generator)
    outputs = project(error, offsets, sizes, scales, 1)
    (whole,) = project(error, [0], [3100], [1.0], 1)
    for out, offset, size, scale in zip(outputs, offsets, sizes, scales, strict=True):
        torch.testing.assert_close(
            out, scale * whole[:, offset : offset + size], rtol=2.0**-23, atol=0
        )


def test_ranges_far_apart(isa):
    error = torch.randn(2, 19)
    offsets = [2**63 - 40, 0, 2**62, 2**32 - 1, 2**32, 31]
    check_projection(error, offsets, [40, 33, 1, 1, 70, 3], [1.0] * 6, 2**64 - 1, 11, "normal")


@pytest.mark.parametrize("error_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_signals_larger_than_the_caches(isa, dtype, error_dtype):
    """Streaming stores of whole cache lines give the same bits, wherever lines begin."""
    sizes, offsets, scales = (
        [1003, 900, 517, 803, 1],
        [0, 5, 3, 7, 1100],
        [0.5, 2.0, -1.0, 3.0, 4.0],
    )
    count = (80 << 20) // (sum(sizes) * dtype.itemsize)
    assert count * max(sizes) * dtype.itemsize < 32 << 20
    error = torch.randn(count, 3, generator=torch.Generator().manual_seed(0)).to(error_dtype)
    signals = project(error, offsets, sizes, scales, dtype=dtype)
    for rows in range(0, count, count // 4):
        part = slice(rows, rows + count // 4)
        expected = project(error[part], offsets, sizes, scales, dtype=dtype)
        assert all(torch.equal(s[part], e) for s, e in zip(signals, expected, strict=True))


def test_threads_do_not_change_bits(isa, threads):  # the fixture restores their number
    error = torch.randn(20, 700)
    outputs = []
    for count in (threads, 3 - threads):
        torch.set_num_threads(count)
        outputs.append(project(error, [0, 100], [1000, 2000], [0.3, 0.7], 8))
    for a, b in zip(*outputs, strict=True):
        same(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DENSE)
def test_batch_does_not_change_bits(isa, distribution, dtype):
    """One error or two are multiplied with entries as they are made, more with a stored tile."""
    generator = torch.Generator().manual_seed(0)
    for n, column_offset in ((5, 0), (3, 4), (16, 8), (131, 127), (1700, 5), (9000, 2**34 - 9000)):
        error = torch.randn(5, n, generator=generator).to(dtype)
        where = [3, 2**32 - 20], [70, 40], [0.3, 0.7], 8, column_offset, distribution
        for m in (1, 2):
            for whole, few in zip(project(error, *where), project(error[:m], *where), strict=True):
                same(whole[:m], few)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [10, 700])
def test_a_signal_is_the_same_whether_other_layers_share_its_rows(isa, n, dtype):
    """A layer alone is written by the product itself, layers that share rows in a second step."""
    error = torch.randn(14, n).to(dtype)
    (alone,) = project(error, [5], [1000], [0.3])
    beside = project(error, [5, 900], [1000, 64], [0.3, 0.7])
    twice = project(error, [5, 5], [1000, 1000], [0.3, 0.7])
    same(alone, beside[0])
    same(alone, twice[0])
    assert alone[:, 900].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("distribution", DENSE)
def test_non_finite_errors(isa, distribution, dtype, bad):
    error = torch.randn(14, 30).to(dtype)
    error[3, 4] = bad
    error[9, 29] = bad
    (out,) = project(error, [0], [100], [1.0], 0, 0, distribution)
    for m in (3, 9):
        (one,) = project(error[m : m + 1], [0], [100], [1.0], 0, 0, distribution)
        torch.testing.assert_close(one, out[m : m + 1], rtol=0, atol=0, equal_nan=True)
    finite = torch.ones(14, dtype=torch.bool)
    finite[[3, 9]] = False
    assert out[finite].isfinite().all()
    want = error.double() @ expected(100, 30, 0, 0, 0, distribution, torch.float64).T
    assert (out[~finite].isnan() == want[~finite].isnan()).all()
    assert (out[~finite].isinf() == want[~finite].isinf()).all()
    assert not out[~finite].isfinite().any()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_nan_payloads_stay_nan(isa, out_dtype):
    """Rounding a NaN whose significand is all ones must not carry into the sign."""
    error = torch.full((1, 1), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    (out,) = project(error, [0], [40], [1.0], dtype=out_dtype)
    assert out.isnan().all()


def test_overflow_rounds_to_infinity(isa):
    for dtype, out_dtype in ((torch.float32, torch.float16), (torch.float64, torch.bfloat16)):
        (out,) = project(
            torch.full((2, 3), 1e38, dtype=dtype), [0], [50], [1e3], 0, 0, "rademacher", out_dtype
        )
        assert out.isinf().all()


def test_float16_rounds_once(isa):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    values = values[values.isfinite()]
    near = torch.cat([values.float() * f for f in (1.0, 1.0003, 0.9997, 1.00048828125)])
    (out,) = project(near[:, None], [0], [1], [1.0], 0, 2, "rademacher", torch.float16)  # U = 1
    same(out[:, 0], near.half())
    (out,) = project(near[:, None].double(), [0], [1], [1.0], 0, 2, "rademacher", torch.bfloat16)
    same(out[:, 0], near.bfloat16())


def test_double_rounds_once(isa):
    """Values off a rounding midpoint by less than fp32 can hold: rounding twice would show."""
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        middle = 1 + 2.0**-bits
        error = torch.tensor(
            [[middle + 2.0**-40], [middle - 2.0**-40], [middle]], dtype=torch.float64
        )
        (out,) = project(error, [0], [1], [1.0], 0, 2, "rademacher", dtype)  # U = 1
        assert out.flatten().tolist() == [1 + 2.0 ** (1 - bits), 1.0, 1.0]


def test_strided_and_empty_errors(isa):
    base = torch.randn(40, 60)
    for error in (base.T, base[::2, 1::3], base[:1].expand(9, 60), base[:, :0], base[:0]):
        check_projection(error, [3], [37], [2.0], 0, 0, "normal")
    assert project(base, [], [], []) == []


# Few rows: tiles of single rows, and threads that share the columns


FEW = ([1], [2], [3], [5], [8], [16], [31], [33], [1, 3, 2, 1])


def far_apart(sizes):
    return [2**32 - 1 + i * 2**40 for i in range(len(sizes))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DENSE)
def test_entries_of_few_rows(isa, distribution, dtype):
    """Bit for bit: every sum has one nonzero term."""
    n, first = 17_000, 2**33 - 13
    columns = torch.tensor([0, 1, 5, 6, 2035, 2036, 2037, 9001, n - 2, n - 1])
    error = torch.zeros(len(columns), n, dtype=dtype)
    error[torch.arange(len(columns)), columns] = 1
    scale = 1 / math.sqrt(3) if distribution == "uniform" else 1.0
    for sizes in FEW:
        offsets = far_apart(sizes)
        signals = project(error, offsets, sizes, [scale] * len(sizes), 9, first, distribution)
        for offset, size, signal in zip(offsets, sizes, signals, strict=True):
            place = {"seed": 9, "row_offset": offset, "distribution": distribution}
            want = np.concatenate(
                [
                    reference.lattice(size, 1, column_offset=first + c, **place)
                    for c in columns.tolist()
                ],
                axis=1,
            ).T
            if distribution == "uniform":  # the scale is one rounding from 1
                torch.testing.assert_close(
                    signal.double(), torch.from_numpy(want), rtol=2 * EPSILON[dtype], atol=0
                )
            else:
                same(signal, torch.from_numpy(want.copy()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DENSE)
def test_few_rows(isa, threads, distribution, dtype):
    for i, sizes in enumerate(FEW):
        m, n = (1, 2, 3, 4, 5, 32)[i % 6], (17_003, 64, 4500, 1000)[i % 4]
        error = torch.randn(m, n).to(dtype)
        check_projection(error, far_apart(sizes), sizes, [0.5] * len(sizes), 1, 3 * i, distribution)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_of_a_streamed_error(isa, dtype):
    """A 16-bit error is packed by pieces of its columns, which no sum depends on."""
    error = torch.randn(270, 17_003, generator=torch.Generator().manual_seed(0)).to(dtype)
    for sizes in ([1], [20]):
        check_projection(error[:60], [5], sizes, [0.1], 3, 1, "rademacher")
        (whole,) = project(error, [5], sizes, [0.1], 3, 1, "rademacher")
        (part,) = project(error[:60].contiguous(), [5], sizes, [0.1], 3, 1, "rademacher")
        same(whole[:60], part)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_batch_change_bits_of_few_rows(isa, threads, dtype):
    error = torch.randn(7, 40_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for sizes in ([1], [5], [16], [1, 3, 2, 1]):
        where = far_apart(sizes), sizes, [0.3] * len(sizes), 8
        signals = project(error, *where)
        torch.set_num_threads(3 - threads)  # the fixture restores it
        for m in range(len(error)):
            for whole, one in zip(signals, project(error[m : m + 1], *where), strict=True):
                same(whole[m : m + 1], one)
        torch.set_num_threads(threads)


# The boundary


LONGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": torch.zeros(3)}, "error must have 2 dimensions, got 1"),
        ({"scales": []}, "scales must have one entry per size (1), got 0"),
        ({"sizes": [2**62]}, f"output must fit in memory, got [2, {2**62}]"),
        ({"sizes": [2**55]}, f"output must fit in memory, got [2, {2**55}]"),
    ],
)
def test_project_says_what_is_wrong(change, message):
    arguments = {"error": torch.zeros(2, 3), "row_offsets": [0], "sizes": [4], "scales": [1.0]}
    with pytest.raises(RuntimeError, match=f"^project: {re.escape(message)}$"):
        project(**(arguments | change))


@pytest.mark.parametrize(
    "bad",
    [
        {"error": torch.zeros(2, 3, dtype=torch.int64)},
        {"error": torch.zeros(2, 3, dtype=torch.complex64)},
        {"dtype": torch.int32},
        {"sizes": [4, -1], "row_offsets": [0, 0]},
        {"sizes": [0]},
        {"row_offsets": [-1]},
        {"row_offsets": [LONGEST]},
        {"row_offsets": [0, 0]},
        {"column_offset": -1},
        {"column_offset": 2**34},
        {"distribution": "cauchy"},
    ],
)
def test_project_says_it_in_the_words_of_the_python_checks(bad):
    public = {"error": torch.zeros(2, 3), "sizes": [4], **bad}
    with pytest.raises((TypeError, ValueError)) as python:
        dfa_kernels.project(**public)
    operator = {"row_offsets": [0], "scales": [1.0] * len(public["sizes"]), **public}
    with pytest.raises(RuntimeError) as extension:
        project(**operator)
    assert str(extension.value) == str(python.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"rows": -1},
        {"columns": -2},
        {"columns": 2**34 + 1},
        {"row_offset": -1},
        {"row_offset": LONGEST},
        {"column_offset": 2**34},
        {"dtype": torch.int8},
        {"distribution": "cauchy"},
    ],
)
def test_feedback_matrix_says_it_in_the_words_of_the_python_checks(bad):
    arguments = {"rows": 2, "columns": 3, **bad}
    with pytest.raises((TypeError, ValueError)) as python:
        dfa_kernels.feedback_matrix(**arguments)
    with pytest.raises(RuntimeError) as extension:
        feedback_matrix(**arguments)
    assert str(extension.value) == str(python.value)


@pytest.mark.parametrize(("rows", "columns"), [(2**62, 2**33), (2**40, 2**20)])
def test_absurd_sizes_raise(rows, columns):
    message = f"^feedback_matrix: output must fit in memory, got \\[{rows}, {columns}\\]$"
    with pytest.raises(RuntimeError, match=message):
        feedback_matrix(rows, columns)


def test_isa_says_what_is_wrong():
    with pytest.raises(RuntimeError, match=r"cpu_isa: force must be .* got mmx"):
        cpu_isa("mmx")
    assert cpu_isa("portable") == cpu_isa() == "portable"
    assert cpu_isa("") != "mmx"
