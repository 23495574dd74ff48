"""What the Triton kernels compile to, for GPUs that need not be here: no spills, few instructions.

Triton's interpreter may be on in this process, so the kernels are compiled in one of their own.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, re, subprocess, sys, tempfile
from pathlib import Path

import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dfa_kernels import stream
from dfa_kernels.backends.triton import kernels, launch

cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(kernel, pointers, constants, warps, capability):
    names = [parameter.name for parameter in kernel.params]
    constants = dict(zip(names[-len(constants):], constants))
    signature, attributes = {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = pointers[name]
            if isinstance(pointers[name], str):
                attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


def inspect(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        options = {"check": True, "capture_output": True, "text": True}
        sass, usage = (
            subprocess.run([cuobjdump, flag, file.name], **options).stdout
            for flag in ("-sass", "-res-usage")
        )
    code = re.findall(r"/\\*([0-9a-f]{4,})\\*/ +(.*?);", sass)
    code = [(int(at, 16), line) for at, line in code]
    registers, stack, local = map(
        int, re.search(r"REG:(\\d+) STACK:(\\d+) .*?LOCAL:(\\d+)", usage).groups()
    )
    local_instructions = sum(bool(re.search(r"\\b(LDL|STL)\\b", line)) for _, line in code)
    loops = []
    for at, line in code:
        jump = re.search(r"\\bBRA\\b.*?0x([0-9a-f]+)", line)
        if jump and int(jump[1], 16) < at:
            loops.append([l for a, l in code if int(jump[1], 16) <= a <= at])
    def products(loop):
        return sum(bool(re.search(r"\\b(HMMA|HGMMA)\\b", line)) for line in loop)

    # The loop over columns is the one with the tensor cores' instructions.
    main = max(loops, key=lambda loop: (products(loop), -len(loop)), default=[])
    return {
        "registers": registers, "stack": stack, "local": local,
        "local_instructions": local_instructions,
        "loop": len(main) - products(main), "products": products(main),
        "additions": sum(bool(re.search(r"\\bFADD\\b", line)) for line in main),
        "shared": binary.metadata.shared,
    }


found = []
TL = launch._DTYPES
for capability, distribution, dtype, terms, count, outputs, split in json.loads(sys.argv[1]):
    fragments = capability == 90
    dtype = getattr(torch, dtype)
    operand = torch.float16 if dtype == torch.float16 else torch.bfloat16
    tile = launch.tile_for(count, distribution, terms, fragments)
    name = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[str(dtype)[6:]]
    pointers = {
        "error": "*bf16" if split else "*" + name, "scales": "*fp32",
        "tiles": "*i64", "layers": "*i64",
        "outputs": ("*i64",) if outputs == 0 else ("*" + name,) * outputs,
    }
    constants = (
        distribution, stream.BLOCK[distribution], outputs, TL[dtype], TL[operand], terms,
        split, 8 if split else 16 // dtype.itemsize, True, tl.int32, "cuda", fragments,
        *tile[:3], launch.STAGES,
    )
    binary = compiled(kernels.project_kernel, pointers, constants, tile.warps, capability)
    result = inspect(binary)
    result["sums"] = tile.rows * tile.error_rows // (32 * tile.warps)
    result["per_entry"] = result["loop"] * 32 * tile.warps / (tile.rows * tile.columns)
    found.append(result)
for capability in (80, 90):
    for distribution, dtype, name in (
        ("normal", torch.bfloat16, "bf16"), ("uniform", torch.float32, "fp32"),
        ("rademacher", torch.float16, "fp16"), ("normal", torch.float64, "fp64"),
    ):
        rows, columns, warps = launch.matrix_tile(distribution)
        constants = (
            distribution, stream.BLOCK[distribution], TL[dtype], False, 16 // dtype.itemsize,
            "cuda", rows, columns,
        )
        pointers = {"matrix": "*" + name}
        binary = compiled(kernels.matrix_kernel, pointers, constants, warps, capability)
        found.append(inspect(binary))
    pointers = {"error": "*fp32", "terms": "*bf16"}
    constants = (3, "cuda", launch._SPLIT_COLUMNS)
    found.append(inspect(compiled(kernels.split_kernel, pointers, constants, 4, capability)))
    count = launch._ADDRESSES
    pointers = {"table": "*i64", "addresses": ("i64",) * count}
    found.append(inspect(compiled(kernels.addresses_kernel, pointers, (count,), 1, capability)))
print(json.dumps(found))
"""

# capability, distribution, dtype of error and signals, terms, error's rows, outputs (0: a table),
# whether the terms were made beforehand
LAUNCHES = [
    (capability, distribution, dtype, terms, count, 1, False)
    for capability in (80, 90)
    for distribution, dtype, terms in [
        ("normal", "bfloat16", 0),
        ("normal", "float16", 0),
        ("normal", "float32", 3),
        ("normal", "float32", 2),
        ("normal", "float32", 1),
        ("uniform", "bfloat16", 0),
        ("rademacher", "bfloat16", 0),
    ]
    for count in ((16, 128) if capability == 80 else (16, 64, 128))
]
LAUNCHES += [
    (90, "normal", "bfloat16", 0, 32, 4, False),
    (90, "normal", "bfloat16", 0, 128, 0, False),
]
LAUNCHES += [
    (capability, "normal", "float32", terms, count, 1, True)
    for capability in (80, 90)
    for terms in (2, 3)
    for count in (16, 64, 128)
]
# Issue slots an entry in the loop over columns, without the tensor cores' own: Philox, the
# distribution, moving entries to where they are multiplied, and the error's part of it.
LIMIT = {"normal": 24, "uniform": 18, "rademacher": 10}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What `PROGRAM` found for each of LAUNCHES, then for the other kernels."""
    program = tmp_path_factory.mktemp("compile") / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(program), json.dumps(LAUNCHES)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_no_kernel_spills(compiled):
    for launch, found in zip(LAUNCHES + ["other"] * 100, compiled, strict=False):
        assert found["stack"] == found["local"] == found["local_instructions"] == 0, (launch, found)
        assert found["registers"] <= 255


def test_entries_take_few_instructions(compiled):
    """What each launch takes is printed: run with -s."""
    for launch, found in zip(LAUNCHES, compiled, strict=False):
        capability, distribution, dtype, terms, count, _, split = launch
        print(
            f"sm_{capability} {distribution} {dtype} terms {terms}{' beforehand' * split}, "
            f"M {count}: "
            f"{found['per_entry']:.2f} slots an entry, {found['registers']} registers, "
            f"{found['shared']} bytes shared"
        )
        assert found["products"] > 0
        if terms == 0 and dtype == "bfloat16":
            assert found["per_entry"] <= LIMIT[distribution], launch


def test_three_terms_are_added_up_apart_from_the_sums(compiled):
    """What tensor cores add up over all columns loses more than fp32 does."""
    found = dict(zip(LAUNCHES, compiled, strict=False))
    for launch in found:
        capability, distribution, dtype, terms, count, outputs, split = launch
        if terms == 3 and split:
            two = found[capability, distribution, dtype, 2, count, outputs, split]
            more = found[launch]["additions"] - two["additions"]
            assert more >= found[launch]["sums"] == two["sums"], launch
