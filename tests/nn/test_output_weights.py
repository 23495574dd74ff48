"""Signals by the output layer's own weights, and a residual network that learns by them."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer, alignment, attach
from dfa_kernels.layers import Layers
from dfa_kernels.nn import OutputWeights
from tests.nn.networks import BATCH, CLASSES, INPUTS, assert_equal, backward, batch

SIZE = 16
STEPS = 150


def network(**options):
    """One hidden layer; signals W^T e are backpropagation's."""
    torch.manual_seed(0)
    output = nn.Linear(SIZE, CLASSES)
    first = DFALayer()
    dfa = DFA([first], matrix=OutputWeights(output), **options)
    return nn.Sequential(nn.Linear(INPUTS, SIZE), nn.Tanh(), first, output, dfa)


def gradients(model, dtype=torch.float32):
    x, y = batch()
    backward(model.to(dtype), x.to(dtype), y)
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lean", [False, True])
def test_before_the_output_layer_they_are_backpropagations(lean, dtype):
    model, exact = network(lean=lean), network()
    exact[-1].mode = "backprop"
    assert_equal(gradients(model, dtype), gradients(exact, dtype), rtol=1e-5, atol=1e-7)


def test_the_weights_are_those_of_the_step():
    """Also where other tensors took their place, as after `.to()` and in a copy."""
    model = network()
    gradients(model)
    for kept in (model, copy.deepcopy(model)):
        kept.zero_grad()
        kept[3].weight.data = torch.randn(CLASSES, SIZE)
        found = gradients(kept)
        kept.zero_grad()
        kept[-1].mode = "backprop"
        assert_equal(found, gradients(kept), rtol=1e-5, atol=1e-7)


def test_each_layer_gets_a_tensor_of_its_own():
    error = torch.randn(BATCH, CLASSES)
    output = nn.Linear(SIZE, CLASSES)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(SIZE, SIZE)) for _ in range(3)), output)
    handle = attach(
        model, ["0", "1", "2"], matrix=OutputWeights(output), shared=False, normalization=1.0
    )
    seen = {}

    def keep(signal, layer):
        seen[layer.name] = signal.clone()
        return signal.zero_()

    handle.dfa.signal_transform = keep
    model(torch.randn(BATCH, SIZE)).backward(error)
    expected = error @ output.weight * math.sqrt(SIZE * CLASSES)
    assert_equal([*seen.values()], [expected.detach()] * 3, rtol=1e-5, atol=1e-6)


def test_weights_that_a_functional_call_brings():
    """Of the pass, though the backward pass comes when the model has its own again."""
    model, (x, y) = network(), batch()
    weights = {name: torch.randn_like(value) for name, value in model.named_parameters()}

    def loss(parameters):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    for lean in (False, True):
        model[-1].lean = lean
        model[-1].mode = "backprop"
        expected = torch.func.grad(loss)(weights)
        model[-1].mode = "dfa"
        found = torch.func.grad(loss)(weights)
        assert_equal(found.values(), expected.values(), rtol=1e-4, atol=1e-6)


def test_a_part_of_the_error_meets_its_part_of_the_weights():
    linear, error = nn.Linear(4, 7), torch.randn(2, 7)
    layers = Layers((0,), (4,), (0.5 / math.sqrt(28),))
    (signal,) = OutputWeights(linear).project(error[:, 3:5], layers, torch.float32, 3)
    torch.testing.assert_close(signal, 0.5 * error[:, 3:5] @ linear.weight[3:5].detach())
    with pytest.raises(ValueError, match=r"OutputWeights: linear must have .* and 7 beside"):
        OutputWeights(linear).project(error[:, 3:5], layers, torch.float32, 6)


def test_compiled():
    compiled = torch.compile(network(), backend="aot_eager", fullgraph=True)
    assert_equal(gradients(compiled), gradients(network()), rtol=1e-5, atol=1e-7)


def test_under_autocast_the_product_is_in_the_errors_dtype():
    model, (x, y) = network(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        F.cross_entropy(output, y).backward()
    exact = network()
    exact[-1].mode = "backprop"
    expected = gradients(exact)[0]
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=0.1, atol=2e-3)


def test_the_matrix_and_the_state():
    model = network()
    gradients(model)
    assert_equal([model[-1].feedback_matrix(0)], [model[3].weight.T], rtol=1e-5, atol=1e-7)
    state = model.state_dict()
    assert [name for name in state if "linear" in name] == []
    network().load_state_dict(state)
    other = nn.Linear(SIZE, CLASSES + 1)
    with pytest.raises(ValueError, match="state must be of the same source of signals"):
        DFA([DFALayer()], matrix=OutputWeights(other)).set_extra_state(state["4._extra_state"])


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match=r"OutputWeights: linear must be an nn\.Linear, got Tanh"):
        OutputWeights(nn.Tanh())
    model = network()
    model[-1].matrix = OutputWeights(nn.Linear(SIZE + 1, CLASSES))
    said = r"OutputWeights: linear must have .* got 17 and 5 beside layers of \[16\] and an error"
    with pytest.raises(ValueError, match=said):
        gradients(model)
    model[-1].matrix = OutputWeights(nn.Linear(SIZE, CLASSES + 1))
    with pytest.raises(ValueError, match="got 16 and 6 beside"):
        gradients(model)


class Block(nn.Module):
    """x + f(x), where f starts at 0."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        for parameter in self.down.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


@functools.cache
def learned(way):
    """The loss on new data after training, and the alignment: classes that no linear layer sees."""
    torch.manual_seed(0)
    embed, blocks, norm = nn.Linear(8, 32), [Block() for _ in range(3)], nn.LayerNorm(32)
    model = nn.Sequential(embed, *blocks, norm, nn.Linear(32, 4))
    options = {"through": lambda x: F.layer_norm(x, x.shape[-1:])} if way != "backprop" else {}
    if way == "output weights":
        options["matrix"] = OutputWeights(model[5])
    elif way == "matched":
        options["match_output"] = model[5]
    handle = attach(model, ["1", "2", "3"], seed=0, **options)
    handle.mode = way if way in ("backprop", "shallow") else "dfa"
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def loss(rows):
        x = torch.randn(rows, 8)
        y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] * x[:, 3] > 0)
        return F.cross_entropy(model(x), y)

    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(128).backward()
        optimizer.step()
    found = [angle.mean for angle in alignment(model, lambda: loss(256)).values()]
    with torch.no_grad():
        return loss(2048).item(), found


@pytest.mark.parametrize("way", ["matched", "output weights"])
def test_a_residual_network_learns_where_frozen_blocks_do_not(way):
    frozen, _ = learned("shallow")
    exact, _ = learned("backprop")
    ours, angles = learned(way)
    assert frozen > 1.2
    assert exact < 0.7
    assert ours < 0.9
    assert min(angles) > 0.4
