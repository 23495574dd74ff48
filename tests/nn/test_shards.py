"""How it is known what processes share, what is refused, and what is sent. Nothing is, here: the
group is an imitation. For values see test_tensor_parallel.py."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dfa_kernels import DFA, DFALayer, attach
from dfa_kernels.nn import OutputWeights, shards
from dfa_kernels.nn.shards import layout_of
from tests import processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    with processes.fake_group(2):
        yield init_device_mesh("cpu", (2,))


def parallel(mesh, kind, module, **options):
    from torch.distributed.tensor import parallel as styles

    return styles.parallelize_module(module, mesh, getattr(styles, kind)(**options))


def found(tensor):
    layout = layout_of("DFA", "output", tensor)
    return layout and (layout.placements, tuple(layout.shape), layout.local)


SHAPED = {
    "tanh": torch.tanh,
    "gated": lambda h: F.silu(h) * h + 1,
    "dropout": lambda h: F.dropout(h, 0.5),
    "checkpointed": lambda h: checkpoint(torch.sigmoid, h, use_reentrant=False),
}


@pytest.mark.parametrize("function", SHAPED.values(), ids=SHAPED)
def test_what_is_made_of_a_part_is_a_part(mesh, function):
    from torch.distributed.tensor import Shard

    linear = parallel(mesh, "ColwiseParallel", nn.Linear(4, 8))
    table = parallel(mesh, "ColwiseParallel", nn.Embedding(10, 8))
    assert found(function(linear(torch.ones(3, 4)))) == ((Shard(1),), (3, 8), True)
    assert found(function(table(torch.zeros(3, dtype=torch.long)))) == ((Shard(1),), (3, 8), True)


def test_what_is_not(mesh):
    from torch.distributed._functional_collectives import all_reduce
    from torch.distributed.tensor import Replicate, Shard

    columns = parallel(mesh, "ColwiseParallel", nn.Linear(4, 8))
    rows = parallel(mesh, "RowwiseParallel", nn.Linear(8, 4))
    gathered = parallel(mesh, "ColwiseParallel", nn.Linear(4, 8), output_layouts=Replicate())
    part = columns(torch.ones(4, 4))
    assert found(part) is not None
    for whole in (
        torch.tanh(rows(part)),
        gathered(torch.ones(4, 4)),
        all_reduce(part.sin(), "sum", mesh).sin(),
        all_reduce(part[:, :2], "sum", mesh).sin(),
        F.layer_norm(part, (4,)).detach(),
        distributed(mesh, Shard(0)).to_local().sum(1),
    ):
        assert found(whole) is None


REMADE = {
    "heads": lambda part: part.unflatten(1, (2, 2)),
    "heads and back": lambda part: part.unflatten(1, (2, 2)).softmax(2).flatten(1),
    "attention": lambda part: F.scaled_dot_product_attention(part, part, part),
    "product": lambda part: part @ torch.eye(4),
    "products": lambda part: torch.softmax(part @ part.T, 1) @ part,
    "linear": lambda part: F.linear(part, torch.eye(4)),
    "slice": lambda part: part[:, :2],
    "cat": lambda part: torch.cat([part[:2], part[2:]]),
}


@pytest.mark.parametrize("function", REMADE.values(), ids=REMADE)
def test_what_is_made_of_parts_otherwise_is_asked_about(mesh, monkeypatch, function):
    monkeypatch.setattr(shards, "_said", set())
    part = parallel(mesh, "ColwiseParallel", nn.Linear(4, 8))(torch.ones(4, 4))
    with pytest.warns(UserWarning, match=r"output is taken to be whole, got .* part of \[4, 8\]"):
        assert found(function(part)) is None


def test_a_dtensor_says_it_itself(mesh):
    from torch.distributed.tensor import Partial, Replicate, Shard

    for placement in (Shard(0), Replicate(), Partial()):
        assert found(distributed(mesh, placement))[::2] == ((placement,), False)


def distributed(mesh, placement, features=4):
    from torch.distributed.tensor import DTensor

    local = torch.ones(3, features, requires_grad=True)
    return DTensor.from_local(local, mesh, [placement], run_check=False)


def test_parts_of_different_kinds_are_refused(mesh):
    from torch.distributed.tensor import Shard

    one, other = (distributed(mesh, Shard(dim)).to_local() for dim in (0, 1))
    with pytest.raises(ValueError, match=r"DFA: output must be split in one way.*\[3, 8.*\[6, 4"):
        layout_of("DFA", "output", one + other)


def shared_model(mesh, **options):
    """Its output stays sharded by classes."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 10))
    attach(model, ["1", "3"], **options)
    parallel(mesh, "ColwiseParallel", model[4], use_local_output=False)
    return model


def backward(model):
    from torch.distributed.tensor.parallel import loss_parallel

    with loss_parallel():
        F.cross_entropy(model(torch.ones(3, 4)), torch.tensor([0, 1, 2])).backward()


def test_what_is_refused(mesh):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    with pytest.raises(ValueError, match=r"DFA: rp_device must be None where.*got cpu"):
        shared_model(mesh, rp_device="cpu")(torch.ones(3, 4))
    plain = shared_model(mesh, error_transform=lambda error: error.full_tensor())
    with pytest.raises(TypeError, match=r"error_transform must return a DTensor.*got Tensor"):
        backward(plain)
    layer = DFALayer()
    dfa = DFA([layer])
    layer(distributed(mesh, Shard(1)))
    other = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
    with pytest.raises(ValueError, match=r"output and activations must be DTensors on one device"):
        dfa(distributed(other, Replicate()))


def test_output_weights_have_to_be_where_the_error_is(mesh):
    from torch.distributed.tensor import Replicate

    for options, message in (
        ({"output_layouts": Replicate()}, r"linear.weight must be here for.*0 to 10, got 5 x 6"),
        ({"use_local_output": False}, None),
    ):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 10))
        attach(model, ["1"], matrix=OutputWeights(model[2]))
        parallel(mesh, "ColwiseParallel", model[2], **options)
        if message is None:
            backward(model)
        else:
            with pytest.raises(ValueError, match=message):
                model(torch.ones(3, 4)).sum().backward()


def test_compiled_code_takes_no_plain_parts(mesh):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
    attach(model, ["1"])
    parallel(mesh, "ColwiseParallel", model[0])
    parallel(mesh, "RowwiseParallel", model[2])
    with pytest.raises(Exception, match=r"dfa_layers\[0\] must be a DTensor where torch.compile"):
        torch.compile(model, backend="eager")(torch.ones(3, 4))


def test_what_only_compiled_code_knows_is_asked_about(mesh):
    """Its graph hides how a layer inside it was split: weights of that size are all there is."""
    for kind, sizes in (("ColwiseParallel", (4, 8)), ("RowwiseParallel", (8, 4))):
        linear = parallel(mesh, kind, nn.Linear(*sizes))
        tensor = torch.compile(linear, backend="aot_eager")(torch.ones(3, 4))
        assert tensor.shape == (3, 4)
        if kind == "RowwiseParallel":
            assert found(tensor) is None
        else:
            with pytest.warns(
                UserWarning, match=r"output is taken to be whole, got 4 .* a layer of 8"
            ):
                assert found(tensor) is None


@pytest.mark.parametrize("options", [{}, {"shared": False}, {"distribution": "hadamard"}])
def test_one_all_reduce_for_all_layers(mesh, options):
    """Of independent matrices too. Backpropagation has none here, but every process keeps all."""
    assert sent(shared_model(mesh, **options)) == {"all_reduce": 1}


def test_what_is_sent_where_activations_are_parts(mesh):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 10))
    attach(model, ["1"])
    parallel(mesh, "ColwiseParallel", model[0])
    parallel(mesh, "ColwiseParallel", model[2], input_layouts=by_features(), use_local_output=False)
    assert sent(model) == {"reduce_scatter_tensor": 1}


def test_signals_share_no_memory(mesh):
    """One layer's signal for a plain and for a DTensor activation: it may be changed in place."""
    from torch.distributed.tensor import Replicate, Shard

    memory = []

    def note(signal, layer):
        local = signal.to_local() if hasattr(signal, "to_local") else signal
        memory.append(local.data_ptr())
        return signal

    layers = [DFALayer(), DFALayer()]
    dfa = DFA(layers, signal_transform=note)
    layers[0](torch.ones(3, 4, requires_grad=True).sin())
    layers[1](distributed(mesh, Replicate()))
    dfa(distributed(mesh, Shard(1))).sum().backward()
    assert len({*memory}) == 2


def test_nothing_is_sent_where_the_error_is_whole(mesh):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 10))
    attach(model, ["1"])
    parallel(mesh, "ColwiseParallel", model[0])
    parallel(mesh, "RowwiseParallel", model[2])
    assert sent(model) == {}


def by_features():
    from torch.distributed.tensor import Shard

    return Shard(-1)


def sent(model):
    """The collectives of a backward pass."""
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import loss_parallel

    with loss_parallel():
        output = model(torch.ones(3, 4))
        loss = F.cross_entropy(output, torch.tensor([0, 1, 2]))
        with CommDebugMode() as debug:
            loss.backward()
    return {str(name).rpartition(".")[2]: count for name, count in debug.get_comm_counts().items()}
