"""A trainer's state: what state_dict holds, what loading refuses, copies, dtypes."""

import copy
import io
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer, alignment, attach, feedback_matrix, stream, tinydfa_scales
from tests.nn.networks import (
    Convolutions,
    Perceptron,
    assert_equal,
    backward,
    batch,
    perceptron,
    train,
)

KEY = "dfa._extra_state"
BIG = 2**64 - 3


class Pooled(Convolutions):
    """Takes images of any size."""

    def forward(self, x):
        first = self.points[0](torch.tanh(self.first(x)))
        second = self.points[1](torch.tanh(self.second(first)))
        return self.dfa(self.output(F.adaptive_avg_pool2d(second, 2).flatten(1)))


def facts(model):
    return json.loads(bytes(model.state_dict()[KEY].tolist()))


def edited(model, **changes):
    state = model.state_dict()
    text = json.dumps({**facts(model), **changes}).encode()
    state[KEY] = torch.tensor(list(text), dtype=torch.uint8)
    return state


def save_and_load(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_is_what_makes_the_signals_and_no_matrix():
    model = perceptron(seed=BIG, distribution="uniform", normalization=0.5, shared=False)
    model(batch()[0])
    assert facts(model) == {
        "stream": stream.VERSION,
        "seed": BIG,
        "distribution": "uniform",
        "row_offsets": [0, 2**40, 2**41],
        "normalization": 0.5,
        "layers": [["h0", 16], ["h1", 12], ["h2", 16]],
        "stored": False,
    }
    keys = {name for name, _ in model.named_parameters()}
    assert set(model.state_dict()) == {*keys, KEY}
    assert model.state_dict()[KEY].nbytes < 512
    assert model.state_dict()[KEY].dtype == torch.uint8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"seed": BIG, "distribution": "uniform", "shared": False},
            '{"stream": 1, "seed": 18446744073709551613, "distribution": "uniform", '
            '"row_offsets": [0, 1099511627776, 2199023255552], "normalization": "layer", '
            '"layers": [["h0", 16], ["h1", 12], ["h2", 16]], "stored": false}',
        ),
        (
            {"seed": 3, "distribution": "hadamard"},
            '{"stream": 1, "seed": 3, "distribution": "hadamard", "row_offsets": [0, 0, 0], '
            '"normalization": "layer", '
            '"layers": [["h0", 16], ["h1", 12], ["h2", 16]], "stored": false}',
        ),
        (
            {"seed": 5, "matrix": feedback_matrix(16, 5), "normalization": tinydfa_scales},
            '{"stream": 1, "seed": 5, "distribution": "normal", "row_offsets": [0, 0, 0], '
            '"normalization": {"function": "dfa_kernels.nn.tinydfa_scales"}, '
            '"layers": [["h0", 16], ["h1", 12], ["h2", 16]], "stored": true, '
            '"error_size": 5, "scales": [0.144337567, 0.144337567, 0.144337567]}',
        ),
    ],
)
def test_states_are_these_bytes_and_load(arguments, text):
    """Every version has written these bytes, the first ones up to "stored"."""
    model = perceptron(**arguments)
    model(batch()[0])
    now, first = (
        torch.tensor(list(text.ljust(256 + 3 * 68).encode()), dtype=torch.uint8)
        for text in (text, text.split(', "error_size"')[0].rstrip("}") + "}")
    )
    assert torch.equal(model.state_dict()[KEY], now)
    kept = {name: arguments[name] for name in ("matrix", "normalization") if name in arguments}
    for old in (first, now):
        other = perceptron(**kept)
        other.dfa.set_extra_state(old)
        assert torch.equal(other.state_dict()[KEY], old)
    assert_equal(backward(other, *batch()), backward(model, *batch()))


@pytest.mark.parametrize("distribution", ["rademacher", "hadamard"])
def test_loading_restores_the_signals(distribution):
    x, y = batch()
    model = perceptron(seed=BIG, distribution=distribution, normalization="shared", shared=False)
    expected = backward(model, x, y)
    other = Perceptron()
    other.load_state_dict(save_and_load(model.state_dict()))
    assert_equal(backward(other, x, y), expected)


def test_resumed_training_is_bit_identical():
    def setup(seed):
        torch.manual_seed(seed)
        model = Perceptron(seed=1) if seed == 1 else Perceptron()
        return model, torch.optim.Adam(model.parameters())

    def run(model, optimizer, steps):
        for step in steps:
            x, y = batch(seed=step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    whole, optimizer = setup(1)
    run(whole, optimizer, range(8))
    first, optimizer = setup(1)
    run(first, optimizer, range(4))
    saved = save_and_load({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    second, optimizer = setup(2)
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(second, optimizer, range(4, 8))
    assert_equal(second.parameters(), whole.parameters())


def test_an_attached_models_state_is_its_handles():
    x, y = batch()
    models = [nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 5)) for _ in range(2)]
    handles = [attach(models[0], ["1"], seed=3), attach(models[1], ["1"])]
    models[1].load_state_dict(models[0].state_dict())
    handles[1].dfa.load_state_dict(handles[0].dfa.state_dict())
    assert_equal(*(backward(model, x, y) for model in models))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": 2}, "version 1 of the stream, got 2"),
        ({"layers": [["h0", 16]]}, "must be for the layers"),
        ({"layers": [["h0", 16], ["other", 12], ["h2", 16]]}, "must be for the layers"),
        ({"stored": True}, "same source of signals, a seed, got the other one"),
        ({"distribution": "cauchy"}, "got 'cauchy'"),
        ({"seed": -1}, "got -1"),
        ({"row_offsets": [0, -1, 0]}, r"row_offsets\[1\] must be in \[0, .* got -1"),
        ({"row_offsets": [0, 0]}, r"one of row_offsets per layer \(3\), got 2"),
        ({"normalization": {"function": "mine.scales"}}, "got the function mine.scales"),
    ],
)
def test_loading_refuses_what_does_not_fit(changes, message):
    model = perceptron(seed=7)
    model(batch()[0])
    with pytest.raises(RuntimeError, match=f'"{KEY}": DFA: state.*{message}'):
        model.load_state_dict(edited(model, **changes))
    with pytest.raises(ValueError, match=f"DFA: state.*{message}"):
        model.dfa.set_extra_state(edited(model, **changes)[KEY])
    assert model.dfa.seed == 7


@pytest.mark.parametrize(
    ("offset", "kind"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("0", TypeError)]
)
def test_rows_of_a_state_that_are_none_are_refused(offset, kind):
    model = perceptron()
    with pytest.raises(kind, match=r"DFA: state: row_offsets\[1\] must be .* got"):
        model.dfa.set_extra_state(edited(model, row_offsets=[0, offset, 0])[KEY])


def test_loading_refuses_what_is_no_state():
    with pytest.raises(TypeError, match=r"state must be a uint8 tensor, got torch\.float32"):
        perceptron().dfa.set_extra_state(torch.zeros(3))


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"\xff\xfe", r"state must be what a DFA saved, got b'\\xff\\xfe'"),
        (b"[1]", r"state must be what a DFA saved, got b'\[1\]'"),
        (b'{"seed": 1}', "state must be what a DFA saved"),
        (b'{"stream": 1}', r"state must have \['distribution', .* got \['stream'\]"),
    ],
)
def test_loading_refuses_what_is_damaged(damaged, message):
    with pytest.raises(ValueError, match=message):
        perceptron().dfa.set_extra_state(torch.tensor(list(damaged), dtype=torch.uint8))


def test_sizes_of_a_state_normalize_where_a_layer_is_skipped():
    """Skips the widest layer, so that after loading only the state knows l_max."""
    x, y = batch()
    for normalization in ("shared", tinydfa_scales):
        model = perceptron(widths=(16, 16, 64, 16), normalization=normalization)
        model.linears[3] = nn.Linear(64, 16)
        backward(model, x, y)
        other = perceptron(widths=(16, 16, 64, 16), normalization=normalization)
        other.load_state_dict(model.state_dict())
        found, expected = (backward(m, x, y, skip=(2,)) for m in (other, model))
        assert_equal(found, expected)


def test_only_training_passes_set_sizes():
    """Images of another size may be evaluated and measured, before saving or after loading."""
    small, large = torch.randn(6, 2, 8, 8), torch.randn(6, 2, 9, 9)
    model = Pooled(normalization="shared")
    model(small).square().sum().backward()
    expected = [3 * 6 * 6, 4 * 4 * 4]
    state = model.state_dict()
    other = Pooled()
    other.load_state_dict(state)
    for images in (large, small):
        for net in (model, other):
            with torch.no_grad():
                net(images)
            alignment(net, lambda net=net, images=images: net(images).square().sum())
            assert [point.size for point in net.points] == expected
    assert torch.equal(model.state_dict()[KEY], state[KEY])
    other(large).sum().backward()
    assert [point.size for point in other.points] == [3 * 7 * 7, 4 * 5 * 5]


def test_a_measuring_pass_is_normalized_by_its_own_sizes():
    images = torch.randn(6, 2, 9, 9)
    scales = []
    for train_first in (False, True):
        model = Pooled(normalization="shared")
        if train_first:
            model(torch.randn(6, 2, 12, 12)).sum().backward()
        with model.dfa.recording() as record:
            model(images)
        plan = record.plan
        scales.append([plan.layers.scales[place.layer] for place in plan.places])
    assert scales[0] == scales[1] == [1 / (3 * 7 * 7 * 5) ** 0.5] * 2


@pytest.mark.parametrize(
    "arguments", [{}, {"normalization": 1 / 3}, {"normalization": tinydfa_scales, "shared": False}]
)
def test_the_states_length_depends_on_names_alone(arguments):
    """Model averages and distributed checkpoints copy in place and need a fixed length."""
    lengths = {len(perceptron().state_dict()[KEY])}
    model = perceptron(seed=BIG, distribution="rademacher", **arguments)
    lengths.add(len(model.state_dict()[KEY]))
    model(batch()[0])
    lengths.add(len(model.state_dict()[KEY]))
    assert len(lengths) == 1


def test_state_with_a_function_for_normalization():
    x, y = batch()
    model = perceptron(seed=3, normalization=tinydfa_scales)
    assert facts(model)["normalization"] == {"function": "dfa_kernels.nn.tinydfa_scales"}
    other = perceptron(normalization=tinydfa_scales)
    other.load_state_dict(model.state_dict())
    assert_equal(backward(other, x, y), backward(model, x, y))


def test_a_normalization_that_is_a_module_is_a_submodule():
    class Scales(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.register_buffer("scale", torch.tensor(scale))

        def forward(self, sizes, error_size):
            return [self.scale.item()] * len(sizes)

    model, other = (perceptron(normalization=Scales(scale)) for scale in (0.5, 2.0))
    assert "dfa.normalization.scale" in model.state_dict()
    other.load_state_dict(model.state_dict())
    expected = backward(perceptron(normalization=0.5), *batch())
    for one in (model, other, copy.deepcopy(other)):
        assert_equal(backward(one, *batch()), expected)


def test_state_with_a_stored_matrix_does_not_hold_it():
    model = perceptron(matrix=feedback_matrix(16, 5))
    assert model.state_dict()[KEY].nbytes < 512
    with pytest.raises(RuntimeError, match="same source of signals"):
        perceptron().load_state_dict(model.state_dict())
    perceptron(matrix=feedback_matrix(16, 5)).load_state_dict(model.state_dict())


def test_states_of_independent_matrices_do_not_load_where_one_is_shared():
    matrix = feedback_matrix(16, 5)
    rows = [matrix, matrix[:12], matrix]
    for theirs, ours in (
        ({"shared": False}, {"lean": True}),
        ({"matrix": rows}, {"matrix": matrix}),
        ({"matrix": matrix}, {"matrix": rows}),
    ):
        model = perceptron(**ours)
        with pytest.raises(
            RuntimeError, match=r"state must share one matrix .* by row offsets \[0,"
        ):
            model.load_state_dict(perceptron(**theirs).state_dict())
        assert_equal(backward(model, *batch()), backward(perceptron(**ours), *batch()))


def test_numbers_of_numpy_are_stored():
    model = perceptron(seed=np.int64(3), normalization=np.float32(0.5))
    other = perceptron(seed=3, normalization=0.5)
    assert facts(model) == facts(other)
    assert type(facts(perceptron(normalization=1))["normalization"]) is float


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("watch", [False, True])
def test_copies_after_a_forward_pass_train_alone(copied, watch):
    x, y = batch()
    model = perceptron(seed=3, watch=watch, lean=True)
    expected = backward(model, x, y)
    model.points[0](torch.zeros(6, 16, requires_grad=True))  # left waiting
    twin = copied(model)
    assert not twin.dfa._group.waiting
    model.dfa.mode = "shallow"
    assert_equal(backward(twin, x, y), expected)


def test_a_layer_and_its_dfa_stay_together_in_copies():
    point = DFALayer()
    model = nn.ModuleList([point, DFA([point])])
    twin = copy.deepcopy(model)
    assert twin[1].dfa_layers[0] is twin[0]
    assert twin[0]._group is twin[1]._group is not point._group


def test_models_change_dtype_between_steps():
    x, y = batch(torch.float64)
    model = perceptron()
    backward(model, x.float(), y)
    model.to(torch.float64)
    assert_equal(backward(model, x, y), backward(perceptron(dtype=torch.float64), x, y))
    model.bfloat16()
    assert all(gradient.dtype == torch.bfloat16 for gradient in backward(model, x.bfloat16(), y))


def test_training_is_reproducible():
    assert_equal(train(perceptron(seed=1)), train(perceptron(seed=1)))
