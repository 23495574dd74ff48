"""What the Triton kernels compile to, for GPUs that need not be present: no spills, few
instructions, and no new compilation for other numbers.

Triton's interpreter may be on in this process, so the kernels are compiled in a separate one.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).parent / "triton_compile.py"

# GPU, distribution, dtype of error and signals, terms, batch, outputs (0: a table), and what is
# unusual: terms made beforehand, a misaligned error, a signal of more than 2^31 elements
LAUNCHES = [
    (gpu, distribution, dtype, terms, count, 1, "")
    for gpu in (80, 90)
    for distribution, dtype, terms in [
        ("normal", "bfloat16", 0),
        ("normal", "float16", 0),
        ("normal", "float32", 3),
        ("normal", "float32", 2),
        ("normal", "float32", 1),
        ("uniform", "bfloat16", 0),
        ("rademacher", "bfloat16", 0),
        ("rademacher", "float32", 3),
        ("rademacher", "float32", 2),
    ]
    for count in ((16, 128) if gpu == 80 else (16, 64, 128))
]
LAUNCHES += [
    (90, "normal", "bfloat16", 0, 32, 4, ""),
    (90, "normal", "bfloat16", 0, 128, 0, ""),
    (90, "normal", "bfloat16", 0, 128, 1, "far"),
]
LAUNCHES += [(gpu, "normal", "bfloat16", 0, 128, 1, "misaligned") for gpu in (80, 90)]
LAUNCHES += [
    (gpu, distribution, "float32", terms, count, 1, "beforehand")
    for gpu in (80, 90)
    for terms in (2, 3)
    for distribution, count in [
        ("normal", 16),
        ("normal", 64),
        ("normal", 128),
        ("rademacher", 128),
    ]
]
# Newer GPUs, and one of AMD's.
LAUNCHES += [
    (gpu, distribution, dtype, 0, 64, 1, "")
    for gpu in (100, 120, "gfx942")
    for distribution, dtype in [
        ("normal", "bfloat16"),
        ("normal", "float16"),
        ("rademacher", "bfloat16"),
    ]
]
# The most issue slots per entry in the loop over columns, not counting tensor-core instructions:
# Philox, the distribution, moving entries to where they are multiplied, and the error's share.
LIMIT = {"normal": 24, "uniform": 18, "rademacher": 10}


@pytest.fixture(scope="module")
def program():
    """Compiles launches with `triton_compile.py`, one at a time.

    Each test waits only for its own launch. All of them at once would look like a hang on a busy
    machine.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(PROGRAM)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:

        @functools.cache
        def of(request):
            print(json.dumps(request), file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line, f"the compilation of {request} failed"
            return json.loads(line)

        yield of
    assert process.returncode == 0


# The other launches are variations of these.
QUICK = [
    *[(gpu, "normal", "bfloat16", 0, 128, 1, "") for gpu in (80, 90)],
    *[(gpu, "normal", "bfloat16", 0, 64, 1, "") for gpu in (100, 120, "gfx942")],
    (90, "rademacher", "bfloat16", 0, 64, 1, ""),
    *[(90, "normal", "float32", terms, 64, 1, "") for terms in (2, 3)],
    *[(90, "normal", "float32", terms, 64, 1, "beforehand") for terms in (2, 3)],
]
assert {*QUICK} < {*LAUNCHES}


def each(launches):
    """Run a test for each of these launches; those not in QUICK are slow."""
    parameters = [
        pytest.param(
            launch,
            id="-".join(map(str, launch)),
            marks=[pytest.mark.slow] * (launch not in QUICK),
        )
        for launch in launches
    ]
    return pytest.mark.parametrize("launch", parameters)


def check_spills(found):
    if "spills" in found:  # the counts for AMD
        assert found["spills"] == [0, 0]
        return
    assert found["stack"] == found["local"] == found["local_instructions"] == 0, found
    assert found["registers"] <= 255


@each(LAUNCHES)
def test_projection(program, resources, launch):
    """No spills, few instructions. With `-v` and in CI, a run ends with each launch's resources."""
    gpu, distribution, dtype, terms, count, _, way = launch
    found = program(launch)
    check_spills(found)
    if gpu not in (80, 90):
        return
    resources(
        f"sm_{gpu} {distribution} {dtype} terms {terms} {way}, M {count}: "
        f"{found['per_entry']:.2f} slots an entry, {found['registers']} registers, "
        f"{found['shared']} bytes shared"
    )
    assert found["products"] > 0
    if terms == 0 and way != "misaligned":
        limit = LIMIT[distribution] + (dtype == "float16")  # converted from bf16
        assert found["per_entry"] <= limit
    elif way == "beforehand":
        assert found["per_entry"] <= LIMIT[distribution] + 6
        assert found["single_loads"] == 0  # the terms are loaded as vectors


@pytest.mark.parametrize("gpu", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_other_kernels(program, gpu):
    others = program(("others", gpu))
    assert len(others) == 6
    for found in others:
        check_spills(found)


@each([launch for launch in LAUNCHES if launch[3] == 3])
def test_three_terms_are_added_up_apart_from_the_sums(program, launch):
    """Sums over all columns lose more in tensor cores than in fp32."""
    gpu, distribution, dtype, _, count, outputs, way = launch
    three, two = program(launch), program((gpu, distribution, dtype, 2, count, outputs, way))
    # Each further term made in the kernel costs one more subtraction for each of its elements.
    assert three["additions"] - two["additions"] >= three["sums"] == two["sums"]


def test_numbers_compile_nothing(program):
    """One compiled kernel serves all sizes, batches, strides and seeds."""
    first, *others = program(("specialisations",))
    assert len(first) > 10
    assert all(other == first for other in others)


# GPU, kernel, arithmetic, the dtype of the error or the signals, and signals (0: a table)
STRUCTURED = [
    (gpu, name, wide, dtype, 1)
    for gpu in (80, 90)
    for name in ("project", "inner", "outer", "spread", "collect", "matrix")
    for wide, dtype in (("float32", "float32"), ("float32", "bfloat16"), ("float64", "float64"))
]
STRUCTURED += [
    (gpu, name, wide, dtype, 1)
    for gpu in (100, 120, "gfx942")
    for name in ("project", "outer", "spread", "collect")
    for wide, dtype in (("float32", "bfloat16"), ("float64", "float64"))
]
STRUCTURED += [
    (90, name, wide, dtype, outputs)
    for name in ("project", "outer", "spread")
    for wide, dtype, outputs in (("float32", "float16", 0), ("float64", "float32", 4))
]
STRUCTURED += [(gpu, "outer", "float64", "bfloat16", 1) for gpu in (80, 90, 120)]
QUICK_STRUCTURED = [
    (90, "project", "float32", "bfloat16", 1),
    (90, "spread", "float32", "float32", 1),
]
# A compilation takes 10 seconds, so the rest are for a day on which Triton or these kernels have
# changed.
SLOW_STRUCTURED = [
    (80, "project", "float32", "float32", 1),
    ("gfx942", "project", "float32", "bfloat16", 1),
    (120, "outer", "float64", "bfloat16", 1),
    (80, "collect", "float32", "bfloat16", 1),
]
assert {*QUICK_STRUCTURED, *SLOW_STRUCTURED} < {*STRUCTURED}


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(
            one,
            id="-".join(map(str, one)),
            marks=[]
            if one in QUICK_STRUCTURED
            else [pytest.mark.slow if one in SLOW_STRUCTURED else pytest.mark.battery],
        )
        for one in STRUCTURED
    ],
)
def test_structured(program, resources, launch):
    """No spills, no product fused with an addition, and blocks turned by vectors, not by shuffles.

    The numbers are those of the longest loop: of "project" per written number.
    """
    gpu, name, wide, dtype, outputs = launch
    found = program(("structured", *launch))
    check_spills(found)
    assert found["fused"] == 0
    if gpu == "gfx942":
        return
    assert found["flushed"] == 0
    assert found["shuffles"] <= 16  # to find a range of layers
    resources(
        f"sm_{gpu} structured {name} {wide} {dtype}, {outputs or 'many'} signals: "
        f"{found['per_number']:.1f} slots a number, {found['registers']} registers, "
        f"{found['shared']} bytes shared, {found['turning']:.0f} accesses, "
        f"{found['barriers']} barriers"
    )
    if name == "project" and wide == "float32":
        assert found["additions"] >= 10
        assert found["per_number"] <= 22 + 3 * (dtype != "float32")
        assert found["turning"] <= 16
        assert found["barriers"] <= 1


# GPU, dtype, with smoothing, with a softcap, and whether rows begin on 16 bytes
CROSS_ENTROPY = [
    (gpu, dtype, *flags, aligned)
    for gpu in (80, 90, "gfx942")
    for dtype in ("bfloat16", "float16", "float32", "float64")
    for flags in ((False, False), (True, True), (True, False))
    for aligned in (True, False)
]
QUICK_CROSS_ENTROPY = [
    (90, "bfloat16", True, True, True),
    (90, "float32", True, True, False),
    ("gfx942", "bfloat16", True, True, True),
]
SLOW_CROSS_ENTROPY = [
    (gpu, dtype, True, True, aligned)
    for gpu, dtype in ((90, "float16"), (90, "float64"), (80, "float64"), ("gfx942", "float32"))
    for aligned in (True, False)
]
assert {*QUICK_CROSS_ENTROPY, *SLOW_CROSS_ENTROPY} < {*CROSS_ENTROPY}


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(
            one,
            id="-".join(map(str, one)),
            marks=[]
            if one in QUICK_CROSS_ENTROPY
            else [pytest.mark.slow if one in SLOW_CROSS_ENTROPY else pytest.mark.battery],
        )
        for one in CROSS_ENTROPY
    ],
)
def test_cross_entropy(program, resources, launch):
    """No spills, 16 bytes at a time where that can be, and two programs to a multiprocessor."""
    gpu, dtype, smoothed, capped, aligned = launch
    found = program(("cross_entropy", *launch))
    check_spills(found)
    if gpu == "gfx942":
        return
    assert found["registers"] <= 64
    loads, stores = found["vectors"]
    assert (loads > 0) == (stores > 0) == aligned
    resources(
        f"sm_{gpu} cross entropy {dtype}, smoothed {smoothed}, capped {capped}, "
        f"aligned {aligned}: {found['registers']} registers, {found['shared']} bytes shared"
    )


def test_numbers_compile_no_cross_entropy(program):
    """One kernel serves all rows, columns and strides, and parts of tensors."""
    first, *others = program(("cross_entropy_specialisations",))
    assert len(first) > 10
    assert all(other == first for other in others)
