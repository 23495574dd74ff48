"""Numbers as text, for tables, figures and the terminal."""

from __future__ import annotations

from benchmarks.harness.measure import MISSING
from benchmarks.harness.shapes import RATE, TITLES, WRITE_ROOF

# What the paper's tables of memory call the ways of storing.
STORAGES = {"naive": TITLES["naive"], "shared": TITLES["stored"], "seeded": "from the seed"}
# Bytes. Below this, resident memory tells more about the allocator than about the work.
LEAST_PEAK = 1e6


def time_text(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def bytes_text(count: float | None) -> str:
    """Three digits and a decimal unit."""
    if count is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def times_text(times: float) -> str:
    """How many times faster; a small fraction keeps one digit."""
    return f"{times:.2f}x" if times > 0.1 else f"{times:.1g}x"


def rate_text(rate: float) -> str:
    """A number a second, in two digits."""
    return f"{rate:.2g}/s"


def deviating(mean: float, deviation: float) -> str:
    """Mean (standard deviation)."""
    return f"{mean:.3f} ({deviation:.3f})"


def way(row: dict) -> str:
    """How a row of the experiment on distributions was trained."""
    return {"backprop": "backpropagation", "shallow": "hidden layers frozen"}.get(
        row["mode"], row["practice"]
    )


def promise_text(rival: str, value: float) -> str:
    """What a promise against `rival` asks or has reached."""
    if rival == WRITE_ROOF:
        return f"{value:.0%}"
    return rate_text(value) if rival == RATE else times_text(value)


def peak(cell: dict) -> str:
    """A measured peak, or why there is none."""
    if MISSING in cell:
        return f"{MISSING} ({bytes_text(cell[MISSING])})"
    if "peak" not in cell:
        return "not measured"
    if cell["peak"] < LEAST_PEAK:
        return f"under {bytes_text(LEAST_PEAK)}"
    return bytes_text(cell["peak"])
