"""Compiles the Triton kernels for GPUs that need not be present, and prints the results as JSON.

    echo '[90, "normal", "bfloat16", 0, 128, 1, ""]' |
        TRITON_INTERPRET=0 python tests/backends/triton_compile.py

It answers each line of JSON with another. A request is one of the LAUNCHES of
test_triton_compile.py, ["others", CAPABILITY] or ["specialisations"]. It is a separate program
because Triton's interpreter may be on in the process of the tests.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from dfa_kernels import stream
from dfa_kernels.backends.triton import kernels, launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = launch.DTYPES
NAMES = dict(zip(DTYPES, ("fp16", "bf16", "fp32", "fp64"), strict=True))


def compiled(kernel, pointers, constants, warps, target, misaligned=()):
    """A kernel for pointers of these types, some misaligned, and numbers of its annotated types."""
    names = [parameter.name for parameter in kernel.params]
    constants = dict(zip(names[-len(constants) :], constants, strict=True))
    signature, attributes = {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = pointers[name]
            if isinstance(pointers[name], str) and name not in misaligned:
                attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": warps})


def inspect(binary):
    """Registers and spills of a cubin, and the instruction counts of its loop over columns."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        options = {"check": True, "capture_output": True, "text": True}
        sass, usage = (
            subprocess.run([CUOBJDUMP, flag, file.name], **options).stdout
            for flag in ("-sass", "-res-usage")
        )
    code = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", sass)
    code = [(int(at, 16), line) for at, line in code]
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups()
    )
    local_instructions = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for _, line in code)
    loops = []
    for at, line in code:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        if jump and int(jump[1], 16) < at:
            loops.append([inside for a, inside in code if int(jump[1], 16) <= a <= at])

    def products(loop):
        return sum(bool(re.search(r"\b(HMMA|HGMMA|UTCHMMA)\b", line)) for line in loop)

    # The loop over columns is the one with the tensor cores' instructions.
    main = max(loops, key=lambda loop: (products(loop), -len(loop)), default=[])
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "local_instructions": local_instructions,
        "loop": len(main) - products(main),
        "products": products(main),
        "additions": sum(bool(re.search(r"\bFADD\b", line)) for line in main),
        # Loads of the error through registers, one element at a time.
        "single_loads": sum(bool(re.search(r"\bLDG\S*U16\b", line)) for line in main),
        "shared": binary.metadata.shared,
    }


def project(arch, target, distribution, dtype, terms, count, outputs, way):
    """The projection's kernel for one of LAUNCHES, and its tile."""
    operands = launch.Operands(False, False)
    if target.backend == "cuda":
        operands = launch.Operands.of(arch // 10)
    dtype = getattr(torch, dtype)
    operand = torch.float16 if dtype == torch.float16 else torch.bfloat16
    tile = launch.tile_for(count, distribution, terms, operands.fragments)
    name = NAMES[dtype]
    split = way == "beforehand"
    pointers = {
        "error": "*bf16" if split else "*" + name,
        "scales": "*fp32",
        "tiles": "*i64",
        "layers": "*i64",
        "outputs": ("*i64",) if outputs == 0 else ("*" + name,) * outputs,
    }
    vector = 8 if split else 1 if way == "misaligned" else 16 // dtype.itemsize
    constants = (
        distribution,
        stream.DENSE[distribution].block,
        outputs,
        DTYPES[dtype],
        DTYPES[operand],
        terms,
        split,
        vector,
        tl.int64 if way == "far" else tl.int32,
        target.backend,
        *operands,
        *tile[:3],
        launch.STAGES,
    )
    odd = ("error",) * (way == "misaligned")
    return compiled(kernels.project_kernel, pointers, constants, tile.warps, target, odd), tile


def projection(gpu, *launch_of):
    """One of LAUNCHES, compiled and inspected."""
    if str(gpu).startswith("gfx"):
        binary, _ = project(gpu, GPUTarget("hip", gpu, 64), *launch_of)
        spills = re.findall(r"(?:sgpr|vgpr)_spill_count: *(\d+)", binary.asm["amdgcn"])
        return {"spills": list(map(int, spills))}
    binary, tile = project(gpu, GPUTarget("cuda", gpu, 32), *launch_of)
    result = inspect(binary)
    result["sums"] = tile.rows * tile.batch // (32 * tile.warps)
    result["per_entry"] = result["loop"] * 32 * tile.warps / (tile.rows * tile.columns)
    return result


def others(capability):
    """The other kernels, inspected."""
    target = GPUTarget("cuda", capability, 32)
    for distribution, dtype in (
        ("normal", torch.bfloat16),
        ("uniform", torch.float32),
        ("rademacher", torch.float16),
        ("normal", torch.float64),
    ):
        rows, columns, warps = launch.matrix_tile(distribution)
        facts, vector = stream.DENSE[distribution], 16 // dtype.itemsize
        constants = (distribution, facts.block, DTYPES[dtype], facts.factor, vector)
        constants += ("cuda", rows, columns)
        pointers = {"matrix": "*" + NAMES[dtype]}
        yield inspect(compiled(kernels.matrix_kernel, pointers, constants, warps, target))
    pointers = {"error": "*fp32", "terms": "*bf16"}
    constants = (3, "cuda", launch._SPLIT_COLUMNS)
    yield inspect(compiled(kernels.split_kernel, pointers, constants, 4, target))
    count = launch._ADDRESSES
    pointers = {"table": "*i64", "addresses": ("i64",) * count}
    yield inspect(compiled(kernels.addresses_kernel, pointers, (count,), 1, target))


def specialisations(numbers):
    """What Triton's own argument binder specialises a launch with these numbers for."""
    kernel = kernels.project_kernel
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    error, table = torch.zeros(16, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.int64)
    pointers = (error, (error,), table, table, table)
    constants = [None] * (len(kernel.params) - len(pointers) - len(numbers))
    _, found, _ = binder(*pointers, *numbers, *constants, num_warps=4)
    return [str(one) for one in found[: len(pointers) + len(numbers)]]


def answer(request):
    """The answer to one line of standard input."""
    match request:
        case ["others", capability]:
            return list(others(capability))
        case ["specialisations"]:
            numbers = ([1] * 8, [16] * 8, [7, 33, 17, 5, 2**31, -(2**63), 2**33 + 1, 10**12])
            return list(map(specialisations, numbers))
    return projection(*request)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
