"""The outcome of a check, however it ends."""

import fcntl
import os
import sys
import time
from pathlib import Path

import pytest

import dfa_kernels
from dfa_kernels.backends import trial
from tests.choice.made_up_gpus import GPUS, PASSED, WRONG, Machine, fault


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def outcome(machine, check):
    machine.check = check
    return trial.run("cuda", GPUS[0])


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_fault_lasts(machine, name):
    found = outcome(machine, fault(name))
    assert found == (False, f"it ended with signal {name}; it last said: before", True, False)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_being_killed_does_not_last(machine, name):
    found = outcome(machine, fault(name))
    assert found == (False, f"it ended with signal {name}; it last said: before", False, False)


def test_a_fault_under_a_shell_is_known(machine):
    assert "signal SIGSEGV" in outcome(machine, "exit(139)").reason


@pytest.mark.parametrize(
    ("check", "reason", "lasting"),
    [
        (WRONG, "bits, and 1 more", True),
        (WRONG.replace("sums", "out of memory"), "bits, and 1 more", True),
        (
            WRONG.replace("bits", "CUDA out of memory").replace("sums", "cannot allocate memory"),
            "CUDA out of memory, and 1 more",
            False,
        ),
        (
            WRONG.replace('["bits", "sums"]', "[]"),
            "it ended with exit status 1 and no result",
            False,
        ),
        ("pass", "it ended with exit status 0 and no result", False),
        (WRONG.replace("exit(1)", "exit(0)"), "it ended with exit status 0 and no result", False),
        (PASSED + "; exit(1)", "it ended with exit status 1 and no result", False),
        ('open(report, "w").write("[1, ")', "it ended with exit status 0 and no result", False),
        ('open(report, "w").write("[1]")', "it ended with exit status 0 and no result", False),
        (
            'exit("RuntimeError: CUDA error: an illegal memory access was encountered")',
            "exit status 1 and no result; it last said: RuntimeError: CUDA error: an illegal",
            True,
        ),
        (
            'exit("CUDA error: all CUDA-capable devices are busy or unavailable")',
            "exit status 1 and no result; it last said: CUDA error: all CUDA-capable",
            False,
        ),
        ("raise SystemExit(3)", "it ended with exit status 3 and no result", False),
    ],
)
def test_outcomes(machine, check, reason, lasting):
    found = outcome(machine, check)
    assert not found.passed
    assert reason in found.reason
    assert found.lasting == lasting


def test_the_last_lines_are_the_reason(machine):
    found = outcome(machine, "[print(i) for i in range(9)]; print('é' * 1000, end=''); exit(2)")
    assert found.reason.endswith("é" * 100)
    assert len(found.reason) < 700


def test_out_of_time(machine, monkeypatch, tmp_path):
    """The whole process group is ended, so a child that holds a lock releases it."""
    held = tmp_path / "held"
    monkeypatch.setattr(trial, "LIMIT", 2.0)
    found = outcome(
        machine,
        f"""
import fcntl, subprocess
file = open({str(held)!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("sleeping", flush=True)
subprocess.run(["sleep", "60"], pass_fds=[file.fileno()])
""",
    )
    assert found.reason.startswith("it took longer than 2 s")
    assert not found.lasting
    with held.open("a") as file:
        for _ in range(100):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            pytest.fail("the child lives on")


def test_without_a_python(machine, monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    assert "there is no Python to run it with" in trial.run("cuda", GPUS[0]).reason
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    found = trial.run("cuda", GPUS[0])
    assert "it could not be started: " in found.reason
    assert not found.lasting
    assert machine.checks() == []


def test_the_environment_of_a_check(machine, monkeypatch):
    monkeypatch.setenv("DFA_KERNELS_BACKEND", "torch")
    monkeypatch.setenv("KEPT", "yes")
    monkeypatch.syspath_prepend("relative")
    assert outcome(machine, PASSED).passed
    ((_, _, environment, folder, path),) = machine.checks()
    assert "DFA_KERNELS_BACKEND" not in environment
    assert environment["DFA_KERNELS_CHECK"] == "skip"
    assert environment["KEPT"] == "yes"
    assert Path(folder) != Path.cwd()
    assert not Path(folder).exists()
    assert str(Path("relative").absolute()) in path
    assert any((Path(entry) / "dfa_kernels" / "ops.py").exists() for entry in path)


def test_a_check_imports_this_package_from_anywhere(machine, monkeypatch):
    root = str(Path(dfa_kernels.__file__).parent.parent)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if os.path.realpath(p or ".") != root])
    found = outcome(
        machine,
        f"""
import importlib.util
assert importlib.util.find_spec("dfa_kernels").origin == {dfa_kernels.__file__!r}
{PASSED}
""",
    )
    assert found.passed, found.reason


def test_the_command(monkeypatch, tmp_path):
    command = trial.command("triton", GPUS[1], tmp_path / "report")
    assert command[:4] == [sys.executable, "-m", "dfa_kernels", "verify"]
    assert command[4:] == [
        *("--backend", "triton", "--device", "cuda:1", "--json"),
        str(tmp_path / "report"),
    ]
