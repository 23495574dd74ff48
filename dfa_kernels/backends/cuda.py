"""The "cuda" backend: hand-written CUDA kernels, compiled from `csrc/cuda`, for sm_80 and newer.

Importing the extension registers its kernels: the fused projection as `cuda_fused`, pieces of U as
`cuda_entries`, structured feedback as `cuda_structured` and its transpose. This module decides
which of two ways a dense projection takes:

- **fused**: U is made and multiplied in registers; nothing of it is ever stored.
- **slabs**: U is made a slab at a time in a bounded workspace, and cuBLAS multiplies it.

Both use tensor cores: see `tensor_cores` for how they take an fp32 error. Tensor cores multiply no
fp64 here; an fp64 error goes through slabs in fp64. Structured feedback multiplies nothing, and its
kernels serve every dtype.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dfa_kernels import stream as definition
from dfa_kernels.backends import slabs, tensor_cores
from dfa_kernels.layers import Layers
from dfa_kernels.stream import STRUCTURED, Stream

DEVICES = () if torch.version.hip else ("cuda",)
RANK = 0
DISTRIBUTIONS = definition.DISTRIBUTIONS
# The kernels have changed since they ran on an H100, and those of structured feedback never ran.
PROVEN: dict[tuple[int, int], tuple[str, ...]] = {}
TAGS: tuple[torch.Tag, ...] = ()

_log = logging.getLogger(__name__)

# Picoseconds of an H100 for each entry of U, from timings with 200,000 rows and 1,000 columns: of
# fused tiles with batches to 1,024, of slabs of bf16 normal entries with batches of 512 to 4,096.
# The choice needs only their ratios.
_FUSED = {"normal": 4.8e-3, "uniform": 4.2e-3, "rademacher": 2.3e-3}  # for each row of the error,
_FUSED_TERM = 4.1e-3  # and for each of its terms
_SLAB_TERM = 3.1e-3  # the same by cuBLAS
_FILL = 1.4  # to make an entry of a slab,
_STORE = 0.7  # and to store it, for each term
_SUM = 4.0  # to write and read one sum, which all columns share
_LAUNCH = 4e7  # for one launch of the host, not for each entry


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device type, or None."""
    missing = _missing()
    if device_type != "cuda":
        return f"it serves CUDA devices only{f', and {missing}' if missing else ''}"
    return missing or _unusable()


@functools.cache
def _missing() -> str | None:
    """Load the extension; why it cannot be loaded, or None."""
    try:
        importlib.import_module("dfa_kernels._CUDA")
    except ImportError as error:
        return f"the compiled CUDA extension is not there ({error})"
    return None


def _unusable() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return tensor_cores.too_old()


def prefers_slabs(
    layers: Layers, batch: int, columns: int, terms: int, distribution: str, in_place: bool
) -> bool:
    """Whether slabs are estimated to be faster than the fused kernel.

    The fused kernel makes U again for every tile of the batch; slabs write and read U, and the sums
    unless products are written `in_place`. Three terms never go through slabs: a vendor's product
    sums all columns in the tensor cores, which truncate, and so loses what the third term adds.
    """
    if terms == 3:
        return False
    fused = (_FUSED[distribution] + _FUSED_TERM * terms) * batch
    by_slabs = _FILL + _STORE * terms + _SLAB_TERM * terms * batch
    if not in_place:
        by_slabs += _SUM / max(columns, 1) * batch
    if by_slabs >= fused:
        return False
    rows = layers.union_rows()
    slab_count = tensor_cores.slab_count(rows, batch, columns, terms, in_place)
    launches = len(layers.sizes) + 2 * slab_count
    entries = rows * columns
    return max(by_slabs * entries, _LAUNCH * launches) < fused * entries


def project(error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype) -> list[Tensor]:
    """The signals of an error [batch, n]: one [batch, size] per layer."""
    if stream.distribution in STRUCTURED:
        return _structured(error, layers, stream, dtype)
    by_slabs = error.dtype == torch.float64
    if not by_slabs:
        terms, count = tensor_cores.terms_of(error), len(layers.sizes)
        in_place = tensor_cores.written_in_place(error, count, dtype)
        batch, columns = error.shape
        by_slabs = prefers_slabs(layers, batch, columns, terms, stream.distribution, in_place)
        if _log.isEnabledFor(logging.DEBUG):
            name = "slabs" if by_slabs else "fused"
            _log.debug("project %s, %d layers, %d terms: %s", [*error.shape], count, terms, name)
    way: Callable[..., list[Tensor]] = _by_slabs if by_slabs else _fused
    return way(error, layers, stream, dtype)


def ways(error: Tensor, distribution: str) -> Iterator[tuple[str, Callable[..., list[Tensor]]]]:
    """Every way a projection of such an error can go here: its name, and a function like `project`.

    One for each tile of the fused kernel that fits the error's device, with so few thread blocks
    that each takes several tiles, as it does with millions of rows; and slabs, if they may serve.
    """
    if distribution in STRUCTURED:
        yield "structured", functools.partial(_structured, processors=1)
        return
    if error.dtype == torch.float64:
        yield "slabs", _by_slabs
        return
    terms = tensor_cores.terms_of(error)
    tiles = torch.ops.dfa_kernels.cuda_tiles(distribution, error.dtype, terms, error.device)
    for tile, name in zip(*tiles, strict=True):
        yield f"fused {name}", functools.partial(_fused, tile=tile, processors=1)
    if terms < 3:
        yield "slabs", _by_slabs


def _fused(
    error: Tensor,
    layers: Layers,
    stream: Stream,
    dtype: torch.dtype,
    *,
    tile: int = -1,
    processors: int = 0,
) -> list[Tensor]:
    """`project` by the fused kernel, with the tile of index `tile`, or -1 for its own choice.

    Launches thread blocks for `processors` multiprocessors, or with 0 for all.
    """
    forced = (tensor_cores.terms_of(error), tile, processors)
    with _out_of_memory(error.device):
        return torch.ops.dfa_kernels.cuda_fused.default(error, *layers, *stream, dtype, *forced)


def _structured(
    error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype, *, processors: int = 0
) -> list[Tensor]:
    """`project` of structured distributions; `processors` as in `_fused`."""
    operator = torch.ops.dfa_kernels.cuda_structured.default
    with _out_of_memory(error.device):
        return operator(error, *layers, *stream, dtype, processors)


def structured_adjoint(
    signals: Sequence[Tensor], layers: Layers, stream: Stream, columns: int, dtype: torch.dtype
) -> Tensor:
    """The transpose: one signal [batch, size] per layer -> [batch, columns]."""
    operator = torch.ops.dfa_kernels.cuda_structured_adjoint.default
    where = (layers.row_offsets, layers.scales, *stream)
    with _out_of_memory(signals[0].device):
        return operator(list(signals), *where, columns, dtype)


def _by_slabs(error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype) -> list[Tensor]:
    """`project` by slabs: in fp64 for an fp64 error, else on tensor cores."""
    in_float64 = error.dtype == torch.float64
    generate = functools.partial(feedback_matrix, device=error.device, lattice=not in_float64)
    project_slabs = slabs.project if in_float64 else tensor_cores.project
    return project_slabs(generate, error, layers, stream, dtype)


def feedback_matrix(
    rows: int,
    columns: int,
    row_offset: int,
    stream: Stream,
    dtype: torch.dtype,
    device: torch.device,
    lattice: bool = False,
) -> Tensor:
    """`rows` rows of U from `row_offset` on, and `columns` of its columns.

    With `lattice`, uniform entries come without their factor, which makes them exact.
    """
    seed, column_offset, distribution = stream
    where = (seed, row_offset, column_offset, distribution)
    with _out_of_memory(device):
        return torch.ops.dfa_kernels.cuda_entries.default(
            rows, columns, *where, dtype, device, lattice
        )


class _out_of_memory:
    """If an allocation fails in this context, raise torch's own error, which callers may handle.

    It does not pass the stable ABI, so this asks torch for the same memory again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, failure: BaseException | None, trace: object) -> None:
        if not isinstance(failure, RuntimeError):
            return
        failed = re.search(r"cannot allocate (\d+) bytes", str(failure))
        if failed:
            torch.empty(int(failed[1]), dtype=torch.uint8, device=self._device)
