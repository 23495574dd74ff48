"""Every tile of the Triton kernels and every kind of error, on a GPU or in the interpreter."""

import re

import pytest
import torch

pytest.importorskip("triton")

from dfa_kernels import cases, verify
from dfa_kernels.backends import tensor_cores, triton
from dfa_kernels.backends.triton import launch
from dfa_kernels.layers import Layers
from tests.reference import DENSE

pytestmark = [
    pytest.mark.triton,
    # Raised by Triton 3.6's interpreter.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FRAGMENTS = launch.Operands.on(torch.device(DEVICE)).fragments
ERRORS = [
    (torch.bfloat16, "highest"),
    (torch.float16, "highest"),
    (torch.float32, "highest"),
    (torch.float32, "high"),
    (torch.float32, "medium"),
]
# The interpreter multiplies everything in fp32, so there these show what the others would.
QUICK = [("normal", *ERRORS[0]), ("rademacher", *ERRORS[0]), ("uniform", *ERRORS[4])]
QUICK += [("normal", *ERRORS[2])]
WAYS = [
    pytest.param(*way, marks=[pytest.mark.battery] * (DEVICE == "cpu" and way not in QUICK))
    for way in ((distribution, *error) for distribution in DENSE for error in ERRORS)
]


def case_for(name, dtype, distribution):
    """Two of the way's tiles along the rows of U, two along the batch, three steps of columns each.

    Layers overlap and cross row 2**32, two are the same, and one is at the last rows.
    """
    rows, batch = map(int, re.findall(r"\d+", name) or (32, 32))
    unit_rows = max(batch - 24, 2)
    columns = 265 if distribution == "rademacher" else 137 if rows == 64 else max(73, unit_rows)
    layers = Layers(
        row_offsets=(2**32 - 33, 2**32 - 20, 2**32 - 20, 2**32 - 3, 2**63 - 9),
        sizes=(64, 7, 7, 19, 9),
        scales=(1.0, -0.5, 4.0, 2.0, 1.0),
    )
    return cases.Case.of(dtype, distribution, columns, unit_rows, layers)


@pytest.mark.parametrize(("distribution", "dtype", "precision"), WAYS)
def test_every_way_gives_the_definition(distribution, dtype, precision):
    """Entries and exact sums bit for bit, other sums within their bound."""
    mistakes = {}
    terms = tensor_cores.TERMS[precision] if dtype == torch.float32 else 3
    like = torch.empty(0, 1, dtype=dtype, device=DEVICE)
    with verify._precision(precision):
        for name, project in triton.ways(like, distribution):
            case = case_for(name, dtype, distribution)
            expected = case.expected(torch.float32, terms=terms, lattice=True)
            signals = project(case.error.to(DEVICE), case.layers, case.stream, torch.float32)
            mistakes[name] = case.mistake(signals, expected)
        chosen = {
            launch.tile_for(count, distribution, launch.terms_of(like), FRAGMENTS)
            for count in range(1, 300)
        }
    assert {name: mistake for name, mistake in mistakes.items() if mistake} == {}
    fused = {f"fused {tile.rows} x {tile.batch}" for tile in chosen}
    if dtype == torch.float32 and terms > 1:
        fused |= {f"{name}, split beforehand" for name in fused}
    assert fused <= set(mistakes) <= fused | {"slabs"}
    assert ("slabs" in mistakes) == (dtype != torch.float32 or terms < 3)
