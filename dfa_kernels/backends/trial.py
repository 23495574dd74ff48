"""One check of a backend on a device, by `python -m dfa_kernels verify` in a process of its own.

A fault there harms only that process's CUDA context. Whatever happens is a result: wrong values, a
crash, a signal, the time limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dfa_kernels.stream import STRUCTURED

LIMIT = 600.0  # seconds that a check may take
_DYING = 10.0  # seconds that it may take to end once it is killed

# Signals that a process brings upon itself. Others come from outside.
_FAULTS = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")
_DEVICE_FAULT = re.compile("(CUDA|HIP) error")
# Messages that memory, a device or a module was missing. They say nothing of the kernels.
_SCARCE = re.compile(
    "out of memory|cannot allocate memory|bad_alloc|MemoryError|no space left|start new thread"
    "|resource temporarily unavailable|busy or unavailable|no CUDA-capable device"
    "|initialization error|system not (yet )?initialized|uncorrectable ECC"
    "|there is no (CUDA )?(device|GPU)|is not there|cannot be imported",
    re.IGNORECASE,
)


class Outcome(NamedTuple):
    """The outcome of a check.

    `lasting`: another check would have the same outcome. It might not if time ran out, the process
    was killed, or memory or the device was missing. `dense`: only checks of structured feedback
    failed, if any.
    """

    passed: bool
    reason: str
    lasting: bool
    dense: bool = False


def command(backend: str, device: torch.device, report: Path) -> list[str]:
    """The command that runs the check.

    It exits with 0 if all passed, else with 1, and writes a JSON object to `report`:
    {"passed": bool, "failures": [str, ...], ...}.
    """
    what = ["--backend", backend, "--device", str(device), "--json", str(report)]
    return [sys.executable, "-m", "dfa_kernels", "verify", *what]


def run(backend: str, device: torch.device) -> Outcome:
    """Check a backend on a device; takes `LIMIT` seconds at most."""
    if not sys.executable or getattr(sys, "frozen", False):
        reason = f"there is no Python to run it with (sys.executable is {sys.executable!r})"
        return Outcome(False, reason, lasting=False)
    try:
        with tempfile.TemporaryDirectory(prefix="dfa_kernels-", ignore_cleanup_errors=True) as name:
            return _run(backend, device, Path(name))
    except OSError as error:
        return Outcome(False, f"it could not be started: {error}", lasting=False)


def outcome_of(failures: list[str]) -> Outcome:
    """The outcome of a check that ran to its end. A failure begins with what was checked."""
    if not failures:
        return Outcome(True, "", lasting=True, dense=True)
    more = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
    lasting = not all(map(_SCARCE.search, failures))
    checked = [failure.partition(":")[0] for failure in failures]
    dense = all(any(name in what for name in STRUCTURED) for what in checked)
    return Outcome(False, failures[0] + more, lasting, dense)


def _run(backend: str, device: torch.device, folder: Path) -> Outcome:
    report, log = folder / "report.json", folder / "output"
    with log.open("wb") as output:  # not a pipe, which a child that outlives it may keep open
        process = subprocess.Popen(
            command(backend, device, report),
            cwd=folder,  # an empty folder, because -m imports modules from there first
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.returncode is None:  # not waited for yet, so the id is still its own
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it
                    process.wait(_DYING)
    said = log.read_text(errors="replace").splitlines()
    return _judge(status, load(report), "; ".join(line.strip() for line in said[-3:])[-500:])


def environment() -> dict[str, str]:
    """This process's environment, for a check that imports the same modules and starts no other."""
    paths = [os.path.abspath(path) for path in sys.path]
    package = str(Path(__file__).resolve().parents[2])
    if package not in map(os.path.realpath, paths):
        paths.insert(0, package)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "DFA_KERNELS_CHECK": "skip",
    }
    environment.pop("DFA_KERNELS_BACKEND", None)
    return environment


def load(path: Path) -> dict[str, Any]:
    """The report; empty if it is missing or incomplete."""
    with contextlib.suppress(OSError, ValueError):
        report = json.loads(path.read_text())
        if isinstance(report, dict):
            return report
    return {}


def _judge(status: int | None, report: dict[str, Any], said: str) -> Outcome:
    """The outcome of an exit status (None: out of time), a report and the last lines said."""
    passed, failures = report.get("passed"), [str(text) for text in report.get("failures") or ()]
    if (status, passed) in ((0, True), (1, False)) and passed is not bool(failures):
        return outcome_of(failures)
    last_lines = f"; it last said: {said}" if said else ""
    if status is None:
        return Outcome(False, f"it took longer than {LIMIT:g} s{last_lines}", lasting=False)
    number = -status if status < 0 else status - 128  # the latter if a shell ran it
    name = signal.Signals(number).name if number in set(signal.Signals) else None
    end = f"signal {name}" if name else f"exit status {status} and no result"
    fault = name in _FAULTS or _DEVICE_FAULT.search(said) is not None
    lasting = fault and not _SCARCE.search(said)
    return Outcome(False, f"it ended with {end}{last_lines}", lasting)
