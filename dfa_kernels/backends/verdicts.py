"""Results of correctness checks of GPU backends on this machine, kept on disk.

On a kind of GPU where it has not been proven, a backend is checked before an automatic choice takes
it; see `trial`. The result holds for one kind of device, driver, torch, Triton and the kernels
themselves. If one of them changes, the backend is checked again. The result is kept in the first of
these folders that can be written, else in this process alone:

    $DFA_KERNELS_CACHE, else $XDG_CACHE_HOME/dfa_kernels, else ~/.cache/dfa_kernels
    dfa_kernels-UID in the folder for temporary files

A check that ran out of time or memory is tried again after a day.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import hashlib
import importlib
import json
import logging
import os
import platform
import stat
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import torch

from dfa_kernels.backends import trial
from dfa_kernels.stream import DENSE

# Values of DFA_KERNELS_CHECK.
MODES = {
    "skip": "kernels for GPUs serve unchecked",
    "force": "even kernels that are proven on a GPU like this are checked before they serve",
    "again": "kernels for GPUs are checked again, once in every process",
}

_DAY = 86_400.0
_POLL = 0.2  # seconds between looks at whether another process's check is done
_PATIENCE = 60.0  # seconds to wait for it beyond its limit

_log = logging.getLogger("dfa_kernels")
_remembered: dict[str, Verdict] = {}  # by the name of its file
_locks: dict[int, threading.Lock] = {}  # by process, because a fork inherits them as they are
now = time.time


class Facts(NamedTuple):
    """A kind of device: its name, compute capability (its architecture on ROCm) and driver."""

    name: str
    capability: tuple[int, int] | str
    driver: str


class Verdict(NamedTuple):
    """The outcome of a check (see `trial.Outcome`), the seconds it took and when it was done."""

    passed: bool
    reason: str
    lasting: bool
    dense: bool
    seconds: float
    checked: float

    def covers(self, distribution: str) -> bool:
        """Whether the backend may serve a distribution."""
        return self.passed or (self.dense and distribution in DENSE)

    def describe(self) -> str:
        """When the check was and how it ended."""
        day = datetime.date.fromtimestamp(self.checked).isoformat()
        if self.passed:
            return f"checked on {day} in {self.seconds:.0f} s"
        if self.lasting:
            of = " of structured feedback" if self.dense else ""
            return f"failed its check{of} on {day}: {self.reason}"
        return f"could not be checked on {day}: {self.reason}"


def trusted(proven: Collection[object], device: torch.device) -> bool:
    """Whether a backend that is `proven` on some compute capabilities serves a GPU unchecked.

    Raises ValueError for an unknown value of DFA_KERNELS_CHECK.
    """
    mode = _mode()
    return mode == "skip" or (not mode and facts(device).capability in proven)


def known(backend: str, device: torch.device) -> Verdict | None:
    """The result for a backend on a device (with its index), or None; starts no check."""
    name, key = _entry(backend, device)
    if name not in _remembered and _mode() != "again":
        stored = _read(name, key)
        if stored is not None:
            _remembered[name] = stored
    return _remembered.get(name)


def obtain(backend: str, device: torch.device) -> Verdict:
    """The result, from a check if there is none yet. Threads and processes check one at a time."""
    with _locks.setdefault(os.getpid(), threading.Lock()):
        verdict = known(backend, device)
        if verdict is None:
            name, key = _entry(backend, device)
            verdict = _remembered[name] = _check(backend, device, name, key)
        return verdict


def keep(backend: str, device: torch.device, failures: list[str], seconds: float) -> None:
    """Keep the result of a check that was made by hand."""
    name, key = _entry(backend, device)
    with _turn(name) as folder:
        _store(folder, name, key, Verdict(*trial.outcome_of(failures), seconds, now()))


def complaint(backend: str, device: torch.device, verdict: Verdict, instead: str) -> str:
    """The warning for a user whose automatic choice passes over a backend that failed its check."""
    again = (
        "" if verdict.lasting else " A process that starts a day later or more will try it again."
    )
    return (
        f"dfa_kernels: backend {backend!r} {verdict.describe()}. On {facts(device).name}, "
        f"{instead!r} serves in its place.{again} To see more, run `python -m dfa_kernels verify "
        f"--backend {backend} --device {device}`; DFA_KERNELS_CHECK=again checks it again, and "
        f"DFA_KERNELS_CHECK=skip or backend={backend!r} takes it as it is"
    )


def facts(device: torch.device) -> Facts:
    """The kind of a device."""
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Facts(
        properties.name, properties.gcnArchName if torch.version.hip else capability, _driver()
    )


def _driver() -> str:
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError, IndexError):
            return Path(path).read_text().splitlines()[0]
    with contextlib.suppress(OSError, AttributeError):  # under WSL
        version = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        return f"for CUDA {version.value}"
    return f"of {platform.release()}"  # amdgpu is part of the kernel


def _mode() -> str:
    mode = os.environ.get("DFA_KERNELS_CHECK", "")
    if mode and mode not in MODES:
        raise ValueError(
            f"dfa_kernels: DFA_KERNELS_CHECK must be one of {', '.join(map(repr, MODES))} or "
            f"unset, got {mode!r}"
        )
    return mode


# --- what a result holds for ---


def _entry(backend: str, device: torch.device) -> tuple[str, dict[str, str]]:
    """The name of a result's file, and what the result holds for."""
    device_name, capability, driver = facts(device)
    key = {
        "backend": backend,
        "device": device_name,
        "capability": str(capability),
        "driver": driver,
        "torch": torch.__version__,
        "kernels": kernels(backend),
    }
    if backend == "triton":
        key["triton"] = triton_version()
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return f"{backend}-{digest[:16]}", key


def triton_version() -> str:
    """The version of the Triton that is imported."""
    return importlib.import_module("triton").__version__


@functools.cache
def kernels(backend: str) -> str:
    """A hash of all the code that a backend computes with."""
    root = Path(__file__).parents[1]
    files = [root / "layers.py", root / "stream.py", *sorted((root / "backends").rglob("*.py"))]
    if backend == "cuda":
        files.append(Path(str(importlib.import_module("dfa_kernels._CUDA").__file__)))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- the check, and its result on disk ---


def _check(backend: str, device: torch.device, name: str, key: dict[str, str]) -> Verdict:
    arrived, start = now(), time.monotonic()
    try:
        with _turn(name) as folder:
            # Another process may have checked it meanwhile.
            stored = _read(name, key, since=arrived if _mode() == "again" else 0.0)
            if stored is not None:
                return stored
            _log.warning(
                "dfa_kernels: checking backend %r on %s (%s) before its first use there; "
                "this takes at most %g s, once",
                backend,
                key["device"],
                device,
                trial.LIMIT,
            )
            start = time.monotonic()
            outcome = trial.run(backend, device)
            verdict = Verdict(*outcome, time.monotonic() - start, now())
            _store(folder, name, key, verdict)
            return verdict
    except TimeoutError as error:
        return Verdict(False, str(error), False, False, time.monotonic() - start, now())


@contextlib.contextmanager
def _turn(name: str) -> Iterator[Path | None]:
    """The folder for a result, while no other process checks the same; None if there is none.

    Raises TimeoutError if another process takes longer than it may.
    """
    for folder in _folders(make=True):
        with contextlib.ExitStack() as held:
            try:
                lock = held.enter_context(open(folder / f"{name}.lock", "ab"))
                locked = _lock(lock)
            except OSError:  # the folder cannot be written, or has no locks
                continue
            if not locked:
                _wait_for(lock)
            held.callback(_unlock, lock)
            yield folder
            return
    yield None


def _lock(file: IO[bytes]) -> bool:
    import fcntl  # not on every system, and needed only here

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for(lock: IO[bytes]) -> None:
    _log.warning("dfa_kernels: waiting for the check that another process is making")
    patience = trial.LIMIT + _PATIENCE
    deadline = time.monotonic() + patience
    while not _lock(lock):
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has been checking it for {patience:g} s")
        time.sleep(_POLL)


def _unlock(lock: IO[bytes]) -> None:
    """Unlock explicitly, because a process forked meanwhile may hold the file open for longer."""
    import fcntl

    fcntl.flock(lock, fcntl.LOCK_UN)


def _folders(make: bool = False) -> Iterator[Path]:
    """The folders to look for results in, in turn. With `make`, made if that can be."""
    chosen = os.environ.get("DFA_KERNELS_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # its specification says to ignore those
        caches = os.path.expanduser("~/.cache")
    folder = Path(os.path.abspath(chosen) if chosen else os.path.join(caches, "dfa_kernels"))
    if folder.is_absolute():  # there may be no home
        if make:
            with contextlib.suppress(OSError):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield folder
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir(), f"dfa_kernels-{os.getuid()}")
        if make:
            folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        private = state.st_uid == os.getuid() and not state.st_mode & 0o077
        if stat.S_ISDIR(state.st_mode) and private:
            yield folder


def _read(name: str, key: dict[str, str], since: float = 0.0) -> Verdict | None:
    """The newest result that still holds and is no older than `since`."""
    found = []
    for folder in _folders():
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            stored = json.loads((folder / f"{name}.json").read_text())
            if stored.pop("key", None) != key:
                continue
            verdict = Verdict(**stored)
            holds = verdict.lasting or abs(now() - verdict.checked) < _DAY
            if holds and verdict.checked >= since:
                found.append(verdict)
    return max(found, key=lambda verdict: verdict.checked, default=None)


def _store(folder: Path | None, name: str, key: dict[str, str], verdict: Verdict) -> None:
    """Write a result, whole or not at all. One that may change replaces no lasting one."""
    stored = _read(name, key)
    if stored is not None and stored.lasting and not verdict.lasting:
        return
    try:
        if folder is None:
            raise OSError("there is no folder for it; DFA_KERNELS_CACHE names one")
        part = folder / f"{name}.part"
        part.write_text(json.dumps({"key": key, **verdict._asdict()}, indent=1))
        part.replace(folder / f"{name}.json")
    except OSError as error:
        _log.warning("dfa_kernels: the result of the check is not kept: %s", error)
