"""The CUDA kernels and their host code, run on the CPU by the emulator in `cuda_host`.

The kernels' own source is compiled by the host compiler with the address and undefined-behaviour
sanitizers; only the primitives of csrc/cuda/device.h are emulated.
"""

import math
import os
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import reference
import torch
from conftest import EPSILON, needs

COMPILER = shutil.which("g++")
needs("g++", COMPILER is not None)

HOST = Path(__file__).parent / "cuda_host"
SOURCES = [HOST / "main.cpp", *sorted((HOST.parents[1] / "csrc" / "cuda").glob("*.cu"))]
DISTRIBUTIONS = ("normal", "uniform", "rademacher")
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as dfa::Type
UNIT = {"normal": 1.0, "uniform": math.sqrt(3), "rademacher": 1.0}
ORDERS = ({}, {"DFA_EMULATE_LATE": "1"}, {"DFA_EMULATE_BACKWARDS": "1", "DFA_EMULATE_LATE": "1"})


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The program, compiled."""
    folder = tmp_path_factory.mktemp("emulator")
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HOST}"]

    def build(source):
        target = folder / f"{source.name}.o"
        subprocess.run([COMPILER, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, SOURCES))
    program = folder / "emulator"
    subprocess.run([COMPILER, *flags, *objects, "-o", program], check=True)
    return program


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
    ):
        self.error, self.sizes, self.dtype = error, sizes, dtype or error.dtype
        self.scales = scales or [1 / math.sqrt(size * 3) for size in sizes]
        self.where = {"seed": seed, "distribution": distribution, "column_offset": column_offset}
        self.where["row_offsets"] = row_offsets or [0] * len(sizes)
        self.terms = terms or (3 if error.dtype == torch.float32 else 1)
        self.misaligned = misaligned

    def request(self):
        error, storage = self.error, self.error.untyped_storage()
        head = words(
            0,
            self.where["seed"],
            DISTRIBUTIONS.index(self.where["distribution"]),
            self.where["column_offset"],
            *error.shape,
            *error.stride(),
            TYPES.index(error.dtype),
            TYPES.index(self.dtype),
            self.terms,
            self.misaligned,
            storage.nbytes(),
        )
        layers = [len(self.sizes)]
        unit = UNIT[self.where["distribution"]]
        for row, size, scale in zip(
            self.where["row_offsets"], self.sizes, self.scales, strict=True
        ):
            layers += [row, size, *struct.unpack("<q", struct.pack("<d", scale * unit))]
        return head + bytes(storage) + words(*layers)

    def signals(self, data):
        """The launches there were, and one signal a layer."""
        shapes = [(self.error.shape[0], size) for size in self.sizes]
        return struct.unpack("<q", data[:8])[0], as_tensors(data[8:], self.dtype, shapes)

    def size(self):
        return 8 + self.error.shape[0] * sum(self.sizes) * self.dtype.itemsize

    def check(self, signals):
        """Against float64, to the bound of a sum in fp32 whose every addition is cut off.

        Of each product, `terms` bf16 terms leave out 2^-(9 * terms), or fp32 precision.
        """
        exact = reference_project(self, self.error)
        magnitudes = reference_project(self, self.error.abs(), absolute=True)
        left_out = 2.0 ** -(9 * self.terms) if self.error.dtype == torch.float32 else 0.0
        additions = self.terms * (self.error.shape[1] // 16 + 2)
        relative = left_out + (2 * additions + 3) * EPSILON[torch.float32]
        info = torch.finfo(self.dtype)
        for signal, expected, magnitude in zip(signals, exact, magnitudes, strict=True):
            bound = relative * magnitude + EPSILON[self.dtype] * expected.abs()
            bound += info.smallest_normal * info.eps
            difference = (signal.double() - expected).abs()
            assert (difference <= bound).all(), f"off by {(difference / bound).max():.3g} bounds"


def reference_project(case, error, absolute=False):
    scales = map(abs, case.scales) if absolute else case.scales
    unit = UNIT[case.where["distribution"]]
    where = {**case.where, "absolute": absolute}
    row_offsets = where.pop("row_offsets")
    signals = []
    for size, scale, row in zip(case.sizes, scales, row_offsets, strict=True):
        keep = {k: v for k, v in where.items() if k != "absolute"}
        lattice = torch.from_numpy(
            reference.lattice(size, error.shape[1], row_offset=row, **keep)
        )
        u = unit * (lattice.abs() if absolute else lattice)
        signals.append(scale * (error.double() @ u.T))
    return signals


def run_all(emulator, cases, order=ORDERS[1], check=True):
    data = run(emulator, b"".join(case.request() for case in cases), order)
    found = []
    for case in cases:
        part, data = data[: case.size()], data[case.size() :]
        found.append(case.signals(part))
        if check:
            case.check(found[-1][1])
    assert not data
    return found


def random_error(rows, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("order", ORDERS, ids=["at-once", "late", "late-backwards"])
def test_first(emulator, order):
    run_all(emulator, [Projection(random_error(3, 10), [20])], order)
