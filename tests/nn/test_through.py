"""Signals of a function of an activation, which autograd carries back through it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dfa_kernels import DFA, DFALayer, alignment, attach, project
from tests.nn.networks import BATCH, CLASSES, INPUTS, assert_equal, backward, batch

SIZE = 16


def norm(x):
    return F.layer_norm(x, x.shape[-1:])


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(INPUTS, SIZE), nn.Tanh()),
        *(nn.Linear(SIZE, SIZE), nn.Tanh()),
        nn.Linear(SIZE, CLASSES),
    )


def expected(through):
    """By hand: each activation gets the gradient of signal * through(activation)."""
    model, (x, y) = network(), batch()
    first = model[1](model[0](x))
    second = model[3](model[2](first.detach()))
    output = model[4](second.detach())
    F.cross_entropy(output, y).backward()
    with torch.no_grad():
        error = (output.softmax(1) - F.one_hot(y, CLASSES)) / BATCH
    for activation in (first, second):
        carried = through(activation)
        carried.backward(project(error, [carried[0].numel()], seed=1)[0].view_as(carried))
    return [parameter.grad for parameter in model.parameters()]


def attached(**options):
    model = network()
    attach(model, ["1", "3"], seed=1, **options)
    return model


def gradients(model):
    backward(model, *batch())
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("through", [norm, lambda x: x[:, ::2] ** 2])
def test_the_signal_comes_back_through_it(through, lean):
    found = gradients(attached(through=through, lean=lean))
    assert_equal(found, expected(through), rtol=1e-5, atol=1e-7)


def test_a_layers_own_wins():
    first, second = DFALayer(through=norm), DFALayer()
    model = network()
    parts = [*model[:2], first, *model[2:4], second, model[4]]
    model = nn.Sequential(*parts, DFA([first, second], seed=1, through=lambda x: x[:, :3]))
    found, ours, theirs = gradients(model), expected(norm), expected(lambda x: x[:, :3])
    assert_equal(found, [*ours[:2], *theirs[2:]], rtol=1e-5, atol=1e-7)


def test_compiled():
    compiled = torch.compile(attached(through=norm), backend="aot_eager", fullgraph=True)
    assert_equal(gradients(compiled), gradients(attached(through=norm)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lean", [False, True])
def test_inside_a_checkpoint(lean):
    """The pass that is repeated saves what the first saved."""

    class Checkpointed(nn.Sequential):
        def forward(self, x):
            for linear, tanh in ((self[0], self[1]), (self[2], self[3])):
                x = checkpoint(lambda x, a=linear, b=tanh: b(a(x)), x, use_reentrant=False)
            return self[4](x)

    model = Checkpointed(*network())
    attach(model, ["1", "3"], seed=1, through=norm, lean=lean)
    assert_equal(gradients(model), gradients(attached(through=norm, lean=lean)))


def test_other_passes_do_without_it():
    def never(x):
        raise AssertionError

    model = attached(through=never)
    x, y = batch()
    with torch.no_grad():
        model(x)
    for mode in ("backprop", "shallow"):
        model.dfa.mode = mode
        backward(model, x, y)
    model.dfa.mode, model.dfa.through = "dfa", None
    assert_equal(gradients(model), gradients(attached()))


def test_alignment_is_of_the_activation_itself():
    """One linear layer to the output: through the norm, DFA by its weights is backpropagation."""
    model, (x, y) = network(), batch()
    model = nn.Sequential(*model[:2], nn.LayerNorm(SIZE), model[4])
    attach(model, ["1"], matrix=model[3].weight.T, through=norm)
    (found,) = alignment(model, lambda: F.cross_entropy(model(x), y)).values()
    assert found.mean == pytest.approx(1, abs=1e-5)
    model.dfa.through = None
    (without,) = alignment(model, lambda: F.cross_entropy(model(x), y)).values()
    assert without.mean < 0.999


def test_a_module_keeps_its_parameters_to_itself():
    shared = nn.LayerNorm(SIZE)
    layer = DFALayer(through=shared)
    model = nn.Sequential(nn.Linear(INPUTS, SIZE), layer, nn.Linear(SIZE, CLASSES), DFA([layer]))
    model[-1].through = shared
    assert not [name for name in model.state_dict() if "through" in name]
    backward(model, *batch())
    assert shared.weight.grad is not None


@pytest.mark.parametrize("value", [1, "norm", torch.ones(2)])
def test_what_is_no_function_is_refused(value):
    for kind, arguments in ((DFALayer, ()), (DFA, ([],))):
        with pytest.raises(TypeError, match=f"{kind.__name__}: through must be a function, got"):
            kind(*arguments, through=value)


@pytest.mark.parametrize(
    ("through", "got"),
    [
        (lambda x: None, "a NoneType"),
        (lambda x: (x,), "a tuple"),
        (lambda x: x.detach(), "a tensor that requires no gradient"),
        (torch.ones_like, "a tensor that requires no gradient"),
    ],
)
def test_what_no_signal_comes_back_through_is_refused(through, got):
    model = attached(through=through)
    with pytest.raises(TypeError, match=f"DFALayer: through must return a tensor .* got {got}"):
        model(batch()[0])
