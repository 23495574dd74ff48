"""The projection by slabs for tensor cores: 16-bit operands, fp32 sums, the vendor's product.

Entries of U are exact in 16 bits, and so is a bf16 or fp16 error. An fp32 error is split into a sum
of bf16 numbers of 8 bits each, as many as `torch.get_float32_matmul_precision()` asks for.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from dfa_kernels.backends import slabs
from dfa_kernels.layers import Layers
from dfa_kernels.stream import DENSE, Stream

WORKSPACE_BYTES = 256 * 2**20  # fewer, larger slabs: less time of the host, and better products

TERMS = {"highest": 3, "high": 2, "medium": 1}

# The columns of a slab begin and end at multiples of _COLUMN_STEP, so that addresses are multiples
# of 16 bytes: matrix products and the making of U are then fast. More than _ROW_STEP rows are cut
# to a multiple of it, for the products.
_COLUMN_STEP = 8
_ROW_STEP = 128
_IN_PLACE_COLUMNS = 2**11  # beyond, a vendor's product may add up its parts in 16 bits
_BATCH = 2**14  # the largest batch of a slab, so that its sums leave room for it


@functools.cache
def too_old() -> str | None:
    """Which of this machine's NVIDIA GPUs have no tensor cores for bf16, or None."""
    old = [
        f"{torch.cuda.get_device_name(i)} is sm_{major}{minor}"
        for i in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(i)]
        if major < 8
    ]
    return f"it needs compute capability 8.0 on every device, but {', '.join(old)}" if old else None


def terms_of(error: Tensor) -> int:
    """How many 16-bit numbers an error, which is not fp64, is split into."""
    return TERMS[torch.get_float32_matmul_precision()] if error.dtype == torch.float32 else 1


def split(error: Tensor, terms: int) -> Tensor:
    """An fp32 error [batch, n] as bf16 terms that add up to it: [batch, terms * n].

    The terms are side by side, the smallest first. Infinities and NaN are in the largest alone.
    """
    parts = [_rounded(error)]
    while len(parts) < terms:
        error = torch.where(parts[-1].isfinite(), error - parts[-1].float(), 0.0)
        parts.append(_rounded(error))
    return torch.cat(parts[::-1], dim=1)


def _rounded(error: Tensor) -> Tensor:
    """fp32 to the nearest bf16, or truncated if rounding would make it infinite."""
    nearest = error.bfloat16()
    cut = (error.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()
    return torch.where(nearest.isinf(), cut, nearest)


def product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two 16-bit matrices, summed and returned in fp32."""
    if left.device.type == "cpu":  # torch has none with a wider result there
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def written_in_place(error: Tensor, layers: int, dtype: torch.dtype) -> bool:
    """Whether a slab's product is written straight into a signal.

    It is if it is for one layer, sums few columns, and the signal has the operands' dtype. Any
    other product is summed in fp32 and scaled into the layers in a separate pass, which costs
    little beside a long product.
    """
    short = error.shape[1] <= _IN_PLACE_COLUMNS
    return short and layers == 1 and dtype == error.dtype != torch.float32


def slab_rows(batch: int, columns: int, terms: int, in_place: bool) -> int:
    """Rows of a slab that fits the workspace with its copies for several terms and its sums."""
    row_bytes = 2 * columns * (1 if terms == 1 else 1 + terms)
    if not in_place:
        row_bytes += 4 * min(batch, _BATCH)
    rows = max(WORKSPACE_BYTES // max(row_bytes, 1), 1)
    return rows - rows % _ROW_STEP if rows > _ROW_STEP else rows


def slab_count(rows: int, batch: int, columns: int, terms: int, in_place: bool) -> int:
    """How many slabs `rows` rows of U take for a whole batch."""
    return -(-rows // slab_rows(batch, columns, terms, in_place)) * -(-batch // _BATCH)


def project(
    lattice: slabs.Generate, error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype
) -> list[Tensor]:
    """The signals of an error [batch, n], not fp64: one [batch, size] of `dtype` per layer.

    `lattice` makes entries without the factor sqrt(3) of uniform ones.
    """
    signals = [error.new_empty(error.shape[0], size, dtype=dtype) for size in layers.sizes]
    # Zeros before and after the error fill up whole steps of columns.
    before = stream.column_offset % _COLUMN_STEP
    after = -(before + error.shape[1]) % _COLUMN_STEP
    terms = terms_of(error)
    in_place = written_in_place(error, len(layers.sizes), dtype)
    factor = DENSE[stream.distribution].factor
    for top, bottom in slabs.cut(error.shape[0], _BATCH):
        part = functional.pad(error[top:bottom], (before, after))
        batch, columns = part.shape
        part = split(part, terms) if error.dtype == torch.float32 else part.contiguous()
        for slab in layers.slabs(slab_rows(batch, columns, terms, in_place)):
            entries = lattice(slab.rows, columns, slab.first, stream.after(-before), part.dtype)
            if terms > 1:
                entries = entries.repeat(1, terms)
            outputs = []
            for layer in slab.layers:
                in_layer, in_slab = layers.overlap(layer, slab)
                output = signals[layer][top:bottom, in_layer]
                outputs.append((output, in_slab, layers.scales[layer] * factor))
            if written_in_place(error, len(outputs), dtype):
                ((output, _, scale),) = outputs
                output.addmm_(part, entries.T, beta=0, alpha=scale)
            else:
                sums = product(part, entries.T)
                for output, in_slab, scale in outputs:
                    torch.mul(sums[:, in_slab], scale, out=output)
                del sums  # before the next are made; so too the entries
            del entries
    return signals
