"""`DFA.linear_cross_entropy` against the same of whole logits."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dfa_kernels import DFA, DFALayer, alignment
from dfa_kernels.nn import OutputWeights, chunks
from tests.nn.networks import Multiplied, assert_equal, gradients

WORDS, WIDTH, TOKENS = 50, 16, (4, 7)
ALL = ("dfa", "backprop", "shallow")
LOSSES = {
    "mean": {},
    "sum, smoothed": {"reduction": "sum", "label_smoothing": 0.1},
    "one by one, capped": {"reduction": "none", "softcap": 2.0},
    "all": {"softcap": 1.5, "ignore_index": 3, "label_smoothing": 0.2},
}
MATRIX = torch.randn(WIDTH, WORDS, generator=torch.Generator().manual_seed(0))

OPTIONS = {
    "lean": {"distribution": "hadamard", "lean": True},
    "shared=False": {"distribution": "rademacher", "shared": False},
    "mask": {"mask": [torch.ones(WIDTH), None, torch.arange(WIDTH)], "normalization": False},
    "output weights": {"by_weights": True},
    "output weights, lean": {"by_weights": True, "lean": True},
    "stored": {"matrix": MATRIX},
    "a source of one's own": {"matrix": Multiplied(MATRIX)},
    "error_transform": {"error_transform": torch.sign},
    "error_transform in place": {"error_transform": lambda error: error.mul_(2)},
    "signal_transform": {"signal_transform": lambda signal, layer: signal.clamp_(-0.1, 0.1)},
    "through": {"through": lambda x: F.layer_norm(x, x.shape[-1:])},
    "requires_grad": {"requires_grad": True, "bias": False},
    "rp_device": {"rp_device": "cpu"},
}


class Language(nn.Module):
    """Three points, a norm and an output layer, with its loss in one of two ways."""

    def __init__(self, dtype=torch.float32, bias=True, by_weights=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.points = nn.ModuleList(DFALayer() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if by_weights:
            options["matrix"] = OutputWeights(self.head)
        self.dfa = DFA(self.points, **{"batch_dims": (0, 1), **options})
        self.dfa.watch(self)
        self.to(dtype)

    def hidden(self, tokens):
        x = self.embedding(tokens)
        for block, point in zip(self.blocks, self.points, strict=True):
            x = point(x + torch.tanh(block(x)))
        return self.norm(x)

    def loss(self, hidden, target, whole, **options):
        if whole:
            return whole_loss(self, hidden, target, **options)
        return self.dfa.linear_cross_entropy(
            hidden, self.head.weight, target, bias=self.head.bias, **options
        )

    def forward(self, tokens, target, whole=False, **options):
        return self.loss(self.hidden(tokens), target, whole, **options)


def whole_loss(model, hidden, target, softcap=None, **options):
    logits = model.dfa(model.head(hidden))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)
    return loss.view(target.shape) if options.get("reduction") == "none" else loss


def batch(seed=0, ignored=-100, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    tokens, target = torch.randint(WORDS, (2, *tokens), generator=generator)
    target[0, :3] = ignored
    return tokens, target


def assert_close(ours, theirs, dtype=torch.float32):
    """By norm: in 16 bits each number has an error of its own."""
    most = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert (one - other).float().norm() <= most * other.float().norm()


def step(model, *arguments, upstream=3.0, call=None, **options):
    """The loss, and the gradients of a multiple of it."""
    model.zero_grad()
    loss = (model if call is None else call)(*arguments, **options)
    (upstream * loss).sum().backward()
    return [loss.detach(), *gradients(model)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """About four tokens each."""
    monkeypatch.setenv("DFA_KERNELS_LOGITS_BYTES", "1000")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", ALL)
def test_losses_and_gradients_are_those_of_whole_logits(mode, loss, dtype):
    model, options = Language(dtype), LOSSES[loss]
    model.dfa.mode = mode
    data = batch(ignored=options.get("ignore_index", -100))
    whole = step(model, *data, whole=True, **options)
    assert_close(step(model, *data, **options), whole, dtype)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loss", ["mean", "one by one, capped"])
def test_so_they_are_with_every_option(options, loss):
    model = Language(**OPTIONS[options])
    whole = step(model, *batch(), whole=True, **LOSSES[loss])
    assert_close(step(model, *batch(), **LOSSES[loss]), whole)


@pytest.mark.parametrize("options", [{"seed": 2**64 - 1}, {"by_weights": True}])
def test_a_compiled_step_is_the_same(options):
    model = Language(**options)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, tokens in enumerate([(4, 7), (5, 9), (2, 3)]):
        data = batch(seed, tokens=tokens)
        whole = step(model, *data, whole=True)
        assert_close(step(model, *data, call=compiled), whole)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*data), whole[0])


def test_a_compiled_step_that_needs_whole_logits_says_so():
    model = Language(error_transform=torch.sign)
    whole = step(model, *batch(), whole=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="torch.compile makes whole logits"):
        ours = step(model, *batch(), call=compiled)
    assert_close(ours, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    model = Language()
    with torch.autocast("cpu", dtype):
        whole = step(model, *batch(), whole=True)
        ours = step(model, *batch())
    assert ours[0].dtype is torch.float32
    assert_close(ours, whole, dtype)


def test_small_errors_in_fp16_are_not_lost():
    """A mean over many tokens has errors below what fp16 holds, until the loss is scaled."""
    tokens, words = 1024, 2000
    target = torch.randint(words, (tokens,))
    hidden, weight = torch.randn(tokens, 8).half().float(), torch.randn(words, 8).half().float()
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [one.to(dtype, copy=True).requires_grad_() for one in (hidden, weight)]
        with torch.autocast("cpu", torch.float16):
            loss = DFA([]).linear_cross_entropy(*leaves, target)
        (65536 * loss).backward()
        found.append([leaf.grad.double() for leaf in leaves])
    assert_close(*found, torch.float16)


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (-2, -3)])
def test_rows_are_in_the_order_of_batch_dims(dims):
    model = Language(torch.float64, batch_dims=dims)
    for options in ({}, {"reduction": "none"}):
        whole = step(model, *batch(), whole=True, **options)
        assert_close(step(model, *batch(), **options), whole, torch.float64)


def test_every_token_must_be_a_row():
    model = Language(batch_dims=(0,))
    with pytest.raises(ValueError, match=r"batch_dims must be all dimensions .* got \(0,\) beside"):
        model(*batch())


@pytest.mark.parametrize("again", [False, True])
def test_all_ignored_gives_what_torch_gives(again):
    model = Language(error_transform=torch.sign if again else None)
    tokens, target = batch()
    target.fill_(-100)
    whole, ours = (step(model, tokens, target, whole=whole) for whole in (True, False))
    assert whole[0].isnan()
    assert ours[0].isnan()
    assert_equal(ours[1:], whole[1:])
    assert not any(gradient.any() for gradient in ours[1:])


def test_ignored_tokens_cost_nothing(monkeypatch):
    seen = []

    def watched(logits, *arguments, **options):
        seen.append(len(logits))
        return cross_entropy_(logits, *arguments, **options)

    cross_entropy_ = chunks.cross_entropy_
    monkeypatch.setattr(chunks, "cross_entropy_", watched)
    tokens, target = batch()
    Language()(tokens, target)
    assert sum(seen) == (target != -100).sum()


def test_several_losses_before_a_backward_and_accumulation():
    model = Language()
    found = []
    for whole in (True, False):
        model.zero_grad()
        losses = [model(*batch(seed), whole=whole) for seed in range(3)]
        torch.stack(losses).mean().backward()
        model(*batch(4), whole=whole).backward()
        found.append(gradients(model))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("options", [{}, {"lean": True}, {"error_transform": torch.sign}])
def test_a_retained_graph_gives_the_same_again(options):
    model = Language(**options)
    loss = model(*batch())
    loss.backward(retain_graph=True)
    once = gradients(model)
    model.zero_grad()
    loss.backward()
    assert_equal(gradients(model), once)
    with pytest.raises(RuntimeError, match=r"retain_graph|retain the graph"):
        loss.backward()


def test_weights_may_change_before_the_backward_pass():
    """What depends on them is there already."""
    model = Language()
    whole = step(model, *batch(), whole=True)
    model.zero_grad()
    loss = model(*batch())
    with torch.no_grad():
        model.head.weight.zero_()
    (3 * loss).backward()
    assert_close([loss.detach(), *gradients(model)], whole)


def test_there_are_no_second_derivatives():
    model = Language()
    (gradient,) = torch.autograd.grad(model(*batch()), model.head.weight, create_graph=True)
    assert_equal([gradient], [torch.autograd.grad(model(*batch()), model.head.weight)[0]])
    with pytest.raises(NotImplementedError, match="it has no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("frozen", ["head.weight", "head.bias", "norm"])
def test_what_is_frozen_gets_nothing(frozen):
    model = Language()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    assert_close(step(model, *batch()), step(model, *batch(), whole=True))


def test_tied_embeddings():
    model = Language(bias=False)
    model.head.weight = model.embedding.weight
    assert_close(step(model, *batch()), step(model, *batch(), whole=True))


@pytest.mark.parametrize("options", [{}, {"error_transform": torch.sign}])
@pytest.mark.parametrize("inside", ["block", "loss"])
def test_activation_checkpointing(inside, options):
    model = Language(**options)

    def call(tokens, target, whole=False):
        if inside == "loss":
            return checkpoint(model, tokens, target, whole, use_reentrant=False)
        hidden = checkpoint(model.hidden, tokens, use_reentrant=False)
        return model.loss(hidden, target, whole)

    assert_close(step(model, *batch(), call=call), step(model, *batch(), whole=True))


def test_alignment_is_that_of_whole_logits():
    model = Language(torch.float64)
    ours = alignment(model, lambda: model(*batch()))
    assert ours == alignment(model, lambda: model(*batch(), whole=True))


def test_under_torch_func():
    model = Language()
    parameters = dict(model.named_parameters())

    def loss(parameters, whole):
        return torch.func.functional_call(model, parameters, batch(), {"whole": whole})

    ours, whole = (torch.func.grad(loss)(parameters, whole) for whole in (False, True))
    assert_equal([*ours.values()], [*whole.values()])


class Largest(TorchDispatchMode):
    """The most numbers in a tensor beside parameters' gradients."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > 8:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("options", [{}, {"by_weights": True}, {"error_transform": torch.sign}])
def test_no_tensor_is_as_large_as_the_logits(options):
    model = Language(**options)
    tokens, target = batch(tokens=(16, 64))
    for whole in (False, True):
        with Largest() as largest:
            step(model, tokens, target, whole=whole)
        expected = target.numel() * WORDS
        assert (largest.numel >= expected) == whole
    model(tokens, target)
    with Largest() as largest, torch.no_grad():
        model(tokens, target)
    assert largest.numel < expected


def test_what_was_made_is_dropped_by_the_backward_pass():
    model = Language()
    loss = model(*batch())
    made = [weakref.ref(one) for one in loss.grad_fn.made]
    loss.backward()
    model.zero_grad()
    assert [one() for one in made] == [None] * len(made)


def test_a_transform_of_several_rows_is_refused():
    for wrong in (lambda e: e * len(e), lambda e: e - e.mean(0), lambda e: e / e.abs().max()):
        model = Language(error_transform=wrong)
        with pytest.raises(ValueError, match="error_transform must treat each row by itself"):
            model(*batch()).backward()
    random = Language(error_transform=lambda e: e + torch.randn_like(e))
    random(*batch()).backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": 1}, TypeError, "hidden must be a tensor, got int"),
        (
            {"weight": nn.Linear(WIDTH, WORDS)},
            TypeError,
            "got Linear; give its weight, and its bias",
        ),
        ({"weight": torch.zeros(WORDS)}, ValueError, r"weight must be \[n, d\], got \(50,\)"),
        ({"weight": torch.zeros(WORDS, 3)}, ValueError, r"hidden must be \[\.\.\., 3\]"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[50\], got \(3,\)"),
        (
            {"target": torch.zeros(4, 7)},
            ValueError,
            r"target must be the int64 .* got torch.float32",
        ),
        ({"target": torch.zeros(4, dtype=torch.long)}, ValueError, r"\(4, 7\), got .* of \(4,\)"),
        ({"target": torch.full(TOKENS, WORDS)}, IndexError, r"target must be in \[0, 50\).*got 50"),
        ({"target": torch.full(TOKENS, -1)}, IndexError, "got -1"),
        ({"weight": torch.zeros(WORDS, WIDTH).half()}, ValueError, "must have one dtype"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
        ({"reduction": "max"}, ValueError, "reduction must be one of .* got 'max'"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing must be .* got 2"),
        ({"softcap": 0}, ValueError, "softcap must be above 0, or None for none, got 0"),
        ({"softcap": -30}, ValueError, "softcap must be above 0, or None for none, got -30"),
        ({"softcap": "30"}, TypeError, "softcap must be a number, got str"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "hidden": torch.zeros(*TOKENS, WIDTH),
        "weight": torch.zeros(WORDS, WIDTH),
        "target": torch.zeros(TOKENS, dtype=torch.long),
    }
    with pytest.raises(error, match=rf"DFA\.linear_cross_entropy: .*{message}"):
        DFA([DFALayer()]).linear_cross_entropy(**arguments | change)


def test_a_bias_that_was_left_out_is_named():
    model = Language(by_weights=True)
    with pytest.warns(UserWarning, match=r"has a bias, .* give bias=linear\.bias"):
        model.dfa.linear_cross_entropy(model.hidden(batch()[0]), model.head.weight, batch()[1])


def test_tokens_without_a_target_keep_their_rows():
    model = Language()
    tokens, _ = batch()
    hidden, target = model.hidden(tokens), F.pad(tokens[:, 1:], (0, 1), value=-100)
    with pytest.raises(ValueError, match="Tokens without a target keep their rows"):
        model.loss(hidden[:, :-1], tokens[:, 1:], False)
    ours = step(model, tokens, target)
    theirs = F.cross_entropy(model.head(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(ours[0], theirs.detach())


@pytest.mark.parametrize("given", ["0", "-1", "many"])
def test_a_budget_that_is_none_is_refused(given, monkeypatch):
    monkeypatch.setenv("DFA_KERNELS_LOGITS_BYTES", given)
    with pytest.raises(ValueError, match=f"must be a number of bytes above 0, .* got '{given}'"):
        Language()(*batch())
