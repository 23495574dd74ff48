"""The operators `torch.ops.dfa_kernels.*`, and which backend serves what.

    project(..., backend)       all layers' signals, differentiable
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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfa_kernels import derivatives
from dfa_kernels.backends import slabs

BACKENDS = ("torch", "cpp", "cuda", "triton")
# Backends to try in turn on a device type, before "torch", which serves every device.
_PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
# Not yet run on a GPU; of these, only "torch" serves there without being asked for by name.
_NOT_YET_RUN = {"torch", "cuda", "triton"}

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

    `automatic` says whether it is what an automatic choice takes; `has_run`, whether its tests have
    run on such a device.
    """

    name: str
    device: str
    available: bool
    automatic: bool
    has_run: bool
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


def _candidates(device_type: str) -> list[tuple[str, str | None]]:
    """The backends an automatic choice tries, in turn, each with why it cannot serve, or None."""
    preferred = (name for name in _PREFERRED.get(device_type, ()) if name not in _NOT_YET_RUN)
    names = (*preferred, "torch")
    return [(name, unavailable(name, device_type)) for name in names]


_chosen: dict[str, str] = {}


def _automatic(device_type: str) -> str:
    """The first backend that can serve; what it falls through, it says once."""
    if device_type not in _chosen:
        skipped = []
        for name, reason in _candidates(device_type):
            if reason is None:
                _chosen[device_type] = name
                break
            skipped.append(f"dfa_kernels: backend {name!r} cannot serve {device_type}: {reason}")
        for message in skipped:
            warnings.warn(message, RuntimeWarning, stacklevel=4)
    return _chosen[device_type]


@torch.compiler.assume_constant_result
def choose(function: str, device_type: str, backend: str | None) -> str:
    """The backend that serves: the one asked for, else DFA_KERNELS_BACKEND, else the preferred.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that was asked
    for and cannot serve.
    """
    source = "backend"
    if backend is None:
        source = "DFA_KERNELS_BACKEND"
        backend = os.environ.get(source) or None
    if backend is None:
        return _automatic(device_type)
    if backend not in BACKENDS:
        raise ValueError(
            f"{function}: {source} must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        )
    reason = unavailable(backend, device_type)
    if reason is not None:
        raise RuntimeError(f"{function}: {source} {backend!r} cannot serve {device_type}: {reason}")
    return backend


def statuses(device_types: Sequence[str]) -> list[BackendStatus]:
    """Every backend on every given device type."""
    found = []
    for device_type in device_types:
        automatic = next(name for name, why in _candidates(device_type) if why is None)
        for name in BACKENDS:
            reason = unavailable(name, device_type)
            has_run = device_type == "cpu" or name not in _NOT_YET_RUN
            found.append(
                BackendStatus(name, device_type, reason is None, name == automatic, has_run, reason)
            )
    return found


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
    """scales[i] * error @ U[rows of layer i, columns].T: error [M, n] -> one [M, sizes[i]] each."""
    arguments = (error, row_offsets, sizes, scales, seed, column_offset, distribution, dtype)
    if derivatives.transformed():
        return derivatives.project(*arguments, backend)
    if error.requires_grad and torch.is_grad_enabled():
        return torch.ops.dfa_kernels.project.default(*arguments, backend)
    return getattr(torch.ops.dfa_kernels.project, backend)(*arguments)


def _project(
    error, row_offsets, sizes, scales, seed, column_offset, distribution, dtype, backend
) -> list[Tensor]:
    kernel = getattr(torch.ops.dfa_kernels.project, choose("project", error.device.type, backend))
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
    generator = getattr(
        torch.ops.dfa_kernels.feedback_matrix, choose("project_adjoint", device.type, backend)
    )

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
    """U[row_offset : row_offset + rows, column_offset : column_offset + columns]."""
    kernel = getattr(torch.ops.dfa_kernels.feedback_matrix, backend)
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
