"""Models that train by DFA under torch.compile: sizes that change, and models compiled in part."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from dfa_kernels import DFA, DFALayer, attach
from tests.nn.networks import CLASSES, INPUTS, assert_equal, backward, batch, perceptron


class Plain(nn.Module):
    """Calls plain submodules in its forward."""

    def __init__(self, width=32, classes=CLASSES):
        super().__init__()
        self.linear, self.act = nn.Linear(INPUTS, width), nn.Tanh()
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.act(self.linear(x)))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 8, 3), nn.Tanh()
        self.second, self.act2 = nn.Conv2d(8, 8, 3), nn.Tanh()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.act2(self.second(self.act(self.first(x)))).mean((2, 3)))


def wired(network=Images):
    """`Images` with `DFALayer`s in its forward."""

    class Wired(network):
        def __init__(self):
            super().__init__()
            self.points = nn.ModuleList([DFALayer(), DFALayer()])
            self.dfa = DFA(self.points)

        def forward(self, x):
            x = self.points[0](self.act(self.first(x)))
            x = self.points[1](self.act2(self.second(x)))
            return self.dfa(self.head(x.mean((2, 3))))

    return Wired()


def attached():
    model = Images()
    attach(model, ["act", "act2"])
    return model


class Sequences(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.linear, self.act = nn.Linear(INPUTS, 16), nn.Tanh()
        self.head = nn.Linear(16, CLASSES)
        self.point = DFALayer()
        self.dfa = DFA([self.point], batch_dims=(0, 1), seed=seed)

    def forward(self, x):
        return self.dfa(self.head(self.point(self.act(self.linear(x)))))


def assert_trains_as_eager(model, x, compiled):
    model.zero_grad()
    compiled(x).square().sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    with torch.compiler.set_stance("force_eager"):
        model(x).square().sum().backward()
    assert_equal(found, [p.grad for p in model.parameters()], rtol=1e-5, atol=1e-6)
    assert found[0].any()


@pytest.mark.parametrize(
    ("make", "dynamic", "backend"),
    [
        (wired, None, "aot_eager"),
        (attached, True, "eager"),
        (Sequences, None, "eager"),
        (Sequences, True, "aot_eager"),
    ],
)
def test_sizes_may_change_without_a_new_graph(make, dynamic, backend):
    """After the second size, one graph serves all."""
    model = make()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, dynamic=dynamic, fullgraph=True)
    graphs = []
    for size in (8, 9, 13, 11):
        x = torch.randn(4, size, INPUTS) if make is Sequences else torch.randn(4, 3, size, size)
        assert_trains_as_eager(model, x, compiled)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[1]


@pytest.mark.parametrize(("dynamic", "widths"), [(None, (32, 64)), (True, (64, 32))])
def test_models_of_several_widths(dynamic, widths):
    for width in widths:
        model = Plain(width)
        attach(model, ["act"])
        compiled = torch.compile(model, backend="eager", dynamic=dynamic)
        assert_trains_as_eager(model, batch()[0], compiled)


def test_training_steps_make_one_graph():
    """Nothing that a pass writes is read by the next."""
    model = wired()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(torch.randn(4, 3, 8, 8)).sum().backward()
    assert counter.frame_count == 1


def test_seeds_need_no_new_graph_where_integers_of_modules_may_vary():
    counter = torch._dynamo.testing.CompileCounter()
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        graphs = []
        for seed in (0, 1, 2, 7):
            model = Sequences(seed)
            compiled = torch.compile(model, backend=counter, fullgraph=True)
            assert_trains_as_eager(model, torch.randn(4, 3, INPUTS), compiled)
            graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[1] == 2


@pytest.mark.parametrize("compiled", [(0,), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("mask", [None, [torch.arange(16.0), None, torch.ones(16)]])
def test_lean_with_some_layers_compiled(compiled, mask):
    x, y = batch()

    class Block(nn.Module):
        def __init__(self, linear, point):
            super().__init__()
            self.linear, self.point = linear, point

        def forward(self, x):
            return self.point(torch.tanh(self.linear(x)))

    model = perceptron(lean=True, mask=mask)
    blocks = [Block(*pair) for pair in zip(model.linears, model.points, strict=True)]
    for index in compiled:
        blocks[index].compile(backend="aot_eager")

    def call(x):
        for block in blocks:
            x = block(x)
        return model.dfa(model.output(x))

    expected = backward(perceptron(mask=mask), x, y)
    assert_equal(backward(model, x, y, call=call), expected, rtol=1e-5, atol=1e-6)
    assert model.dfa._group.waiting == {}


def test_lean_with_an_uncompiled_layer_in_a_compiled_model():
    x, y = batch()
    model = perceptron(lean=True)
    model.points[1].forward = torch.compiler.disable(model.points[1].forward)
    found = backward(model, x, y, call=torch.compile(model, backend="aot_eager"))
    assert_equal(found, backward(perceptron(), x, y), rtol=1e-5, atol=1e-6)
