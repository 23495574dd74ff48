"""The "cuda" backend: hand-written CUDA kernels, compiled from `csrc/cuda`, for sm_80 and newer.

Importing the extension registers its kernels: the fused projection as `cuda_fused`, and
`feedback_matrix.cuda`. Here it is decided which of two ways a projection takes:

- **fused**: U is made in registers and multiplied there; nothing of it is ever stored.
- **slabs**: U is made a slab at a time into a bounded workspace, and cuBLAS multiplies it.

An fp32 error is multiplied on the bf16 tensor cores as a sum of bf16 numbers, as many as
`torch.get_float32_matmul_precision()` asks for: 3 for "highest", 2 for "high", 1 for "medium". An
fp64 error is projected by slabs in fp64.
"""

from __future__ import annotations

import functools
import logging
import math

import torch
from torch import Tensor
from torch.nn import functional

from dfa_kernels.backends import slabs

try:
    import dfa_kernels._CUDA  # noqa: F401

    _missing = None
except ImportError as error:
    _missing = f"the compiled CUDA extension is not there ({error})"

_log = logging.getLogger(__name__)

TERMS = {"highest": 3, "high": 2, "medium": 1}

# What one entry of U costs, in issue slots of a lane: an H200 has 2.9e13 of them in a second. From
# instruction counts and the data sheet, not measured.
_MAKE = {"normal": 17.0, "uniform": 8.0, "rademacher": 4.0}
_ERROR_ROWS = 128  # rows of error that one making serves in the fused kernel (64 with three terms)
_ISSUE = 0.02  # per row of error and term, to issue the fused kernel's products,
_MULTIPLY_FUSED = 0.09  # which tensor cores take meanwhile, by mma.sync
_MULTIPLY_SLABS = 0.07  # the same in cuBLAS
_STORE = 20.0  # to write it and read it again, per term
_SUM = 60.0  # to write and read a sum, per row of error and column
_LAUNCH = 2.5e8  # in the host's 9 us for one more launch
# Rows of a slab are a multiple of this, as matrix products like them.
_SLAB_STEP = 128
# Columns too; and a U whose columns begin at a multiple is made by stores of 16 bytes.
_COLUMN_STEP = 8


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device type, or None."""
    if device_type != "cuda":
        return f"it serves CUDA devices only{f', and {_missing}' if _missing else ''}"
    return _missing or _unusable()


@functools.cache
def _unusable() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    old = [
        f"{torch.cuda.get_device_name(i)} is sm_{major}{minor}"
        for i in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(i)]
        if major < 8
    ]
    return f"it needs compute capability 8.0 on every device, but {', '.join(old)}" if old else None


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
    sums unless their products are left `in_place`.
    """
    make = _MAKE[distribution]
    tiles = -(-error_rows // (_ERROR_ROWS // 2 if terms == 3 else _ERROR_ROWS))
    products = terms * error_rows
    fused = max(make * tiles + _ISSUE * products, _MULTIPLY_FUSED * products)
    by_slabs = make + _STORE * terms + _MULTIPLY_SLABS * products
    if not in_place:
        by_slabs += _SUM / max(columns, 1) * error_rows
    if by_slabs >= fused:
        return False
    rows = slabs.union_rows(row_offsets, sizes)
    launches = len(sizes) + 2 * -(-rows // _rows_at_once(error_rows, columns, terms))
    entries = rows * columns
    return max(by_slabs * entries, _LAUNCH * launches) < fused * entries


def _rows_at_once(error_rows: int, columns: int, terms: int) -> int:
    """Rows of a slab: U once, repeated for the terms, and the sums fill the workspace."""
    row_bytes = 2 * columns * (1 + (terms if terms > 1 else 0)) + 4 * error_rows
    rows = max(slabs.WORKSPACE_BYTES // max(row_bytes, 1), 1)
    return rows - rows % _SLAB_STEP if rows > _SLAB_STEP else rows


def _rounded(error: Tensor) -> Tensor:
    """fp32 to the nearest bf16, but cut off where that would be infinite."""
    nearest = error.bfloat16()
    cut = (error.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()
    return torch.where(nearest.isinf(), cut, nearest)


def split(error: Tensor, terms: int) -> Tensor:
    """An fp32 error [M, n] as its bf16 terms side by side, the smallest first: [M, terms * n].

    As the fused kernel's `split_bf16` (csrc/cuda/split.h).
    """
    parts = [_rounded(error)]
    while len(parts) < terms:
        error = torch.where(parts[-1].isfinite(), error - parts[-1].float(), 0.0)
        parts.append(_rounded(error))
    return torch.cat(parts[::-1], dim=1)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """The product of two 16-bit matrices, summed and returned in fp32."""
    return torch.mm(left, right, out_dtype=torch.float32)


def _project_by_slabs(
    error: Tensor,
    row_offsets: list[int],
    sizes: list[int],
    scales: list[float],
    seed: int,
    column_offset: int,
    distribution: str,
    dtype: torch.dtype,
    terms: int,
) -> list[Tensor]:
    """The slab way for 16-bit errors, and for fp32 ones as `terms` bf16 numbers each.

    A slab for one layer whose signal is of the operands' dtype is multiplied right into it.
    """
    signals = [error.new_empty(error.shape[0], size, dtype=dtype) for size in sizes]
    # Zeros before and behind the error, so that U's columns are aligned.
    head = column_offset % _COLUMN_STEP
    tail = -(head + error.shape[1]) % _COLUMN_STEP
    if head or tail:
        error = functional.pad(error, (head, tail))
    count, columns = error.shape
    operand = split(error, terms) if error.dtype == torch.float32 else error.contiguous()
    rows_at_once = _rows_at_once(count, columns, terms)
    unit = math.sqrt(3) if distribution == "uniform" else 1.0
    for part in slabs.union_slabs(row_offsets, sizes, scales, rows_at_once):
        slab = torch.ops.dfa_kernels.cuda_lattice(
            part.last - part.first,
            columns,
            seed,
            part.first,
            column_offset - head,
            distribution,
            operand.dtype,
            error.device,
        )
        entries = (slab.repeat(1, terms) if terms > 1 else slab).T
        if len(part.layers) == 1 and dtype == operand.dtype:
            (layer,) = part.layers
            out = signals[layer.place][:, part.overlap(layer)[1]]
            out.addmm_(operand, entries, beta=0, alpha=layer.scale * unit)
        else:
            sums = _multiply(operand, entries)
            for layer in part.layers:
                in_slab, in_layer = part.overlap(layer)
                out = signals[layer.place][:, in_layer]
                torch.mul(sums[:, in_slab], layer.scale * unit, out=out)
            del sums
        del slab, entries  # before the next ones are made
    return signals


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
    layers = (row_offsets, sizes, scales)
    if error.dtype == torch.float64:

        def generate(
            rows: int, columns: int, row_offset: int, column_offset: int, dtype: torch.dtype
        ) -> Tensor:
            return torch.ops.dfa_kernels.feedback_matrix.cuda(
                rows, columns, seed, row_offset, column_offset, distribution, dtype, error.device
            )

        return slabs.project(generate, error, *layers, column_offset, dtype or error.dtype)
    terms = TERMS[torch.get_float32_matmul_precision()] if error.dtype == torch.float32 else 1
    in_place = len(sizes) == 1 and (dtype or error.dtype) == error.dtype != torch.float32
    count, columns = error.shape
    by_slabs = prefers_slabs(row_offsets, sizes, count, columns, terms, distribution, in_place)
    if _log.isEnabledFor(logging.DEBUG):
        way = "slabs" if by_slabs else "fused"
        _log.debug("project %s, %d layers, %d terms: %s", [*error.shape], len(sizes), terms, way)
    arguments = (error, *layers, seed, column_offset, distribution)
    if by_slabs:
        return _project_by_slabs(*arguments, dtype or error.dtype, terms)
    return torch.ops.dfa_kernels.cuda_fused(*arguments, dtype, terms)
