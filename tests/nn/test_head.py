"""`attach(head=...)`: a model's own loss is the fused one, and its logits are never whole."""

import copy
import dataclasses
import pickle
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from dfa_kernels import attach
from dfa_kernels.nn import OutputWeights, alignment
from tests.nn.networks import Allocations

WORDS, WIDTH, TOKENS = 211, 16, (3, 8)
POINTS = ["blocks.0", "blocks.1"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


def shifted(logits, target):
    """As Hugging Face's models have it."""
    logits = logits.float()[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, WORDS), target[..., 1:].reshape(-1))


class Language(nn.Module):
    """Returns its loss, by `loss`, and its logits."""

    def __init__(self, loss=shifted, tied=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        self.loss = loss
        self.to(dtype)

    def forward(self, tokens, target=None):
        logits = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return logits if target is None else (self.loss(logits, target), logits)


def attached(model=None, **options):
    """Copies of a model, one with a head and one with an output."""
    model = Language() if model is None else model
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    options = {"batch_dims": (0, 1), "seed": 1, **options}
    return (
        attach(ours, POINTS, head="head", **options),
        attach(theirs, POINTS, "head", **options),
        ours,
        theirs,
    )


def batch():
    generator = torch.Generator().manual_seed(3)
    tokens, target = torch.randint(WORDS, (2, *TOKENS), generator=generator)
    target[0, :3] = -100
    return tokens, target


def assert_close(ours, theirs, dtype=torch.float32):
    most = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert (ours - theirs).double().norm() <= most * theirs.double().norm()


def assert_equal_steps(ours, theirs, step, dtype=torch.float32):
    """`step` makes a loss of any shape."""
    losses = [step(model) for model in (ours, theirs)]
    assert_close(*losses, dtype)
    for loss in losses:
        (3 * loss).sum().backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert_close(one.grad, other.grad, dtype)


def inside(model):
    return model(*batch())[0]


def is_lazy(logits):
    return type(logits) is not torch.Tensor and logits.whole is None


@pytest.fixture
def small_chunks(monkeypatch):
    """Seven tokens."""
    monkeypatch.setenv("DFA_KERNELS_LOGITS_BYTES", str(7 * WORDS * 4))


# --- equal to `output` ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["dfa", "backprop", "shallow"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_is_that_of_output(small_chunks, dtype, mode, tied):
    def loss(logits, target):
        return F.cross_entropy(logits[..., :-1, :].flatten(0, 1), target[..., 1:].flatten())

    one, other, ours, theirs = attached(
        Language(shifted if dtype is torch.bfloat16 else loss, tied, dtype)
    )
    one.mode = other.mode = mode
    for _ in range(2):
        assert_equal_steps(ours, theirs, inside, dtype)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("loss_under_it", [False, True])
def test_autocast(outside, loss_under_it):
    def step(model):
        with torch.autocast("cpu", torch.bfloat16):
            if not outside:
                return inside(model)
            logits = model(batch()[0])
            assert logits.dtype is torch.bfloat16
            if loss_under_it:
                return F.cross_entropy(logits.flatten(0, 1), batch()[1].flatten())
        return F.cross_entropy(logits.flatten(0, 1), batch()[1].flatten())

    _, _, ours, theirs = attached()
    assert_equal_steps(ours, theirs, step, torch.bfloat16)


@pytest.mark.parametrize(
    "options",
    [
        {"lean": True, "distribution": "hadamard"},
        {"error_transform": torch.sign},
        {"inputs": ["head"]},
        {"requires_grad": True, "cut": ["blocks.1"]},
    ],
)
def test_options(small_chunks, options):
    _, _, ours, theirs = attached(**options)
    assert_equal_steps(ours, theirs, inside)


def test_feedback_by_the_heads_own_weights(small_chunks):
    ours, theirs = Language(), Language()
    attach(ours, POINTS, batch_dims=(0, 1), matrix=OutputWeights(ours.head), head=ours.head)
    attach(theirs, POINTS, "head", batch_dims=(0, 1), matrix=OutputWeights(theirs.head))
    assert_equal_steps(ours, theirs, inside)


WAYS = {
    "flat": lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten()),
    "flat, by end": lambda logits, y: F.cross_entropy(logits.flatten(end_dim=-2), y.flatten()),
    "reshaped": lambda logits, y: F.cross_entropy(torch.reshape(logits, (-1, WORDS)), y.view(-1)),
    "unflattened": lambda logits, y: F.cross_entropy(
        logits.unflatten(1, (2, 4))[:, 1].flatten(0, 1), y[:, 4:].flatten()
    ),
    "squeezed": lambda logits, y: F.cross_entropy(logits[1].unsqueeze(0).squeeze(0), y[1]),
    "classes second": lambda logits, y: F.cross_entropy(logits.transpose(1, 2), y),
    "permuted": lambda logits, y: F.cross_entropy(logits.permute(1, 2, 0), y.T),
    "mT": lambda logits, y: nn.CrossEntropyLoss()(logits[:2].mT, y[:2]),
    "converted": lambda logits, y: F.cross_entropy(
        logits.to(torch.float32).contiguous().to(y.device).type_as(y.float()).flatten(0, 1),
        y.flatten(),
    ),
    "one token": lambda logits, y: F.cross_entropy(logits[2, -1], y[2, -1]),
    "strided": lambda logits, y: F.cross_entropy(
        logits[1:, 1::3].flatten(0, 1), y[1:, 1::3].flatten()
    ),
    "chosen": lambda logits, y: F.cross_entropy(
        logits[:, torch.tensor([5, 2]), :].flatten(0, 1), y[:, [5, 2]].flatten()
    ),
    "masked": lambda logits, y: F.cross_entropy(logits[y != -100], y[y != -100]),
    "axes added": lambda logits, y: F.cross_entropy(logits[:, None, 2:, :][:, 0, 0], y[:, 2]),
    "all of it": lambda logits, y: F.cross_entropy(logits[...].clone().flatten(0, 1), y.flatten()),
    "softcapped": lambda logits, y: F.cross_entropy(
        (torch.tanh(logits / 2.0) * 2.0).flatten(0, 1), y.flatten()
    ),
    "softcapped, the other way": lambda logits, y: F.cross_entropy(
        3 * logits[:, 1:].flatten(0, 1).div(3).tanh(), y[:, 1:].flatten()
    ),
    "a temperature": lambda logits, y: F.cross_entropy((logits / 2).flatten(0, 1), y.flatten()),
    "factors": lambda logits, y: F.cross_entropy(
        (3 * (0.5 * logits.float())).flatten(0, 1), y.flatten(), reduction="none"
    ),
    "another cap": lambda logits, y: F.cross_entropy(
        (torch.tanh(logits / 2) * -3 / 0.5).flatten(0, 1), y.flatten()
    ),
    "summed": lambda logits, y: (
        F.cross_entropy(
            logits.flatten(0, 1), y.flatten(), reduction="sum", label_smoothing=0.1, ignore_index=7
        )
        if (y != -100).all()
        else F.cross_entropy(
            logits.flatten(0, 1), y.flatten(), reduction="sum", label_smoothing=0.1
        )
    ),
    "each": lambda logits, y: F.cross_entropy(
        logits[:, 1:].transpose(1, 2), y[:, 1:], reduction="none"
    ),
    "twice": lambda logits, y: (
        F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
        + F.cross_entropy(logits[:, :-2].flatten(0, 1), y[:, 2:].flatten())
    ),
    "all ignored": lambda logits, y: F.cross_entropy(
        logits.flatten(0, 1), y.flatten() * 0 - 100, reduction="sum"
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_the_loss_that_need_no_logits(way):
    _, _, ours, theirs = attached()
    made = []

    def step(model):
        logits = model(batch()[0])
        made.append(logits)
        return WAYS[way](logits, batch()[1])

    assert_equal_steps(ours, theirs, step)
    assert is_lazy(made[0])
    torch.testing.assert_close(made[0].argmax(-1), made[1].argmax(-1))


WHOLE = {
    "class weights": lambda logits, y: F.cross_entropy(
        logits.flatten(0, 1), y.flatten(), torch.linspace(0.1, 1, WORDS)
    ),
    "probabilities": lambda logits, y: F.cross_entropy(
        logits.flatten(0, 1), torch.full((24, WORDS), 1 / WORDS)
    ),
    "log_softmax": lambda logits, y: F.nll_loss(logits.log_softmax(-1).flatten(0, 1), y.flatten()),
    "a factor for each word": lambda logits, y: F.cross_entropy(
        (logits * torch.linspace(0.1, 1, WORDS)).flatten(0, 1), y.flatten()
    ),
    "a token twice": lambda logits, y: F.cross_entropy(
        logits[0, torch.tensor([1, 4, 1])], torch.tensor([3, 4, 5])
    ),
    "some words": lambda logits, y: F.cross_entropy(
        logits[..., :100].flatten(0, 1), y.flatten().clamp(max=99)
    ),
    "list": lambda logits, y: F.cross_entropy(logits[[0, 2]].flatten(0, 1), y[[0, 2]].flatten()),
    "rolled": lambda logits, y: F.cross_entropy(logits.roll(1, 1).flatten(0, 1), y.flatten()),
    "joined": lambda logits, y: F.cross_entropy(
        torch.cat([logits[0], logits[2]]), y[::2].flatten()
    ),
    "two losses": lambda logits, y: (
        F.cross_entropy(logits.flatten(0, 1), y.flatten())
        + 0.1 * logits.logsumexp(-1).square().mean()
    ),
    "fewer bits": lambda logits, y: F.cross_entropy(
        logits.double().flatten(0, 1), y.flatten()
    ).float(),
}


@pytest.mark.parametrize("way", WHOLE)
def test_other_functions_get_whole_logits_and_say_so(way):
    _, _, ours, theirs = attached()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert_equal_steps(ours, theirs, lambda model: WHOLE[way](model(batch()[0]), batch()[1]))
        WHOLE[way](ours(batch()[0]), batch()[1])
    messages = [str(one.message) for one in said]
    assert len(messages) == len({*messages}) == 1
    assert messages[0].startswith("attach: head 'head': torch.")


def both(logits, y):
    flat = logits.flatten(0, 1)
    return F.cross_entropy(flat, y.flatten()) + F.cross_entropy(flat, y.flatten().flip(0))


APART = {"two losses": both, "a loss and a look": WHOLE["two losses"]}


@pytest.mark.parametrize("way", APART)
@pytest.mark.parametrize(
    "options",
    [
        {"error_transform": torch.sign},
        {"signal_transform": lambda signal, layer: signal.sign()},
        {"signal_transform": lambda signal, layer: signal.sign(), "lean": True},
    ],
)
def test_transforms_of_the_errors_of_two_losses_say_that_they_are_not_summed(way, options):
    _, _, ours, theirs = attached(**options)
    for model in (ours, theirs):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                APART[way](model(batch()[0]), batch()[1]).backward()
        apart = [one for one in said if "each by itself" in str(one.message)]
        assert len(apart) == (model is ours and "lean" not in options)
    equal = all(
        torch.allclose(one.grad, other.grad, atol=1e-5)
        for one, other in zip(ours.blocks.parameters(), theirs.blocks.parameters(), strict=True)
    )
    assert equal == ("lean" in options)


def test_a_mean_of_no_token_is_torchs():
    handle, _, ours, theirs = attached()
    tokens, target = batch()
    for model in (ours, theirs):
        loss, _ = model(tokens, torch.full_like(target, -100))
        assert loss.isnan()
        loss.backward()
    assert all(one.grad is not None for one in ours.blocks.parameters())
    assert handle.mode == "dfa"


# --- memory ---


def test_nothing_of_the_size_of_logits_is_made(small_chunks):
    """Of 256 tokens and 4,096 words."""
    model = nn.Sequential()
    model.first, model.head = Block(), nn.Linear(WIDTH, 4096)
    handle = attach(model, ["first"], head="head", distribution="hadamard")
    whole, x = 256 * 4096 * 4, torch.randn(256, WIDTH)
    target = torch.randint(4096, (256,))
    for name in ("dfa", "backprop"):
        handle.mode = name
        with Allocations() as made:
            logits = model(x)
            assert (logits.shape, logits.dtype) == ((256, 4096), torch.float32)
            assert len(logits) == 256
            assert logits.requires_grad
            assert "4096" in f"{logits!r} {logits}"
            F.cross_entropy(logits, target).backward()
        assert made.peak < whole / 10
    with Allocations() as made, torch.no_grad():
        F.cross_entropy(model(x), target)
    assert made.peak < whole / 10
    with Allocations() as made, torch.no_grad():  # else the above shows nothing
        model(x).exp()
    assert made.peak > whole


@pytest.mark.parametrize("head", ["head", None])
def test_activations_are_dropped_by_the_backward_pass(head):
    """Though the model's outputs are kept."""
    model, kept = Language(), []
    attach(model, POINTS, None if head else "head", head=head, batch_dims=(0, 1))
    model.blocks[1].register_forward_pre_hook(lambda _, args: kept.append(weakref.ref(args[0])))
    inner = model.blocks[0].inner.register_forward_hook(
        lambda *args: kept.append(weakref.ref(args[2]))
    )
    outputs = model(*batch())
    outputs[0].backward()
    assert [one() for one in kept] == [None, None]
    inner.remove()
    assert outputs[1].shape == (*TOKENS, WORDS)


# --- logits that are looked at ---


def test_logits_are_those_of_the_model():
    _, _, ours, theirs = attached()
    tokens, _ = batch()
    for gradients in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with gradients():
            lazy, whole = ours(tokens), theirs(tokens)
            views = lazy[:, 1:].float().flatten(0, 1), whole[:, 1:].float().flatten(0, 1)
            assert lazy.requires_grad == whole.requires_grad == views[0].requires_grad
            for one, other in ((lazy, whole), views):
                assert one.shape == other.shape
                assert torch.equal(one.argmax(-1), other.argmax(-1))
                torch.testing.assert_close(one.detach().numpy(), other.detach().numpy())
                assert torch.equal(one.data, other.data)


def test_logits_leave_the_model_in_evaluation():
    _, _, ours, theirs = attached()
    tokens, target = batch()
    with torch.no_grad():
        (loss, lazy), (_, whole) = ours.eval()(tokens, target), theirs(tokens, target)
        assert not loss.requires_grad
        assert is_lazy(lazy)
        for made in (pickle.loads(pickle.dumps(lazy)), copy.deepcopy(lazy), copy.copy(lazy)):
            assert torch.equal(made, whole)
        assert torch.equal(torch.cat([lazy[:1], lazy[1:]]), whole)
        assert lazy.cpu().numpy().shape == whole.shape
        assert lazy.tolist() == whole.tolist()
        assert repr(lazy) == repr(whole)


def test_a_look_without_gradients_in_training_changes_nothing():
    _, _, ours, theirs = attached()

    def step(model):
        loss, logits = model(*batch())
        with torch.no_grad():
            assert logits.softmax(-1).requires_grad is False
        assert not logits.detach().requires_grad
        assert (logits.argmax(-1) == logits.float().argmax(-1)).all()
        return loss + F.cross_entropy(logits.flatten(0, 1), batch()[1].flatten())

    assert_equal_steps(ours, theirs, step)


def test_logits_without_gradients_give_a_loss_without():
    _, _, ours, _ = attached()
    tokens, target = batch()
    logits = ours(tokens)
    with torch.no_grad():
        lazy = ours(tokens)
        half = logits.flatten(0, 1)
    for one in (lazy.flatten(0, 1), half):
        assert not F.cross_entropy(one, target.flatten()).requires_grad
    assert half.exp().requires_grad is False
    assert is_lazy(logits)


@pytest.mark.parametrize(
    "change", [lambda x: x.__imul__(0.5), nn.Hardtanh(-0.5, 0.5, inplace=True)]
)
def test_changes_in_place(change):
    _, _, ours, theirs = attached()

    def step(model):
        logits = model(batch()[0])
        view, copied = logits[:, 1:], logits.clone()
        change(logits)
        logits[..., 3] = -0.5
        assert (view[..., 3] == -0.5).all()
        assert (copied[..., 3] != -0.5).any()
        return shifted(view, batch()[1][:, 1:]) + shifted(copied, batch()[1])

    with pytest.warns(UserWarning, match="needs whole logits"):
        assert_equal_steps(ours, theirs, step)


def test_hooks_of_their_gradient():
    _, _, ours, theirs = attached()
    seen = []

    def step(model):
        logits = model(batch()[0])
        logits.register_hook(seen.append)
        removed = logits.register_hook(lambda gradient: 1 / 0)
        removed.remove()
        return shifted(logits, batch()[1])

    with pytest.warns(UserWarning, match="cross_entropy needs whole logits"):
        assert_equal_steps(ours, theirs, step)
    assert_close(*seen)
    _, logits = ours(*batch())
    for ask in (lambda: logits.register_hook(seen.append), logits.retain_grad):
        with pytest.raises(RuntimeError, match=r"'head': re\w+ of logits must come before their"):
            ask()


def test_logits_of_weights_that_have_changed_are_refused():
    _, _, ours, _ = attached()
    loss, logits = ours(*batch())
    loss.backward()
    assert logits.argmax(-1).shape == TOKENS
    with torch.no_grad():
        ours.head.weight.mul_(2)
    for look in (lambda: logits.argmax(-1), lambda: shifted(logits, batch()[1])):
        with pytest.raises(RuntimeError, match=r"'head': the logits are made when .* changed"):
            look()


def test_a_second_backward_pass():
    _, _, ours, theirs = attached()

    def step(model):
        loss, _ = model(*batch())
        loss.backward(retain_graph=True)
        return loss

    assert_equal_steps(ours, theirs, step)
    loss, logits = ours(*batch())
    loss.backward()
    again = shifted(logits, batch()[1])
    assert_close(again, loss)
    with pytest.warns(UserWarning, match="sum needs whole logits"):
        total = logits.sum()
    for late in (again, total):
        with pytest.raises(RuntimeError, match="'head': backward ran a second time"):
            late.backward()


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.square().sum()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.expand(*TOKENS, WORDS)


def test_a_function_that_torch_does_not_announce_is_refused():
    _, _, ours, _ = attached()
    loss = Own.apply(ours(batch()[0]))
    with pytest.raises(RuntimeError, match="head: a gradient came to logits from a function"):
        loss.backward()


# --- where logits are whole ---


def assert_whole(ours, theirs, step=inside, match="'head' makes whole logits here"):
    with pytest.warns(UserWarning, match=match) as said:
        assert_equal_steps(ours, theirs, step)
    assert len(said) == 1


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Half(nn.Linear):
    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight.T).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("kind", [Scaled, Half])
def test_a_head_that_does_something_else(kind):
    model = Language()
    model.head = kind(WIDTH, WORDS)
    assert_whole(*attached(model)[2:])


def test_weights_that_are_computed_are_computed_once():
    class Doubled(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return 2 * weight

    _, _, ours, theirs = attached()
    for model in (ours, theirs):
        parametrize.register_parametrization(model.head, "weight", Doubled())
        model.head.parametrizations.weight[0].calls = 0
    assert_equal_steps(ours, theirs, inside)
    assert is_lazy(ours(*batch())[1])
    assert ours.head.parametrizations.weight[0].calls == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_traced():
    _, _, ours, theirs = attached()
    with torch.no_grad():
        traced = torch.jit.trace(ours.eval(), batch()[0])
        torch.testing.assert_close(traced(batch()[0]), theirs(batch()[0]))


def test_transformed():
    def gradients(model):
        def loss(parameters):
            return torch.func.functional_call(model, parameters, batch())[0]

        return torch.func.grad(loss)(dict(model.named_parameters()))

    _, _, ours, theirs = attached()
    with pytest.warns(UserWarning, match="'head' makes whole logits here"):
        found = gradients(ours)
    for name, other in gradients(theirs).items():
        assert_close(found[name], other)


def test_compiled():
    _, _, ours, theirs = attached()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_whole(ours, theirs, lambda model: inside(compiled if model is ours else model))


def test_compiled_blocks():
    _, _, ours, theirs = attached()
    ours.blocks.compile(backend="aot_eager")

    def step(model):
        loss, logits = model(*batch())
        assert model is theirs or is_lazy(logits)
        return loss

    assert_equal_steps(ours, theirs, step)


def test_a_compiled_loss_of_an_uncompiled_head():
    loss = torch.compile(shifted, backend="aot_eager")
    _, _, ours, theirs = attached()
    assert_equal_steps(ours, theirs, lambda model: loss(model(batch()[0]), batch()[1]))


def test_the_alignment():
    _, _, ours, theirs = attached()
    one, other = (alignment(model, lambda model=model: inside(model)) for model in (ours, theirs))
    assert one == other
    assert_equal_steps(ours, theirs, inside)


# --- with other tools ---


def test_a_checkpoint():
    _, _, ours, theirs = attached()
    assert_equal_steps(ours, theirs, lambda model: checkpoint(inside, model, use_reentrant=False))


def test_copies_and_detaching():
    handle, _, ours, theirs = attached()
    ours, handle = pickle.loads(pickle.dumps((ours, handle)))
    assert_equal_steps(ours, theirs, inside)
    handle.detach()
    assert type(ours(batch()[0])) is torch.Tensor
    assert not any([*one._forward_hooks, *one._forward_pre_hooks] for one in ours.modules())
    assert_equal_steps(ours.requires_grad_(True), ours, inside)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph", None])
@pytest.mark.parametrize("outside", [False, True])
def test_data_parallel(process_group, option, outside):
    _, _, ours, theirs = attached()
    wrapped = DistributedDataParallel(ours, **({option: True} if option else {}))

    def step(model):
        model = wrapped if model is ours else model
        return shifted(model(batch()[0]), batch()[1]) if outside else inside(model)

    if outside and option == "find_unused_parameters":
        assert_whole(ours, theirs, step, r"find_unused_parameters=True\) needs whole logits")
    for _ in range(2):
        assert_equal_steps(ours, theirs, step)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


class Wrapped(Language):
    def forward(self, tokens):
        return Output(super().forward(tokens))


def test_a_search_for_unused_in_a_dataclass(process_group):
    _, _, ours, theirs = attached(Wrapped())
    wrapped = DistributedDataParallel(ours, find_unused_parameters=True)

    def step(model):
        model = wrapped if model is ours else model
        return shifted(model(batch()[0]).logits, batch()[1])

    assert_whole(ours, theirs, step, r"find_unused_parameters=True\) needs whole logits")


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("parts", [("blocks",), ("blocks", "head")])
def test_fully_sharded(process_group, outside, parts):
    _, _, ours, theirs = attached()
    mesh = dist.init_device_mesh("cpu", (1,))
    for name in parts:
        fully_shard(ours.get_submodule(name), mesh=mesh)
    fully_shard(ours, mesh=mesh, reshard_after_forward=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for model in (ours, theirs):
            (shifted(model(batch()[0]), batch()[1]) if outside else inside(model)).backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(one.grad.full_tensor(), other.grad)
    messages = " ".join(str(one.message) for one in said if "FSDP2" not in str(one.message))
    assert ("makes whole logits here" in messages) == ("head" in parts)
    assert ("cross_entropy needs whole" in messages) == (outside and "head" not in parts)


# --- arguments ---


def test_wrong_arguments():
    model = Language()
    with pytest.raises(ValueError, match="head takes the place of output, got head 'head' and"):
        attach(model, POINTS, "norm", head="head")
    with pytest.raises(ValueError, match="head must be submodules of the model, got 'heat'"):
        attach(model, POINTS, head="heat")
    with pytest.raises(ValueError, match=r"head must not be one of the points, got 'blocks.0'"):
        attach(model, POINTS, head="blocks.0")
    attach(model, POINTS, "head", head=model.head)
    with pytest.raises(ValueError, match="batch_dims must be all dimensions of hidden but the"):
        inside(model)
