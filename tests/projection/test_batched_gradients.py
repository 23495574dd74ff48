"""Batched gradients of torch.autograd: `vectorize=True` and `is_grads_batched=True`."""

import pytest
import torch
from torch._vmap_internals import _vmap
from torch.autograd import functional
from torch.func import functional_call

from dfa_kernels import project
from tests.nn.networks import batch, perceptron
from tests.samples import DTYPES

SIZES = (7, 5, 7)
DISTRIBUTIONS = pytest.mark.parametrize("distribution", ["normal", "hadamard"])


def signals_by(backend, distribution, **options):
    options |= {"distribution": distribution, "backend": backend}
    return lambda error: tuple(project(error, SIZES, **options))


def powers(signals):
    return lambda error: sum(signal.pow(3).sum() for signal in signals(error))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.fixture
def error():
    return torch.randn(3, 6, dtype=torch.float64)


@DISTRIBUTIONS
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobian(backend, distribution, strategy, error):
    signals = signals_by(backend, distribution)
    expected = functional.jacobian(signals, error)
    close(functional.jacobian(signals, error, vectorize=True, strategy=strategy), expected)


@DISTRIBUTIONS
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_hessian(backend, distribution, strategy, error):
    of = powers(signals_by(backend, distribution))
    options = {"vectorize": True, "outer_jacobian_strategy": strategy}
    close(functional.hessian(of, error, **options), functional.hessian(of, error))


@DISTRIBUTIONS
def test_gradcheck_in_batches(backend, distribution, error):
    signals = signals_by(backend, distribution)
    error.requires_grad_()
    assert torch.autograd.gradcheck(signals, error, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(signals, error, check_batched_grad=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("all_signals", [False, True], ids=["one", "all"])
@DISTRIBUTIONS
def test_gradients_of_some_signals(backend, distribution, all_signals, calls, dtype):
    """Where only one signal has batched gradients, the others' zeros have no batch."""
    error = torch.randn(3, 6, dtype=dtype, requires_grad=True)
    signals = signals_by(backend, distribution)(error)
    taken = signals[:2] if all_signals else signals[1:2]
    gradients = [torch.randn(calls, *signal.shape).to(dtype) for signal in taken]
    options = {"retain_graph": True}
    (found,) = torch.autograd.grad(taken, error, gradients, is_grads_batched=True, **options)
    assert found.shape == (calls, 3, 6)
    for i, one in enumerate(found):
        (expected,) = torch.autograd.grad(taken, error, [g[i] for g in gradients], **options)
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (0, 2), (0, None), (None, 0)])
def test_calls_in_calls(backend, dims):
    """The batch dimensions of two levels, anywhere, or of one of them."""
    shape = [3, 6]  # of one call's error
    for size, dim in ((5, dims[1]), (4, dims[0])):
        if dim is not None:
            shape.insert(dim, size)
    errors, outer, inner = torch.randn(shape, dtype=torch.float64), torch.ones(4), torch.ones(5)

    def signal(error, _=None):
        return project(error, [7], backend=backend)[0]

    def mapped(vmap):
        of_inner = vmap(signal, (dims[1], 0))
        return vmap(lambda error, _: of_inner(error, inner), (dims[0], 0))(errors, outer)

    found = mapped(_vmap)
    assert found.shape == (4, 5, 3, 7)
    close(found, mapped(torch.func.vmap))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"distribution": "hadamard"}, {"mask": {"h1": torch.eye(12)[0]}}, {"lean": True}],
    ids=str,
)
def test_jacobian_and_hessian_of_a_model(arguments):
    model = perceptron(seed=3, **arguments).double()
    name, weight = next((n, p.detach()) for n, p in model.named_parameters() if p.dim() == 2)
    x = batch()[0].double()

    def output(weight):
        return functional_call(model, {name: weight}, x)

    def loss(weight):
        return output(weight).pow(2).sum()

    expected = functional.jacobian(output, weight)
    assert expected.any()
    close(functional.jacobian(output, weight, vectorize=True), expected)
    close(functional.hessian(loss, weight, vectorize=True), functional.hessian(loss, weight))
