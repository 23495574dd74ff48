"""Operators work after nothing but `import dfa_kernels`: their first call loads the extension.

Each call runs in a process that has loaded none: a child of one that has imported the package.
"""

import pickle
import subprocess
import sys

import pytest
import torch

from dfa_kernels import feedback_matrix, project
from tests.conftest import COMPILER, ON_CPU, needs

PARENT = """
import io, os, pickle, sys, torch, dfa_kernels
operators = torch.ops.dfa_kernels
assert "dfa_kernels._C" not in sys.modules
for line in sys.stdin:
    if os.fork() == 0:
        try:
            exec(bytes.fromhex(line).decode())
        except Exception as error:
            print(f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def fresh():
    """Runs a program in a fresh process; what it prints."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PARENT], **pipes) as process:

        def run(program):
            print(program.encode().hex(), file=process.stdin, flush=True)
            return process.stdout.readline().rstrip()

        yield run


@pytest.fixture
def compiled_kernels():
    needs("the compiled extension", "cpp" in ON_CPU)


LAYER = "[0], [4], [1.0], 0, 0, 'normal', None"
PACKED = "torch.tensor([0, 0, 0, 0, 4, 4607182418800017408])"  # the last: bits of 1.0
ADJOINT = "[0], [1.0], 0, 0, 'hadamard', 3, torch.float32"
MATRIX = "2, 3, 0, 0, 0, 'normal', torch.float32"
CALLS = {
    f"project.cpp(torch.ones(2, 3), {LAYER})[0].shape": "torch.Size([2, 4])",
    f"project_packed.cpp(torch.ones(2, 3), {PACKED}, None)[0].shape": "torch.Size([2, 4])",
    f"structured_adjoint.cpp([torch.ones(2, 4)], {ADJOINT}).shape": "torch.Size([2, 3])",
    f"feedback_matrix.cpp({MATRIX}, torch.device('cpu')).shape": "torch.Size([2, 3])",
    "cpu_isa(None) != ''": "True",
    "pool_bytes()": "[0, 0]",
    "empty_pool()": "0",
    "fill_signals(True)": "False",
}


@pytest.mark.parametrize(("call", "printed"), CALLS.items(), ids=[c.split("(")[0] for c in CALLS])
def test_the_first_call_loads_the_extension(fresh, compiled_kernels, call, printed):
    assert fresh(f"print(operators.{call}, flush=True)") == printed


@pytest.mark.parametrize("call", CALLS, ids=[c.split("(")[0] for c in CALLS])
def test_without_the_extension_the_reason_is_said(fresh, call):
    found = fresh(f"sys.modules['dfa_kernels._C'] = None; operators.{call}")
    function = call.split("(")[0].removesuffix(".cpp")
    begin = f"RuntimeError: {function}: backend 'cpp' cannot serve cpu: the compiled extension is"
    assert found.startswith(begin)


REFUSED = {
    f"project.cpp(torch.eye(3).to_sparse(), {LAYER})": (
        "TypeError: project: error must be a strided tensor, got torch.sparse_coo"
    ),
    f"structured_adjoint.cpp([torch.eye(3).to_sparse()], {ADJOINT})": (
        "TypeError: structured_adjoint: signals[0] must be a strided tensor, got torch.sparse_coo"
    ),
    f"project_packed.cpp(torch.ones(2, 3, device='meta'), {PACKED}, None)": (
        "RuntimeError: project_packed: backend 'cpp' cannot serve meta: it serves the CPU only"
    ),
    f"project.cuda(torch.ones(2, 3), {LAYER})": (
        "RuntimeError: cuda_fused: backend 'cuda' cannot serve cpu: it serves CUDA devices only"
    ),
    f"cuda_fused(torch.ones(2, 3), {LAYER}, 1, -1, 0)": (
        "RuntimeError: cuda_fused: backend 'cuda' cannot serve cpu: it serves CUDA devices only"
    ),
    f"cuda_structured(torch.ones(2, 3), {LAYER}, 0)": (
        "RuntimeError: cuda_structured: backend 'cuda' cannot serve cpu: it serves CUDA devices"
    ),
    f"cuda_structured_adjoint([torch.ones(2, 3)], {ADJOINT})": (
        "RuntimeError: cuda_structured_adjoint: backend 'cuda' cannot serve cpu: it serves CUDA"
    ),
}


@pytest.mark.parametrize(
    ("call", "message"), REFUSED.items(), ids=[c.split("(")[0] for c in REFUSED]
)
def test_what_the_backend_cannot_serve_is_refused(fresh, compiled_kernels, call, message):
    assert fresh(f"operators.{call}").startswith(message)


@pytest.mark.parametrize("call", [f"cuda_entries({MATRIX}, torch.device('cuda'), False)"])
def test_cuda_operators_say_what_is_missing(fresh, call):
    hidden = "sys.modules['dfa_kernels._CUDA'] = None; "
    message = "RuntimeError: cuda_entries: backend 'cuda' cannot serve cuda: the compiled CUDA"
    assert fresh(f"{hidden}operators.{call}").startswith(message)


@pytest.mark.parametrize("call", [f"project.triton(torch.ones(2, 3), {LAYER})"])
def test_triton_says_what_is_missing(fresh, call):
    hidden = "sys.modules['dfa_kernels.backends.triton.projection'] = None; "
    message = "RuntimeError: dfa_kernels: backend 'triton' cannot serve cpu: "
    assert fresh(f"{hidden}operators.{call}").startswith(message)


class Signals(torch.nn.Module):
    def forward(self, error):
        (signal,) = project(2 * error, [7], seed=3)
        return signal @ feedback_matrix(7, 2)


ERROR = torch.randn(3, 10)


def saved(tmp_path, value):
    torch.save(value, tmp_path / "value.pt")
    return f"torch.load({str(tmp_path / 'value.pt')!r})"


def test_an_exported_program(fresh, tmp_path):
    file = str(tmp_path / "signals.pt2")
    torch.export.save(torch.export.export(Signals(), (ERROR,)), file)
    pair = saved(tmp_path, (ERROR, Signals()(ERROR)))
    program = f"error, expected = {pair}; found = torch.export.load({file!r}).module()(error)"
    assert fresh(f"{program}; print(torch.equal(found, expected), flush=True)") == "True"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_compiled_package(fresh, tmp_path):
    needs("a C++ compiler", COMPILER)
    file = str(tmp_path / "signals.pt2")
    exported = torch.export.export(Signals(), (ERROR,))
    torch._inductor.aoti_compile_and_package(exported, package_path=file)
    pair = saved(tmp_path, (ERROR, Signals()(ERROR)))
    program = (
        f"error, expected = {pair}; found = torch._inductor.aoti_load_package({file!r})(error)"
    )
    end = "; torch.testing.assert_close(found, expected); print('close', flush=True)"
    assert fresh(program + end) == "close"


def test_a_symbolic_trace(fresh, tmp_path):
    """It holds one call of `project`, and is pickled."""
    graph = torch.fx.symbolic_trace(lambda error: project(error, [7, error.shape[0]], seed=3)[0])
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count(project) == 1
    (expected,) = project(ERROR, [7], seed=3)
    assert torch.equal(graph(ERROR), expected)
    pair, made = saved(tmp_path, (ERROR, expected)), pickle.dumps(graph)
    program = f"error, expected = {pair}; found = pickle.loads({made!r})(error)"
    assert fresh(f"{program}; print(torch.equal(found, expected), flush=True)") == "True"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
class TestTorchScript:
    @pytest.mark.parametrize("distribution", ["normal", "hadamard"])
    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_a_trace_keeps_the_backend(self, backend, distribution, requires_grad):
        """And any batch, with its gradient."""

        def signals(error):
            return project(error, [7, 5], distribution=distribution, backend=backend)

        error = torch.randn(2, 3, 10, requires_grad=requires_grad)
        traced = torch.jit.trace(signals, (error,))
        (node,) = traced.graph.findAllNodes("dfa_kernels::project")
        assert [*node.inputs()][-1].toIValue() == backend
        other = torch.randn(4, 1, 10, requires_grad=requires_grad)
        found, expected = traced(other), signals(other)
        assert all(map(torch.equal, found, expected))
        if requires_grad:
            sums = (sum(signal.sum() for signal in x) for x in (found, expected))
            torch.testing.assert_close(*(torch.autograd.grad(x, other)[0] for x in sums))

    def test_a_trace_of_a_matrix_is_refused(self):
        with pytest.raises(
            NotImplementedError, match=r"feedback_matrix: .* make the matrix outside"
        ):
            torch.jit.trace(lambda error: error @ feedback_matrix(10, 3), (ERROR,))
