"""A `DFA` keeps the plan of its last pass: no change between passes is lost by that."""

import copy
import math
import pickle

import pytest
import torch

from dfa_kernels import DFA, DFALayer
from dfa_kernels.nn import passes
from tests.nn.networks import BATCH, INPUTS, WIDTHS, Perceptron


@pytest.fixture
def plans(monkeypatch):
    """Counts the plans that are made."""
    made = []

    def make_plan(*arguments, make=passes.make_plan):
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(passes, "make_plan", make_plan)
    return made


def network(**arguments):
    torch.manual_seed(0)
    return Perceptron(**arguments)


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [None if one.grad is None else one.grad.clone() for one in model.parameters()]


def alike(ours, theirs):
    return all(
        one is other if one is None or other is None else torch.equal(one, other)
        for one, other in zip(ours, theirs, strict=True)
    )


X = torch.randn(BATCH, INPUTS)
MASK = [torch.rand(width) for width in WIDTHS]


def test_equal_passes_make_one_plan(plans):
    model = network()
    first = gradients(model, X)
    gradients(model, X)  # now the sizes are known before it
    count = len(plans)
    assert alike(gradients(model, X), first)
    assert alike(gradients(model, X), first)
    assert len(plans) == count <= 2


def set_name(name, value):
    return lambda dfa: setattr(dfa, name, value)


CHANGES = {
    "normalization": set_name("normalization", "shared"),
    "scale": set_name("normalization", 0.25),
    "law": set_name("normalization", lambda sizes, n: [1.0 / n] * len(sizes)),
    "shared": set_name("shared", False),
    "seed": set_name("seed", 5),
    "distribution": set_name("distribution", "rademacher"),
    "matrix": set_name("matrix", torch.randn(16, 5, generator=torch.Generator().manual_seed(1))),
    "mask": set_name("mask", MASK),
    "one mask, in place": lambda dfa: dfa.masks.update({1: MASK[1]}),
    "lean": set_name("lean", True),
    "mode": set_name("mode", "backprop"),
    "shallow": set_name("mode", "shallow"),
    "error_transform": set_name("error_transform", torch.sign),
    "signal_transform": set_name("signal_transform", lambda signal, layer: 2 * signal),
    "rp_device": set_name("rp_device", "cpu"),
    "requires_grad": set_name("requires_grad", True),
    "through": set_name("through", torch.sin),
    "passthrough": lambda dfa: setattr(dfa.dfa_layers[1], "passthrough", True),
    "layer's through": lambda dfa: setattr(dfa.dfa_layers[0], "through", torch.sin),
    "layer's batch_dims": lambda dfa: setattr(dfa.dfa_layers[0], "batch_dims", (-2,)),
    "state": lambda dfa: dfa.load_state_dict(Perceptron(seed=9).dfa.state_dict()),
}
SAME = {"lean", "rp_device", "requires_grad", "layer's batch_dims"}  # other ways to the same signal


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_a_change_between_passes_takes_effect(change):
    model, fresh = network(), network()
    for _ in range(3):
        before = gradients(model, X)
    CHANGES[change](model.dfa)
    CHANGES[change](fresh.dfa)
    after, expected = gradients(model, X), gradients(fresh, X)
    assert alike(after, expected)
    assert alike(gradients(model, X), expected)
    same = all(
        a is b if a is None or b is None else torch.allclose(a, b, rtol=1e-3, atol=1e-5)
        for a, b in zip(before, after, strict=True)
    )
    assert same is (change in SAME)


def test_a_law_is_asked_in_every_pass():
    factors = [1.0]
    model = network(normalization=lambda sizes, n: [factors[0]] * len(sizes))
    first = gradients(model, X)
    gradients(model, X)
    factors[0] = 2.0
    torch.testing.assert_close(gradients(model, X)[0], 2 * first[0])


def test_masks_are_asked_in_every_pass():
    model = network(mask=MASK)
    gradients(model, X)
    gradients(model, X)
    model.dfa.masks[0] = torch.zeros(WIDTHS[0])
    assert not gradients(model, X)[0].any()
    model.dfa.masks[0] = torch.zeros(WIDTHS[0] + 1)
    with pytest.raises(ValueError, match=r"DFA: mask\[0\] must broadcast"):
        model(X)


def test_a_mask_beside_a_kept_plan_is_checked():
    model = network()
    gradients(model, X)
    gradients(model, X)
    model.dfa.masks[1] = torch.zeros(WIDTHS[1] + 1)
    with pytest.raises(ValueError, match=r"DFA: mask\[1\] must broadcast"):
        model(X)


def test_batches_and_skipped_layers_change():
    model = network(normalization="shared")
    for batch, skip in ((6, ()), (3, ()), (6, (1,)), (6, ()), (6, (0, 2))):
        x, fresh = torch.randn(batch, INPUTS), network(normalization="shared")
        for layer, known in zip(fresh.dfa.dfa_layers, WIDTHS, strict=True):
            layer._size = known
        for one in (model, model, fresh):
            one.zero_grad()
            one(x, skip=skip).square().sum().backward()
        for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.filterwarnings("ignore:DFA. dfa_layers .0. were not called")
def test_the_size_of_a_skipped_layer_counts_in_the_next_pass():
    model, trained = (network(widths=(9, 4), normalization="shared") for _ in range(2))
    gradients(trained, X)

    def first_of_second():
        model.zero_grad()
        model(X, skip=(0,)).square().sum().backward()
        return model.linears[1].weight.grad

    for _ in range(3):
        before = first_of_second()
    model.dfa.load_state_dict(trained.dfa.state_dict())
    torch.testing.assert_close(first_of_second(), before * math.sqrt(4 / 9))


def test_scale_repeats_counts_in_the_next_pass():
    layer = DFALayer(batch_dims=(0, 1))
    dfa = DFA([layer])
    activation = torch.randn(3, 4, 5, requires_grad=True)
    output = torch.randn(3, 2, requires_grad=True)

    def signal():
        activation.grad = None
        layer(activation)
        dfa(output).sum().backward()
        return activation.grad

    for _ in range(3):
        before = signal()
    dfa.scale_repeats = False
    torch.testing.assert_close(signal(), 2 * before)


def test_sizes_that_a_state_takes_away_come_back():
    model = network()
    empty = copy.deepcopy(model.dfa.state_dict())
    for _ in range(3):
        gradients(model, X)
    model.dfa.load_state_dict(empty)
    assert [layer.size for layer in model.dfa.dfa_layers] == [None] * len(WIDTHS)
    for _ in range(2):
        gradients(model, X)
        assert [layer.size for layer in model.dfa.dfa_layers] == list(WIDTHS)


def test_dtypes_change():
    model = network()
    expected = gradients(copy.deepcopy(model).double(), X.double())
    gradients(model, X)
    model.double()
    assert alike(gradients(model, X.double()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        gradients(model.float(), X)


def test_devices_are_compared_in_every_pass():
    layer = DFALayer()
    dfa = DFA([layer])
    weight = torch.randn(4, 3, requires_grad=True)
    for _ in range(3):
        dfa(layer(torch.tanh(weight)) @ torch.ones(3, 2, requires_grad=True))
    output = torch.ones(4, 2, device="meta", requires_grad=True)
    layer(torch.tanh(weight))
    with pytest.raises(ValueError, match=r"DFA: dfa_layers\[0\] is on cpu, the output on meta"):
        dfa(output)
    dfa.rp_device = "cpu"
    for _ in range(3):
        layer(torch.tanh(weight))
        dfa(output)
    dfa.rp_device = None
    layer(torch.tanh(weight))
    with pytest.raises(ValueError, match=r"give rp_device to say where to project"):
        dfa(output)


def test_rows_are_compared_in_every_pass():
    layer = DFALayer()
    dfa = DFA([layer])
    for rows in (4, 4, 3):
        layer(torch.ones(4, 3, requires_grad=True))
        output = torch.ones(rows, 2, requires_grad=True)
        if rows == 4:
            dfa(output)
            continue
        with pytest.raises(ValueError, match=r"dfa_layers\[0\] must have the output's rows"):
            dfa(output)


def test_released_layers_and_those_of_another():
    model = network()
    gradients(model, X)
    gradients(model, X)
    model.dfa = DFA(model.dfa.release(), seed=3)
    fresh = network(seed=3)
    assert alike(gradients(model, X), gradients(fresh, X))


def test_copies_take_no_plan_along():
    model = network()
    expected = gradients(model, X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.dfa._group.planned is None
        assert alike(gradients(other, X), expected)


def test_passes_before_their_backward_passes():
    model, x = network(), torch.randn(2, INPUTS)
    expected = [a + b for a, b in zip(gradients(model, X), gradients(model, x), strict=True)]
    model.zero_grad()
    outputs = [model(X), model(x), model(X[:0])]
    for output in outputs:
        output.square().sum().backward()
    for parameter, one in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, one)


def test_equal_places_share_one_signal_and_others_do_not():
    seen = {}
    layers = [DFALayer() for _ in range(4)]
    dfa = DFA(layers)
    shapes = [(4, 6), (4, 2, 3), (4, 6), (4, 2, 3)]
    activations = [torch.randn(shape, requires_grad=True) for shape in shapes]
    for index, activation in enumerate(activations):
        activation.register_hook(lambda signal, index=index: seen.update({index: signal}))
    for _ in range(3):
        for layer, activation in zip(layers, activations, strict=True):
            layer(activation)
        dfa(torch.randn(4, 2, requires_grad=True)).sum().backward()
        pointers = [seen[index].data_ptr() for index in range(4)]
        assert pointers[0] == pointers[2]
        assert pointers[1] == pointers[3]
        assert pointers[0] != pointers[1]
        assert torch.equal(seen[0].flatten(), seen[1].flatten())
