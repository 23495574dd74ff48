"""The callback for Lightning's Trainer, a few steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import attach

lightning = pytest.importorskip("lightning")
CSVLogger = pytest.importorskip("lightning.pytorch.loggers").CSVLogger
integration = pytest.importorskip("dfa_kernels.integrations.lightning")

pytestmark = pytest.mark.filterwarnings("default")  # other libraries' own
NAMES = {"dfa/alignment/net.1", "dfa/alignment/net.4"}
_DRAW = torch.Generator().manual_seed(0)
DATA = torch.utils.data.TensorDataset(
    torch.randn(48, 8, generator=_DRAW), torch.randint(0, 4, (48,), generator=_DRAW)
)


class Module(lightning.LightningModule):
    """With dropout and batch normalization, which a measurement must not disturb."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 32), nn.Tanh()
        )
        self.norm, self.last = nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x):
        return self.last(self.norm(self.net(x)))

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch, _):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def module_of(seed=3, state=None):
    """An attached module. Without `state`, only the callback has it."""
    module = Module()
    return module, attach(module, ["net.1", "net.4"], "last", seed=seed, state=state).dfa


def callback(**options):
    return integration.DFACallback(lambda module, batch: module.loss(batch), **options)


def fit(module, folder, callbacks, epochs=2, resume=None, **arguments):
    torch.manual_seed(1)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=CSVLogger(str(folder)),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"log_every_n_steps": 2, **arguments},
    )
    trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=8), ckpt_path=resume)
    return trainer


def weights(module):
    return copy.deepcopy(dict(module.state_dict()))


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=name)


def measured(trainer):
    """The steps at which alignment reached the logger."""
    entries = [entry for entry in trainer.logger.experiment.metrics if NAMES & entry.keys()]
    assert all(entry.keys() >= NAMES for entry in entries)
    assert all(-1 <= entry[name] <= 1 for entry in entries for name in NAMES)
    return [entry["step"] for entry in entries]


@pytest.fixture
def kept(monkeypatch):
    """The logger keeps its entries, which it would write away."""
    monkeypatch.setattr(CSVLogger, "save", lambda self: None)


def test_training_is_the_same_without_it(tmp_path):
    one, _ = module_of()
    fit(one, tmp_path, [callback(every=1)])
    other, _ = module_of()
    fit(other, tmp_path, [])
    assert_same(weights(one), weights(other))


@pytest.mark.parametrize(
    ("every", "arguments", "steps"),
    [
        (None, {}, [1, 3, 5, 7, 9, 11]),  # counted from 0
        (4, {"log_every_n_steps": 4}, [3, 7, 11]),
        (6, {"log_every_n_steps": 3}, [5, 11]),
        (1, {"accumulate_grad_batches": 3, "log_every_n_steps": 1}, [0, 1, 2, 3]),
    ],
)
def test_the_alignment_is_logged(tmp_path, kept, every, arguments, steps):
    module, _ = module_of()
    assert measured(fit(module, tmp_path, [callback(every=every)], **arguments)) == steps


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """With another seed in the script, dropout off: Lightning does not restore random states."""
    module, _ = module_of()
    module.net[2].p = 0.0
    fit(module, tmp_path, [callback()], epochs=2)
    half, _ = module_of()
    half.net[2].p = 0.0
    fit(half, tmp_path, [callback()], epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    again, dfa = module_of(seed=4)
    again.net[2].p = 0.0
    with pytest.warns(UserWarning, match="the loaded state has seed=3, but seed=4 was given"):
        fit(again, tmp_path, [callback()], epochs=2, resume=tmp_path / "half.ckpt")
    assert dfa.seed == 3
    assert_same(weights(module), weights(again))


def test_without_it_the_scripts_seed_wins(tmp_path):
    """Else the test above shows nothing."""
    half, _ = module_of()
    fit(half, tmp_path, [], epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    again, dfa = module_of(seed=4)
    fit(again, tmp_path, [], epochs=2, resume=tmp_path / "half.ckpt")
    assert dfa.seed == 4


def test_a_checkpoint_without_it_is_resumed(tmp_path):
    half, _ = module_of()
    fit(half, tmp_path, [], epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    again, dfa = module_of(seed=4)
    fit(again, tmp_path, [callback()], epochs=2, resume=tmp_path / "half.ckpt")
    assert dfa.seed == 4


def test_it_works_in_bf16(tmp_path, kept):
    module, _ = module_of()
    trainer = fit(module, tmp_path, [callback(every=6)], precision="bf16-mixed")
    assert measured(trainer) == [5, 11]


def test_it_keeps_the_state_alone(tmp_path, kept):
    module, _ = module_of()
    assert measured(fit(module, tmp_path, [integration.DFACallback()])) == []


def test_refusals(tmp_path):
    with pytest.raises(TypeError, match="DFACallback: loss must be a function, got Tensor"):
        integration.DFACallback(torch.ones(1))
    with pytest.raises(ValueError, match=r"DFACallback: every must be in \[1, .* got 0"):
        callback(every=0)
    with pytest.raises(ValueError, match="DFACallback: the model must hold a DFA"):
        fit(Module(), tmp_path, [callback()])


def test_a_checkpoint_of_other_dfas_is_refused(tmp_path):
    half, _ = module_of()
    fit(half, tmp_path, [callback()], epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="holds the states of 1 DFAs, the model has 0"):
        fit(Module(), tmp_path, [callback()], epochs=2, resume=tmp_path / "half.ckpt")
