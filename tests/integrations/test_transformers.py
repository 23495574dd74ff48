"""The callback for Hugging Face's Trainer: GPT-2 of random weights, a few steps."""

import json
import warnings

import pytest
import torch

from dfa_kernels import attach

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
integration = pytest.importorskip("dfa_kernels.integrations.transformers")

pytestmark = pytest.mark.filterwarnings("default")  # other libraries' own
POINTS = ["transformer.h.0", "transformer.h.1"]
TOKENS = torch.randint(0, 48, (16, 6), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]
BATCH = {"input_ids": TOKENS[:4], "labels": TOKENS[:4]}
NAMES = {f"dfa/alignment/{name}" for name in POINTS}


def trainer_of(folder, seed=3, state=None, **arguments):
    """A Trainer of an attached model with dropout. Its state is the callback's, or in `state`."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=48, n_positions=8, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    handle = attach(model, POINTS, "lm_head", batch_dims=(0, 1), seed=seed, state=state)
    arguments = {"max_steps": 6, "logging_steps": 2, "save_steps": 4, **arguments}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder),
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=DATA,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, handle.dfa


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.named_parameters()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=name)


def with_callback(folder, every=2, batch=BATCH, **options):
    trainer, dfa = trainer_of(folder, **options)
    trainer.add_callback(integration.DFACallback(trainer, batch, every))
    return trainer, dfa


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run with its checkpoint of step 4, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, _ = with_callback(folder)
    trainer.train()
    return folder, weights(trainer), trainer.state.log_history


def test_training_is_the_same_without_it(whole, tmp_path):
    trainer, _ = trainer_of(tmp_path)
    trainer.train()
    assert_same(whole[1], weights(trainer))
    without = [set(entry) for entry in trainer.state.log_history if "loss" in entry]
    assert without == [set(entry) for entry in whole[2] if "loss" in entry]
    assert len(without) == 3


def test_the_alignment_is_logged(whole):
    measured = [entry for entry in whole[2] if NAMES & entry.keys()]
    assert [entry["step"] for entry in measured] == [2, 4, 6]
    assert all(entry.keys() >= NAMES for entry in measured)
    assert all(-1 <= entry[name] <= 1 for entry in measured for name in NAMES)


@pytest.mark.parametrize("restores", [False, True])
def test_the_saved_seed_wins_over_the_scripts(whole, tmp_path, restores):
    trainer, dfa = with_callback(tmp_path, seed=4, restore_callback_states_from_checkpoint=restores)
    with pytest.warns(UserWarning, match="the loaded state has seed=3, but seed=4 was given"):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))
    assert dfa.seed == 3
    assert_same(whole[1], weights(trainer))
    assert [entry["step"] for entry in trainer.state.log_history if entry.keys() >= NAMES] == [
        2,
        4,
        6,
    ]


def test_without_it_the_scripts_seed_wins(whole, tmp_path):
    """Else the test above shows nothing."""
    trainer, dfa = trainer_of(tmp_path, seed=4)
    trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))
    assert dfa.seed == 4
    assert any(not torch.equal(value, whole[1][name]) for name, value in weights(trainer).items())


def test_a_state_in_the_models_is_warned_of_once(tmp_path):
    trainer, _ = with_callback(tmp_path, state="dfa")
    trainer.train()
    again, dfa = with_callback(tmp_path, seed=4, state="dfa")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert dfa.seed == 3
    assert len([one for one in said if "the loaded state has seed=3" in str(one.message)]) == 1
    assert_same(weights(trainer), weights(again))


def test_a_checkpoint_without_it_is_resumed(tmp_path):
    trainer, _ = trainer_of(tmp_path)
    trainer.train()
    again, dfa = with_callback(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert dfa.seed == 3
    assert '"seed": 3' in saved["stateful_callbacks"]["DFACallback"]["attributes"]["states"][0]
    assert_same(weights(trainer), weights(again))


def test_it_keeps_the_state_alone(tmp_path):
    trainer, _ = with_callback(tmp_path, batch=None)
    trainer.train()
    assert not any(NAMES & entry.keys() for entry in trainer.state.log_history)
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()


def test_two_trainers_have_callbacks_of_their_own(tmp_path):
    one, _ = with_callback(tmp_path, every=2)
    other, _ = with_callback(tmp_path, every=3, seed=5)
    one.train()
    other.train()
    for trainer, steps in ((one, [2, 4, 6]), (other, [3, 6])):
        history = trainer.state.log_history
        assert [entry["step"] for entry in history if entry.keys() >= NAMES] == steps


def test_refusals(tmp_path):
    trainer, _ = trainer_of(tmp_path)
    with pytest.raises(TypeError, match=r"DFACallback: trainer must be a .*Trainer, got NoneType"):
        integration.DFACallback()
    with pytest.raises(TypeError, match=r"DFACallback: batch must be a mapping .* got list"):
        integration.DFACallback(trainer, [BATCH])
    with pytest.raises(ValueError, match=r"DFACallback: every must be in \[1, .* got 0"):
        integration.DFACallback(trainer, BATCH, every=0)
    with pytest.raises(TypeError, match="DFACallback: trainer must be"):  # none was tied to it
        integration.DFACallback()


def test_a_model_without_a_dfa_is_refused(tmp_path):
    trainer, _ = trainer_of(tmp_path)
    trainer.model = transformers.GPT2LMHeadModel(trainer.model.config)
    trainer.model_wrapped = trainer.model
    trainer.add_callback(integration.DFACallback(trainer))
    with pytest.raises(ValueError, match="DFACallback: the model must hold a DFA"):
        trainer.train()
