"""What a DFA lets its users see and change: the error, each signal, the feedback matrices."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer, feedback_matrix
from dfa_kernels.nn import INDEPENDENT_ROWS, FeedbackPointsHandling
from tests.nn.networks import (
    BATCH,
    CLASSES,
    WIDTHS,
    Multiplied,
    assert_equal,
    backward,
    batch,
    perceptron,
    signals,
)

# --- the error ---


def in_place(error):
    return error.sign_()


@pytest.mark.parametrize("lean", [False, True])
def test_an_error_transform_may_work_in_place(lean):
    """The last layer still gets the error itself."""
    x, y = batch()
    expected = backward(perceptron(error_transform=torch.sign, lean=lean), x, y)
    assert_equal(backward(perceptron(error_transform=in_place, lean=lean), x, y), expected)
    call = torch.compile(perceptron(error_transform=in_place), backend="aot_eager", fullgraph=True)
    found = backward(call, x, y)
    assert_equal(
        found, backward(perceptron(error_transform=torch.sign), x, y), rtol=1e-5, atol=1e-6
    )


def test_a_source_must_leave_the_error_alone():
    class Careless(Multiplied):
        def project(self, error, layers, dtype):
            return super().project(error.mul_(2), layers, dtype)

    with pytest.raises(ValueError, match=r"DFA: matrix.project must not change the error in place"):
        signals(torch.randn(3, 5), [6], matrix=Careless(torch.randn(6, 5)))


# --- each signal ---


def scaled(signal, layer):
    return signal * (int(layer.name[1:]) + 2)


@pytest.mark.parametrize("widths", [WIDTHS, (16, 16, 16)])
@pytest.mark.parametrize("arguments", [{}, {"lean": True}, {"mask": {"h1": torch.tensor(3.0)}}])
def test_signal_transform_gets_each_layers_signal(widths, arguments):
    """A factor of a layer's signal is one of its gradients."""
    x, y = batch()
    expected = backward(perceptron(widths=widths, **arguments), x, y)
    for i in range(6):
        expected[i] *= i // 2 + 2
    model = perceptron(widths=widths, signal_transform=scaled, **arguments)
    assert_equal(backward(model, x, y), expected, rtol=1e-5, atol=1e-6)
    if "lean" not in arguments and widths != WIDTHS:
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_equal(backward(model, x, y, call=call), expected, rtol=1e-5, atol=1e-6)


def noisy(signal, layer):
    return signal.add_(layer._index)


@pytest.mark.parametrize("lean", [False, True])
def test_signal_transform_may_work_in_place(lean):
    """Layers of equal size share one signal, but not what each makes of it."""
    error = torch.randn(3, 5)
    plain = signals(error, [6, 6, 4, 6], lean=lean)
    found = signals(error, [6, 6, 4, 6], lean=lean, signal_transform=noisy)
    assert_equal(found, [signal + i for i, signal in enumerate(plain)])


@pytest.mark.parametrize("lean", [False, True])
def test_signal_transform_may_work_in_place_on_repeated_rows(lean):
    """Several rows of a layer get one signal, which must not be one memory to the transform."""
    found = []
    for transform in (lambda signal, layer: signal * 2, lambda signal, layer: signal.mul_(2)):
        point = DFALayer(batch_dims=(0, 1))
        dfa = DFA([point], lean=lean, signal_transform=transform)
        hidden = torch.zeros(3, 4, 6, requires_grad=True)
        point(hidden)
        dfa(torch.zeros(3, 5, requires_grad=True)).backward(torch.arange(15.0).reshape(3, 5))
        found.append(hidden.grad)
    assert_equal(found[:1], found[1:])


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("change", [{"mask": None}, {"batch_dims": (1,)}])
def test_what_holds_from_the_next_forward_pass_leaves_this_one_alone(lean, change):
    x, y = batch()
    model = perceptron(lean=lean, mask={1: torch.arange(12.0)})
    expected = backward(model, x, y)
    loss = F.cross_entropy(model(x), y)
    for name, value in change.items():
        setattr(model.dfa, name, value)
    assert_equal(torch.autograd.grad(loss, list(model.parameters())), expected)


@pytest.mark.parametrize("lean", [False, True])
def test_bad_signal_transforms(lean):
    with pytest.raises(TypeError, match="DFA: signal_transform must be a function, got 'sign'"):
        DFA([DFALayer()], signal_transform="sign")
    with pytest.raises(ValueError, match=r"signal_transform must keep the shape \(3, 6\), got Non"):
        signals(torch.randn(3, 5), [6], lean=lean, signal_transform=lambda signal, layer: None)


# --- scales ---


@pytest.mark.parametrize("scale", [1e39, 1e-45, -1e39])
@pytest.mark.parametrize("arguments", [{}, {"matrix": torch.randn(6, 5)}, {"lean": True}])
def test_scales_that_fp32_does_not_hold_are_refused(scale, arguments):
    """In the forward pass, where the error's type is known."""
    points = [DFALayer()]
    dfa = DFA(points, normalization=scale, **arguments)
    points[0](torch.zeros(3, 6, requires_grad=True))
    with pytest.raises(ValueError, match=r"DFA: normalization must be 0 or between .*, got -?1e"):
        dfa(torch.zeros(3, 5, requires_grad=True))
    points[0](torch.zeros(3, 6, requires_grad=True))
    if "matrix" not in arguments:
        dfa(torch.zeros(3, 5, dtype=torch.float64, requires_grad=True))


# --- the matrices ---

SOURCES = [
    {"seed": 3},
    {"seed": 3, "shared": False, "distribution": "uniform"},
    {"seed": 2**64 - 1, "distribution": "hadamard", "normalization": "shared"},
    {"matrix": torch.randn(9, 5)},
    {"matrix": [torch.randn(6, 5), torch.randn(9, 5), torch.randn(4, 5)], "normalization": 2.0},
    {"matrix": Multiplied(torch.randn(9, 5))},
    {"normalization": lambda sizes, n: [1.0, 2.0, n / sizes[2]]},
]


@pytest.mark.parametrize("arguments", SOURCES)
def test_feedback_matrix_is_what_the_signals_are_made_with(arguments):
    sizes = [6, 9, 4]
    points = [DFALayer("a"), DFALayer(), DFALayer("c")]
    dfa = DFA(points, **arguments)
    hidden = [torch.zeros(3, size, requires_grad=True) for size in sizes]
    for point, h in zip(points, hidden, strict=True):
        point(h)
    error = torch.randn(3, 5)
    dfa(torch.zeros(3, 5, requires_grad=True)).backward(error)
    for layer, h in zip(("a", 1, points[2]), hidden, strict=True):
        matrix = dfa.feedback_matrix(layer)
        assert matrix.shape == (h.shape[1], 5)
        torch.testing.assert_close(error @ matrix.T, h.grad)
    if "matrix" not in arguments:
        assert dfa.feedback_matrix("a", 12, dtype=torch.float64).shape == (6, 12)


def test_feedback_matrix_needs_a_layer_and_its_size():
    points = [DFALayer("a"), DFALayer()]
    dfa = DFA(points)
    with pytest.raises(ValueError, match=r"DFA.feedback_matrix: the sizes of layer 'a' and of the"):
        dfa.feedback_matrix("a")
    for layer, error, got in (
        ("b", ValueError, r"of names \['a', None\], got 'b'"),
        (DFALayer(), ValueError, "got DFALayer"),
        (2, ValueError, r"layer must be in \[0, 1\], got 2"),
        (None, TypeError, "layer must be an int, got NoneType"),
    ):
        with pytest.raises(error, match=got):
            dfa.feedback_matrix(layer)


def test_rows_of_layers_with_matrices_of_their_own():
    points = [DFALayer(), DFALayer()]
    dfa = DFA(points, shared=False, seed=5, normalization=1.0)
    for point in points:
        point(torch.zeros(2, 7, requires_grad=True))
    dfa(torch.zeros(2, 5, requires_grad=True))
    for i in range(2):
        rows = feedback_matrix(7, 5, seed=5, row_offset=i * INDEPENDENT_ROWS)
        assert torch.equal(dfa.feedback_matrix(i), rows)


# --- several rows for each of the error ---


def test_repeated_rows_without_their_scale():
    """Spiking networks sum over time: each row gets the whole signal."""
    error, steps = torch.randn(BATCH, CLASSES), 4
    found = []
    for scale_repeats in (True, False):
        point = DFALayer(batch_dims=(0, 1))
        dfa = DFA([point], scale_repeats=scale_repeats)
        h = torch.zeros(BATCH, steps, 16, requires_grad=True)
        point(h)
        dfa(torch.zeros(BATCH, CLASSES, requires_grad=True)).backward(error)
        found.append(h.grad)
    (plain,) = signals(error, [16])
    torch.testing.assert_close(found[1], plain[:, None].expand(-1, steps, -1))
    torch.testing.assert_close(found[0], found[1] / steps**0.5)


# --- layers of one DFA for another ---


def test_released_layers_may_be_given_to_another_dfa():
    x, y = batch()
    model = perceptron(seed=3, mask={"h0": torch.zeros(16)}, shared=False)
    backward(model, x, y)
    layers = model.dfa.release()
    assert layers == tuple(model.points)
    assert model.dfa.dfa_layers == ()
    old = model.dfa
    model.dfa = DFA(layers, seed=4)
    assert_equal(backward(model, x, y), backward(perceptron(seed=4), x, y))
    output = torch.zeros(2, 3, requires_grad=True)
    assert old(output) is output
    with pytest.raises(ValueError, match=r"belongs to a DFA, whose release\(\) would give it back"):
        DFA(layers)


@pytest.mark.parametrize("name", ["LAST", "MINIBATCH", "REDUCE"])
def test_handling_by_name(name):
    dfa = DFA([DFALayer()], feedback_points_handling=name)
    assert dfa.feedback_points_handling is FeedbackPointsHandling[name]


def test_thousands_of_layers_take_no_more_than_their_number():
    """Every step of a pass touches each layer a fixed number of times."""
    counts = []
    for number in (64, 128):
        points = [DFALayer() for _ in range(number)]
        dfa = DFA(points)
        weight = nn.Parameter(torch.ones(4))
        steps = Steps()

        def train(points=points, dfa=dfa, weight=weight):
            h = torch.ones(2, 4)
            for point in points:
                h = point(torch.tanh(h * weight))
            F.mse_loss(dfa(h), torch.zeros(2, 4)).backward()

        train()
        with steps:
            train()
        counts.append(steps.lines)
    assert counts[1] < 2.1 * counts[0]


class Steps:
    """Counts the lines that the library runs."""

    def __init__(self):
        self.lines = 0

    def __enter__(self):
        def trace(frame, event, argument):
            if "dfa_kernels" not in frame.f_code.co_filename:
                return None
            self.lines += event == "line"
            return trace

        self.before = sys.gettrace()
        sys.settrace(trace)

    def __exit__(self, *_):
        sys.settrace(self.before)
