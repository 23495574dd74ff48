"""Activations of which each process has a part are refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dfa_kernels import DFA, DFALayer, attach
from dfa_kernels.nn.shards import refuse_a_shard, refuse_shards

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def distributed(mesh, placement):
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(torch.ones(3, 4), mesh, [placement], run_check=False)


def parallel(mesh, kind, module=None, **options):
    from torch.distributed.tensor import parallel as styles

    module = module or nn.Linear(4, 8)
    return styles.parallelize_module(module, mesh, getattr(styles, kind)(**options))


def test_a_sharded_activation_or_output_is_refused(mesh):
    from torch.distributed.tensor import Partial, Shard

    layer = DFALayer()
    dfa = DFA([layer])
    for placement in (Shard(1), Shard(0), Partial()):
        tensor = distributed(mesh, placement)
        with pytest.raises(ValueError, match=r"DFALayer: activation must be whole.*Replicate\(\)"):
            layer(tensor)
        with pytest.raises(ValueError, match=r"DFA: output must be whole.*Replicate\(\)"):
            dfa(tensor)


def test_a_replicated_one_is_whole(mesh):
    from torch.distributed.tensor import Replicate

    refuse_shards("DFALayer", "activation", distributed(mesh, Replicate()))


def test_a_part_of_the_features_is_refused(mesh):
    inputs = torch.ones(3, 4)
    linear = parallel(mesh, "ColwiseParallel")
    nested = nn.Sequential(nn.Tanh(), nn.Sequential(linear, nn.Tanh()), nn.Dropout())
    for module in (linear, nested):
        with pytest.raises(
            ValueError, match=r"attach: 'fc' must return all 8 features.*got 4.*Rep"
        ):
            refuse_a_shard("fc", module, module(inputs))
    table = parallel(mesh, "ColwiseParallel", nn.Embedding(10, 8))
    with pytest.raises(ValueError, match=r"attach: 'table' must return all 8 features.*got 4"):
        refuse_a_shard("table", table, table(torch.zeros(3, dtype=torch.long)))


def test_whole_features_are_taken(mesh):
    from torch.distributed.tensor import Replicate

    inputs = torch.ones(3, 4)
    whole = parallel(mesh, "ColwiseParallel", output_layouts=Replicate())
    refuse_a_shard("fc", whole, whole(inputs))
    rows = parallel(mesh, "RowwiseParallel", input_layouts=Replicate())
    refuse_a_shard("fc", rows, torch.ones(3, 8))
    # As fully_shard leaves a module: a sharded weight, and all features.
    refuse_a_shard("fc", parallel(mesh, "ColwiseParallel"), torch.ones(3, 8))
    for module in (nn.Linear(4, 8), nn.Tanh(), nn.Sequential(nn.Tanh())):
        refuse_a_shard("plain", module, torch.ones(3, 4))


def test_attached_points_and_inputs_that_are_parts_are_refused(mesh):
    x = torch.ones(3, 4)
    for points in ({"points": ["0"]}, {"inputs": ["1"]}):
        model = nn.Sequential(parallel(mesh, "ColwiseParallel"), nn.Linear(8, 6), nn.Linear(6, 5))
        attach(model, **points)
        parallel(mesh, "RowwiseParallel", model[1])
        with pytest.raises(
            ValueError, match=r"(all 8 features|DFALayer: activation must be whole)"
        ):
            model(x)
