"""`DFA.linear_cross_entropy` where it is easily broken: memory, the range of fp16, ignored tokens
of what is not linear, and tensors of other kinds."""

import gc
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from dfa_kernels import DFA, DFALayer
from tests import processes
from tests.nn.networks import Multiplied, assert_equal, gradients
from tests.nn.test_linear_cross_entropy import (
    MATRIX,
    WIDTH,
    WORDS,
    Language,
    assert_close,
    batch,
    step,
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """About four tokens each."""
    monkeypatch.setenv("DFA_KERNELS_LOGITS_BYTES", "1000")


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
def test_a_loss_that_is_kept_keeps_no_activations(options):
    model, kept = Language(), []
    for point in model.points:
        point.register_forward_pre_hook(lambda _, inputs: kept.append(weakref.ref(inputs[0])))
    loss = model(*batch(), **options)
    loss.sum().backward()
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sums_over_many_tokens_stay_in_the_range_of_fp16(reduction, monkeypatch):
    monkeypatch.delenv("DFA_KERNELS_LOGITS_BYTES")
    torch.manual_seed(0)
    hidden, target = torch.rand(20000, 8) + 1, torch.randint(32, (20000,))
    hidden[:, 0] *= 64  # as one dimension of many language models
    target[::2] = 0  # the sum of this word's errors is the largest
    found = []
    for dtype in (torch.float32, torch.float16):
        weight = torch.zeros(32, 8, requires_grad=True)
        with torch.autocast("cpu", torch.float16, enabled=dtype is torch.float16):
            loss = DFA([]).linear_cross_entropy(hidden, weight, target, reduction=reduction)
        (loss.mean() if reduction == "mean" else 16 * loss.sum()).backward()
        found.append(weight.grad)
    assert_close(found[1:], found[:1], torch.float16)


def test_small_signals_in_fp16_beside_an_output_layer_in_fp32_are_not_lost():
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(32, 8), torch.zeros(2000, 8), torch.full((32,), 7)
    bias = torch.where(torch.arange(2000) == 7, 16.0, 0.0)
    found = []
    for dtype in (torch.float16, torch.float64):
        activation = torch.zeros(32, 64, dtype=dtype, requires_grad=True)
        point = DFALayer()
        dfa = DFA([point])
        point(activation)
        loss = dfa.linear_cross_entropy(hidden, weight, target, bias=bias)
        (65536 * loss).backward()
        found.append(activation.grad.double())
    assert (found[0] - found[1]).norm() < 1e-2 * found[1].norm()


class Shifted(Multiplied):
    """Makes signals of an error of zeros."""

    def project(self, error, layers, dtype):
        return super().project(error + 0.1, layers, dtype)


@pytest.mark.parametrize(
    "options", [{"error_transform": lambda error: error + 0.1}, {"matrix": Shifted(MATRIX)}]
)
def test_ignored_tokens_get_the_signals_of_no_error(options):
    model = Language(**options)
    whole = step(model, *batch(), whole=True)
    assert_close(step(model, *batch()), whole)


def test_a_source_may_keep_the_errors():
    class Keeping(Multiplied):
        errors = ()

        def project(self, error, layers, dtype):
            self.errors += (error,)
            return super().project(error, layers, dtype)

    source = Keeping(MATRIX)
    model = Language(matrix=source)
    step(model, *batch(), whole=True)
    whole, source.errors = source.errors, ()
    step(model, *batch())
    assert len(source.errors) > 1
    assert_close([torch.cat(source.errors)], whole)


@pytest.mark.parametrize("upstream", [0.0, torch.inf])
def test_a_transform_is_checked_once_an_error_can_show_it(upstream):
    model = Language(error_transform=torch.sign)
    step(model, *batch(), upstream=upstream)
    whole = step(model, *batch(), whole=True)
    assert_close(step(model, *batch()), whole)
    model = Language(error_transform=lambda error: error * len(error))
    step(model, *batch(), upstream=upstream)
    with pytest.raises(ValueError, match="error_transform must treat each row by itself"):
        step(model, *batch())


def test_a_transform_that_goes_by_the_place_of_a_row_is_refused():
    model = Language(error_transform=lambda error: error * torch.arange(len(error))[:, None])
    with pytest.raises(ValueError, match="error_transform must treat each row by itself"):
        step(model, *batch())


def test_a_transform_is_the_one_of_the_forward_pass():
    model = Language(error_transform=torch.sign)
    ours = step(model, *batch())
    model.zero_grad()
    loss = model(*batch())
    model.dfa.error_transform = None
    (3 * loss).backward()
    assert_equal(gradients(model), ours[1:])


def test_losses_one_by_one_may_be_changed_in_place():
    model, options = Language(), {"reduction": "none"}
    whole = step(model, *batch(), whole=True, upstream=6.0, **options)

    def twice(*arguments, **options):
        loss = model(*arguments, **options)
        assert not loss._is_view()  # of which fully_shard warns
        return loss.mul_(2)

    ours = step(model, *batch(), call=twice, **options)
    assert_close(ours[1:], whole[1:])


@pytest.mark.parametrize("options", [{}, {"by_weights": True}, {"error_transform": torch.sign}])
def test_tensors_without_numbers(options):
    model = Language(**options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = model(torch.ones(2, 3).long(), torch.ones(2, 3).long())
        found = torch.autograd.grad(loss, list(model.parameters()))
    assert [one.shape for one in found] == [one.shape for one in model.parameters()]
    with torch.device("meta"):
        model = Language(**options)
        tokens, target = torch.empty(2, 3).long(), torch.empty(2, 3).long()
    loss, *found = step(model, tokens, target)
    assert loss.is_meta
    assert [one.shape for one in found] == [one.shape for one in model.parameters()]


def test_tracing_for_inference_warns_of_nothing():
    model = Language().eval()
    tokens, target = batch()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, (tokens, target), check_trace=False)
        torch.testing.assert_close(traced(tokens, target), model(tokens, target))


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_weights_that_are_sharded_by_themselves_are_named():
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    with processes.fake_group(2):
        mesh = init_device_mesh("cpu", (2,))
        weight = DTensor.from_local(torch.ones(WORDS // 2, WIDTH), mesh, [Shard(0)])
        with pytest.raises(ValueError, match=r"DTensors all or none, got Tensor, DTensor; with"):
            DFA([]).linear_cross_entropy(torch.ones(3, WIDTH), weight, torch.ones(3).long())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_bias_that_is_not_finite_gives_what_torch_gives(value):
    model = Language()
    with torch.no_grad():
        model.head.bias[3] = value
    tokens, target = batch()
    for words in (target.clamp(min=0), torch.full_like(target, 4)):
        whole = step(model, tokens, words, whole=True)
        ours = step(model, tokens, words)
        for one, other in zip(ours, whole, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-4, atol=1e-6)


def test_hidden_weights_and_targets_may_be_expanded():
    torch.manual_seed(0)
    weight, hidden = torch.randn(1, WIDTH), torch.randn(WIDTH, 1)
    found = []
    for whole in (True, False):
        w = weight.expand(WORDS, WIDTH).requires_grad_()
        h = hidden.expand(WIDTH, 9).T.requires_grad_()
        target, bias = torch.tensor(3).expand(9), torch.tensor(0.5).expand(WORDS)
        loss = (
            F.cross_entropy(F.linear(h, w, bias), target)
            if whole
            else DFA([]).linear_cross_entropy(h, w, target, bias=bias)
        )
        found.append(torch.autograd.grad(loss, [h, w]))
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs)
