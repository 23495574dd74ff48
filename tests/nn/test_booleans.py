"""Arguments that are True or False: numpy's too, and nothing else that counts as true."""

import numpy as np
import pytest
import torch
from torch import nn

from dfa_kernels import DFA, DFALayer
from tests.nn.networks import CLASSES, INPUTS, assert_equal, backward, batch

OURS = ("lean", "shared", "no_training", "scale_repeats", "requires_grad")
LAYERS = ("passthrough", "requires_grad")


def network(layer=None, **options):
    torch.manual_seed(0)
    first = DFALayer(**(layer or {}))
    return nn.Sequential(
        nn.Linear(INPUTS, 16), nn.Tanh(), first, nn.Linear(16, CLASSES), DFA([first], **options)
    )


def gradients(model):
    backward(model, *batch())
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", [*OURS, "normalization"])
def test_numpys_booleans_are_pythons(name, value):
    model, same = network(**{name: np.bool_(value)}), network(**{name: value})
    assert getattr(model[-1], name) is getattr(same[-1], name)
    assert model[-1]._chosen == same[-1]._chosen
    assert_equal(gradients(model), gradients(same))


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_numpys_booleans_are_pythons_for_a_layer(name, value):
    model, same = network({name: np.bool_(value)}), network({name: value})
    assert getattr(model[2], name) is value
    assert_equal(gradients(model), gradients(same))


def test_a_graph_takes_numpys_booleans():
    given = dict.fromkeys(OURS, np.True_) | {"no_training": np.False_}
    model, same = network({"requires_grad": np.True_}, **given), network(lean=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_equal(gradients(compiled), gradients(same))


@pytest.mark.parametrize("value", ["no", 1, 0.0, [], torch.tensor(True), np.array([True])])
@pytest.mark.parametrize(("kind", "name"), [(0, n) for n in OURS] + [(1, n) for n in LAYERS])
def test_others_are_refused(kind, name, value):
    function = ("DFA", "DFALayer")[kind]
    said = f"{function}: {name} must be True or False, got {type(value).__name__}"
    with pytest.raises(TypeError, match=said):
        network({name: value}) if kind else network(**{name: value})
    model = network()
    target = model[2] if kind else model[-1]
    before = getattr(target, name)
    with pytest.raises(TypeError, match=said):
        setattr(target, name, value)
    assert getattr(target, name) is before
