"""The tables of PORTING.md as the tests read them, and other trainers' steps by hand."""

import copy
import re

import torch
import torch.nn.functional as F

from dfa_kernels import DFA, DFALayer, feedback_matrix, tinydfa_scales
from tests import ROOT
from tests.nn.networks import CLASSES, gradients

PAGE = (ROOT / "dfa_kernels/nn/PORTING.md").read_text()


class Table:
    """A section's table: what the other code does, and what to write for it."""

    def __init__(self, title):
        section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
        lines = section.splitlines()
        heads = [number - 1 for number, line in enumerate(lines) if line == "|---|---|"]
        body = [line for i, line in enumerate(lines) if line[:2] == "| " and i not in heads]
        cells = [line.strip("|").split(" | ") for line in body]
        self.lines = {have.strip(): write.strip() for have, write in cells}
        self.held = []

    def line(self, beginning):
        """The one line that is or begins so."""
        if beginning in self.lines:
            return beginning
        (found,) = [have for have in self.lines if have.startswith(beginning)]
        return found

    def holds(self, *beginnings):
        """Marks the test that holds these lines."""

        def mark(test):
            self.held.extend(map(self.line, beginnings))
            return test

        return mark

    def code(self, beginning, pattern):
        """The first code of a line that matches."""
        return re.findall(f"`({pattern})`", self.lines[self.line(beginning)])[0]

    def options(self, beginning, pattern="[^`]*=[^`]*", **names):
        """The arguments that a line says to give a `DFA`."""
        code = self.code(beginning, pattern)
        code = code if code.startswith("DFA(") else f"dict({code})"
        known = {"DFA": lambda layers, **given: given, "layers": (), "torch": torch}
        return eval(code, {**known, "tinydfa_scales": tinydfa_scales, **names})


def by_signals(model, x, y, made, **loss):
    """The gradients of a `Perceptron` whose hidden activations get the signals `made`."""
    model = copy.deepcopy(model)
    model.zero_grad()
    for linear, signal in zip(model.linears, made, strict=True):
        h = torch.tanh(linear(x))
        h.backward(signal)
        x = h.detach()
    F.cross_entropy(model.output(x), y, **loss).backward()
    return gradients(model)


def difference(model, x, y):
    """softmax - one-hot, of the model's output."""
    with torch.no_grad():
        return model(x).softmax(1) - F.one_hot(y, CLASSES)


# An output of 8 rows and its classes; `WRONG` is softmax - one-hot.
OUTPUT = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(8) % 5
WRONG = OUTPUT.softmax(1) - F.one_hot(TARGET, 5)


def mean(output):
    return F.cross_entropy(output, TARGET)


def received(given, output, loss, dims=(0,)):
    """What a layer of 6 units and the output itself get from a loss of the output."""
    layer = DFALayer()
    dfa = DFA([layer], normalization=1.0, batch_dims=dims, **given)
    hidden = torch.zeros(*output.shape[:-1], 6, requires_grad=True)
    output = output.clone().requires_grad_()
    layer(hidden)
    loss(dfa(output)).backward()
    plain = output.detach().requires_grad_()
    loss(plain).backward()
    assert torch.equal(output.grad, plain.grad)  # the last layer's error is as it was
    return hidden.grad


def assert_received(found, error):
    torch.testing.assert_close(found, error @ feedback_matrix(6, error.shape[-1]).T)
