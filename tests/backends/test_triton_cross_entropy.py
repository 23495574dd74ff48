"""The Triton kernel of cross entropy, against torch's, on a GPU or in Triton's interpreter."""

import pytest
import torch

from dfa_kernels import cross_entropy as module
from tests.backends.losses import STRANGE, assert_right, exact, samples
from tests.samples import DTYPES, random_error

pytest.importorskip("triton")

from dfa_kernels.backends.triton import cross_entropy as kernel

pytestmark = [
    pytest.mark.triton,
    # Of NumPy in the interpreter, of what is not finite.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|All-NaN)"),
    # Raised by Triton 3.6's interpreter.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    """Which kernels have passed their checks, none at first."""
    checked = {}
    monkeypatch.setattr(module, "_checked", checked)
    return checked


def unchecked(logits, target, scale, gradient=True, *, label_smoothing=0.0, softcap=None):
    scales = module.scales_of(scale, logits)
    options = (-100, label_smoothing, softcap, scales, gradient)
    return kernel.cross_entropy_(logits, target, *options)


def served(logits, target=None):
    target = torch.zeros(len(logits), dtype=torch.int64) if target is None else target
    scales = module.scales_of(1.0, logits)
    return module.by_kernel(logits, target.to(DEVICE), -100, 0.0, None, scales, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("smoothing", "softcap"), [(0.0, None), (0.1, None), (0.3, 5.0)])
def test_is_torchs(dtype, smoothing, softcap):
    """Of several blocks and the rest of one, and of less than one."""
    options = {"label_smoothing": smoothing, "softcap": softcap}
    for n in (2 * kernel.block_of(dtype, 2) + 60, 60, 61):
        whole, target, scale = samples(dtype, n, DEVICE)
        logits, before = whole.clone()[:, :n], whole.clone()[:, :n]
        assert (kernel.vector_of(logits) > 1) == (n % 16 == 12)
        found = unchecked(logits, target, scale, **options)
        assert_right(found, logits, before, target, scale, **options)
        assert torch.equal(logits._base[:, n:], whole[:, n:])
        assert found[3] == 0
        assert (logits[3] == 0).all()
        only = unchecked(before, target, scale, False, **options)
        assert torch.equal(only, found)
        assert torch.equal(before, whole[:, :n])


def test_whole_blocks_one_column_and_no_rows():
    for n in (1, kernel.block_of(torch.bfloat16, 2)):
        logits, target, scale = samples(torch.bfloat16, n, DEVICE)
        logits, target = logits[:, :n].clone(), target[[0, 3, 0, 0, 0, 3]]
        before = logits.clone()
        found = unchecked(logits, target, scale, label_smoothing=0.1)
        assert_right(found, logits, before, target, scale, label_smoothing=0.1)
    assert unchecked(logits[:0], target[:0], 1.0).shape == (0,)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_numbers_that_are_not_finite_are_torchs(smoothing, softcap):
    logits = torch.tensor(STRANGE, dtype=torch.float64, device=DEVICE)
    before = logits.clone()
    target = torch.tensor([0, 1, 2, 0, 1, 0], device=DEVICE)
    options = {"label_smoothing": smoothing, "softcap": softcap}
    found = unchecked(logits, target, 1.0, **options)
    scale = torch.tensor(1.0, device=DEVICE)
    assert_right(found, logits, before, target, scale, **options)


def test_a_softcap_is_accurate_near_0():
    x = torch.logspace(-6, 0.5, 12, dtype=torch.float64, device=DEVICE)
    logits = torch.stack([x, torch.zeros_like(x)], 1) * 1e4
    target = torch.ones(12, dtype=torch.int64, device=DEVICE)
    before = logits.clone()
    found = unchecked(logits, target, 1.0, softcap=1e4)
    losses, _ = exact(before, target, 1.0, softcap=1e4)
    torch.testing.assert_close(found, losses, rtol=1e-14, atol=0)


def test_a_target_that_is_no_column_is_nan_and_touches_nothing_else():
    logits = torch.zeros(3, 8, device=DEVICE)
    target = torch.tensor([2**40, -1, 5], device=DEVICE)
    found = unchecked(logits[:, :5], target, 1.0)
    assert found.isnan().all()
    torch.testing.assert_close(logits[:, :5], torch.full_like(logits[:, :5], 0.2))
    assert (logits[:, 5:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_its_check(checked, dtype):
    for n in (16, 17):
        assert served(random_error(2, n, dtype=dtype, device=DEVICE)) is not None
    assert list(checked.values()) == [True, True]


def test_every_flag_has_its_own_check(checked):
    logits, target = random_error(2, 16, device=DEVICE), torch.tensor([1, 2])
    scales, target = module.scales_of(1.0, logits), target.to(DEVICE)
    for flags in ((0.1, None, True), (0.0, 3.0, False), (0.2, None, True)):
        smoothing, softcap, gradient = flags
        assert (
            module.by_kernel(logits, target, -100, smoothing, softcap, scales, gradient) is not None
        )
    assert list(checked.values()) == [True, True]


@pytest.mark.parametrize("fault", ["losses", "gradients", "neighbours", "raises"])
def test_a_wrong_kernel_is_passed_over_with_one_warning(checked, monkeypatch, fault):
    right = kernel.cross_entropy_

    def wrong(logits, *arguments):
        if fault == "raises":
            raise ValueError("no such instruction")
        losses = right(logits, *arguments)
        if fault == "losses":
            losses[0] *= 1 + 1e-3
        elif fault == "gradients":
            logits[0, 5] += 1e-3
        else:
            logits._base[1, -1] += 1
        return losses

    monkeypatch.setattr(kernel, "cross_entropy_", wrong)
    logits = random_error(2, 16, device=DEVICE)
    before = logits.clone()
    said = "ValueError: no such" if fault == "raises" else "1 of .* wrong"
    with pytest.warns(RuntimeWarning, match=f"float32.*failed its check .*{said}"):
        assert served(logits) is None
    assert served(logits) is None  # and says no more
    assert torch.equal(logits, before)


def test_other_logits_are_not_for_it(monkeypatch):
    logits = random_error(4, 16, device=DEVICE)
    for other in (logits.long(), logits.T, logits[:, ::2], logits[:1].expand(4, 16)):
        assert served(other) is None
    monkeypatch.setattr(module.triton, "unavailable", lambda _: "there is none")
    assert served(logits) is None
