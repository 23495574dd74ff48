"""The "cuda" backend: hand-written CUDA kernels, compiled from `csrc/cuda`, for sm_80 and newer.

Importing the extension registers its kernels: the fused projection as `cuda_fused`, blocks of U as
`cuda_entries`. Here it is decided which of two ways a projection takes:

- **fused**: U is made in registers and multiplied there; nothing of it is ever stored.
- **slabs**: U is made a slab at a time into a bounded workspace, and cuBLAS multiplies it.

Both are for tensor cores: see `tensor_cores` for what an fp32 error is to them. An fp64 error is
projected by slabs in fp64.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dfa_kernels.backends import slabs, tensor_cores

try:
    import dfa_kernels._CUDA  # noqa: F401

    _missing = None
except ImportError as error:
    _missing = f"the compiled CUDA extension is not there ({error})"

_log = logging.getLogger(__name__)

# What one entry of U costs, in issue slots of a lane: an H200 has 2.9e13 of them in a second. From
# instruction counts and the data sheet, not measured.
_MAKE = {"normal": 17.0, "uniform": 8.0, "rademacher": 4.0}
_ERROR_ROWS = 128  # rows of error that one making serves in the fused kernel
_ISSUE = 0.02  # per row of error and term, to issue the fused kernel's products,
_MULTIPLY_FUSED = 0.09  # which tensor cores take meanwhile, by mma.sync
_MULTIPLY_SLABS = 0.07  # the same in cuBLAS
_STORE = 20.0  # to write it and read it again, per term
_SUM = 60.0  # to write and read a sum, per row of error and column
_LAUNCH = 2.5e8  # in the host's 9 us for one more launch


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device type, or None."""
    if device_type != "cuda":
        return f"it serves CUDA devices only{f', and {_missing}' if _missing else ''}"
    return _missing or _unusable()


def _unusable() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return tensor_cores.too_old()


def prefers_slabs(
    row_offsets: list[int],
    sizes: list[int],
    error_rows: int,
    columns: int,
    terms: int,
    distribution: str,
    in_place: bool,
) -> bool:
    """Whether slabs are estimated to be faster than the fused kernel.

    The fused kernel makes U again for every tile of error rows; slabs write and read U, and the
    sums unless their products are left `in_place`. Three terms are never slabs: a vendor's product
    adds up all columns in the tensor cores, which cut sums off, and so loses what the third is for.
    """
    if terms == 3:
        return False
    make = _MAKE[distribution]
    tiles = -(-error_rows // _ERROR_ROWS)
    products = terms * error_rows
    fused = max(make * tiles + _ISSUE * products, _MULTIPLY_FUSED * products)
    by_slabs = make + _STORE * terms + _MULTIPLY_SLABS * products
    if not in_place:
        by_slabs += _SUM / max(columns, 1) * error_rows
    if by_slabs >= fused:
        return False
    rows = slabs.union_rows(row_offsets, sizes)
    slab_count = tensor_cores.slab_count(rows, error_rows, columns, terms, in_place)
    launches = len(sizes) + 2 * slab_count
    entries = rows * columns
    return max(by_slabs * entries, _LAUNCH * launches) < fused * entries


def project(
    error: Tensor,
    row_offsets: list[int],
    sizes: list[int],
    scales: list[float],
    seed: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """scales[i] * error @ U[rows of layer i, columns].T: [M, n] -> one [M, sizes[i]] per layer."""
    by_slabs = error.dtype == torch.float64
    if not by_slabs:
        terms = tensor_cores.terms_of(error)
        in_place = tensor_cores.written_in_place(error, len(sizes), dtype or error.dtype)
        count, columns = error.shape
        by_slabs = prefers_slabs(row_offsets, sizes, count, columns, terms, distribution, in_place)
        if _log.isEnabledFor(logging.DEBUG):
            name = "slabs" if by_slabs else "fused"
            _log.debug(
                "project %s, %d layers, %d terms: %s", [*error.shape], len(sizes), terms, name
            )
    way: Callable[..., list[Tensor]] = _by_slabs if by_slabs else _fused
    return way(error, row_offsets, sizes, scales, seed, column_offset, distribution, dtype)


def ways(error: Tensor, distribution: str) -> Iterator[tuple[str, Callable[..., list[Tensor]]]]:
    """Every way a projection of such an error can go here: its name, and a function like `project`.

    There is one for each tile of the fused kernel that the error's device has room for, with so few
    blocks that each of them takes several tiles, as it does of millions of rows.
    """
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
    row_offsets: list[int],
    sizes: list[int],
    scales: list[float],
    seed: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype | None = None,
    *,
    tile: int = -1,
    processors: int = 0,
) -> list[Tensor]:
    """`project` by the fused kernel, with a tile of its own choice or the one of index `tile`.

    It has blocks for `processors` multiprocessors, or for all there are.
    """
    terms = tensor_cores.terms_of(error)
    try:
        return torch.ops.dfa_kernels.cuda_fused.default(
            error,
            row_offsets,
            sizes,
            scales,
            seed,
            column_offset,
            distribution,
            dtype,
            terms,
            tile,
            processors,
        )
    except RuntimeError as failure:
        _raise_if_out_of_memory(failure, error.device)
        raise


def _by_slabs(
    error: Tensor,
    row_offsets: list[int],
    sizes: list[int],
    scales: list[float],
    seed: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`project` by slabs: in fp64 for an fp64 error, else on tensor cores."""
    layers = (row_offsets, sizes, scales)
    dtype = dtype or error.dtype
    in_float64 = error.dtype == torch.float64

    def generate(
        rows: int, columns: int, row_offset: int, column_offset: int, dtype: torch.dtype
    ) -> Tensor:
        where = (row_offset, column_offset, distribution)
        return feedback_matrix(rows, columns, seed, *where, dtype, error.device, not in_float64)

    if in_float64:
        return slabs.project(generate, error, *layers, column_offset, dtype)
    return tensor_cores.project(generate, error, *layers, column_offset, distribution, dtype)


def feedback_matrix(
    rows: int,
    columns: int,
    seed: int,
    row_offset: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype,
    device: torch.device,
    lattice: bool = False,
) -> Tensor:
    """The block of U with its first entry at (row_offset, column_offset).

    `lattice` leaves out the factor of uniform entries, which makes them exact.
    """
    where = (row_offset, column_offset, distribution)
    try:
        return torch.ops.dfa_kernels.cuda_entries.default(
            rows, columns, seed, *where, dtype, device, lattice
        )
    except RuntimeError as failure:
        _raise_if_out_of_memory(failure, device)
        raise


def _raise_if_out_of_memory(failure: RuntimeError, device: torch.device) -> None:
    """Raise torch's own error where an allocation failed, which callers may know how to meet.

    It does not come through the stable ABI, so the same is asked of torch again.
    """
    failed = re.search(r"cannot allocate (\d+) bytes", str(failure))
    if failed:
        torch.empty(int(failed[1]), dtype=torch.uint8, device=device)
