"""No forward pass leaves anything behind for another to train: aborted passes, evaluation,
several passes before a backward pass, several models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer
from dfa_kernels.nn import FeedbackPointsHandling
from tests.nn.networks import WIDTHS, assert_equal, backward, batch, gradients, perceptron

HANDLING = list(FeedbackPointsHandling)


def abort(model, x, fail_before=2):
    with pytest.raises(KeyboardInterrupt):
        model(x, fail_before=fail_before)


@pytest.mark.parametrize("handling", HANDLING)
def test_an_aborted_pass_leaves_nothing_in_a_watched_model(handling):
    x, y = batch()
    model = perceptron(watch=True, feedback_points_handling=handling)
    clean = perceptron(feedback_points_handling=handling)
    abort(model, 100 * x)
    assert_equal(backward(model, x, y), backward(clean, x, y))
    abort(model, 100 * x)
    found = backward(model, x, y, skip=(0, 1))
    assert_equal(found, backward(clean, x, y, skip=(0, 1)))


def test_an_exception_frees_a_watched_models_activations_at_once():
    model = perceptron(watch=True)
    model.output = nn.Linear(3, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(batch()[0])
    assert not model.dfa._group.waiting


def test_a_watched_pass_that_misses_the_output_is_warned_of():
    x, y = batch()
    model = perceptron(watch=True)
    model.dfa.forward = lambda output: output
    with pytest.warns(UserWarning, match=r"DFA: dfa_layers \[0, 1, 2\] .* it was not called"):
        model(x)
    assert not model.dfa._group.waiting
    del model.dfa.forward
    assert_equal(backward(model, x, y), backward(perceptron(), x, y))


def test_an_aborted_pass_is_replaced_by_the_next_without_watching():
    x, y = batch()
    model = perceptron()
    abort(model, 100 * x)
    with pytest.warns(UserWarning, match=r"dfa_layers\[0\] was called again before the DFA"):
        found = backward(model, x, y)
    assert_equal(found, backward(perceptron(), x, y))


def test_evaluation_after_an_aborted_pass_clears_it():
    x, y = batch()
    model = perceptron()
    abort(model, 100 * x)
    with torch.no_grad():
        model(x)
    found = []
    for one in (model, perceptron()):
        with pytest.warns(UserWarning, match=r"dfa_layers \[0, 1\] were not called"):
            found.append(backward(one, x, y, skip=(0, 1)))
    assert_equal(*found)


def test_a_pass_that_fails_at_the_output_leaves_nothing():
    x, y = batch()
    model = perceptron()
    for point, width in zip(model.points, WIDTHS, strict=True):
        point(torch.zeros(4, width, requires_grad=True))
    with pytest.raises(
        ValueError, match=r"dfa_layers\[0\] must have the output's rows \[6\], .* got \[4\]"
    ):
        model.dfa(torch.zeros(6, 5))
    assert_equal(backward(model, x, y), backward(perceptron(), x, y))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_waits_where_gradients_are_off(context):
    x, y = batch()
    model = perceptron()
    model.eval()
    with context():
        output = model(x)
    assert not output.requires_grad
    assert not model.dfa._group.waiting
    model.train()
    assert_equal(backward(model, x, y), backward(perceptron(), x, y))


def test_evaluation_mode_with_gradients_on_trains_as_training_mode_does():
    x, y = batch()
    model = perceptron().eval()
    assert_equal(backward(model, x, y), backward(perceptron(), x, y))


@pytest.mark.parametrize("handling", HANDLING)
@pytest.mark.parametrize("lean", [False, True])
def test_several_forward_passes_before_their_backward_passes(handling, lean):
    (x1, y1), (x2, y2) = batch(seed=1), batch(seed=2, size=4)
    model = perceptron(feedback_points_handling=handling, lean=lean)
    expected = [
        a + b for a, b in zip(backward(model, x1, y1), backward(model, x2, y2), strict=True)
    ]
    model.zero_grad()
    first, second = F.cross_entropy(model(x1), y1), F.cross_entropy(model(x2), y2)
    first.backward()
    second.backward()
    assert_equal(gradients(model), expected)
    model.zero_grad()
    first, second = F.cross_entropy(model(x1), y1), F.cross_entropy(model(x2), y2)
    (first + second).backward()
    assert_equal(gradients(model), expected, rtol=1e-6, atol=1e-8)


def test_two_models_interleaved():
    x, y = batch()
    one, two = perceptron(seed=1), perceptron(seed=2)
    expected = [backward(perceptron(seed=seed), x, y) for seed in (1, 2)]
    losses = []
    for model in (one, two):
        model.zero_grad()
        losses.append(F.cross_entropy(model(x), y))
    for loss in losses:
        loss.backward()
    assert_equal(gradients(one), expected[0])
    assert_equal(gradients(two), expected[1])


def test_two_models_one_inside_the_others_pass():
    """The inner model's pass runs between a layer and the output of the outer model."""
    x, y = batch()
    outer, inner = perceptron(seed=1), perceptron(seed=2)

    def run_inner(module, args, output):
        inner(x)

    outer.points[1].register_forward_hook(run_inner)
    assert_equal(backward(outer, x, y), backward(perceptron(seed=1), x, y))


def test_a_layer_called_twice_trains_its_last_or_all_its_activations():
    first, second = torch.randn(2, 6, 7)
    found = {}
    for handling in HANDLING:
        point = DFALayer()
        dfa = DFA([point], feedback_points_handling=handling)
        a, b = first.clone().requires_grad_(), second.clone().requires_grad_()
        output = torch.zeros(6, 5, requires_grad=True)
        point(a), point(b)
        dfa(output).backward(torch.ones(6, 5))
        found[handling.name] = (a.grad, b.grad)
    assert found["LAST"][0] is None
    assert found["MINIBATCH"][0] is None
    assert_equal([found["LAST"][1]], [found["MINIBATCH"][1]])
    assert_equal(found["REDUCE"], [found["LAST"][1]] * 2)


def test_a_layer_called_with_two_sizes_has_each_normalized_by_its_own():
    point = DFALayer()
    dfa = DFA([point], feedback_points_handling=FeedbackPointsHandling.REDUCE)
    wide, narrow = torch.zeros(2, 9, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    point(wide), point(narrow)
    dfa(torch.zeros(2, 5, requires_grad=True)).backward(torch.ones(2, 5))
    torch.testing.assert_close(narrow.grad * 2, wide.grad[:, :4] * 3)


def test_retained_graph_gives_the_same_gradients_again():
    x, y = batch()
    model = perceptron()
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert_equal(gradients(model), [2 * gradient for gradient in once])


@pytest.mark.parametrize("arguments", [{}, {"lean": True}, {"requires_grad": True}])
def test_a_vmap_whose_backward_pass_is_outside(arguments):
    """Inside it no tensor says that it requires a gradient."""
    x, y = batch()
    model = perceptron(**arguments)
    expected = backward(model, x, y)

    def mapped(x):
        return torch.vmap(lambda row: model(row[None])[0])(x)

    close = {"rtol": 1e-4, "atol": 1e-6}
    assert_equal(backward(model, x, y, call=mapped), expected, **close)
    compiled = torch.compile(mapped, backend="aot_eager")
    assert_equal(backward(model, x, y, call=compiled), expected, **close)

    def loss(parameters):
        def call(row):
            return torch.func.functional_call(model, parameters, (row[None],))[0]

        return F.cross_entropy(torch.vmap(call)(x), y)

    found = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    assert_equal(found.values(), expected, **close)


def test_gradient_of_a_frozen_layer_is_not_made():
    x, y = batch()
    model = perceptron()
    model.linears[1].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"dfa_layers \[1\] got activations that require no grad"):
        model(x)
    output = model(x)
    assert len([node for node, _ in output.grad_fn.next_functions if node]) == 1 + 2
    found = backward(model, x, y)
    assert found[2] is found[3] is None
    expected = backward(perceptron(), x, y)
    assert_equal(found[:2] + found[4:], expected[:2] + expected[4:])


def test_training_with_a_layer_outside_any_module():
    """Functional wiring: no module holds both the layers and the output."""
    body, head = nn.Linear(8, 16), nn.Linear(16, 5)
    point = DFALayer()
    dfa = DFA([point])
    x, y = batch()
    F.cross_entropy(dfa(head(point(torch.tanh(body(x))))), y).backward()
    assert body.weight.grad.abs().sum() > 0


def test_an_empty_batch_trains_nothing():
    x, y = batch(size=0)
    model = perceptron()
    F.cross_entropy(model(x), y, reduction="sum").backward()
    assert_equal(gradients(model), [0 * gradient for gradient in backward(perceptron(), *batch())])


@pytest.mark.parametrize("requires_grad", [None, True])
@pytest.mark.parametrize("lean", [False, True])
def test_an_activation_that_outlives_a_transform_is_trained(lean, requires_grad):
    """It is wrapped still, as torch unwraps it for a Function."""
    weight, readout = torch.ones(10, 4, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    layer, left = DFALayer(requires_grad=requires_grad), []
    dfa = DFA([layer], lean=lean)

    def inner(factor):
        left.append(torch.tanh((factor * torch.ones(3, 10)) @ weight))
        return left[-1].sum()

    torch.func.vjp(inner, torch.tensor(0.01))
    dfa(layer(left[0]) @ readout).sum().backward()
    assert weight.grad.any()
