"""torch.func's transforms and forward-mode derivatives of the projection and of a training step,
compared with those of a product with the materialised matrix and with autograd's."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import func
from torch.autograd import forward_ad

from dfa_kernels import feedback_matrix, project
from tests.nn.networks import assert_equal, backward, batch, perceptron

SIZES = (7, 5)
ERROR = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TANGENT = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_projection(backend, distribution="normal"):
    options = {"distribution": distribution, "backend": backend}
    return lambda error: summary(project(error, SIZES, **options))


def by_product(error, distribution="normal"):
    matrix = feedback_matrix(max(SIZES), 10, dtype=torch.float64, distribution=distribution)
    return summary([error @ matrix[:size].T / math.sqrt(10 * size) for size in SIZES])


def summary(signals):
    """A scalar with derivatives of every order."""
    return signals[0].pow(3).sum() + signals[1].sin().sum()


def by_product_with(distribution):
    return functools.partial(by_product, distribution=distribution)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


ONE = torch.ones((), dtype=torch.float64)


def of_vjp(f, error):
    return func.vjp(f, error)[1](ONE)[0]


def forward_mode(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(ERROR, TANGENT))).tangent


TRANSFORMS = {
    "grad": lambda f: func.grad(f)(ERROR),
    "vjp": lambda f: of_vjp(f, ERROR),
    "jvp": lambda f: func.jvp(f, (ERROR,), (TANGENT,))[1],
    "grad of jvp": lambda f: func.grad(lambda e: func.jvp(f, (e,), (TANGENT,))[1])(ERROR),
    "jvp of grad": lambda f: func.jvp(func.grad(f), (ERROR,), (TANGENT,))[1],
    "vjp of vjp": lambda f: func.vjp(lambda e: of_vjp(f, e).square().sum(), ERROR)[1](ONE)[0],
    "vjp of vmap": lambda f: of_vjp(lambda e: func.vmap(f)(e).square().sum(), ERROR),
    "vmap of vjp": lambda f: func.vmap(lambda e: of_vjp(f, e))(ERROR),
    "jacrev": lambda f: func.jacrev(f)(ERROR),
    "vmap of jacrev": lambda f: func.vmap(func.jacrev(f))(ERROR),
    "jacfwd": lambda f: func.jacfwd(f)(ERROR),
    "hessian": lambda f: func.hessian(f)(ERROR),
    "vmap": lambda f: func.vmap(f)(ERROR),
    "vmap along another dimension": lambda f: func.vmap(f, in_dims=1)(ERROR.T),
    "vmap of vmap": lambda f: func.vmap(func.vmap(f))(torch.stack([ERROR, TANGENT])),
    "vmap of grad": lambda f: func.vmap(func.grad(f))(ERROR),
    "forward mode": forward_mode,
}


BOTH = pytest.mark.parametrize("distribution", ["normal", "hadamard"])


@BOTH
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_the_projection(backend, transform, distribution):
    expected = transform(by_product_with(distribution))
    close(transform(by_projection(backend, distribution)), expected)


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield functools.partial(torch.compile, backend="aot_eager")
    torch.compiler.reset()


# Compiled, these pass through the same code as their parts.
COMPOSED = ("grad of jvp", "jvp of grad", "vjp of vmap", "vmap of jacrev", "vmap of vmap")
COMPOSED += ("vmap of grad", "vmap along another dimension")


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to")
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(transform, id=name, marks=[pytest.mark.battery] * (name in COMPOSED))
        for name, transform in TRANSFORMS.items()
    ],
)
def test_compiled_transforms(transform):
    """Correct, in the graph or left out of it; what a graph must leave out, fullgraph refuses.

    What fullgraph does not refuse is the same graph without it.
    """
    torch.compiler.reset()
    projection = by_projection("torch")
    compiled = functools.partial(torch.compile, lambda: transform(projection), backend="aot_eager")
    try:
        found = compiled(fullgraph=True)()
    except torch._dynamo.exc.Unsupported as refusal:
        if "a projection in forward mode or under vmap cannot be compiled" not in str(refusal):
            raise
        torch.compiler.reset()
        found = compiled()()
    close(found, transform(by_product))


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
@BOTH
@pytest.mark.parametrize("name", ["grad", "vjp", "jacrev"])
def test_reverse_mode_is_compiled_whole(name, distribution):
    torch.compiler.reset()
    transform = TRANSFORMS[name]
    projection = by_projection("torch", distribution)
    whole = torch.compile(lambda: transform(projection), backend="aot_eager", fullgraph=True)
    close(whole(), transform(by_product_with(distribution)))


def test_forward_mode_after_the_same_without(compiler):
    compiled = compiler(by_projection("torch"))
    close(compiled(ERROR), by_product(ERROR))
    close(forward_mode(compiled), forward_mode(by_product))


def test_functionalized_calls_are_operators(backend):
    f = by_projection(backend)
    close(func.functionalize(f)(ERROR), f(ERROR))


def test_what_is_around_functionalize_has_its_gradient(backend):
    error = ERROR.clone().requires_grad_()
    functionalized = func.functionalize(by_projection(backend))
    close(*(torch.autograd.grad(f(error), error)[0] for f in (functionalized, by_product)))


FUNCTIONALIZED = {
    "grad of functionalize": lambda f: func.grad(func.functionalize(f))(ERROR),
    "functionalize of grad": lambda f: func.functionalize(func.grad(f))(ERROR),
    "vmap of functionalize": lambda f: func.vmap(func.functionalize(f))(ERROR),
    "jvp of functionalize": lambda f: func.jvp(func.functionalize(f), (ERROR,), (TANGENT,)),
    "forward mode of functionalize": lambda f: forward_mode(func.functionalize(f)),
}


@pytest.mark.parametrize("transform", FUNCTIONALIZED.values(), ids=FUNCTIONALIZED)
def test_functionalize_with_another_transform_is_refused(backend, transform):
    with pytest.raises(NotImplementedError, match="functionalize cannot be combined"):
        transform(by_projection(backend))


@pytest.mark.parametrize("which", [0, 1], ids=["value", "tangent"])
def test_a_transform_leaves_the_graph_around_it(backend, which):
    """A tensor that the function closes over gets its gradient too."""
    x, one = ERROR.clone().requires_grad_(), torch.ones((), dtype=torch.float64)

    def gradient(f):
        return torch.autograd.grad(func.jvp(lambda a: f(x * a), (one,), (one,))[which], x)[0]

    close(gradient(by_projection(backend)), gradient(by_product))


def test_forward_over_reverse(backend):
    error = ERROR.clone().requires_grad_()

    def signals(error):
        return project(error, SIZES, backend=backend)

    checks = {"check_fwd_over_rev": True, "check_rev_over_rev": True}
    assert torch.autograd.gradgradcheck(signals, error, **checks)


@pytest.mark.parametrize("shape", [(3, 0, 10), (0, 2, 10)])
def test_vmap_of_nothing(backend, shape):
    signals = func.vmap(lambda error: project(error, SIZES, backend=backend))(torch.zeros(shape))
    assert [signal.shape for signal in signals] == [(*shape[:2], size) for size in SIZES]


ARGUMENTS = [{}, {"lean": True}, {"shared": False}]


def functional_loss(**arguments):
    """loss(parameters, x, y) of a DFA model, and its arguments."""
    model = perceptron(**arguments)

    def loss(parameters, x, y):
        return F.cross_entropy(func.functional_call(model, parameters, (x,)), y)

    return loss, (dict(model.named_parameters()), *batch())


def of_samples(loss, parameters, x, y):
    def of_one(parameters, x, y):
        return loss(parameters, x[None], y[None])

    return func.vmap(func.grad(of_one), in_dims=(None, 0, 0))(parameters, x, y)


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_functional_training_step(arguments):
    """The gradients of a functional call are autograd's; per-sample gradients average to them."""
    loss, inputs = functional_loss(**arguments)
    expected = backward(perceptron(**arguments), *inputs[1:])
    assert_equal(func.grad(loss)(*inputs).values(), expected)
    means = [gradient.mean(0) for gradient in of_samples(loss, *inputs).values()]
    assert_equal(means, expected, rtol=1e-4, atol=1e-6)


STEPS = {
    "grad": lambda loss, *inputs: func.grad(loss)(*inputs),
    "vjp": lambda loss, parameters, x, y: func.vjp(lambda p: loss(p, x, y), parameters)[1](
        torch.ones(())
    )[0],
    "jacrev": lambda loss, *inputs: func.jacrev(loss)(*inputs),
    "of samples": of_samples,
}
# Covers every step and every kind of model; the battery covers every pair.
COMPILED_STEPS = [
    pytest.param(step, arguments, marks=[pytest.mark.battery] * (i % len(ARGUMENTS) != j))
    for i, step in enumerate(STEPS)
    for j, arguments in enumerate(ARGUMENTS)
]


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("step", "arguments"), COMPILED_STEPS)
def test_compiled_functional_training_step(compiler, step, arguments):
    step = STEPS[step]
    loss, inputs = functional_loss(**arguments)
    compiled = compiler(lambda *inputs: step(loss, *inputs))
    if torch.__version__.startswith("2.10.") and step is not of_samples:
        # This version cannot compile the trainer's Functions under grad or vjp.
        with pytest.raises(torch._dynamo.exc.InternalTorchDynamoError, match="setup_context"):
            compiled(*inputs)
        return
    found = compiled(*inputs)
    expected = step(loss, *inputs)
    assert_equal(found.values(), expected.values(), rtol=1e-4, atol=1e-6)
    assert all(gradient.any() for gradient in expected.values())
