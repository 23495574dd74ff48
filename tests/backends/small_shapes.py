"""Every tile and way of the GPU backends at small awkward shapes, for compute-sanitizer; the large
ones for a profiler.

    compute-sanitizer --tool memcheck python tests/backends/small_shapes.py [BACKEND ...]
    python tests/backends/small_shapes.py triton --part 2/16    # the second of 16, to compile all
    ncu python tests/backends/small_shapes.py --large

By default of all GPU backends. A call that fails does not stop the next; the exit status says
whether one did. Imports only the package, and launches no more than it must: under a sanitizer
everything costs.
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

# Rows and columns of an error, elements before its first, and the column of U that it begins at.
# Several chunks of 64 or 128 columns, and once more than two steps of 512, the longest there are,
# so that every stage of a pipeline comes round again; rows and columns around a tile's edge; as
# aligned as can be, and not at all.
ERRORS = ((5, 1088, 0, 0), (131, 397, 1, 3))
# Odd sizes, of layers that share rows, that do not, and that begin far away.
SIZES, ROW_OFFSETS = (33, 7, 129, 1, 257), (0, 0, 5, 300, 2**40)
MANY = 300  # layers, more than travel as arguments of a launch


def error_of(rows, columns, before, dtype, device):
    """An error made on the CPU: what a copy writes, the sanitizers see."""
    storage = torch.randn(before + rows * columns, dtype=torch.float64).to(dtype).to(device)
    return storage[before:].view(rows, columns)


def arguments(error, row_offsets, sizes, column_offset, distribution):
    """What a backend's `project` and its ways take."""
    layers = Layers.of(row_offsets, sizes, [0.5] * len(sizes))
    return error, layers, stream.Stream(-3, column_offset, distribution)


def ways_of(name, backend, error, distribution):
    """(label, way) of every way of a backend that takes this error."""
    ways = list(backend.ways(error, distribution))
    if not ways:
        raise RuntimeError(f"{name} has no way to project {error.dtype}, {distribution}")
    shape = f"{error.shape[0]} x {error.shape[1]} {str(error.dtype)[6:]}, {distribution}"
    return [(f"{name} {label}: {shape}", way) for label, way in ways]


def projections(name, backend, device):
    """(label, call) of every way with every dtype, at every precision of fp32.

    Signals are of the error's dtype, and of fp32 too where the error is not aligned.
    """
    for distribution, dtype, (rows, columns, before, column_offset) in itertools.product(
        stream.DISTRIBUTIONS, DTYPES, ERRORS
    ):
        error = error_of(rows, columns, before, dtype, device)
        given = arguments(error, ROW_OFFSETS, SIZES, column_offset, distribution)
        outputs = dict.fromkeys((dtype, torch.float32) if before else (dtype,))
        for precision in PRECISIONS if dtype == torch.float32 else PRECISIONS[:1]:
            torch.set_float32_matmul_precision(precision)
            for (label, way), output in itertools.product(
                ways_of(name, backend, error, distribution), outputs
            ):
                label = f"{label}, {precision}, to {str(output)[6:]}"
                yield label, functools.partial(way, *given, output)


def many_layers(name, backend, device):
    """(label, call) of every way of a bf16 error into so many layers that a table goes ahead."""
    error = error_of(5, 77, 0, torch.bfloat16, device)
    sizes = [1 + i % 40 for i in range(MANY)]
    given = arguments(error, range(0, 60 * MANY, 60), sizes, 0, "normal")
    for label, way in ways_of(name, backend, error, "normal"):
        yield f"{label}, {MANY} layers", functools.partial(way, *given, torch.bfloat16)


def terms_made_ahead(name, backend, device):
    """(label, call) of an fp32 error and so many entries that its terms are made beforehand."""
    error = error_of(3, 1001, 0, torch.float32, device)
    given = (*arguments(error, [0], [2**25 // 1000], 0, "normal"), torch.float32)
    for precision in PRECISIONS:
        torch.set_float32_matmul_precision(precision)
        yield f"{name} 2^25 entries, {precision}", functools.partial(backend.project, *given)


def blocks(name, backend, device):
    """(label, call) of pieces of U that begin and end anywhere."""
    for distribution, dtype in itertools.product(stream.DISTRIBUTIONS, DTYPES):
        where = (37, 131, 5, stream.Stream(-3, 3, distribution), dtype, torch.device(device))
        label = f"{name} block of U: {str(dtype)[6:]}, {distribution}"
        yield label, functools.partial(backend.feedback_matrix, *where)


def small(name, backend, device):
    """(label, call) of everything a backend can do."""
    for part in (projections, many_layers, terms_made_ahead, blocks):
        yield from part(name, backend, device)


def large(name, backend, device):
    """(label, call) of the fused kernel where generation costs most, and of blocks for slabs."""
    for dtype, distribution in itertools.product(
        (torch.bfloat16, torch.float32), ("normal", "rademacher")
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
    """Make the calls, each named before what a sanitizer says of it: how many, how many failed."""
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
    """Run a part, such as (2, 16), of the backends that are named; how many of those failed."""
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
