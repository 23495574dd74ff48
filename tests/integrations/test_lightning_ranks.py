"""Modules that Lightning trains in two processes learn what one process would teach them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import attach
from tests import processes
from tests.integrations import environment

lightning = pytest.importorskip("lightning")
integration = pytest.importorskip("dfa_kernels.integrations.lightning")

pytestmark = pytest.mark.filterwarnings("default")  # other libraries' own
NAMES = ["blocks.0", "blocks.1"]
STEPS = 4


class Module(lightning.LightningModule):
    def __init__(self, seed=3, sharded=False, state="dfa"):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)
        self.double()
        self.sharded = sharded
        self.handle = attach(self, NAMES, "head", seed=seed, state=state)

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if self.sharded:
            for part in (*self.blocks, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch, _):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def fit(module, folder, rank=0, ranks=1, resume=None, **arguments):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * STEPS, 5, generator=generator, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(x, torch.arange(8 * STEPS) % 3)
    trainer = lightning.Trainer(
        max_epochs=1 if resume is None else 2,
        accelerator="cpu",
        logger=False,
        callbacks=[integration.DFACallback(lambda module, batch: module.loss(batch), every=1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,  # Lightning's shuffles
        **arguments,
    )
    own = torch.utils.data.Subset(data, range(rank, len(data), ranks))
    loader = torch.utils.data.DataLoader(own, batch_size=8 // ranks)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def weights(module):
    values = [parameter.detach() for parameter in module.parameters()]
    return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in values]


def strategy_of(kind):
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if kind == "DDP":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=kind == "FSDP2, in parts",
        process_group_backend="gloo",
    )


def train(rank, folder, kind, state):
    environment.launched(rank)
    warnings.simplefilter("default")  # other libraries' own
    warnings.filterwarnings("error", message="DFA")
    warnings.filterwarnings("ignore", message="DFA: the loaded state has seed=3, but seed=4")
    checkpoint, found = f"{folder}/last.ckpt", []
    for seed, resume in ((3, None), (4, checkpoint)):
        module = Module(seed, kind != "DDP", state)
        strategy = strategy_of(kind)
        trainer = fit(module, folder, rank, 2, resume, devices=2, strategy=strategy)
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        found.append((weights(module), module.handle.dfa.seed, logged))
        if resume is None:
            trainer.save_checkpoint(checkpoint)
    return found


@pytest.mark.parametrize("state", ["dfa", None])  # None: the callback alone has it
@pytest.mark.parametrize("kind", ["DDP", "FSDP2, in parts", "FSDP2, whole"])
def test_two_processes_learn_as_one_and_go_on(tmp_path, kind, state):
    alone, checkpoint = Module(), f"{tmp_path}/alone.ckpt"
    fit(alone, tmp_path).save_checkpoint(checkpoint)
    expected = [weights(alone)]
    again = Module()
    fit(again, tmp_path, resume=checkpoint)
    expected.append(weights(again))
    for found in processes.run(train, 2, tmp_path, str(tmp_path), kind, state):
        for (ours, seed, logged), theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
            assert seed == 3
            assert logged.keys() == {f"dfa/alignment/{name}" for name in NAMES}
            assert all(-1 <= value <= 1 for value in logged.values())
