"""The "triton" backend: fused kernels for CUDA and ROCm tensors; `projection` says what runs.

Under Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported) the same kernels serve CPU
tensors, slowly, for tests. Triton is imported when the backend is first asked about.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dfa_kernels import stream as definition
from dfa_kernels.backends import tensor_cores
from dfa_kernels.layers import Layers
from dfa_kernels.stream import DENSE, STRUCTURED, Stream

DEVICES = ("cuda",)  # also ROCm's name in torch
RANK = 1
PROVEN = {(9, 0): tuple(DENSE)}
DISTRIBUTIONS = definition.DISTRIBUTIONS
# Tables on the device are kept from call to call. If torch.compile captures CUDA graphs by itself
# (mode="reduce-overhead"), they must not lie in a graph's memory.
TAGS = (torch.Tag.cudagraph_unsafe,)


@functools.cache
def _kernels() -> types.ModuleType | str:
    """The module with the kernels, or why there is none."""
    try:
        return importlib.import_module("dfa_kernels.backends.triton.projection")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device type, or None."""
    if device_type not in ("cpu", "cuda"):
        return "it serves CUDA and ROCm devices only"
    kernels = _kernels()
    if isinstance(kernels, str):
        return kernels
    if device_type == "cpu":
        if kernels.launch.INTERPRETED:
            return None
        return "it serves GPUs (and the CPU in Triton's interpreter, with TRITON_INTERPRET=1)"
    if kernels.launch.INTERPRETED:
        return "TRITON_INTERPRET=1 keeps it on the CPU"
    if not torch.cuda.is_available():
        return "there is no GPU"
    return None if torch.version.hip else tensor_cores.too_old()


def _kernels_for(device: torch.device) -> types.ModuleType:
    """The module with the kernels. Raises RuntimeError if they cannot serve the device."""
    kernels = _kernels()
    if isinstance(kernels, str) or (device.type == "cpu") != kernels.launch.INTERPRETED:
        reason = unavailable(device.type)
        raise RuntimeError(f"dfa_kernels: backend 'triton' cannot serve {device.type}: {reason}")
    return kernels


def project(error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype) -> list[Tensor]:
    """The signals of an error [batch, n]: one [batch, size] per layer."""
    return _kernels_for(error.device).project(error, layers, stream, dtype)


def ways(error: Tensor, distribution: str) -> Iterator[tuple[str, Callable[..., list[Tensor]]]]:
    """Every way a projection of such an error can go here: its name, and a function like `project`.

    "fused R x M" has tiles of R rows of U and a batch of M, also with the terms of an fp32 error
    "split beforehand". "slabs" is left out for errors that are always fused. Of structured
    feedback, "transforms" is one launch where that is enough, and goes "through a workspace"
    otherwise, or always. The ways serve every error that is not longer, at the current precision of
    fp32 products.
    """
    return _kernels_for(error.device).ways(error, distribution)


def feedback_matrix(
    rows: int,
    columns: int,
    row_offset: int,
    stream: Stream,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`rows` rows of U from `row_offset` on, and `columns` of its columns."""
    kernels = _kernels_for(device)
    matrix = torch.empty(rows, columns, dtype=dtype, device=device)
    module = kernels.structured if stream.distribution in STRUCTURED else kernels.launch
    with kernels.launch.on(matrix.device):
        return module.fill(matrix, row_offset, stream)


def structured_adjoint(
    signals: Sequence[Tensor], layers: Layers, stream: Stream, columns: int, dtype: torch.dtype
) -> Tensor:
    """The transpose of `project` for structured feedback: [batch, columns]."""
    kernels = _kernels_for(signals[0].device)
    with kernels.launch.on(signals[0].device):
        return kernels.structured.project_adjoint(signals, layers, stream, columns, dtype)
