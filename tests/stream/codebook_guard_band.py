"""The guard band of the codebook, derived from its coefficients.

    python -m tests.stream.codebook_guard_band

In stream v1, every backend must get the same 4096 bfloat16 numbers from its own fp32 arithmetic.
It does, because no exact value of the formula lies near a rounding tie of bfloat16. This script
evaluates the formula to 60 digits and finds the nearest tie. It compares that distance with the
error of fp32 in several orders of evaluation and with an inaccurate log2. `test_codebook.py`
asserts what is printed here.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from statistics import NormalDist

import torch
from torch import Tensor

from dfa_kernels import stream

LEVELS = stream.CODEBOOK_LEVELS
COEFFICIENTS = stream.CODEBOOK_COEFFICIENTS
DIGITS = 60
LOG2_ERROR = 2.0**-15  # the absolute error that a backend's log2 may have


def exact_values() -> tuple[list[Decimal], list[Decimal]]:
    """The 4096 values of the formula and their derivatives with respect to w, to 60 digits."""
    with localcontext() as context:
        context.prec = DIGITS
        coefficients = [Decimal(c) for c in COEFFICIENTS]
        ln2 = Decimal(2).ln()
        values, slopes = [], []
        for k in range(LEVELS):
            p = Decimal(2 * k + 1 - LEVELS) / LEVELS
            w = -(1 - p * p).ln() / ln2
            polynomial = slope = Decimal(0)
            for c in reversed(coefficients):
                slope = slope * w + polynomial
                polynomial = polynomial * w + c
            values.append(p * polynomial)
            slopes.append(p * slope)
    return values, slopes


def in_half_steps(value: Decimal) -> tuple[Decimal, int]:
    """x in [256, 512) and e with |value| = x * 2^(e - 8): bfloat16 at even x, ties at odd x."""
    _, above = math.frexp(float(abs(value)))  # 2^(above - 1) <= |value| < 2^above
    with localcontext() as context:
        context.prec = DIGITS
        return abs(value) * Decimal(2) ** (9 - above), above - 1


def bf16_pattern(value: Decimal) -> int:
    """The bit pattern of the bfloat16 number nearest to an exact value, normal and not a tie."""
    x, exponent = in_half_steps(value)
    magnitude = ((exponent + 127) << 7) + round(x / 2) - 128
    return magnitude | (0x8000 if value < 0 else 0)


def tie_distance(value: Decimal) -> float:
    """Relative distance from an exact value to the nearest tie between two bfloat16 numbers."""
    x, _ = in_half_steps(value)
    odd = 2 * math.floor(x / 2) + 1
    below_binade = x - Decimal("255.5")  # below a power of two the spacing halves
    return float(min(abs(x - odd), below_binade) / x)


def digest(patterns: list[int]) -> str:
    """SHA-256 of the patterns as little-endian 16-bit words, in order of k."""
    return hashlib.sha256(struct.pack(f"<{len(patterns)}H", *patterns)).hexdigest()


def patterns_of(values: Tensor) -> list[int]:
    """Bit patterns of the values, rounded to bfloat16 by torch."""
    return (values.bfloat16().view(torch.int16).int() & 0xFFFF).tolist()


def floats_of(patterns: list[int]) -> list[float]:
    """The numbers of bfloat16 bit patterns, which are the high halves of fp32 patterns."""
    return [struct.unpack("<f", struct.pack("<I", pattern << 16))[0] for pattern in patterns]


def horner(p: Tensor, w: Tensor) -> Tensor:
    polynomial = torch.zeros_like(w)
    for c in reversed(COEFFICIENTS):
        polynomial = polynomial * w + c
    return p * polynomial


def horner_fma(p: Tensor, w: Tensor) -> Tensor:
    """Horner with one rounding a step: in fp64 the product of two fp32 numbers is exact."""
    polynomial = torch.zeros_like(w)
    for c in reversed(COEFFICIENTS):
        polynomial = (polynomial.double() * w.double() + c).float()
    return p * polynomial


def estrin(p: Tensor, w: Tensor) -> Tensor:
    c0, c1, c2, c3, c4 = COEFFICIENTS
    square = w * w
    return p * ((c0 + c1 * w) + square * ((c2 + c3 * w) + square * c4))


def powers(p: Tensor, w: Tensor) -> Tensor:
    polynomial = torch.zeros_like(w)
    for i, c in enumerate(COEFFICIENTS):
        polynomial = polynomial + c * w**i
    return p * polynomial


EVALUATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Horner": horner,
    "Horner, fma": horner_fma,
    "Estrin": estrin,
    "powers": powers,
}


def fp32_values(evaluation: str, log2_error: Tensor | float = 0.0) -> Tensor:
    """The formula in fp32. p has 12 bits, so 1 - p*p is exact; only log2 and the polynomial err."""
    p = (2 * torch.arange(LEVELS, dtype=torch.float32) + 1) / LEVELS - 1
    w = -(torch.log2(1 - p * p) + log2_error)
    return EVALUATIONS[evaluation](p, w)


def log2_errors() -> dict[str, Tensor | float]:
    """Errors of log2: at the bound with one sign or with alternating signs, or random below it."""
    alternating = LOG2_ERROR * (1 - 2 * (torch.arange(LEVELS, dtype=torch.float32) % 2))
    uniform = torch.rand(LEVELS, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {
        "log2 + 2^-15": LOG2_ERROR,
        "log2 - 2^-15": -LOG2_ERROR,
        "log2 +- 2^-15": alternating,
        "log2 random error": LOG2_ERROR * uniform,
    }


def relative_error(values: Tensor, exact: list[Decimal]) -> float:
    reference = torch.tensor([float(v) for v in exact], dtype=torch.float64)
    return ((values.double() - reference) / reference).abs().max().item()


def log2_tolerance(values: list[Decimal], slopes: list[Decimal], fp32_error: float) -> float:
    """The largest absolute error of log2 that moves no value across a tie, to first order."""
    room = (
        (tie_distance(value) - fp32_error) * float(abs(value / slope))
        for value, slope in zip(values, slopes, strict=True)
    )
    return min(room)


def law(levels: list[float]) -> dict[str, float]:
    """Exact moments of equally likely levels, and their distance to N(0,1)."""
    exact = [Fraction(v) for v in levels]
    mean, variance, fourth = (sum(v**i for v in exact) / len(exact) for i in (1, 2, 4))
    below, distance = 0, 0.0
    for value, count in sorted(Counter(levels).items()):
        normal = NormalDist().cdf(value)
        sides = (below / len(levels), (below + count) / len(levels))
        distance = max(distance, *(abs(normal - side) for side in sides))
        below += count
    return {
        "mean": float(mean),
        "variance": float(variance),
        "kurtosis": float(fourth / variance**2),
        "maximum": max(abs(v) for v in levels),
        "Kolmogorov-Smirnov": distance,
        "distinct": len(set(levels)),
    }


def count_wrong(values: Tensor, patterns: list[int]) -> int:
    """The number of values that round to a wrong bfloat16 number."""
    return sum(a != b for a, b in zip(patterns_of(values), patterns, strict=True))


def main() -> None:
    exact, slopes = exact_values()
    patterns = [bf16_pattern(v) for v in exact]
    guard, nearest = min((tie_distance(v), k) for k, v in enumerate(exact))
    print(f"nearest bf16 tie      2^{math.log2(guard):.2f} (relative), at k = {nearest}")
    errors = {name: relative_error(fp32_values(name), exact) for name in EVALUATIONS}
    for name, error in errors.items():
        print(f"fp32, {name:15} error 2^{math.log2(error):.2f} (relative), levels that differ:")
        for kind, log2_error in {"log2 as it is": 0.0, **log2_errors()}.items():
            print(f"    {kind:17} {count_wrong(fp32_values(name, log2_error), patterns)}")
    tolerance = log2_tolerance(exact, slopes, max(errors.values()))
    print(f"log2 may err by       2^{math.log2(tolerance):.2f} (absolute)")
    print(f"SHA-256 of levels     {digest(patterns)}")
    for name, value in law(floats_of(patterns)).items():
        print(f"{name:21} {value:.7g}")


if __name__ == "__main__":
    main()
