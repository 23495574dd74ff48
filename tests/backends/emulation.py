"""Builds emulators of the CUDA kernels and talks to them: makes requests, reads, checks answers."""

import hashlib
import math
import os
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests import ROOT, reference
from tests.conftest import EPSILON, needs
from tests.reference import DENSE

HOST = Path(__file__).parent / "cuda_host"
COMPILER = shutil.which("g++")
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as dfa::Type
SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10}  # bytes per thread block
UNIT = {"normal": 1.0, "uniform": math.sqrt(3), "rademacher": 1.0}
ORDERS = {
    "at-once": {},
    "late": {"DFA_EMULATE_LATE": "1"},
    "late-backwards": {"DFA_EMULATE_LATE": "1", "DFA_EMULATE_BACKWARDS": "1"},
    "apart": {"DFA_EMULATE_APART": "1"},
    "apart-late-backwards": dict.fromkeys(
        ("DFA_EMULATE_APART", "DFA_EMULATE_LATE", "DFA_EMULATE_BACKWARDS"), "1"
    ),
}


def build(name, sources, tmp_path_factory, config):
    """The emulator cuda_host/`name`.cpp with `sources` of csrc/cuda.

    pytest's cache keeps it until a source changes.
    """
    needs("g++", COMPILER is not None)
    folder = tmp_path_factory.mktemp("emulator")
    flags = ["-std=c++17", "-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HOST}"]

    version = subprocess.run([COMPILER, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(repr((version, flags, name, sources)).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), *HOST.iterdir()]):
        digest.update(path.read_bytes())
    cache = getattr(config, "cache", None)  # none with -p no:cacheprovider
    kept = (cache.mkdir("emulator") if cache else folder) / digest.hexdigest()
    if kept.exists():
        return kept

    def compiled(source):
        target = folder / f"{source.name}.o"
        subprocess.run([COMPILER, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    paths = [HOST / f"{name}.cpp", *(ROOT / "csrc" / "cuda" / f"{one}.cu" for one in sources)]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, paths))
    program = folder / "emulator"
    subprocess.run([COMPILER, *flags, *objects, "-o", program], check=True)
    unfinished = kept.with_suffix(f".{os.getpid()}")
    shutil.copy2(program, unfinished)
    unfinished.replace(kept)
    return kept


def run(emulator, request, order):
    done = subprocess.run(
        [emulator], input=request, capture_output=True, env={**os.environ, **order}
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def words(*values):
    return struct.pack(f"<{len(values)}q", *(v - 2**64 if v >= 2**63 else v for v in values))


def as_tensors(data, dtype, shapes):
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return [
        part.view(shape)
        for part, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)
    ]


class Projection:
    """One call of project_cuda."""

    def __init__(
        self,
        error,
        sizes,
        *,
        scales=None,
        row_offsets=None,
        seed=3,
        distribution="normal",
        column_offset=0,
        dtype=None,
        terms=None,
        misaligned=0,
        tile=-1,
        processors=0,
        shared=SHARED["sm_86"],
    ):
        self.error, self.sizes, self.dtype = error, sizes, dtype or error.dtype
        self.scales = scales or [1 / math.sqrt(size * 3) for size in sizes]
        self.where = {"seed": seed, "distribution": distribution, "column_offset": column_offset}
        self.where["row_offsets"] = row_offsets or [0] * len(sizes)
        self.terms = terms or (3 if error.dtype == torch.float32 else 1)
        self.forced = tile, processors
        self.shared, self.misaligned = shared, misaligned

    def request(self):
        error, storage = self.error, self.error.untyped_storage()
        head = words(
            0,
            self.where["seed"],
            DENSE.index(self.where["distribution"]),
            self.where["column_offset"],
            *error.shape,
            *error.stride(),
            TYPES.index(error.dtype),
            TYPES.index(self.dtype),
            self.terms,
            *self.forced,
            self.shared,
            self.misaligned,
            storage.nbytes(),
        )
        layers = [len(self.sizes)]
        unit = UNIT[self.where["distribution"]]
        for row, size, scale in zip(
            self.where["row_offsets"], self.sizes, self.scales, strict=True
        ):
            layers += [row, size, *struct.unpack("<q", struct.pack("<d", scale * unit))]
        stored = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
        return head + stored + words(*layers)

    def signals(self, data):
        """(launches, tile and thread blocks of the last one), and one signal per layer."""
        shapes = [(self.error.shape[0], size) for size in self.sizes]
        return struct.unpack("<3q", data[:24]), as_tensors(data[24:], self.dtype, shapes)

    def size(self):
        return 24 + self.error.shape[0] * sum(self.sizes) * self.dtype.itemsize

    def check(self, signals):
        """Compare with float64, to the bound of an fp32 sum that truncates every addition.

        `terms` bf16 terms of an fp32 error leave out 2^-(8 * terms) of it.
        """
        exact = reference_project(self, self.error)
        magnitudes = reference_project(self, self.error.abs(), absolute=True)
        left_out = 2.0 ** -(8 * self.terms) if self.error.dtype == torch.float32 else 0.0
        additions = self.terms * (self.error.shape[1] // 16 + 2)
        relative = left_out + (2 * additions + 3) * EPSILON[torch.float32]
        info = torch.finfo(self.dtype)
        for signal, expected, magnitude in zip(signals, exact, magnitudes, strict=True):
            bound = relative * magnitude + EPSILON[self.dtype] * expected.abs()
            bound += info.smallest_normal * info.eps
            difference = (signal.double() - expected).abs()
            assert (difference <= bound).all(), f"off by {(difference / bound).max():.3g} bounds"


def reference_project(case, error, absolute=False):
    where = dict(case.where)
    row_offsets = where.pop("row_offsets")
    signals = []
    for size, scale, row in zip(case.sizes, case.scales, row_offsets, strict=True):
        u = reference.lattice(size, error.shape[1], row_offset=row, **where)
        u = torch.from_numpy(u) * UNIT[where["distribution"]] * scale
        signals.append(error.double() @ (u.abs() if absolute else u).T)
    return signals


def run_all(emulator, cases, order=ORDERS["late"], check=True):
    data = run(emulator, b"".join(case.request() for case in cases), order)
    found = []
    for case in cases:
        part, data = data[: case.size()], data[case.size() :]
        found.append(case.signals(part))
        if check:
            case.check(found[-1][1])
    assert not data
    return found
