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
def test_slabs(on_the_cpu, monkeypatch, distribution, dtype):
    monkeypatch.setattr(slabs, "WORKSPACE_BYTES", 20_000)
    error = random_error(9, 37, dtype=dtype)
    layers = ([0, 20, 2**40], [150, 60, 7], [0.5, -2.0, 1.0])
    signals = cuda._project_by_slabs(
        error, *layers, 5, 3, distribution, dtype, 3 if dtype == torch.float32 else 1
    )
    place = {"row_offsets": layers[0], "seed": 5, "column_offset": 3}
    assert_projected(signals, error, layers[1], layers[2], distribution=distribution, **place)
    assert sum(rows for rows, _ in on_the_cpu) == 157
    for rows, columns in on_the_cpu:
        copies = 4 if dtype == torch.float32 else 1
        assert 2 * rows * columns * copies + 4 * 9 * rows <= 20_000


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
    assert not cuda.prefers_slabs(200_000, 128, 1000, 1)
    assert not cuda.prefers_slabs(200_000, 64, 1000, 3)
    assert not cuda.prefers_slabs(800, 4096, 10, 3)
    assert not cuda.prefers_slabs(10**6, 128, 10, 3)
    assert cuda.prefers_slabs(200_000, 4096, 1000, 1)
    assert cuda.prefers_slabs(200_000, 4096, 1000, 3)
    assert not cuda.prefers_slabs(10**6, 4096, 0, 1)
    for rows in range(1, 5000):
        if cuda.prefers_slabs(200_000, rows, 1000, 1):
            assert cuda.prefers_slabs(200_000, rows, 50_000, 1)


def test_why_not():
    assert cuda.unavailable("cpu").startswith("it serves CUDA devices only")
    assert cuda.unavailable("mps").startswith("it serves CUDA devices only")
    reason = cuda.unavailable("cuda")
    assert reason is None or "CUDA" in reason or "compute capability" in reason
