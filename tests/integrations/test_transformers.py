"""The callback for Hugging Face's Trainer: GPT-2 of random weights, a few steps."""

import copy
import json
import warnings

import pytest
import torch

from dfa_kernels import attach
from tests import processes
from tests.integrations import environment

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
integration = pytest.importorskip("dfa_kernels.integrations.transformers")

pytestmark = pytest.mark.filterwarnings("default")  # other libraries' own
POINTS = ["transformer.h.0", "transformer.h.1"]
TOKENS = torch.randint(0, 48, (16, 6), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]
BATCH = {"input_ids": TOKENS[:4], "labels": TOKENS[:4]}
NAMES = {f"dfa/alignment/{name}" for name in POINTS}


def trainer_of(folder, seed=3, state=None, dropout=0.1, **arguments):
    """A Trainer of an attached model with dropout. Its state is the callback's, or in `state`."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=48, n_positions=8, n_embd=32, n_layer=2, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    model = transformers.GPT2LMHeadModel(config)
    handle = attach(model, POINTS, "lm_head", batch_dims=(0, 1), seed=seed, state=state)
    defaults = {"max_steps": 6, "logging_steps": 2, "save_steps": 4}
    arguments = {"per_device_train_batch_size": 4, **defaults, **arguments}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder),
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


BLOCKS = {"transformer_layer_cls_to_wrap": "GPT2Block"}
SHARDED = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}
# What the Trainer is told, and the name by which attach keeps the state beside the callback.
CASES = {
    "DDP": ({}, "dfa"),
    "FSDP2": ({"fsdp": True, "fsdp_config": BLOCKS}, None),
    "FSDP2, sharded": ({"fsdp": True, "fsdp_config": {**BLOCKS, **SHARDED}}, "dfa"),
}


def trainer_of_rank(rank, folder, name, **options):
    arguments, state = CASES[name]
    environment.launched(rank)
    environment.new_accelerate_state("fsdp" in arguments)
    arguments = {
        "accelerator_config": {"use_configured_state": True},
        "max_steps": 4,
        "save_steps": 2,
        **copy.deepcopy(arguments),
    }
    return with_callback(folder, dropout=0, **{"state": state, **arguments, **options})


def resumed(rank, folder):
    """Kinds of modules, weights, those of a resumed run and its seed, logs, and all warnings."""
    found = {}
    for name in CASES:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer, _ = trainer_of_rank(rank, f"{folder}/{name}", name)
            trainer.train()
            again, dfa = trainer_of_rank(rank, f"{folder}/{name} again", name, seed=None)
            again.train(resume_from_checkpoint=f"{folder}/{name}/checkpoint-2")
        states = [one.accelerator.get_state_dict(one.model_wrapped) for one in (trainer, again)]
        kinds = type(trainer.model_wrapped).__name__, type(trainer.model.transformer.h[0]).__name__
        warned = [str(one.message) for one in said]
        found[name] = kinds, *states, dfa.seed, again.state.log_history, warned
    return found


def test_two_processes_learn_what_one_learns_and_resume_with_its_seed(tmp_path):
    trainer, _ = trainer_of(tmp_path, dropout=0, max_steps=4, per_device_train_batch_size=8)
    trainer.train()
    for rank, found in enumerate(processes.run(resumed, 2, tmp_path, str(tmp_path))):
        for name, (kinds, whole, again, seed, logs, warned) in found.items():
            assert (seed, warned) == (3, []), name
            ddp = name == "DDP"
            wrapped = ("DistributedDataParallel", "") if ddp else ("FSDPGPT2LMHeadModel", "FSDP")
            assert kinds == (wrapped[0], f"{wrapped[1]}GPT2Block")
            assert [entry["step"] for entry in logs if entry.keys() >= NAMES] == [2, 4]
            if rank == 1 and not ddp:  # accelerate gives a whole state to rank 0
                continue
            for key, value in trainer.model.named_parameters():
                torch.testing.assert_close(
                    whole[key], value.detach(), rtol=1e-4, atol=1e-5, msg=f"{name}: {key}"
                )
            for key, value in whole.items():  # the DFA's state too
                assert torch.equal(again[key], value), f"{name}: {key}"


def refusal(rank, folder):
    trainer, _ = trainer_of_rank(rank, folder, "FSDP2", state="feedback")
    with pytest.raises(ValueError, match=r"DFACallback: .* 'feedback', .*state=None") as refused:
        trainer.train()
    trainer.model.feedback = trainer.model.feedback  # a submodule
    trainer.train()
    return str(refused.value)


def test_a_state_that_could_not_be_loaded_again_is_refused(tmp_path):
    assert all(processes.run(refusal, 2, tmp_path, str(tmp_path)))
