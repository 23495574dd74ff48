"""The trainer computes eq. 3, no more and no less."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer, feedback_matrix
from tests.nn.networks import (
    BATCH,
    CLASSES,
    INPUTS,
    Calls,
    Convolutions,
    Perceptron,
    Tokens,
    assert_equal,
    backward,
    batch,
    by_hand,
    gradients,
    perceptron,
)
from tests.samples import DTYPES

SOURCES = [
    {"seed": 1},
    {"seed": 2**64 - 1, "distribution": "rademacher"},
    {"seed": 2, "distribution": "uniform", "normalization": "shared"},
    {"seed": 3, "shared": False},
    {"seed": 4, "distribution": "hadamard"},
    {"seed": 2**64 - 1, "distribution": "hadamard", "shared": False, "normalization": "shared"},
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("network", [Perceptron, Convolutions, Tokens])
def test_gradients_are_eq_3_by_hand(network, source):
    model = network(keep=True, **source).double()
    x = torch.randn(getattr(network, "inputs", (BATCH, 8)), dtype=torch.float64)
    batch_dims = 2 if network is Tokens else 1
    y = torch.randint(0, CLASSES, x.shape[:batch_dims])

    def rows(tensor):
        return tensor.flatten(0, batch_dims - 1).flatten(1)

    expected = by_hand(model, x, y, rows=rows, **source)
    model.zero_grad()
    F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
    assert_equal(gradients(model), expected, rtol=1e-9, atol=1e-12)


def test_last_layer_is_trained_as_by_backprop():
    x, y = batch()
    ours, theirs = perceptron(), perceptron()
    theirs.dfa.mode = "backprop"
    assert_equal(backward(ours, x, y)[-2:], backward(theirs, x, y)[-2:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_trains_as_double_does_to_its_precision(dtype):
    x, y = batch(dtype)
    expected = backward(perceptron(dtype=torch.float64), x.double(), y)
    found = backward(perceptron(dtype=dtype), x, y)
    assert all(gradient.dtype == dtype for gradient in found)
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5}.get(dtype, 1e-12)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_rows_of_the_error_serve_several_rows_of_an_activation():
    """One error per image, many patches: each patch gets the image's signal / sqrt(patches)."""
    patches, width = 9, 16
    linear, point, head = nn.Linear(4, width), DFALayer(batch_dims=(0, 1)), nn.Linear(width, 5)
    dfa = DFA([point], seed=4)
    x, y = torch.randn(BATCH, patches, 4), torch.randint(0, 5, (BATCH,))
    h = torch.tanh(linear(x))
    h.retain_grad()
    output = head(point(h).mean(1))
    output.retain_grad()
    F.cross_entropy(dfa(output), y).backward()
    matrix = feedback_matrix(width, 5, seed=4)
    signal = output.grad @ matrix.T / (width * 5) ** 0.5 / patches**0.5
    torch.testing.assert_close(h.grad, signal[:, None].expand(-1, patches, -1))


def test_batch_dims_may_be_anywhere():
    """[features, batch] activations get the transpose of what [batch, features] get."""
    h = torch.randn(16, BATCH, requires_grad=True)
    error = torch.randn(BATCH, CLASSES)
    point = DFALayer(batch_dims=(1,))
    dfa = DFA([point])
    point(h)
    dfa(torch.zeros(BATCH, CLASSES, requires_grad=True)).backward(error)
    signal = error @ feedback_matrix(16, CLASSES).T / (16 * CLASSES) ** 0.5
    torch.testing.assert_close(h.grad, signal.T)


TIME = 4


def sequences(hidden_dims, output_dims, hidden_shape, output_shape, mask=None):
    """The gradient that an activation of zeros gets, and the signal of each row of the error."""
    torch.manual_seed(0)
    point = DFALayer(batch_dims=hidden_dims)
    dfa = DFA([point], batch_dims=output_dims, normalization=1.0, mask=mask)
    h = torch.zeros(hidden_shape, requires_grad=True)
    error = torch.randn(output_shape)
    point(h)
    dfa(torch.zeros(output_shape, requires_grad=True)).backward(error)
    return h.grad, error @ feedback_matrix(16, CLASSES).T


@pytest.mark.parametrize("mask", [None, [torch.arange(16.0)]])
def test_sequence_first_rows_go_to_their_own_samples(mask):
    """Rows come in the order of batch_dims; masks follow."""
    factor = 1 if mask is None else mask[0]
    first, last = (TIME, BATCH, 16), (BATCH, TIME, CLASSES)
    found, signal = sequences((1, 0), (0, 1), first, last, mask)
    torch.testing.assert_close(found, signal.transpose(0, 1) * factor)
    found, signal = sequences((1, 0), (0,), first, (BATCH, CLASSES), mask)
    expected = (signal * factor / TIME**0.5).expand(TIME, -1, -1)
    torch.testing.assert_close(found, expected)
    found, signal = sequences(None, (1, 0), first, (TIME, BATCH, CLASSES), mask)
    torch.testing.assert_close(found, signal * factor)


def test_a_sequence_first_lstm_is_the_batch_first_one():
    x, y = torch.randn(BATCH, TIME, INPUTS), torch.randint(0, CLASSES, (BATCH,))
    found = []
    for batch_first, dims in ((True, (0, 1)), (False, (1, 0))):
        torch.manual_seed(0)
        body, head = nn.LSTM(INPUTS, 16, batch_first=batch_first), nn.Linear(16, CLASSES)
        point = DFALayer(batch_dims=dims)
        dfa = DFA([point])
        h, _ = body(x if batch_first else x.transpose(0, 1))
        F.cross_entropy(dfa(head(point(h).mean(1 if batch_first else 0))), y).backward()
        found.append(gradients(body))
    assert_equal(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("hidden", "output"),
    [
        ((TIME, BATCH), (BATCH,)),
        ((TIME, BATCH), (BATCH, TIME)),
        ((TIME, BATCH), (2 * BATCH,)),
        ((BATCH,), (TIME,)),
    ],
)
def test_rows_in_another_order_are_refused(hidden, output):
    dims = tuple(range(len(hidden))), tuple(range(len(output)))
    with pytest.raises(ValueError, match=r"dfa_layers\[0\] must have .* batch_dims gives the dim"):
        sequences(*dims, (*hidden, 16), (*output, CLASSES))


@pytest.mark.parametrize(
    ("hidden", "output", "repeats"),
    [
        ((BATCH * TIME,), (BATCH,), TIME),
        ((BATCH * TIME,), (BATCH, TIME), 1),
        ((BATCH, TIME), (BATCH * TIME,), 1),
        ((BATCH, 2, TIME), (BATCH, 2), TIME),
        ((BATCH, 2, TIME), (BATCH, 2 * TIME), 1),
    ],
)
def test_rows_may_be_flattened(hidden, output, repeats):
    dims = tuple(range(len(hidden))), tuple(range(len(output)))
    found, signal = sequences(*dims, (*hidden, 16), (*output, CLASSES))
    expected = signal.reshape(-1, 1, 16).expand(-1, repeats, -1) / repeats**0.5
    torch.testing.assert_close(found.reshape(expected.shape), expected)


def test_backward_runs_one_weight_product_per_layer_and_one_projection():
    x, y = batch()
    counts = {}
    for mode in ("dfa", "backprop", "shallow"):
        model = perceptron()
        model.dfa.mode = mode
        loss = F.cross_entropy(model(x), y)
        with Calls() as calls:
            loss.backward()
        counts[mode] = (calls.products, calls.projections)
    layers = 4
    assert counts == {"dfa": (layers, 1), "backprop": (2 * layers - 1, 0), "shallow": (1, 0)}


def test_layers_of_equal_size_share_one_signal():
    x, y = batch()
    model = perceptron(widths=(16, 16, 16), keep=True)
    loss = F.cross_entropy(model(x), y)
    seen = []
    for hidden in model.hidden:
        hidden.register_hook(lambda signal: seen.append(signal.data_ptr()))
    loss.backward()
    assert len(seen) == 3
    assert len(set(seen)) == 1


@pytest.mark.parametrize("shapes", [((16,), (16,)), ((16,), (2, 8))])
def test_parameters_never_share_memory_through_a_shared_signal(shapes):
    """A parameter added to an activation may keep the signal itself as its gradient."""
    points = [DFALayer(), DFALayer()]
    dfa = DFA(points)
    leaves = [nn.Parameter(torch.zeros(BATCH, *shape)) for shape in shapes]
    for point, leaf in zip(points, leaves, strict=True):
        point(leaf + torch.zeros(1))
    dfa(torch.zeros(BATCH, CLASSES, requires_grad=True)).sum().backward()
    before = leaves[1].grad.clone()
    leaves[0].grad.mul_(2)
    assert torch.equal(leaves[1].grad, before)


def test_modes():
    x, y = batch()
    plain = perceptron()
    plain.dfa.mode = "backprop"
    twin = nn.Sequential(
        *(m for linear in plain.linears for m in (linear, nn.Tanh())), plain.output
    )
    assert_equal(backward(plain, x, y), backward(twin, x, y))
    plain.dfa.mode = "shallow"
    found = backward(plain, x, y)
    assert found[:-2] == [None] * 6
    plain.dfa.mode = "dfa"
    assert_equal(backward(plain, x, y), backward(perceptron(), x, y))
    with pytest.raises(ValueError, match=r"DFA: mode must be one of .* got 'bp'"):
        plain.dfa.mode = "bp"


def test_no_training_is_tinydfas_name_for_shallow():
    x, y = batch()
    model = perceptron(no_training=True)
    assert model.dfa.mode == "shallow"
    assert model.dfa.no_training
    assert backward(model, x, y)[0] is None
    model.dfa.no_training = False
    assert model.dfa.mode == "dfa"
    assert backward(model, x, y)[0] is not None


def test_passthrough_joins_a_layer_to_the_next_by_backprop():
    x, y = batch()
    torch.manual_seed(0)
    linears = [nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, CLASSES)]
    inner, outer = DFALayer(passthrough=True), DFALayer()
    dfa = DFA([inner, outer], seed=1)
    loss = F.cross_entropy(
        dfa(linears[2](outer(linears[1](inner(torch.tanh(linears[0](x))).tanh())))), y
    )
    found = torch.autograd.grad(loss, [linears[0].weight])
    alone = DFALayer()
    dfa = DFA([alone], seed=1)
    loss = F.cross_entropy(dfa(linears[2](alone(linears[1](torch.tanh(linears[0](x)).tanh())))), y)
    assert_equal(found, torch.autograd.grad(loss, [linears[0].weight]))


@pytest.mark.parametrize("lean", [False, True])
def test_outputs_may_be_changed_in_place(lean):
    """Logits may be divided by a temperature or masked; the error is that of the output before."""
    x, y = batch()
    found = []
    for in_place in (False, True):
        model = perceptron(lean=lean)
        output = model(x)
        if in_place:
            output /= 2
            output[:, 0] = 0
        else:
            output = torch.cat([torch.zeros(BATCH, 1), output[:, 1:] / 2], 1)
        F.cross_entropy(output, y).backward()
        found.append(gradients(model))
    assert_equal(found[1], found[0], rtol=1e-6, atol=1e-8)


def test_a_change_in_place_is_seen_by_what_saved_the_output():
    output = torch.exp(torch.zeros(BATCH, CLASSES, requires_grad=True))
    point = DFALayer()
    dfa = DFA([point])
    point(torch.zeros(BATCH, 16, requires_grad=True))
    changed = dfa(output)
    changed *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.sum().backward()


def test_hidden_activations_are_passed_on_without_requiring_a_gradient():
    model = perceptron()
    seen = []
    for point in model.points:
        point.register_forward_hook(lambda module, args, output: seen.append(output))
    model(batch()[0])
    assert [h.requires_grad for h in seen] == [False] * 3


def test_second_derivatives_flow_through_the_signals():
    """The projection is linear in the error and has an adjoint."""

    def signal(error):
        h = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
        output = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        point = DFALayer()
        dfa = DFA([point])
        point(h)
        return torch.autograd.grad(dfa(output), h, error, create_graph=True)[0].pow(3)

    error = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(signal, error)
    assert torch.autograd.gradgradcheck(signal, error)
