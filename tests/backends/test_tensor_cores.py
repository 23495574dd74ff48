"""The projection by slabs on tensor cores, run on the CPU."""

import math

import pytest
import torch

from dfa_kernels.backends import tensor_cores
from dfa_kernels.layers import Layers
from dfa_kernels.stream import Stream
from tests import reference
from tests.conftest import assert_projected
from tests.reference import DENSE
from tests.samples import random_error

THOUSAND, SIGNS = Layers((0,), (1000,), (1.0,)), Stream(0, 0, "rademacher")


@pytest.fixture
def made():
    """The shapes of the pieces of U that were generated."""
    return []


@pytest.fixture
def lattice(made):
    """Generates pieces of U for `tensor_cores.project`."""

    def generate(rows, columns, row_offset, stream, dtype):
        made.append((rows, columns))
        u = reference.lattice(rows, columns, row_offset=row_offset, **stream._asdict())
        return torch.from_numpy(u).to(dtype)

    return generate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distribution", DENSE)
@pytest.mark.parametrize(("columns", "column_offset"), [(37, 3), (40, 16), (5, 8)])
def test_slabs(lattice, made, monkeypatch, distribution, dtype, columns, column_offset):
    """Slabs of one layer and of two; columns added on either side for alignment do not count."""
    monkeypatch.setattr(tensor_cores, "WORKSPACE_BYTES", 20_000)
    error = random_error(9, columns, dtype=dtype)
    layers = Layers((0, 20, 2**40), (150, 60, 7), (0.5, -2.0, 1.0))
    stream = Stream(5, column_offset, distribution)
    signals = tensor_cores.project(lattice, error, layers, stream, dtype)
    place = {"row_offsets": layers.row_offsets, **stream._asdict()}
    assert_projected(signals, error, layers.sizes, layers.scales, **place)
    assert sum(rows for rows, _ in made) == 157
    for rows, width in made:
        assert width % 8 == 0
        assert columns <= width < columns + 14
        copies = 4 if dtype == torch.float32 else 1
        assert 2 * rows * width * copies + 4 * 9 * rows <= 20_000


def test_the_last_columns_of_all(lattice, made):
    """Widening them for alignment does not go past the end of U."""
    error = random_error(3, 13, dtype=torch.bfloat16)
    place = {"row_offsets": [2**63 - 20], "column_offset": 2**34 - 13}
    layer, stream = Layers((2**63 - 20,), (20,), (1.0,)), Stream(0, 2**34 - 13, "normal")
    signals = tensor_cores.project(lattice, error, layer, stream, torch.bfloat16)
    assert_projected(signals, error, [20], [1.0], **place)
    assert made == [(20, 16)]


def test_one_layers_product_goes_right_into_it(lattice, monkeypatch):
    monkeypatch.setattr(tensor_cores, "product", None)
    layers = Layers((0, 500), (100, 200), (0.5, -2.0))
    error = random_error(4, 24, dtype=torch.bfloat16)
    error[2, 3] = math.nan
    stream = Stream(0, 0, "uniform")
    signals = tensor_cores.project(lattice, error, layers, stream, torch.bfloat16)
    assert all(signal[2].isnan().all() for signal in signals)
    rest = [signal[[0, 1, 3]] for signal in signals]
    place = {"row_offsets": layers.row_offsets, "distribution": "uniform"}
    assert_projected(rest, error[[0, 1, 3]], layers.sizes, layers.scales, **place)


def test_slabs_are_whole_steps_of_rows(lattice, made, monkeypatch):
    monkeypatch.setattr(tensor_cores, "WORKSPACE_BYTES", 100_000)
    error = random_error(3, 100, dtype=torch.bfloat16)
    tensor_cores.project(lattice, error, THOUSAND, SIGNS, torch.float32)
    assert [rows for rows, _ in made] == [384, 384, 232]


def test_slabs_that_need_no_sums_are_larger(lattice, made, monkeypatch):
    monkeypatch.setattr(tensor_cores, "WORKSPACE_BYTES", 100_000)
    error = random_error(100, 100, dtype=torch.bfloat16)
    for dtype, rows in ((torch.bfloat16, [384, 384, 232]), (torch.float32, [128] * 7 + [104])):
        made.clear()
        tensor_cores.project(lattice, error, THOUSAND, SIGNS, dtype)
        assert [shape[0] for shape in made] == rows
        in_place = dtype == torch.bfloat16
        assert tensor_cores.slab_count(1000, 100, 104, 1, in_place) == len(rows)


def test_an_error_of_many_rows_is_projected_a_part_at_a_time(lattice, made, monkeypatch):
    """Each part of the batch generates the entries again, and has room for its sums."""
    monkeypatch.setattr(tensor_cores, "_BATCH", 4)
    error = random_error(11, 9)
    layers = Layers((0, 10), (20, 30), (0.5, -2.0))
    signals = tensor_cores.project(lattice, error, layers, Stream(0, 0, "normal"), torch.float32)
    assert_projected(signals, error, layers.sizes, layers.scales, row_offsets=layers.row_offsets)
    assert [rows for rows, _ in made] == [40] * 3


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_split_sums_to_the_error(terms):
    error = torch.cat([random_error(1, 1000), torch.tensor([[1e-45, 3.4e38, -3.4e38, 0.0]])], 1)
    parts = tensor_cores.split(error, terms).double().view(terms, -1)
    assert parts.isfinite().all()
    left = (parts.sum(0) - error.double()).abs()
    bound = 2.0 ** (-8 * terms) * error.abs().double() + 1e-40
    assert (left <= bound[0] * (1 + (error[0].abs() > 3.39e38))).all()
    if terms == 3:
        assert torch.equal(parts.sum(0)[:1000], error[0, :1000].double())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_split_keeps_what_is_not_finite(value):
    parts = tensor_cores.split(torch.tensor([[value, 1.0]]), 3).view(3, 2)
    assert torch.equal(parts[2], torch.tensor([value, 1.0]).bfloat16()) or math.isnan(value)
    assert torch.equal(parts[:2], torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not math.isnan(value) or parts[2, 0].isnan()


def test_terms_follow_torchs_precision(precision):
    error = random_error(2, 3)
    for name, terms in (("highest", 3), ("high", 2), ("medium", 1)):
        precision(name)
        assert tensor_cores.terms_of(error) == terms
        assert tensor_cores.terms_of(error.bfloat16()) == 1
