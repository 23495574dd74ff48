"""Statistics of the structured matrix: entries like normal ones, but dependent on one another.

With U[B, b] = H D3(B, b) H D2(b) H D1(b) / 1024 the dependence has exact laws, which are tested as
equalities. What is random has a law too: an entry is a sum of 1024 signs, whose weights are the
Walsh spectrum of D2(b). The backends' guide states the figures.
"""

import math

import pytest
import torch
from scipy import stats

from dfa_kernels import feedback_matrix, hadamard, project
from tests import reference

ALPHA = 1e-6  # the chance that one test rejects a perfect stream; seeds are fixed
KURTOSIS = 3 - 6 / 1024 + 4 / 1024**2
EYE = torch.eye(1024, dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("one_thread")


def matrix(rows, columns, **where):
    return feedback_matrix(rows, columns, distribution="hadamard", **where).double()


def normal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def condition(u):
    """The largest singular value over the smallest."""
    values = torch.linalg.svdvals(u)
    return (values[0] / values[-1]).item()


def outer_signs(seed, output_blocks, input_blocks):
    """D3 of the blocks from the first on: [1024, output blocks, input blocks]."""
    signs = [
        [torch.from_numpy(reference.diagonal(3, seed, b, block)) for b in range(input_blocks)]
        for block in range(output_blocks)
    ]
    return torch.stack([torch.stack(row, -1) for row in signs], -2)


# --- one entry ---


def independent_entries(blocks=4000, backend=None):
    """Entries of one column, in many output blocks and with 5 seeds: D3 is new for each of them."""
    rows = [1024 * block + block % 1024 for block in range(blocks)]
    options = {"normalization": 1.0, "distribution": "hadamard", "backend": backend}
    for seed in range(5):
        where = {"seed": seed, "row_offsets": rows, "column_offset": 333, "error_size": 334}
        signals = project(torch.ones(1, 1), [1] * blocks, **where, **options)
        yield torch.cat(signals, 1).flatten().double()


def entry_p_values(**which):
    """Of a Kolmogorov-Smirnov test for N(0,1), of the mean, the variance and the kurtosis.

    Entries are integers over 256, which moves the distance by less than 0.0008.
    """
    entries = torch.cat(list(independent_entries(**which)))
    count = len(entries)
    distance = stats.kstest(entries.numpy(), "norm").statistic
    z = torch.stack([
        entries.mean(),
        (entries.square().mean() - 1) / math.sqrt(2),
        (entries.pow(4).mean() - KURTOSIS) / math.sqrt(96),  # E x^8 - (E x^4)^2 of normal numbers
    ]) * math.sqrt(count)  # fmt: skip
    moments = 2 * torch.special.ndtr(-z.abs())
    return [stats.kstwo.sf(max(distance - 0.0008, 0), count), *moments.tolist()]


def test_an_entry_looks_normal():
    assert min(entry_p_values()) > ALPHA / 4


def test_without_the_last_signs_none_does(monkeypatch):
    """Two transforms and two diagonals then make mere signs, as H H = 1024."""

    def signs(domain, *where):
        return made(domain, *where).abs() if domain == 3 else made(domain, *where)

    made = hadamard.signs
    monkeypatch.setattr(hadamard, "signs", signs)
    ks, _, _, kurtosis = entry_p_values(blocks=300, backend="torch")
    assert max(ks, kurtosis) < ALPHA


def test_variance_and_kurtosis_over_blocks():
    """The mean square of every row and column is 1 exactly. E U^4 = 3 - 2 sum w^4 / 1024^4 for a
    sum of signs with weights w, and the spectrum w of 1024 signs has E w^4 = 3 * 1024^2 - 2 * 1024.
    """
    fourth, largest = [], []
    for seed in range(16):
        u = matrix(1024, 1024, seed=seed, row_offset=1024 * seed)
        assert torch.equal(u.square().mean(0), torch.ones(1024, dtype=torch.float64))
        assert torch.equal(u.square().mean(1), torch.ones(1024, dtype=torch.float64))
        fourth.append(u.pow(4).mean().item())
        largest.append(u.abs().max().item())
    assert pytest.approx(2.9941, abs=1e-4) == KURTOSIS
    assert stats.ttest_1samp(fourth, KURTOSIS).pvalue > ALPHA
    assert abs(sum(fourth) / 16 - KURTOSIS) < 0.02
    # The largest of 2^20 normal numbers: 4.4 to 6.7 with all but 1e-5 of the chance.
    assert 4.4 < min(largest) < max(largest) < 6.7


def test_the_signs_are_balanced_and_no_two_diagonals_are_alike():
    """Of 600 diagonals of all three kinds, and of a row of rademacher entries."""
    dense = feedback_matrix(1, 200 * 1024, seed=3, distribution="rademacher").double()
    kinds = [dense.view(200, 1024)] + [
        torch.stack([torch.from_numpy(reference.diagonal(d, 3, b, 0)) for b in range(200)])
        for d in (1, 2, 3)
    ]
    every = torch.cat(kinds)  # [800, 1024]
    products = every @ every.T / 32
    z = products[torch.triu_indices(800, 800, 1).unbind()]
    assert z.abs().max() < -stats.norm.ppf(ALPHA / 2 / len(z))
    assert abs((every.sum() / math.sqrt(every.numel())).item()) < -stats.norm.ppf(ALPHA / 2)


# --- dependence ---


def test_rows_and_columns_of_a_block_are_orthogonal():
    u = matrix(1024, 1024, seed=5, row_offset=2048, column_offset=1024)
    assert torch.equal(u @ u.T, 1024 * EYE)
    assert torch.equal(u.T @ u, 1024 * EYE)


def test_rows_of_two_output_blocks_have_a_spectrum_for_inner_products():
    """1024 numbers instead of 2^20: those of rows i and j are equal wherever i ^ j is.

    Their mean square is 1024, as that of independent entries, exactly.
    """
    u = matrix(2048, 1024, seed=7)
    products = u[:1024] @ u[1024:].T
    spectrum = hadamard.fwht(outer_signs(7, 2, 1)[:, :, 0].prod(1))
    place = torch.arange(1024)
    assert torch.equal(products, spectrum[place[:, None] ^ place])
    assert products.square().mean() == 1024
    # The largest of 1024 independent normal numbers, for which a sum of 1024 signs passes.
    assert spectrum.abs().max() / 32 < -stats.norm.ppf(ALPHA / 2 / 1024)


def test_columns_of_two_input_blocks_are_as_coherent_as_independent_ones():
    """The mean square of their inner products is exact, the largest one that of 2^20 numbers."""
    u = matrix(1024, 2048, seed=7)
    products = u[:, :1024].T @ u[:, 1024:]
    assert products.square().mean() == 1024
    largest = products.abs().max() / 32
    expected = (normal(1024, 1024, 0).T @ normal(1024, 1024, 1)).abs().max() / 32
    assert 4.3 < largest < 6.7
    assert 4.3 < expected < 6.7


def test_signals_of_up_to_1024_errors_are_isometric():
    """So a whole block of rows keeps an error's norm, which independent entries keep on average."""
    error = normal(5, 1000, 0)
    (signal,) = project(error, [3072], normalization=1.0, seed=4, distribution="hadamard")
    torch.testing.assert_close(signal.square().sum(1), 3072 * error.square().sum(1))


# --- condition numbers ---


@pytest.mark.parametrize(("rows", "columns"), [(2048, 512), (3072, 200)])
def test_whole_blocks_of_rows_are_perfectly_conditioned(rows, columns):
    u = matrix(rows, columns, seed=1, column_offset=100)
    assert torch.equal(u.T @ u, rows * EYE[:columns, :columns])
    gaussian = condition(normal(rows, columns, 1))
    ratio = math.sqrt(columns / rows)
    assert gaussian == pytest.approx((1 + ratio) / (1 - ratio), rel=0.05)  # 3.0 and 1.7


@pytest.mark.parametrize(("rows", "columns"), [(1500, 300), (2500, 300), (1024 + 10, 1000)])
def test_a_cut_block_adds_at_most_a_whole_one(rows, columns):
    """U^T U / 1024 lies between the number of whole blocks and one more."""
    whole = rows // 1024
    bound = math.sqrt((whole + 1) / whole)
    assert 1 < condition(matrix(rows, columns, seed=2)) < bound * (1 + 1e-12)


@pytest.mark.parametrize(
    ("rows", "columns", "most", "normals"), [(1000, 10, 1.04, 1.1), (800, 10, 1.15, 1.15)]
)
def test_a_part_of_one_block_is_better_conditioned_than_normal_entries(
    rows, columns, most, normals
):
    for seed in range(5):
        assert condition(matrix(rows, columns, seed=seed)) < most
        assert condition(normal(rows, columns, seed)) > normals


@pytest.mark.parametrize(("output_blocks", "input_blocks"), [(1, 2), (2, 2), (2, 3)])
def test_singular_values_of_several_blocks_are_those_of_1024_small_matrices(
    output_blocks, input_blocks
):
    """32 times those of the matrices D3(B, b)[k] of signs, one for each k.

    For the transforms around D3 are orthogonal, and common to a row or a column of blocks.
    """
    u = matrix(1024 * output_blocks, 1024 * input_blocks, seed=3)
    found = torch.linalg.eigvalsh(u @ u.T if output_blocks <= input_blocks else u.T @ u)
    small = torch.linalg.svdvals(outer_signs(3, output_blocks, input_blocks))
    expected = 1024 * small.square().flatten().sort().values
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(
    ("output_blocks", "input_blocks", "share"),
    [(2, 2, 1 / 4), (4, 2, 1 / 16), (12, 2, 2**-12), (3, 50, 0)],
)
def test_few_blocks_by_few_are_rank_deficient(output_blocks, input_blocks, share):
    """Two columns of m signs are equal or opposite with probability 2^(1 - m).

    Normal entries have full rank. The share is of the smaller dimension, and counts over 1024 k.
    """
    signs = outer_signs(11, output_blocks, input_blocks)
    rank = torch.linalg.matrix_rank(signs).sum().item()
    smaller = min(output_blocks, input_blocks)
    lost = 1024 * smaller - rank  # binomial: each k loses one rank or none
    expected = share * smaller
    deviation = math.sqrt(1024 * expected * (1 - expected))
    assert abs(lost - 1024 * expected) <= 5 * deviation + 2 * (expected < 0.01)
    if output_blocks == 3:  # GPT-2's: n = 50,257 and l = 3,072
        values = torch.linalg.svdvals(signs)
        assert (values.amax() / values.amin()).item() < 2.5
