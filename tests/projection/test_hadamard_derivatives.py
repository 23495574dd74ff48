"""The structured projection's transpose and derivatives: bits, the explicit matrix, compilation."""

import pytest
import torch

from dfa_kernels import project
from tests import reference, samples
from tests.projection.test_hadamard import (
    OFFSETS,
    SCALES,
    SIZES,
    assert_same,
    signals_of,
)
from tests.projection.test_ops import OPCHECKS
from tests.samples import DTYPES, random_error

PLACES = [(1, 0), (1025, 0), (1500, 700), (1100, 2**34 - 1100)]  # (columns, column_offset)


def adjoint_of(target, signals, scales, columns, dtype, seed, row_offsets, column_offset):
    signals = [signal.to(target.device) for signal in signals]
    stream = (seed - 2**64 if seed >= 2**63 else seed, column_offset, "hadamard")
    return torch.ops.dfa_kernels.project_adjoint(
        signals, row_offsets, scales, *stream, columns, dtype, target.name
    ).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "column_offset"), PLACES)
def test_bits_of_the_transpose(structured, columns, column_offset, dtype):
    """Of signals of the error's dtype, and of fp32: rounded to the error's arithmetic at first."""
    where = {"seed": 2**64 - 3, "row_offsets": OFFSETS, "column_offset": column_offset}
    for given in (dtype, torch.float32, torch.float64):
        signals = [random_error(3, size, dtype=given, seed=i) for i, size in enumerate(SIZES)]
        exact = reference.structured_adjoint(signals, SCALES, columns, dtype, **where)
        found = adjoint_of(structured, signals, SCALES, columns, dtype, **where)
        assert_same([found], [reference.rounded(exact, dtype)])


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_batch_is_its_rows(structured, count):
    signals = [random_error(count, size, seed=i) for i, size in enumerate(SIZES)]
    where = {"seed": 1, "row_offsets": OFFSETS, "column_offset": 5}
    whole = adjoint_of(structured, signals, SCALES, 1030, torch.float32, **where)
    assert whole.shape == (count, 1030)
    for i in range(count):
        rows = [signal[i : i + 1] for signal in signals]
        one = adjoint_of(structured, rows, SCALES, 1030, torch.float32, **where)
        assert_same([whole[i : i + 1]], [one])


def test_layers_are_added_in_the_order_of_their_scales(structured):
    """Also if these are so small that, times 2^-10, two become equal."""
    signals = [torch.tensor([[value]], dtype=torch.float64) for value in (1e305, 3e289, 1e305)]
    small, large = 202_402 * 5e-324, 202_403 * 5e-324
    scales, where = [large, small, -small], {"row_offsets": [0] * 3, "column_offset": 0}
    found = adjoint_of(structured, signals, scales, 1, torch.float64, seed=0, **where)
    assert found.item() == float.fromhex("-0x1.44p-95")


def test_the_order_of_the_layers_and_the_threads_do_not_show(structured):
    signals = [random_error(7, size, seed=i) for i, size in enumerate(SIZES)]
    expected = reference.structured_adjoint(
        signals, SCALES, 1100, torch.float32, row_offsets=OFFSETS
    )
    before = torch.get_num_threads()
    try:
        for threads in range(1, 9):
            order = torch.randperm(len(SIZES)).tolist()
            torch.set_num_threads(threads)
            found = adjoint_of(
                structured,
                [signals[i] for i in order],
                [SCALES[i] for i in order],
                1100,
                torch.float32,
                seed=0,
                row_offsets=[OFFSETS[i] for i in order],
                column_offset=0,
            )
            assert_same([found], [torch.from_numpy(expected)])
    finally:
        torch.set_num_threads(before)


def test_the_gradient_is_the_product_with_the_explicit_matrix(structured):
    error = random_error(3, 1500, dtype=torch.float64, device=structured.device).requires_grad_()
    offsets, sizes, scales = [0, 900, 2**40], [1200, 300, 40], [0.5, -2.0, 1.0]
    signals = project(
        error,
        sizes,
        row_offsets=offsets,
        seed=9,
        normalization=scales,
        distribution="hadamard",
        column_offset=600,
        error_size=2100,
        backend=structured.name,
    )
    weights = [random_error(3, size, dtype=torch.float64, seed=size) for size in sizes]
    pairs = zip(signals, weights, strict=True)
    sum((signal.cpu() * weight).sum() for signal, weight in pairs).backward()
    expected = torch.zeros(3, 1500, dtype=torch.float64)
    for offset, size, scale, weight in zip(offsets, sizes, scales, weights, strict=True):
        u = reference.structured_matrix(size, 1500, seed=9, row_offset=offset, column_offset=600)
        expected += scale * weight @ torch.from_numpy(u)
    torch.testing.assert_close(error.grad.cpu(), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_bits_of_the_transpose(structured, dtype):
    """Through autograd, with strided and expanded gradients of the signals."""
    error = random_error(3, 1100, dtype=dtype, device=structured.device).requires_grad_()
    options = {"normalization": [0.5, 0.25], "distribution": "hadamard"}
    signals = project(error, [40, 1500], backend=structured.name, **options)
    given = [
        torch.ones((), dtype=dtype, device=structured.device).expand(3, 40),
        random_error(1500, 3, dtype=dtype, device=structured.device).T,
    ]
    (found,) = torch.autograd.grad(signals, error, given)
    expected = reference.structured_adjoint(given, [0.5, 0.25], 1100, dtype)
    assert_same([found.cpu()], [reference.rounded(expected, dtype)])


def test_gradcheck_to_the_second_order(structured):
    error = random_error(1, 3, dtype=torch.float64, device=structured.device).requires_grad_()

    def signals(error):
        options = {"row_offsets": [1022, 0, 1022], "column_offset": 1022, "error_size": 2000}
        options |= {"distribution": "hadamard", "seed": 3, "backend": structured.name}
        return tuple(project(error, [3, 2, 3], **options))

    assert torch.autograd.gradcheck(signals, error, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(signals, error, check_fwd_over_rev=True)


def test_tangents_and_mapped_calls_have_the_bits_of_the_projection(structured):
    """A tangent is projected itself, and mapped calls are one batch."""
    error, tangent = random_error(2, 3, 1100), random_error(2, 3, 1100, seed=1)

    def signals(error):
        return signals_of(error, [40, 1500], [1.0, 0.5], structured)

    values, tangents = torch.func.jvp(signals, (error,), (tangent,))
    assert_same(values, signals(error))
    assert_same(tangents, signals(tangent))
    assert_same(torch.func.vmap(signals)(error), signals(error))
    assert_same(torch.func.vmap(signals, in_dims=1, out_dims=1)(error), signals(error))


def test_compiled_equals_eager(structured):
    torch.compiler.reset()

    def step(error):
        options = {"distribution": "hadamard", "seed": 2**64 - 1, "backend": structured.name}
        signals = project(2 * error, [30, 1100, 30], **options)
        return [signal + 1 for signal in signals]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (3, 4, 9):  # from the second on, the batch size is symbolic
        error = random_error(count, 1030, device=structured.device).requires_grad_()
        both = step(error), compiled(error)
        assert_same(*both)
        gradients = [torch.autograd.grad(sum(s.sum() for s in one), error) for one in both]
        assert_same(*gradients)


def kernel(name, target):
    return getattr(getattr(torch.ops.dfa_kernels, name), target.name)


def test_opcheck(structured):
    """Of every operator that the distribution goes through."""
    project = torch.ops.dfa_kernels.project.default
    adjoint = torch.ops.dfa_kernels.project_adjoint.default
    for arguments in samples.project_samples(structured.device, "hadamard"):
        error, row_offsets, sizes, scales, *stream, _ = arguments
        ones = [torch.ones(len(error), size).to(error) for size in sizes]
        transposed = (row_offsets, scales, *stream, error.shape[1], error.dtype)
        calls = [
            (kernel("project", structured), arguments),
            (kernel("structured_adjoint", structured), (ones, *transposed)),
        ]
        first = ones[0].clone().requires_grad_()
        calls += [
            (project, (error.clone().requires_grad_(), *arguments[1:], structured.name)),
            (adjoint, ([first, *ones[1:]], *transposed, structured.name)),
        ]
        for operator, call in calls:
            torch.library.opcheck(operator, call, test_utils=OPCHECKS)
    for arguments in samples.feedback_matrix_samples(structured.device, "hadamard"):
        operator = kernel("feedback_matrix", structured)
        torch.library.opcheck(operator, arguments, test_utils=OPCHECKS)
