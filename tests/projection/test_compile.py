"""`torch.compile` of models and of training steps equals eager mode from the first step on.

Most tests stop before code generation (backend "aot_eager"); one goes through it.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer, alignment, attach, feedback_matrix
from tests.nn.networks import (
    CLASSES,
    Calls,
    Multiplied,
    assert_equal,
    backward,
    batch,
    perceptron,
)

# Warnings from inside torch's compiler.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield functools.partial(torch.compile, backend="aot_eager")
    torch._dynamo.reset()


def wired():
    return perceptron(seed=3)


def watched():
    return perceptron(seed=3, watch=True)


def lean():
    return perceptron(seed=3, lean=True)


def masked():
    return perceptron(seed=3, mask={"h1": torch.eye(12)[0]}, error_transform=torch.sign)


def structured():
    return perceptron(seed=3, distribution="hadamard", shared=False)


def own_source():
    return perceptron(matrix=Multiplied(feedback_matrix(16, CLASSES)))


def attached():
    model = perceptron()
    layers = [module for linear in model.linears for module in (linear, nn.Tanh())]
    model = nn.Sequential(*layers, model.output)
    attach(model, ["1", "3", "5"], seed=3)
    return model


@pytest.mark.parametrize("build", [wired, watched, lean, masked, structured, own_source, attached])
def test_compiled_forward_is_one_graph_and_its_first_step_is_eagers(compiler, build):
    x, y = batch()
    expected = backward(build(), x, y)
    model = build()
    found = backward(model, x, y, call=compiler(model, fullgraph=True))
    assert_equal(found, expected, rtol=1e-5, atol=1e-7)


def test_compiled_model_takes_the_source_of_a_state(compiler):
    """A seed beyond int64, and independent rows for every layer."""
    x, y = batch()
    other = perceptron(seed=2**64 - 3, distribution="uniform", shared=False)
    expected = backward(other, x, y)
    model = perceptron()
    compiled = compiler(model, fullgraph=True)
    backward(model, x, y, call=compiled)
    model.load_state_dict(other.state_dict())
    assert_equal(backward(model, x, y, call=compiled), expected, rtol=1e-5, atol=1e-7)


def test_compiled_step_trains_as_eager_from_the_first_step(compiler):
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    curves = []
    for wrapped in (step, compiler(step)):
        model = perceptron()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        curves += [[wrapped(model, optimizer, *batch(seed=seed)) for seed in range(4)]]
    for eager, compiled in zip(*curves, strict=True):
        assert_equal(compiled, eager, rtol=1e-5, atol=1e-6)


def test_compiled_model_changes_mode_and_batch_size(compiler):
    model = perceptron()
    compiled = compiler(model, fullgraph=True)
    for mode in ("dfa", "backprop", "shallow", "dfa"):
        for size in (6, 4, 7):
            x, y = batch(size=size)
            model.dfa.mode = mode
            reference = perceptron()
            reference.dfa.mode = mode
            found = backward(model, x, y, call=compiled)
            assert_equal(found, backward(reference, x, y), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("compiler")
def test_compiled_by_inductor():
    x, y = batch()
    model = perceptron()
    expected = backward(perceptron(), x, y)
    found = backward(model, x, y, call=torch.compile(model, fullgraph=True))
    assert_equal(found, expected, rtol=1e-5, atol=1e-6)


def test_compiled_backward_keeps_one_projection(compiler):
    x, y = batch()
    model = perceptron()
    compiled = compiler(model)
    F.cross_entropy(compiled(x), y).backward()
    loss = F.cross_entropy(compiled(x), y)
    with Calls() as calls:
        loss.backward()
    assert calls.projections == 1


def test_compiled_patches_share_their_images_error(compiler):
    """Nine patches per image share one error; the batch size changes."""
    body, head, point = nn.Linear(8, 16), nn.Linear(16, 5), DFALayer(batch_dims=(0, 1))
    model = nn.ModuleList([body, head, point, DFA([point])])

    def call(x):
        return model[3](head(point(torch.tanh(body(x))).mean(1)))

    compiled = compiler(call, fullgraph=True)
    for size in (6, 4, 7):
        x = torch.randn(size, 9, 8)
        y = torch.randint(0, 5, (size,))
        expected = backward(model, x, y, call=call)
        assert_equal(backward(model, x, y, call=compiled), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("measure_first", [True, False])
def test_alignment_of_a_compiled_model_is_eagers(compiler, measure_first):
    x, y = batch()
    plain, model = wired(), wired()
    expected = alignment(plain, lambda: F.cross_entropy(plain(x), y))
    trained = backward(plain, x, y)
    compiled = compiler(model)
    for measure in (measure_first, not measure_first):
        if measure:
            for holder in (compiled, model):
                assert alignment(holder, lambda: F.cross_entropy(compiled(x), y)) == expected
        else:
            found = backward(model, x, y, call=compiled)
            assert_equal(found, trained, rtol=1e-5, atol=1e-7)
