"""What PORTING.md says of tinydfa, of loops by hand and of NumPy, against those written out here.

Options are read from the page and evaluated, so what is tested is what it says.
"""

import copy
import inspect
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dfa_kernels
from dfa_kernels import (
    DFA,
    DFALayer,
    FeedbackPointsHandling,
    alignment,
    feedback_matrix,
    project,
    tinydfa_scales,
)
from dfa_kernels.nn import INDEPENDENT_ROWS
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
from tests.nn.porting import PAGE, Table, by_signals, difference

TABLE = Table("From tinydfa")


@TABLE.holds("tinydfa")
def test_tinydfas_names():
    names: dict = {}
    exec(TABLE.code("tinydfa", "from dfa_kernels [^`]*"), names)
    dfa = names["DFA"](
        [names["DFALayer"]()], True, None, False, names["FeedbackPointsHandling"].LAST
    )
    assert isinstance(dfa, DFA)


@TABLE.holds("`torch.manual_seed` for the matrix")
def test_torchs_seed_has_no_part_in_the_matrix():
    error = torch.randn(3, 5)
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(signals(error, [6], **TABLE.options("`torch.manual_seed`")))
    assert_equal(*made)
    assert not torch.equal(made[0][0], signals(error, [6], seed=5)[0])


@TABLE.holds("tinydfa's matrix, already drawn")
def test_a_matrix_that_tinydfa_drew_makes_its_gradients():
    class Old:
        feedback_matrix = torch.rand(CLASSES, max(WIDTHS)) * 2 - 1

    x, y = batch()
    model = perceptron(**TABLE.options("tinydfa's matrix", old=Old))
    shared = difference(model, x, y) / BATCH @ Old.feedback_matrix / math.sqrt(max(WIDTHS))
    expected = by_signals(model, x, y, [shared[:, :width] for width in WIDTHS])
    assert_equal(backward(model, x, y), expected, rtol=1e-4, atol=1e-6)


@TABLE.holds("`MINIBATCH`")
def test_several_forward_passes_before_their_backward_passes():
    halves = [batch(seed=1), batch(seed=2)]
    names = re.findall(r'`"(\w+)"`', TABLE.lines["`MINIBATCH`"])
    assert names == [handling.name for handling in FeedbackPointsHandling]
    for handling in (*FeedbackPointsHandling, *names):
        model = perceptron(feedback_points_handling=handling)
        expected = [backward(model, *half) for half in halves]
        model.zero_grad()
        for loss in [F.cross_entropy(model(x), y) for x, y in halves]:
            loss.backward()
        assert_equal(gradients(model), [a + b for a, b in zip(*expected, strict=True)])


@TABLE.holds("`passthrough=True` in all layers")
def test_the_mode_of_backpropagation_is_passthrough_without_training():
    x, y = batch()
    passing = perceptron(no_training=True)
    for point in passing.points:
        point.passthrough = True
    model = perceptron()
    model.dfa.mode = "backprop"
    assert_equal(backward(model, x, y), backward(passing, x, y))
    plain = nn.Sequential(*[m for w in model.linears for m in (w, nn.Tanh())], model.output)
    assert_equal(backward(model, x, y), backward(plain, x, y))


@TABLE.holds("`tinydfa.light_dfa`")
def test_hooks_that_replace_every_layers_gradient():
    """light_dfa's way: nothing is cut, and hooks return each activation's slice of one signal."""
    x, y = batch()
    model = perceptron(distribution="uniform", normalization=tinydfa_scales)
    U = feedback_matrix(max(WIDTHS), CLASSES, distribution="uniform") / 3**0.5
    made = []

    def run(no_training):
        light = copy.deepcopy(model)
        light.zero_grad()
        h = x
        for linear, width in zip(light.linears, WIDTHS, strict=True):
            h = torch.tanh(linear(h))
            h.register_hook(lambda g, size=width: g * 0 if no_training else made[0][:, :size])
        output = light.output(h)
        output.register_hook(lambda e: made.append(e @ U.T / max(WIDTHS) ** 0.5))
        F.cross_entropy(output, y).backward()
        return gradients(light)

    assert_equal(backward(model, x, y), run(False), rtol=1e-4, atol=1e-6)
    model.dfa.no_training = True
    ours, theirs = backward(model, x, y), run(True)
    assert all(g is None for g in ours[:-2])
    assert all((g == 0).all() for g in theirs[:-2])
    assert_equal(ours[-2:], theirs[-2:])


@TABLE.holds("`AlignmentMeasurement(model, device)`")
def test_alignment_is_tinydfas_measurement_at_the_points():
    """Two models, two backward passes, the cosine of each sample's gradients by an activation."""
    x, y = batch()
    model = perceptron(keep=True)
    copies = [copy.deepcopy(model), copy.deepcopy(model)]
    before = backward(model, x, y)
    found = alignment(model, lambda: F.cross_entropy(model(x), y))
    assert_equal(gradients(model), before)
    cosines = {}
    copies[1].dfa.mode = "backprop"
    for one in copies:
        loss = F.cross_entropy(one(x), y)
        for h in one.hidden:
            h.retain_grad()
        loss.backward()
    for name, ours, theirs in zip(found, copies[0].hidden, copies[1].hidden, strict=True):
        cosines[name] = torch.cosine_similarity(ours.grad, theirs.grad)
    for name, angle in found.items():
        assert angle.mean == pytest.approx(cosines[name].mean().item(), abs=1e-5)
        ratio = math.sqrt((BATCH - 1) / BATCH)
        assert angle.std == pytest.approx(cosines[name].std().item() * ratio, abs=1e-5)


@TABLE.holds("a hand-written backward loop")
def test_a_loop_by_hand_gives_the_same_gradients():
    x, y = batch()
    model = perceptron(seed=4)
    made = project(difference(model, x, y) / BATCH, list(WIDTHS), seed=4)
    assert_equal(backward(model, x, y), by_signals(model, x, y, made), rtol=1e-4, atol=1e-6)


@TABLE.holds("a matrix per layer")
@pytest.mark.parametrize("distribution", ["normal", "uniform", "rademacher", "hadamard"])
def test_rows_of_independent_matrices(distribution):
    error, sizes = torch.randn(7, 20), [30, 12, 30]
    where = {"seed": 6, "distribution": distribution}
    of_dfa = signals(error, sizes, **where, **TABLE.options("a matrix per layer"))
    rows = [i * INDEPENDENT_ROWS for i in range(3)]
    assert_equal(of_dfa, project(error, sizes, **where, row_offsets=rows))
    assert INDEPENDENT_ROWS == 2**40
    for i, (signal, size) in enumerate(zip(of_dfa, sizes, strict=True)):
        B = feedback_matrix(size, 20, **where, row_offset=i * 2**40) / math.sqrt(size * 20)
        torch.testing.assert_close(signal, error @ B.T)
    assert not torch.equal(of_dfa[0], of_dfa[2])


@pytest.mark.parametrize("place", [DFA, project])
def test_the_rows_of_independent_matrices_are_documented(place):
    text = inspect.getdoc(place)
    assert "INDEPENDENT_ROWS" in text
    assert "2**40" in text


@pytest.mark.parametrize("shared", [True, False])
def test_the_matrix_of_a_layer(shared):
    error, sizes = torch.randn(7, 20), [30, 12, 30]
    points = [DFALayer() for _ in sizes]
    dfa = DFA(points, shared=shared, seed=6)
    hidden = [torch.zeros(7, size, requires_grad=True) for size in sizes]
    for point, h in zip(points, hidden, strict=True):
        point(h)
    dfa(torch.zeros(7, 20, requires_grad=True)).backward(error)
    for i, h in enumerate(hidden):
        torch.testing.assert_close(h.grad, error @ dfa.feedback_matrix(i).T)


@TABLE.holds("a stored matrix to keep")
def test_a_stored_matrix_that_is_scaled_already():
    B, x, y = torch.randn(max(WIDTHS), CLASSES) / 9, *batch()
    model = perceptron(**TABLE.options("a stored matrix", B=B), normalization=1.0)
    made = [difference(model, x, y) / BATCH @ B.T[:, :width] for width in WIDTHS]
    assert_equal(backward(model, x, y), by_signals(model, x, y, made), rtol=1e-4, atol=1e-6)


@TABLE.holds("frozen hidden layers")
def test_frozen_hidden_layers():
    x, y = batch()
    model = perceptron()
    model.dfa.mode = "shallow"
    found = backward(model, x, y)
    assert all(gradient is None for gradient in found[:-2])
    h = x
    with torch.no_grad():
        for linear in model.linears:
            h = torch.tanh(linear(h))
    error = difference(model, x, y) / BATCH
    assert_equal(found[-2:], [error.T @ h, error.sum(0)], rtol=1e-5, atol=1e-6)


@TABLE.holds("fixed gradient masks")
def test_masks_of_units_and_of_weights():
    x, y = batch()
    m = (torch.arange(WIDTHS[1]) % 2).float()
    plain = perceptron()
    masked = perceptron(mask={"h1": m})
    error = difference(plain, x, y) / BATCH
    made = project(error, list(WIDTHS))
    made[1] = made[1] * m
    assert_equal(backward(masked, x, y), by_signals(plain, x, y, made), rtol=1e-4, atol=1e-6)
    expected = backward(plain, x, y)
    weights = (torch.rand(16, 8) < 0.5).float()
    plain.linears[0].weight.register_hook(lambda g: g * weights)
    assert torch.equal(backward(plain, x, y)[0], expected[0] * weights)


@TABLE.holds("a spiking or recurrent layer")
@pytest.mark.parametrize(("dims", "shape"), [((0, 1), (6, 4, 9)), ((1, 0), (4, 6, 9))])
def test_time_steps_in_one_tensor(dims, shape):
    """tinydfa's way: the signal repeated for each step, over sqrt(steps)."""
    error = torch.randn(6, 5)
    expected = (error @ feedback_matrix(9, 5).T / math.sqrt(9 * 5))[:, None].repeat(1, 4, 1) / 2

    def received(**arguments):
        layer = DFALayer(batch_dims=dims)
        dfa, h = DFA([layer], **arguments), torch.zeros(shape, requires_grad=True)
        layer(h)
        dfa(torch.zeros(6, 5, requires_grad=True)).backward(error)
        return h.grad if dims == (0, 1) else h.grad.transpose(0, 1)

    torch.testing.assert_close(received(), expected)
    without = TABLE.options("a spiking or recurrent layer", r"DFA\(layers[^`]*")
    torch.testing.assert_close(received(**without), expected * 2)


@TABLE.holds("a recurrent layer called once")
def test_a_call_for_each_time_step():
    error = torch.randn(6, 5)
    layer = DFALayer()
    dfa = DFA([layer], **TABLE.options("a recurrent layer called once"))
    steps = [torch.zeros(6, 9, requires_grad=True) for _ in range(3)]
    for h in steps:
        layer(h)
    dfa(torch.zeros(6, 5, requires_grad=True)).backward(error)
    for h in steps:
        torch.testing.assert_close(h.grad, error @ feedback_matrix(9, 5).T / math.sqrt(9 * 5))


@TABLE.holds("feedback alignment from layer to layer")
def test_feedback_alignment_layer_by_layer():
    """Lillicrap et al.: each layer's delta is projected to the layer below."""
    x, y = batch()
    first, second, last = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, CLASSES)
    h1 = torch.tanh(first(x))
    h2 = torch.tanh(second(h1))
    e = (last(h2).softmax(1) - F.one_hot(y, CLASSES)).detach() / BATCH
    B2, B1 = (feedback_matrix(12, 5, seed=1) / 60**0.5, feedback_matrix(16, 12, seed=0) / 192**0.5)
    d2 = e @ B2.T * (1 - h2**2)
    d1 = d2 @ B1.T * (1 - h1**2)
    (signal,) = project(e, [12], seed=1)
    (delta,) = torch.autograd.grad(h2, second.bias, signal, retain_graph=True)
    torch.testing.assert_close(delta, d2.sum(0))
    (signal,) = project(d2.detach(), [16], seed=0)
    (delta,) = torch.autograd.grad(h1, first.bias, signal)
    torch.testing.assert_close(delta, d1.sum(0))


@TABLE.holds("old checkpoints")
def test_a_checkpoint_without_the_seed():
    model = perceptron(seed=3)
    old = {key: value for key, value in model.state_dict().items() if "extra" not in key}
    twin = perceptron(seed=3)
    twin.load_state_dict({key: value + 1 for key, value in old.items()}, strict=False)
    assert torch.equal(twin.output.bias, model.output.bias + 1)
    assert twin.dfa.seed == 3


@TABLE.holds("a `DFALayer` given to no `DFA`")
def test_a_layer_without_a_dfa_cuts_the_gradient():
    layer, h = DFALayer(), torch.ones(2, 3, requires_grad=True)
    with pytest.warns(UserWarning, match="DFALayer"):
        passed = layer(h)
    assert torch.equal(passed, h)
    layer(h)  # it has said so: a second warning would be an error
    (passed.sum() + h.sum() * 0).backward()
    assert (h.grad == 0).all()
    assert DFALayer(passthrough=True)(h) is h
    with torch.no_grad():
        assert torch.equal(DFALayer()(h), h)


@TABLE.holds("layers that go from one `DFA`")
def test_layers_are_given_on():
    points = [DFALayer(), DFALayer()]
    first = DFA(points)
    with pytest.raises(ValueError, match="already belongs"):
        DFA(points)
    first.release()
    assert DFA(points).dfa_layers == tuple(points)


# --- NumPy, and the page itself ---


def test_numpy_shares_memory_and_gives_numpys_numbers():
    e = np.random.default_rng(0).normal(size=(5, 8))  # a sample in every column
    error = torch.from_numpy(e).T
    assert error.data_ptr() == e.ctypes.data
    made = project(error, [9, 4], seed=2)
    U = feedback_matrix(9, 5, seed=2, dtype=torch.float64).numpy()
    for signal, size in zip(made, (9, 4), strict=True):
        array = signal.numpy()
        assert array.ctypes.data == signal.data_ptr()
        np.testing.assert_allclose(array.T, U[:size] @ e / np.sqrt(size * 5), rtol=1e-12)


def test_every_line_is_held():
    assert sorted(TABLE.held) == sorted(TABLE.lines)


def test_what_the_page_names_is_there():
    for name in re.findall(r"`(?:dfa_kernels\.nn\.)(\w+)`", PAGE):
        assert hasattr(dfa_kernels.nn, name)
