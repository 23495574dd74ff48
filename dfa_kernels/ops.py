"""The operators `torch.ops.dfa_kernels.*`, and which backend serves what.

    project(..., backend)       all layers' signals, differentiable; "" chooses when it runs
    project.<backend>           the same from one backend, without the autograd layer's 10 us a call
    project_adjoint             the transpose of project
    feedback_matrix.<backend>   a block of U
    cpu_isa                     the instruction set of backend "cpp"
    cuda_fused, cuda_entries    the kernels of backend "cuda": the fused projection, and a block of
        U, on request without the sqrt(3) of uniform entries
    cuda_tiles                  indices and names of the tiles that tests may force on `cuda_fused`,
        which chooses one by itself (-1), and blocks for all of the GPU's `processors` (0)

Arguments are trusted here; `functional` checks them. `seed` is the two's complement of the seed.
"""

from __future__ import annotations

import functools
import importlib
import os
import types
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfa_kernels import derivatives
from dfa_kernels.backends import slabs, verdicts

BACKENDS = ("torch", "cpp", "cuda", "triton")
# Backends to try in turn on a device type, before "torch", which serves every device.
_PREFERRED: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp",),
    "cuda": ("triton",) if torch.version.hip else ("cuda", "triton"),
}
# Device types on which all but "torch" are checked before an automatic choice takes them.
_CHECKED = ("cuda",)

_RANGES = "int[] row_offsets, SymInt[] sizes, float[] scales"
_STREAM = "int seed, SymInt column_offset, str distribution"
_SCHEMAS = {
    "project": f"(Tensor error, {_RANGES}, {_STREAM}, ScalarType? dtype",
    "feedback_matrix": "(SymInt rows, SymInt columns, int seed, int row_offset, "
    "SymInt column_offset, str distribution, ScalarType dtype, Device device",
    "project_adjoint": f"(Tensor[] signals, int[] row_offsets, float[] scales, {_STREAM}, "
    "SymInt columns, ScalarType dtype",
}

_library = torch.library.Library("dfa_kernels", "DEF")
# "triton" keeps tables on the device from call to call. Where torch.compile captures CUDA graphs by
# itself (mode="reduce-overhead"), they must not come to lie in a graph's memory.
_KEEPS = (torch.Tag.cudagraph_unsafe,)
_library.define(f"project{_SCHEMAS['project']}, str backend) -> Tensor[]", tags=_KEEPS)
_library.define(f"project_adjoint{_SCHEMAS['project_adjoint']}, str backend) -> Tensor")
for _name in BACKENDS:
    _tags = _KEEPS if _name == "triton" else ()
    _library.define(f"project.{_name}{_SCHEMAS['project']}) -> Tensor[]", tags=_tags)
    _library.define(f"feedback_matrix.{_name}{_SCHEMAS['feedback_matrix']}) -> Tensor")
_library.define("cpu_isa(str? force) -> str")
_library.define(
    f"cuda_fused{_SCHEMAS['project']}, int terms, int tile, int processors) -> Tensor[]"
)
_library.define(f"cuda_entries{_SCHEMAS['feedback_matrix']}, bool lattice) -> Tensor")
_library.define(
    "cuda_tiles(str distribution, ScalarType dtype, int terms, Device device) -> (int[], str[])"
)


# --- which backend serves what ---


class BackendStatus(NamedTuple):
    """One backend on one device type: whether it can serve, and why not.

    `automatic` says whether it is what an automatic choice takes; where its check is still to come,
    whether it is what the choice will take if it passes. `check` says what is known of its check on
    the current device of that type, and since when; None where it needs none.
    """

    name: str
    device: str
    available: bool
    automatic: bool
    check: str | None
    reason: str | None


@functools.cache
def _backend(name: str) -> types.ModuleType:
    """A backend's module, imported at its first use, with its kernels registered.

    Kernels written in Python are registered here; those of an extension by its being loaded.
    """
    module = importlib.import_module(f"dfa_kernels.backends.{name}")
    for operator in ("project", "feedback_matrix"):
        if hasattr(module, operator):
            kernel = getattr(module, operator)
            _library.impl(f"{operator}.{name}", kernel, "CompositeExplicitAutograd")
    return module


def unavailable(name: str, device_type: str) -> str | None:
    """Why a backend cannot serve a device type, or None."""
    return _backend(name).unavailable(device_type)


def _wants_check(name: str, device: torch.device) -> bool:
    """Whether a check decides if an automatic choice takes a backend."""
    return device.type in _CHECKED and name != "torch" and not verdicts.trusted(name, device)


def _first(
    device: torch.device, verdict_of: Callable[[str, torch.device], verdicts.Verdict | None]
) -> tuple[str, bool, dict[str, str | verdicts.Verdict]]:
    """The first backend that can serve, whether its check is to come, and what is against others.

    It is to come where `verdict_of` gives None.
    """
    against: dict[str, str | verdicts.Verdict] = {}
    for name in _PREFERRED.get(device.type, ()):
        reason = unavailable(name, device.type)
        if reason is not None:
            against[name] = reason
            continue
        if not _wants_check(name, device):
            return name, False, against
        verdict = verdict_of(name, device)
        if verdict is None or verdict.passed:
            return name, verdict is None, against
        against[name] = verdict
    return "torch", False, against


_chosen: dict[torch.device, str] = {}
_said: dict[object, object] = {}


def _warn(fact: object, message: str) -> None:
    """Once for each fact, whatever device, call and thread it is for."""
    first = object()
    if _said.setdefault(fact, first) is first:
        warnings.warn(message, RuntimeWarning, stacklevel=5)


def _checked(name: str, device: torch.device) -> verdicts.Verdict | None:
    """The result of a check, made if need be, except while a CUDA graph is being captured."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return (verdicts.known if capturing else verdicts.obtain)(name, device)


def _indexed(device: torch.device) -> torch.device:
    """A GPU without an index is the current one, where there is one."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _automatic(device: torch.device, tracing: bool) -> str:
    """The first backend that can serve and is checked; what it falls through, it says once."""
    device = _indexed(device)
    if device in _chosen:
        return _chosen[device]
    name, to_come, against = _first(device, verdicts.known if tracing else _checked)
    if to_come and tracing:
        return ""
    if to_come:
        _warn(
            "capturing",
            f"dfa_kernels: backend {name!r} is not checked yet, and cannot be while a CUDA graph "
            "is being captured: 'torch', which is slow, is what this graph holds. Call it once "
            f"before, or run `python -m dfa_kernels verify --backend {name} --device {device}`",
        )
        return "torch"
    _chosen[device] = name
    for other, why in against.items():
        message = f"dfa_kernels: backend {other!r} cannot serve {device.type}: {why}"
        if isinstance(why, verdicts.Verdict):
            message = verdicts.complaint(other, device, why, name)
        _warn((other, why), message)
    return name


def choose(function: str, device: torch.device, backend: str | None, tracing: bool = False) -> str:
    """The backend that serves: the one asked for, else DFA_KERNELS_BACKEND, else the preferred.

    The first automatic choice on a GPU may take minutes: backends are checked there. With `tracing`
    no check is made; where only one can tell, "" comes back.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that was asked
    for and cannot serve.
    """
    source = "backend"
    if backend is None:
        source = "DFA_KERNELS_BACKEND"
        backend = os.environ.get(source) or None
    if backend is None:
        return _chosen.get(device) or _automatic(device, tracing)
    if backend not in BACKENDS:
        raise ValueError(
            f"{function}: {source} must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        )
    reason = unavailable(backend, device.type)
    if reason is not None:
        raise RuntimeError(f"{function}: {source} {backend!r} cannot serve {device.type}: {reason}")
    return backend


@torch.compiler.assume_constant_result
def choose_for_graph(function: str, device: torch.device, backend: str | None) -> str:
    """As `choose`, for a graph that is being traced: "" where the choice is made when it runs."""
    return choose(function, device, backend, tracing=True)


def keep_check(name: str, device: torch.device, failures: list[str], seconds: float) -> None:
    """Let a check by hand count, where an automatic choice depends on one."""
    device = _indexed(device)
    if _wants_check(name, device):
        verdicts.keep(name, device, failures, seconds)


def statuses(devices: Sequence[torch.device]) -> list[BackendStatus]:
    """Every backend on every given device. No check is made."""
    found = []
    for device in map(_indexed, devices):
        automatic = _first(device, verdicts.known)[0]
        for name in BACKENDS:
            reason = unavailable(name, device.type)
            check = None
            if reason is None and name in _PREFERRED.get(device.type, ()):
                check = _check(name, device, name == automatic)
            status = (reason is None, name == automatic, check, reason)
            found.append(BackendStatus(name, device.type, *status))
    return found


def _check(name: str, device: torch.device, automatic: bool) -> str | None:
    """What is known of a backend's check, and what follows; None where it needs none."""
    if not _wants_check(name, device):
        return None
    verdict = verdicts.known(name, device)
    if verdict is None and automatic:
        return "not checked yet; will be at its first use"
    role = "chosen automatically" if automatic else "available when asked for"
    if verdict is None:
        return f"not checked yet; {role}"
    return f"{verdict.describe()}{':' if verdict.passed else ';'} {role}"


# --- project ---


def project(
    error: Tensor,
    row_offsets: list[int],
    sizes: list[int],
    scales: list[float],
    seed: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype | None,
    backend: str,
) -> list[Tensor]:
    """scales[i] * error @ U[rows of layer i, columns].T: error [M, n] -> one [M, sizes[i]] each.

    With backend "", the operator chooses when it runs.
    """
    arguments = (error, row_offsets, sizes, scales, seed, column_offset, distribution, dtype)
    if derivatives.transformed():
        return derivatives.project(*arguments, backend)
    differentiable = error.requires_grad and torch.is_grad_enabled()
    # functionalize alone hides whether what is around it differentiates.
    if not backend or differentiable or torch._C._are_functorch_transforms_active():
        return torch.ops.dfa_kernels.project.default(*arguments, backend)
    return getattr(torch.ops.dfa_kernels.project, backend)(*arguments)


def _project(
    error, row_offsets, sizes, scales, seed, column_offset, distribution, dtype, backend
) -> list[Tensor]:
    chosen = choose("project", error.device, backend or None)
    kernel = getattr(torch.ops.dfa_kernels.project, chosen)
    return kernel(error, row_offsets, sizes, scales, seed, column_offset, distribution, dtype)


def _project_fake(
    error, row_offsets, sizes, scales, seed, column_offset, distribution, dtype, *_
) -> list[Tensor]:
    return [error.new_empty(error.shape[0], size, dtype=dtype) for size in sizes]


def _project_setup(ctx, inputs, output) -> None:
    (
        error,
        ctx.row_offsets,
        _,
        ctx.scales,
        ctx.seed,
        ctx.column_offset,
        ctx.distribution,
        _,
        ctx.backend,
    ) = inputs
    ctx.columns, ctx.dtype = error.shape[1], error.dtype


def _project_backward(ctx, signal_gradients):
    gradient = torch.ops.dfa_kernels.project_adjoint(
        signal_gradients,
        ctx.row_offsets,
        ctx.scales,
        ctx.seed,
        ctx.column_offset,
        ctx.distribution,
        ctx.columns,
        ctx.dtype,
        ctx.backend,
    )
    return gradient, *[None] * 8


def _project_autocast(operator, device_type: str, error: Tensor, *arguments) -> list[Tensor]:
    """As for any matrix product: the error is cast to the autocast dtype, unless it is fp64."""
    if error.dtype != torch.float64:
        error = error.to(torch.get_autocast_dtype(device_type))
    with torch.autocast(device_type, enabled=False):
        return operator(error, *arguments)


# --- project_adjoint ---


def _project_adjoint(
    signals, row_offsets, scales, seed, column_offset, distribution, columns, dtype, backend
) -> Tensor:
    device = signals[0].device
    chosen = choose("project_adjoint", device, backend or None)
    generator = getattr(torch.ops.dfa_kernels.feedback_matrix, chosen)

    def generate(
        rows: int, columns: int, row_offset: int, column_offset: int, dtype: torch.dtype
    ) -> Tensor:
        return generator(
            rows, columns, seed, row_offset, column_offset, distribution, dtype, device
        )

    return slabs.project_adjoint(
        generate, signals, row_offsets, scales, column_offset, columns, dtype
    )


def _project_adjoint_fake(
    signals, row_offsets, scales, seed, column_offset, distribution, columns, dtype, backend
) -> Tensor:
    return signals[0].new_empty(signals[0].shape[0], columns, dtype=dtype)


def _project_adjoint_setup(ctx, inputs, output) -> None:
    (
        signals,
        ctx.row_offsets,
        ctx.scales,
        ctx.seed,
        ctx.column_offset,
        ctx.distribution,
        _,
        _,
        ctx.backend,
    ) = inputs
    ctx.sizes, ctx.dtype = [signal.shape[1] for signal in signals], signals[0].dtype


def _project_adjoint_backward(ctx, gradient):
    signals = torch.ops.dfa_kernels.project(
        gradient,
        ctx.row_offsets,
        ctx.sizes,
        ctx.scales,
        ctx.seed,
        ctx.column_offset,
        ctx.distribution,
        ctx.dtype,
        ctx.backend,
    )
    return signals, *[None] * 8


# --- feedback_matrix ---


def feedback_matrix(
    rows: int,
    columns: int,
    seed: int,
    row_offset: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Tensor:
    """U[row_offset : row_offset + rows, column_offset : column_offset + columns].

    With backend "", by "torch": the bits are the same, and no operator here chooses when it runs.
    """
    kernel = getattr(torch.ops.dfa_kernels.feedback_matrix, backend or "torch")
    return kernel(rows, columns, seed, row_offset, column_offset, distribution, dtype, device)


def _feedback_matrix_fake(
    rows, columns, seed, row_offset, column_offset, distribution, dtype, device, *_
) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=device)


# --- registration ---


def _register() -> None:
    _library.impl("project", _project, "CompositeExplicitAutograd")
    _library.impl("project_adjoint", _project_adjoint, "CompositeExplicitAutograd")
    torch.library.register_fake("dfa_kernels::project", _project_fake, lib=_library)
    torch.library.register_fake("dfa_kernels::project_adjoint", _project_adjoint_fake, lib=_library)
    torch.library.register_autograd(
        "dfa_kernels::project", _project_backward, setup_context=_project_setup, lib=_library
    )
    torch.library.register_autograd(
        "dfa_kernels::project_adjoint",
        _project_adjoint_backward,
        setup_context=_project_adjoint_setup,
        lib=_library,
    )
    for name in BACKENDS:
        torch.library.register_fake(f"dfa_kernels::project.{name}", _project_fake, lib=_library)
        torch.library.register_fake(
            f"dfa_kernels::feedback_matrix.{name}", _feedback_matrix_fake, lib=_library
        )
    torch.library.register_fake("dfa_kernels::cuda_fused", _project_fake, lib=_library)
    torch.library.register_fake("dfa_kernels::cuda_entries", _feedback_matrix_fake, lib=_library)
    for key, device_type in {
        "AutocastCPU": "cpu",
        "AutocastCUDA": "cuda",
        "AutocastXPU": "xpu",
    }.items():
        for overload in ("default", *BACKENDS):
            operator = getattr(torch.ops.dfa_kernels.project, overload)
            rule = functools.partial(_project_autocast, operator, device_type)
            _library.impl("project" if overload == "default" else f"project.{overload}", rule, key)


_register()
_backend("torch")
