"""Statistics of the entries and of the words below them, against their exact laws.

Every statistic takes a `Source` and returns a p-value: an upper bound on the probability that a
perfect stream looks at least as unusual. A statistic of many p-values returns the smallest times
their number (Bonferroni). Where it relies on the normal limit of a sum, the sums are long enough
for the tail to be right within about a factor of two down to 1e-6.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from dfa_kernels import stream

SEED = 0x0123456789ABCDEF  # chosen before any statistic was looked at
PLACES = ("first", "row 2^32", "last rows", "last columns", "last corner")
FORMS = ("tall", "wide", "square")
LAGS = (*range(1, 17), 32, 64, 128, 256, 512)
LAW = {
    "normal": stream.codebook_values(torch.float64).bfloat16().double().numpy(),
    "uniform": np.sqrt(3) * (2 * np.arange(256) - 255) / 256,
    "rademacher": np.array([1.0, -1.0]),
}
# Joint cells of neighbouring columns: (columns in a tuple, leading bits of each index).
TUPLES = {
    "normal": ((2, 6), (4, 3), (8, 1)),
    "uniform": ((2, 6), (4, 3), (8, 1)),
    "rademacher": ((2, 1), (8, 1), (16, 1)),
}


class Source(NamedTuple):
    distribution: str = "normal"
    place: str = "first"
    seed: int = SEED

    def corner(self, rows, columns):
        """First row and column of a sample of this size."""
        last_row, last_column = stream.ROWS - rows, stream.COLUMNS - columns
        return {
            "first": (0, 0),
            "row 2^32": (2**32 - rows // 2, 0),
            "last rows": (last_row, 0),
            "last columns": (0, last_column),
            "last corner": (last_row, last_column),
        }[self.place]

    def entries(self, rows, columns):
        row_offset, column_offset = self.corner(rows, columns)
        return stream.entries(
            rows,
            columns,
            row_offset,
            stream.Stream(self.seed, column_offset, self.distribution),
            torch.float64,
            torch.device("cpu"),
        ).numpy()

    def words(self, rows, blocks):
        """The four Philox words of each block: 4 x [rows, blocks]."""
        width = stream.DENSE[self.distribution].block
        row_offset, column_offset = self.corner(rows, blocks * width)
        row = row_offset + torch.arange(rows)[:, None]
        block = column_offset // width + torch.arange(blocks)[None, :]
        return words_at(self.seed, row, block)

    def indices(self, rows, columns):
        """The level index of each entry, [rows, columns]: several normal levels share a value."""
        words = self.words(rows, columns // stream.DENSE[self.distribution].block)
        return stream.indices(words, self.distribution).flatten(1).numpy()


def words_at(seed, row, block):
    mask = 2**32 - 1
    counter = (block, torch.zeros_like(block), row & mask, row >> 32)
    return stream.philox(counter, (seed & mask, seed >> 32))


def bits_of(words):
    """Four words of shape [...] -> their bits, uint8 [..., 128]."""
    stacked = torch.stack(torch.broadcast_tensors(*words), -1).numpy().astype("<u4")
    return np.unpackbits(stacked.view(np.uint8), axis=-1, bitorder="little")


def shape(form, distribution, size=2**20):
    width = stream.DENSE[distribution].block
    side = int(size**0.5)
    return {"tall": (size // width, width), "wide": (8, size // 8), "square": (side, side)}[form]


# p-values


def bonferroni(p_values):
    p_values = np.asarray(p_values)
    return min(1.0, p_values.size * p_values.min().item())


def normal_p(z):
    """Two-sided, for the largest |z| of standard normal z."""
    z = np.asarray(z)
    return min(1.0, z.size * 2 * stats.norm.sf(np.abs(z).max()).item())


def signs_p(sums, n):
    """Two-sided and exact, for the largest |sum| among sums of n independent signs."""
    farthest = np.abs(sums).max()
    return min(1.0, sums.size * 2 * stats.binom.sf((n + farthest) / 2 - 1, n, 0.5).item())


def chi_square(counts, probabilities):
    """Pearson's statistic and its law."""
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum(), stats.chi2(len(counts) - 1)


def cells_p(counts, probabilities):
    """Chi-square over all cells, and the most unusual single cell.

    Counts that are too even are as wrong as uneven ones. With few cells, perfectly even counts are
    too likely to mean anything.
    """
    fit, law = chi_square(counts, probabilities)
    overall = 2 * min(law.sf(fit), law.cdf(fit)) if len(counts) >= 64 else law.sf(fit)
    low = stats.binom.cdf(counts, counts.sum(), probabilities)
    high = stats.binom.sf(counts - 1, counts.sum(), probabilities)
    return bonferroni([overall, bonferroni(2 * np.minimum(low, high))])


def even_cells_p(counts):
    return cells_p(counts, np.full(len(counts), 1 / len(counts)))


# Statistics


def cells(source, form="square"):
    """Counts of the level indices: 4096, 256 or 2 cells."""
    index = source.indices(*shape(form, source.distribution))
    return even_cells_p(np.bincount(index.ravel(), minlength=len(LAW[source.distribution])))


def values(source):
    """Counts of the distinct values among the entries; any other value is impossible."""
    support, multiplicity = np.unique(LAW[source.distribution], return_counts=True)
    found, counts = np.unique(source.entries(1024, 1024), return_counts=True)
    if not np.isin(found, support).all():
        return 0.0
    all_counts = np.zeros(len(support), dtype=np.int64)
    all_counts[np.searchsorted(support, found)] = counts
    return cells_p(all_counts, multiplicity / multiplicity.sum())


def tuples(source, axis=1):
    """Joint counts of adjacent entries along a row (axis 1) or a column (axis 0)."""
    index = np.moveaxis(source.indices(1024, 1024), axis, 1)
    bits = len(LAW[source.distribution]).bit_length() - 1
    p_values = []
    for length, leading in TUPLES[source.distribution]:
        groups = (index >> (bits - leading)).reshape(-1, length)
        cell = groups @ (1 << leading * np.arange(length))
        p_values.append(even_cells_p(np.bincount(cell, minlength=1 << leading * length)))
    return bonferroni(p_values)


def moments(source, form="square", axis=None):
    """First four moments of all entries, or of every column (axis 0) or row (axis 1)."""
    x, law = source.entries(*shape(form, source.distribution)), LAW[source.distribution]
    powers = (1,) if source.distribution == "rademacher" else (1, 2, 3, 4)
    z = []
    for power in powers:
        sample, exact = x**power, law**power
        n = sample.size if axis is None else sample.shape[axis]
        z.append((sample.mean(axis) - exact.mean()) * np.sqrt(n) / exact.std())
    return normal_p(z)


def features(x, distribution):
    """Entries and their magnitudes, standardised: correlation may hide in either."""
    law = LAW[distribution]
    yield x / law.std()
    if distribution != "rademacher":  # whose magnitudes are constant
        yield (x**2 - (law**2).mean()) / (law**2).std()


def product(a, b):
    """Matrix product by torch, which keeps to its set number of threads."""
    return (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()


def correlation_z(x, y):
    return product(x.reshape(1, -1), y.reshape(-1, 1)).item() / np.sqrt(x.size)


def lags(source, axis):
    """Correlations at every lag along a column (axis 0) or a row (axis 1)."""
    z = []
    for x in features(source.entries(1024, 1024), source.distribution):
        x = np.ascontiguousarray(np.moveaxis(x, axis, 0))
        z += [correlation_z(x[:-lag], x[lag:]) for lag in LAGS]
    return normal_p(z)


def neighbours(seed):
    flips = (1, 2**31, 2**32, 2**63, 2**64 - 1)
    swapped = (seed >> 32) | (seed & (2**32 - 1)) << 32
    return {(seed + 1) % 2**64, (seed - 1) % 2**64, swapped, *(seed ^ f for f in flips)} - {seed}


def seeds(source):
    """Correlations with neighbouring seeds: entry by entry, and one row or block further on."""
    z, block = [], stream.DENSE[source.distribution].block
    here = list(features(source.entries(512, 1024), source.distribution))
    for seed in sorted(neighbours(source.seed)):
        there = features(source._replace(seed=seed).entries(512, 1024), source.distribution)
        for x, y in zip(here, there, strict=True):
            z += [correlation_z(x, y), correlation_z(x[1:], y[:-1])]
            z += [correlation_z(x[:-1], y[1:]), correlation_z(x[:, block:], y[:, :-block])]
    return normal_p(z)


def word_bits(source):
    """Balance of the 128 bits of a block, of every pair of them, and of every pair of bits
    between it and the next block, the next row and the next seed."""
    n = 256
    signs = 1 - 2 * bits_of(source.words(n, n)).astype(np.float32)  # [rows, blocks, 128]
    next_seed = source._replace(seed=(source.seed + 1) % 2**64)
    other = 1 - 2 * bits_of(next_seed.words(n, n)).astype(np.float32)

    def products(a, b):  # sums of at most 2^16 signs are exact in fp32
        return product(a.reshape(-1, 128).T, b.reshape(-1, 128)), a.size // 128

    within, all_blocks = products(signs, signs)
    p_values = [
        signs_p(signs.sum((0, 1)), all_blocks),
        signs_p(within[np.triu_indices(128, 1)], all_blocks),
        signs_p(*products(signs[:, :-1], signs[:, 1:])),
        signs_p(*products(signs[:-1], signs[1:])),
        signs_p(*products(signs, other)),
    ]
    return bonferroni(p_values)


def avalanche(source):
    """Flips each bit of block, row and seed at random counters: each of the 128 bits of the block
    flips with probability 1/2, and the number that flip is binomial."""
    n = 2048
    generator = np.random.default_rng(source.seed)
    block_bits = (stream.COLUMNS // 8).bit_length() - 1
    row_bits = stream.ROWS.bit_length() - 1
    row = torch.from_numpy(generator.integers(0, stream.ROWS, n, dtype=np.uint64).astype(np.int64))
    block = torch.from_numpy(generator.integers(0, 1 << block_bits, n))
    before = bits_of(words_at(source.seed, row, block))
    after = [words_at(source.seed, row, block ^ (1 << bit)) for bit in range(block_bits)]
    after += [words_at(source.seed, row ^ (1 << bit), block) for bit in range(row_bits)]
    after += [words_at(source.seed ^ (1 << bit), row, block) for bit in range(64)]

    sums, weights = [], []
    for words in after:
        flipped = bits_of(words) ^ before  # [n, 128]
        sums.append(2 * flipped.sum(0, dtype=np.int64) - n)
        weights.append(flipped.sum(1, dtype=np.int64))
    low, high = 45, 83  # each tail beyond is one cell
    counts = np.bincount(np.clip(np.concatenate(weights), low, high), minlength=high + 1)[low:]
    law = stats.binom.pmf(np.arange(low, high + 1), 128, 0.5)
    law[[0, -1]] = stats.binom.cdf(low, 128, 0.5)
    return bonferroni([signs_p(np.array(sums), n), cells_p(counts, law)])


def inner_products(source, axis=1, vectors=512, length=4096):
    """Inner products of all pairs of rows (axis 1) or columns (axis 0): no two are related.

    Not of magnitudes, whose products have too heavy a tail for the normal limit at this length.
    """
    x = source.entries(vectors, length) if axis else source.entries(length, vectors).T
    scale = LAW[source.distribution].var() * np.sqrt(length)
    return normal_p(product(x, x.T)[np.triu_indices(vectors, 1)] / scale)


def spectrum(source, rows=1024, columns=512):
    """Largest singular value: Tracy-Widom at the Marchenko-Pastur edge (Johnstone 2001).

    The law is that of Gaussian entries, which other entries approach; its upper tail is Chiani's
    gamma approximation (2014). Structure shared between rows or columns raises the value.
    """
    x = source.entries(rows, columns) / LAW[source.distribution].std()
    largest = torch.linalg.eigvalsh(torch.from_numpy(product(x.T, x)))[-1].item()
    a, b = np.sqrt(rows - 1), np.sqrt(columns)
    score = (largest - (a + b) ** 2) / ((a + b) * (1 / a + 1 / b) ** (1 / 3))
    return stats.gamma.sf((score + 9.84801) / 0.186054, 46.446).item()


STATISTICS = {
    **{f"cells, {form}": functools.partial(cells, form=form) for form in FORMS},
    "values": values,
    "tuples of columns": functools.partial(tuples, axis=1),
    "tuples of rows": functools.partial(tuples, axis=0),
    "moments": moments,
    "moments, each column": functools.partial(moments, form="tall", axis=0),
    "moments, each row": functools.partial(moments, form="wide", axis=1),
    "lags along columns": functools.partial(lags, axis=0),
    "lags along rows": functools.partial(lags, axis=1),
    "seeds": seeds,
    "inner products of rows": functools.partial(inner_products, axis=1),
    "inner products of columns": functools.partial(inner_products, axis=0),
    "spectrum": spectrum,
    "word bits": word_bits,
}
