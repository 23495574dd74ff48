"""`project` of DTensors: each process projects its part, and signals say how they are placed."""

import itertools

import pytest
import torch
import torch.distributed as dist

from dfa_kernels import project, sharding
from tests import processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

SIZES = [7, 5, 7]
DISTRIBUTIONS = ("normal", "hadamard")


def error():
    return torch.randn(5, 3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def value(signals):
    return signals[0].sum() + signals[1].square().sum()


def project_every_way(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    kinds = (Replicate(), Shard(1), Shard(2))
    found = []
    for placements, name in itertools.product(itertools.product(kinds, kinds), DISTRIBUTIONS):
        shared = distribute_tensor(error(), mesh, placements).requires_grad_()
        signals = project(shared, SIZES, seed=3, distribution=name)
        for signal in signals:
            for ours, theirs in zip(signal.placements, placements, strict=True):
                assert ours == (Partial() if theirs == Shard(2) else theirs)
        assert signals[0] is signals[2]
        value([signal.full_tensor() for signal in signals]).backward()
        assert shared.grad.placements == placements
        wholes = [tensor.full_tensor().detach() for tensor in (*signals, shared.grad)]
        found.append((name, wholes))
    return found


def test_parts_make_the_signals_of_the_whole(tmp_path):
    expected = {}
    for name in DISTRIBUTIONS:
        whole = error().requires_grad_()
        signals = project(whole, SIZES, seed=3, distribution=name)
        value(signals).backward()
        expected[name] = [*(signal.detach() for signal in signals), whole.grad]
    for found in processes.run(project_every_way, 4, tmp_path):
        assert len(found) == 18
        for name, tensors in found:
            torch.testing.assert_close(tensors, expected[name], rtol=1e-10, atol=1e-12)


@pytest.fixture
def shared():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    with processes.fake_group(2, rank=1):
        mesh, part = init_device_mesh("cpu", (2,)), error()[..., 6:]
        yield sharding.dtensor(part, mesh, [Shard(2)], error().shape)


def test_each_process_projects_its_columns(shared):
    part = error()[..., 6:]
    expected = project(part, [4], seed=1, column_offset=106, error_size=200)
    (signal,) = project(shared, [4], seed=1, column_offset=100, error_size=200)
    torch.testing.assert_close(signal.to_local(), expected[0], rtol=0, atol=0)


def test_arguments_are_checked_for_the_whole(shared):
    with pytest.raises(ValueError, match=r"project: error_size must be at least .* = 11, got 6"):
        project(shared, [4], error_size=6)
    with pytest.raises(ValueError, match=r"project: column_offset"):
        project(shared, [4], column_offset=-1)


def test_compiled(shared):
    compiled = torch.compile(lambda e: project(e, [4, 3], seed=1), backend="eager", fullgraph=True)
    for ours, theirs in zip(compiled(shared), project(shared, [4, 3], seed=1), strict=True):
        assert ours.placements == theirs.placements
        assert torch.equal(ours.to_local(), theirs.to_local())
