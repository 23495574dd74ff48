"""Results of checks: what they apply to, what is kept of them, and which process runs a check."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

import dfa_kernels
from dfa_kernels import stream
from dfa_kernels.backends import registry, trial, triton, verdicts
from tests.choice.made_up_gpus import GPUS, H100, NEW, PASSED, WRONG, Machine, choose, fault


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


# --- what is kept ---


def change(machine, part):
    if part == "torch":
        machine.monkeypatch.setattr(torch, "__version__", "9.0")
    elif part == "triton":
        machine.monkeypatch.setattr(verdicts, "triton_version", lambda: "9.0")
    elif part == "kernels":
        machine.monkeypatch.setattr(verdicts, "kernels", lambda backend: "others")
    else:
        machine.kinds[GPUS[0]] = NEW._replace(**{part: "another"})


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("part", ["name", "capability", "driver", "torch", "triton", "kernels"])
def test_a_result_is_of_what_was_checked(machine, backend, part):
    machine.works("torch", backend)
    before, _ = choose()
    change(machine, part)
    machine.restart()
    after, _ = choose()
    assert before == after == backend
    again = (backend, part) != ("cuda", "triton")
    assert len(machine.checks()) == 1 + again


def test_gpus_of_two_kinds_have_results_of_their_own(machine):
    machine.kinds[GPUS[1]] = NEW._replace(name="Z200", capability=(99, 1))
    machine.works("torch", "cuda")
    assert choose(GPUS[0]) == ("cuda", [])
    machine.check = WRONG
    assert choose(GPUS[1])[0] == "torch"
    assert choose(GPUS[0]) == ("cuda", [])
    assert machine.checked() == [("cuda", "cuda:0"), ("cuda", "cuda:1")]


def test_a_gpu_without_an_index_is_the_current_one(machine, monkeypatch):
    machine.kinds[GPUS[1]] = NEW._replace(name="Z200", capability=(99, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in (1, 0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        assert choose(torch.device("cuda")) == ("cuda", [])
    assert machine.checked() == [("cuda", "cuda:1"), ("cuda", "cuda:0")]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_kernels_are_known_by_their_files(tmp_path, monkeypatch, backend):
    package = Path(dfa_kernels.__file__).parent
    for name in ("layers.py", "stream.py", "backends"):
        (shutil.copytree if name == "backends" else shutil.copy)(package / name, tmp_path / name)
    extension = tmp_path / "_CUDA.so"
    extension.write_bytes(b"one")
    stub = types.SimpleNamespace(__file__=str(extension))
    monkeypatch.setitem(sys.modules, "dfa_kernels._CUDA", stub)
    monkeypatch.setattr(verdicts, "__file__", str(tmp_path / "backends" / "verdicts.py"))

    def fresh():
        return verdicts.kernels.__wrapped__(backend)

    before = fresh()
    assert fresh() == before
    extension.write_bytes(b"two")
    assert (fresh() != before) == (backend == "cuda")
    before = fresh()
    for name in ("layers.py", "stream.py", "backends/triton/kernels.py"):
        with (tmp_path / name).open("a") as file:
            file.write("# changed\n")
        changed = fresh()
        assert changed != before
        before = changed


def test_what_could_not_be_found_out_is_kept_for_a_day(machine, monkeypatch):
    machine.works("torch", "cuda")
    monkeypatch.setattr(verdicts, "now", lambda: 1e9)
    machine.check = "exit('CUDA out of memory')"
    name, (message,) = choose()
    assert name == "torch"
    assert "backend 'cuda' could not be checked on 2001-09-0" in message
    assert "will try it again" in message
    monkeypatch.setattr(verdicts, "now", lambda: 1e9 + 86_399)
    assert choose() == ("torch", [])
    machine.restart()
    assert choose() == ("torch", [message])
    assert len(machine.checks()) == 1
    monkeypatch.setattr(verdicts, "now", lambda: 1e9 + 86_401)
    assert choose() == ("torch", [])  # a process keeps its choice
    machine.restart()
    machine.check = PASSED
    assert choose() == ("cuda", [])
    monkeypatch.setattr(verdicts, "now", lambda: 1e9 + 86_400 * 10_000)
    machine.restart()
    assert choose() == ("cuda", [])
    assert len(machine.checks()) == 2


def test_a_fault_is_kept(machine, monkeypatch):
    machine.works("torch", "cuda")
    machine.check = fault("SIGSEGV")
    assert choose()[0] == "torch"
    monkeypatch.setattr(verdicts, "now", lambda: 4e9)
    machine.restart()
    assert choose()[0] == "torch"
    assert len(machine.checks()) == 1


@pytest.mark.parametrize(
    "damage", ["", '{"key": ', "[]", "{}", '{"passed": true}', '"passed"', "\x00"]
)
def test_a_damaged_result_does_not_count(machine, damage):
    choose()
    (name,) = machine.files()
    (machine.cache / name).write_text(damage)
    machine.restart()
    assert choose() == ("cuda", [])
    assert len(machine.checks()) == 2
    machine.restart()
    assert choose() == ("cuda", [])
    assert len(machine.checks()) == 2


def test_another_result_under_this_name_does_not_count(machine):
    choose()
    (name,) = machine.files()
    stored = json.loads((machine.cache / name).read_text())
    assert stored["key"]["device"] == "Z100"
    stored["key"]["device"] = "Z200"
    (machine.cache / name).write_text(json.dumps(stored))
    machine.restart()
    choose()
    assert len(machine.checks()) == 2


def test_where_results_are_kept(machine, monkeypatch, tmp_path):
    monkeypatch.delenv("DFA_KERNELS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    choose()
    assert list((tmp_path / "xdg" / "dfa_kernels").glob("cuda-*.json"))
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    machine.restart()
    choose()
    assert list((tmp_path / "home" / ".cache" / "dfa_kernels").glob("cuda-*.json"))
    assert len(machine.checks()) == 2


def private(machine):
    return machine.temporary / f"dfa_kernels-{os.getuid()}"


def test_without_a_home_a_private_temporary_folder_serves(machine):
    machine.cache.write_text("in the way")
    choose()
    machine.restart()
    choose()
    assert len(machine.checks()) == 1
    assert private(machine).stat().st_mode & 0o777 == 0o700
    assert list(private(machine).glob("cuda-*.json"))


@pytest.mark.parametrize("wrong", ["open to others", "another's", "a link", "a file"])
def test_without_any_folder_this_process_remembers(machine, wrong, tmp_path, monkeypatch, caplog):
    machine.cache.write_text("in the way")
    folder = private(machine)
    if wrong == "a file":
        folder.write_text("in the way")
    elif wrong == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777 if wrong == "open to others" else 0o700)
        if wrong == "another's":
            another = os.getuid() + 1
            monkeypatch.setattr(os, "getuid", lambda: another)
            folder.rename(private(machine))
    assert choose() == choose() == choose(GPUS[1]) == ("cuda", [])
    assert len(machine.checks()) == 1
    assert "is not kept: there is no folder for it" in caplog.text
    machine.restart()
    choose()
    assert len(machine.checks()) == 2


def test_a_disk_that_fills_up_is_said(machine, monkeypatch, caplog):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert choose() == ("cuda", [])
    assert "is not kept: [Errno 28]" in caplog.text
    assert machine.files() == []


def test_a_check_by_hand_is_kept(machine):
    machine.works("torch", "cuda")
    registry.keep_check("cuda", GPUS[0], ["bits"], 3.0)
    name, (message,) = choose()
    assert name == "torch"
    assert "bits" in message
    machine.restart()
    registry.keep_check("cuda", GPUS[0], [], 3.0)
    assert choose() == ("cuda", [])
    machine.restart()
    registry.keep_check("cuda", GPUS[0], ["out of memory"], 3.0)  # says less than the kept result
    assert choose() == ("cuda", [])
    machine.monkeypatch.setenv("DFA_KERNELS_CHECK", "skip")
    registry.keep_check("cuda", GPUS[0], ["bits"], 3.0)
    machine.monkeypatch.delenv("DFA_KERNELS_CHECK")
    machine.restart()
    assert choose() == ("cuda", [])
    count = len(machine.files())
    registry.keep_check("torch", GPUS[0], ["bits"], 3.0)  # serves without a check, as does cpp
    registry.keep_check("cpp", torch.device("cpu"), ["bits"], 3.0)
    assert len(machine.files()) == count == 1
    assert machine.checks() == []


# --- one at a time ---


@pytest.mark.parametrize("folder", [True, False])
def test_two_threads_run_one_check(machine, folder):
    if not folder:
        machine.cache.write_text("in the way")
        private(machine).write_text("in the way")
    barrier, found = threading.Barrier(4), []

    def run():
        barrier.wait()
        found.append(verdicts.obtain("cuda", GPUS[0]))

    threads = [threading.Thread(target=run) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 4
    assert set(found) == {found[0]}
    assert len(machine.checks()) == 1


def test_a_forked_process_does_not_wait_for_threads_it_lacks(machine, monkeypatch):
    lock = verdicts._locks.setdefault(os.getpid(), threading.Lock())
    child, found = os.getpid() + 1, []
    with lock:
        monkeypatch.setattr(os, "getpid", lambda: child)
        run = threading.Thread(
            target=lambda: found.append(verdicts.obtain("cuda", GPUS[0])), daemon=True
        )
        run.start()
        run.join(60)
        assert found
        assert found[0].passed


OTHER = """
import sys, time
sys.path[:0] = {path!r}
import torch
from dfa_kernels.backends import trial, verdicts
verdicts.facts = lambda device: verdicts.Facts(*{facts!r})
verdicts.kernels = lambda backend: f"kernels of {{backend}}"
trial.command = lambda backend, device, report: [sys.executable, "-c", {check!r}, str(report)]
print(verdicts.obtain("cuda", torch.device("cuda", 0)).passed)
"""


@pytest.fixture
def other(machine, tmp_path):
    """Another process in the middle of its check, which ends once the file `go` exists."""
    begun, go = tmp_path / "begun", tmp_path / "go"
    check = f"""
import json, os, sys, time
report = sys.argv[1]
open({str(begun)!r}, "w")
while not os.path.exists({str(go)!r}):
    time.sleep(0.05)
{PASSED}
"""
    path = [str(Path(dfa_kernels.__file__).parent.parent)]
    code = OTHER.format(path=path, facts=tuple(NEW), check=check)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.go = go
    yield process
    go.touch()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("mode", ["", "again"])
def test_two_processes_run_one_check(machine, other, monkeypatch, caplog, mode):
    real = verdicts._wait_for

    def wait_for(lock):
        other.go.touch()
        real(lock)

    monkeypatch.setenv("DFA_KERNELS_CHECK", mode)
    monkeypatch.setattr(verdicts, "_wait_for", wait_for)
    assert choose() == ("cuda", [])
    assert machine.checks() == []
    assert "waiting for the check that another process is making" in caplog.text
    assert other.stdout.read() == "True\n"


def test_waiting_ends(machine, other, monkeypatch):
    machine.works("torch", "cuda")
    monkeypatch.setattr(trial, "LIMIT", 0.5)
    monkeypatch.setattr(verdicts, "_PATIENCE", 0.5)
    name, (message,) = choose()
    assert name == "torch"
    assert "another process has been checking it for 1 s" in message
    assert machine.checks() == []
    assert machine.files() == []


# --- what is asked for ---


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_proven_kernels_serve_unchecked(machine, backend):
    machine.proves()
    machine.works("torch", backend)
    machine.check = WRONG
    assert choose(GPUS[0]) == (backend, [])
    assert machine.checks() == []
    assert choose(GPUS[1])[0] == "torch"
    assert machine.checked() == [(backend, "cuda:1")]


def test_kernels_proven_for_some_distributions_are_checked_for_the_others(machine, monkeypatch):
    machine.proves()
    machine.by_distribution("torch", "triton")
    monkeypatch.setattr(triton, "PROVEN", {H100.capability: tuple(stream.DENSE)})
    monkeypatch.setattr(triton, "DISTRIBUTIONS", stream.DISTRIBUTIONS)
    for distribution in stream.DENSE:
        assert choose(distribution=distribution) == ("triton", [])
    assert machine.checks() == []
    assert choose(distribution="hadamard") == ("triton", [])
    assert machine.checked() == [("triton", "cuda:0")]
    registry.keep_check("triton", GPUS[0], ["bits"], 1.0)
    machine.restart()
    assert choose(distribution="hadamard")[0] == "torch"
    assert choose() == ("triton", [])


def test_a_fault_in_structured_feedback_leaves_the_dense_kernels(machine):
    machine.by_distribution("torch", "triton")
    faults = ["entries, hadamard: wrong", "signals and transposes, hadamard, float32: off"]
    machine.check = WRONG.replace('["bits", "sums"]', str(faults))
    for _ in range(2):  # from the check, and from what is kept of it
        assert choose() == ("triton", [])
        name, (warning,) = choose(distribution="hadamard")
        assert name == "torch"
        assert "failed its check of structured feedback on" in warning
        machine.restart()
    assert machine.checked() == [("triton", "cuda:0")]
    for wrong in (["entries, normal: wrong", faults[0]], ["the rest: not checked: hadamard"]):
        registry.keep_check("triton", GPUS[0], wrong, 1.0)
        machine.restart()
        assert choose()[0] == choose(distribution="hadamard")[0] == "torch"


def test_skip(machine, monkeypatch):
    machine.check = WRONG
    choose()
    count = len(machine.checks())
    machine.restart()
    monkeypatch.setenv("DFA_KERNELS_CHECK", "skip")
    assert choose() == ("cuda", [])
    assert len(machine.checks()) == count


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_force(machine, monkeypatch, backend):
    machine.proves()
    machine.works("torch", backend)
    monkeypatch.setenv("DFA_KERNELS_CHECK", "force")
    for _ in range(2):
        assert choose() == (backend, [])
        assert machine.checked() == [(backend, "cuda:0")]
        machine.restart()


def test_again(machine, monkeypatch):
    machine.works("torch", "cuda")
    assert choose() == ("cuda", [])
    monkeypatch.setenv("DFA_KERNELS_CHECK", "again")
    machine.restart()
    machine.check = WRONG
    assert choose()[0] == "torch"
    assert choose(GPUS[1])[0] == "torch"  # once per process
    assert len(machine.checks()) == 2
    monkeypatch.delenv("DFA_KERNELS_CHECK")
    machine.restart()
    assert choose()[0] == "torch"
    assert len(machine.checks()) == 2


def test_what_a_real_gpu_is(gpu_backend):
    device = torch.device("cuda", torch.cuda.current_device())
    name, capability, driver = verdicts.facts(device)
    assert name == torch.cuda.get_device_name(device)
    assert torch.version.hip or capability == torch.cuda.get_device_capability(device)
    assert driver
    assert len(verdicts.kernels(gpu_backend)) == 64
