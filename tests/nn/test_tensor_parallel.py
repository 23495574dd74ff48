"""Tensor parallelism: the gradients of one process, whatever is sharded, and how much is sent."""

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer, alignment, attach
from dfa_kernels.nn import OutputWeights
from tests import processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

POINTS = ["1", "3", "5"]
MASK = {"1": (torch.arange(8) % 2).double(), "5": torch.arange(10).double()}
MATRIX = torch.randn(10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Ones:
    """A source of the user's own, which knows nothing of shards."""

    def project(self, error, layers, dtype):
        assert type(error) is torch.Tensor
        pairs = zip(layers.sizes, layers.scales, strict=True)
        return [(error.sum(1, keepdim=True) * scale).repeat(1, size) for size, scale in pairs]

    def describe(self):
        return {}


def centred(error):
    return error.sign() - error.mean(1, keepdim=True)


def doubled(signal, layer):
    return signal.mul_(2)


OPTIONS = [
    {},
    {"distribution": "hadamard"},
    {"shared": False},
    {"mask": MASK},
    {"error_transform": centred},
    {"normalization": "shared", "lean": True, "signal_transform": doubled},
    {"matrix": MATRIX},
    {"matrix": Ones()},
    {"through": torch.sin},
]


def network():
    torch.manual_seed(0)
    sizes = (4, 8, 6, 10, 7)
    parts = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    tanhs = [nn.Tanh() for _ in range(3)]
    model = nn.Sequential(*[part for pair in zip(parts, tanhs, strict=False) for part in pair])
    model.append(parts[-1])
    return model.double()


def batch():
    torch.manual_seed(1)
    return torch.randn(6, 4, dtype=torch.float64), torch.randint(7, (6,))


def plans():
    """What is parallel, and whether the output stays sharded for `loss_parallel`."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel as Columns
    from torch.distributed.tensor.parallel import RowwiseParallel as Rows

    first, rows, whole = Shard(0), Shard(-1), Replicate()
    sharded = Columns(use_local_output=False)
    by_batch = {
        "0": Columns(output_layouts=first),
        "2": Columns(input_layouts=first, output_layouts=first),
        "4": Columns(input_layouts=first),
    }
    return [
        ({"0": Columns(), "2": Rows()}, False),
        ({"0": sharded, "2": Rows()}, False),
        ({"0": Columns(output_layouts=whole), "6": Columns(output_layouts=whole)}, False),
        ({"4": Columns(), "6": Rows()}, False),
        ({"6": sharded}, True),
        ({"0": Columns(), "2": Rows(), "6": sharded}, True),
        ({"4": sharded, "6": Columns(input_layouts=rows, use_local_output=False)}, True),
        ({**by_batch, "6": Columns(input_layouts=rows, use_local_output=False)}, True),
        ({**by_batch, "6": Columns(input_layouts=rows, output_layouts=whole)}, False),
    ]


def backward(model, parallel_loss=False):
    from torch.distributed.tensor.parallel import loss_parallel

    x, y = batch()
    with loss_parallel() if parallel_loss else contextlib.nullcontext():
        F.cross_entropy(model(x), y).backward()
    return [whole(parameter.grad) for parameter in model.parameters()]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mesh_of(world):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))


def train_every_way(rank):
    from torch.distributed.tensor.parallel import parallelize_module

    mesh, found = mesh_of(2), []
    for plan, parallel_loss in plans():
        for options in OPTIONS:
            model = network()
            attach(model, POINTS, seed=3, **options)
            parallelize_module(model, mesh, plan)
            found.append(backward(model, parallel_loss))
    return found


def assert_close(ours, theirs, case=None):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=f"case {case}")


def test_the_gradients_are_those_of_one_process(tmp_path):
    expected = []
    for options in OPTIONS:
        model = network()
        attach(model, POINTS, seed=3, **options)
        expected.append(backward(model))
    for found in processes.run(train_every_way, 2, tmp_path):
        assert len(found) == len(plans()) * len(OPTIONS)
        for case, gradients in enumerate(found):
            assert_close(gradients, expected[case % len(OPTIONS)], case)


# --- tokens, on a mesh of two dimensions: the batch by hand, features and tokens in parallel ---

WIDTH, TOKENS, VOCABULARY = 8, 4, 11


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.gate, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.double()

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tokens():
    torch.manual_seed(1)
    text = torch.randint(VOCABULARY, (4, TOKENS + 1))
    return text[:, :-1], text[:, 1:]


def parallelize(model, mesh, sequence, sharded):
    """As is usual for transformers; with `sequence`, tokens are sharded between the blocks."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    between = Shard(1) if sequence else Replicate()
    logits = Shard(-1) if sharded else Replicate()
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(
            input_layouts=between, output_layouts=logits, use_local_output=not sharded
        ),
    }
    for block in ("blocks.0", "blocks.1", "blocks.2"):
        plan[f"{block}.gate"] = plan[f"{block}.up"] = ColwiseParallel(input_layouts=between)
        plan[f"{block}.down"] = RowwiseParallel(output_layouts=between)
        if sequence:
            plan[f"{block}.norm"] = SequenceParallel()
    if sequence:
        plan["norm"] = SequenceParallel()
    return parallelize_module(model, mesh, plan)


def normalized(x):
    return F.layer_norm(x, x.shape[-1:])


def attached(model, kind):
    options = {"batch_dims": (0, 1), "seed": 3, "through": normalized}
    if kind == "output weights":
        del options["seed"]
        options["matrix"] = OutputWeights(model.head)
    elif kind == "hadamard":
        options["distribution"] = kind
    return attach(model, list(model.blocks), **options)


KINDS = ("normal", "hadamard", "output weights")


def losses_and_gradients(model, rows=slice(None), parallel_loss=False):
    from torch.distributed.tensor.parallel import loss_parallel

    inputs, targets = (part[rows] for part in tokens())
    with loss_parallel() if parallel_loss else contextlib.nullcontext():

        def loss():
            return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

        loss().backward()
        cosines = alignment(model, loss)
    return [whole(parameter.grad) for parameter in model.parameters()], list(cosines.values())


def train_language(rank):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    rows = slice(2, 4) if mesh["dp"].get_local_rank() else slice(0, 2)
    found = {}
    for kind in KINDS:
        for sequence in (False, True):
            for sharded in (False, True):
                if kind == "output weights" and not sharded:
                    continue  # refused: see below
                model = parallelize(Language(), mesh["tp"], sequence, sharded)
                attached(model, kind)
                gradients, cosines = losses_and_gradients(model, rows, sharded)
                for gradient in gradients:
                    dist.all_reduce(gradient, group=mesh["dp"].get_group())
                found[kind, sequence, sharded] = gradients, cosines
    return found


def test_transformers(tmp_path):
    expected = {}
    for kind in KINDS:
        model = Language()
        attached(model, kind)
        expected[kind] = [
            losses_and_gradients(model, slice(2 * half, 2 * half + 2)) for half in range(2)
        ]
    for rank, found in enumerate(processes.run(train_language, 4, tmp_path)):
        for case, (gradients, cosines) in found.items():
            assert_close(gradients, expected[case[0]][1][0], case)
            assert_close(torch.tensor(cosines), torch.tensor(expected[case[0]][rank // 2][1]), case)


class Own(nn.Module):
    """A model with a `DFA` of its own, without watch()."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 6)
        self.layer = DFALayer()
        self.dfa = DFA([self.layer], seed=seed)

    def forward(self, x):
        return self.dfa(self.head(self.layer(torch.tanh(self.first(x)))))


def train_with_seeds_of_their_own(rank):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    said = []
    for plan in (
        {"first": ColwiseParallel(), "head": RowwiseParallel()},
        {"first": ColwiseParallel(output_layouts=Replicate())},
        {"head": ColwiseParallel(output_layouts=Replicate())},
        {"head": ColwiseParallel(use_local_output=False)},
    ):
        model = parallelize_module(Own(seed=rank), mesh_of(2), plan)
        for _ in range(2):  # each time
            with pytest.raises(ValueError, match="seed and layers") as caught:
                model(torch.ones(3, 4))
        said.append(str(caught.value))
    return said


def test_other_seeds_are_refused_without_watch_too(tmp_path):
    for rank, said in enumerate(processes.run(train_with_seeds_of_their_own, 2, tmp_path)):
        assert len(said) == 4
        for message in said:
            assert "got others on ranks [1] than on rank 0" in message
            assert f"seed={rank}" in message
