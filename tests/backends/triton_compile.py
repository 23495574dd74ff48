"""Compiles the Triton kernels for GPUs that need not be present, and prints the results as JSON.

    echo '[90, "normal", "bfloat16", 0, 128, 1, ""]' |
        TRITON_INTERPRET=0 python tests/backends/triton_compile.py

It answers each line of JSON with another. A request is one of the LAUNCHES of
test_triton_compile.py, ["structured", ...] with one of its STRUCTURED, ["cross_entropy", ...] with
one of its CROSS_ENTROPY, ["others", CAPABILITY],
["specialisations"] or ["cross_entropy_specialisations"]. It is a separate program
because Triton's interpreter may be on in the process of the tests.
"""

import functools
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
from dfa_kernels.backends.triton import cross_entropy as losses
from dfa_kernels.backends.triton import kernels, launch, structured_kernels
from dfa_kernels.backends.triton import structured as host

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = launch.DTYPES
NAMES = dict(zip(DTYPES, ("fp16", "bf16", "fp32", "fp64"), strict=True))


def compiled(kernel, pointers, constants, warps, target, misaligned=(), **options):
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
    return triton.compile(source, target=target, options={"num_warps": warps, **options})


def disassembled(binary):
    """A cubin's instructions, with their addresses, and its registers, stack and local memory."""
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
    used = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups()
    return code, dict(zip(("registers", "stack", "local"), map(int, used), strict=True))


def loops_of(code):
    """The instructions of each loop."""
    for at, line in code:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        if jump and int(jump[1], 16) < at:
            yield [inside for a, inside in code if int(jump[1], 16) <= a <= at]


def count(pattern, lines):
    """How many instructions match."""
    return sum(bool(re.search(rf"\b({pattern})\b", line)) for line in lines)


def inspect(binary):
    """Registers and spills of a cubin, and the instruction counts of its loop over columns."""
    code, used = disassembled(binary)

    products = functools.partial(count, "HMMA|HGMMA|UTCHMMA")
    # The loop over columns is the one with the tensor cores' instructions.
    main = max(loops_of(code), key=lambda loop: (products(loop), -len(loop)), default=[])
    return {
        **used,
        "local_instructions": count("LDL|STL", [line for _, line in code]),
        "loop": len(main) - products(main),
        "products": products(main),
        "additions": count("FADD", main),
        # Loads of the error through registers, one element at a time.
        "single_loads": count(r"LDG\S*U16", main),
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


def structured(gpu, name, wide, dtype, outputs):
    """One of STRUCTURED, compiled and inspected: a kernel in fp32 or fp64, and another dtype."""
    target = GPUTarget("hip", gpu, 64) if str(gpu).startswith("gfx") else GPUTarget("cuda", gpu, 32)
    kernel = getattr(structured_kernels, f"{name}_kernel")
    wide, dtype = getattr(torch, wide), getattr(torch, dtype)
    together = 2 if target.backend == "hip" else 1
    if name == "outer":
        together = host.BLOCKS[wide]
    narrow, many = f"*{NAMES[dtype]}", f"*{NAMES[wide]}"
    signals = (narrow,) * outputs if outputs else ("*i64",)
    pointers = dict.fromkeys(("z", "v", "sums", "scales"), many)
    pointers |= dict.fromkeys(("error", "matrix"), narrow) | {"unit": "*fp32"}
    pointers |= {"tiles": "*i64", "layers": "*i64", "outputs": signals, "signals": signals}
    values = {
        "OUTPUTS": outputs,
        "SIGNALS": outputs,
        "OUTPUT_DTYPE": DTYPES[dtype],
        "DTYPE": DTYPES[dtype],
        "ARITHMETIC": DTYPES[wide],
        "TARGET": target.backend,
        "QUAD": 16 // wide.itemsize,
        "ROWS": together,
        "FIRST": False,
        "LAST": True,
    }
    constants = [values[p.name] for p in kernel.params if p.name in values]
    options = host.options(kernel, wide, target.backend)
    binary = compiled(kernel, pointers, constants, 1, target, **options)
    if target.backend == "hip":
        spills = re.findall(r"(?:sgpr|vgpr)_spill_count: *(\d+)", binary.asm["amdgcn"])
        fused = re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f(?:32|64)\b", binary.asm["amdgcn"])
        return {"spills": list(map(int, spills)), "fused": len(fused)}
    code, used = disassembled(binary)
    lines = [line for _, line in code]
    # Of "project" the longest is the loop over output blocks. FADD2 adds two pairs.
    main = max(loops_of(code), key=len, default=[])
    return {
        **used,
        "local_instructions": count("LDL|STL", lines),
        "shared": binary.metadata.shared,
        "fused": count("FFMA2?|DFMA", lines),
        "flushed": count(r"(?:FADD|FMUL|F2F|F2FP)\.\S*FTZ\S*", lines),
        "shuffles": count(r"SHFL\S*", lines),
        "per_number": len(main) / (32 * together),
        "barriers": count(r"BAR\S*", main),
        "turning": count(r"STS\S*|LDS\S*", main) / together,
        "additions": (count("FADD|DADD", main) + 2 * count("FADD2", main)) / (32 * together),
    }


def cross_entropy(gpu, dtype, smoothed, capped, aligned):
    """One of CROSS_ENTROPY, compiled and inspected."""
    target = GPUTarget("hip", gpu, 64) if str(gpu).startswith("gfx") else GPUTarget("cuda", gpu, 32)
    dtype = getattr(torch, dtype)
    wide = stream.arithmetic(dtype)
    pointers = {"logits": f"*{NAMES[dtype]}", "target": "*i64"}
    pointers |= dict.fromkeys(("losses", "scales"), f"*{NAMES[wide]}")
    vector = 16 // dtype.itemsize if aligned else 1
    constants = (DTYPES[wide], True, smoothed, capped, vector, target.backend)
    constants += (losses.block_of(dtype, vector),)
    unaligned = {"target", "losses", "scales"} | ({"logits"} if not aligned else set())
    kernel = losses.cross_entropy_kernel
    binary = compiled(
        kernel,
        pointers,
        constants,
        losses.WARPS,
        target,
        unaligned,
        **losses.options(target.backend),
    )
    if target.backend == "hip":
        spills = re.findall(r"(?:sgpr|vgpr)_spill_count: *(\d+)", binary.asm["amdgcn"])
        return {"spills": list(map(int, spills))}
    code, used = disassembled(binary)
    lines = [line for _, line in code]
    return {
        **used,
        "local_instructions": count("LDL|STL", lines),
        "shared": binary.metadata.shared,
        "vectors": [count(rf"{name}\S*\.128\S*", lines) for name in ("LDG", "STG")],
    }


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


def specialised(kernel, *arguments):
    """What Triton's own argument binder specialises a launch with these arguments for."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    constants = [None] * (len(kernel.params) - len(arguments))
    _, found, _ = binder(*arguments, *constants, num_warps=4)
    return [str(one) for one in found[: len(arguments)]]


def specialisations(numbers):
    """Of the projection with these numbers."""
    error, table = torch.zeros(16, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.int64)
    return specialised(kernels.project_kernel, error, (error,), table, table, table, *numbers)


def specialisations_of_cross_entropy(first, numbers):
    """With these numbers, and targets, losses and scales from this element on."""
    logits, target = torch.zeros(16), torch.zeros(16, dtype=torch.int64)
    parts = target[first:], logits[first:], logits[first:]
    return specialised(losses.cross_entropy_kernel, logits, *parts, *numbers, 0.1, 30.0)


def answer(request):
    """The answer to one line of standard input."""
    match request:
        case ["structured", *which]:
            return structured(*which)
        case ["cross_entropy", *which]:
            return cross_entropy(*which)
        case ["others", capability]:
            return list(others(capability))
        case ["specialisations"]:
            numbers = ([1] * 8, [16] * 8, [7, 33, 17, 5, 2**31, -(2**63), 2**33 + 1, 10**12])
            return list(map(specialisations, numbers))
        case ["cross_entropy_specialisations"]:
            numbers = ([1] * 5, [16] * 5, [50257, 2**33 + 1, 3, 0, -100])
            return list(map(specialisations_of_cross_entropy, (0, 1, 4), numbers))
    return projection(*request)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
