"""The 4096 normal levels: their exact values, the guard band around ties, and their law."""

import math
from decimal import Decimal
from statistics import NormalDist

import pytest
import torch

from dfa_kernels import stream
from tests import reference
from tests.samples import DTYPES
from tests.stream import codebook_guard_band as guard_band

SHA256 = reference.KNOWN["codebook_bf16_sha256"]
LOG2_ERRORS = {"exact": 0.0, **guard_band.log2_errors()}


@pytest.fixture(scope="module")
def exact():
    values, _ = guard_band.exact_values()
    return values


@pytest.fixture(scope="module")
def patterns(exact):
    return [guard_band.bf16_pattern(value) for value in exact]


def test_exact_rounding_agrees_with_torch():
    grid = torch.linspace(-4, 4, 1001, dtype=torch.float64).float()
    grid = grid[grid != 0]
    assert [guard_band.bf16_pattern(Decimal(v)) for v in grid.tolist()] == (
        guard_band.patterns_of(grid)
    )


@pytest.mark.parametrize(
    ("value", "distance"),
    [
        (1 + 2**-8, 0.0),
        (1 + 2**-7, 2**-8 / (1 + 2**-7)),
        (1.0, 2**-9),
        (-3 * (1 + 2**-20), (2**-7 - 3 * 2**-20) / (3 * (1 + 2**-20))),
    ],
)
def test_tie_distance_of_known_numbers(value, distance):
    assert guard_band.tie_distance(Decimal(value)) == pytest.approx(distance, rel=1e-12)


def test_known_digest(patterns):
    assert guard_band.digest(patterns) == SHA256


def test_digest_and_count_notice_one_wrong_level(exact, patterns):
    wrong = [*patterns[:100], patterns[100] + 1, *patterns[101:]]
    assert guard_band.digest(wrong) != SHA256
    assert guard_band.count_wrong(guard_band.fp32_values("Horner"), wrong) == 1


def test_coefficients_are_fp32_numbers():
    coefficients = torch.tensor(stream.CODEBOOK_COEFFICIENTS, dtype=torch.float64)
    torch.testing.assert_close(coefficients.float().double(), coefficients, rtol=0, atol=0)


def test_guard_band(exact):
    guard = min(guard_band.tie_distance(value) for value in exact)
    assert math.log2(guard) == pytest.approx(-16.77, abs=0.005)


@pytest.mark.parametrize("evaluation", guard_band.EVALUATIONS)
def test_fp32_error_is_far_inside_the_guard_band(evaluation, exact):
    assert guard_band.relative_error(guard_band.fp32_values(evaluation), exact) < 2**-21


@pytest.mark.parametrize("evaluation", guard_band.EVALUATIONS)
@pytest.mark.parametrize("log2_error", LOG2_ERRORS)
def test_every_fp32_evaluation_gives_the_same_levels(evaluation, log2_error, patterns):
    values = guard_band.fp32_values(evaluation, LOG2_ERRORS[log2_error])
    assert guard_band.count_wrong(values, patterns) == 0


def test_any_log2_within_its_bound_gives_the_same_levels():
    """No error up to the bound moves a value across a tie, not only those tried above."""
    assert guard_band.log2_tolerance(*guard_band.exact_values(), 2**-21) > guard_band.LOG2_ERROR


@pytest.mark.parametrize("log2_error", [2**-12, -(2**-12)])
def test_an_evaluation_outside_the_guard_band_is_noticed(log2_error, patterns):
    assert guard_band.count_wrong(guard_band.fp32_values("Horner", log2_error), patterns) > 0


def test_a_wrong_coefficient_is_noticed(monkeypatch, patterns):
    c0, *others = stream.CODEBOOK_COEFFICIENTS
    monkeypatch.setattr(stream, "CODEBOOK_COEFFICIENTS", (c0 * (1 + 2**-14), *others))
    assert guard_band.count_wrong(stream.codebook_values(), patterns) > 0


@pytest.mark.parametrize("arithmetic", [torch.float32, torch.float64])
def test_the_stream_evaluates_the_exact_levels(arithmetic, patterns):
    assert guard_band.patterns_of(stream.codebook_values(arithmetic)) == patterns


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_are_exact_in_every_dtype(dtype, patterns):
    levels = stream.levels("normal", dtype, torch.device("cpu"))
    assert levels.dtype == dtype
    assert levels.tolist() == guard_band.floats_of(patterns)


def test_levels_rise_and_are_odd(patterns):
    levels = guard_band.floats_of(patterns)
    assert levels == sorted(levels)
    assert levels == [-level for level in reversed(levels)]


def test_documented_law(patterns):
    law = guard_band.law(guard_band.floats_of(patterns))
    assert law["mean"] == 0
    assert law["variance"] == pytest.approx(1.000034, abs=5e-7)
    assert law["kurtosis"] == pytest.approx(2.991, abs=5e-4)
    assert law["maximum"] == 3.671875
    assert law["Kolmogorov-Smirnov"] == pytest.approx(0.00113, abs=5e-6)
    assert law["distinct"] == 1546


def test_most_of_the_distance_to_normal_is_bf16_rounding(patterns):
    """Rounding N(0,1) itself to bfloat16 is off by half a step at 1. 4096 levels add the rest."""
    rounding = NormalDist().cdf(1 + 2**-8) - NormalDist().cdf(1)
    assert rounding == pytest.approx(0.00094, abs=5e-6)
    distance = guard_band.law(guard_band.floats_of(patterns))["Kolmogorov-Smirnov"]
    assert rounding < distance < rounding + 1 / stream.CODEBOOK_LEVELS
