"""Sources of signals: a user's own beside the built-in ones."""

import copy
import inspect
import json
import math
import pickle
import textwrap

import pytest
import torch
from torch import nn

import dfa_kernels
from dfa_kernels import DFA, DFALayer, alignment, feedback_matrix
from dfa_kernels.nn import INDEPENDENT_ROWS, Source
from tests.nn.networks import (
    CLASSES,
    Learned,
    Multiplied,
    assert_equal,
    backward,
    batch,
    perceptron,
    signals,
    train,
)

KEY = "dfa._extra_state"


MATRIX = feedback_matrix(16, CLASSES, seed=5)
MATRICES = [MATRIX, feedback_matrix(12, CLASSES, seed=6), feedback_matrix(16, CLASSES, seed=7)]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


class Recorded(Multiplied):
    """Keeps the layers it was asked for."""

    def project(self, error, layers, dtype):
        self.seen = layers
        return super().project(error, layers, dtype)


def mine(name="mine"):
    return Multiplied(MATRIX, name=name)


@pytest.mark.parametrize(
    "arguments", [{}, {"lean": True}, {"normalization": "shared"}, {"mask": [None, MATRIX[:12, 0]]}]
)
def test_a_source_of_ones_own_trains_as_the_matrix_it_imitates(arguments):
    if "mask" in arguments:
        arguments = {"mask": [*arguments["mask"], None]}
    ours = train(perceptron(matrix=mine(), **arguments), lr=0.01)
    theirs = train(perceptron(matrix=MATRIX, **arguments), lr=0.01)
    assert_equal(ours, theirs, **CLOSE)
    other = train(perceptron(matrix=MATRICES[2], **arguments), lr=0.01)
    assert not torch.allclose(other[0], theirs[0], **CLOSE)


def test_independent_rows_are_told_apart_by_their_offsets():
    x, y = batch()
    ours = perceptron(matrix=Recorded(*MATRICES), shared=False)
    assert_equal(backward(ours, x, y), backward(perceptron(matrix=MATRICES), x, y), **CLOSE)
    assert ours.dfa.source.seen.row_offsets == (0, INDEPENDENT_ROWS, 2 * INDEPENDENT_ROWS)


def test_layers_reach_a_source_once_each():
    source = Recorded(MATRIX)
    backward(perceptron(matrix=source), *batch())  # widths 16, 12, 16
    scales = tuple(1 / math.sqrt(size * CLASSES) for size in (16, 12))
    assert source.seen == ((0, 0), (16, 12), scales)


def test_alignment_with_a_source_of_ones_own():
    x, y = batch()
    found, expected = (
        alignment(model, lambda model=model: nn.functional.cross_entropy(model(x), y))
        for model in (perceptron(matrix=mine()), perceptron(matrix=MATRIX))
    )
    for name, angle in expected.items():
        assert tuple(found[name]) == pytest.approx(tuple(angle), rel=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_hold_a_copy_of_their_source(copied):
    x, y = batch()
    model = perceptron(matrix=mine())
    twin = copied(model)
    assert twin.dfa.source is not model.dfa.source
    assert_equal(backward(twin, x, y), backward(model, x, y))


def test_a_source_of_another_dfa_makes_the_same_signals():
    x, y = batch()
    for arguments in ({"seed": 9}, {"matrix": MATRIX}, {"matrix": MATRICES}):
        model = perceptron(**arguments)
        twin = perceptron(matrix=model.dfa.source)
        assert_equal(backward(twin, x, y), backward(model, x, y))


def test_the_example_in_the_documentation_runs():
    example = textwrap.dedent(inspect.cleandoc(Source.__doc__).split(":\n\n")[1])
    names = {**vars(dfa_kernels), "dfa_layers": [DFALayer()]}
    exec(example, names)
    error, source = torch.randn(3, 5), names["dfa"].source
    found = signals(error, [6, 4], matrix=source, shared=False, normalization=1.0)
    for index, signal in enumerate(found):
        signs = feedback_matrix(
            signal.shape[1], 5, seed=1, row_offset=index * INDEPENDENT_ROWS
        ).sign()
        torch.testing.assert_close(signal, error @ signs.T)


# --- its state ---


def facts(model):
    return json.loads(bytes(model.state_dict()[KEY].tolist()))


def test_what_a_source_describes_is_in_the_state():
    model = perceptron(matrix=mine())
    size = len(model.state_dict()[KEY])
    model(batch()[0])
    assert facts(model) == {
        "stream": 1,
        "source": {"name": "mine", "shapes": [[16, CLASSES]]},
        "row_offsets": [0, 0, 0],
        "normalization": "layer",
        "layers": [["h0", 16], ["h1", 12], ["h2", 16]],
    }
    assert len(model.state_dict()[KEY]) == size


def test_a_state_loads_where_the_source_describes_itself_alike():
    model = perceptron(matrix=mine(), normalization="shared")
    model(batch()[0])
    other = perceptron(matrix=mine())
    other.load_state_dict(model.state_dict())
    assert other.dfa.normalization == "shared"
    assert [point.size for point in other.points] == [16, 12, 16]
    assert_equal(backward(other, *batch()), backward(model, *batch()))


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (lambda: mine("b"), mine, r"the one of \{'name': 'b', .*got the one of .*'mine'"),
        (mine, lambda: None, r"the one of \{'name': 'mine', .*, got a seed"),
        (mine, lambda: MATRIX, r"the one of \{'name': 'mine', .*, got a stored matrix"),
        (lambda: None, mine, r"a seed, got the one of \{'name': 'mine'"),
        (lambda: MATRIX, mine, r"a stored matrix, got the one of \{'name': 'mine'"),
    ],
)
def test_a_state_of_another_source_is_refused(ours, theirs, message):
    model = perceptron(matrix=ours(), seed=3)
    state = perceptron(matrix=theirs(), seed=3, normalization="shared").state_dict()
    with pytest.raises(
        RuntimeError, match=f"state must be of the same source of signals, .*{message}"
    ):
        model.load_state_dict(state)
    assert model.dfa.normalization == "layer"


def test_a_state_with_other_rows_is_refused():
    model = perceptron(matrix=mine())
    state = perceptron(matrix=mine(), shared=False).state_dict()
    with pytest.raises(RuntimeError, match=r"state must share one matrix .* by row offsets \[0, 0"):
        model.load_state_dict(state)


def test_a_source_that_is_a_module_is_a_submodule():
    x, y = batch(torch.float64)
    model = perceptron(matrix=Learned(MATRIX)).double()
    assert "dfa.source.matrix" in model.state_dict()
    expected = perceptron(matrix=MATRIX.double(), dtype=torch.float64)
    assert_equal(backward(model, x, y), backward(expected, x, y), **CLOSE)


# --- bad sources ---


def test_what_is_half_a_source_is_refused():
    class Projects:
        def project(self, error, layers, dtype): ...

    with pytest.raises(TypeError, match=r"DFA: matrix must have .* got Projects without describe"):
        DFA([DFALayer()], matrix=Projects())

    class Describes:
        def describe(self): ...

    with pytest.raises(TypeError, match=r"DFA: matrix must have .* got Describes without project"):
        DFA([DFALayer()], matrix=Describes())


@pytest.mark.parametrize("facts", [[1], None, {"matrix": MATRIX}, "mine"])
def test_descriptions_that_are_no_json_are_refused(facts):
    source = mine()
    source.describe = lambda: facts
    with pytest.raises(TypeError, match=r"DFA: matrix\.describe\(\) must return a dict of JSON"):
        DFA([DFALayer()], matrix=source)


@pytest.mark.parametrize("lean", [False, True])
def test_signals_of_a_wrong_shape_are_refused(lean):
    source = mine()
    source.project = lambda error, layers, dtype: [torch.zeros(7, 3)]
    with pytest.raises(
        ValueError, match=r"DFA: matrix\.project must make .* \[\(3, 6\)\], got \[\(7, 3\)\]"
    ):
        signals(torch.randn(3, 5), [6], matrix=source, lean=lean)


# --- what a DFA reports of its source ---


def test_properties_say_what_the_source_has():
    seeded = DFA([DFALayer()], seed=2, distribution="uniform", backend="torch", shared=False)
    assert (seeded.seed, seeded.distribution, seeded.backend) == (2, "uniform", "torch")
    assert (seeded.matrices, seeded.row_offsets, seeded.normalization) == ((), (0,), "layer")
    own = DFA([DFALayer()], matrix=mine(), normalization=2)
    assert (own.seed, own.distribution, own.backend) == (None, None, None)
    assert (own.matrices, own.normalization) == ((), 2.0)
    assert torch.equal(DFA([DFALayer()], matrix=MATRIX).matrices[0], MATRIX)
    assert repr(own) == "DFA(1 layers, Multiplied)"


def test_another_source_takes_effect_with_the_next_signal():
    x, y = batch()
    model = perceptron(seed=1)
    backward(model, x, y)
    model.dfa.source = mine()
    assert_equal(backward(model, x, y), backward(perceptron(matrix=mine()), x, y))
