"""The laws and errors of other codebases in PORTING.md, against their formulas written out here.

Options are read from the page and evaluated, so what is tested is what it says.
"""

import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, feedback_matrix, project
from dfa_kernels.nn import INDEPENDENT_ROWS
from tests.nn.networks import (
    CLASSES,
    WIDTHS,
    assert_equal,
    backward,
    batch,
    perceptron,
    signals,
)
from tests.nn.porting import (
    OUTPUT,
    TARGET,
    WRONG,
    Table,
    assert_received,
    by_signals,
    difference,
    mean,
    received,
)

LAWS, ERRORS = Table("Which law"), Table("Which error")


def slices(draw):
    """A draw [l_max, n], sliced for every layer."""
    return lambda sizes, n: [draw(max(sizes), n)[:size] for size in sizes]


def each(draw):
    """A draw [l, n] of its own for every layer."""
    return lambda sizes, n: [draw(size, n) for size in sizes]


def initialized(name, by_columns=True, **arguments):
    """torch's initializer, of B stored as [n, l] or as [l, n]."""
    fill = getattr(nn.init, name)
    if by_columns:
        return each(lambda size, n: fill(torch.empty(n, size), **arguments).T)
    return each(lambda size, n: fill(torch.empty(size, n), **arguments))


def paper(sizes, n):
    B = torch.randn(max(sizes), n) / math.sqrt(max(sizes) * n)
    return [math.sqrt(max(sizes) / size) * B[:size] for size in sizes]


def one(draw, sizes, n):
    """One matrix [n, l_max], as it stands."""
    matrix = draw(n, max(sizes)).T
    return [matrix[:size] for size in sizes]


# The matrices B_i [l, n] that the other code multiplies by, from (sizes, n).
DRAWS = {
    "the paper's eqs. 7 and 8": paper,
    "the same without normalization": lambda sizes, n: one(torch.randn, sizes, n),
    "eq. 7 alone": lambda sizes, n: [
        b / (max(sizes) * n) ** 0.5 for b in one(torch.randn, sizes, n)
    ],
    "[tinydfa]": lambda sizes, n: [
        (2 * b - 1) / max(sizes) ** 0.5 for b in one(torch.rand, sizes, n)
    ],
    "tinydfa with `normalization=False`": lambda sizes, n: [
        2 * b - 1 for b in one(torch.rand, sizes, n)
    ],
    "[Refinetti": lambda sizes, n: [
        matrix[:, :size].T / max(sizes) ** 0.5
        for matrix, size in zip(torch.randn(len(sizes), n, max(sizes)), sizes, strict=True)
    ],
    "[Spiking DFA]": lambda sizes, n: [
        2 * b / max(sizes) ** 0.5 for b in one(torch.randn, sizes, n)
    ],
    "[Nøkland 2016]": each(
        lambda size, n: torch.empty(size, n).uniform_(-(size**-0.5), size**-0.5)
    ),
    "`kaiming_uniform_` of B stored as [n, l], so": initialized("kaiming_uniform_"),
    "`kaiming_normal_` of B stored as [n, l]": initialized("kaiming_normal_"),
    "`kaiming_uniform_` of B stored as [l, n]": initialized("kaiming_uniform_", by_columns=False),
    "`kaiming_normal_` of the same": initialized("kaiming_normal_", mode="fan_out"),
    "`xavier_uniform_`": initialized("xavier_uniform_"),
    "`xavier_normal_`": initialized("xavier_normal_"),
    "the weight of `nn.Linear(n, l)`": each(lambda size, n: nn.Linear(n, size).weight.detach()),
    "the weight of `nn.Linear(l, n)`": each(lambda size, n: nn.Linear(size, n).weight.detach().T),
    "U(-b, b)": each(lambda size, n: torch.empty(size, n).uniform_(-0.5, 0.5)),
    "`s * torch.randn`": each(lambda size, n: 0.05 * torch.randn(size, n)),
    "`torch.randn / sqrt(n)`": each(lambda size, n: torch.randn(n, size).T / math.sqrt(n)),
    "signs times b": each(lambda size, n: 0.1 * torch.randn(size, n).sign()),
}


def correlation(a, b):
    """Of the entries of two matrices in the rows that both have."""
    rows = min(len(a), len(b))
    return torch.corrcoef(torch.stack([a[:rows].flatten(), b[:rows].flatten()]))[0, 1].item()


@pytest.mark.parametrize("law", DRAWS)
def test_laws_of_other_codebases(law):
    """The same spread and bounds, layer by layer, and the same sharing between layers."""
    sizes, n = [400, 240], 60
    theirs = DRAWS[law](sizes, n)
    ours = [signal.T for signal in signals(torch.eye(n), sizes, **LAWS.options(law))]
    bounded = theirs[0].abs().max() < 2 * theirs[0].std()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.03)
        assert abs(mine.mean()) < 0.03 * mine.std()
        assert (mine.abs().max() < 2 * mine.std()) == bounded
        if bounded:
            largest = mine.abs().max().item(), other.abs().max().item()
            assert largest[0] == pytest.approx(largest[1], rel=0.01)
    # 1 where layers share a matrix, 0 where each has its own.
    assert correlation(*ours) == pytest.approx(round(correlation(*theirs)), abs=0.05)


def test_project_takes_the_same_scales():
    error, sizes = torch.randn(5, 9), [20, 12]
    law = LAWS.options("[Nøkland 2016]")
    found = project(
        error,
        sizes,
        distribution="uniform",
        normalization=law["normalization"](sizes, 9),
        row_offsets=[0, INDEPENDENT_ROWS],
    )
    assert_equal(found, signals(error, sizes, **law))


def test_no_norm_is_the_matrix_itself_and_not_equation_7():
    """Layers of one size tell them apart: there eqs. 7 and 8 agree, and "no norm" differs."""
    error = torch.randn(4, 10)
    unscaled = error @ feedback_matrix(12, 10).T
    for signal in signals(error, [12, 12], normalization=1.0):
        torch.testing.assert_close(signal, unscaled)
    for normalization in (True, False):
        for signal in signals(error, [12, 12], normalization=normalization):
            torch.testing.assert_close(signal, unscaled / math.sqrt(12 * 10))
    for place in (DFA, project):
        assert 'U itself, the paper\'s "no norm"' in " ".join(inspect.getdoc(place).split())


# --- which error ---


@ERRORS.holds("the gradient of the loss, as autograd gives it")
def test_the_error_is_the_gradient_of_the_loss():
    assert_received(received({}, OUTPUT, mean), WRONG / 8)


@ERRORS.holds("softmax - one-hot, beside a mean loss")
def test_the_mean_is_undone():
    given = ERRORS.options("softmax - one-hot, beside")
    assert_received(received(given, OUTPUT, mean), WRONG)


def test_the_papers_code():
    """Hidden layers get the sum over the batch, the last layer the mean."""
    x, y = batch()
    B = torch.randn(CLASSES, 16)
    given = ERRORS.options("softmax - one-hot, beside")
    model = perceptron(matrix=B.T, **given)
    projected = difference(model, x, y) @ (B / math.sqrt(16 * CLASSES))
    made = [math.sqrt(16 / width) * projected[:, :width] for width in WIDTHS]
    assert_equal(backward(model, x, y), by_signals(model, x, y, made), rtol=1e-4, atol=1e-6)


@ERRORS.holds("softmax - one-hot, and the last layer too")
def test_a_sum_as_the_loss():
    write = ERRORS.lines[ERRORS.line("softmax - one-hot, and the last layer too")]
    assert write == '`cross_entropy(..., reduction="sum")`'
    summed = received({}, OUTPUT, lambda output: F.cross_entropy(output, TARGET, reduction="sum"))
    assert_received(summed, WRONG)


def tokens(**arguments):
    return lambda output: F.cross_entropy(output.flatten(0, 1), TARGET, **arguments)


@ERRORS.holds("softmax - one-hot of tokens")
def test_the_mean_over_tokens_is_undone():
    given = ERRORS.options("softmax - one-hot of tokens")
    found = received(given, OUTPUT.view(2, 4, 5), tokens(), (0, 1))
    assert_received(found, WRONG.view(2, 4, 5))


@ERRORS.holds("the same with padded tokens", "the same, also where a token")
@pytest.mark.parametrize("beginning", ["the same with padded tokens", "the same, also where"])
def test_the_mean_over_tokens_that_count_is_undone(beginning):
    y = TARGET.clone()
    y[[1, 6, 7]] = -100
    (count,) = re.findall(
        r"`counted\[\"tokens\"\] = (.*)`", ERRORS.lines[ERRORS.line("the same, also where")]
    )
    counted = {"tokens": eval(count, {"y": y})}
    given = ERRORS.options(beginning, counted=counted)

    def loss(output):
        return F.cross_entropy(output.flatten(0, 1), y)

    expected = WRONG * (y != -100)[:, None]
    found = received(given, OUTPUT.view(2, 4, 5), loss, (0, 1))
    assert_received(found, expected.view(2, 4, 5))
    wrong = received(
        ERRORS.options("softmax - one-hot of tokens"), OUTPUT.view(2, 4, 5), loss, (0, 1)
    )
    assert_received(wrong, expected.view(2, 4, 5) * 8 / 5)


@ERRORS.holds("softmax - one-hot, with the loss divided by k")
def test_the_division_for_accumulation_is_undone():
    given = ERRORS.options("softmax - one-hot, with the loss divided", k=4)
    assert_received(received(given, OUTPUT, lambda output: mean(output) / 4), WRONG)


@ERRORS.holds("output - target, of a mean squared error")
def test_the_mean_of_squares_is_undone():
    target = torch.randn(8, 5)
    given = ERRORS.options("output - target")
    found = received(given, OUTPUT, lambda output: F.mse_loss(output, target))
    assert_received(found, OUTPUT - target)


@ERRORS.holds("the sign of the error")
def test_signs_of_errors():
    given = ERRORS.options("the sign of the error")
    assert_received(received(given, OUTPUT, mean), WRONG.sign())


@ERRORS.holds("a ternary error")
def test_ternary_errors():
    ternary = torch.where(WRONG > 0.1, 1.0, torch.where(WRONG < -0.1, -1.0, 0.0))
    assert 0 < (ternary == 0).sum() < ternary.numel()
    assert_received(received(ERRORS.options("a ternary error"), OUTPUT, mean), ternary)


@ERRORS.holds("the target, of a cross-entropy")
def test_targets_as_errors():
    found = received(ERRORS.options("the target, of a cross-entropy"), OUTPUT, mean)
    assert_received(found, F.one_hot(TARGET, 5).float())


@ERRORS.holds("the error clipped")
def test_clipped_errors():
    found = received(ERRORS.options("the error clipped"), OUTPUT, mean)
    assert_received(found, (WRONG / 8).clip(-0.01, 0.01))


# --- the page ---


def test_every_line_is_held():
    assert sorted(map(LAWS.line, DRAWS)) == sorted(LAWS.lines)
    assert sorted(ERRORS.held) == sorted(ERRORS.lines)
