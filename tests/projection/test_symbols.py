"""One graph serves all sizes, errors, batches, offsets and seeds, with symbols for them."""

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from dfa_kernels import feedback_matrix, project
from dfa_kernels.layers import Layers, symbolic


@pytest.fixture
def counted():
    """Compiles whole functions, and counts the graphs."""
    torch.compiler.reset()

    def compiled(function, dynamic):
        counter = CompileCounterWithBackend("aot_eager")
        return torch.compile(function, backend=counter, dynamic=dynamic, fullgraph=True), counter

    yield compiled
    torch.compiler.reset()


def by_size(error, i, **options):
    return project(error, [7 + 3 * i, 30, 31, 30, 7 + 3 * i], **options)


# What changes with i, from 1 on: a function of (error, i), and the error's shape.
VARIED = {
    "batch": (lambda error, i: project(error, [7, 30, 7]), lambda i: (2 + i, 10)),
    "error's size": (lambda error, i: project(error, [7, 30, 7]), lambda i: (2, 8 + 3 * i)),
    "sizes": (by_size, lambda i: (2, 10)),
    "seed": (lambda error, i: project(error, [7], seed=i), lambda i: (2, 10)),
    "offsets": (
        lambda error, i: project(
            error, [7, 30], row_offsets=[i, 5 * i], column_offset=i, error_size=12 + i
        ),
        lambda i: (2, 10),
    ),
    "all": (lambda error, i: by_size(error, i, seed=i), lambda i: (2 + i, i + 1, 8 + 3 * i)),
    "shared": (lambda error, i: by_size(error, i, normalization="shared"), lambda i: (2, 9 + i)),
    "one scale": (lambda error, i: by_size(error, i, normalization=0.25), lambda i: (2, 9 + i)),
    "structured": (
        lambda error, i: by_size(error, i, seed=i, distribution="hadamard"),
        lambda i: (2 + i, 8 + 3 * i),
    ),
    "matrix": (
        lambda error, i: [feedback_matrix(2 + i, 10 + i, seed=i, row_offset=3 * i)],
        lambda i: (2, 10),
    ),
}


# The battery covers every pair.
PAIRS = [
    pytest.param(
        *varied,
        dynamic,
        requires_grad,
        marks=[pytest.mark.battery] * (dynamic is not (i % 2 == 0) or requires_grad is not dynamic),
        id=f"{name}-{'dynamic' if dynamic else 'automatic'}{'-gradient' * requires_grad}",
    )
    for i, (name, varied) in enumerate(VARIED.items())
    for dynamic in (False, True)
    for requires_grad in (False, True)
]


@pytest.mark.parametrize(("function", "shape", "dynamic", "requires_grad"), PAIRS)
def test_one_graph_serves_all(counted, function, shape, dynamic, requires_grad):
    compiled, counter = counted(function, dynamic or None)
    for i in range(1, 6):
        error = torch.randn(shape(i), requires_grad=requires_grad)
        found, expected = compiled(error, i), function(error, i)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))
        if found[0].requires_grad:
            pair = (torch.autograd.grad(sum(s.sum() for s in x), error) for x in (found, expected))
            torch.testing.assert_close(*pair)
    assert counter.frame_count == (1 if dynamic else 2)  # the first of 2 has all numbers in it


@pytest.mark.parametrize("dynamic", [None, True])
def test_seeds_beyond_int64_are_no_graphs_of_their_own(counted, dynamic):
    compiled, counter = counted(lambda error, seed: project(error, [7], seed=seed), dynamic)
    error = torch.randn(2, 10)
    for seed in (1, 2, 2**63 - 1, 2**63, 2**64 - 1, 2**63 + 7, 2**64 - 9, 3):
        assert torch.equal(compiled(error, seed)[0], project(error, [7], seed=seed)[0])
    assert counter.frame_count <= 3  # one for each half of the seeds


def test_equal_symbolic_layers_share_a_signal(counted):
    compiled, _ = counted(by_size, True)
    one, two, _, again, last = compiled(torch.randn(2, 10), 4)
    assert one is last
    assert two is again


def test_autocast_and_symbols(counted):
    compiled, counter = counted(lambda error: project(error, [7, 30]), True)
    for n in (9, 12, 15):
        error = torch.randn(2, n)
        with torch.autocast("cpu"):
            found, expected = compiled(error), project(error, [7, 30])
        assert found[0].dtype == torch.bfloat16
        assert all(map(torch.equal, found, expected))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_traced_with_symbols():
    def signals(error):
        return project(error, [7, error.shape[0], 7], seed=3)

    graph = make_fx(signals, tracing_mode="symbolic")(torch.randn(3, 10))
    error = torch.randn(5, 12)
    assert all(map(torch.equal, graph(error), signals(error)))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_symbols(strict):
    class Signals(torch.nn.Module):
        def forward(self, error):
            return project(error, [7, 30, 7], seed=3)

    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("n", max=1000)}
    exported = torch.export.export(
        Signals(), (torch.randn(3, 10),), dynamic_shapes=(dims,), strict=strict
    )
    torch.export.save(exported, file := io.BytesIO())
    file.seek(0)
    error = torch.randn(5, 12)
    found = torch.export.load(file).module()(error)
    assert all(map(torch.equal, found, Signals()(error)))


def test_values_are_no_symbols():
    assert not symbolic([1, 2.0])
    layers, places = Layers.distinct([0, 1, 0], [3, 3, 3], [0.5, 0.5, 0.5])
    assert layers == ((0, 1), (3, 3), (0.5, 0.5))
    assert places == [0, 1, 0]
