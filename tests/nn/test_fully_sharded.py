"""Models of `fully_shard`: gradients of one process, parameters gathered one block at a time."""

import contextlib
import dataclasses
import functools
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dfa_kernels import DFA, DFALayer, alignment, attach
from dfa_kernels.nn import OutputWeights
from tests import processes
from tests.nn.networks import Calls, assert_equal, gradients

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

WIDTH, CLASSES, ROWS = 8, 3, 8
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


class Block(nn.Module):
    def __init__(self, inside=False, after=False, checkpointed=False):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.inside, self.after = DFALayer() if inside else None, DFALayer() if after else None
        self.checkpointed = checkpointed

    def forward(self, x):
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return x if self.after is None else self.after(x)

    def body(self, x):
        hidden = torch.tanh(self.up(self.norm(x)))
        return x + self.down(hidden if self.inside is None else self.inside(hidden))


class Net(nn.Module):
    """Blocks between two linear layers; has a `DFA` of its own where its blocks have layers."""

    def __init__(self, around=False, watch=True, options=None, **blocks):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block(**blocks) for _ in range(4))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.around = around  # a checkpoint around each block
        layers = [module for module in self.modules() if isinstance(module, DFALayer)]
        self.own = DFA(layers, **{"seed": 3, **(options or {})}) if layers else nn.Identity()
        if layers and watch:
            self.own.watch(self)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.around else block(x)
        return self.own(self.head(x))


def shard(module, **options):
    """By `fully_shard`, over all ranks and on the CPU unless the options say otherwise."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, **{"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), **options})


def each_block(model, **options):
    for module in (*model.blocks, model):
        shard(module, **options)


def the_whole(model):
    shard(model)


def blocks_alone(model):
    for module in (model.stem, *model.blocks, model.head):
        shard(module)


def pairs(model):
    for group in (list(model.blocks[:2]), list(model.blocks[2:]), model):
        shard(group)


def nested(model):
    for block in model.blocks:
        shard(block.up)
    each_block(model)


def kept(model):
    each_block(model, reshard_after_forward=False)


def head_too(model):
    shard(model.head)
    each_block(model)


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


def step(model, x, y):
    loss_of(model, x, y).backward()


def accumulated(model, x, y):
    for part in range(4):
        with contextlib.suppress(AttributeError):  # of one process
            model.set_requires_gradient_sync(part == 3)
        (F.cross_entropy(model(x[part::4]), y[part::4]) / 4).backward()


def two_passes_at_once(model, x, y):
    losses = [F.cross_entropy(model(x[part::2]), y[part::2]) / 2 for part in range(2)]
    for loss in losses:
        loss.backward()


def through_three_modes(model, x, y):
    for model.dfa.mode in ("backprop", "shallow", "dfa"):
        step(model, x, y)


def after_alignment(model, x, y):
    loss = loss_of(model, x, y)
    alignment(model, lambda: loss_of(model, x, y))
    loss.backward()
    alignment(model, lambda: loss_of(model, x, y))


BLOCKS = [f"blocks.{index}" for index in range(4)]


def normalized(x):
    return F.layer_norm(x, x.shape[-1:])


def options_for(model, kind):
    """The keywords of `attach`."""
    options = {"points": BLOCKS, "seed": 3}
    if kind == "every second":
        options["points"] = BLOCKS[1::2]
    elif kind == "hidden":
        options["points"], options["inputs"] = [], [f"{name}.down" for name in BLOCKS]
    elif kind == "options":
        mask = torch.arange(WIDTH, dtype=torch.float64)
        options |= {"lean": True, "mask": {"blocks.1": mask}, "through": normalized}
    elif kind == "output weights":
        options["matrix"] = OutputWeights(model.head)
        del options["seed"]
    elif kind == "output weights of the head":
        options |= {"matrix": OutputWeights(model.head), "output": "head"}
        del options["seed"]
    return options


# name: (arguments of Net, what is attached or None, sharding, steps, order)
CASES = {
    **{
        f"{kind or 'modules'}, {sharding.__name__}, {order}": (net, kind, sharding, step, order)
        for net, kind, sharding, orders in [
            ({}, "each", each_block, ("attach first", "shard first")),
            ({}, "each", the_whole, ("attach first", "shard first")),
            ({}, "each", blocks_alone, ("attach first", "shard first")),
            ({}, "each", pairs, ("attach first", "shard first")),
            ({}, "each", nested, ("attach first",)),
            ({}, "each", kept, ("shard first",)),
            ({}, "every second", each_block, ("attach first", "shard first")),
            ({}, "hidden", each_block, ("attach first", "shard first")),
            ({}, "options", each_block, ("attach first", "shard first")),
            ({}, "output weights", each_block, ("attach first", "shard first")),
            ({}, "output weights of the head", head_too, ("attach first",)),
            ({"after": True}, None, each_block, ("",)),
            ({"after": True, "watch": False}, None, nested, ("",)),
        ]
        for order in orders
    },
    "inside": ({"inside": True}, None, each_block, step, ""),
    "both": ({"inside": True, "after": True}, None, head_too, step, ""),
    "lean": ({"after": True, "options": {"lean": True}}, None, each_block, step, ""),
    "checkpoint inside": ({"inside": True, "checkpointed": True}, None, each_block, step, ""),
    "checkpoint around": ({"after": True, "around": True}, None, each_block, step, ""),
    "checkpoint around, attached": ({"around": True}, "each", each_block, step, "shard first"),
    "accumulated": ({}, "each", each_block, accumulated, "shard first"),
    "two passes": ({}, "each", each_block, two_passes_at_once, "attach first"),
    "modes": ({}, "each", each_block, through_three_modes, "attach first"),
    "alignment": ({}, "each", each_block, after_alignment, "attach first"),
    "alignment and output weights": (
        {},
        "output weights",
        each_block,
        after_alignment,
        "attach first",
    ),
}


def build(case, sharded):
    net, kind, sharding, _, order = case
    model = Net(**net).double()
    make = [functools.partial(sharding, model)] if sharded else []
    if kind is not None:
        make.append(lambda: attach(model, **options_for(model, kind)))
    for one in reversed(make) if order == "attach first" else make:
        one()
    return model


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 5, generator=generator, dtype=torch.float64), torch.arange(ROWS) % 3


def half(rank):
    part = slice(ROWS // 2 * rank, ROWS // 2 * (rank + 1))
    return tuple(tensor[part] for tensor in data())


@contextlib.contextmanager
def turns():
    """What fully_shard does to the parameters of which module, in order."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    found = []

    def noting(name, method):
        def noted(group, *args):
            done = {"_to_unsharded": group.is_unsharded, "_to_sharded": group.is_sharded}
            if not done.get(name):
                found.append(f"{name.strip('_')} {group._module_fqn}")
            return method(group, *args)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_to_unsharded", "_to_sharded", "post_backward"):
            patch.setattr(FSDPParamGroup, name, noting(name, getattr(FSDPParamGroup, name)))
        yield found


def measured(model, x, y):
    """The products of a step by DFA, and the turns of fully_shard in its backward pass."""
    loss = loss_of(model, x, y)
    with turns() as found, Calls() as calls:
        loss.backward()
    return calls.products, found


def results_of_cases(rank):
    found = {}
    for name, case in CASES.items():
        _, kind, _, steps, _ = case
        model = build(case, True)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            products, ours = measured(model, *half(rank))
            model.zero_grad()
            steps(model, *half(rank))
        whole = [grad.full_tensor() for grad in gradients(model)]
        (model.own if kind is None else model.dfa).mode = "backprop"
        _, theirs = measured(model, *half(rank))
        found[name] = whole, [str(one.message) for one in said], products, ours, theirs
    return found


def test_gradients_and_products_are_those_of_one_process_and_turns_those_of_backprop(tmp_path):
    """Parameters are gathered, and given back with their gradients reduced, in the same order."""
    expected = {}
    for name, case in CASES.items():
        *_, steps, _ = case
        model = build(case, False)
        steps(model, *data())
        expected[name] = gradients(model), measured(model, *data())[0]
    for found in processes.run(results_of_cases, 2, tmp_path):
        for name, (ours, said, products, turns_of_dfa, turns_of_backprop) in found.items():
            theirs, fewest = expected[name]
            assert_equal(ours, theirs, **CLOSE)
            assert turns_of_dfa == turns_of_backprop, name
            assert len([turn for turn in turns_of_dfa if turn.startswith("post_backward")]) > 0
            if CASES[name][0].get("watch", True):
                assert (said, products) == ([], fewest), name
            else:
                (warning,) = said
                assert warning.startswith("DFA: fully_shard is in use and watch(model) was not")
                assert products > fewest, name


def alignments(rank):
    x, y = half(rank)
    found = []
    for kind in ("each", "output weights"):
        for order in ("attach first", "shard first"):
            for sharded in (True, False):
                model = build(({}, kind, each_block, step, order), sharded)
                loss = functools.partial(loss_of, model, x, y)
                found.append((sharded, alignment(model, loss)))
    return found


def test_alignment_is_that_of_the_ranks_rows(tmp_path):
    for found in processes.run(alignments, 2, tmp_path):
        for (_, ours), (_, theirs) in zip(found[::2], found[1::2], strict=True):
            assert ours.keys() == theirs.keys() == {*BLOCKS}
            for name in BLOCKS:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-9)


def turns_on(rank, device):
    from torch.distributed.device_mesh import DeviceMesh

    group = dist.new_group(backend="nccl" if device == "cuda" else "gloo")
    mesh = DeviceMesh.from_group(group, device)
    x, y = (tensor.to(device) for tensor in data())
    found = []
    for attach_first in (True, False):
        model = Net().to(device)
        if attach_first:
            handle = attach(model, BLOCKS, seed=3)
        each_block(model, mesh=mesh)
        if not attach_first:
            handle = attach(model, BLOCKS, seed=3)
        _, ours = measured(model, x.float(), y)
        handle.mode = "backprop"
        found.append((ours, measured(model, x.float(), y)[1]))
    return found


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
def test_turns_are_those_of_backprop_on_every_device(tmp_path, device):
    """On a GPU autograd runs a node in that device's queue only if it gets a gradient there."""
    (found,) = processes.run(turns_on, 1, tmp_path, device)
    for ours, theirs in found:
        assert ours == theirs


def results_of_four(rank):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    part = slice(2 * rank, 2 * rank + 2)
    x, y = (tensor[part] for tensor in data())
    found = []
    for options in ({"mesh": mesh}, {"reshard_after_forward": 2}):
        for order in ("attach first", "shard first"):
            sharding = functools.partial(each_block, **options)
            model = build(({}, "each", sharding, step, order), True)
            _, ours = measured(model, x, y)
            whole = [grad.full_tensor() for grad in gradients(model)]
            model.dfa.mode = "backprop"
            found.append((whole, ours, measured(model, x, y)[1]))
    model = Net().double()
    attach(model, BLOCKS, seed=rank // 2)
    each_block(model, mesh=mesh)
    with pytest.raises(ValueError, match="DFA: seed and layers") as error:
        model(x)
    return found, str(error.value)


@pytest.mark.battery
def test_replicas_of_shards_and_a_partial_reshard(tmp_path):
    model = build(CASES["each, each_block, attach first"], False)
    step(model, *data())
    for rank, (found, refusal) in enumerate(processes.run(results_of_four, 4, tmp_path)):
        for ours, turns_of_dfa, turns_of_backprop in found:
            assert_equal(ours, gradients(model), **CLOSE)
            assert turns_of_dfa == turns_of_backprop
        assert f"on ranks [{rank % 2 + 2}] than on rank {rank % 2}, " in refusal


def results_compiled(rank, ways, backend):
    warnings.filterwarnings("default", message=".*")
    found = {}
    for how in ways:
        for kind in (None, "each"):
            torch._dynamo.reset()
            model = Net(after=kind is None).double()
            run = model
            if how == "wrapped":
                for index, block in enumerate(model.blocks):
                    model.blocks[index] = torch.compile(block, backend=backend)
            each_block(model)
            if kind is not None:
                attach(model, list(model.blocks), seed=3)
            if how == "in place":
                for block in model.blocks:
                    block.compile(backend=backend)
            elif how == "whole":
                run = torch.compile(model, backend=backend)
            both = []
            for mode in ("dfa", "backprop"):
                (model.own if kind is None else model.dfa).mode = mode
                for _ in range(3):
                    model.zero_grad()
                    loss = loss_of(run, *half(rank))
                    with turns() as order:
                        loss.backward()
                both.append(([grad.full_tensor() for grad in gradients(model)], order))
            found[f"{how}, {kind}"] = both
    return found


WAYS = ("wrapped", "in place", "whole")


@pytest.mark.parametrize(
    ("ways", "backend"),
    [
        (["in place"], "eager"),
        pytest.param(WAYS, "aot_eager", marks=pytest.mark.battery),
        pytest.param(WAYS, "inductor", marks=pytest.mark.battery),
    ],
)
def test_compiled(tmp_path, ways, backend):
    model = build(CASES["each, each_block, attach first"], False)
    step(model, *data())
    for found in processes.run(results_compiled, 2, tmp_path, ways, backend):
        for name, ((ours, turns_of_dfa), (_, turns_of_backprop)) in found.items():
            assert_equal(ours, gradients(model), **CLOSE)
            assert turns_of_dfa == turns_of_backprop, name


def results_in_half_precision(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)

    def in_half(model):
        for block in model.blocks:
            shard(block, mp_policy=policy)
        shard(model, mp_policy=dataclasses.replace(policy, output_dtype=torch.float32))

    x, y = half(rank)
    found = []
    for order in (1, -1):
        model = Net()
        for action in (
            functools.partial(attach, model, BLOCKS, seed=3),
            functools.partial(in_half, model),
        )[::order]:
            action()
        step(model, x.float(), y)
        found.append([grad.full_tensor() for grad in gradients(model)])
    return found


def test_mixed_precision(tmp_path):
    model = Net()
    attach(model, BLOCKS, seed=3)
    x, y = data()
    step(model, x.float(), y)
    for both in processes.run(results_in_half_precision, 2, tmp_path):
        for found in both:
            for ours, theirs in zip(found, gradients(model), strict=True):
                assert ours.dtype == torch.float32
                assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99
                assert 0.95 < ours.norm() / theirs.norm() < 1.05


def resumed(rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict

    def train(model, optimizer, steps):
        for seed in steps:
            generator = torch.Generator().manual_seed(2 * seed + rank)
            x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            step(model, x, torch.arange(4) % 3)
            optimizer.step()

    def build(kind, seed):
        if kind == "modules":
            model = Net(after=True, options={"seed": seed}).double()
        else:
            model = Net().double()
            if kind == "attach first":
                attach(model, BLOCKS, seed=seed)
        each_block(model)
        if kind == "shard first":
            attach(model, BLOCKS, seed=seed)
        return model, torch.optim.Adam(model.parameters(), 0.1)

    found = []
    for kind in ("attach first", "shard first", "modules"):
        whole, optimizer = build(kind, 7)
        train(whole, optimizer, range(2))
        states = state_dict.get_state_dict(whole, optimizer)
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=f"{folder}/{kind}")
        full = state_dict.get_model_state_dict(
            whole, options=state_dict.StateDictOptions(full_state_dict=True)
        )
        train(whole, optimizer, range(2, 4))

        model, optimizer = build(kind, None)
        states = state_dict.get_state_dict(model, optimizer)
        dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=f"{folder}/{kind}")
        state_dict.set_state_dict(
            model, optimizer, model_state_dict=states[0], optim_state_dict=states[1]
        )
        train(model, optimizer, range(2, 4))
        pairs = zip(whole.parameters(), model.parameters(), strict=True)
        same = [torch.equal(one.full_tensor(), other.full_tensor()) for one, other in pairs]
        found.append((kind, same, full))
    return found


def test_a_run_that_is_resumed_from_a_distributed_checkpoint_goes_on_bit_for_bit(tmp_path):
    """And its whole state fits a model in one process."""
    first, second = processes.run(resumed, 2, tmp_path, str(tmp_path))
    for kind, same, _ in (*first, *second):
        assert all(same), kind
    for kind, _, full in first:
        model = Net(after=kind == "modules", options={"seed": None}).double()
        if kind != "modules":
            attach(model, BLOCKS)
        model.load_state_dict(full)
        assert (model.own if kind == "modules" else model.dfa).seed == 7


def refusals(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel

    def tensor_parallel(model):
        styles = {"up": parallel.ColwiseParallel(), "down": parallel.RowwiseParallel()}
        for block in model.blocks:
            parallel.parallelize_module(block, init_device_mesh("cpu", (2,)), styles)

    def refusal(model):
        found = []
        for _ in range(2):  # each time
            with pytest.raises(ValueError, match="DFA: seed and layers") as refused:
                model(half(rank)[0])
            found.append(str(refused.value))
        return found[-1]

    found = {}
    for parallel_in in (each_block, the_whole, tensor_parallel):
        model = Net().double()
        attach(model, BLOCKS, seed=rank)
        parallel_in(model)
        found[parallel_in.__name__] = refusal(model)
    model = Net().double()
    attach(model, BLOCKS[rank:], seed=0)
    each_block(model)
    found["layers"] = refusal(model)
    model = Net().double()  # one rank has no layer
    if rank == 0:
        attach(model, BLOCKS, seed=0)
    else:
        DFA([]).watch(model)
    each_block(model)
    found["no layers"] = refusal(model)
    return found


def test_ranks_that_do_not_agree_are_refused_on_every_rank(tmp_path):
    for rank, found in enumerate(processes.run(refusals, 2, tmp_path)):
        for kind, refusal in found.items():
            assert "on ranks [1] than on rank 0, and here " in refusal
            here = refusal.partition(" and here ")[2]
            if kind.endswith("layers"):
                count = {"layers": 4 - rank, "no layers": 4 * (1 - rank)}[kind]
                assert here.startswith(f"{count} layers, seed=0, "), kind
                assert f"of sizes {[WIDTH] * count}" in here
            else:
                assert here.startswith(f"4 layers, seed={rank}, "), kind


def lost_weights(rank):
    found = []
    for sharding, steps, order in (
        (head_too, step, "attach first"),
        (head_too, step, "shard first"),
        (each_block, two_passes_at_once, "shard first"),
    ):
        with pytest.raises(ValueError, match=r"OutputWeights: linear\.weight") as error:
            steps(build(({}, "output weights", sharding, steps, order), True), *half(rank))
        found.append(str(error.value))
    return found


def test_output_weights_that_are_not_whole_are_refused(tmp_path):
    for found in processes.run(lost_weights, 2, tmp_path):
        assert ["taken back" in refusal for refusal in found] == [False, False, True]
        for refusal in found:
            assert "attach first, and leave the output layer to the root module" in refusal


def loaded_by_rank_0(rank):
    """Whole states that torch broadcasts: of an attached DFA it leaves them on rank 0."""
    from torch.distributed.checkpoint import state_dict

    options = state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    found = []
    for as_submodule in (False, True):
        states = []
        for seed in (7, 8):
            model = Net().double()
            handle = attach(model, BLOCKS, seed=seed)
            if as_submodule:
                model.dfa = handle.dfa
            each_block(model)
            step(model, *half(rank))
            states.append(state_dict.get_model_state_dict(model, options=options))
        handle.dfa.seed = None  # no choice that a loaded one is told of
        whole = states[0] if rank == 0 else {}
        state_dict.set_model_state_dict(model, whole, options=options)
        try:
            step(model, *half(rank))
            found.append(handle.dfa.seed)
        except ValueError as refusal:
            found.append(str(refusal))
    return found


def test_a_state_that_rank_0_alone_loaded_is_noticed_and_a_submodules_reaches_all(tmp_path):
    for attached, submodule in processes.run(loaded_by_rank_0, 2, tmp_path):
        assert "got others on ranks [1] than on rank 0" in attached
        assert "model.dfa = handle.dfa" in attached
        assert submodule == 7


def filled_from_the_meta_device(rank):
    """As accelerate's cpu_ram_efficient_loading: it takes every entry for a sharded parameter."""
    from torch.distributed.tensor import distribute_tensor

    model = Net().double()
    attach(model, BLOCKS, seed=3)
    whole = model.state_dict()
    model.to("meta")
    each_block(model)
    values = {
        name: distribute_tensor(whole[name], empty.device_mesh, empty.placements)
        for name, empty in model.state_dict().items()
    }
    model.load_state_dict(values, assign=True)
    step(model, *half(rank))
    return [grad.full_tensor() for grad in gradients(model)], "dfa._extra_state" in whole


def test_a_model_on_the_meta_device_has_no_state_but_its_parameters(tmp_path):
    model = build(CASES["each, each_block, attach first"], False)
    step(model, *data())
    for found, had_state in processes.run(filled_from_the_meta_device, 2, tmp_path):
        assert had_state
        assert_equal(found, gradients(model), **CLOSE)


def left_alone(rank, folder):
    model = build(CASES["each, each_block, attach first"], True)
    step(model, *half(rank))
    loss = F.cross_entropy(model(half(rank)[0]), half(rank)[1])
    if rank == 1:
        torch.save("gone", f"{folder}/1.pt")
        os._exit(0)
    with pytest.raises((RuntimeError, dist.DistError)) as error:
        loss.backward()
    return str(error.value)


def test_a_rank_that_dies_leaves_the_others_with_an_error(tmp_path):
    alone, _ = processes.run(left_alone, 2, tmp_path, str(tmp_path))
    assert "onnection" in alone


def test_detach_takes_all_hooks_away():
    """And no anchor is left of what runs outside of the model."""
    with processes.fake_group(2):
        model = Net().double()
        each_block(model)
        hooks = [
            (module, list(module._forward_pre_hooks), list(module._forward_hooks))
            for module in model.modules()
        ]
        handle = attach(model, BLOCKS, "head")
        for _ in range(2):  # the first puts them on
            model(data()[0])
            assert len(model.blocks[0]._forward_pre_hooks) == 3
            model.blocks[0](torch.ones(1, WIDTH, dtype=torch.float64))
            assert handle.dfa._group.anchors == []
        handle.detach()
        for module, before, after in hooks:
            assert (list(module._forward_pre_hooks), list(module._forward_hooks)) == (before, after)


def test_another_version_of_fully_shard_is_refused():
    with processes.fake_group(2):
        model = Net()
        each_block(model)
        attach(model, BLOCKS)
        model.blocks[2]._forward_hooks.clear()
        with pytest.raises(RuntimeError, match="DFA: found no hooks of fully_shard on a FSDPBlock"):
            model(data()[0].float())
