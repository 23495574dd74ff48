"""Forward passes after `DFA.match_output_`: what is checked, what trains, what is warned of."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer, attach, feedback_matrix
from tests.nn.networks import Learned, Multiplied
from tests.nn.test_matching import (
    BATCH,
    CLASSES,
    INPUTS,
    MATRIX,
    SHAPE,
    WIDTH,
    Residual,
    assert_same,
    samples,
    scaled,
    step,
)

# The forward passes to come.


def test_layers_of_another_size_are_refused_in_the_forward_pass():
    model = Residual(width=WIDTH + 3)
    model.dfa.match_output_(model.head)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"dfa_layers\[0\] must have the size .* got 15; .*`layers`"
        ):
            step(model)
    assert model.points[0].size is None
    with torch.no_grad():
        model(samples()[0])
    model.dfa.mode = "backprop"
    step(model)


def test_only_the_layers_that_are_to_match_are_checked():
    model = Residual(width=WIDTH + 3)
    model.points[1] = nn.Identity()
    model.points[0].passthrough = True
    model.dfa.match_output_(model.head)
    with pytest.warns(UserWarning, match="no layer was called|not called"):
        step(model)
    ragged = nn.Sequential(nn.Linear(INPUTS, 9), nn.Tanh(), nn.Linear(9, WIDTH), nn.Tanh())
    ragged.append(nn.Linear(WIDTH, CLASSES))
    handle = attach(ragged, ["1", "3"])
    handle.dfa.match_output_(ragged[4], layers=["3"])
    step(ragged)


def test_an_error_of_another_size_is_refused():
    model = Residual()
    model.dfa.match_output_(nn.Linear(WIDTH, CLASSES + 1))
    with pytest.raises(
        ValueError, match=r"the error must have the size .* outputs, 8, got 7; .*again"
    ):
        step(model)


def test_tokens_need_batch_dims():
    tokens = torch.randn(BATCH, 3, INPUTS)
    model = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    handle = attach(model, ["1"], match_output="2")
    with (
        pytest.raises(ValueError, match=r"outputs, 7, got 21; batch_dims says that every token"),
        pytest.warns(UserWarning, match="batch_dims"),
    ):
        model(tokens)
    handle.dfa.batch_dims = (0, 1)
    model(tokens).sum().backward()


def test_a_mask_that_is_set_later_is_refused():
    model = Residual()
    model.dfa.match_output_(model.head)
    model.dfa.mask = {1: torch.ones(WIDTH)}
    with pytest.raises(ValueError, match=r"dfa_layers\[1\] must have no mask"):
        step(model)
    model.dfa.mask = None
    step(model)


# The signals.


def test_the_signal_is_the_error_through_the_output_layer():
    model = Residual(1, normalization=0.3, seed=4).double()
    model.dfa.match_output_(model.head, 0.3)
    step(model)
    own = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.dfa.mode = "backprop"
    step(model)
    for ours, parameter in zip(own, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


def test_the_output_layer_learns_and_the_feedback_stays():
    model = Residual(seed=4)
    model.dfa.match_output_(model.head)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.head.weight.detach().clone()
    first = step(model)
    for _ in range(20):
        optimizer.zero_grad()
        last = step(model)
        optimizer.step()
    assert last < first / 2
    assert (model.head.weight != before).all()
    scale = model.dfa.feedback_matrix(0) / feedback_matrix(*SHAPE, seed=4)
    torch.testing.assert_close(scale, torch.full_like(scale, 1 / math.sqrt(WIDTH * CLASSES)))


def test_a_compiled_model_trains_alike():
    model = Residual(seed=4)
    model.dfa.match_output_(model.head)
    eager = copy.deepcopy(model)
    for one in (eager, torch.compile(model, backend="aot_eager", fullgraph=True)):
        step(one)
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_copies_and_pickles_are_matched_too():
    model = Residual(seed=4)
    model.dfa.match_output_(model.head)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(twin.head.weight, model.head.weight)
        step(twin)
        with pytest.warns(UserWarning, match="another feedback matrix"):
            twin.dfa.seed = 5
    step(model)


def test_a_scripted_model_runs():
    points = DFALayer(), DFALayer()
    dfa, head = DFA(points), nn.Linear(*SHAPE)
    dfa.match_output_(head)
    model = nn.Sequential(nn.Linear(INPUTS, WIDTH), *points, head, dfa).eval()
    x, _ = samples()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_functional_calls_train_as_ever():
    model = Residual()
    model.dfa.match_output_(model.head)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = samples()

    def loss(parameters):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    step(model)
    for name, gradient in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


# Another matrix.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 5),
        ("distribution", "hadamard"),
        ("matrix", MATRIX),
        ("source", Multiplied(MATRIX)),
        ("matrix", [MATRIX, MATRIX]),
        ("shared", False),
    ],
)
def test_another_matrix_warns_once(name, value):
    model = Residual(seed=4)
    setattr(model.dfa, name, value)
    setattr(model.dfa, name, {"seed": 4, "distribution": "normal", "shared": True}.get(name, value))
    model = Residual(seed=4)
    model.dfa.match_output_(model.head)
    with pytest.warns(UserWarning, match="set from another feedback matrix .* call match_output_"):
        setattr(model.dfa, name, value)
    if name == "seed":
        model.dfa.seed = 6
        model.dfa.match_output_(model.head)
        with pytest.warns(UserWarning, match="another feedback matrix"):
            model.dfa.seed = 5


@pytest.mark.parametrize(
    "matrix", [None, MATRIX, [MATRIX, MATRIX[:]], Multiplied(MATRIX), Learned(MATRIX)]
)
def test_an_equal_value_is_no_other_matrix(matrix):
    model = Residual(seed=4, matrix=matrix)
    dfa = model.dfa
    dfa.match_output_(model.head, layers=[1])
    if matrix is None:
        dfa.seed, dfa.distribution, dfa.shared, dfa.backend = 4, None, True, "torch"
        dfa.source = DFA([], seed=4).source
    else:
        dfa.source = dfa.source
        dfa.matrix = matrix
    dfa.normalization, dfa.lean = 0.5, False
    step(model)


@pytest.mark.parametrize("other", [-MATRIX, MATRIX.double(), torch.cat([MATRIX, MATRIX])])
def test_other_stored_matrices_warn(other):
    model = Residual(matrix=MATRIX)
    model.dfa.match_output_(model.head)
    with pytest.warns(UserWarning, match="another feedback matrix"):
        model.dfa.matrix = other


def test_only_the_rows_of_the_layers_that_match_count():
    model = Residual(seed=4, shared=False)
    model.dfa.match_output_(model.head, layers=[0])
    model.dfa.shared = True  # the first layer's rows are the same
    model.dfa.shared = False
    model.dfa.match_output_(model.head, layers=[1])
    with pytest.warns(UserWarning, match="another feedback matrix"):
        model.dfa.shared = True


def test_a_refused_setting_changes_nothing():
    model = Residual(seed=4)
    model.dfa.match_output_(model.head)
    with pytest.raises(TypeError, match="seed"):
        model.dfa.seed = "5"
    with pytest.warns(UserWarning, match="another feedback matrix"):
        model.dfa.seed = 5


def test_loading_says_nothing():
    trained = Residual(seed=9)
    trained.dfa.match_output_(trained.head)
    step(trained)
    model = Residual()
    model.dfa.match_output_(model.head)
    model.load_state_dict(trained.state_dict())
    assert_same(model.head.weight, trained.head.weight)
    step(model)
    with pytest.warns(UserWarning, match="another feedback matrix"):
        model.dfa.seed = 0


def test_released_layers_are_matched_no_more():
    model = Residual(seed=4)
    model.dfa.match_output_(model.head)
    points = model.dfa.release()
    model.dfa.seed = 5
    model.dfa = DFA(points, seed=4)
    step(model)


# Attached.


def attachable():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(*SHAPE)
    )


def test_attach_by_name_and_by_module():
    by_name, by_module = attachable(), attachable()
    handle = attach(by_name, ["1", "3"], seed=3, match_output="4")
    attach(by_module, ["1", "3"], seed=3, match_output=by_module[4])
    expected = scaled(feedback_matrix(*SHAPE, seed=3), 1 / math.sqrt(WIDTH))
    for model in (by_name, by_module):
        assert_same(model[4].weight.detach(), expected)
        step(model)
    with pytest.warns(UserWarning, match="another feedback matrix"):
        handle.dfa.seed = 4
    handle.detach()
    assert_same(by_name[4].weight.detach(), expected)


def test_attach_refuses_and_leaves_the_model_as_it_was():
    model = attachable()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear, got Tanh"):
        attach(model, ["1", "3"], match_output="3")
    with pytest.raises(ValueError, match="match_output must be submodules of the model, got 'hea"):
        attach(model, ["1", "3"], match_output="head")
    with pytest.raises(ValueError, match=r"match_output must be submodules of .* got bool"):
        attach(model, ["1", "3"], match_output=True)
    with pytest.raises(ValueError, match=r"match_output must be submodules of .* got Linear"):
        attach(model, ["1", "3"], match_output=nn.Linear(*SHAPE))
    with pytest.raises(ValueError, match="no mask"):
        attach(model, ["1", "3"], match_output="4", mask={"1": torch.ones(WIDTH)})
    with pytest.raises(ValueError, match="2 matrices"):
        attach(model, ["1", "3"], match_output="4", shared=False)
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        assert_same(value, state[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, ["1", "3"], match_output="4")
        step(model)
