"""What was compiled before a model's hooks change is compiled again."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import attach
from dfa_kernels.nn.recompile import forget_compiled

INPUTS, TARGETS = torch.linspace(-1, 1, 20).view(5, 4), torch.tensor([0, 1, 2, 0, 1])


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)
        self.act2, self.head = nn.Tanh(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.act2(self.fc2(self.act(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.fc1, self.act = model.fc1, model.act

    def forward(self, x):
        return self.act(self.fc1(x))


class Blocks(Network):
    def __init__(self):
        super().__init__()
        self.block = Block(self)

    def forward(self, x):
        return self.head(self.act2(self.fc2(self.block(x))))


def loss_of(model):
    return lambda: F.cross_entropy(model(INPUTS), TARGETS)


def wrapper(model):
    return loss_of(torch.compile(model, backend="eager"))


def in_place(model):
    model.compile(backend="eager")
    return loss_of(model)


def submodule(model):
    model.block.compile(backend="eager")
    return loss_of(model)


def step(model):
    return torch.compile(loss_of(model), backend="eager")


def gradient(model, loss):
    model.zero_grad()
    loss().backward()
    return model.fc1.weight.grad.clone()


@pytest.mark.parametrize(
    "compiled",
    [
        step,
        *(pytest.param(one, marks=pytest.mark.battery) for one in (wrapper, in_place, submodule)),
    ],
)
def test_hooks_take_effect_after_compiled_calls(compiled):
    torch.manual_seed(0)
    model = Blocks()
    loss = compiled(model)
    backpropagated = gradient(model, loss)
    handle = attach(model, ["act", "act2"], seed=1)
    trained = gradient(model, loss)
    with torch.compiler.set_stance("force_eager"):
        expected = gradient(model, loss)
    torch.testing.assert_close(trained, expected)
    assert not torch.allclose(trained, backpropagated)
    handle.mode = "backprop"  # guarded: needs nothing
    torch.testing.assert_close(gradient(model, loss), backpropagated)
    handle.mode = "dfa"
    torch.testing.assert_close(gradient(model, loss), trained)
    handle.detach()
    torch.testing.assert_close(gradient(model, loss), backpropagated)


def test_nothing_compiled_is_nothing_done(monkeypatch):
    torch.compiler.reset()
    called = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: called.append(1))
    forget_compiled()
    assert not called
    torch.compile(lambda x: x + 1, backend="eager")(INPUTS)
    forget_compiled()
    assert called


@pytest.mark.battery
def test_the_compiler_is_not_imported():
    code = (
        "import sys; from dfa_kernels.nn.recompile import forget_compiled\n"
        "for name in [name for name in sys.modules if name.startswith('torch._dynamo')]:\n"
        "    del sys.modules[name]\n"
        "forget_compiled(); print('torch._dynamo' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
