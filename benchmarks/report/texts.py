"""Numbers as they stand in tables, figures and the terminal."""

from __future__ import annotations

from benchmarks.harness.shapes import TITLES

# What the paper's tables of memory call the ways to store.
STORAGES = {"naive": TITLES["naive"], "shared": TITLES["stored"], "seeded": "from the seed"}
# Bytes below which resident memory says more of the allocator than of the work.
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
    """How many times faster; a small fraction keeps a digit."""
    return f"{times:.2f}x" if times > 0.1 else f"{times:.1g}x"


def peak(cell: dict) -> str:
    """A measured peak, or why there is none."""
    if "does not fit" in cell:
        return f"does not fit ({bytes_text(cell['does not fit'])})"
    if "peak" not in cell:
        return "not measured"
    return (
        bytes_text(cell["peak"])
        if cell["peak"] >= LEAST_PEAK
        else f"under {bytes_text(LEAST_PEAK)}"
    )
