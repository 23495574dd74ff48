"""Checks that a backend computes what it should on this machine; see `checks_of`.

`python -m dfa_kernels verify` prints it as a table.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dfa_kernels import checks, hadamard, ops, stream
from dfa_kernels.backends import cpp, tensor_cores, trial
from dfa_kernels.backends.registry import BACKENDS, unavailable
from dfa_kernels.cases import LAYERS, LONE_LAYER, MANY_BLOCKS, Case, Signal
from dfa_kernels.layers import Layers
from dfa_kernels.stream import Stream

# Random123's known answer for counter and key pi, and the codebook's bf16 patterns.
_COUNTER = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
_KEY = (0xA4093822, 0x299F31D0)
_BLOCK = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
_CODEBOOK = "5ed3a79e706d6115f423a79720ff5fa68f0a6724c3fbd8b75d4e18c361900340"

# Pieces of U: seed, rows, columns, row offset, column offset. The first crosses row 2**32 and has
# more than 2**18 entries, so that every normal level occurs. The last ends where U ends.
_BLOCKS = (
    (-3, 512, 521, 2**32 - 200, 8 * 12_345 + 3),
    (0, 9, 131, 0, 0),
    (-(2**63), 5, 140, 2**31 - 2, 127),
    (2**32, 9, 131, 2**63 - 9, 2**34 - 131),
)


# 1024 times entries of structured feedback, of seed 42 from row 1023 and column 1022 on: where four
# blocks meet.
_STRUCTURED = [[1440, 704, 660], [-544, 360, -988]]


# A case is its name and a function that returns its mistake, or None.
Cases = Iterable[tuple[str, Callable[[], str | None]]]


class Check(NamedTuple):
    """What was checked, in how many cases and seconds, and the first mistake, if any."""

    what: str
    cases: int
    seconds: float
    mistake: str | None


def checks_of(backend: str, device: torch.device, only: str | None = None) -> Iterator[Check]:
    """Check an available backend on a device, one aspect after the other, or `only` one of them.

    Compares with the definition in PyTorch on the CPU, which is first compared with known answers:
    the bits of U in every distribution and dtype, and the signals of every way that a projection
    can go there (each tile, number of terms of an fp32 error, and instruction set). Stops if a
    fault puts the GPU out of use.

    Raises RuntimeError if the backend is not available there.
    """
    if reason := unavailable(backend, device.type):  # to ask also loads an extension's kernels
        raise RuntimeError(f"verify: backend {backend!r} cannot serve {device.type}: {reason}")
    for mode in getattr(BACKENDS[backend], "modes", lambda: ("",))():
        for name, check in _aspects(backend, device):
            if only is not None and name != only:
                continue
            result = check()
            yield result._replace(what=f"{result.what}{f', {mode}' if mode else ''}")
            if lost := _lost(device):
                yield lost
                return


def checks_side_by_side(backend: str, device: torch.device, processes: int) -> Iterator[Check]:
    """The same, each aspect in its own process, `processes` at once.

    For Triton, which compiles for each aspect.
    """
    names = [name for name, _ in _aspects(backend, device)]
    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(functools.partial(_in_a_process, backend, device), names)


def _aspects(backend: str, device: torch.device) -> Iterator[tuple[str, Callable[[], Check]]]:
    """The aspects to check, each with its name."""

    def aspect(name: str, cases: Cases) -> tuple[str, Callable[[], Check]]:
        return name, functools.partial(_check, name, cases)

    yield aspect("the definition, against known answers", [("this machine", _definition)])
    for distribution in BACKENDS[backend].DISTRIBUTIONS:
        pieces = [
            (f"{dtype}", functools.partial(_entries, backend, device, distribution, dtype, *piece))
            for dtype in checks.DTYPES
            for piece in _BLOCKS
        ]
        yield aspect(f"entries, {distribution}", pieces)
    for dtype, precision in _errors(backend):
        signals = _signals(backend, device, dtype, precision)
        yield aspect(f"signals, {_named(dtype, precision)}", signals)
    for distribution in stream.STRUCTURED:
        if distribution in BACKENDS[backend].DISTRIBUTIONS:
            for dtype in checks.DTYPES:
                cases = _structured(backend, device, distribution, dtype)
                yield aspect(f"signals and transposes, {distribution}, {_named(dtype)}", cases)


def _in_a_process(backend: str, device: torch.device, name: str) -> Check:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dfa_kernels-") as folder:
        report = Path(folder, "report.json")
        ended = subprocess.run(
            [*trial.command(backend, device, report), "--only", name],
            cwd=folder,
            env=trial.environment(),
            capture_output=True,
            text=True,
            errors="replace",
        )
        result = trial.load(report)
    said = (ended.stdout + ended.stderr).strip().splitlines()[-1:]
    failures = result.get(
        "failures", [f"it ended with status {ended.returncode}: {' '.join(said)}"]
    )
    mistake = "; ".join(failures).removeprefix(f"{name}: ") or None
    return Check(name, result.get("cases", 0), time.perf_counter() - start, mistake)


def _check(what: str, cases: Cases) -> Check:
    """Run the cases and sum up the result."""
    start = time.perf_counter()
    mistakes, count = [], 0
    with _poisoned():
        name, remaining = "preparation", iter(cases)
        while True:
            try:  # an exception of a kernel or a compiler is its result
                name, case = next(remaining, (name, None))
                if case is None:
                    break
                count += 1
                mistake = case()
            except Exception as error:
                said = str(error).strip() or "no message"
                mistake = f"{type(error).__name__}: {said.splitlines()[0]}"
            if mistake is not None:
                mistakes.append(f"{name}: {mistake}")
    mistake = None
    if mistakes:
        mistake = f"{len(mistakes)} of {count} cases, the first is {mistakes[0]}"
    return Check(what, count, time.perf_counter() - start, mistake)


def _definition() -> str | None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in _COUNTER)
    if [int(word) for word in stream.philox((c0, c1, c2, c3), _KEY)] != _BLOCK:
        return "a block of Philox4x32-10 is not Random123's"
    levels = stream.levels("normal", torch.bfloat16, torch.device("cpu"))
    patterns = levels.view(torch.int16).numpy().astype("<i2").tobytes()
    if hashlib.sha256(patterns).hexdigest() != _CODEBOOK:
        return "the codebook of normal entries has other values"
    place = (2, 3, 1023, Stream(42, 1022, "hadamard"), torch.float32, torch.device("cpu"))
    if (hadamard.feedback_matrix(*place) * 1024).tolist() != _STRUCTURED:
        return "structured feedback has other entries"
    return None


def _entries(
    backend: str,
    device: torch.device,
    distribution: str,
    dtype: torch.dtype,
    seed: int,
    rows: int,
    columns: int,
    row_offset: int,
    column_offset: int,
) -> str | None:
    piece = (rows, columns, row_offset, Stream(seed, column_offset, distribution), dtype)
    found = ops.feedback_matrix(*piece, device, backend).cpu()
    with _one_thread():
        expected = ops.feedback_matrix(*piece, torch.device("cpu"), "torch")
    return _difference(found, expected, "entries, the first at", row_offset, column_offset)


def _difference(
    found: Tensor, expected: Tensor, which: str, first_row: int = 0, first_column: int = 0
) -> str | None:
    """How a matrix differs from the expected one, or None. Rows and columns count from these."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} of shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    wrong = found != expected  # NaN counts as wrong
    if not wrong.any():
        return None
    row, column = (int(i) for i in wrong.nonzero()[0])
    return (
        f"{int(wrong.sum())} of {wrong.numel()} {which} row {first_row + row}, column "
        f"{first_column + column}: {found[row, column]:.9g} instead of {expected[row, column]:.9g}"
    )


def _signals(
    backend: str, device: torch.device, dtype: torch.dtype, precision: str
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """The cases for one kind of error: all ways, dense distributions and dtypes of the signals."""
    lattice = backend != "torch" and dtype != torch.float64
    terms = tensor_cores.TERMS[precision] if dtype == torch.float32 else 3
    with _precision(precision):
        for distribution, layers in itertools.product(stream.DENSE, (LAYERS, LONE_LAYER)):
            case = Case.of(dtype, distribution, layers=layers)
            error = case.error.to(device)
            for out in dict.fromkeys((dtype, torch.float32)):
                with _one_thread():
                    expected = case.expected(out, terms=terms, lattice=lattice)
                for name, project in ways_of(backend, error, distribution):
                    # Slabs write a single layer by another path. Tiles do not, and Triton would
                    # have to compile them for it.
                    if layers is LONE_LAYER and name.startswith("fused"):
                        continue
                    yield (
                        f"{name}, {distribution}, {out}",
                        functools.partial(_projected, project, case, error, out, expected),
                    )


def _structured(
    backend: str, device: torch.device, distribution: str, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Signals of structured feedback in every way, and their transposes: each number is fixed.

    The error lies in one block of columns or in two, and layers read few blocks of rows or many.
    """
    for columns, layers in ((700, MANY_BLOCKS), (1041, LAYERS), (1041, MANY_BLOCKS)):
        case = Case.of(dtype, distribution, columns=columns, unit_rows=5, layers=layers)
        error = case.error.to(device)
        for out in (dtype,) if dtype == torch.float64 else dict.fromkeys((dtype, torch.float32)):
            with _one_thread():
                expected = case.expected(out, terms=3, lattice=False)
            shape = f"{dtype} to {out}, {columns} columns, {len(layers.sizes)} layers"
            for name, project in ways_of(backend, error, distribution):
                yield (
                    f"{name}, {shape}",
                    functools.partial(_projected, project, case, error, out, expected),
                )
            signals = [one.values.to(out) for one in expected]
            yield (
                f"transpose, {shape}",
                functools.partial(_transposed, backend, device, case, signals),
            )


def _transposed(
    backend: str, device: torch.device, case: Case, signals: list[Tensor]
) -> str | None:
    columns, dtype = case.error.shape[1], case.error.dtype
    operator = getattr(torch.ops.dfa_kernels.structured_adjoint, backend)
    there = [signal.to(device) for signal in signals]
    where = (case.layers.row_offsets, case.layers.scales, *case.stream)
    found = operator(there, *where, columns, dtype).cpu()
    with _one_thread():
        expected = hadamard.project_adjoint(signals, case.layers, case.stream, columns, dtype)
    return _difference(found, expected, "numbers, the first in")


def ways_of(backend: str, error: Tensor, distribution: str) -> list[tuple[str, Callable]]:
    """Every way to project such an error: its name and its function.

    First the backend's operator, which chooses a way by itself, then each that it may choose.
    """
    forced = getattr(BACKENDS[backend], "ways", lambda error, distribution: ())
    operator = getattr(torch.ops.dfa_kernels.project, backend)

    def chosen(error: Tensor, layers: Layers, stream: Stream, dtype: torch.dtype) -> list[Tensor]:
        return operator(error, *layers, *stream, dtype)

    return [("its own choice", chosen), *forced(error, distribution)]


def _projected(
    project: Callable,
    case: Case,
    error: Tensor,
    dtype: torch.dtype,
    expected: list[Signal],
) -> str | None:
    signals = project(error, case.layers, case.stream, dtype)
    for signal in signals:
        if signal.dtype != dtype or signal.device != error.device:
            return f"a signal of {signal.dtype} on {signal.device}"
        if not signal.is_contiguous():
            return f"a signal of strides {signal.stride()}"
    return case.mistake(signals, expected)


def _errors(backend: str) -> Iterator[tuple[torch.dtype, str]]:
    """Dtypes of errors, each with the precisions of fp32 products that make a difference."""
    for dtype in checks.DTYPES:
        by_terms = dtype == torch.float32 and backend in ("cuda", "triton")
        for precision in tensor_cores.TERMS if by_terms else ("highest",):
            yield dtype, precision


def _named(dtype: torch.dtype, precision: str = "highest") -> str:
    name = str(dtype).removeprefix("torch.")
    return name if precision == "highest" else f"{name} at precision {precision!r}"


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    """Set the precision of fp32 products, and restore it afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute expected values in one thread: on a busy machine more would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, so that a signal which a kernel leaves unwritten cannot pass.

    The allocator might hand it the right signals of the case before.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    ours = cpp.unavailable("cpu") is None  # its signals are not from torch.empty
    filled = ours and torch.ops.dfa_kernels.fill_signals(True)
    try:
        yield
    finally:
        if ours:
            torch.ops.dfa_kernels.fill_signals(filled)
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _lost(device: torch.device) -> Check | None:
    """A failed check if the GPU no longer answers, else None."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return Check("the rest", 0, 0.0, f"not checked: the GPU is out of use ({reason})")
    return None
