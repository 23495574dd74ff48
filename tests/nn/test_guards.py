"""What does not train, or not as asked, says so once; what trains as asked says nothing."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import func, fx, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from dfa_kernels import DFA, DFALayer, attach
from tests.nn.networks import (
    BATCH,
    CLASSES,
    INPUTS,
    assert_equal,
    backward,
    batch,
    perceptron,
)


def once(call, match):
    """`call` warns at its first run, pointing at the tests, and not at its second."""
    with pytest.warns(UserWarning, match=match) as caught:
        call()
    assert {Path(warning.filename).parent for warning in caught} == {Path(__file__).parent}
    call()


# --- a DFALayer that belongs to no DFA ---


def test_a_layer_alone_cuts_and_says_so_once():
    layer = DFALayer("h")
    h = torch.ones(2, 3, requires_grad=True)
    once(lambda: layer(h), "DFALayer: no DFA trains layer 'h', so nothing trains what is before it")
    assert not layer(h).requires_grad
    with pytest.warns(UserWarning, match="no DFA trains this layer"):
        DFALayer()(h)


def test_a_layer_alone_is_quiet_where_nothing_is_to_train():
    h = torch.ones(2, 3, requires_grad=True)
    assert DFALayer(passthrough=True)(h) is h
    assert torch.equal(DFALayer()(torch.ones(2, 3)), h)
    with torch.no_grad():
        assert torch.equal(DFALayer()(h), h)


# --- a layer that is called twice ---


class Shared(nn.Module):
    """One activation module for two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(INPUTS, 16), nn.Linear(16, 12)
        self.relu, self.head = nn.ReLU(), nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.relu(self.second(self.relu(self.first(x)))))


def test_a_shared_activation_says_that_only_its_last_call_is_trained():
    x, y = batch()
    model = Shared()
    attach(model, ["relu"])
    once(
        lambda: model(x), r"DFA: dfa_layers\[0\] was called again before the DFA, so only its last"
    )
    found = backward(model, x, y)
    assert found[0] is found[1] is None
    assert found[2].any()


@pytest.mark.parametrize("handling", ["LAST", "MINIBATCH", "REDUCE"])
def test_a_chosen_handling_is_quiet(handling):
    x, y = batch()
    model = Shared()
    attach(model, ["relu"], feedback_points_handling=handling)
    found = backward(model, x, y)
    assert (found[0] is not None) == (handling == "REDUCE")


def test_a_compiled_shared_activation_says_so_too():
    model = Shared()
    attach(model, ["relu"])
    with pytest.warns(UserWarning, match=r"dfa_layers\[0\] was called again"):
        torch.compile(model, backend="eager", fullgraph=True)(batch()[0])


# --- points that do not fire ---


@pytest.mark.parametrize("handling", [None, "LAST", "REDUCE"])
@pytest.mark.parametrize("traced", [False, True])
def test_a_pass_without_the_models_hooks_says_so(traced, handling):
    """As by its forward, or by a traced graph: points are modules with hooks, the model's own hook
    is not called."""
    x, y = batch()
    model = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    handle = attach(model, ["1"], feedback_points_handling=handling)
    call = fx.symbolic_trace(model) if traced else model.forward
    once(lambda: call(x), "DFA: a point was called outside a call of the model, so nothing trains")
    assert handle.dfa._group.waiting == {}
    assert backward(model, x, y)[0].any()


def test_a_submodule_as_the_output_needs_no_call_of_the_model():
    x, y = batch()
    model = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    attach(model, ["1"], output="2")
    assert_equal(backward(model, x, y, call=model.forward), backward(model, x, y))


def test_a_pass_without_layers_says_so():
    x, _ = batch()
    model = perceptron()
    model.points = nn.ModuleList(nn.Identity() for _ in model.points)
    once(lambda: model(x), "DFA: no layer was called before it in this forward pass")
    model.dfa.mode = "shallow"
    model(x)


def test_a_second_output_says_so():
    x, _ = batch()
    model = perceptron()
    once(lambda: model.dfa(model(x)), "DFA: no layer was called before it .* called twice")


def test_a_layer_that_was_never_called_says_so():
    x, y = batch()
    model = perceptron()
    with pytest.warns(UserWarning, match=r"DFA: dfa_layers \[1\] were not called in this forward"):
        backward(model, x, y, skip=(1,))
    backward(model, x, y, skip=(1,))
    model = perceptron()
    backward(model, x, y)
    backward(model, x, y, skip=(1,))  # it was called before, so it is skipped on purpose


def test_evaluation_and_other_modes_are_quiet():
    x, y = batch()
    model = perceptron()
    with torch.no_grad():
        model(x)
    for mode in ("shallow", "backprop"):
        model.dfa.mode = mode
        backward(model, x, y)
    model.dfa.mode = "dfa"
    with torch.no_grad():
        model(x, skip=(0, 1, 2))
    backward(model, x, y)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model(x)  # nothing is to be trained at all


def test_frozen_layers_say_so():
    x, y = batch()
    model = perceptron()
    model.linears[0].requires_grad_(False)
    once(
        lambda: backward(model, x, y),
        r"DFA: dfa_layers \[0\] got activations that require no gradient",
    )


def test_guards_hold_beside_a_frozen_output():
    """The output itself then requires no gradient before it is tied to the activations."""
    x, y = batch()
    model = perceptron()
    model.linears[0].requires_grad_(False)
    model.output.requires_grad_(False)
    once(
        lambda: backward(model, x, y),
        r"DFA: dfa_layers \[0\] got activations that require no gradient",
    )


def test_layers_called_without_gradients_say_so():
    x, y = batch()
    model = perceptron()
    with torch.no_grad():
        h = model.points[0](torch.tanh(model.linears[0](x)))
    for linear, point in zip(model.linears[1:], model.points[1:], strict=True):
        h = point(torch.tanh(linear(h)))
    with pytest.warns(UserWarning, match=r"DFA: dfa_layers \[0\] were called with gradients dis"):
        F.cross_entropy(model.dfa(model.output(h)), y).backward()


# --- reentrant checkpointing ---


class Blocks(nn.Module):
    """Blocks inside reentrant checkpoints, with points around or inside them."""

    def __init__(self, inside, reentrant=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Linear(INPUTS, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(16, CLASSES)
        self.inside, self.reentrant = inside, reentrant

    def forward(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


NAMES = ["blocks.0", "blocks.1", "blocks.2"]


class Whole(nn.Module):
    """A checkpoint around a block, as a module whose output is a point."""

    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def wrapped(reentrant):
    model = Blocks(inside=False)
    blocks = nn.ModuleList(Whole(block, reentrant) for block in model.blocks)
    return nn.Sequential(model.embedding, *blocks, model.head)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpoints_in_a_row_need_activations_that_require_a_gradient():
    x, y = batch()
    expected = wrapped(False)
    attach(expected, ["1", "2", "3"])
    expected = backward(expected, x, y)
    cut = wrapped(True)
    attach(cut, ["1", "2", "3"])
    with pytest.warns(UserWarning, match=r"dfa_layers \[1, 2\] got .* requires_grad=True of DFA"):
        assert backward(cut, x, y)[4] is None
    model = wrapped(True)
    attach(model, ["1", "2", "3"], requires_grad=True)
    assert_equal(backward(model, x, y), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_points_inside_reentrant_checkpoints_say_that_nothing_is_trained():
    x, _ = batch()
    model = Blocks(inside=True)
    attach(model, NAMES)
    with pytest.warns(UserWarning, match=r"dfa_layers \[0, 1, 2\] were called with gradients dis"):
        model(x)


# --- activations that require a gradient ---


@pytest.mark.parametrize("of", ["DFA", "DFALayer"])
@pytest.mark.parametrize("arguments", [{}, {"lean": True}])
def test_activations_that_require_a_gradient_change_no_gradient(of, arguments):
    x, y = batch()
    expected = backward(perceptron(**arguments), x, y)
    model = perceptron(**arguments, requires_grad=of == "DFA")
    if of == "DFALayer":
        for point in model.points:
            point.requires_grad = True
    seen = []
    for point in model.points:
        point.register_forward_hook(lambda module, args, output: seen.append(output))
    assert_equal(backward(model, x, y), expected)
    assert all(h.requires_grad for h in seen)
    if not arguments and of == "DFA":
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_equal(backward(model, x, y, call=compiled), expected, rtol=1e-5, atol=1e-6)
    model.dfa.mode = "shallow"
    assert backward(model, x, y)[:-2] == [None] * 6


# --- rows that are most likely tokens ---


def test_an_output_of_tokens_with_the_default_batch_dims_says_so():
    points = [DFALayer()]
    x = torch.randn(BATCH, 4, INPUTS)
    linear, head = nn.Linear(INPUTS, 16), nn.Linear(16, CLASSES)
    for arguments, warns in (
        ({}, True),
        ({"batch_dims": (0,)}, False),
        ({"batch_dims": (0, 1)}, 0),
    ):
        dfa = DFA(points, **arguments)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dfa(head(points[0](linear(x))))
        assert [bool(re.search("batch_dims=.0, 1.", str(one.message))) for one in caught] == (
            [True] if warns else []
        )
        dfa.release()


# --- forward mode ---


def test_forward_mode_is_refused():
    x, _ = batch()
    model = perceptron()
    parameters = dict(model.named_parameters())

    def output(x):
        return func.functional_call(model, parameters, (x,))

    for derive in (
        lambda: func.jvp(output, (x,), (x,)),
        lambda: func.jacfwd(output)(x),
        lambda: func.hessian(lambda x: output(x).square().sum())(x),
    ):
        with pytest.raises(NotImplementedError, match=r"DFALayer: there are no forward-mode"):
            derive()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match=r"DFALayer: there are no forward-mode"):
            model(dual)
        model.dfa.mode = "backprop"
        assert forward_ad.unpack_dual(model(dual)).tangent.any()
