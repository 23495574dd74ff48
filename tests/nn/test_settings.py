"""The attributes of `DFA` and `DFALayer`: they take what the arguments take, or refuse at once."""

import numpy as np
import pytest
import torch
from torch import nn

from dfa_kernels import DFA, DFALayer, attach, feedback_matrix, tinydfa_scales
from dfa_kernels.nn import FeedbackPointsHandling
from tests.nn.networks import (
    CLASSES,
    Learned,
    Multiplied,
    assert_equal,
    backward,
    batch,
    perceptron,
)

MATRIX = feedback_matrix(16, CLASSES, seed=5)
MATRICES = [MATRIX, feedback_matrix(12, CLASSES, seed=6), feedback_matrix(16, CLASSES, seed=7)]


class Law(nn.Module):
    def forward(self, sizes, error_size):
        return [0.5] * len(sizes)


class Halved(nn.Module):
    def forward(self, error):
        return error / 2


def learned():
    return Learned(MATRIX)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", np.int64(4)),
        ("seed", 2**64 - 1),
        ("seed", None),
        ("distribution", "hadamard"),
        ("distribution", None),
        ("backend", "torch"),
        ("backend", None),
        ("normalization", False),
        ("normalization", True),
        ("normalization", np.float32(0.5)),
        ("normalization", tinydfa_scales),
        ("normalization", Law()),
        ("shared", False),
        ("shared", True),
        ("lean", True),
        ("matrix", MATRIX),
        ("matrix", MATRICES),
        ("matrix", Multiplied(MATRIX)),
        ("matrix", learned()),
        ("matrix", DFA([], seed=9).source),
        ("error_transform", torch.sign),
        ("error_transform", Halved()),
        ("error_transform", None),
        ("rp_device", "cpu"),
        ("rp_device", torch.device("cpu")),
        ("mask", {"h0": MATRIX[:, 0]}),
        ("mask", [None, MATRIX[:12, 0], None]),
        ("mask", None),
        ("feedback_points_handling", FeedbackPointsHandling.REDUCE),
        ("batch_dims", [0]),
        ("no_training", True),
    ],
)
def test_an_attribute_takes_what_its_argument_takes(name, value):
    x, y = batch()
    model = perceptron(distribution="uniform")
    backward(model, x, y)
    given = {"distribution": "uniform", name: value}
    expected = perceptron(**given)
    setattr(model.dfa, name, value)
    assert_equal(backward(model, x, y), backward(expected, x, y))
    assert type(getattr(model.dfa, name)) is type(getattr(expected.dfa, name))
    model.dfa.mode = expected.dfa.mode = "dfa"
    backward(expected, x, y)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert torch.equal(model.dfa.get_extra_state(), expected.dfa.get_extra_state())


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("seed", -1, ValueError),
        ("seed", 2**64, ValueError),
        ("seed", 1.5, TypeError),
        ("seed", True, TypeError),
        ("seed", nn.Parameter(torch.zeros(1)), TypeError),
        ("distribution", "cauchy", ValueError),
        ("distribution", ["normal"], ValueError),
        ("backend", "fpga", ValueError),
        ("backend", np.zeros(2), ValueError),
        ("normalization", "foo", ValueError),
        ("normalization", float("nan"), ValueError),
        ("normalization", [0.5], TypeError),
        ("normalization", None, TypeError),
        ("matrix", None, TypeError),
        ("matrix", MATRICES[:2], ValueError),
        ("matrix", MATRIX.long(), TypeError),
        ("matrix", Law(), ValueError),
        ("source", None, TypeError),
        ("error_transform", 3, TypeError),
        ("rp_device", "nowhere", RuntimeError),
        ("rp_device", 1.5, TypeError),
        ("mask", {"other": MATRIX}, ValueError),
        ("masks", [None], ValueError),
        ("mode", "train", ValueError),
        ("batch_dims", "ab", TypeError),
    ],
)
def test_an_attribute_refuses_what_its_argument_refuses(name, value, kind):
    x, y = batch()
    model = perceptron()
    expected, state = backward(model, x, y), model.state_dict()
    argument = {"source": "matrix", "masks": "mask"}.get(name, name)
    with pytest.raises(kind, match=f"^DFA: ({argument}|{name}) "):
        setattr(model.dfa, name, value)
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model.dfa.get_extra_state(), state["dfa._extra_state"])
    assert_equal(backward(model, x, y), expected)


def test_lean_and_independent_rows_exclude_one_another():
    lean, independent = DFA([DFALayer(), DFALayer()], lean=True), DFA(two(), shared=False)
    for dfa, name, value in (
        (lean, "shared", False),
        (lean, "matrix", [MATRIX, MATRIX]),
        (independent, "lean", True),
    ):
        before = dfa.row_offsets, dfa.lean, dfa.source
        with pytest.raises(ValueError, match="DFA: lean needs one matrix"):
            setattr(dfa, name, value)
        assert (dfa.row_offsets, dfa.lean, dfa.source) == before


def two():
    return [DFALayer(), DFALayer()]


@pytest.mark.parametrize("name", ["seed", "distribution", "backend"])
@pytest.mark.parametrize("matrix", [MATRIX, Multiplied(MATRIX), learned()])
def test_a_seed_is_not_set_where_none_makes_the_signals(name, matrix):
    dfa = DFA([DFALayer()], matrix=matrix)
    with pytest.raises(AttributeError, match=f"DFA: {name} cannot be set, .* no seed makes? the"):
        setattr(dfa, name, "torch" if name == "backend" else None)
    dfa.source = DFA([], seed=3).source
    assert dfa.seed == 3
    dfa.seed = 4
    assert dfa.seed == 4
    assert not list(dfa.children())


def test_stored_matrices_decide_what_is_shared():
    dfa = DFA(two(), matrix=MATRIX)
    with pytest.raises(AttributeError, match="DFA: shared follows from the number of stored"):
        dfa.shared = False
    dfa.matrix = [MATRIX, MATRIX]
    assert not dfa.shared
    dfa.matrix = MATRIX
    assert dfa.shared


@pytest.mark.parametrize("name", ["matrices", "row_offsets", "dfa_layers"])
def test_what_is_no_argument_or_fixed_is_read_only(name):
    dfa = DFA([DFALayer()])
    with pytest.raises(AttributeError, match=name):
        setattr(dfa, name, getattr(dfa, name))


def test_modules_give_way_to_anything():
    """Also where torch would take what is set for a submodule, or refuse it."""
    x, y = batch()
    model = perceptron(matrix=learned(), normalization=Law(), error_transform=Halved())
    names = {name for name, _ in model.dfa.named_children()}
    assert names == {"source", "normalization", "error_transform"}
    model.dfa.source = DFA([], seed=0).source
    model.dfa.normalization = True
    model.dfa.error_transform = None
    assert not list(model.dfa.children())
    assert_equal(backward(model, x, y), backward(perceptron(), x, y))


@pytest.mark.parametrize("name", ["source", "normalization", "error_transform"])
def test_modules_that_are_set_move_with_the_model(name):
    module = {"source": learned, "normalization": Law, "error_transform": Halved}[name]()
    module.register_buffer("extra", torch.zeros(1))
    model = perceptron()
    setattr(model.dfa, name, module)
    model.double()
    assert getattr(model.dfa, name).extra.dtype == torch.float64
    assert f"dfa.{name}.extra" in model.state_dict()


# --- DFALayer ---


def test_a_layers_attributes_take_what_its_arguments_take():
    layer = DFALayer()
    layer.name, layer.batch_dims, layer.passthrough = "mine", [1, 0], np.True_
    assert (layer.name, layer.batch_dims, layer.passthrough) == ("mine", (1, 0), True)
    assert type(layer.passthrough) is bool
    layer.batch_dims = None
    assert layer.row_dims == (0,)


@pytest.mark.parametrize("name", [3, nn.ReLU, b"h0"])
def test_a_layers_name_is_text(name):
    with pytest.raises(TypeError, match="DFALayer: name must be a str or None, got"):
        DFALayer(name)
    with pytest.raises(TypeError, match="DFALayer: name must be a str or None, got"):
        DFALayer().name = name


def test_a_layers_name_stays_once_a_dfa_has_it():
    layer = DFALayer("first")
    DFA([layer])
    with pytest.raises(AttributeError, match=r"DFALayer: name must be set before .* got 'second'"):
        layer.name = "second"
    assert layer.name == "first"


def test_a_layers_size_and_dimensions_are_checked():
    layer = DFALayer()
    with pytest.raises(AttributeError, match="size"):
        layer.size = 3
    for dims in ("ab", 1.5, [0.5]):
        with pytest.raises(TypeError, match="DFALayer: batch_dims"):
            layer.batch_dims = dims


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.battery
def test_attributes_take_effect_in_compiled_models():
    x, y = batch()
    model = perceptron()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name, value in (
        ("seed", 3),
        ("normalization", False),
        ("error_transform", torch.sign),
        ("mask", {"h0": MATRIX[:, 0]}),
        ("matrix", learned()),
    ):
        setattr(model.dfa, name, value)
        found = backward(model, x, y, call=compiled)
        assert_equal(found, backward(model, x, y), rtol=1e-5, atol=1e-7)


def test_attached_dfas_have_the_same_attributes():
    x, y = batch()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    handle = attach(model, ["1"], seed=1)
    first = backward(model, x, y)
    handle.dfa.seed = 2
    second = backward(model, x, y)
    assert not torch.equal(first[0], second[0])
    handle.detach()
    attach(model, ["1"], seed=2)
    assert_equal(backward(model, x, y), second)


def test_a_device_that_is_not_there_changes_nothing():
    model = perceptron(matrix=MATRIX)
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
        model.dfa.rp_device = "xla"
    assert model.dfa.rp_device is None
    backward(model, *batch())


def test_other_sources_after_a_users_own():
    """Whose attributes may be anything, also named as a seed's are."""
    model = perceptron(matrix=Multiplied(MATRIX))
    model.dfa.source.seed = "mine"
    model.dfa.source = MATRIX
    assert model.dfa.seed == 0
    model.dfa.source = DFA([], seed=3).source
    assert model.dfa.seed == 3
