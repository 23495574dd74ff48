"""torch.func's transforms and forward-mode derivatives, of the projection and of a training step,
against those of a product with the materialised matrix, and against autograd's."""

import math

import pytest
import torch
import torch.nn.functional as F
from networks import assert_equal, backward, batch, perceptron
from torch import func

from dfa_kernels import feedback_matrix, project

SIZES = (7, 5)
ERROR = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TANGENT = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_projection(backend):
    return lambda error: summary(project(error, SIZES, backend=backend))


def by_product(error):
    matrix = feedback_matrix(max(SIZES), 10, dtype=torch.float64)
    return summary([error @ matrix[:size].T / math.sqrt(10 * size) for size in SIZES])


def summary(signals):
    """A scalar with derivatives of every order."""
    return signals[0].pow(3).sum() + signals[1].sin().sum()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


TRANSFORMS = {
    "grad": lambda f: func.grad(f)(ERROR),
    "vjp": lambda f: func.vjp(f, ERROR)[1](torch.tensor(2.0, dtype=torch.float64))[0],
    "jvp": lambda f: func.jvp(f, (ERROR,), (TANGENT,))[1],
    "grad of jvp": lambda f: func.grad(lambda e: func.jvp(f, (e,), (TANGENT,))[1])(ERROR),
    "jvp of grad": lambda f: func.jvp(func.grad(f), (ERROR,), (TANGENT,))[1],
    "jacrev": lambda f: func.jacrev(f)(ERROR),
    "jacfwd": lambda f: func.jacfwd(f)(ERROR),
    "hessian": lambda f: func.hessian(f)(ERROR),
    "vmap": lambda f: func.vmap(f)(ERROR),
    "vmap along another dimension": lambda f: func.vmap(f, in_dims=1)(ERROR.T),
    "vmap of vmap": lambda f: func.vmap(func.vmap(f))(torch.stack([ERROR, TANGENT])),
    "vmap of grad": lambda f: func.vmap(func.grad(f))(ERROR),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_the_projection(backend, transform):
    close(transform(by_projection(backend)), transform(by_product))


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_compiled_transforms(transform):
    """Right, in the graph or by a call left out of it, which a whole graph refuses."""
    torch.compiler.reset()
    expected = transform(by_product)
    compiled = torch.compile(lambda: transform(by_projection("torch")), backend="aot_eager")
    close(compiled(), expected)
    torch.compiler.reset()
    whole = torch.compile(
        lambda: transform(by_projection("torch")), backend="aot_eager", fullgraph=True
    )
    try:
        found = whole()
    except torch._dynamo.exc.Unsupported as refusal:
        if "a projection in forward mode or under vmap cannot be compiled" not in str(refusal):
            raise
    else:
        close(found, expected)


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
@pytest.mark.parametrize("name", ["grad", "vjp", "jacrev"])
def test_reverse_mode_is_compiled_whole(name):
    torch.compiler.reset()
    transform = TRANSFORMS[name]
    whole = torch.compile(
        lambda: transform(by_projection("torch")), backend="aot_eager", fullgraph=True
    )
    close(whole(), transform(by_product))


def test_functionalize_with_another_transform_is_refused():
    message = "project: torch.func.functionalize cannot be combined with .*, got Grad around Funct"
    f = func.functionalize(by_projection("torch"))
    with pytest.raises(NotImplementedError, match=message):
        func.grad(f)(ERROR)


def test_functionalized_calls_are_operators(backend):
    f = by_projection(backend)
    close(func.functionalize(f)(ERROR), f(ERROR))


@pytest.mark.parametrize("which", [0, 1], ids=["value", "tangent"])
def test_a_transform_leaves_the_graph_around_it(backend, which):
    """What the function closes over gets its gradient too."""
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


@pytest.mark.parametrize("arguments", [{}, {"lean": True}, {"shared": False}])
def test_functional_training_step(arguments):
    """The gradients of a functional call are autograd's; those of samples average to them."""
    x, y = batch()
    model = perceptron(**arguments)
    expected = backward(model, x, y)
    parameters = dict(model.named_parameters())

    def loss(parameters, x, y):
        return F.cross_entropy(func.functional_call(model, parameters, (x,)), y)

    assert_equal(func.grad(loss)(parameters, x, y).values(), expected)

    def loss_of_one(parameters, x, y):
        return loss(parameters, x[None], y[None])

    of_samples = func.vmap(func.grad(loss_of_one), in_dims=(None, 0, 0))(parameters, x, y)
    means = [gradient.mean(0) for gradient in of_samples.values()]
    assert_equal(means, expected, rtol=1e-4, atol=1e-6)
