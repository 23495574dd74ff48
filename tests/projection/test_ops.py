"""The operators: registration, compilation, autocast, and the choice of backend."""

import warnings

import pytest
import torch

import dfa_kernels
from dfa_kernels import feedback_matrix, project
from dfa_kernels.backends import cpp, registry
from dfa_kernels.backends import torch as definition
from tests import samples
from tests.conftest import COMPILER, needs

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.fixture
def fresh_compiler():
    """Compiled functions of other tests do not count towards this one's recompile limit."""
    torch.compiler.reset()


def kernel(name, backend):
    return getattr(getattr(torch.ops.dfa_kernels, name), backend)


def test_opcheck_project(target):
    for arguments in samples.project_samples(target.device):
        torch.library.opcheck(kernel("project", target.name), arguments, test_utils=OPCHECKS)


def test_opcheck_differentiable_project(target):
    for error, *arguments in samples.project_samples(target.device):
        for requires_grad in (False, True):
            error = error.detach().requires_grad_(requires_grad)
            torch.library.opcheck(
                torch.ops.dfa_kernels.project.default,
                (error, *arguments, target.name),
                test_utils=OPCHECKS,
            )


def test_opcheck_project_adjoint(target):
    for error, row_offsets, sizes, scales, *stream, _ in samples.project_samples(target.device):
        for requires_grad in (False, True):
            signals = [
                torch.ones(len(error), size, dtype=error.dtype, device=error.device)
                for size in sizes
            ]
            signals[0].requires_grad_(requires_grad)
            torch.library.opcheck(
                torch.ops.dfa_kernels.project_adjoint.default,
                (signals, row_offsets, scales, *stream, error.shape[1], error.dtype, target.name),
                test_utils=OPCHECKS,
            )


def test_opcheck_feedback_matrix(target):
    for arguments in samples.feedback_matrix_samples(target.device):
        torch.library.opcheck(
            kernel("feedback_matrix", target.name), arguments, test_utils=OPCHECKS
        )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiled_equals_eager(fresh_compiler, target, compiler, requires_grad):
    needs("a C++ compiler", compiler != "inductor" or COMPILER)

    def step(error):
        signals = project(2 * error, [30, 7, 30], seed=2**64 - 1, backend=target.name)
        return [signal + 1 for signal in signals]

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for count in (3, 4, 9):  # from the second on, the batch size is symbolic
        error = torch.randn(count, 10, device=target.device, requires_grad=requires_grad)
        eager, graph = step(error), compiled(error)
        for one, other in zip(eager, graph, strict=True):
            assert torch.equal(one, other)
        if requires_grad:
            gradients = [
                torch.autograd.grad(sum(s.sum() for s in x), error) for x in (eager, graph)
            ]
            torch.testing.assert_close(*gradients)


def test_compiled_normalization_may_change(fresh_compiler, target):
    compiled = torch.compile(
        lambda error, scale: project(error, [7], normalization=scale, backend=target.name),
        fullgraph=True,
        backend="aot_eager",
    )
    error = torch.randn(3, 10, device=target.device)
    for scale in (1.5, 2.5, -4.0):
        (expected,) = project(error, [7], normalization=scale, backend=target.name)
        assert torch.equal(compiled(error, scale)[0], expected)


def test_compiled_feedback_matrix_equals_eager(fresh_compiler, target):
    def matrix(like):
        return feedback_matrix(like.shape[0], 20, seed=3, device=like.device, backend=target.name)

    compiled = torch.compile(matrix, fullgraph=True, backend="aot_eager")
    for rows in (3, 5, 8):
        like = torch.empty(rows, device=target.device)
        assert torch.equal(compiled(like), matrix(like))


def test_compiled_feedback_matrix_takes_the_default_device(fresh_compiler):
    def matrix():
        return feedback_matrix(3, 20)

    compiled = torch.compile(matrix, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), matrix())
    with torch.device("meta"):
        assert matrix().device.type == "meta"


def test_compiled_batches_share_one_graph(fresh_compiler, target):
    """No batch size, and no change of it, makes a second symbolic graph."""
    compiled = torch.compile(
        lambda error: project(error, [30], backend=target.name), fullgraph=True, backend="aot_eager"
    )
    torch._dynamo.mark_dynamic(error := torch.randn(5, 10, device=target.device), 0)
    compiled(error)
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (7, 64, 1000):
            compiled(torch.randn(count, 10, device=target.device))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_that_of_a_matrix_product(target, dtype, requires_grad):
    error = torch.randn(3, 10, device=target.device, requires_grad=requires_grad)
    with torch.autocast(target.device, dtype=dtype):
        (signal,) = project(error, [20], backend=target.name)
        (wide,) = project(error.double(), [20], backend=target.name)
        (asked,) = project(error, [20], dtype=torch.float32, backend=target.name)
        product = error @ feedback_matrix(20, 10, device=target.device).T
    assert signal.dtype == product.dtype == dtype
    assert wide.dtype == torch.float64
    assert asked.dtype == torch.float32
    (expected,) = project(error.to(dtype), [20], backend=target.name)
    assert torch.equal(signal, expected)
    if requires_grad:
        (gradient,) = torch.autograd.grad(signal.sum(), error)
        (expected,) = torch.autograd.grad(project(error, [20])[0].sum(), error)
        torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.02)


def test_meta_tensors_have_shapes():
    (signal,) = project(torch.empty(2**20, 1000, device="meta"), [2**22])
    assert signal.shape == (2**20, 2**22)  # 2^42 elements


def test_an_unavailable_choice_raises_with_the_reason(monkeypatch):
    monkeypatch.setattr(definition, "unavailable", lambda device_type: "it is being tested")
    message = r"project: backend 'torch' cannot serve cpu: it is being tested"
    with pytest.raises(RuntimeError, match=message):
        project(torch.randn(2, 3), [4], backend="torch")


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("DFA_KERNELS_BACKEND", "torch")
    assert registry.choose("project", torch.device("cpu"), None) == "torch"
    monkeypatch.setenv("DFA_KERNELS_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"DFA_KERNELS_BACKEND must be one of .* got 'abacus'"):
        project(torch.randn(2, 3), [4])
    assert (
        registry.choose("project", torch.device("cpu"), "torch") == "torch"
    )  # the argument comes first
    monkeypatch.setenv("DFA_KERNELS_BACKEND", "")
    project(torch.randn(2, 3), [4])


def test_an_automatic_choice_falls_through_and_says_so_once(monkeypatch):
    class Broken:
        DEVICES, RANK, PROVEN = ("cpu",), 0, {}

        @staticmethod
        def unavailable(device_type):
            return f"no {device_type} today"

    monkeypatch.setattr(registry, "BACKENDS", {"torch": definition, "broken": Broken})
    monkeypatch.setattr(registry, "_chosen", {})
    monkeypatch.setattr(registry, "_said", {})
    with pytest.warns(RuntimeWarning, match="backend 'broken' cannot serve cpu: no cpu today"):
        assert registry.choose("project", torch.device("cpu"), None) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.choose("project", torch.device("cpu"), None) == "torch"


@pytest.mark.parametrize(
    "call", [lambda: project(torch.ones(2, 3), [4]), lambda: feedback_matrix(2, 3)]
)
def test_the_warning_is_of_the_users_line(monkeypatch, call):
    monkeypatch.delenv("DFA_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(cpp, "unavailable", lambda device_type: "not today")
    monkeypatch.setattr(registry, "_chosen", {})
    monkeypatch.setattr(registry, "_said", {})
    with pytest.warns(RuntimeWarning, match="backend 'cpp' cannot serve cpu: not today") as caught:
        call()
    assert [warning.filename for warning in caught] == [__file__]


def test_backends_report():
    report = {(status.name, status.device): status for status in dfa_kernels.backends()}
    assert report["torch", "cpu"].available
    for device in {status.device for status in report.values()}:
        automatic = [s for s in report.values() if s.device == device and s.automatic]
        assert len(automatic) == 1
        assert automatic[0].available
    for status in report.values():
        assert (status.reason is None) == status.available
