"""The structured matrix: its bits against known answers, a second implementation, and itself."""

import pytest
import torch

from dfa_kernels import feedback_matrix, hadamard
from tests import reference
from tests.samples import DTYPES

LAST_COLUMNS = 2**34 - 1300
CORNERS = [  # (row_offset, column_offset)
    (0, 0),
    (1023, 1022),
    (2**32 - 700, 5),
    (2**42 - 3, 2**32 - 1),
    (2**62, 2**33 + 1024),
    (2**63 - 1200, LAST_COLUMNS),
]
SEEDS = (0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1)


def matrix(rows, columns, target=None, **where):
    place = {"device": target.device, "backend": target.name} if target else {"backend": "torch"}
    return feedback_matrix(rows, columns, distribution="hadamard", **place, **where).cpu()


@pytest.mark.parametrize("known", reference.KNOWN_HADAMARD["entries"])
def test_entries_are_the_known_answers(structured, known):
    where = {key: known[key] for key in ("seed", "row_offset", "column_offset")}
    expected = torch.tensor(known["entries_times_1024"]) / 1024
    assert torch.equal(matrix(*expected.shape, structured, **where), expected)
    second = reference.structured_matrix(*expected.shape, **where)
    assert torch.equal(torch.from_numpy(second).float(), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_entries_are_the_second_implementations(structured, seed):
    """Pieces of two by two blocks or more, which begin and end inside of blocks."""
    row_offset, column_offset = CORNERS[SEEDS.index(seed)]
    where = {"seed": seed, "row_offset": row_offset, "column_offset": column_offset}
    expected = torch.from_numpy(reference.structured_matrix(1200, 1300, **where))
    assert torch.equal(matrix(1200, 1300, structured, **where).double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_holds_the_same_entries(structured, dtype):
    """Integers over 256, because coefficients of a sequence of signs are equal modulo 4.

    So those below 8, which are all but 1e-15 of them, are exact in fp16. bf16 rounds them once.
    """
    where = {"seed": 3, "row_offset": 900, "column_offset": 1000}
    entries = matrix(300, 200, structured, dtype=dtype, **where)
    exact = torch.from_numpy(reference.structured_matrix(300, 200, **where))
    assert entries.dtype == dtype
    assert torch.equal(entries, exact.to(dtype))
    assert torch.equal(exact * 256, (exact * 256).round())
    assert torch.equal(entries.double(), exact) == (dtype != torch.bfloat16)


def test_a_piece_is_a_slice_of_the_matrix(structured):
    whole = matrix(1100, 1100, structured, seed=9)
    for rows, columns, row, column in [
        (1, 1, 1099, 1099),
        (7, 9, 1020, 1019),
        (1024, 1, 0, 1024),
        (1, 1024, 1024, 0),
        (80, 300, 1000, 700),
    ]:
        piece = matrix(rows, columns, structured, seed=9, row_offset=row, column_offset=column)
        assert torch.equal(piece, whole[row : row + rows, column : column + columns])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_pieces(structured, shape):
    assert matrix(*shape, structured).shape == shape


def test_blocks_are_32_times_orthogonal(structured):
    u = matrix(1024, 1024, structured, seed=5, row_offset=2048, column_offset=1024).double()
    assert torch.equal(u @ u.T, 1024 * torch.eye(1024, dtype=torch.float64))


def test_the_transform_is_the_product_with_sylvesters_matrix():
    """Of integers, exactly; the package's, and the second implementation's."""
    x = torch.arange(3 * 1024, dtype=torch.float64).mul(7919).remainder(2001).reshape(3, 1024)
    expected = x @ torch.from_numpy(reference.HADAMARD)
    assert torch.equal(hadamard.fwht(x), expected)
    assert torch.equal(torch.from_numpy(reference.fwht(x.numpy())), expected)
    i, j = torch.arange(1024)[:, None], torch.arange(1024)
    odd = sum((i & j) >> bit & 1 for bit in range(10)) % 2
    assert torch.equal(torch.from_numpy(reference.HADAMARD), 1.0 - 2 * odd)


def test_seed_and_blocks_of_64_bits_all_matter():
    """No two of these seeds and offsets give the same entries."""
    pieces = [matrix(1, 64, seed=seed) for seed in SEEDS]
    pieces += [matrix(1, 64, row_offset=row) for row in (1, 1024, 2**42, 2**62, 2**63 - 1)]
    pieces += [matrix(1, 64, column_offset=column) for column in (64, 1024, 2**33, 2**34 - 64)]
    assert len({tuple(piece.flatten().tolist()) for piece in pieces}) == len(pieces)
