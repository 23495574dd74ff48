"""`DFA.match_output_` of weights of which each process has a part: all parts make up the whole."""

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dfa_kernels import DFA, DFALayer, feedback_matrix
from dfa_kernels.nn import matching
from tests import processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

WIDTH, CLASSES = 10, 7  # of which 2 and 4 processes have uneven parts


@contextlib.contextmanager
def process(rank, *shape):
    """One process of a mesh of that shape; the others are not there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import debug

    # What is kept for one process's mesh would serve the next one's, which is equal.
    debug._clear_python_sharding_prop_cache()
    debug._clear_fast_path_sharding_prop_cache()
    with processes.fake_group(torch.Size(shape).numel(), rank):
        yield init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor")[: len(shape)])


def part(whole, *splits):
    """What one process has after its tensor was split: (dimension, parts, which) each time."""
    for dim, count, index in splits:
        parts = whole.chunk(count, dim)
        whole = parts[index] if index < len(parts) else whole.narrow(dim, 0, 0)
    return whole


WHOLE = feedback_matrix(WIDTH, CLASSES, seed=3).T * 0.1


def assert_set(linear, *splits, matrix=None, whole=WHOLE, **options):
    weight = DFA([DFALayer()], seed=3, matrix=matrix).match_output_(linear, 0.1, **options)
    assert weight is linear.weight
    assert weight.is_leaf
    local = weight.to_local().detach()
    torch.testing.assert_close(local, part(whole, *splits), rtol=0, atol=0)


def tensor_parallel(mesh, style, inputs=WIDTH, outputs=CLASSES):
    from torch.distributed.tensor import parallel

    linear = nn.Linear(inputs, outputs, bias=False)
    return parallel.parallelize_module(linear, mesh, getattr(parallel, style)())


STYLES = pytest.mark.parametrize(("style", "dim"), [("ColwiseParallel", 0), ("RowwiseParallel", 1)])


@STYLES
@pytest.mark.parametrize("matrix", [None, 10 * WHOLE.T])
def test_tensor_parallel_weights(style, dim, matrix):
    whole = WHOLE if matrix is None else matrix.T * 0.1
    for rank in range(4):
        with process(rank, 4) as mesh:
            linear = tensor_parallel(mesh, style)
            assert_set(linear, (dim, 4, rank), matrix=matrix, whole=whole)


@pytest.mark.parametrize(("dim", "count"), [(0, 5), (1, 5)])
def test_weights_of_fully_shard(dim, count):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    for rank in range(count):
        with process(rank, count) as mesh:
            linear = nn.Linear(WIDTH, CLASSES, bias=False)
            fully_shard(linear, mesh=mesh, shard_placement_fn=lambda _: Shard(dim))
            assert_set(linear, (dim, count, rank))


@STYLES
def test_weights_that_are_sharded_twice(style, dim):
    from torch.distributed.fsdp import fully_shard

    whole = feedback_matrix(8, 12, seed=3).T * 0.1
    for rank in range(6):
        with process(rank, 3, 2) as mesh:
            linear = tensor_parallel(mesh["tensor"], style, 8, 12)
            fully_shard(linear, mesh=mesh["data"])
            assert_set(linear, (dim, 2, rank % 2), (0, 3, rank // 2), whole=whole)


def test_weights_that_are_sharded_twice_unevenly_are_set_in_between():
    from torch.distributed.fsdp import fully_shard

    for rank in range(6):
        with process(rank, 3, 2) as mesh:
            linear = tensor_parallel(mesh["tensor"], "ColwiseParallel")
            assert_set(linear, (0, 2, rank % 2))
            fully_shard(linear, mesh=mesh["data"])
            expected = part(WHOLE, (0, 2, rank % 2), (0, 3, rank // 2))
            torch.testing.assert_close(linear.weight.to_local().detach(), expected, rtol=0, atol=0)
            with pytest.raises(ValueError, match=r"evenly .* got \[7, 10\] .*before fully_shard"):
                DFA([DFALayer()]).match_output_(linear)


def test_weights_whose_rows_here_are_not_consecutive_are_refused():
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    strided = _StridedShard(0, split_factor=2)
    matching.refuse_uneven_twice((8, 3), (2, 2), (strided, Shard(0)))
    with pytest.raises(ValueError, match=r"must be sharded evenly .* got \[8, 3\] on .*\[2, 2\]"):
        matching.refuse_uneven_twice((8, 3), (2, 2), (Shard(0), strided))


def test_replicated_weights():
    from torch.distributed.tensor import Replicate

    for rank in range(2):
        with process(rank, 2) as mesh:
            assert_set(distributed(nn.Linear(WIDTH, CLASSES), mesh, Replicate()))


def test_a_sharded_part_of_the_layer():
    from torch.distributed.tensor import Shard

    for rank, half in itertools.product(range(2), range(2)):
        with process(rank, 2) as mesh:
            linear = distributed(nn.Linear(WIDTH // 2, CLASSES), mesh, Shard(0))
            assert_set(linear, (1, 2, half), (0, 2, rank), row_offset=5 * half)


def distributed(linear, mesh, placement):
    from torch.distributed.tensor import distribute_tensor

    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [placement]))
    return linear


def test_partial_sums_are_refused():
    from torch.distributed.tensor import DTensor, Partial

    with process(0, 2) as mesh:
        linear = nn.Linear(WIDTH, CLASSES)
        partial = DTensor.from_local(linear.weight.detach(), mesh, [Partial()], run_check=False)
        linear.weight = nn.Parameter(partial)
        with pytest.raises(
            ValueError, match=r"linear.weight must be no partial sum, got .*Partial"
        ):
            DFA([DFALayer()]).match_output_(linear)
