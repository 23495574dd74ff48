"""Options of `DFA` beyond layers and a seed: normalization, stored matrices, error transforms,
masks, the lean mode; and how it refuses bad arguments."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer, feedback_matrix, tinydfa_scales
from dfa_kernels.nn import INDEPENDENT_ROWS, FeedbackPointsHandling
from tests.nn.networks import (
    CLASSES,
    Allocations,
    Calls,
    Convolutions,
    Tokens,
    assert_equal,
    backward,
    batch,
    gradients,
    perceptron,
    signals,
    train,
)

WIDTHS = (16, 12, 16)
U = {"rows": 16, "columns": CLASSES}


# --- normalization ---


@pytest.mark.parametrize(
    ("normalization", "scales"),
    [
        (True, [1 / math.sqrt(30), 1 / math.sqrt(20)]),
        ("layer", [1 / math.sqrt(30), 1 / math.sqrt(20)]),
        (False, [1 / math.sqrt(30)] * 2),
        ("shared", [1 / math.sqrt(30)] * 2),
        (0.25, [0.25] * 2),
        (0, [0.0] * 2),
        (lambda sizes, n: [size / n for size in sizes], [6 / 5, 4 / 5]),
    ],
)
@pytest.mark.parametrize("lean", [False, True])
def test_normalization(normalization, scales, lean):
    error = torch.randn(3, 5)
    found = signals(error, [6, 4], normalization=normalization, lean=lean)
    for signal, scale in zip(found, scales, strict=True):
        expected = scale * error @ feedback_matrix(signal.shape[1], 5).T
        torch.testing.assert_close(signal, expected)


def test_tinydfas_own_law():
    """Uniform entries in (-1, 1), one scale 1/sqrt(l_max) for all layers, independent of n."""
    error = torch.randn(3, 50)
    found = signals(error, [600, 40], distribution="uniform", normalization=tinydfa_scales)
    entries = feedback_matrix(600, 50, distribution="uniform") / math.sqrt(3)
    assert entries.abs().max() < 1
    assert abs(entries.var().item() - 1 / 3) < 0.01
    for signal in found:
        expected = error @ entries[: signal.shape[1]].T / math.sqrt(600)
        torch.testing.assert_close(signal, expected)


# --- a stored matrix ---


@pytest.mark.parametrize("distribution", ["normal", "hadamard"])
def test_curves_with_a_stored_matrix_are_the_seeded_ones(distribution):
    matrix = feedback_matrix(**U, seed=5, distribution=distribution)
    seeded = train(perceptron(seed=5, distribution=distribution), steps=20)
    stored = train(perceptron(matrix=matrix), steps=20)
    assert_equal(stored, seeded, rtol=1e-3, atol=1e-4)
    assert any(
        not torch.equal(a, b) for a, b in zip(train(perceptron(seed=6)), seeded, strict=True)
    )


@pytest.mark.parametrize("distribution", ["normal", "hadamard"])
def test_curves_with_independent_stored_matrices_are_the_seeded_ones(distribution):
    which = {"seed": 5, "distribution": distribution}
    matrices = [
        feedback_matrix(width, CLASSES, row_offset=index * INDEPENDENT_ROWS, **which)
        for index, width in enumerate(WIDTHS)
    ]
    x, y = batch()
    stored = backward(perceptron(matrix=matrices), x, y)
    assert_equal(stored, backward(perceptron(shared=False, **which), x, y), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("normalization", [True, False, 0.0, lambda sizes, n: [0.0, 0.5, -2.0]])
def test_stored_matrix_takes_every_normalization(normalization):
    x, y = batch()
    stored = perceptron(matrix=feedback_matrix(**U), normalization=normalization)
    expected = backward(perceptron(normalization=normalization), x, y)
    assert_equal(backward(stored, x, y), expected, rtol=1e-5, atol=1e-7)


def test_stored_matrix_multiplies_in_its_own_dtype():
    error = torch.randn(3, 5)
    (found,) = signals(error, [6], matrix=feedback_matrix(6, 5, dtype=torch.float64))
    expected = error.double() @ feedback_matrix(6, 5, dtype=torch.float64).T / math.sqrt(30)
    assert torch.equal(found, expected.float())


def test_stored_matrices_of_several_dtypes_take_the_error_as_it_is():
    error = torch.randn(3, 5, dtype=torch.float64)
    matrices = [feedback_matrix(6, 5, dtype=torch.bfloat16), feedback_matrix(6, 5).double()]
    _, found = signals(error, [6, 6], matrix=matrices, normalization=1.0)
    torch.testing.assert_close(found, (error @ matrices[1].T).float(), rtol=1e-6, atol=1e-6)


# --- error transforms ---


def test_error_transform_is_applied_to_the_flattened_error():
    error = torch.randn(6, 5)
    (found,) = signals(error, [7], error_transform=torch.sign, normalization=1.0)
    torch.testing.assert_close(found, error.sign() @ feedback_matrix(7, 5).T)
    shapes = []
    torch.manual_seed(0)
    model = Tokens(error_transform=lambda e: shapes.append(e.shape) or -(e < 0).to(e.dtype))
    model(torch.randn(Tokens.inputs)).sum().backward()
    assert shapes == [(24, 5)]


def test_a_transformed_error_must_be_strided():
    with pytest.raises(TypeError, match=r"project: error must be a strided tensor, got .*sparse"):
        signals(torch.randn(6, 5), [7], error_transform=torch.Tensor.to_sparse)


def test_error_transform_leaves_the_last_layers_error():
    x, y = batch()
    plain, signed = (
        backward(perceptron(), x, y),
        backward(perceptron(error_transform=torch.sign), x, y),
    )
    assert_equal(signed[-2:], plain[-2:])
    assert not torch.equal(signed[0], plain[0])


# --- masks ---


def test_masks_multiply_the_signals_of_their_layers():
    error = torch.randn(3, 5)
    masks = [torch.tensor([1.0, 0, 1, 0, 0, 1]), None, torch.tensor([0.0])]
    plain = signals(error, [6, 6, 6])
    for lean in (False, True):
        found = signals(error, [6, 6, 6], mask=masks, lean=lean)
        expected = [plain[0] * masks[0], plain[1], plain[2] * 0]
        assert_equal(found, expected, rtol=1e-6, atol=1e-7)


def test_masks_go_by_name_or_index_and_may_be_boolean():
    x, y = batch()
    masked = perceptron(mask={"h0": torch.zeros(16, dtype=torch.bool), 1: torch.ones(12)})
    found, plain = backward(masked, x, y), backward(perceptron(), x, y)
    assert_equal(found[:2], [0 * gradient for gradient in plain[:2]])
    assert_equal(found[2:], plain[2:])


@pytest.mark.parametrize("lean", [False, True])
def test_masks_broadcast_to_an_activations_own_dimensions(lean):
    channels = torch.tensor([1.0, 0.0, 1.0])
    torch.manual_seed(0)
    model = Convolutions(mask={0: channels[:, None, None]}, lean=lean)
    model(torch.randn(Convolutions.inputs)).sum().backward()
    kept = model.first.weight.grad.abs().sum((1, 2, 3)) > 0
    assert kept.tolist() == [True, False, True]
    tokens = Tokens(mask={0: torch.eye(16)[3]}, lean=lean)
    tokens(torch.randn(Tokens.inputs)).sum().backward()
    assert tokens.first.bias.grad.nonzero().flatten().tolist() == [3]


# --- the lean mode ---


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"normalization": False},
        {"matrix": feedback_matrix(**U)},
        {"distribution": "hadamard", "mask": {1: torch.arange(12.0)}},
    ],
)
def test_lean_mode_makes_the_same_gradients(arguments):
    x, y = batch()
    plain, lean = perceptron(**arguments), perceptron(lean=True, **arguments)
    assert_equal(backward(lean, x, y), backward(plain, x, y), rtol=1e-5, atol=1e-7)


def test_lean_mode_makes_the_same_gradients_of_convolutions():
    found = []
    for lean in (False, True):
        torch.manual_seed(0)
        model = Convolutions(lean=lean)
        model(torch.randn(Convolutions.inputs)).square().sum().backward()
        found.append(gradients(model))
    assert_equal(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_lean_mode_runs_one_projection():
    x, y = batch()
    loss = F.cross_entropy(perceptron(lean=True)(x), y)
    with Calls() as calls:
        loss.backward()
    assert (calls.products, calls.projections) == (4, 1)


def test_lean_mode_allows_what_comes_next_to_change_it_in_place():
    found = []
    for lean in (False, True):
        torch.manual_seed(0)
        first, point, second = torch.nn.Linear(8, 6), DFALayer(), torch.nn.Linear(6, 5)
        dfa = DFA([point], lean=lean)
        hidden = torch.relu_(point(first(batch()[0])))
        F.cross_entropy(dfa(second(hidden)), batch()[1]).backward()
        found.append([first.weight.grad, second.weight.grad])
    assert_equal(*found)


def test_lean_mode_leaves_an_activations_other_gradients():
    """A loss on a hidden activation itself is not scaled with the signal."""
    x, y = batch()
    found = []
    for lean in (False, True):
        model = perceptron(lean=lean, keep=True)
        loss = F.cross_entropy(model(x), y) + model.hidden[1].square().mean()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert_equal(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_lean_mode_with_several_dtypes():
    error = torch.randn(3, 5)
    point, half = DFALayer(), DFALayer()
    dfa = DFA([point, half], lean=True, normalization=1.0)
    h, g = torch.zeros(3, 6, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    point(h), half(g.bfloat16())
    dfa(torch.zeros(3, 5, requires_grad=True)).backward(error)
    expected = error @ feedback_matrix(6, 5).T
    torch.testing.assert_close(h.grad, expected)
    torch.testing.assert_close(g.grad, expected[:, :4].bfloat16().float())


def test_peak_memory_of_both_modes():
    """The default holds all signals at once; the lean mode holds one buffer and one layer's signal.

    Each layer is one tanh of a scaled input, whose backward pass holds a few tensors of its size.
    """
    rows, sizes = 32, [4096 - 256 * i for i in range(8)]
    peaks = {}
    for lean in (False, True):
        points = [DFALayer() for _ in sizes]
        dfa = DFA(points, lean=lean)
        weights = [nn.Parameter(torch.ones(size)) for size in sizes]
        x = torch.ones(rows, max(sizes))
        for point, weight in zip(points, weights, strict=True):
            point(torch.tanh(x[:, : len(weight)] * weight))
        output = dfa(torch.zeros(rows, 10, requires_grad=True))
        with Allocations() as allocations:
            output.sum().backward()
        peaks[lean] = allocations.peak
    one = 4 * rows * max(sizes)
    assert peaks[False] >= 4 * rows * sum(sizes)
    assert peaks[True] <= 5 * one
    assert peaks[True] < 0.75 * peaks[False]


# --- bad arguments ---


def build(**arguments):
    return DFA([DFALayer("a"), DFALayer("b")], **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"normalization": "batch"}, ValueError, "normalization must be .* got 'batch'"),
        ({"normalization": math.nan}, ValueError, "normalization must be finite, got nan"),
        ({"normalization": [0.3, 0.2]}, TypeError, "a name, a number or a function, got list"),
        ({"normalization": None}, TypeError, "a name, a number or a function, got NoneType"),
        ({"batch_dims": 0}, TypeError, "DFA: batch_dims must be a sequence of ints, got int 0"),
        ({"backend": "tpu"}, ValueError, "DFA: backend must be one of 'torch', .* got 'tpu'"),
        ({"seed": -1}, ValueError, "DFA: seed must be in .* got -1"),
        ({"seed": 1.5}, TypeError, "DFA: seed must be an int, got float 1.5"),
        ({"distribution": "cauchy"}, ValueError, "distribution must be one of .* got 'cauchy'"),
        (
            {"feedback_points_handling": "FIRST"},
            TypeError,
            "must be a FeedbackPoints.* got 'FIRST'",
        ),
        ({"error_transform": 3}, TypeError, "error_transform must be a function, got 3"),
        ({"matrix": [torch.zeros(4, 5)]}, ValueError, r"one tensor or one per layer \(2\), got 1"),
        ({"matrix": 3}, ValueError, r"one tensor or one per layer \(2\), got int"),
        ({"matrix": [1, 2]}, TypeError, "matrix must be made of tensors, got int"),
        ({"matrix": torch.zeros(4)}, ValueError, r"matrix must be \[rows, n\], got \[4\]"),
        ({"matrix": torch.zeros(4, 5, dtype=torch.int)}, TypeError, "matrix must be float16"),
        ({"mask": [torch.ones(4)]}, ValueError, r"one entry per layer \(2\), got list of length 1"),
        ({"mask": 3}, ValueError, r"one entry per layer \(2\), got int$"),
        ({"mask": torch.ones(())}, ValueError, r"one entry per layer \(2\), got Tensor$"),
        ({"mask": {"c": torch.ones(4)}}, ValueError, "mask must be for layers' .* got 'c'"),
        ({"mask": {2: torch.ones(4)}}, ValueError, "mask must be for layers' .* got 2"),
        ({"mask": {"a": 0.5}}, TypeError, r"mask\['a'\] must be a tensor, got float"),
        ({"lean": True, "shared": False}, ValueError, "lean needs one matrix .* got independent"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        build(**arguments)


def test_bad_layers():
    with pytest.raises(TypeError, match=r"dfa_layers\[0\] must be a DFALayer, got Linear"):
        DFA([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="dfa_layers must be a sequence of DFALayers, got DFAL"):
        DFA(DFALayer())
    with pytest.raises(TypeError, match="dfa_layers must be a sequence of DFALayers, got NoneType"):
        DFA(None)
    with pytest.raises(TypeError, match="DFALayer: batch_dims must be a sequence of ints, got int"):
        DFALayer(batch_dims=1)
    for names in (("a", "a"), ("1", None)):
        with pytest.raises(ValueError, match=r"dfa_layers must have distinct names, got \['"):
            DFA([DFALayer(name) for name in names])
    point = DFALayer()
    with pytest.raises(ValueError, match=r"dfa_layers\[1\] already belongs to a DFA"):
        DFA([point, point])
    DFA([point])
    with pytest.raises(ValueError, match=r"dfa_layers\[0\] already belongs to a DFA"):
        DFA([point])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"error_transform": lambda e: e[:1]}, r"keep the shape \(3, 5\), got \(1, 5\)"),
        ({"error_transform": lambda e: None}, r"keep the shape \(3, 5\), got NoneType"),
        ({"mask": [torch.ones(5)]}, r"mask\[0\] must broadcast to \[6\], got \[5\]"),
        ({"mask": [torch.ones(3, 6)]}, r"mask\[0\] must broadcast to \[6\], got \[3, 6\]"),
        ({"normalization": lambda s, n: [1.0, 2.0]}, r"one scale per size \(1\), got 2"),
        ({"batch_dims": (2,)}, r"DFA: batch_dims \(2,\) must be dimensions of \(3, 5\)"),
    ],
)
def test_bad_arguments_found_in_a_pass(arguments, message):
    with pytest.raises(ValueError, match=message):
        signals(torch.randn(3, 5), [6], **arguments)


def test_a_transform_to_a_sparse_error_is_refused():
    with pytest.raises(TypeError, match=r"must be a strided tensor, got torch\.sparse_coo"):
        signals(torch.randn(3, 5), [6], error_transform=torch.Tensor.to_sparse)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("matrix", [torch.zeros(5, 5), torch.zeros(9, 4)])
def test_matrices_of_another_shape_are_refused_in_the_forward_pass(lean, matrix):
    point = DFALayer()
    dfa = DFA([point], matrix=matrix, lean=lean)
    point(torch.zeros(3, 6, requires_grad=True))
    with pytest.raises(ValueError, match=r"at least 6 rows .* exactly 5 columns"):
        dfa(torch.zeros(3, 5))


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(
    ("activation", "output", "message"),
    [
        ((800,), (10,), r"dfa_layers\[0\] must have units beside its batch_dims \(0,\), got .*800"),
        ((3, 0), (3, 10), r"dfa_layers\[0\] must have units .* got shape \(3, 0\)"),
        ((3, 4), (3, 0), r"output must have at least one element a row, got \(3, 0\)"),
    ],
)
def test_shapes_without_units_are_refused(lean, activation, output, message):
    """800 units of one sample are not 800 rows, although 10 divides 800."""
    point = DFALayer()
    dfa = DFA([point], lean=lean)
    point(torch.zeros(activation, requires_grad=True))
    with pytest.raises(ValueError, match=message):
        dfa(torch.zeros(output, requires_grad=True))


def test_one_sample_without_a_batch():
    x, y = batch()
    expected = backward(perceptron(), x[:1], y[:1])
    assert_equal(backward(perceptron(batch_dims=()), x[0], y[0]), expected, rtol=1e-5, atol=1e-7)


def test_a_layers_own_batch_dims_out_of_range():
    point = DFALayer(batch_dims=(0, 2))
    dfa = DFA([point])
    point(torch.zeros(3, 6, requires_grad=True))
    with pytest.raises(ValueError, match=r"dfa_layers\[0\]: batch_dims \(0, 2\) must be dim"):
        dfa(torch.zeros(3, 5))


def test_inputs_that_are_no_tensors():
    with pytest.raises(TypeError, match="DFALayer: activation must be a tensor, got tuple"):
        DFALayer()((torch.zeros(2),))
    with pytest.raises(TypeError, match="DFA: output must be a tensor, got tuple"):
        build()((torch.zeros(2),))


def test_signatures_begin_as_tinydfas():
    """Same positional arguments, names and defaults; what TinyDFA lacks is keyword-only."""
    parameters = list(inspect.signature(DFA).parameters.values())
    ours = [(p.name, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert ours == [
        ("dfa_layers", inspect.Parameter.empty),
        ("normalization", True),
        ("rp_device", None),
        ("no_training", False),
        ("feedback_points_handling", None),
        ("batch_dims", None),
    ]
    ours = [(p.name, p.default) for p in inspect.signature(DFALayer).parameters.values()][:3]
    assert ours == [
        ("name", None),
        ("batch_dims", None),
        ("passthrough", False),
    ]
    assert [handling.value for handling in FeedbackPointsHandling] == [
        "LAST",
        "MINIBATCH",
        "REDUCE",
    ]


def test_handling_and_batch_dims_are_attributes_as_tinydfas():
    dfa = build(feedback_points_handling=FeedbackPointsHandling.REDUCE, batch_dims=(0, 1))
    assert dfa.feedback_points_handling is FeedbackPointsHandling.REDUCE
    assert dfa.batch_dims == (0, 1)
    dfa.feedback_points_handling, dfa.batch_dims = FeedbackPointsHandling.LAST, [1]
    assert dfa.feedback_points_handling is FeedbackPointsHandling.LAST
    assert dfa.batch_dims == dfa.dfa_layers[0].row_dims == (1,)
    dfa.feedback_points_handling = "REDUCE"
    assert dfa.feedback_points_handling is FeedbackPointsHandling.REDUCE
    with pytest.raises(TypeError, match=r"must be a FeedbackPoints.* got 'FIRST'"):
        dfa.feedback_points_handling = "FIRST"


def test_printed_modules_say_what_they_are():
    assert repr(DFALayer("a", batch_dims=(0, 1))) == "DFALayer(name='a', batch_dims=(0, 1))"
    assert repr(build(seed=3)) == "DFA(2 layers, seed=3, distribution='normal')"
    assert repr(build(matrix=torch.zeros(4, 5))) == "DFA(2 layers, stored matrix)"
