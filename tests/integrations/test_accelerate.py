"""Models that accelerate prepares for two processes learn what one process would teach them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer, attach
from tests import processes
from tests.integrations import environment

accelerate = pytest.importorskip("accelerate")

WIDTH, CLASSES, STEPS = 8, 3, 4
BLOCKS = [f"blocks.{index}" for index in range(3)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, modules=False, seed=3):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.layers = nn.ModuleList(DFALayer() for _ in range(3)) if modules else None
        self.own = DFA(self.layers, seed=seed) if modules else nn.Identity()
        if modules:
            self.own.watch(self)
        self.double()

    def forward(self, x):
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.layers is not None:
                x = self.layers[index](x)
        return self.own(self.head(x))


def loader(rows):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * STEPS, 5, generator=generator, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(x, torch.arange(8 * STEPS) % CLASSES)
    return torch.utils.data.DataLoader(data, batch_size=rows)


def train(model, optimizer, batches, backward=torch.Tensor.backward):
    for x, y in batches:
        optimizer.zero_grad()
        backward(F.cross_entropy(model(x), y))
        optimizer.step()


# name: (options of accelerate's plugin for FSDP2, when attach is called)
ORDERS = ("attach first", "prepare first", "modules")
CASES = {
    **{f"DDP, {order}": (None, order) for order in ORDERS},
    **{f"FSDP2, {order}": ({}, order) for order in ORDERS},
    **{
        f"FSDP2 of whole states, {order}": ({"state_dict_type": "FULL_STATE_DICT"}, order)
        for order in ORDERS
    },
    **{
        f"FSDP2 of rank 0's weights, {order}": ({"cpu_ram_efficient_loading": True}, order)
        for order in ORDERS[:2]
    },
}


def accelerator_of(rank, plugin):
    environment.launched(rank)
    environment.new_accelerate_state(fsdp=plugin is not None)
    if plugin is not None:
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            **plugin,
        )
    return accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)


def prepared(rank, plugin, order, seed):
    """An Accelerator, the model, optimizer and loader that it has prepared, and the `DFA`."""
    accelerator = accelerator_of(rank, plugin)
    model = Net(order == "modules", seed)
    if rank == 1 and plugin is not None and "cpu_ram_efficient_loading" in plugin:
        for parameter in model.parameters():
            parameter.data.zero_()  # it gets rank 0's

    def attached():
        handle = attach(model, BLOCKS, seed=seed)
        if plugin is not None and "state_dict_type" in plugin:
            model.dfa = handle.dfa  # so that torch loads it on every rank
        return handle.dfa

    dfa = attached() if order == "attach first" else model.own
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    wrapped, optimizer, batches = accelerator.prepare(model, optimizer, loader(4))
    if order == "prepare first":
        dfa = attached()
    return accelerator, wrapped, optimizer, batches, dfa


def resumed(rank, folder):
    """Kinds of modules, weights, those of a resumed run and its seed, and all warnings."""
    found = {}
    for name, (plugin, order) in CASES.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            accelerator, model, optimizer, batches, _ = prepared(rank, plugin, order, 3)
            batches = list(batches)
            train(model, optimizer, batches[:2], accelerator.backward)
            accelerator.save_state(f"{folder}/{name}")
            train(model, optimizer, batches[2:], accelerator.backward)
            block = accelerator.unwrap_model(model).blocks[0]
            kinds = type(model).__name__, type(block).__name__
            whole = accelerator.get_state_dict(model)

            accelerator, model, optimizer, _, dfa = prepared(rank, plugin, order, None)
            train(model, optimizer, batches[:1], accelerator.backward)
            accelerator.load_state(f"{folder}/{name}")
            train(model, optimizer, batches[2:], accelerator.backward)
            again = accelerator.get_state_dict(model)
        warned = [str(one.message) for one in said]
        found[name] = kinds, whole, again, dfa.seed, warned
    return found


def test_two_processes_learn_what_one_learns_and_resume_with_its_seed(tmp_path):
    model = Net()
    attach(model, BLOCKS, seed=3)
    train(model, torch.optim.Adam(model.parameters(), 0.1), loader(8))
    for rank, found in enumerate(processes.run(resumed, 2, tmp_path, str(tmp_path))):
        for name, (kinds, whole, again, seed, warned) in found.items():
            assert (seed, warned) == (3, []), name
            ddp = name.startswith("DDP")
            assert kinds == (
                ("DistributedDataParallel", "Block") if ddp else ("FSDPNet", "FSDPBlock")
            )
            assert whole.keys() == again.keys()
            if rank == 1 and not ddp:  # accelerate gives a whole state to rank 0
                continue
            for key, value in model.named_parameters():
                torch.testing.assert_close(whole[key], value.detach(), msg=f"{name}: {key}")
            for key, value in whole.items():  # the DFA's state too
                assert torch.equal(again[key], value), f"{name}: {key}"
