"""`attach` trains an unchanged model like the same model with `DFALayer`s in it."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfa_kernels import DFA, DFALayer, FeedbackPointsHandling, attach
from tests.nn.networks import (
    BATCH,
    CLASSES,
    Block,
    Calls,
    Perceptron,
    Stack,
    assert_equal,
    backward,
    batch,
    gradients,
    perceptron,
)

POINTS = ["1", "3", "5"]


def plain():
    """The layers of `perceptron()` without `DFALayer`s and `DFA`."""
    wired = perceptron()
    layers = [module for linear in wired.linears for module in (linear, nn.Tanh())]
    return nn.Sequential(*layers, wired.output)


def tokens():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(0, 20, (BATCH, 4), generator=generator),
        torch.randint(0, CLASSES, (BATCH, 4), generator=generator),
    )


def stack():
    torch.manual_seed(0)
    return Stack()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"seed": 3, "shared": False}, {"lean": True}, {"distribution": "hadamard"}],
)
def test_attached_sequential_is_the_wired_perceptron(arguments):
    x, y = batch()
    model = plain()
    attach(model, POINTS, **arguments)
    assert_equal(backward(model, x, y), backward(perceptron(**arguments), x, y))


def test_points_may_be_modules_and_output_a_submodule():
    x, y = batch()
    model = nn.Sequential(plain(), nn.LogSoftmax(1))
    attach(model, [model[0][1], model[0][3], model[0][5]], output=model[0][6])
    model.zero_grad()
    F.nll_loss(model(x), y).backward()
    assert_equal(gradients(model), backward(perceptron(), x, y))


def test_attach_leaves_the_models_keys_and_detach_the_model():
    x, y = batch()
    model = plain()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    handle = attach(model, POINTS)
    assert list(model.state_dict()) == list(before)
    assert [name for name, _ in model.named_modules()] == [n for n, _ in plain().named_modules()]
    handle.detach()
    handle.detach()
    assert all(not module._forward_hooks for module in model.modules())
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert_equal(backward(model, x, y), backward(plain(), x, y))
    attach(model, POINTS).detach()


def test_modes_of_an_attached_model():
    x, y = batch()
    model = plain()
    handle = attach(model, POINTS, no_training=True)
    assert handle.mode == "shallow"
    assert backward(model, x, y)[0] is None
    handle.mode = "backprop"
    assert_equal(backward(model, x, y), backward(plain(), x, y))
    handle.mode = "dfa"
    assert_equal(backward(model, x, y), backward(perceptron(), x, y))


@pytest.mark.parametrize("handling", list(FeedbackPointsHandling))
def test_aborted_passes_leave_nothing(handling):
    """Not even if the next pass skips the layers that the aborted one had reached."""

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x, skip=False, fail=False):
            x = x if skip else self.first(x)
            if fail:
                raise KeyboardInterrupt
            return self.head(self.second(x))

    x, y = batch()
    model = Skipping()
    attach(model, ["first", "second"], feedback_points_handling=handling)
    expected = backward(model, x, y), backward(model, x, y, skip=True)
    for skip in (False, True):
        with pytest.raises(KeyboardInterrupt):
            model(100 * x, fail=True)
        assert_equal(backward(model, x, y, skip=skip), expected[skip])


def test_transformer_style_stack_with_its_loss_inside():
    """Blocks return tuples; every token is a row; the head is the output."""
    x, y = tokens()
    model = stack()
    names = ["embedding", "blocks.0", "blocks.1", "blocks.2"]
    handle = attach(model, names, output="head", batch_dims=(0, 1), seed=2)
    with Calls() as calls:
        model(x, y)["loss"].backward()
    assert calls.projections == 1
    found = gradients(model)
    expected = stack()
    blocks, points = expected.blocks, [DFALayer() for _ in range(4)]
    dfa = DFA(points, batch_dims=(0, 1), seed=2)
    h = points[0](expected.embedding(x))
    for block, point in zip(blocks, points[1:], strict=True):
        h = point(block(h)[0])
    F.cross_entropy(dfa(expected.head(h)).flatten(0, 1), y.flatten()).backward()
    assert_equal(found, gradients(expected))
    assert [layer.name for layer in handle.dfa.dfa_layers] == names


def test_mapping_outputs_are_trained_at_their_logits():
    x, y = tokens()
    names = ["embedding", "blocks.0", "blocks.1", "blocks.2"]
    found = []
    for output in (None, "head"):
        model = stack()
        attach(model, names, output=output, batch_dims=(0, 1))
        logits = model(x)["logits"]
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        found.append(gradients(model))
    assert_equal(*found)


def test_batch_dimensions_of_each_point():
    """The inner layer has one row per token, the output one per image."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = Block(12), nn.Linear(12, CLASSES)

        def forward(self, x):
            return self.head(self.block(x)[0].mean(1))

    torch.manual_seed(0)
    model = Pooled()
    model.alias = model.block
    handle = attach(model, {"alias": (0, 1)})
    model(torch.randn(BATCH, 4, 12)).sum().backward()
    assert handle.dfa.dfa_layers[0].size == 12
    assert model.block.linear.weight.grad.abs().sum() > 0


def test_convolutional_model():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip
    handle = attach(model, ["2", "4"], mask={"4": torch.ones(4, 1, 1)})
    with Calls() as calls:
        F.cross_entropy(model(torch.randn(BATCH, 3, 8, 8)), batch()[1]).backward()
    assert calls.projections == 1
    assert [layer.size for layer in handle.dfa.dfa_layers] == [4 * 6 * 6, 4 * 4 * 4]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_copies_of_an_attached_model_have_hooks_of_their_own():
    x, y = batch()
    model = plain()
    handle = attach(model, POINTS)
    model(x)  # a forward pass without a backward pass
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        handle.mode = "backprop"
        assert_equal(backward(twin, x, y), backward(perceptron(), x, y))
        assert not handle.dfa._group.waiting
        handle.mode = "dfa"


def test_named_tuples_and_lists_keep_their_type():
    class Pair(NamedTuple):
        hidden: Tensor
        cache: str

    class Returns(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.linear, self.kind = nn.Linear(8, 8), kind

        def forward(self, x):
            h = self.linear(x)
            return Pair(h, "kept") if self.kind == "named" else [h, "kept"]

    for kind, expected in (("named", Pair), ("list", list)):
        model = Returns(kind)
        attach(model, ["linear"])
        result = model(batch()[0])
        assert type(result) is expected
        assert result[1] == "kept"
        assert type(result[0].grad_fn).__name__ == "FeedbackBackward"


class Losses(nn.Module):
    """Returns its loss as models do: in a mapping, before the logits, or alone."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.head, self.kind = nn.Linear(8, 8), nn.Linear(8, CLASSES), kind

    def forward(self, x, y=None):
        logits = self.head(self.body(x))
        loss = None if y is None else F.cross_entropy(logits, y)
        if self.kind == "mapping":
            return {"loss": loss, "logits": logits}
        if y is None:
            return logits
        return loss if self.kind == "alone" else (loss, logits)


@pytest.mark.parametrize("kind", ["mapping", "tuple", "alone"])
def test_a_loss_made_inside_needs_an_output(kind):
    """Its gradient does not pass through what the model returns."""
    x, y = batch()
    model = Losses(kind)
    handle = attach(model, ["body"])
    with pytest.raises(ValueError, match=r"attach: 'Losses' returns its loss, .* give output="):
        model(x, y)
    model(x)  # no loss
    with torch.no_grad():
        model(x, y)
    handle.detach()
    attach(model, ["body"], output="head")
    found = model(x, y)
    (found["loss"] if kind == "mapping" else found if kind == "alone" else found[0]).backward()
    assert model.body.weight.grad.abs().sum() > 0


def test_points_that_reach_no_output_are_warned_of():
    x, _ = batch()
    model = plain()
    attach(model, POINTS, output="2")
    with (
        pytest.warns(
            UserWarning, match=r"DFA: dfa_layers \[1, 2\] were not called in this forward"
        ),
        pytest.warns(UserWarning, match=r"DFA: dfa_layers \[1, 2\] were called after the DFA"),
    ):
        model(x)
    with torch.no_grad():
        model(x)


def test_bad_arguments():
    model = plain()
    with pytest.raises(TypeError, match="attach: model must be a module, got function"):
        attach(batch, ["1"])
    with pytest.raises(ValueError, match=r"points must be submodules of the model \(0, .* got 'x'"):
        attach(model, ["x"])
    with pytest.raises(ValueError, match=r"points must be submodules .* got Linear"):
        attach(model, [nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"output must be submodules .* got 'x'"):
        attach(model, ["1"], output="x")
    with pytest.raises(ValueError, match=r"one or more distinct submodules, got \['1', '1'\]"):
        attach(model, ["1", model[1]])
    for points, got in (("13", "'13'"), (model, "Sequential"), (None, "NoneType"), ({"1"}, "set")):
        with pytest.raises(TypeError, match=rf"points must be a sequence of .* names, got {got}$"):
            attach(model, points)
    blocks = Stack()
    assert len(attach(blocks, blocks.blocks, output="head").dfa.dfa_layers) == 3
    twice = nn.Sequential(nn.Linear(8, 8), model[1], nn.Linear(8, 8), model[1])
    with pytest.raises(ValueError, match=r"got \['1', '1'\] \(of several names of one module"):
        attach(twice, ["1", "3"])
    with pytest.raises(ValueError, match=r"one or more distinct submodules, got \[\]"):
        attach(model, [])
    with pytest.raises(ValueError, match="output must not be one of the points, got '1'"):
        attach(model, ["1"], output="1")
    with pytest.raises(TypeError, match="unexpected keyword argument 'sed'"):
        attach(model, ["1"], sed=3)
    attach(model, ["1"])
    with pytest.raises(ValueError, match="model must have no DFA yet"):
        attach(model, ["3"])
    with pytest.raises(ValueError, match="model must have no DFA yet"):
        attach(Perceptron(), ["linears.0"])


def test_outputs_without_a_tensor_to_replace():
    class Text(nn.Module):
        def forward(self, x):
            return "text"

    model = nn.Sequential(Text())
    attach(model, ["0"])
    with pytest.raises(TypeError, match=r"attach: '0' must return a tensor, .* got str"):
        model(1)
