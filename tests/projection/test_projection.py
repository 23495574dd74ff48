"""`project` against the definition written out in float64, on every backend."""

import itertools
import math

import pytest
import torch
from torch.autograd import forward_ad

import dfa_kernels
from dfa_kernels import feedback_matrix, project
from dfa_kernels.backends import slabs
from tests import reference
from tests.conftest import assert_projected
from tests.reference import DENSE
from tests.samples import DTYPES, layer_scales, random_error

SIZES = [33, 7, 33, 1, 129]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DENSE)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 127, 129])
def test_definition(target, distribution, dtype, n):
    error = random_error(5, n, dtype=dtype, device=target.device)
    signals = project(error, SIZES, seed=11, distribution=distribution, backend=target.name)
    scales = layer_scales(SIZES, n)
    assert_projected(signals, error, SIZES, scales, seed=11, distribution=distribution)


@pytest.mark.parametrize("lead", [(), (1,), (6,), (2, 3), (2, 1, 3)])
def test_leading_dimensions_are_batch_dimensions(target, lead):
    error = random_error(*lead, 10, device=target.device)
    (signal,) = project(error, [12], backend=target.name)
    assert signal.shape == (*lead, 12)
    (flat,) = project(error.reshape(-1, 10), [12], backend=target.name)
    torch.testing.assert_close(signal.reshape(-1, 12), flat, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 9, 16, 17, 200])
def test_batch_sizes(target, count):
    error = random_error(count, 37, device=target.device)
    signals = project(error, [50, 21], backend=target.name)
    assert_projected(signals, error, [50, 21], layer_scales([50, 21], 37))


def test_one_layer_and_a_thousand(target):
    error = random_error(3, 10, device=target.device)
    for sizes in ([17], [1 + 37 * i % 101 for i in range(1000)]):
        signals = project(error, sizes, backend=target.name)
        assert_projected(signals, error, sizes, layer_scales(sizes, 10))


def test_many_slabs(target):
    """More rows and columns than fit in one slab, and layers that begin and end inside slabs."""
    assert slabs.slab_shape(10, torch.device("cpu"))[0] < 40_000
    device = torch.device(target.device)
    n = 5000 if device.type == "cpu" else 50_000
    rows, columns = slabs.slab_shape(n, device)
    assert rows < 70
    assert 2 * columns < n
    error = random_error(2, 10, device=target.device)
    sizes, offsets = [40_000, 11, 20_000, 300], [0, 39_980, 30_000, 13_000]
    signals = project(error, sizes, row_offsets=offsets, backend=target.name)
    assert_projected(signals, error, sizes, layer_scales(sizes, 10), row_offsets=offsets)
    error = random_error(2, n, device=target.device, dtype=torch.float64)
    signals = project(error, [70, 3], backend=target.name)
    assert_projected(signals, error, [70, 3], layer_scales([70, 3], n))


def test_row_offsets_anywhere(target):
    """Independent, overlapping, repeated and far-apart row ranges, in no particular order."""
    sizes = [5, 40, 5, 9, 1, 9, 3]
    offsets = [2**62, 3, 20, 2**32 - 4, 2**63 - 1, 2**32 - 4, 60]
    error = random_error(4, 19, device=target.device)
    signals = project(error, sizes, row_offsets=offsets, seed=2**64 - 1, backend=target.name)
    scales = layer_scales(sizes, 19)
    assert_projected(signals, error, sizes, scales, row_offsets=offsets, seed=2**64 - 1)


@pytest.mark.parametrize("distribution", DENSE)
def test_shards_of_the_error_sum_to_the_whole(target, distribution):
    error = random_error(4, 301, dtype=torch.float64, device=target.device)
    options = {"seed": 5, "distribution": distribution, "backend": target.name}
    whole = project(error, [30, 12], **options)
    cuts = [0, 1, 130, 256, 301]
    shards = [
        project(error[:, a:b], [30, 12], column_offset=a, error_size=301, **options)
        for a, b in itertools.pairwise(cuts)
    ]
    for layer, expected in enumerate(whole):
        torch.testing.assert_close(sum(shard[layer] for shard in shards), expected)
    (empty,) = project(error[:, :0], [30], error_size=301, **options)
    assert torch.equal(empty, torch.zeros_like(empty))


def test_column_offset_selects_columns(target):
    error = random_error(3, 20, device=target.device)
    for offset in (5, 127, 2**34 - 20):
        signals = project(error, [9], column_offset=offset, backend=target.name)
        assert_projected(signals, error, [9], layer_scales([9], 20), column_offset=offset)


@pytest.mark.parametrize(
    ("normalization", "scales"),
    [
        ("layer", [1 / math.sqrt(4 * 10), 1 / math.sqrt(9 * 10)]),
        ("shared", [1 / math.sqrt(9 * 10)] * 2),
        (0.25, [0.25, 0.25]),
        (2, [2.0, 2.0]),
        ([1.0, -3.0], [1.0, -3.0]),
    ],
)
def test_normalization(backend, normalization, scales):
    error = random_error(3, 10)
    signals = project(error, [4, 9], normalization=normalization, backend=backend)
    assert_projected(signals, error, [4, 9], scales)


def test_signals_have_the_variance_the_normalization_promises(backend):
    """Eq. 8: the signal of every layer has mean square |e|^2 / (n l_i)."""
    error = random_error(64, 100)
    for size, signal in zip([20_000, 5_000], project(error, [20_000, 5_000]), strict=True):
        expected = error.square().mean(1) / size
        torch.testing.assert_close(signal.square().mean(1), expected, rtol=0.1, atol=0)


def test_equal_layers_are_one_tensor(target):
    error = random_error(2, 10, device=target.device)
    first, other, again = project(error, [8, 9, 8], backend=target.name)
    assert first is again
    assert first is not other
    scaled, unscaled = project(error, [8, 8], normalization=[1.0, 2.0], backend=target.name)
    assert scaled is not unscaled
    here, there = project(error, [8, 8], row_offsets=[0, 8], backend=target.name)
    assert here is not there


def test_sliced_layers_agree_with_the_materialised_matrix(backend):
    """Eq. 8 in plain PyTorch, as the docstring of `project` writes it."""
    error = random_error(3, 12, dtype=torch.float64)
    sizes = [30, 11, 24]
    u = feedback_matrix(max(sizes), 12, seed=6, dtype=torch.float64, backend=backend)
    for signal, size in zip(project(error, sizes, seed=6, backend=backend), sizes, strict=True):
        torch.testing.assert_close(signal, error @ u[:size].T / math.sqrt(size * 12))


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_dtype(target, dtype):
    error = random_error(3, 10, device=target.device)
    (signal,) = project(error, [6], dtype=dtype, backend=target.name)
    assert_projected([signal], error, [6], layer_scales([6], 10), dtype=dtype)


def test_non_contiguous_error(target):
    wide = random_error(10, 2, 14, device=target.device)
    for error in (wide[..., ::2], wide.transpose(0, 2), wide[:, :1].expand(10, 5, 14), wide[2, 1]):
        (signal,) = project(error, [9], backend=target.name)
        (expected,) = project(error.contiguous(), [9], backend=target.name)
        assert torch.equal(signal, expected)


def test_empty_batch(target):
    for shape in ((0, 10), (3, 0, 10)):
        error = torch.empty(shape, device=target.device)
        (signal,) = project(error, [6], backend=target.name)
        assert signal.shape == (*shape[:-1], 6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_propagate_as_in_a_matrix_product(target, value):
    error = random_error(3, 10, device=target.device)
    error[1, 4] = value
    (signal,) = project(error, [40], backend=target.name)
    column = feedback_matrix(40, 1, column_offset=4).flatten()
    assert signal[[0, 2]].isfinite().all()
    if math.isnan(value):
        assert signal[1].isnan().all()
    else:
        assert torch.equal(signal[1].cpu(), value * column)


def test_the_error_is_left_alone(target):
    error = random_error(3, 10, device=target.device)
    before = error.clone()
    project(error, [6, 7], backend=target.name)
    assert torch.equal(error, before)


def test_calls_are_reproducible(target):
    error = random_error(64, 100, device=target.device)
    first, second = (project(error, [500], backend=target.name)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_gradient_of_the_error(target):
    """The projection is linear: gradcheck to the second order, shared and independent rows."""
    error = random_error(2, 3, 5, dtype=torch.float64, device=target.device).requires_grad_()

    def signals(error):
        options = {"row_offsets": [0, 3, 0], "seed": 3, "backend": target.name}
        return tuple(project(error, [4, 6, 4], **options))

    assert torch.autograd.gradcheck(signals, error)
    assert torch.autograd.gradgradcheck(signals, error)


def test_forward_mode_gradient(target):
    error, tangent = random_error(2, 3, 5), random_error(2, 3, 5, seed=1)

    def signals(error):
        return project(error.to(target.device), [4, 6], seed=3, backend=target.name)

    expected = signals(tangent)
    with forward_ad.dual_level():
        dual = signals(forward_ad.make_dual(error, tangent))
        for signal, wanted in zip(dual, expected, strict=True):
            assert torch.equal(forward_ad.unpack_dual(signal).tangent, wanted)
    _, tangents = torch.func.jvp(signals, (error,), (tangent,))
    for made, wanted in zip(tangents, expected, strict=True):
        assert torch.equal(made, wanted)


def test_nothing_to_make_takes_no_time(target):
    """Empty results generate no entries; these would take years."""
    empty = torch.empty(0, 10, device=target.device)
    assert project(empty, [2**45], backend=target.name)[0].shape == (0, 2**45)
    matrix = feedback_matrix(2**45, 0, device=target.device, backend=target.name)
    assert matrix.shape == (2**45, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_every_dtype_and_over_many_slabs(target, dtype):
    error = random_error(3, 50, dtype=dtype, device=target.device).requires_grad_()
    (signal,) = project(error, [9000], seed=8, backend=target.name)
    signal.sum().backward()
    u = reference.matrix(9000, 50, seed=8)
    expected = (u.sum(0) / math.sqrt(9000 * 50)).expand(3, 50)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(error.grad.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def test_every_entry_is_made_once(monkeypatch):
    """One call generates the union of the layers' rows, for any number of layers and any batch."""
    made = []
    entries = dfa_kernels.stream.entries

    def counted(rows, columns, *others):
        made.append(rows * columns)
        return entries(rows, columns, *others)

    monkeypatch.setattr(dfa_kernels.stream, "entries", counted)
    for count in (1, 3, 5000):
        made.clear()
        project(
            random_error(count, 30), [100, 40, 77, 60], row_offsets=[0, 0, 0, 90], backend="torch"
        )
        assert sum(made) == 150 * 30
