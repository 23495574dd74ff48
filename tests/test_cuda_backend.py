"""What the "cuda" backend decides in Python, and its slabs, run on the CPU."""

import math

import pytest
import reference
import torch
from conftest import assert_projected

from dfa_kernels.backends import cuda, slabs

DISTRIBUTIONS = ("normal", "uniform", "rademacher")


def random_error(rows, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator).to(dtype)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The slabs' two operators on the CPU; the shapes they were asked for."""
    made = []

    def lattice(rows, columns, seed, row_offset, column_offset, distribution, dtype, device):
        made.append((rows, columns))
        place = {"row_offset": row_offset, "column_offset": column_offset}
        u = reference.lattice(rows, columns, seed=seed, distribution=distribution, **place)
        return torch.from_numpy(u).to(dtype)

    def multiply(left, right):
        assert left.dtype == right.dtype
        assert left.dtype in (torch.bfloat16, torch.float16)
        return left.float() @ right.float()

    monkeypatch.setattr(torch.ops.dfa_kernels, "cuda_lattice", lattice, raising=False)
    monkeypatch.setattr(cuda, "_multiply", multiply)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("columns", "column_offset"), [(37, 3), (40, 16), (5, 8)])
def test_slabs(on_the_cpu, monkeypatch, distribution, dtype, columns, column_offset):
    """Slabs of one layer and of two; what is before and behind the columns is no part of them."""
    monkeypatch.setattr(slabs, "WORKSPACE_BYTES", 20_000)
    error = random_error(9, columns, dtype=dtype)
    layers = ([0, 20, 2**40], [150, 60, 7], [0.5, -2.0, 1.0])
    signals = cuda._project_by_slabs(
        error, *layers, 5, column_offset, distribution, dtype, 3 if dtype == torch.float32 else 1
    )
    place = {"row_offsets": layers[0], "seed": 5, "column_offset": column_offset}
    assert_projected(signals, error, layers[1], layers[2], distribution=distribution, **place)
    assert sum(rows for rows, _ in on_the_cpu) == 157
    for rows, made in on_the_cpu:
        assert made % 8 == 0
        assert columns <= made < columns + 14
        copies = 4 if dtype == torch.float32 else 1
        assert 2 * rows * made * copies + 4 * 9 * rows <= 20_000


def test_the_last_columns_of_all(on_the_cpu):
    """Aligned, they still end where U ends."""
    error = random_error(3, 13, dtype=torch.bfloat16)
    place = {"row_offsets": [2**63 - 20], "column_offset": 2**34 - 13}
    signals = cuda._project_by_slabs(
        error, [2**63 - 20], [20], [1.0], 0, 2**34 - 13, "normal", torch.bfloat16, 1
    )
    assert_projected(signals, error, [20], [1.0], **place)
    assert on_the_cpu == [(20, 16)]


def test_one_layers_product_goes_right_into_it(on_the_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "_multiply", None)
    layers = ([0, 500], [100, 200], [0.5, -2.0])
    error = random_error(4, 24, dtype=torch.bfloat16)
    error[2, 3] = math.nan
    signals = cuda._project_by_slabs(error, *layers, 0, 0, "uniform", torch.bfloat16, 1)
    assert all(signal[2].isnan().all() for signal in signals)
    rest = [signal[[0, 1, 3]] for signal in signals]
    place = {"row_offsets": layers[0], "distribution": "uniform"}
    assert_projected(rest, error[[0, 1, 3]], layers[1], layers[2], **place)


def test_slabs_are_whole_steps_of_rows(on_the_cpu, monkeypatch):
    monkeypatch.setattr(slabs, "WORKSPACE_BYTES", 100_000)
    error = random_error(3, 100, dtype=torch.bfloat16)
    cuda._project_by_slabs(error, [0], [1000], [1.0], 0, 0, "rademacher", torch.float32, 1)
    assert [rows for rows, _ in on_the_cpu] == [384, 384, 232]


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_split_sums_to_the_error(terms):
    error = torch.cat([random_error(1, 1000), torch.tensor([[1e-45, 3.4e38, -3.4e38, 0.0]])], 1)
    parts = cuda.split(error, terms).double().view(terms, -1)
    assert parts.isfinite().all()
    left = (parts.sum(0) - error.double()).abs()
    bound = 2.0 ** (-8 * terms) * error.abs().double() + 1e-40
    assert (left <= bound[0] * (1 + (error[0].abs() > 3.39e38))).all()
    if terms == 3:
        assert torch.equal(parts.sum(0)[:1000], error[0, :1000].double())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_split_keeps_what_is_not_finite(value):
    parts = cuda.split(torch.tensor([[value, 1.0]]), 3).view(3, 2)
    assert torch.equal(parts[2], torch.tensor([value, 1.0]).bfloat16()) or math.isnan(value)
    assert torch.equal(parts[:2], torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not math.isnan(value) or parts[2, 0].isnan()


def test_terms_follow_torchs_precision():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, terms in (("highest", 3), ("high", 2), ("medium", 1)):
            torch.set_float32_matmul_precision(precision)
            assert cuda.TERMS[torch.get_float32_matmul_precision()] == terms
    finally:
        torch.set_float32_matmul_precision(before)


def test_which_way():
    """Few rows of error, or little to make: fused. Many: slabs, and sooner with more columns."""

    def by_slabs(
        sizes, rows, columns, terms, distribution="normal", in_place=False, row_offsets=None
    ):
        offsets = row_offsets or [0] * len(sizes)
        return cuda.prefers_slabs(offsets, sizes, rows, columns, terms, distribution, in_place)

    large = [200_000]
    for distribution in DISTRIBUTIONS:
        for in_place in (False, True):
            for rows in (0, 1, 64, 128):
                assert not by_slabs(large, rows, 1000, 1, distribution, in_place)
    assert not by_slabs(large, 64, 1000, 3)
    assert not by_slabs([800], 4096, 10, 3)
    assert not by_slabs([10**6], 128, 10, 3)
    assert by_slabs(large, 4096, 1000, 1)
    assert by_slabs(large, 4096, 1000, 3)
    assert by_slabs(large, 1024, 1000, 1, in_place=True)
    assert not by_slabs(large, 1024, 1000, 1, "rademacher", in_place=True)
    assert not by_slabs([10**6], 4096, 0, 1)
    for rows in range(1, 5000, 7):
        if by_slabs(large, rows, 1000, 1):
            assert by_slabs(large, rows, 50_000, 1)
            assert by_slabs(large, rows, 1000, 1, in_place=True)
    # Every slab and layer is a launch more, and what layers share is made once.
    assert not by_slabs([3_211_264], 1024, 40, 1, in_place=True)
    many = [2049 + 43 * i for i in range(48)]
    own = [5000 * i for i in range(48)]
    assert by_slabs(many, 2048, 8000, 1, row_offsets=own)
    assert not by_slabs(many, 2048, 8000, 1)
    assert not by_slabs([10] * 20_000, 4096, 1000, 1, row_offsets=[10 * i for i in range(20_000)])


def test_union_rows():
    offsets, sizes = [30, 0, 5, 100, 0, 20], [10, 10, 10, 7, 3, 10]
    covered = {row + i for row, size in zip(offsets, sizes, strict=True) for i in range(size)}
    assert slabs.union_rows(offsets, sizes) == len(covered)


def test_why_not():
    assert cuda.unavailable("cpu").startswith("it serves CUDA devices only")
    assert cuda.unavailable("mps").startswith("it serves CUDA devices only")
    reason = cuda.unavailable("cuda")
    assert reason is None or "CUDA" in reason or "compute capability" in reason
