"""`attach(head=...)` on Hugging Face's causal models, called with `labels`: random weights."""

import copy

import numpy
import pytest
import torch
import torch.nn.functional as F

from dfa_kernels import attach
from dfa_kernels.nn import OutputWeights, alignment
from tests.nn.networks import Allocations

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings(
    "default", "error:attach. head", "error:DFA", "ignore:.*bos_token_id"
)
WORDS = 1024
SIZES = {"vocab_size": WORDS, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 32}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = torch.randint(3, WORDS, (8, 16), generator=torch.Generator().manual_seed(0))
LABELS = TOKENS.masked_fill(torch.arange(16) < 3, -100)
BATCH = {"input_ids": TOKENS, "labels": LABELS}


def gpt2(tied=True, **options):
    sizes = {"vocab_size": WORDS, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied, **options}
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        sizes[name] = 0.0
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def llama(tied=False):
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def gemma2(tied=True):
    config = transformers.Gemma2Config(
        **SIZES, tie_word_embeddings=tied, final_logit_softcapping=2.0
    )
    return transformers.Gemma2ForCausalLM(config)


MODELS = [gpt2, llama, gemma2]


def points_of(model):
    blocks = "transformer.h" if "GPT2" in type(model).__name__ else "model.layers"
    return [f"{blocks}.0", f"{blocks}.1"]


def attached(make, dtype=torch.float32, **options):
    """One model with a head, a copy with an output."""
    torch.manual_seed(0)
    ours = make().to(dtype)
    theirs = copy.deepcopy(ours)
    points = points_of(ours)
    for model, end in ((ours, {"head": "lm_head"}), (theirs, {"output": "lm_head"})):
        attach(model, points, batch_dims=(0, 1), seed=1, **end, **options)
    return ours, theirs


def assert_equal_steps(ours, theirs, dtype=torch.float32, **arguments):
    most = 1e-5 if dtype is torch.float32 else 3e-2
    outputs = [model(**BATCH, **arguments) for model in (ours, theirs)]
    losses = [one.loss for one in outputs]
    assert losses[0].dtype is losses[1].dtype is torch.float32
    torch.testing.assert_close(*losses, rtol=most, atol=0)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            difference = (one.grad - other.grad).float().norm()
            assert difference <= most * other.grad.float().norm(), name
    return outputs


@pytest.fixture
def small_chunks(monkeypatch):
    """Sixteen tokens of fp32."""
    monkeypatch.setenv("DFA_KERNELS_LOGITS_BYTES", str(16 * WORDS * 4))


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_that_of_output(small_chunks, make, tied, dtype):
    ours, theirs = attached(lambda: make(tied), dtype)
    one, other = assert_equal_steps(ours, theirs, dtype)
    assert type(one.logits) is not torch.Tensor
    assert one.logits.whole is None
    assert one.logits.dtype is other.logits.dtype
    assert torch.equal(one.logits.argmax(-1), other.logits.argmax(-1))


@pytest.mark.parametrize("make", MODELS)
def test_no_logits_are_made(small_chunks, make):
    ours, theirs = attached(make, distribution="hadamard")
    peaks = []
    for model in (ours, theirs):
        model(**BATCH).loss.backward()
        model.zero_grad()
        with Allocations() as made:
            model(**BATCH).loss.backward()
        peaks.append(made.peak)
    assert peaks[1] - peaks[0] > TOKENS.numel() * WORDS * 4


@pytest.mark.parametrize("make", MODELS)
def test_gradient_checkpointing(make):
    ours, theirs = attached(make)
    for model in (ours, theirs):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_steps(ours, theirs)


@pytest.mark.parametrize("make", MODELS)
def test_a_given_number_of_items(make):
    """As the Trainer has it where gradients accumulate."""
    assert_equal_steps(*attached(make), num_items_in_batch=torch.tensor(300))


@pytest.mark.parametrize("make", MODELS)
def test_feedback_by_the_heads_own_weights(make):
    torch.manual_seed(0)
    ours = make()
    theirs = copy.deepcopy(ours)
    for model, end in ((ours, {"head": "lm_head"}), (theirs, {"output": "lm_head"})):
        matrix = OutputWeights(model.lm_head)
        attach(model, points_of(model), batch_dims=(0, 1), matrix=matrix, **end)
    assert_equal_steps(ours, theirs)


@pytest.mark.parametrize("make", MODELS)
def test_generation(make):
    ours, theirs = attached(make)
    start = TOKENS[:2, :4]
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
        options |= {"max_new_tokens": 5, "pad_token_id": 0, "attention_mask": torch.ones(2, 4)}
        found = [model.eval().generate(start, **options) for model in (ours, theirs)]
        assert torch.equal(*found)


@pytest.mark.parametrize("make", MODELS)
def test_the_loss_outside(make):
    ours, theirs = attached(make)

    def step(model):
        logits = model(TOKENS).logits[..., :-1, :]
        loss = F.cross_entropy(logits.reshape(-1, WORDS), TOKENS[..., 1:].reshape(-1))
        loss.backward()
        return loss

    torch.testing.assert_close(step(ours), step(theirs), rtol=1e-5, atol=0)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm()


def test_the_alignment():
    ours, theirs = attached(gpt2)
    one, other = (
        alignment(model, lambda model=model: model(**BATCH).loss) for model in (ours, theirs)
    )
    assert one == other


DATA = [{"input_ids": row, "labels": label} for row, label in zip(TOKENS, LABELS, strict=True)]


def accuracy(evaluated):
    logits, labels = evaluated
    return {"accuracy": float(numpy.mean(logits.argmax(-1)[:, :-1] == labels[:, 1:]))}


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
)
@pytest.mark.parametrize("make", MODELS)
def test_the_trainer(tmp_path, make, options):
    """Trains, evaluates with a measure of the logits, and saves."""
    histories, weights = [], []
    for index, model in enumerate(attached(make)):
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                str(tmp_path / str(index)),
                max_steps=3,
                learning_rate=1e-2,
                per_device_train_batch_size=2,
                logging_steps=1,
                save_steps=3,
                eval_strategy="steps",
                eval_steps=2,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                **options,
            ),
            train_dataset=DATA,
            eval_dataset=DATA[:3],
            compute_metrics=accuracy,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        histories.append(trainer.state.log_history)
        weights.append([one.detach().clone() for one in model.parameters()])
    most = 3e-2 if "bf16" in options else 1e-3
    names = {"loss", "eval_loss", "grad_norm", "eval_accuracy"}
    ours, theirs = ([one for one in history if names & {*one}] for history in histories)
    assert len(ours) == 5  # three steps, two evaluations
    for one, other in zip(ours, theirs, strict=True):
        found = {name: value for name, value in one.items() if name in names}
        assert found == pytest.approx({name: other[name] for name in found}, rel=most)
    for one, other in zip(*weights, strict=True):
        assert (one - other).norm() <= 10 * most * other.norm()
