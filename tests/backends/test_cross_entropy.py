"""Cross entropy with its gradient in place, in PyTorch, against torch's."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dfa_kernels import cross_entropy as module
from dfa_kernels.cross_entropy import cross_entropy_
from tests.backends.losses import STRANGE, assert_right, samples
from tests.samples import DTYPES, random_error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("smoothing", "softcap"), [(0.0, None), (0.1, None), (0.0, 3.0), (0.3, 5.0), (1.0, None)]
)
def test_is_torchs(dtype, smoothing, softcap, monkeypatch):
    whole, target, scale = samples(dtype)
    options = {"label_smoothing": smoothing, "softcap": softcap}
    for cached in (2**21, 1):  # all rows at once, or each by itself
        monkeypatch.setattr(module, "_CACHED_BYTES", cached)
        logits, before = whole.clone()[:, :301], whole.clone()[:, :301]
        found = cross_entropy_(logits, target, scale=scale, **options)
        assert_right(found, logits, before, target, scale, **options)
        assert found[3] == 0
        assert (logits[3] == 0).all()
        only = cross_entropy_(before, target, scale=scale, gradient=False, **options)
        assert torch.equal(only, found)
        assert torch.equal(before, whole[:, :301])


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25), torch.tensor([0.25])], ids=repr)
def test_a_scale_is_of_all_rows(n, scale):
    logits, target = random_error(3, n), torch.tensor([0, n - 1, 7])
    before = logits.clone()
    found = cross_entropy_(logits, target, ignore_index=7, scale=scale)
    assert_right(found, logits, before, target, torch.tensor(0.25), ignore_index=7)


def test_all_ignored_and_no_rows():
    logits = random_error(3, 5)
    assert (cross_entropy_(logits, torch.full((3,), -100)) == 0).all()
    assert (logits == 0).all()
    empty = torch.empty(0, dtype=torch.int64)
    assert cross_entropy_(logits[:0], empty).shape == (0,)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_numbers_that_are_not_finite_are_torchs(smoothing, softcap):
    logits = torch.tensor(STRANGE, dtype=torch.float64)
    before, target = logits.clone(), torch.tensor([0, 1, 2, 0, 1, 0])
    options = {"label_smoothing": smoothing, "softcap": softcap}
    found = cross_entropy_(logits, target, **options)
    assert_right(found, logits, before, target, torch.tensor(1.0), **options)


def test_a_target_that_is_no_column_is_an_error():
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy_(random_error(2, 3), torch.tensor([0, 3]))


def test_no_kernel_is_asked_for_tensors_without_memory(monkeypatch):
    monkeypatch.delattr(module, "by_kernel")
    monkeypatch.setattr(module, "plain", lambda logits, *_: logits.new_empty(3))
    with FakeTensorMode():  # which a torch without CUDA has on GPUs too
        logits, target = torch.empty(3, 5, device="cuda"), torch.empty(3, device="cuda")
        assert cross_entropy_(logits, target.long()).is_cuda


def test_logits_must_be_floating_point():
    with pytest.raises(TypeError, match=r"logits must be floating-point, got torch.int64"):
        cross_entropy_(torch.ones(2, 3, dtype=torch.int64), torch.tensor([0, 1]))
