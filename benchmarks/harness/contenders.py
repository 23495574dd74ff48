"""The contenders: ways to compute the signals of all layers.

Those with a stored matrix store U itself, so all are checked against the same rows; "randn blocks"
is checked against its own. Setting up what is kept between calls is not timed.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from benchmarks.harness import gate
from benchmarks.harness.roofs import NAMES, PRECISIONS, Work, projection_additions, sources
from benchmarks.harness.shapes import STRUCTURED, Case
from dfa_kernels import feedback_matrix, project, stream
from dfa_kernels.backends.tensor_cores import TERMS
from dfa_kernels.hadamard import BLOCK

KEPT = 2 * 2**20  # bytes of a matrix that "cpp" keeps, at most
DEFINITION = 2**24  # entries; `torch`, the definition, sits out larger sets of different layers


class Storage:
    """The matrix U of a case, generated once for all contenders that store it."""

    def __init__(self, case: Case, backend: str | None):
        self.case, self.backend = case, backend

    def block(self, rows: int) -> Tensor:
        """A copy of U[:rows]."""
        case = self.case
        options = {"distribution": case.distribution, "dtype": case.dtype}
        options |= {"device": case.device_type, "backend": self.backend}
        return feedback_matrix(rows, case.n, **options)

    @cached_property
    def shared(self) -> Tensor:
        """U[:l_max]."""
        return self.block(max(self.case.sizes))

    @property
    def is_made(self) -> bool:
        """Whether `shared` is in memory already."""
        return "shared" in vars(self)


class Contender(ABC):
    """`prepare` it once, then call it for a signal [M, l_i] of each layer."""

    name: str
    slices_are_scaled = True  # by layer; else all layers have the scale of the largest

    def __init__(self, case: Case):
        self.case = case
        self.union = max(case.sizes)  # rows of the shared matrix
        self.stored_bytes = 0  # of matrices
        self.kept_bytes = 0  # of anything else that is kept between calls
        self.prepared: Callable[[], list[Tensor]]

    def __call__(self) -> list[Tensor]:
        return self.prepared()

    @abstractmethod
    def prepare(self, error: Tensor, storage: Storage) -> None:
        """Set up what is kept between calls, and `prepared`, the call itself."""

    @abstractmethod
    def work(self) -> Work:
        """What a call must move, multiply and generate."""

    def check(self, error: Tensor, signals: list[Tensor]) -> None:
        """Raise gate.Wrong unless these are the signals of its matrix."""
        case = self.case
        relative = gate.tolerance(case.dtype, case.precision, case.n)
        gate.check_signals(signals, error, case.sizes, self.scales(), self.row, relative)

    def scales(self) -> list[float]:
        sizes = self.case.sizes if self.slices_are_scaled else [self.union] * len(self.case.sizes)
        return [1 / math.sqrt(size * self.case.n) for size in sizes]

    def row(self, index: int) -> Tensor:
        """A row of the matrix that it multiplies by, [n] in float64 on the CPU."""
        return gate.exact_row(index, self.case.n, self.case.distribution)

    def product(self, rows: int, *, read: int = 0, **rest) -> Work:
        """The work of reading the error and multiplying it by a matrix [rows, n]."""
        case = self.case
        arithmetic = NAMES[case.dtype]
        if case.dtype == torch.float32 and case.device_type == "cuda":
            arithmetic = PRECISIONS[case.precision]
        return Work(
            read=case.batch * case.n * case.dtype.itemsize + read,
            multiplications=case.batch * rows * case.n,
            arithmetic=arithmetic,
            **rest,
        )


class Seeded(Contender):
    """A backend of ours. It stores nothing, but "cpp" keeps the entries of small matrices."""

    def __init__(self, case: Case, backend: str):
        super().__init__(case)
        self.name = self.backend = backend
        kept = 2 * self.union * case.n
        if backend == "cpp" and _keeps(case) and kept <= KEPT:
            self.kept_bytes = kept

    def prepare(self, error: Tensor, storage: Storage) -> None:
        sizes, options = list(self.case.sizes), {"distribution": self.case.distribution}
        self.prepared = lambda: project(error, sizes, backend=self.backend, **options)

    def work(self) -> Work:
        case = self.case
        work = self.product(
            self.union,
            read=self.kept_bytes,
            written=case.written_bytes,
            entries=0 if self.kept_bytes else self.union * case.n,
            source=self.backend,
            distribution=case.distribution,
        )
        if self.backend in ("cuda", "triton") and case.dtype == torch.float32:
            passes = TERMS[case.precision]  # one for each bf16 term of the error
            work = replace(work, multiplications=passes * work.multiplications, arithmetic="bf16")
        return work


def _keeps(case: Case) -> bool:
    """Whether "cpp" keeps entries of such a case, if they are few (see csrc/cpu/kept.h)."""
    on = os.environ.get("DFA_KERNELS_KEEP") != "0"
    return on and case.distribution == "normal" and case.batch <= 128


class Structured(Contender):
    """The preferred backend of ours with a structured matrix, beside the dense ones."""

    name = STRUCTURED

    def __init__(self, case: Case):
        super().__init__(case)
        self.backend = sources(case.device_type, "hadamard")[0]

    def prepare(self, error: Tensor, storage: Storage) -> None:
        sizes, options = list(self.case.sizes), {"distribution": "hadamard"}
        self.prepared = lambda: project(error, sizes, backend=self.backend, **options)

    def row(self, index: int) -> Tensor:
        return gate.exact_row(index, self.case.n, "hadamard")

    def work(self) -> Work:
        case = self.case
        return Work(
            read=case.batch * case.n * case.dtype.itemsize,
            written=case.written_bytes,
            additions=projection_additions(case.batch, self.union, case.n),
            source=self.backend,
            distribution="hadamard",
        )


class Naive(Contender):
    """Naive dense storage: a matrix, a product and a scaling for each layer."""

    name = "naive"

    def __init__(self, case: Case):
        super().__init__(case)
        self.stored_bytes = sum(case.sizes) * case.n * case.dtype.itemsize

    def prepare(self, error: Tensor, storage: Storage) -> None:
        matrices = [storage.block(size) for size in self.case.sizes]
        pairs = list(zip(matrices, self.scales(), strict=True))
        self.prepared = lambda: [(error @ u.T).mul_(scale) for u, scale in pairs]

    def work(self) -> Work:
        written, rows = self.case.all_signals_bytes, sum(self.case.sizes)
        calls = 2 * len(self.case.sizes)
        return self.product(rows, calls=calls, written=written, read=self.stored_bytes)


class Stored(Contender):
    """One matrix for all layers: one product, then a scaled copy of a slice for each layer."""

    name = "stored"

    def __init__(self, case: Case):
        super().__init__(case)
        self.stored_bytes = self.union * case.n * case.dtype.itemsize

    def call(self) -> Callable[[Tensor, Tensor], list[Tensor]]:
        pairs = list(zip(self.case.sizes, self.scales(), strict=True))

        def signals(error: Tensor, transposed: Tensor) -> list[Tensor]:
            product = error @ transposed
            return [product[:, :size] * scale for size, scale in pairs]

        return signals

    def prepare(self, error: Tensor, storage: Storage) -> None:
        self.prepared = partial(self.call(), error, storage.shared.T)

    def work(self) -> Work:
        written, calls = self.case.all_signals_bytes, 1 + len(self.case.sizes)
        return self.product(self.union, calls=calls, written=written, read=self.stored_bytes)


class Views(Stored):
    """One bare product, of an error scaled beforehand, into memory kept; layers get views of it."""

    name = "views"
    slices_are_scaled = False

    def prepare(self, error: Tensor, storage: Storage) -> None:
        case = self.case
        error, transposed = error * self.scales()[0], storage.shared.T
        out = error.new_zeros(case.batch, self.union)
        self.kept_bytes = out.nbytes

        def signals() -> list[Tensor]:
            torch.mm(error, transposed, out=out)
            return [out[:, :size] for size in case.sizes]

        self.prepared = signals

    def work(self) -> Work:
        written = self.case.batch * self.union * self.case.dtype.itemsize
        return self.product(self.union, written=written, read=self.stored_bytes)


class ViewsInBfloat16(Views):
    """The same of a bf16 copy of the matrix and the error, which gives bf16 signals."""

    name = "views bf16"

    def __init__(self, case: Case):
        super().__init__(replace(case, dtype=torch.bfloat16, precision="highest"))

    def prepare(self, error: Tensor, storage: Storage) -> None:
        case = self.case
        low = Storage(case, storage.backend)
        super().prepare(error.to(case.dtype), low)


class Compiled(Stored):
    """`stored` under torch.compile."""

    name = "compiled"

    def prepare(self, error: Tensor, storage: Storage) -> None:
        torch.compiler.reset()
        compiled = torch.compile(self.call(), fullgraph=True, dynamic=False)
        self.prepared = partial(compiled, error, storage.shared.T)

    def work(self) -> Work:
        return replace(super().work(), calls=1)


class RandnBlocks(Contender):
    """Blocks of rows from torch.randn, with a generator reseeded for each, multiplied at once."""

    name = "randn blocks"

    def __init__(self, case: Case):
        super().__init__(case)
        entries = 2**22 if case.device_type == "cpu" else 2**27
        self.rows = max(min(entries // case.n, self.union), 1)
        self.generator = torch.Generator(case.device_type)

    def block(self, index: int) -> Tensor:
        case = self.case
        self.generator.manual_seed(index)
        rows = min(self.rows, self.union - index * self.rows)
        options = {"dtype": case.dtype, "device": case.device_type, "generator": self.generator}
        return torch.randn(rows, case.n, **options)

    def row(self, index: int) -> Tensor:
        return self.block(index // self.rows)[index % self.rows].double().cpu()

    def prepare(self, error: Tensor, storage: Storage) -> None:
        pairs = list(zip(self.case.sizes, self.scales(), strict=True))

        def signals() -> list[Tensor]:
            out = [error.new_empty(len(error), size) for size in self.case.sizes]
            for index, first in enumerate(range(0, self.union, self.rows)):
                product = error @ self.block(index).T
                for signal, (size, scale) in zip(out, pairs, strict=True):
                    if first < size:
                        rows = min(product.shape[1], size - first)
                        torch.mul(product[:, :rows], scale, out=signal[:, first : first + rows])
            return out

        self.prepared = signals

    def work(self) -> Work:
        return self.product(
            self.union,
            calls=-(-self.union // self.rows),
            written=self.case.all_signals_bytes,
            entries=self.union * self.case.n,
            source="torch.randn",
        )


class ScikitLearn(Views):
    """GaussianRandomProjection.transform with U as its components; layers get views."""

    name = "scikit-learn"

    def prepare(self, error: Tensor, storage: Storage) -> None:
        from sklearn.random_projection import GaussianRandomProjection

        batch = (error * self.scales()[0]).numpy()
        model = GaussianRandomProjection(n_components=1).fit(batch)
        model.components_ = storage.shared.numpy()

        def signals() -> list[Tensor]:
            out = torch.from_numpy(model.transform(batch))
            return [out[:, :size] for size in self.case.sizes]

        self.prepared = signals


class Replayed(Contender):
    """Another contender's call, replayed from a CUDA graph."""

    def __init__(self, inner: Contender):
        super().__init__(inner.case)
        self.inner, self.name = inner, inner.name
        self.stored_bytes, self.slices_are_scaled = inner.stored_bytes, inner.slices_are_scaled

    def prepare(self, error: Tensor, storage: Storage) -> None:
        self.inner.prepare(error, storage)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.inner()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            signals = self.inner()

        def replay() -> list[Tensor]:
            graph.replay()
            return signals

        self.prepared = replay

    def work(self) -> Work:
        return replace(self.inner.work(), calls=1, launch="replay")


class Fill(Contender):
    """Writes the bytes of the signals and nothing else: the rival of an output-bound case."""

    name = "fill"

    def prepare(self, error: Tensor, storage: Storage) -> None:
        sizes = sorted(set(self.case.sizes))
        self.prepared = lambda: [error.new_full((len(error), size), 1) for size in sizes]

    def check(self, error: Tensor, signals: list[Tensor]) -> None:
        if not all((signal == 1).all() for signal in signals):
            raise gate.Wrong("not filled")

    def work(self) -> Work:
        return Work(calls=len(set(self.case.sizes)), written=self.case.written_bytes)


class SeededMatrix(Contender):
    """The matrix itself, by a backend of ours."""

    def __init__(self, case: Case, backend: str):
        super().__init__(case)
        self.name = backend

    def prepare(self, error: Tensor, storage: Storage) -> None:
        case, rows = self.case, self.case.sizes[0]
        options = {"distribution": case.distribution, "dtype": case.dtype, "backend": self.name}
        device = case.device_type
        self.prepared = lambda: [feedback_matrix(rows, case.n, device=device, **options)]

    def check(self, error: Tensor, signals: list[Tensor]) -> None:
        case = self.case
        options = {"distribution": case.distribution, "dtype": case.dtype, "backend": "torch"}

        def definition(index: int) -> Tensor:
            if case.distribution in stream.STRUCTURED:  # from unit vectors it takes seconds
                return gate.exact_row(index, case.n, case.distribution).to(case.dtype)
            return feedback_matrix(1, case.n, row_offset=index, device="cpu", **options)[0]

        gate.check_entries(signals[0], definition)

    def work(self) -> Work:
        entries = self.case.sizes[0] * self.case.n
        options = {"source": self.name, "distribution": self.case.distribution}
        if self.case.distribution in stream.STRUCTURED:  # one transform for all of a column block
            options["additions"] = (BLOCK.bit_length() - 1) * entries
        else:
            options["entries"] = entries
        return Work(written=self.case.written_bytes, **options)


class RandnMatrix(Contender):
    """As many normal numbers from torch.randn, in fp32."""

    name = "torch.randn"

    def prepare(self, error: Tensor, storage: Storage) -> None:
        rows, n, device = self.case.sizes[0], self.case.n, self.case.device_type
        self.prepared = lambda: [torch.randn(rows, n, device=device)]

    def check(self, error: Tensor, signals: list[Tensor]) -> None:
        gate.check_normal(signals[0])

    def work(self) -> Work:
        entries = self.case.sizes[0] * self.case.n
        return Work(written=4 * entries, entries=entries, source="torch.randn")


KINDS = {
    kind.name: kind
    for kind in (
        Structured,
        Naive,
        Stored,
        Views,
        ViewsInBfloat16,
        Compiled,
        RandnBlocks,
        ScikitLearn,
        Fill,
        RandnMatrix,
    )
}


def names(case: Case) -> list[str]:
    """The contenders of a case: the available backends, the structured projection, the rivals.

    Where a faster backend is available, `torch` sits out sweeps, large networks and structured
    matrices, which would take most of a run. It has too many launches for a CUDA graph.
    """
    ours = sources(case.device_type, case.distribution)
    is_structured = case.distribution in stream.STRUCTURED
    is_slow = case.series or is_structured or sum(set(case.sizes)) * case.n > DEFINITION
    if case.graph or (is_slow and len(ours) > 1):
        ours.remove("torch")
    beside = case.distribution == "normal" and not case.matrix
    return [*ours, *([STRUCTURED] if beside else []), *case.rivals]


def contender(name: str, case: Case) -> Contender:
    """A contender of a case, by its name."""
    if name in KINDS:
        entrant = KINDS[name](case)
    else:
        entrant = SeededMatrix(case, name) if case.matrix else Seeded(case, name)
    return Replayed(entrant) if case.graph else entrant
