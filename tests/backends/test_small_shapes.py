"""`small_shapes.py` runs everything a GPU backend can do, as a fake backend on the CPU shows."""

import contextlib
import functools
import io
import itertools
import sys

import pytest
import torch

from dfa_kernels import feedback_matrix, hadamard, project, stream
from dfa_kernels.checks import DTYPES
from tests.backends import small_shapes


class Fake:
    """A GPU backend on the CPU that records its calls, and projects."""

    DISTRIBUTIONS = stream.DISTRIBUTIONS

    def __init__(self):
        self.calls = []
        self.outputs = set()

    def unavailable(self, device_type):
        return None

    def way(self, name, error, layers, stream, dtype):
        precision = torch.get_float32_matmul_precision()
        seed, column_offset, distribution = stream
        self.calls.append((name, error, layers.sizes, column_offset, distribution, precision))
        self.outputs.add((name, error.dtype, dtype))
        return project(
            error,
            layers.sizes,
            seed=seed % 2**64,
            row_offsets=layers.row_offsets,
            normalization=layers.scales,
            column_offset=column_offset,
            distribution=distribution,
            dtype=dtype,
        )

    def ways(self, error, distribution):
        yield "wide", functools.partial(self.way, "wide")
        if error.dtype != torch.float64:
            yield "narrow", functools.partial(self.way, "narrow")

    def project(self, *arguments):
        return self.way("either", *arguments)

    def structured_adjoint(self, signals, layers, stream, columns, dtype):
        sizes = tuple(signal.shape[1] for signal in signals)
        assert sizes == layers.sizes
        error = hadamard.project_adjoint(signals, layers, stream, columns, dtype)
        self.calls.append(("transpose", error, sizes, *stream[1:], None))
        return error

    def feedback_matrix(self, rows, columns, row_offset, stream, dtype, device):
        seed, column_offset, distribution = stream
        where = {"row_offset": row_offset, "column_offset": column_offset, "dtype": dtype}
        matrix = feedback_matrix(
            rows, columns, seed=seed % 2**64, distribution=distribution, device=device, **where
        )
        self.calls.append(("matrix", matrix, (), column_offset, distribution, None))
        return matrix


def run_shapes(backend, part=(1, 1)):
    """Run the script for a backend on the CPU: its status, and what it printed."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setitem(sys.modules, "dfa_kernels.backends.fake", backend)
        status = small_shapes.main(["fake"], part, False, "cpu", lambda: None)
    return status, shown.getvalue()


@pytest.fixture(scope="module")
def everything():
    """A fake backend after a full run."""
    fake, before = Fake(), torch.get_float32_matmul_precision()
    status, shown = run_shapes(fake)
    assert status == 0, shown
    assert shown.endswith(f"fake: {len(fake.calls)} calls, 0 failed\n")
    assert torch.get_float32_matmul_precision() == before
    return fake


def test_every_way_runs_with_every_dtype_at_every_precision(everything):
    calls = everything.calls
    seen = {
        (name, error.dtype, distribution, precision)
        for name, error, sizes, _, distribution, precision in calls
        if sizes == small_shapes.SIZES and name != "transpose"
    }
    precisions = [(torch.float32, precision) for precision in ("highest", "high", "medium")]
    precisions += [(dtype, "highest") for dtype in DTYPES if dtype != torch.float32]
    assert seen == {
        (name, dtype, distribution, precision)
        for name in ("wide", "narrow")
        for dtype, precision in precisions
        for distribution in stream.DISTRIBUTIONS
        if precision == "highest" or distribution in stream.DENSE
        if (name, dtype) != ("narrow", torch.float64)
    }
    outputs = {(dtype, output) for dtype in DTYPES for output in (dtype, torch.float32)}
    for name in ("wide", "narrow"):
        taken = [(dtype, output) for way, dtype, output in everything.outputs if way == name]
        assert {*taken} >= {pair for pair in outputs if name == "wide" or torch.float64 not in pair}
    many = {name for name, _, sizes, *_ in calls if len(sizes) == small_shapes.MANY}
    assert many == {"wide", "narrow", "transpose"}
    transposes = {(error.dtype, len(sizes)) for name, error, sizes, *_ in calls if name[0] == "t"}
    counts = (len(small_shapes.SIZES), small_shapes.MANY)
    assert transposes == {(dtype, count) for dtype in DTYPES for count in counts}
    blocks = {(m.dtype, kind) for name, m, _, _, kind, _ in calls if name == "matrix"}
    assert blocks == {(dtype, kind) for dtype in DTYPES for kind in stream.DISTRIBUTIONS}


def test_the_shapes_are_awkward(everything):
    """More than three chunks of columns, odd sizes, and addresses aligned to a single element."""
    assert all(size % 2 for size in small_shapes.SIZES)
    for dtype in DTYPES:
        some = [
            (error, column_offset)
            for _, error, sizes, column_offset, *_ in everything.calls
            if sizes == small_shapes.SIZES and error.dtype == dtype
        ]
        assert all(error.shape[1] > 3 * 128 for error, _ in some)
        assert max(error.shape[1] for error, _ in some) > 2 * 512  # the longest step
        assert {error.storage_offset() for error, _ in some} == {0, 1}
        assert {column_offset for _, column_offset in some} == {0, 3}


def test_a_way_that_fails_does_not_stop_the_next(monkeypatch):
    class Broken(Fake):
        def ways(self, error, distribution):
            yield "broken", self.fail
            yield from super().ways(error, distribution)

        def fail(self, *arguments):
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(small_shapes, "DTYPES", (torch.bfloat16,))
    for part in ("terms_made_ahead", "few_blocks"):
        monkeypatch.setattr(small_shapes, part, lambda *_: ())
    broken = Broken()
    status, shown = run_shapes(broken)
    assert status == 1
    assert "failed: fake broken: 5 x 1088 bfloat16, normal, highest, to bfloat16: an " in shown
    # Aligned, to one dtype; misaligned, to two; many layers, dense and twice structured.
    failed = (1 + 2) * len(stream.DISTRIBUTIONS) + 3
    assert shown.endswith(f"fake: {len(broken.calls) + failed} calls, {failed} failed\n")
    assert len([call for call in broken.calls if call[0] == "narrow"]) == failed


def test_the_parts_are_the_whole(monkeypatch):
    monkeypatch.setattr(small_shapes, "DTYPES", (torch.float16, torch.float32))
    monkeypatch.setattr(small_shapes, "terms_made_ahead", lambda *_: ())
    whole, *parts = (run_shapes(Fake(), part) for part in ((1, 1), (1, 3), (2, 3), (3, 3)))
    lines = [shown.splitlines()[:-1] for _, shown in (whole, *parts)]
    assert sorted(itertools.chain(*lines[1:])) == sorted(lines[0])
    assert len(lines[0]) > 50


def test_a_backend_without_a_way_or_that_is_not_here_fails():
    backend = Fake()
    backend.ways = lambda error, distribution: []
    with pytest.raises(RuntimeError, match=r"fake has no way to project torch.float16, normal"):
        run_shapes(backend)
    backend.unavailable = lambda device_type: f"no {device_type} for it"
    assert run_shapes(backend) == (1, "failed: fake is not available: no cpu for it\n")


def test_the_profiled_calls_have_names_of_their_own():
    """Only listed, not called: without a GPU each takes seconds."""
    labels = [label for label, _ in small_shapes.large("fake", Fake(), "cpu")]
    assert len(set(labels)) == len(labels) == 7
