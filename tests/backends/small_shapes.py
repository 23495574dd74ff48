"""Runs every tile and way of the GPU backends at small awkward shapes, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/backends/small_shapes.py [BACKEND ...]
    python tests/backends/small_shapes.py triton --part 2/16    # 2nd of 16, to share compilation
    ncu python tests/backends/small_shapes.py --large

With `--large` it runs large shapes instead, for a profiler. The default is all GPU backends. A
failed call does not stop the next; the exit status says whether one failed. Imports only the
package and launches as little as possible, because everything is slow under a sanitizer.
"""

import argparse
import functools
import importlib
import itertools
import sys

import torch

from dfa_kernels import stream
from dfa_kernels.layers import Layers

BACKENDS = ("cuda", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PRECISIONS = ("highest", "high", "medium")  # of an fp32 error

# Batch and columns of an error, elements stored before its first, and the column of U it begins at.
# Each has several chunks of 64 or 128 columns. One has more than two steps of 512, the longest, so
# that the stages of a pipeline come round again. Batch and columns lie around a tile's edge. One
# error is as aligned as can be, the other not at all.
ERRORS = ((5, 1088, 0, 0), (131, 397, 1, 3))
# Odd sizes. Some layers share rows, some do not, and one begins far away.
SIZES, ROW_OFFSETS = (33, 7, 129, 1, 257), (0, 0, 5, 300, 2**40)
MANY = 300  # layers, more than fit in the arguments of a launch


def error_of(rows, columns, before, dtype, device):
    """An error made on the CPU: the sanitizers see what a copy writes."""
    storage = torch.randn(before + rows * columns, dtype=torch.float64).to(dtype).to(device)
    return storage[before:].view(rows, columns)


def arguments(error, row_offsets, sizes, column_offset, distribution):
    """The arguments of a backend's `project` and of its ways."""
    layers = Layers.of(row_offsets, sizes, [0.5] * len(sizes))
    return error, layers, stream.Stream(-3, column_offset, distribution)


def ways_of(name, backend, error, distribution):
    """(label, way) for every way of a backend that takes this error."""
    ways = list(backend.ways(error, distribution))
    if not ways:
        raise RuntimeError(f"{name} has no way to project {error.dtype}, {distribution}")
    shape = f"{error.shape[0]} x {error.shape[1]} {str(error.dtype)[6:]}, {distribution}"
    return [(f"{name} {label}: {shape}", way) for label, way in ways]


def projections(name, backend, device):
    """(label, call) for every way, every dtype, and every precision that a product of fp32 has.

    Signals have the error's dtype. A misaligned error also gives fp32 signals.
    """
    for distribution, dtype, (rows, columns, before, column_offset) in itertools.product(
        backend.DISTRIBUTIONS, DTYPES, ERRORS
    ):
        error = error_of(rows, columns, before, dtype, device)
        given = arguments(error, ROW_OFFSETS, SIZES, column_offset, distribution)
        outputs = dict.fromkeys((dtype, torch.float32) if before else (dtype,))
        by_terms = dtype == torch.float32 and distribution in stream.DENSE
        for precision in PRECISIONS if by_terms else PRECISIONS[:1]:
            torch.set_float32_matmul_precision(precision)
            for (label, way), output in itertools.product(
                ways_of(name, backend, error, distribution), outputs
            ):
                label = f"{label}, {precision}, to {str(output)[6:]}"
                yield label, functools.partial(way, *given, output)


def many_layers(name, backend, device):
    """(label, call) for every way of a bf16 error with enough layers to need an uploaded table.

    They lie in 18 blocks of structured feedback, the second error in two of its columns.
    """
    sizes = [1 + i % 40 for i in range(MANY)]
    kinds = [("normal", 77), *itertools.product(structured(backend), (77, 1088))]
    for distribution, columns in kinds:
        error = error_of(5, columns, 0, torch.bfloat16, device)
        given = arguments(error, range(0, 60 * MANY, 60), sizes, 0, distribution)
        for label, way in ways_of(name, backend, error, distribution):
            yield f"{label}, {MANY} layers", functools.partial(way, *given, torch.bfloat16)


def few_blocks(name, backend, device):
    """(label, call) of structured feedback where rows of the error share what makes a block."""
    for distribution, dtype, size in itertools.product(
        structured(backend), (torch.float32, torch.float64), (1000, 2000, 4000, 6000)
    ):
        error = error_of(9, 1088 if size == 6000 else 77, 0, dtype, device)
        given = arguments(error, (3,), (size,), 0, distribution)
        for label, way in ways_of(name, backend, error, distribution):
            yield f"{label}, a layer of {size}", functools.partial(way, *given, dtype)


def structured(backend):
    """The structured distributions that a backend makes."""
    return [name for name in stream.STRUCTURED if name in backend.DISTRIBUTIONS]


def transposes(name, backend, device):
    """(label, call) for the transpose of structured feedback, with few layers and many."""
    for distribution, dtype, (rows, columns, before, column_offset), layers in itertools.product(
        structured(backend), DTYPES, ERRORS, ((SIZES, ROW_OFFSETS), ((7,) * MANY, range(MANY)))
    ):
        sizes, row_offsets = layers
        error = error_of(rows, columns, before, dtype, device)
        _, *given = arguments(error, row_offsets, sizes, column_offset, distribution)
        signals = [error_of(rows, size, 0, dtype, device) for size in sizes]
        label = f"{name} transpose of {len(sizes)} layers: {rows} x {columns} {str(dtype)[6:]}"
        transpose = backend.structured_adjoint
        yield label, functools.partial(transpose, signals, *given, columns, dtype)


def terms_made_ahead(name, backend, device):
    """(label, call) for an fp32 error and enough entries that its terms are made beforehand."""
    error = error_of(3, 1001, 0, torch.float32, device)
    given = (*arguments(error, [0], [2**25 // 1000], 0, "normal"), torch.float32)
    for precision in PRECISIONS:
        torch.set_float32_matmul_precision(precision)
        yield f"{name} 2^25 entries, {precision}", functools.partial(backend.project, *given)


def blocks(name, backend, device):
    """(label, call) of pieces of U that begin and end anywhere."""
    for distribution, dtype in itertools.product(backend.DISTRIBUTIONS, DTYPES):
        where = (37, 131, 5, stream.Stream(-3, 3, distribution), dtype, torch.device(device))
        label = f"{name} block of U: {str(dtype)[6:]}, {distribution}"
        yield label, functools.partial(backend.feedback_matrix, *where)


def small(name, backend, device):
    """(label, call) for everything a backend can do."""
    for part in (projections, many_layers, few_blocks, terms_made_ahead, transposes, blocks):
        yield from part(name, backend, device)


def large(name, backend, device):
    """(label, call) for the fused kernel where generation costs most, and for a slab's entries."""
    for dtype, distribution in itertools.product(
        (torch.bfloat16, torch.float32), ("normal", "rademacher", *structured(backend))
    ):
        error = error_of(128, 1000, 0, dtype, device)
        given = (*arguments(error, [0], [200_000], 0, distribution), dtype)
        label = f"{name} 128 x 1000 {str(dtype)[6:]}, {distribution}, 200,000 rows of U"
        yield label, functools.partial(backend.project, *given)
    matrix = stream.Stream(0, 0, "normal")
    where = (2**15, 1000, 0, matrix, torch.bfloat16, torch.device(device))
    label = f"{name} block of U: 2^15 x 1000 bfloat16"
    yield label, functools.partial(backend.feedback_matrix, *where)


def run(calls, synchronize):
    """Make the calls, each label printed ahead of a sanitizer's report on it: (made, failed)."""
    made, failed = 0, 0
    for label, call in calls:
        print(label, flush=True)
        made += 1
        try:
            call()
            synchronize()
        except Exception as error:
            failed += 1
            print(f"failed: {label}: {error}", flush=True)
    return made, failed


def main(names, part=(1, 1), with_large=False, device="cuda", synchronize=torch.cuda.synchronize):
    """Run a part, such as (2, 16), of the named backends; return how many backends failed."""
    wrong = 0
    before = torch.get_float32_matmul_precision()
    for name in names:
        backend = importlib.import_module(f"dfa_kernels.backends.{name}")
        reason = backend.unavailable(device)
        if reason:
            print(f"failed: {name} is not available: {reason}")
            wrong += 1
            continue
        torch.manual_seed(0)
        calls = (large if with_large else small)(name, backend, device)
        made, failed = run(itertools.islice(calls, part[0] - 1, None, part[1]), synchronize)
        print(f"{name}: {made} calls, {failed} failed")
        wrong += failed > 0
    torch.set_float32_matmul_precision(before)
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backends", nargs="*", help=f"by default {' and '.join(BACKENDS)}")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every Nth, from the Ith on")
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    part = tuple(map(int, options.part.split("/")))
    sys.exit(main(options.backends or BACKENDS, part, options.large))
