"""The stream passes every statistic; a stream broken on purpose fails each of them."""

import functools
import random
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats

from dfa_kernels import stream
from tests.reference import DENSE
from tests.stream.stream_statistics import (
    FORMS,
    LAW,
    PLACES,
    SEED,
    STATISTICS,
    Source,
    avalanche,
    bonferroni,
    chi_square,
    even_cells_p,
    inner_products,
    shape,
    spectrum,
)

# The chance that one test case rejects a perfect stream. Seeds are fixed, so a case that passes
# always passes. In the default run of 250 cases, a perfect stream had a chance of 2.5e-4 to fail
# at least one. A broken stream must fall below the same threshold.
ALPHA = 1e-6
AWKWARD_SEEDS = (0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("distribution", DENSE)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_stream(statistic, distribution, place):
    assert STATISTICS[statistic](Source(distribution, place)) > ALPHA


@pytest.mark.parametrize("seed", [SEED, *AWKWARD_SEEDS])
def test_avalanche(seed):
    assert avalanche(Source(seed=seed)) > ALPHA


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("distribution", DENSE)
def test_the_indices_looked_at_are_those_of_the_entries(distribution, place):
    source = Source(distribution, place)
    index = source.indices(16, 1024)
    np.testing.assert_array_equal(LAW[distribution][index], source.entries(16, 1024))


# Streams broken on purpose: each replaces `stream.philox` or `stream.levels`.

philox, levels = stream.philox, stream.levels
MASK16, MASK32 = 2**16 - 1, 2**32 - 1


def sometimes(word, one_in):
    return word % one_in == 0


def equal_rows_in_pairs(counter, key):
    block, zero, row, high_row = counter
    return philox((block, zero, row & ~1, high_row), key)


def equal_rows_far_apart(counter, key):
    block, zero, row, high_row = counter
    return philox((block, zero, row % 400, high_row), key)


def equal_blocks_in_pairs(counter, key):
    return philox((counter[0] & ~1, *counter[1:]), key)


def repeating_blocks(counter, key):
    return philox((counter[0] % 3, *counter[1:]), key)


def ignored_high_rows(counter, key):
    return philox((*counter[:3], counter[3] * 0), key)


def ignored_last_block_bit(counter, key):
    return philox((counter[0] & (2**30 - 1), *counter[1:]), key)


def ignored_high_seed(counter, key):
    return philox(counter, (key[0], 0))


def seed_added_to_row(counter, key):
    block, zero, row, high_row = counter
    return philox((block, zero, (row + key[0]) & MASK32, high_row), (0, key[1]))


def too_few_rounds(counter, key):
    with mock.patch.object(stream, "PHILOX_ROUNDS", 3):
        return philox(counter, key)


def biased_bit(counter, key):
    w0, w1, w2, w3 = philox(counter, key)
    return w0 | (sometimes(w1, 8).long() << 31), w1, w2, w3


def biased_words(counter, key, one_in=64):
    w0, w1, w2, w3 = philox(counter, key)
    return tuple(w | sometimes(other, one_in) * MASK32 for w, other in ((w0, w1), (w2, w3)) * 2)


def biased_row(counter, key):
    w0, w1, w2, w3 = philox(counter, key)
    return w0 | (sometimes(w1, 8) & (counter[2] % 8 == 5)) * MASK32, w1, w2, w3


def missing_cell(counter, key):
    """Halfwords in cell 100 of 256 move to the next cell."""
    words = philox(counter, key)
    return tuple(w + (w >> 24 == 100) * 2**24 for w in words)


def equal_halves(counter, key):
    w0, w1, w2, w3 = philox(counter, key)
    return torch.where(sometimes(w1, 16), (w0 & MASK16) * 0x10001, w0), w1, w2, w3


def equal_words(counter, key):
    w0, w1, w2, w3 = philox(counter, key)
    return w0, w1, torch.where(sometimes(w3, 32), w0, w2), w3


def shared_between_rows(counter, key, one_in=4):
    """Some first words are copied from row 0, yet no two rows are nearly equal."""
    block, _, row, _ = counter
    w0, w1, w2, w3 = philox(counter, key)
    shared, *_ = philox((block, block * 0, row * 0, row * 0), key)
    return torch.where(sometimes(w3, one_in), shared, w0), w1, w2, w3


def too_even(counter, key):
    """An equidistributed sequence fills the cells more evenly than chance."""
    block, _, row, _ = counter
    step = block * 2048 + row
    return tuple((((step * 4 + i) * 0x9E3779B9) & MASK32) for i in range(4))


def one_wrong_level(distribution, dtype, device):
    table = levels(distribution, dtype, device).clone()
    table[100] = table[200]
    return table


def impossible_level(distribution, dtype, device):
    table = levels(distribution, dtype, device).clone()
    table[-1] = 4
    return table


def wrong_scale(distribution, dtype, device):
    return levels(distribution, dtype, device) * 1.01


def wrong_tail(distribution, dtype, device):
    return levels(distribution, dtype, device).clamp(-3, 3)


WRONG_LEVELS = (one_wrong_level, impossible_level, wrong_scale, wrong_tail)
CONTROLS = [
    *((missing_cell, f"cells, {form}", d) for form in FORMS for d in ("normal", "uniform")),
    *((biased_words, f"cells, {form}", "rademacher") for form in FORMS),
    (too_even, "cells, square", "normal"),
    (too_even, "cells, square", "uniform"),
    (missing_cell, "values", "normal"),
    (missing_cell, "values", "uniform"),
    (biased_words, "values", "rademacher"),
    (one_wrong_level, "values", "normal"),
    (one_wrong_level, "values", "uniform"),
    (impossible_level, "values", "normal"),
    *((equal_halves, "tuples of columns", d) for d in DENSE),
    *((equal_rows_in_pairs, "tuples of rows", d) for d in DENSE),
    *((biased_words, "moments", d) for d in DENSE),
    (wrong_scale, "moments", "normal"),
    (wrong_tail, "moments", "normal"),
    *((biased_bit, "moments, each column", d) for d in DENSE),
    *((biased_row, "moments, each row", d) for d in DENSE),
    *((equal_rows_in_pairs, "lags along columns", d) for d in DENSE),
    *((equal_halves, "lags along rows", d) for d in DENSE),
    *((equal_blocks_in_pairs, "lags along rows", d) for d in DENSE),
    *((equal_words, "lags along rows", d) for d in DENSE),
    *((ignored_high_seed, "seeds", d) for d in DENSE),
    *((seed_added_to_row, "seeds", d) for d in DENSE),
    *((equal_rows_far_apart, "inner products of rows", d) for d in DENSE),
    *((repeating_blocks, "inner products of columns", d) for d in DENSE),
    *((shared_between_rows, "spectrum", d) for d in DENSE),
    (biased_bit, "word bits", "normal"),
    (equal_halves, "word bits", "normal"),
    (equal_words, "word bits", "normal"),
    (equal_rows_in_pairs, "word bits", "normal"),
    (equal_blocks_in_pairs, "word bits", "normal"),
    (too_few_rounds, "word bits", "normal"),
    (ignored_high_rows, "avalanche", "normal"),
    (ignored_last_block_bit, "avalanche", "normal"),
    (ignored_high_seed, "avalanche", "normal"),
    (too_few_rounds, "avalanche", "normal"),
]
IDS = [f"{broken.__name__}-{statistic}-{d}" for broken, statistic, d in CONTROLS]


@pytest.mark.parametrize(("broken", "statistic", "distribution"), CONTROLS, ids=IDS)
def test_broken_stream_is_rejected(monkeypatch, broken, statistic, distribution):
    monkeypatch.setattr(stream, "levels" if broken in WRONG_LEVELS else "philox", broken)
    p = {**STATISTICS, "avalanche": avalanche}[statistic](Source(distribution))
    assert p < ALPHA


# The longer battery: pytest -m battery

RANDOM = random.Random(1)
MANY_SEEDS = (*AWKWARD_SEEDS, RANDOM.getrandbits(64), RANDOM.getrandbits(64))


@pytest.mark.battery
@pytest.mark.parametrize("distribution", DENSE)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_many_seeds(statistic, distribution):
    sources = [Source(distribution, place, seed) for place in PLACES for seed in MANY_SEEDS]
    assert bonferroni([STATISTICS[statistic](source) for source in sources]) > ALPHA


@pytest.mark.battery
def test_avalanche_of_many_seeds():
    assert bonferroni([avalanche(Source(seed=seed)) for seed in MANY_SEEDS]) > ALPHA


def cells_of_consecutive_seeds(distribution, seeds):
    """Chi-square of each seed, with p-values that should be uniform, and of all counts together."""
    p_values, total = [], 0
    for seed in range(SEED, SEED + seeds):
        index = Source(distribution, seed=seed).indices(*shape("square", distribution))
        counts = np.bincount(index.ravel(), minlength=len(LAW[distribution]))
        fit, law = chi_square(counts, np.full(len(counts), 1 / len(counts)))
        p_values.append(law.sf(fit))
        total = total + counts
    return bonferroni([stats.kstest(p_values, "uniform").pvalue, even_cells_p(total)])


@pytest.mark.battery
@pytest.mark.parametrize("distribution", DENSE)
def test_consecutive_seeds(distribution):
    assert cells_of_consecutive_seeds(distribution, 512) > ALPHA


def rarely_biased_words(counter, key):
    """Too rare a bias to show in one sample of a million entries."""
    return biased_words(counter, key, one_in=2**15)


@pytest.mark.battery
@pytest.mark.parametrize(
    ("broken", "distribution"),
    [*((rarely_biased_words, d) for d in DENSE), (equal_halves, "normal")],
)
def test_consecutive_seeds_of_a_broken_stream(monkeypatch, broken, distribution):
    monkeypatch.setattr(stream, "philox", broken)
    assert cells_of_consecutive_seeds(distribution, 512) < ALPHA


def pairs_of_levels(rows):
    """Chi-square over all 4096 x 4096 joint cells of adjacent normal entries."""
    counts = np.zeros(4096**2, dtype=np.int64)
    for first in range(0, rows, 256):
        index = Source("normal", seed=SEED + first).indices(256, 4096).reshape(-1, 2)
        counts += np.bincount(index @ (4096, 1), minlength=len(counts))
    fit, law = chi_square(counts, 1 / len(counts))
    return 2 * min(law.sf(fit), law.cdf(fit))


@pytest.mark.battery
def test_pairs_of_levels():
    assert pairs_of_levels(2**15) > ALPHA


@pytest.mark.battery
def test_pairs_of_levels_of_a_broken_stream(monkeypatch):
    monkeypatch.setattr(stream, "philox", equal_halves)
    assert pairs_of_levels(2**12) < ALPHA


@pytest.mark.battery
@pytest.mark.parametrize("distribution", DENSE)
def test_large_spectrum(distribution):
    assert spectrum(Source(distribution), 4096, 2048) > ALPHA


@pytest.mark.battery
@pytest.mark.parametrize("distribution", DENSE)
def test_large_spectrum_of_a_broken_stream(monkeypatch, distribution):
    """Shares a quarter of what the smaller matrix's test shares."""
    monkeypatch.setattr(stream, "philox", functools.partial(shared_between_rows, one_in=16))
    assert spectrum(Source(distribution), 4096, 2048) < ALPHA


@pytest.mark.battery
@pytest.mark.parametrize("distribution", DENSE)
@pytest.mark.parametrize("axis", [0, 1])
def test_many_inner_products(axis, distribution):
    assert inner_products(Source(distribution), axis, vectors=4096, length=8192) > ALPHA
