"""`alignment` measures eq. 6 and leaves no trace."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer, alignment, attach, feedback_matrix
from dfa_kernels.nn.sources import Stored
from tests.nn.networks import Perceptron, assert_equal, backward, batch, gradients, perceptron


def loss_of(model, x, y):
    return lambda: F.cross_entropy(model(x), y)


class Noisy(nn.Module):
    """Its forward pass changes buffers and draws dropout masks."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), DFALayer("noisy")
        )
        self.head = nn.Linear(16, 5)
        self.dfa = DFA([self.body[4]])
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("mean", None)

    def forward(self, x):
        self.mean = x.mean() if self.mean is None else self.mean
        self.passes = self.passes + 1  # a new tensor; BatchNorm writes in place
        return self.dfa(self.head(self.body(x)))


def noisy():
    torch.manual_seed(0)
    return Noisy()


def test_cosines_by_hand():
    x, y = batch(torch.float64)
    model = perceptron(dtype=torch.float64, keep=True)
    found = alignment(model, loss_of(model, x, y))
    model.dfa.mode = "backprop"
    output = model(x)
    error, *theirs = torch.autograd.grad(F.cross_entropy(output, y), [output, *model.hidden])
    assert list(found) == ["h0", "h1", "h2"]
    for (mean, std), gradient in zip(found.values(), theirs, strict=True):
        signal = error @ feedback_matrix(gradient.shape[1], 5, dtype=torch.float64).T
        cosine = F.cosine_similarity(signal, gradient)
        assert mean == pytest.approx(cosine.mean().item())
        assert std == pytest.approx(cosine.std(correction=0).item())


def test_backprops_own_matrix_is_perfectly_aligned():
    """One hidden layer: with B = the transposed output weights, DFA is backpropagation."""
    x, y = batch()
    model = perceptron(widths=(16,))
    model.dfa.source = Stored((model.output.weight.detach().T,))
    (found,) = alignment(model, loss_of(model, x, y)).values()
    assert found.mean == pytest.approx(1, abs=1e-6)
    assert found.std < 1e-6


def test_training_aligns_the_layers():
    x, y = batch(size=64)
    model = perceptron(widths=(64, 64), watch=True)
    before = alignment(model, loss_of(model, x, y))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    after = alignment(model, loss_of(model, x, y))
    assert all(after[name].mean > before[name].mean + 0.1 for name in before)


@pytest.mark.parametrize("training", [True, False])
def test_no_trace_is_left(training):
    x, y = batch()
    model = noisy().train(training)
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict()), gradients(model), torch.get_rng_state()
    objects = {name: buffer for name, buffer in model.named_buffers()}
    found = alignment(model, loss_of(model, x, y))
    assert list(found) == ["noisy"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[0][key])
    assert_equal(gradients(model), before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(buffer is objects[name] for name, buffer in model.named_buffers())
    assert not model.dfa._group.waiting


def test_no_trace_is_left_by_a_loss_that_fails():
    x, _ = batch()
    model = noisy()
    before = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()

    def fail():
        model(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        alignment(model, fail)
    assert_equal(model.buffers(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.dfa._group.record is None


def test_a_pass_under_way_keeps_what_waits_and_gets_nothing_from_an_aborted_measurement():
    x, y = batch()
    model = perceptron()
    with pytest.warns(UserWarning, match=r"dfa_layers \[1, 2\] were not called"):
        expected = backward(model, x, y, skip=(1, 2))
    model.zero_grad()
    h = torch.tanh(model.linears[0](x))
    h = model.points[0](h)
    with pytest.raises(KeyboardInterrupt):
        alignment(model, lambda: model(x, fail_before=2))
    for linear in model.linears[1:]:
        h = torch.tanh(linear(h))
    F.cross_entropy(model.dfa(model.output(h)), y).backward()
    assert_equal(gradients(model), expected)


def test_training_every_k_steps_measured_is_training():
    curves = []
    for measured in (False, True):
        model = noisy()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(6):
            x, y = batch(seed=step)
            if measured and step % 2 == 0:
                alignment(model, loss_of(model, x, y))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if measured and step % 3 == 0:  # between a forward pass and its backward pass
                alignment(model, loss_of(model, x, y))
            loss.backward()
            optimizer.step()
        curves.append([*(p.detach() for p in model.parameters()), *model.buffers()])
    assert_equal(*curves)


def test_every_mode_and_wiring_measures_the_same():
    x, y = batch()
    wired = perceptron()
    expected = list(alignment(wired, loss_of(wired, x, y)).values())
    for mode in ("backprop", "shallow"):
        wired.dfa.mode = mode
        assert list(alignment(wired, loss_of(wired, x, y)).values()) == expected
    for arguments in ({"lean": True}, {"watch": True}):
        model = perceptron(**arguments)
        assert list(alignment(model, loss_of(model, x, y)).values()) == expected
    layers = [module for linear in wired.linears for module in (linear, nn.Tanh())]
    attached = nn.Sequential(*layers, wired.output)
    attach(attached, ["1", "3", "5"])
    assert list(alignment(attached, loss_of(attached, x, y)).values()) == expected
    with torch.no_grad():
        assert list(alignment(attached, loss_of(attached, x, y)).values()) == expected


def test_error_transforms_and_masks_count():
    x, y = batch()
    mask = {"h0": torch.zeros(16)}
    model = perceptron(mask=mask, error_transform=torch.neg)
    plain = perceptron()
    found, expected = (alignment(m, loss_of(m, x, y)) for m in (model, plain))
    assert math.isnan(found["h0"].mean)
    assert math.isnan(found["h0"].std)
    assert found["h1"].mean == pytest.approx(-expected["h1"].mean)


def test_rows_without_a_gradient_do_not_count():
    """Samples with ignored labels have neither signal nor gradient."""
    x, y = batch()
    model = perceptron()
    y[3:] = -100
    found = alignment(model, loss_of(model, x, y))
    expected = alignment(model, loss_of(model, x[:3], y[:3]))
    for name in found:
        assert tuple(found[name]) == pytest.approx(tuple(expected[name]), rel=1e-4)


def test_rows_that_are_nan_are_not_left_out():
    """A network that diverged has no angle."""
    x, y = batch()
    model = perceptron()
    x[0, 0] = math.nan
    found = alignment(model, loss_of(model, x, y))
    assert all(math.isnan(angle.mean) for angle in found.values())


def test_layers_come_in_the_order_given():
    first, last = DFALayer("first"), DFALayer("last")
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), first, nn.Linear(6, 7), nn.Tanh(), last)
    model.extend([nn.Linear(7, 5), DFA([last, first])])
    assert list(alignment(model, loss_of(model, *batch()))) == ["last", "first"]


def test_a_skipped_layer_is_left_out():
    x, y = batch()
    model = perceptron()
    found = alignment(model, lambda: F.cross_entropy(model(x, skip=(1,)), y))
    assert list(found) == ["h0", "h2"]


def test_bad_arguments():
    x, y = batch()
    model = perceptron()
    with pytest.raises(ValueError, match=r"alignment: model must hold a DFA .* got none"):
        alignment(nn.Linear(2, 2), lambda: None)
    with pytest.raises(ValueError, match="alignment: loss must run the model's forward pass"):
        alignment(model, lambda: torch.zeros((), requires_grad=True))
    for returned, message in (
        (lambda loss: None, r"got None \(it must not run backward itself\)"),
        (lambda loss: loss.item(), r"got \d"),
        (lambda loss: loss.detach(), r"got tensor\("),
        (lambda loss: loss.expand(2), r"got tensor\("),
    ):
        with pytest.raises(TypeError, match=f"alignment: loss must return a scalar .* {message}"):
            alignment(model, lambda of=returned: of(F.cross_entropy(model(x), y)))
    assert backward(model, x, y) is not None


# --- several DFAs ---


def test_heads_with_a_dfa_each_are_measured_in_one_pass():
    x, y = batch()
    model = nn.ModuleDict({"left": perceptron(seed=1), "right": Perceptron(seed=2)})
    calls = []

    def loss():
        calls.append(1)
        return sum(F.cross_entropy(model[name](x), y) for name in ("left", "right"))

    found = alignment(model, loss)
    assert len(calls) == 1
    expected = {}
    for name, part in model.items():
        for layer, angle in alignment(part, loss_of(part, x, y)).items():
            expected[f"{name}.dfa.{layer}"] = angle
    assert list(found) == list(expected)
    for name, angle in expected.items():
        assert tuple(found[name]) == pytest.approx(tuple(angle))
    assert all(part.dfa._group.record is None for part in model.values())


def test_attached_dfas_are_told_apart_by_their_order():
    x, y = batch()
    parts = [nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)) for _ in range(2)]
    model = nn.ModuleList([*parts, perceptron()])
    for seed, part in enumerate(parts):
        attach(part, ["1"], seed=seed)
    found = alignment(model, lambda: sum(F.cross_entropy(part(x), y) for part in model))
    assert list(found) == [
        *(f"attached[{index}].1" for index in range(2)),
        *(f"2.dfa.h{index}" for index in range(3)),
    ]
    for index, part in enumerate(parts):
        (expected,) = alignment(part, loss_of(part, x, y)).values()
        assert tuple(found[f"attached[{index}].1"]) == pytest.approx(tuple(expected))


def test_a_dfa_that_the_loss_does_not_reach_is_left_out():
    x, y = batch()
    model = nn.ModuleList([perceptron(), Perceptron()])
    assert list(alignment(model, loss_of(model[1], x, y))) == ["1.dfa.h0", "1.dfa.h1", "1.dfa.h2"]
    with pytest.raises(ValueError, match="alignment: loss must run the model's forward pass"):
        alignment(model, lambda: torch.zeros((), requires_grad=True))


def test_dfas_in_a_row_are_measured_by_backpropagations_errors():
    x, y = batch(torch.float64)
    first, second = perceptron(dtype=torch.float64), perceptron(dtype=torch.float64)
    adapter = nn.Linear(5, 8, dtype=torch.float64)
    model = nn.Sequential(first, adapter, second)
    found = alignment(model, loss_of(model, x, y))
    assert list(found) == [f"{index}.dfa.h{layer}" for index in (0, 2) for layer in range(3)]

    class After(nn.Module):
        def forward(self, output):
            second.dfa.mode = "backprop"
            return second(adapter(output))

    after = After()
    alone = alignment(first, lambda: F.cross_entropy(after(first(x)), y))
    for layer, angle in alone.items():
        assert tuple(found[f"0.dfa.{layer}"]) == pytest.approx(tuple(angle))
