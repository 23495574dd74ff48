"""What the Triton kernels compile to, for GPUs that need not be here: no spills, few instructions,
and nothing anew for other numbers.

Triton's interpreter may be on in this process, so the kernels are compiled in one of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).parent / "triton_compile.py"

# GPU, distribution, dtype of error and signals, terms, error's rows, outputs (0: a table), and what
# is out of the ordinary: terms made beforehand, a misaligned error, a signal past 2^31 numbers
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
# Newer GPUs, and AMD's.
LAUNCHES += [
    (gpu, distribution, dtype, 0, 64, 1, "")
    for gpu in (100, 120, "gfx942")
    for distribution, dtype in [
        ("normal", "bfloat16"),
        ("normal", "float16"),
        ("rademacher", "bfloat16"),
    ]
]
# Issue slots an entry in the loop over columns, without the tensor cores' own: Philox, the
# distribution, moving entries to where they are multiplied, and the error's part of it.
LIMIT = {"normal": 24, "uniform": 18, "rademacher": 10}


@pytest.fixture(scope="module")
def program():
    """What `triton_compile.py` found."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(PROGRAM), json.dumps(LAUNCHES)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compiled(program):
    """By launch, what it compiles to."""
    return dict(zip(LAUNCHES, program["kernels"], strict=False))


def test_no_kernel_spills(program, compiled):
    others = program["kernels"][len(LAUNCHES) :]
    assert len(others) == 2 * 6
    for launch, found in (*compiled.items(), *(("other", found) for found in others)):
        if "spills" in found:  # AMD's counts
            assert found["spills"] == [0, 0], launch
            continue
        assert found["stack"] == found["local"] == found["local_instructions"] == 0, (launch, found)
        assert found["registers"] <= 255


def test_entries_take_few_instructions(compiled, resources):
    """What each launch takes stands at the end of a run, with `-v` and in CI."""
    for launch, found in compiled.items():
        gpu, distribution, dtype, terms, count, _, way = launch
        if gpu not in (80, 90):
            continue
        resources(
            f"sm_{gpu} {distribution} {dtype} terms {terms} {way}, M {count}: "
            f"{found['per_entry']:.2f} slots an entry, {found['registers']} registers, "
            f"{found['shared']} bytes shared"
        )
        assert found["products"] > 0
        if terms == 0 and way != "misaligned":
            limit = LIMIT[distribution] + (dtype == "float16")  # to which bf16 is converted
            assert found["per_entry"] <= limit, launch
        elif way == "beforehand":
            assert found["per_entry"] <= LIMIT[distribution] + 6, launch


def test_terms_made_beforehand_are_loaded_by_vectors(compiled):
    for launch, found in compiled.items():
        assert launch[-1] != "beforehand" or found["single_loads"] == 0, launch


def test_three_terms_are_added_up_apart_from_the_sums(compiled):
    """What tensor cores add up over all columns loses more than fp32 does."""
    compared = 0
    for launch, found in compiled.items():
        gpu, distribution, dtype, terms, count, outputs, way = launch
        if terms == 3:
            two = compiled[gpu, distribution, dtype, 2, count, outputs, way]
            # A term more that is made in the kernel is a subtraction more for each of its numbers.
            more = found["additions"] - two["additions"]
            assert more >= found["sums"] == two["sums"], launch
            compared += 1
    assert compared > 10


def test_numbers_compile_nothing(program):
    """Whatever the sizes, batch, strides and seed: one compiled kernel."""
    first, *others = program["specialisations"]
    assert len(first) > 10
    assert all(other == first for other in others)
