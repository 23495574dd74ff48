"""What nvcc makes of structured feedback: no spills, no fused multiply-adds, few instructions.

With `-v`, and in CI, a run ends with each kernel's registers, and with the instructions that a
written number costs.
"""

import collections
import re

import pytest

from tests import ROOT
from tests.conftest import needs
from tests.packaging.test_cuda_build import ARCHITECTURES, compiled, cuobjdump, loops

pytestmark = pytest.mark.slow

SOURCE = ROOT / "csrc" / "cuda" / "structured.cu"
NUMBERS = 64  # of a lane, in a block of 1024 that half a warp makes
# 132 multiprocessors at 1.755 GHz issue for 39 times as many lanes as 3.0 TB/s write fp32 numbers.
FREE = 39
THREADS = 128
BLOCKS = {"walk": (4, 2), "inputs": (3, 2), "gather": (3, 2), "fill_structured": (3,)}  # fp32, fp64


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    needs("cuobjdump", cuobjdump() is not None)
    return compiled(SOURCE, tmp_path_factory.mktemp("cubins"))


def name_of(symbol):
    """The kernel's name, and its type of numbers."""
    name, template = re.search(r"_cu_[0-9a-f]{8}\d+([a-z_]+?)(I[fd]|E)", symbol).groups()
    return name, {"If": "float", "Id": "double", "E": ""}[template]


def steps(sass):
    """The places of the instructions that may follow each."""
    place = {address: i for i, (address, _) in enumerate(sass)}
    found = []
    for i, (_, text) in enumerate(sass):
        op = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        always = (
            (op == "EXIT" or jump) and text.startswith(op) and not re.search(r"BRA\S* !?U?P", text)
        )
        after = [] if always else [i + 1]
        found.append([*after, place[int(jump[1], 16)]] if jump else after)
    return found


def shortest(graph, start, end):
    """The fewest instructions from one place to another."""
    seen, queue = {start: 0}, collections.deque([start])
    while queue:
        one = queue.popleft()
        if one == end:
            return seen[one]
        for other in graph[one]:
            if other < len(graph) and other not in seen:
                seen[other] = seen[one] + 1
                queue.append(other)
    raise AssertionError("no way leads there")


def test_every_kernel_is_there_without_spills_or_local_memory(kernels, resources):
    found = collections.Counter()
    for kernel in kernels:
        name, real = name_of(kernel.symbol)
        found[name, kernel.architecture] += 1
        local = [text for _, text in kernel.sass if re.search(r"\b(LDL|STL)\b", text)]
        assert (kernel.stack, kernel.spills, local) == (0, 0, []), kernel.symbol
        blocks = 65536 // (THREADS * (kernel.registers + 7 & ~7))
        assert blocks >= BLOCKS[name][real == "double"]
        resources(
            f"{kernel.architecture:7}{name} {real:7}{kernel.registers} registers: {blocks} blocks"
        )
    assert found == {
        (name, architecture): {"walk": 2, "inputs": 2, "gather": 4, "fill_structured": 1}[name]
        for name in BLOCKS
        for architecture in ARCHITECTURES
    }


def test_additions_are_rounded_by_themselves(kernels):
    """A fused multiply-add would round once where the definition rounds twice."""
    for kernel in kernels:
        ops = collections.Counter(text.split()[0].split(".")[0] for _, text in kernel.sass)
        assert ops["FADD"] + ops["DADD"] > 1000
        # Divisions of integers, which the compiler makes of these, have constants.
        fused = [t for _, t in kernel.sass if re.match(r"(@\S+ )?[FD]FMA", t)]
        assert fused == [], kernel.symbol
        flushed = [t for _, t in kernel.sass if re.search(r"\b(FADD|FMUL|F2F|F2FP)\.\S*FTZ", t)]
        assert flushed == [], kernel.symbol


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_written_number_costs_half_of_what_is_free(kernels, architecture, resources):
    (kernel,) = (
        one
        for one in kernels
        if one.architecture == architecture and name_of(one.symbol) == ("walk", "float")
    )
    sass = kernel.sass
    place = {address: i for i, (address, _) in enumerate(sass)}
    # The loop over output blocks is the shortest with a transform.
    turns = []
    for i, (_, text) in enumerate(sass):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and place[int(jump[1], 16)] < i:
            first = place[int(jump[1], 16)]
            if sum("FADD" in t for _, t in sass[first:i]) >= 10 * NUMBERS:
                turns.append((i - first, first, i))
    _, first, last = min(turns)
    assert any(len(body) == last - first + 1 for body in loops(sass))
    (write,) = (i for i in range(first, last) if re.match(r"STG\.\S*128 .*\+0xf00\]", sass[i][1]))
    graph = steps(sass)
    slots = shortest(graph, first, write) + shortest(graph, write, last) + 1
    resources(f"{architecture:7}walk: {slots / NUMBERS:.1f} issue slots a written fp32 number")
    assert 10 * NUMBERS < slots < FREE / 2 * NUMBERS
