"""`torch.jit` takes models with a `DFA` for inference, and says that they do not train."""

import io

import pytest
import torch
from torch import nn

from dfa_kernels import DFA, DFALayer
from tests.nn.networks import CLASSES, INPUTS, assert_equal, backward, batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
]


class Law(nn.Module):
    def forward(self, sizes, error_size, *others):
        return [0.5] * len(sizes)


class Network(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(INPUTS, 16), nn.Linear(16, CLASSES)
        self.dfa1 = DFALayer()
        self.dfa = DFA([self.dfa1], **options)

    def forward(self, x):
        return self.dfa(self.fc2(self.dfa1(torch.tanh(self.fc1(x)))))


def scripted(model):
    return torch.jit.script(model)


def traced(model):
    return torch.jit.trace(model, batch()[0])


@pytest.mark.parametrize("options", [{}, {"normalization": Law(), "lean": True}])
@pytest.mark.parametrize("made", [scripted, traced])
@pytest.mark.parametrize("trained", [False, True])
def test_it_computes_the_same(options, made, trained):
    model = Network(**options)
    inputs, targets = batch()
    if trained:
        backward(model, inputs, targets)
    expected = model(inputs).detach()
    file = io.BytesIO()
    torch.jit.save(made(model.eval()), file)
    file.seek(0)
    assert_equal([torch.jit.load(file)(inputs).detach()], [expected])
    # The model itself is as it was.
    gradient = model.train().fc1.weight.grad
    model.zero_grad()
    backward(model, inputs, targets)
    if trained:
        assert_equal([model.fc1.weight.grad], [gradient])
    assert model.dfa1.size == 16


def test_it_does_not_train():
    model = Network()
    inputs, _ = batch()
    script = scripted(model)
    with pytest.raises(torch.jit.Error, match=r"DFALayer: a model by torch.jit.script does not tr"):
        script(inputs)
    with torch.no_grad():
        script(inputs)
    script.eval()(inputs)
    with pytest.raises(RuntimeError, match=r"DFALayer: a model by torch.jit.trace does not train"):
        traced(model)
    model.dfa.mode = "backprop"
    backward(traced(model), *batch())
    assert model.fc1.weight.grad.abs().sum() > 0
