"""The operators `torch.ops.dfa_kernels.*`.

    project(..., backend)       all layers' signals, differentiable; "" chooses when it runs
    project.symbolic            the same, whose scales may be symbols while a graph is traced
    project.<backend>           the same from one backend, without the autograd layer's 10 us a call
    project_packed.cpp          the same of `pack(layers, stream)`, for calls outside graphs: lists
        take an operator longer
    project_adjoint             the transpose of project; project_adjoint.symbolic as above
    structured_adjoint.<backend>    the same of structured distributions
    feedback_matrix.<backend>   a piece of U
    cpu_isa                     the instruction set of backend "cpp"
    pool_bytes, empty_pool      of its memory for signals: the bytes in tensors and those idle;
        gives the idle ones back to the system, with the entries that it keeps of small matrices,
        and returns how many they were
    fill_signals                whether it fills their memory with NaN first, for tests; returns
        whether it did before
    cuda_fused, cuda_entries    the kernels of backend "cuda": the fused projection, and a piece of
        U, on request without the sqrt(3) of uniform entries
    cuda_structured, cuda_structured_adjoint    the same of structured distributions, and its
        transpose
    cuda_tiles                  indices and names of the tiles that tests may force on `cuda_fused`.
        By default it chooses one (-1), and launches thread blocks for all `processors` (0)

`functional` checks arguments. Compiled operators check them again, for direct callers. `seed` is in
two's complement.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from dfa_kernels import batching, checks, derivatives
from dfa_kernels.backends import loading, slabs
from dfa_kernels.backends.registry import BACKENDS, choose
from dfa_kernels.layers import Layers, overload_for, symbolic, tracing
from dfa_kernels.stream import DISTRIBUTIONS, STRUCTURED, Stream

# `Layers` and `Stream`, field by field.
_LAYERS = "SymInt[] row_offsets, SymInt[] sizes, float[] scales"
_STREAM = "SymInt seed, SymInt column_offset, str distribution"
_SCHEMAS = {
    "project": f"(Tensor error, {_LAYERS}, {_STREAM}, ScalarType? dtype",
    "feedback_matrix": "(SymInt rows, SymInt columns, SymInt seed, SymInt row_offset, "
    "SymInt column_offset, str distribution, ScalarType dtype, Device device",
    "project_adjoint": f"(Tensor[] signals, SymInt[] row_offsets, float[] scales, {_STREAM}, "
    "SymInt columns, ScalarType dtype",
}

_library = torch.library.Library("dfa_kernels", "DEF")
# An operator that chooses its backend when it runs has the tags of all of them.
_TAGS = tuple({tag for backend in BACKENDS.values() for tag in backend.TAGS})
for _name, _result in (("project", "Tensor[]"), ("project_adjoint", "Tensor")):
    _schema = f"{_SCHEMAS[_name]}, str backend) -> {_result}"
    _library.define(f"{_name}{_schema}", tags=_TAGS)
    # A float[] takes a symbol's value into the graph. TorchScript cannot trace a Scalar[].
    _schema = _schema.replace("float[] scales", "Scalar[] scales")
    _library.define(f"{_name}.symbolic{_schema}", tags=_TAGS)
for _name, _backend in BACKENDS.items():
    _library.define(f"project.{_name}{_SCHEMAS['project']}) -> Tensor[]", tags=_backend.TAGS)
    _library.define(f"feedback_matrix.{_name}{_SCHEMAS['feedback_matrix']}) -> Tensor")
# No overload of project: torch aborts at exit where it unregisters one behind equal signatures.
_library.define("project_packed.cpp(Tensor error, Tensor packed, ScalarType? dtype) -> Tensor[]")
_STRUCTURED = [name for name, one in BACKENDS.items() if {*STRUCTURED} & {*one.DISTRIBUTIONS}]
for _name in _STRUCTURED:
    _library.define(
        f"structured_adjoint.{_name}{_SCHEMAS['project_adjoint']}) -> Tensor",
        tags=BACKENDS[_name].TAGS,
    )
_library.define("cpu_isa(str? force) -> str")
_library.define("pool_bytes() -> int[]")
_library.define("empty_pool() -> int")
_library.define("fill_signals(bool on) -> bool")
_library.define(
    f"cuda_fused{_SCHEMAS['project']}, int terms, int tile, int processors) -> Tensor[]"
)
_library.define(f"cuda_structured{_SCHEMAS['project']}, int processors) -> Tensor[]")
_library.define(f"cuda_structured_adjoint{_SCHEMAS['project_adjoint']}) -> Tensor")
_library.define(f"cuda_entries{_SCHEMAS['feedback_matrix']}, bool lattice) -> Tensor")
_library.define(
    "cuda_tiles(str distribution, ScalarType dtype, int terms, Device device) -> (int[], str[])"
)
# Operators of no other backend, and whose extension has their kernels.
_EXTENSIONS = {
    **dict.fromkeys(("cpu_isa", "pool_bytes", "empty_pool", "fill_signals"), "cpp"),
    "project_packed.cpp": "cpp",
    **dict.fromkeys(("cuda_fused", "cuda_entries", "cuda_tiles"), "cuda"),
    **dict.fromkeys(("cuda_structured", "cuda_structured_adjoint"), "cuda"),
}
# To find them anew takes each call a microsecond.
_projections = torch.ops.dfa_kernels.project
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_project_packed = torch.ops.dfa_kernels.project_packed.cpp
_adjoints = torch.ops.dfa_kernels.project_adjoint
_matrices = torch.ops.dfa_kernels.feedback_matrix


# --- project ---


def project(
    error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype | None, backend: str
) -> list[Tensor]:
    """scales[i] * error @ U[rows of layer i, columns].T: one [batch, sizes[i]] per layer.

    error is [batch, n]. With backend "", the operator chooses when it runs.
    """
    if derivatives.transformed():
        return derivatives.project(error, layers, stream, dtype, backend)
    differentiable = error.requires_grad and torch.is_grad_enabled()
    # functionalize alone hides whether code around it differentiates.
    hidden = torch._C._are_functorch_transforms_active()
    # TorchScript finds an overload by the types of its arguments, which all backends share.
    plain = backend and not (differentiable or hidden or torch.jit.is_tracing())
    traced = tracing()
    # Subclasses, such as a FakeTensor outside its mode, may refuse a plain tensor beside them.
    if plain and backend == "cpp" and not traced and type(error) in _PLAIN:
        return _project_packed(error, pack(layers, stream), dtype)
    if plain and not (traced and symbolic(layers.scales)):
        return getattr(_projections, backend)(error, *layers, *stream, dtype)
    overload = overload_for(layers.scales)
    return getattr(_projections, overload)(error, *layers, *stream, dtype, backend)


@functools.lru_cache(maxsize=256)
def pack(layers: Layers, stream: Stream) -> Tensor:
    """Layers and stream as `project_packed` takes them (`check_project` in csrc/checks.h)."""
    seed, column_offset, distribution = stream
    kind = DISTRIBUTIONS.index(distribution)
    count = len(layers.scales)
    scales = struct.unpack(f"{count}q", struct.pack(f"{count}d", *layers.scales))
    numbers = (seed, column_offset, kind, *layers.row_offsets, *layers.sizes, *scales)
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _project(error: Tensor, row_offsets, sizes, scales, *arguments) -> list[Tensor]:
    *others, backend = arguments
    distribution = others[2]
    chosen = choose("project", error.device, backend or None, distribution)
    scales = [*map(float, scales)]
    return getattr(_projections, chosen)(error, row_offsets, sizes, scales, *others)


def _project_by(kernel: Callable) -> Callable:
    """The operator's kernel, from a backend's `project`."""

    def project(
        error, row_offsets, sizes, scales, seed, column_offset, distribution, dtype
    ) -> list[Tensor]:
        layers = Layers.of(row_offsets, sizes, scales)
        stream = Stream(seed, column_offset, distribution)
        checks.scale_range("project", "scales", scales, error.dtype, distribution)
        return kernel(error, layers, stream, dtype or error.dtype)

    return project


def _project_fake(
    error, row_offsets, sizes, scales, seed, column_offset, distribution, dtype, *_
) -> list[Tensor]:
    return [error.new_empty(error.shape[0], size, dtype=dtype) for size in sizes]


def _project_setup(ctx, inputs, output) -> None:
    error, ctx.row_offsets, _, ctx.scales, *ctx.stream, _, ctx.backend = inputs
    ctx.columns, ctx.dtype = error.shape[1], error.dtype


def _project_backward(ctx, signal_gradients):
    where = (ctx.row_offsets, ctx.scales, *ctx.stream)
    operator = getattr(_adjoints, overload_for(ctx.scales))
    gradient = operator(signal_gradients, *where, ctx.columns, ctx.dtype, ctx.backend)
    return gradient, *[None] * 8


def _project_autocast(operator, device_type: str, error: Tensor, *arguments) -> list[Tensor]:
    """Casts the error to the autocast dtype, unless it is fp64, as for any matrix product."""
    if error.dtype != torch.float64:
        error = error.to(torch.get_autocast_dtype(device_type))
    with torch.autocast(device_type, enabled=False):
        return operator(error, *arguments)


# --- project_adjoint ---


def _project_adjoint(
    signals, row_offsets, scales, seed, column_offset, distribution, columns, dtype, backend
) -> Tensor:
    chosen = choose("project_adjoint", signals[0].device, backend or None, distribution)
    scales = [*map(float, scales)]
    if distribution in STRUCTURED:
        adjoint = getattr(torch.ops.dfa_kernels.structured_adjoint, chosen)
        where = (row_offsets, scales, seed, column_offset, distribution)
        return adjoint(signals, *where, columns, dtype)
    layers = Layers.of(row_offsets, [signal.shape[1] for signal in signals], scales)
    generate = functools.partial(_generate, chosen, signals[0].device)
    stream = Stream(seed, column_offset, distribution)
    return slabs.project_adjoint(generate, signals, layers, stream, columns, dtype)


def _adjoint_by(kernel: Callable) -> Callable:
    """The operator's kernel, from a backend's `structured_adjoint`."""

    def structured_adjoint(
        signals, row_offsets, scales, seed, column_offset, distribution, columns, dtype
    ) -> Tensor:
        layers = Layers.of(row_offsets, [signal.shape[1] for signal in signals], scales)
        stream = Stream(seed, column_offset, distribution)
        return kernel(signals, layers, stream, columns, dtype)

    return structured_adjoint


def _project_adjoint_fake(
    signals, row_offsets, scales, seed, column_offset, distribution, columns, dtype, *_
) -> Tensor:
    return signals[0].new_empty(signals[0].shape[0], columns, dtype=dtype)


def _project_adjoint_setup(ctx, inputs, output) -> None:
    signals, ctx.row_offsets, ctx.scales, *ctx.stream, _, _, ctx.backend = inputs
    ctx.sizes, ctx.dtype = [signal.shape[1] for signal in signals], signals[0].dtype


def _project_adjoint_backward(ctx, gradient):
    layers = (ctx.row_offsets, ctx.sizes, ctx.scales)
    operator = getattr(_projections, overload_for(ctx.scales))
    signals = operator(gradient, *layers, *ctx.stream, ctx.dtype, ctx.backend)
    return signals, *[None] * 8


# --- feedback_matrix ---


def feedback_matrix(
    rows: int,
    columns: int,
    row_offset: int,
    stream: Stream,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Tensor:
    """`rows` rows of U from `row_offset` on, and `columns` columns from the stream's on.

    Backend "" means "torch": the bits are the same, and no operator here chooses when it runs.
    """
    return _generate(backend or "torch", device, rows, columns, row_offset, stream, dtype)


def _generate(
    backend: str,
    device: torch.device,
    rows: int,
    columns: int,
    row_offset: int,
    stream: Stream,
    dtype: torch.dtype,
) -> Tensor:
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "feedback_matrix: torch.jit.trace cannot record it; make the matrix outside"
        )
    seed, column_offset, distribution = stream
    kernel = getattr(_matrices, backend)
    return kernel(rows, columns, seed, row_offset, column_offset, distribution, dtype, device)


def _feedback_matrix_by(kernel: Callable) -> Callable:
    """The operator's kernel, from a backend's `feedback_matrix`."""

    def feedback_matrix(
        rows, columns, seed, row_offset, column_offset, distribution, dtype, device
    ) -> Tensor:
        stream = Stream(seed, column_offset, distribution)
        return kernel(rows, columns, row_offset, stream, dtype, device)

    return feedback_matrix


def _feedback_matrix_fake(
    rows, columns, seed, row_offset, column_offset, distribution, dtype, device, *_
) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=device)


# --- registration ---


def _register_differentiable(
    name: str, kernel: Callable, fake: Callable, backward: Callable, setup: Callable
) -> None:
    for overload in (name, f"{name}.symbolic"):
        _library.impl(overload, kernel, "CompositeExplicitAutograd")
        full_name = f"dfa_kernels::{overload}"
        torch.library.register_fake(full_name, fake, lib=_library)
        torch.library.register_autograd(full_name, backward, setup_context=setup, lib=_library)


def _register() -> None:
    _register_differentiable("project", _project, _project_fake, _project_backward, _project_setup)
    _register_differentiable(
        "project_adjoint",
        _project_adjoint,
        _project_adjoint_fake,
        _project_adjoint_backward,
        _project_adjoint_setup,
    )
    in_extensions = dict(_EXTENSIONS)
    for name, backend in BACKENDS.items():
        for function, kernel_by in (
            ("project", _project_by),
            ("feedback_matrix", _feedback_matrix_by),
            ("structured_adjoint", _adjoint_by),
        ):
            if kernel := getattr(backend, function, None):
                _library.impl(f"{function}.{name}", kernel_by(kernel), "CompositeExplicitAutograd")
            elif function != "structured_adjoint" or name in _STRUCTURED:
                in_extensions[f"{function}.{name}"] = name
        torch.library.register_fake(f"dfa_kernels::project.{name}", _project_fake, lib=_library)
        torch.library.register_fake(
            f"dfa_kernels::feedback_matrix.{name}", _feedback_matrix_fake, lib=_library
        )
    for name in _STRUCTURED:
        torch.library.register_fake(
            f"dfa_kernels::structured_adjoint.{name}", _project_adjoint_fake, lib=_library
        )
    for name, fake in {
        "cuda_fused": _project_fake,
        "cuda_structured": _project_fake,
        "cuda_structured_adjoint": _project_adjoint_fake,
        "cuda_entries": _feedback_matrix_fake,
    }.items():
        torch.library.register_fake(f"dfa_kernels::{name}", fake, lib=_library)
    for name, extension in in_extensions.items():
        function, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.dfa_kernels, function), overload or "default")
        load = loading.kernel(operator, function, extension)
        _library.impl(name, load, "CompositeExplicitAutograd")
    for function in ("project", "project_adjoint"):
        operators = getattr(torch.ops.dfa_kernels, function)
        for overload in operators.overloads():
            name = function if overload == "default" else f"{function}.{overload}"
            _library.impl(name, batching.kernel(getattr(operators, overload)), "Batched")
    _library.impl("project_packed.cpp", batching.kernel(_project_packed), "Batched")
    for key, device_type in {
        "AutocastCPU": "cpu",
        "AutocastCUDA": "cuda",
        "AutocastXPU": "xpu",
    }.items():
        for overload in ("default", "symbolic", *BACKENDS):
            operator = getattr(torch.ops.dfa_kernels.project, overload)
            rule = functools.partial(_project_autocast, operator, device_type)
            _library.impl("project" if overload == "default" else f"project.{overload}", rule, key)
        rule = functools.partial(_project_autocast, _project_packed, device_type)
        _library.impl("project_packed.cpp", rule, key)


_register()
