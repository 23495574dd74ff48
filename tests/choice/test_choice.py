"""What an automatic choice takes when backends are checked before their first use."""

import copy
import importlib
import logging
import pickle
import re

import pytest
import torch

import dfa_kernels
from dfa_kernels import cli, feedback_matrix, ops, project, stream
from dfa_kernels.backends import cpp, registry, verdicts
from dfa_kernels.layers import Layers
from dfa_kernels.stream import Stream
from tests.choice.made_up_gpus import GPUS, PASSED, WRONG, Machine, choose
from tests.conftest import needs


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def test_what_passes_serves_and_is_checked_once(machine, caplog):
    assert choose() == choose() == ("cuda", [])
    machine.restart()
    assert choose() == ("cuda", [])
    assert machine.checked() == [("cuda", "cuda:0")]
    (said,) = caplog.messages
    assert "checking backend 'cuda' on Z100 (cuda:0)" in said
    assert "at most 600 s" in said
    assert caplog.records[0].levelno == logging.WARNING


def test_what_fails_is_passed_over_with_one_warning(machine):
    machine.check = WRONG
    name, (cuda, triton) = choose()
    assert name == "torch"
    assert "backend 'cuda' failed its check on" in cuda
    assert "bits, and 1 more. On Z100, 'torch' serves in its place" in cuda
    assert "python -m dfa_kernels verify --backend cuda --device cuda:0" in cuda
    assert "backend 'triton' failed its check" in triton
    assert choose() == choose(GPUS[1]) == ("torch", [])  # the second GPU is of the same kind
    machine.restart()
    assert choose()[1] == [cuda, triton]
    assert machine.checked() == [("cuda", "cuda:0"), ("triton", "cuda:0")]


def test_the_next_in_the_order_serves(machine):
    machine.check = f"if backend == 'triton':\n    {PASSED}\nelse:\n    {WRONG}"
    name, (message,) = choose()
    assert name == "triton"
    assert "'triton' serves in its place" in message


# --- what a backend makes ---


def without(monkeypatch, backend, distribution="hadamard"):
    """The backend makes every distribution but this one; its device type is served as before."""
    others = [name for name in stream.DISTRIBUTIONS if name != distribution]
    monkeypatch.setattr(registry.BACKENDS[backend], "DISTRIBUTIONS", others)


def no_hadamard(backend, *, device="cuda"):
    reason = "it does not make the distribution 'hadamard'"
    return f"dfa_kernels: backend {backend!r} cannot serve {device}: {reason}"


def test_a_backend_without_the_distribution_is_passed_over_with_one_warning(machine, monkeypatch):
    """No check is started for it, and it serves the other distributions."""
    machine.by_distribution("cuda", "triton")
    without(monkeypatch, "cuda"), without(monkeypatch, "triton")
    found = choose(distribution="hadamard")
    assert found == ("torch", [no_hadamard("cuda"), no_hadamard("triton")])
    assert machine.checks() == []
    assert choose(distribution="hadamard") == choose(GPUS[1], "hadamard") == ("torch", [])
    assert choose() == ("cuda", [])


def test_the_next_backend_with_the_distribution_serves(machine, monkeypatch):
    machine.by_distribution("cuda", "triton")
    without(monkeypatch, "cuda")
    monkeypatch.setattr(registry.BACKENDS["triton"], "DISTRIBUTIONS", stream.DISTRIBUTIONS)
    assert choose(distribution="hadamard") == ("triton", [no_hadamard("cuda")])
    assert machine.checked() == [("triton", "cuda:0")]
    assert choose() == ("cuda", [])


@pytest.mark.parametrize("function", ["project", "feedback_matrix", "project_adjoint"])
def test_a_backend_without_the_distribution_is_refused(machine, monkeypatch, function):
    machine.by_distribution("cuda", "triton")
    for name in ("cuda", "triton"):
        without(monkeypatch, name)
        message = f"{function}: backend {name!r} cannot serve cuda: it does not make the distr"
        with pytest.raises(RuntimeError, match=message):
            registry.choose(function, GPUS[0], name, "hadamard")
        monkeypatch.setenv("DFA_KERNELS_BACKEND", name)
        with pytest.raises(RuntimeError, match=f"DFA_KERNELS_BACKEND {name!r} cannot serve cuda"):
            registry.choose(function, GPUS[0], None, "hadamard")
        assert registry.choose(function, GPUS[0], None) == name
        monkeypatch.delenv("DFA_KERNELS_BACKEND")


def test_public_functions_refuse_and_pass_over_it(machine, monkeypatch):
    """On the CPU, where they run; the warning is of the user's line."""
    needs("backend cpp", cpp.unavailable("cpu") is None)
    machine.by_distribution("cpp")
    without(monkeypatch, "cpp")
    error = torch.randn(2, 10)
    calls = [
        lambda **options: project(error, [30], **options)[0],
        lambda **options: feedback_matrix(30, 10, **options),
    ]
    expected = [call(distribution="hadamard", backend="torch") for call in calls]
    for call in calls:
        with pytest.raises(RuntimeError, match="cpu: it does not make the distribution 'hadamard'"):
            call(distribution="hadamard", backend="cpp")
    with pytest.warns(RuntimeWarning) as caught:
        found = [call(distribution="hadamard") for call in calls]
    assert [(w.filename, str(w.message)) for w in caught] == [
        (__file__, no_hadamard("cpp", device="cpu"))
    ]
    assert all(map(torch.equal, found, expected))


# --- what is asked for ---


def gpu_here(monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda", 0)
    )
    monkeypatch.setattr(
        registry, "_indexed", lambda device: GPUS[0] if device.type == "cuda" else device
    )


def test_another_value_is_refused(machine, monkeypatch, capsys):
    monkeypatch.setenv("DFA_KERNELS_CHECK", "maybe")
    message = "DFA_KERNELS_CHECK must be one of 'skip', 'force', 'again' or unset, got 'maybe'"
    with pytest.raises(ValueError, match=message):
        registry.choose("project", GPUS[0], None)
    assert registry.choose("project", GPUS[0], "cuda") == "cuda"  # needs no check
    gpu_here(monkeypatch)
    with pytest.raises(ValueError, match=message):
        dfa_kernels.backends()
    assert cli.main(["info"]) == 1
    assert message in capsys.readouterr().out
    assert machine.checks() == []


# --- graphs ---


def test_while_a_cuda_graph_is_captured_nothing_is_checked(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    name, (message,) = choose()
    assert name == "torch"
    assert "backend 'cuda' is not checked yet, and cannot be while a CUDA graph" in message
    assert "Call it once before" in message
    assert choose() == ("torch", [])
    assert machine.checks() == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose() == ("cuda", [])
    machine.restart()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == ("cuda", [])
    assert len(machine.checks()) == 1


def test_a_capture_on_a_proven_gpu_takes_its_kernels(machine, monkeypatch):
    machine.proves()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == ("cuda", [])
    assert machine.checks() == []


@pytest.fixture
def checked_cpu(machine, monkeypatch):
    """Makes the CPU's kernels need a check, as a GPU's do."""
    needs("backend cpp", cpp.unavailable("cpu") is None)
    machine.kinds[torch.device("cpu")] = verdicts.Facts("CPU", (1, 0), "0")
    machine.works("torch", "cpp")
    monkeypatch.setattr(cpp, "PROVEN", {})
    torch._dynamo.reset()
    yield machine
    torch._dynamo.reset()


class Recorder:
    """A compiler that runs graphs unchanged and records them."""

    def __init__(self, machine):
        self.machine, self.graphs, self.checks = machine, [], []

    def __call__(self, graph, inputs):
        self.graphs.append(graph.code)
        self.checks.append(len(self.machine.checks()))
        return graph.forward

    def operators(self):
        return sorted(set(re.findall(r"dfa_kernels\.(\w+\.\w+)", "".join(self.graphs))))


def project_once(error):
    return project(2 * error, [30, 7])


def by(backend, error):
    return project(2 * error, [30, 7], backend=backend)


def equal(found, expected):
    return all(map(torch.equal, found, expected))


def test_a_traced_graph_chooses_when_it_runs(checked_cpu):
    error = torch.randn(40, 1000)
    assert not equal(by("cpp", error), by("torch", error))  # they round differently
    recorder = Recorder(checked_cpu)
    compiled = torch.compile(project_once, fullgraph=True, backend=recorder)
    for _ in range(2):
        assert equal(compiled(error), by("cpp", error))
    assert recorder.operators() == ["project.default"]
    assert recorder.checks == [0]
    assert checked_cpu.checked() == [("cpp", "cpu")]


def test_a_traced_graph_holds_what_is_known(checked_cpu):
    verdicts.obtain("cpp", torch.device("cpu"))
    checked_cpu.restart()
    recorder = Recorder(checked_cpu)
    compiled = torch.compile(project_once, fullgraph=True, backend=recorder)
    compiled(torch.randn(4, 10))
    assert recorder.operators() == ["project.cpp"]
    assert len(checked_cpu.checks()) == 1


def test_a_traced_graph_falls_back_when_it_runs(checked_cpu):
    checked_cpu.check = WRONG
    error = torch.randn(40, 1000)
    compiled = torch.compile(project_once, fullgraph=True, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="'torch' serves in its place"):
        found = compiled(error)
    assert equal(found, by("torch", error))


def test_gradients_of_a_traced_graph(checked_cpu):
    error = torch.randn(4, 10, requires_grad=True)
    compiled = torch.compile(project_once, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(sum(s.sum() for s in compiled(error)), error)
    (expected,) = torch.autograd.grad(sum(s.sum() for s in by("cpp", error)), error)
    torch.testing.assert_close(found, expected)
    assert len(checked_cpu.checks()) == 1


def in_graph(error):
    """The call in a graph that was traced before the check."""
    layers = Layers((0, 0), (30, 7), ((30 * 10) ** -0.5, (7 * 10) ** -0.5))
    return ops.project(2 * error, layers, Stream(0, 0, "normal"), None, "")


@pytest.mark.parametrize("compiled", [False, True])
def test_transforms_of_a_traced_call(checked_cpu, compiled):
    error, tangent = torch.randn(2, 4, 10)
    call = torch.compile(project_once, backend="aot_eager") if compiled else in_graph
    found = torch.func.jvp(lambda x: call(x)[0], (error,), (tangent,))
    torch.testing.assert_close(found, (by("cpp", error)[0], by("cpp", tangent)[0]))
    (gradient,) = torch.func.vjp(lambda x: call(x)[0], error)[1](torch.ones(4, 30))
    (expected,) = torch.func.vjp(lambda x: by("cpp", x)[0], error)[1](torch.ones(4, 30))
    torch.testing.assert_close(gradient, expected)
    assert len(checked_cpu.checks()) == 1


def test_a_traced_matrix_is_torchs(checked_cpu):
    recorder = Recorder(checked_cpu)
    compiled = torch.compile(
        lambda: feedback_matrix(5, 20, seed=3), fullgraph=True, backend=recorder
    )
    assert torch.equal(compiled(), feedback_matrix(5, 20, seed=3, backend="cpp"))
    assert recorder.operators() == ["feedback_matrix.torch"]
    assert checked_cpu.checks() == []


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_chooses_when_it_runs(checked_cpu, strict):
    class Projection(torch.nn.Module):
        def forward(self, error):
            return project_once(error)

    error = torch.randn(4, 10)
    program = torch.export.export(Projection(), (error,), strict=strict)
    assert checked_cpu.checks() == []
    assert equal(program.module()(error), by("cpp", error))
    assert len(checked_cpu.checks()) == 1


def test_an_empty_name_is_none_of_a_backend():
    with pytest.raises(ValueError, match=r"backend must be one of .* got ''"):
        project(torch.randn(2, 3), [4], backend="")


# --- what is shown ---


def shown(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:10].strip(): line[20:] for line in lines if line[10:20].strip() == "cuda"}


def test_info_shows_what_is_known(machine, monkeypatch, capsys):
    gpu_here(monkeypatch)
    assert shown(capsys) == {
        "torch": "available when asked for",
        "cpp": "not today",
        "cuda": "not checked yet; will be at its first use",
        "triton": "not checked yet; available when asked for",
    }
    assert machine.checks() == []
    monkeypatch.setattr(verdicts, "now", lambda: 1e9)
    registry.keep_check("cuda", GPUS[0], ["bits"], 3.0)
    registry.keep_check("triton", GPUS[0], [], 14.4)
    machine.restart()
    found = shown(capsys)
    assert re.fullmatch(
        r"failed its check on 2001-09-0\d: bits; available when asked for", found["cuda"]
    )
    assert re.fullmatch(r"checked on 2001-09-0\d in 14 s: chosen automatically", found["triton"])
    statuses = {s.name: s for s in dfa_kernels.backends() if s.device == "cuda"}
    assert [name for name, status in statuses.items() if status.automatic] == ["triton"]
    monkeypatch.setenv("DFA_KERNELS_CHECK", "skip")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "DFA_KERNELS_CHECK=skip: kernels for GPUs serve unchecked" in text
    assert re.search("^cuda +cuda +available, chosen automatically$", text, re.MULTILINE)
    assert machine.checks() == []


def test_info_on_a_proven_gpu_knows_of_no_check(machine, monkeypatch, capsys):
    gpu_here(monkeypatch)
    machine.proves()
    found = shown(capsys)
    assert found["cuda"] == "available, chosen automatically"
    assert found["triton"] == "available when asked for"
    monkeypatch.setattr(registry.BACKENDS["cuda"], "PROVEN", {(9, 0): tuple(stream.DENSE)})
    to_come = "not checked yet for hadamard; will be at its first use"
    assert shown(capsys)["cuda"] == to_come
    monkeypatch.setenv("DFA_KERNELS_CHECK", "force")
    assert shown(capsys)["cuda"] == "not checked yet; will be at its first use"


# --- the registry ---


def test_a_backend_is_a_module_of_its_name():
    for name, backend in registry.BACKENDS.items():
        assert importlib.import_module(f"dfa_kernels.backends.{name}") is backend
        assert {"cpu", "cuda", "xpu", "mps"} >= {*backend.DEVICES}
        extension = {"cpp": "dfa_kernels._C"}.get(name)
        for operator in ("project", "feedback_matrix"):
            assert hasattr(backend, operator) == (extension is None), operator


def test_the_package_of_backends_is_a_module_and_lists_them():
    import dfa_kernels.backends.triton as triton  # no function hides its name

    assert triton is registry.BACKENDS["triton"]
    assert dfa_kernels.backends() == registry.backends()
    assert copy.deepcopy(dfa_kernels.backends) is dfa_kernels.backends
    assert pickle.loads(pickle.dumps(dfa_kernels.backends)) is dfa_kernels.backends


def test_ranks_are_the_order_of_the_choice(monkeypatch):
    assert registry._preferred("cpu") == ["cpp"]
    assert registry._preferred("xpu") == []
    monkeypatch.setattr(registry.BACKENDS["cuda"], "DEVICES", ("cuda",))
    assert registry._preferred("cuda") == ["cuda", "triton"]
    monkeypatch.setattr(registry.BACKENDS["cuda"], "RANK", 2)
    assert registry._preferred("cuda") == ["triton", "cuda"]
