"""What nvcc makes of the CUDA sources: no spills, no local memory, few instructions per entry.

With `-v`, and in CI, a run ends with the registers, shared memory and thread blocks per
multiprocessor of every kernel, and the instructions of its inner loop.
"""

import collections
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.conftest import needs
from tests.reference import DENSE

# structured.cu is compiled and checked by test_cuda_structured_build.py.
SOURCES = [
    path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if path.stem != "structured"
]
ARCHITECTURES = ("sm_80", "sm_90a")
# The most instructions per entry, at a batch of 128, in the loop that generates U and multiplies
# one term. 2 of them multiply and half of one loads the error, unless warpgroups multiply.
MOST = {"normal": 17, "uniform": 12, "rademacher": 10}
SHARED = {"sm_80": 164 << 10, "sm_90a": 228 << 10}  # bytes per multiprocessor

needs("nvcc", shutil.which("nvcc") is not None)


def cuobjdump():
    """The disassembler, from the toolkit or from Triton's wheel."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        found = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found


Kernel = collections.namedtuple("Kernel", "source architecture symbol registers stack spills sass")


def compiled(source, folder):
    """Every kernel of one source on every architecture."""
    target = folder / f"{source.stem}.o"
    codes = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES]
    command = ["nvcc", "-std=c++17", "-O3", *codes, "-Werror", "all-warnings"]
    command += ["-Xcompiler=-Wall,-Wextra", "-Xptxas=-v", "-c", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listing = subprocess.run(
        [cuobjdump(), "-sass", target], check=True, capture_output=True, text=True
    ).stdout
    code = {}
    for part in re.split(r"arch = (?=sm_)", listing)[1:]:
        for function in part.split("Function : ")[1:]:
            code[part.split()[0], function.split()[0]] = instructions(function)
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    return [
        Kernel(
            source.name,
            architecture,
            symbol,
            int(registers),
            int(stack),
            int(stores) + int(loads),
            code[architecture, symbol],
        )
        for symbol, architecture, stack, stores, loads, registers in pattern.findall(done.stderr)
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The kernels of a source, compiled at its first use, so that each source has its own test."""
    needs("cuobjdump", cuobjdump() is not None)
    return functools.cache(functools.partial(compiled, folder=tmp_path_factory.mktemp("cubins")))


def instructions(function):
    """(address, text) of each instruction."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", function)
    return [(int(address, 16), text.strip()) for address, text in lines]


def loops(sass):
    """The instructions of each loop, shortest first. A backward branch encloses a loop."""
    found = []
    for address, text in sass:
        target = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = [t for a, t in sass if int(target[1], 16) <= a <= address]
            found.append([re.sub(r"^@!?U?P\w+\s+", "", t).split()[0] for t in body])
    return sorted(found, key=len)


Shape = collections.namedtuple("Shape", "n f warps chunks parts groups staged distribution operand")
TABLE = 4 * 4096  # bytes of the normal levels


def shape(symbol):
    """The template arguments of a fused kernel, except its minimum number of thread blocks."""
    found = re.search(
        r"5ShapeILi(\d+)ELi(\d+)ELi(\d+)ELi\d+ELi(\d+)ELi(\d+)ELb(\d)ELi(\d+)EE"
        r".*?DistributionE(\d).*?OperandE(\d)",
        symbol,
    )
    return found and Shape(*map(int, found.groups()))


def tile(of):
    """Its name in csrc/cuda/kernels.h, with the distribution and the operand."""
    rows = 16 * of.f * of.warps // of.parts
    parts = f", columns in {of.parts}" if of.parts > 1 else ""
    parts += ", warpgroups" if of.groups else ""
    operand = ("bf16", "fp16", "exact")[of.operand]
    return f"{DENSE[of.distribution]} {operand} {rows} x {8 * of.n}{parts}"


def shared_bytes(symbol):
    """Bytes for a fused kernel's terms, as csrc/cuda/kernels.h counts them, and what CUDA takes."""
    found = shape(symbol)
    if not found:
        return []
    terms = 3 if found.operand == 2 else 1  # Operand::kExact
    stages = 2 * terms * 8 * found.n * 128 * found.chunks
    sums = found.warps * 8 * min(found.n, found.staged) * (16 * found.f + 4) * 4
    return [stages + sums + TABLE * (DENSE[found.distribution] == "normal") + 1024]


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_kernel_spills_or_has_local_memory(kernels, source, resources):
    assert {kernel.architecture for kernel in kernels(source)} == {*ARCHITECTURES}
    for kernel in kernels(source):
        local = [text for _, text in kernel.sass if re.search(r"\b(LDL|STL)\b", text)]
        assert (kernel.stack, kernel.spills, local) == (0, 0, []), kernel.symbol
        of = shape(kernel.symbol)
        if of and of.groups and kernel.architecture != "sm_90a":
            continue  # a trap, which is never launched
        threads = 32 * of.warps if of else 256
        blocks = 65536 // (threads * (kernel.registers + 7 & ~7))
        assert blocks >= 1
        shared = shared_bytes(kernel.symbol)
        blocks = min(blocks, 2048 // threads, *(SHARED[kernel.architecture] // s for s in shared))
        assert blocks >= 1
        resources(
            f"{kernel.architecture:7}{tile(of) if of else kernel.source:44}"
            f"{threads} threads, {kernel.registers} registers, "
            f"{shared[0] if shared else 0} bytes shared: {blocks} blocks"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
def test_the_fused_loop_is_short(kernels, name, resources):
    seen = collections.Counter()
    for kernel in kernels(ROOT / "csrc" / "cuda" / f"fused_{name}.cu"):
        of = shape(kernel.symbol)
        if of.groups and kernel.architecture != "sm_90a":
            continue  # a trap
        entries = 16 * of.f  # per lane, in 32 columns
        product = "HGMMA" if of.groups else "HMMA"
        inner = next(
            body
            for body in loops(kernel.sass)
            if sum(op.startswith("LOP3") for op in body) > entries
            and any(op.startswith(product) for op in body)
        )
        kinds = collections.Counter(op.split(".")[0] for op in inner)
        assert kinds[product] >= (2 if of.groups else 2 * of.n * of.f)
        assert name == DENSE[of.distribution]
        # One of two normal entries is computed, the other looked up; in fp16 both are.
        computed = 0 if name != "normal" or of.operand == 1 else entries / 2
        assert kinds["MUFU"] == computed
        count = len(inner) / entries
        common = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common(8))
        step = next(
            body
            for body in loops(kernel.sass)
            if len(body) > len(inner) and any(op.startswith("BAR") for op in body)
        )
        resources(
            f"{kernel.architecture:7}{tile(of):44}{count:.1f} an entry ({common}), "
            f"{len(step) - len(inner)} more a step"
        )
        if of.n == 16 and of.parts == 1 and of.operand == 0:
            assert count <= MOST[name]
            seen[kernel.architecture, of.groups] += 1
    assert {*seen} == {("sm_80", 0), ("sm_90a", 0), ("sm_90a", 1)}


def test_the_bindings_compile_against_the_stable_headers(tmp_path):
    needs("c++", shutil.which("c++") is not None)
    headers = [Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]]
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-c"]
    command += [f"-I{folder}" for folder in headers]
    command += ["-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-DUSE_CUDA", ROOT / "csrc" / "cuda" / "bindings.cpp", "-o", tmp_path / "b.o"]
    subprocess.run(command, check=True, env=os.environ)
    symbols = subprocess.run(
        ["nm", "-C", "--undefined-only", tmp_path / "b.o"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert [s for s in symbols.splitlines() if " at::" in s or " c10::" in s] == []
