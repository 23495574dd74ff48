"""Races between contenders of small cases, for the tests of the benchmarks."""

from benchmarks.harness.race import Limits, Race
from benchmarks.harness.roofs import Roofs
from benchmarks.harness.shapes import ALL, Case, Promise

ONCE = Limits(budget=0.0, patience=60.0, few=2, most=2, slowest=60.0)
SMALL = Case("small", (70, 40, 70), 5, 30, (*ALL, "fill"), promises=(Promise("cpp", "naive", 2.0),))


def machine():
    """Made-up roofs, for arithmetic by hand."""
    return Roofs(
        "cpu",
        2,
        latency={"call": 1e-6, "replay": 1e-7},
        write={1000: 4e9, 10**6: 8e9, 10**9: 1e9},
        memory={1000: 9e9, 10**6: 9e9, 10**9: 2e9},
        multiply={"fp32": 1e11, "bf16": 2e11},
        addition={"torch": 1e8, "cpp": 2e11},
        generation={
            "torch": dict.fromkeys(("normal", "uniform", "rademacher"), 1e8),
            "cpp": dict.fromkeys(("normal", "uniform", "rademacher"), 1e9),
            "torch.randn": {"normal": 3e8},
        },
    )


def new_race(limits=ONCE):
    return Race(limits, {0: machine(), 1: machine()})
