"""The backends, what each can serve, and which one serves a call.

A backend is a module of this folder with its name in `BACKENDS`. It states:

    DEVICES   device types on which an automatic choice may take it
    RANK      its place in that choice, lowest first
    DISTRIBUTIONS   of U, those that it makes
    PROVEN    where all tests of which distributions have run, by "cpu", or the compute capability
              of a GPU, such as (9, 0). Elsewhere the backend is checked before an automatic choice
              takes it; see `verdicts`
    TAGS      tags of its operator
    unavailable(device_type)    why it cannot serve a device type, or None

It either registers its kernels for `project.<name>` and `feedback_matrix.<name>` itself, as an
extension does when it is loaded, or has functions that `ops` registers:

    project(error, layers, stream, dtype)
    feedback_matrix(rows, columns, row_offset, stream, dtype, device)
    structured_adjoint(signals, layers, stream, columns, dtype)     of structured distributions

For `verify` it may have `ways(error, distribution)`, which gives every way a projection can go, by
name, and `modes()`, which puts the whole backend into each of its modes in turn.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from dfa_kernels.backends import cpp, cuda, triton, verdicts
from dfa_kernels.backends import torch as definition


class Backend(Protocol):
    """What every backend's module has. The module's docstring adds what it may have."""

    @property
    def DEVICES(self) -> Collection[str]:  # noqa: D102
        ...

    @property
    def RANK(self) -> int:  # noqa: D102
        ...

    @property
    def PROVEN(self) -> Mapping[Any, Collection[str]]:  # noqa: D102
        ...

    @property
    def DISTRIBUTIONS(self) -> Collection[str]:  # noqa: D102
        ...

    @property
    def TAGS(self) -> Collection[torch.Tag]:  # noqa: D102
        ...

    def unavailable(self, device_type: str) -> str | None:  # noqa: D102
        ...


BACKENDS: dict[str, Backend] = {
    "torch": definition,
    "cpp": cpp,
    "cuda": cuda,
    "triton": triton,
}
_LAST = "torch"  # it serves where no other does


class BackendStatus(NamedTuple):
    """One backend on one device type: whether it can serve, and why not.

    `automatic`: an automatic choice takes it, or will if it passes a check that is still to come.
    `check`: what is known of its check on the current device of that type, and since when, or None
    if it needs none. `reason`: why it cannot serve, or None.
    """

    name: str
    device: str
    available: bool
    automatic: bool
    check: str | None
    reason: str | None


def unavailable(name: str, device_type: str, distribution: str | None = None) -> str | None:
    """Why a backend cannot serve a device type, and a distribution if one is given, or None."""
    backend = BACKENDS[name]
    reason = backend.unavailable(device_type)
    if reason is None and distribution is not None and distribution not in backend.DISTRIBUTIONS:
        return f"it does not make the distribution {distribution!r}"
    return reason


def _preferred(device_type: str) -> list[str]:
    """The backends that an automatic choice may take on a device type, the preferred first."""
    names = [name for name, backend in BACKENDS.items() if device_type in backend.DEVICES]
    return sorted(names, key=lambda name: BACKENDS[name].RANK)


def _wants_check(name: str, device: torch.device, distribution: str = "normal") -> bool:
    """Whether an automatic choice takes a backend only if it passes a check."""
    backend = BACKENDS[name]
    proven = [where for where, made in backend.PROVEN.items() if distribution in made]
    if device.type not in backend.DEVICES or device.type in proven:
        return False
    return not verdicts.trusted(proven, device)


def _first(
    device: torch.device,
    verdict_of: Callable[[str, torch.device], verdicts.Verdict | None],
    distribution: str | None = None,
) -> tuple[str, bool, dict[str, str | verdicts.Verdict]]:
    """The first backend that can serve, whether its check is to come, and why those before cannot.

    The check is to come if `verdict_of` gives None.
    """
    against: dict[str, str | verdicts.Verdict] = {}
    for name in _preferred(device.type):
        reason = unavailable(name, device.type, distribution)
        if reason is not None:
            against[name] = reason
            continue
        if not _wants_check(name, device, distribution or "normal"):
            return name, False, against
        verdict = verdict_of(name, device)
        if verdict is None or verdict.covers(distribution or "normal"):
            return name, verdict is None, against
        against[name] = verdict
    return _LAST, False, against


_chosen: dict[tuple[torch.device, str], str] = {}
_said: dict[object, object] = {}


def _warn(fact: object, message: str) -> None:
    """Warn once about each fact, across devices, calls and threads."""
    first = object()
    if _said.setdefault(fact, first) is first:
        warnings.warn(message, RuntimeWarning, stacklevel=6)  # where the public function is called


def _checked(name: str, device: torch.device) -> verdicts.Verdict | None:
    """The result of a check, which runs if need be, but not while a CUDA graph is captured."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return (verdicts.known if capturing else verdicts.obtain)(name, device)


def _indexed(device: torch.device) -> torch.device:
    """The device itself; for a GPU without an index, the current GPU if there is one."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _automatic(device: torch.device, distribution: str, tracing: bool) -> str:
    """The first backend that can serve and is checked. Warns once about each that it passes over.

    With `tracing`, "" if a check is still to come.
    """
    device = _indexed(device)
    if (device, distribution) in _chosen:
        return _chosen[device, distribution]
    verdict_of = verdicts.known if tracing else _checked
    name, to_come, against = _first(device, verdict_of, distribution)
    if to_come and tracing:
        return ""
    if to_come:
        _warn(
            "capturing",
            f"dfa_kernels: backend {name!r} is not checked yet, and cannot be while a CUDA graph "
            "is being captured: 'torch', which is slow, is what this graph holds. Call it once "
            f"before, or run `python -m dfa_kernels verify --backend {name} --device {device}`",
        )
        return _LAST
    _chosen[device, distribution] = name
    for other, why in against.items():
        message = f"dfa_kernels: backend {other!r} cannot serve {device.type}: {why}"
        if isinstance(why, verdicts.Verdict):
            message = verdicts.complaint(other, device, why, name)
        _warn((other, why), message)
    return name


_VARIABLE = "DFA_KERNELS_BACKEND"
_ENCODED = os.fsencode(_VARIABLE)


def _from_environment() -> str | None:
    """The backend that DFA_KERNELS_BACKEND asks for."""
    # os.environ takes a microsecond to find that it has no such key; its dictionary takes none.
    inside = getattr(os.environ, "_data", None)
    if type(inside) is dict and os.name == "posix" and _ENCODED not in inside:
        return None
    return os.environ.get(_VARIABLE) or None


def choose(
    function: str,
    device: torch.device,
    backend: str | None,
    distribution: str = "normal",
    tracing: bool = False,
) -> str:
    """The backend that serves: the one asked for, else DFA_KERNELS_BACKEND, else the preferred.

    The first automatic choice on a kind of GPU where the kernels are not proven may take minutes,
    because it checks them. With `tracing` it starts no check, and returns "" if one must decide.

    Raises ValueError for an unknown name, and RuntimeError with the reason if the backend asked for
    cannot serve.
    """
    source = "backend"
    if backend is None:
        source = _VARIABLE
        backend = _from_environment()
    if backend is None:
        return _chosen.get((device, distribution)) or _automatic(device, distribution, tracing)
    if backend not in tuple(BACKENDS):  # what is asked for may have no hash
        names = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"{function}: {source} must be one of {names}, got {backend!r}")
    reason = unavailable(backend, device.type, distribution)
    if reason is not None:
        raise RuntimeError(f"{function}: {source} {backend!r} cannot serve {device.type}: {reason}")
    return backend


@torch.compiler.assume_constant_result
def choose_for_graph(
    function: str, device: torch.device, backend: str | None, distribution: str
) -> str:
    """As `choose`, for a graph that is being traced: "" if the choice is made when it runs."""
    return choose(function, device, backend, distribution, tracing=True)


def choose_for_call(
    function: str, device: torch.device, backend: str | None, distribution: str
) -> str:
    """The choice of a public function: `choose`, or `choose_for_graph` while it is being traced."""
    if torch.compiler.is_compiling():
        return choose_for_graph(function, device, backend, distribution)
    return choose(function, device, backend, distribution)


def keep_check(name: str, device: torch.device, failures: list[str], seconds: float) -> None:
    """Keep the result of a check by hand, if an automatic choice depends on one."""
    device = _indexed(device)
    if any(_wants_check(name, device, made) for made in BACKENDS[name].DISTRIBUTIONS):
        verdicts.keep(name, device, failures, seconds)


def backends() -> list[BackendStatus]:
    """Every backend on the CPU and on this machine's current accelerator.

    Each says whether it is available, and if not why; whether an automatic choice takes it; and
    what is known of its check there. Starts no check.

    Raises:
        ValueError: DFA_KERNELS_CHECK has an unknown value.
    """
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        devices.append(torch.device(accelerator.type))
    return statuses(devices)


def statuses(devices: Sequence[torch.device]) -> list[BackendStatus]:
    """Every backend on every given device. Starts no check."""
    found = []
    for device in map(_indexed, devices):
        automatic = _first(device, verdicts.known)[0]
        for name in BACKENDS:
            reason = unavailable(name, device.type)
            check = None
            if reason is None and name in _preferred(device.type):
                check = _check(name, device, name == automatic)
            status = (reason is None, name == automatic, check, reason)
            found.append(BackendStatus(name, device.type, *status))
    return found


def _check(name: str, device: torch.device, automatic: bool) -> str | None:
    """What is known of a backend's check, and what follows; None if it needs none."""
    made = BACKENDS[name].DISTRIBUTIONS
    unproven = [one for one in made if _wants_check(name, device, one)]
    if not unproven:
        return None
    verdict = verdicts.known(name, device)
    whose = "" if len(unproven) == len(made) else f" for {', '.join(unproven)}"
    if verdict is None and automatic:
        return f"not checked yet{whose}; will be at its first use"
    role = "chosen automatically" if automatic else "available when asked for"
    if verdict is None:
        return f"not checked yet{whose}; {role}"
    return f"{verdict.describe()}{':' if verdict.passed else ';'} {role}"
