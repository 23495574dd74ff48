"""Feedback that changes between steps, as in PORTING.md: stored matrices, errors kept, noise."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer, alignment, attach, feedback_matrix
from tests.nn.networks import (
    BATCH,
    CLASSES,
    WIDTHS,
    assert_equal,
    backward,
    batch,
    gradients,
    perceptron,
    signals,
)
from tests.nn.porting import (
    OUTPUT,
    PAGE,
    WRONG,
    Table,
    assert_received,
    by_signals,
    difference,
    mean,
    received,
)

TABLE = Table("Feedback that changes")


def stored(shared, dtype=torch.float32):
    if shared:
        return torch.randn(16, CLASSES, dtype=dtype)
    return [torch.randn(width, CLASSES, dtype=dtype) for width in WIDTHS]


def fresh(matrix):
    """A model like `perceptron(matrix=matrix)` with the matrix as it is now."""
    return perceptron(matrix=copy.deepcopy(matrix))


@TABLE.holds("feedback that learns")
@pytest.mark.parametrize("arguments", [{}, {"lean": True}, {"shared": False}])
def test_a_change_in_place_takes_effect_with_the_next_signal(arguments):
    x, y = batch()
    matrix = stored(arguments.get("shared", True))
    model = perceptron(matrix=matrix, **arguments)
    before = backward(model, x, y)
    for one_of in [matrix] if isinstance(matrix, torch.Tensor) else matrix:
        one_of.mul_(2).add_(0.1)
    after = backward(model, x, y)
    assert_equal(after, backward(fresh(matrix), x, y), rtol=1e-5, atol=1e-7)
    assert not torch.equal(after[0], before[0])


def test_a_change_between_the_passes_counts():
    x, y = batch()
    matrix = stored(True)
    model = perceptron(matrix=matrix)
    loss = F.cross_entropy(model(x), y)
    matrix.neg_()
    loss.backward()
    assert_equal(gradients(model), backward(fresh(matrix), x, y))


def test_an_optimizer_trains_the_matrix():
    x, y = batch()
    matrix = nn.Parameter(stored(True))
    model = perceptron(matrix=matrix)
    optimizer = torch.optim.Adam([matrix], lr=0.1)
    backward(model, x, y)
    assert matrix.grad is None  # a signal's own gradient does not reach it
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    assert torch.equal(model.dfa.matrices[0], matrix)
    assert_equal(backward(model, x, y), backward(fresh(matrix.detach()), x, y))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_sees_the_change():
    x, y = batch()
    matrix = stored(True)
    model = perceptron(matrix=matrix)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    backward(model, x, y, call=compiled)
    matrix.neg_()
    found = backward(model, x, y, call=compiled)
    assert_equal(found, backward(fresh(matrix), x, y), rtol=1e-5, atol=1e-7)


@TABLE.holds("`rp_device`, or a first pass")
@pytest.mark.parametrize("kind", [torch.Tensor, nn.Parameter])
def test_matrices_that_moved_are_the_ones_in_force(kind):
    """The fake device "meta" stands for another one."""
    matrix = kind(stored(True))
    moved = DFA([DFALayer()], matrix=matrix, rp_device="meta")
    assert moved.matrices[0].device.type == "meta"
    assert not moved.matrices[0].requires_grad
    layer = DFALayer()
    dfa = DFA([layer], matrix=matrix)
    layer(torch.zeros(2, 16, device="meta", requires_grad=True))
    assert dfa.matrices[0].data_ptr() == matrix.data_ptr()
    dfa(torch.zeros(2, CLASSES, device="meta", requires_grad=True))
    assert dfa.matrices[0].device.type == "meta"


def with_parameter(trained=False):
    """A model that holds its feedback as a parameter; [1] is the point."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    model[0].feedback = nn.Parameter(stored(True), requires_grad=trained)
    return model, attach(model, ["1"], matrix=model[0].feedback)


@pytest.mark.parametrize("trained", [False, True])
def test_a_models_own_parameter_stays_in_force_when_the_model_is_cast(trained):
    x, y = batch(torch.float64)
    model, handle = with_parameter(trained)
    model.double()
    assert handle.dfa.matrices[0] is model[0].feedback
    before = backward(model, x, y)
    with torch.no_grad():
        model[0].feedback.neg_()
    assert torch.equal(backward(model, x, y)[1], -before[1])
    assert model[0].feedback.grad is None


@TABLE.holds("a model holds B as an `nn.Parameter`")
def test_a_models_own_parameter_is_copied_saved_and_loaded_with_it():
    x, y = batch()
    model, handle = with_parameter()
    twin, of_twin = copy.deepcopy((model, handle))
    assert of_twin.dfa.matrices[0] is twin[0].feedback
    with torch.no_grad():
        model[0].feedback.neg_()
    before = backward(twin, x, y)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(backward(twin, x, y)[1], -before[1])


def test_no_gradient_reaches_a_matrix_through_the_signals():
    x, y = batch()
    matrix = nn.Parameter(stored(True))
    model = perceptron(matrix=matrix)
    loss = F.cross_entropy(model(x), y)
    (of_weight,) = torch.autograd.grad(loss, model.linears[0].weight, create_graph=True)
    (of_matrix,) = torch.autograd.grad(of_weight.sum(), matrix, allow_unused=True)
    assert of_matrix is None
    B_0 = model.dfa.feedback_matrix(0)
    assert not B_0.requires_grad
    torch.testing.assert_close(B_0, matrix.detach() / (16 * CLASSES) ** 0.5)


@TABLE.holds("a plain tensor or a buffer")
def test_copies_have_matrices_of_their_own():
    x, y = batch(torch.float64)
    matrix = stored(True)
    model = perceptron(matrix=matrix).double()
    assert model.dfa.matrices[0].data_ptr() == matrix.data_ptr()
    assert not any(value.shape == matrix.shape for value in model.dfa.state_dict().values())
    twin = copy.deepcopy(model)
    before = backward(twin, x, y)
    matrix.neg_()
    assert_equal(backward(twin, x, y), before)
    twin.dfa.matrices[0].neg_()
    assert_equal(backward(twin, x, y), backward(model, x, y))


@TABLE.holds("the error, for an update")
def test_the_error_is_seen_by_a_transform_or_a_hook():
    x, y = batch()
    kept = []

    def keep(e):
        kept.append(e)
        return e

    model = perceptron(error_transform=keep)
    output = model(x)
    output.register_hook(kept.append)
    F.cross_entropy(output, y).backward()
    torch.testing.assert_close(kept[0], difference(model, x, y) / BATCH)
    assert torch.equal(kept[0], kept[1])
    alignment(model, lambda: F.cross_entropy(model(x), y))
    assert len(kept) == 3  # it runs the transform too


def test_direct_kolen_pollack():
    """By hand: B_i moves by e^T h_i, as the weights of a direct connection would (Webster 2021)."""
    rate, decay = 0.1, 0.01
    x, y = batch()
    matrices = [torch.randn(width, CLASSES) / 4 for width in WIDTHS]
    B = [matrix.clone() for matrix in matrices]
    seen = {}

    def keep(e):
        seen["error"] = e
        return e

    model = perceptron(keep=True, matrix=matrices, normalization=1.0, error_transform=keep)
    theirs = copy.deepcopy(model)
    optimizers = [
        torch.optim.SGD(one_of.parameters(), lr=rate, weight_decay=decay)
        for one_of in (model, theirs)
    ]
    for _ in range(4):
        optimizers[0].zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizers[0].step()
        with torch.no_grad():
            for matrix, h in zip(model.dfa.matrices, model.hidden, strict=True):
                matrix -= rate * (h.T @ seen["error"] + decay * matrix)
        # by hand
        e = difference(theirs, x, y) / BATCH
        made = [e @ one_of.T for one_of in B]
        hidden, h = [], x
        with torch.no_grad():
            for linear in theirs.linears:
                h = torch.tanh(linear(h))
                hidden.append(h)
        of_theirs = by_signals(theirs, x, y, made)
        for parameter, gradient in zip(theirs.parameters(), of_theirs, strict=True):
            parameter.grad = gradient
        optimizers[1].step()
        B = [b - rate * ((e.T @ h).T + decay * b) for b, h in zip(B, hidden, strict=True)]
    assert_equal(model.dfa.matrices, B, rtol=1e-4, atol=1e-6)
    assert_equal(model.parameters(), theirs.parameters(), rtol=1e-4, atol=1e-6)


def test_kolen_pollack_makes_feedback_the_transposed_weights():
    """With one hidden layer, B - W^T shrinks by (1 - rate * decay) a step (Kolen, Pollack 1994)."""
    rate, decay, steps = 0.5, 0.2, 100
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()
    B, seen = torch.randn(16, CLASSES, dtype=torch.float64), {}

    def keep(e):
        seen["error"] = e
        return e

    handle = attach(model, ["1"], matrix=[B], normalization=1.0, error_transform=keep)
    model[1].register_forward_hook(lambda module, args, h: seen.update(hidden=h))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)
    apart = (B - model[2].weight.T).detach()
    for step in range(steps):
        x, y = batch(torch.float64, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        B -= rate * (seen["hidden"].T @ seen["error"] + decay * B)
    left = (1 - rate * decay) ** steps
    torch.testing.assert_close(B - model[2].weight.T, apart * left, rtol=1e-9, atol=1e-12)
    x, y = batch(torch.float64)
    cosine = alignment(model, lambda: F.cross_entropy(model(x), y))["1"].mean
    assert cosine > 0.9
    assert handle.dfa.matrices[0].data_ptr() == B.data_ptr()


@TABLE.holds("noise on the error")
def test_noise_on_the_error():
    given = TABLE.options("noise on the error")
    torch.manual_seed(5)
    found = received(given, OUTPUT, mean)
    torch.manual_seed(5)
    assert_received(found, WRONG / 8 + 0.1 * torch.randn(8, 5))


@TABLE.holds("noise on every signal")
def test_noise_on_every_signal():
    given = TABLE.options("noise on every signal")
    torch.manual_seed(5)
    found = received(given, OUTPUT, mean)
    torch.manual_seed(5)
    exact = WRONG / 8 @ feedback_matrix(6, 5).T
    torch.testing.assert_close(found, exact + 0.1 * torch.randn(8, 6))


@TABLE.holds("another matrix for every step")
def test_another_matrix_for_every_step():
    x, y = batch()
    model = perceptron(seed=0)
    for step in (3, 4):
        exec(TABLE.lines[TABLE.line("another matrix")].strip("`"), {"dfa": model.dfa, "step": step})
        assert_equal(backward(model, x, y), backward(perceptron(seed=step), x, y))


def test_a_device_and_a_convolution_as_feedback():
    section = PAGE.split("\n## Feedback by a device")[1].split("\n## ")[0]
    names = {"torch": torch, "DFA": DFA, "DFALayer": DFALayer, "error": torch.randn(8, 10)}
    for example in section.split("```python\n")[1:]:
        exec(example.split("```")[0], names)
    error, fixed = names["error"], names["fixed"]
    device = names["Device"](lambda e: e @ fixed.T)
    expected = signals(error, [64, 48], matrix=fixed)
    assert_equal(signals(error, [64, 48], matrix=device), expected, rtol=1e-5, atol=1e-6)
    (found,) = signals(error, [3 * 8 * 8], matrix=names["B"], normalization=1.0)
    expected = F.conv_transpose2d(
        error[:, :, None, None].expand(8, 10, 6, 6).contiguous(), names["kernels"]
    )
    torch.testing.assert_close(found.view(8, 3, 8, 8), expected)


def test_every_line_is_held():
    assert sorted(TABLE.held) == sorted(TABLE.lines)
