"""The stream's bits against known answers, a second implementation, and itself."""

import functools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfa_kernels import feedback_matrix, stream
from dfa_kernels.backends import slabs, tensor_cores
from dfa_kernels.backends import torch as plain
from dfa_kernels.layers import Layers
from tests import reference
from tests.reference import DENSE
from tests.samples import DTYPES

SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
CORNERS = [  # (row_offset, column_offset)
    (0, 0),
    (5, 3),
    (2**31 - 2, 7),
    (2**32 - 2, 127),
    (2**32, 2**31 - 3),
    (2**63 - 9, 2**34 - 131),
]


def known_lattice(known):
    values = known["values"]
    if known["distribution"] == "normal":
        bits = np.array([[int(v, 16) for v in row] for row in values], dtype=np.uint32) << 16
        return torch.from_numpy(bits.view(np.float32))
    return torch.tensor(values, dtype=torch.float32)


def test_the_distributions_are_those_of_the_tests():
    blocks = {name: facts.block for name, facts in stream.DENSE.items()}
    assert blocks == reference.WIDTH


@pytest.mark.parametrize("distribution", DENSE)
def test_the_facts_of_a_distribution(distribution):
    """Its levels are the factor times lattice values, which both 16-bit dtypes hold exactly."""
    facts = stream.DENSE[distribution]
    lattice = facts.lattice(torch.arange(2**facts.bits, dtype=torch.float32))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(lattice.to(dtype).double(), lattice.double())
    levels = stream.levels(distribution, torch.float64, torch.device("cpu"))
    assert torch.equal(levels, lattice.double() * facts.factor)
    assert levels.square().mean() == pytest.approx(1, rel=2e-3)
    assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("vector", reference.KNOWN["philox4x32"])
def test_philox_gives_random123s_vectors(vector):
    counter = tuple(torch.tensor([int(word, 16)]) for word in vector["counter"])
    words = stream.philox(counter, tuple(int(word, 16) for word in vector["key"]))
    assert [f"{word.item():08x}" for word in words] == vector["out"]


@pytest.mark.parametrize("known", reference.KNOWN["entries"])
def test_entries_are_the_known_answers(known):
    expected = known_lattice(known)
    entries = feedback_matrix(
        *expected.shape,
        seed=int(known["seed"], 16),
        distribution=known["distribution"],
        row_offset=known["row_offset"],
        column_offset=known["column_offset"],
        backend="torch",
    )
    if known["distribution"] == "uniform":
        expected = expected / 256 * torch.tensor(3.0).sqrt()
    assert torch.equal(entries, expected)


def test_the_known_answers_cover_every_distribution():
    assert {known["distribution"] for known in reference.KNOWN["entries"]} == set(DENSE)


def test_codebook_is_the_known_one():
    levels = stream.levels("normal", torch.float64, torch.device("cpu"))
    assert reference.codebook_digest(levels.numpy()) == reference.KNOWN["codebook_bf16_sha256"]
    assert np.array_equal(levels.numpy(), reference.CODEBOOK)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("distribution", DENSE)
def test_entries_are_the_second_implementations(distribution, seed):
    for row_offset, column_offset in CORNERS:
        where = {"seed": seed, "row_offset": row_offset, "column_offset": column_offset}
        entries = feedback_matrix(9, 131, distribution=distribution, backend="torch", **where)
        expected = reference.matrix(9, 131, distribution=distribution, dtype=torch.float32, **where)
        assert torch.equal(entries, expected), where


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DENSE)
def test_every_dtype_holds_the_same_entries(distribution, dtype):
    entries = feedback_matrix(7, 300, seed=3, distribution=distribution, dtype=dtype)
    assert entries.dtype == dtype
    assert torch.equal(
        entries, reference.matrix(7, 300, seed=3, distribution=distribution, dtype=dtype)
    )
    if distribution != "uniform":  # exact in every dtype
        exact = feedback_matrix(7, 300, seed=3, distribution=distribution, dtype=torch.float64)
        assert torch.equal(entries.double(), exact)


@pytest.mark.parametrize("distribution", DENSE)
def test_a_block_is_a_slice_of_the_matrix(distribution):
    whole = feedback_matrix(40, 300, seed=9, distribution=distribution)
    for rows, columns, row, column in [
        (1, 1, 39, 299),
        (7, 9, 3, 5),
        (40, 129, 0, 127),
        (8, 8, 8, 8),
    ]:
        block = feedback_matrix(
            rows, columns, seed=9, distribution=distribution, row_offset=row, column_offset=column
        )
        assert torch.equal(block, whole[row : row + rows, column : column + columns])


@pytest.mark.parametrize("distribution", DENSE)
def test_slabs_do_not_show(distribution):
    """Entries made in many slabs, in both directions, equal those made at once."""
    rows, columns = 70, 5003
    matrix = feedback_matrix(rows, columns, seed=4, distribution=distribution, column_offset=1)
    at_once = stream.entries(
        rows,
        columns,
        0,
        stream.Stream(4, 1, distribution),
        torch.float32,
        torch.device("cpu"),
    )
    assert torch.equal(matrix, at_once)


def test_seeds_and_rows_of_64_bits_all_matter():
    """No two of these seeds and offsets give the same entries."""
    blocks = [feedback_matrix(1, 64, seed=seed) for seed in SEEDS]
    blocks += [
        feedback_matrix(1, 64, row_offset=row) for row in (1, 2**31, 2**32, 2**62, 2**63 - 1)
    ]
    blocks += [feedback_matrix(1, 64, column_offset=column) for column in (64, 2**33, 2**34 - 64)]
    assert len({tuple(block.flatten().tolist()) for block in blocks}) == len(blocks)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_blocks(shape):
    assert feedback_matrix(*shape).shape == shape


def test_the_default_device_is_followed():
    with torch.device("meta"):
        assert feedback_matrix(2, 3).device.type == "meta"


class OnOneDevice(TorchDispatchMode):
    """Fails where an operator reads or makes a tensor that is not on the device "meta".

    "meta" stands for a GPU, to which any other tensor would have to be copied.
    Reading values back fails by itself, because meta tensors have none.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == "meta", f"{func} has a tensor on {tensor.device}"
        return result


@pytest.mark.parametrize(
    "wrong",
    [
        lambda here, there: here.to("meta"),
        lambda here, there: there.copy_(here),
        lambda here, there: there[0].item(),
        lambda here, there: there[there > 0],
        lambda here, there: there.tolist(),
    ],
)
def test_a_copy_and_a_reading_are_noticed(wrong):
    here, there = torch.ones(3, device="cpu"), torch.ones(3, device="meta")
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), OnOneDevice():
        wrong(here, there)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", stream.DISTRIBUTIONS)
def test_nothing_comes_from_the_host_to_an_accelerator(monkeypatch, distribution, dtype):
    """So a CUDA graph can be captured from the first call on, and no call waits for a copy."""
    for name in ("tensor", "as_tensor", "from_numpy"):  # these copy Python's values unseen
        monkeypatch.delattr(torch, name)
    layers = Layers((0, 3, 2**40), (70, 33, 5), (1.0, 0.5, 0.25))
    matrix = stream.Stream(7, 3, distribution)
    generate = functools.partial(plain.feedback_matrix, device=torch.device("meta"))
    transpose = functools.partial(slabs.project_adjoint, generate)
    if distribution in stream.STRUCTURED:
        transpose = plain.structured_adjoint

    with OnOneDevice():
        error = torch.ones(4, 300, dtype=dtype, device="meta")
        signals = plain.project(error, layers, matrix, dtype)
        assert tuple(signal.shape[1] for signal in signals) == layers.sizes
        adjoint = transpose(signals, layers, matrix, 300, dtype)
        assert adjoint.shape == error.shape
        assert generate(9, 300, 5, matrix, dtype).dtype == dtype
        if dtype != torch.float64 and distribution in DENSE:
            tensor_cores.project(generate, error, layers, matrix, dtype)
