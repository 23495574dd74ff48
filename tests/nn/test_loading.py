"""Loading a state: what is refused is reported like a key, and what differs from a choice is said.

A state is damaged in every place, and must be refused or be one that trains.
"""

import functools
import json
import math
import warnings

import pytest
import torch
from torch import nn

from dfa_kernels import attach, feedback_matrix, tinydfa_scales
from tests.nn.networks import CLASSES, Multiplied, Perceptron, assert_equal, backward, batch
from tests.nn.networks import perceptron as network

KEY = "dfa._extra_state"
MATRIX = feedback_matrix(16, CLASSES, seed=5)


def perceptron(**arguments):
    """One that has trained a step, so that its state has all there is."""
    model = network(**arguments)
    backward(model, *batch())
    return model


def values(model):
    return json.loads(bytes(model.state_dict()[KEY].tolist()))


def packed(facts):
    data = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    return torch.tensor(list(data), dtype=torch.uint8)


class Between(nn.Module):
    """A model whose modules before, beside and after the `DFA` hold parameters of their own."""

    def __init__(self, **arguments):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.net = Perceptron(**arguments)
        self.last = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def parameters_are_loaded(model, state):
    ours = model.state_dict()
    return all(torch.equal(ours[key], state[key]) for key in ours if "_extra_state" not in key)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ({"matrix": MATRIX}, {"seed": 1}, "must be of the same source of signals"),
        ({"normalization": 0.5}, {"normalization": tinydfa_scales}, "must have the normalization"),
        ({"lean": True}, {"shared": False}, "must share one matrix"),
    ],
)
def test_a_state_that_does_not_fit_is_reported_once_everything_else_is_loaded(ours, theirs, reason):
    state = Between(**theirs).state_dict()
    for strict in (True, False):
        model = Between(**ours)
        before = model.net.dfa.get_extra_state()
        if strict:
            with pytest.raises(RuntimeError, match=f'"net.{KEY}": DFA: state {reason}'):
                model.load_state_dict(state)
        else:
            with pytest.warns(UserWarning, match=f"DFA: state {reason}.* left this DFA") as said:
                keys = model.load_state_dict(state, strict=False)
            assert keys.unexpected_keys == [f"net.{KEY}"]
            assert keys.missing_keys == []
            assert [warning.filename for warning in said] == [__file__]
        assert parameters_are_loaded(model, state)
        assert torch.equal(model.net.dfa.get_extra_state(), before)


def test_a_state_of_other_layers_is_reported_too():
    theirs = Between()
    state = theirs.state_dict()
    state[f"net.{KEY}"] = Between(widths=(4, 4)).state_dict()[f"net.{KEY}"]
    model = Between()
    with pytest.raises(RuntimeError, match="DFA: state must be for the layers"):
        model.load_state_dict(state)
    assert parameters_are_loaded(model, state)
    with pytest.warns(UserWarning, match="DFA: state must be for the layers"):
        assert model.load_state_dict(state, strict=False).unexpected_keys == [f"net.{KEY}"]


def test_other_faults_are_reported_beside_a_refused_state():
    state = Between(seed=1).state_dict()
    del state["last.0.bias"]
    state["more"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        Between(matrix=MATRIX).load_state_dict(state)
    for part in ('Missing key(s) in state_dict: "last.0.bias"', '"more"', "same source of signals"):
        assert part in str(error.value)


def test_a_missing_state_is_a_missing_key():
    state = Between(seed=1).state_dict()
    del state[f"net.{KEY}"]
    model = Between(seed=2)
    with pytest.raises(RuntimeError, match=f'Missing .*"net.{KEY}"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == [f"net.{KEY}"]
    assert parameters_are_loaded(model, state)
    assert model.net.dfa.seed == 2


def test_an_attached_dfas_own_state_is_reported_alike():
    handles = [
        attach(nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 5)), ["1"], **arguments)
        for arguments in ({"seed": 1}, {"matrix": MATRIX})
    ]
    state = handles[0].dfa.state_dict()
    with pytest.raises(RuntimeError, match='"_extra_state": DFA: state must be of the same source'):
        handles[1].dfa.load_state_dict(state)
    with pytest.warns(UserWarning, match="DFA: state must be of the same source"):
        keys = handles[1].dfa.load_state_dict(state, strict=False)
    assert keys.unexpected_keys == ["_extra_state"]


def test_a_hook_of_the_users_may_mend_a_state():
    theirs, model = network(seed=4), network()
    state = theirs.state_dict()
    mended = state[KEY]
    state[KEY] = torch.zeros(3)

    def mend(module, state_dict, prefix, *_):
        state_dict[prefix + "_extra_state"] = mended

    model.dfa.register_load_state_dict_pre_hook(mend)
    model.load_state_dict(state)
    assert model.dfa.seed == 4


# --- what differs from what was given ---


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"seed": 5}, {"seed": 3}, "has seed=3, but seed=5 was given.*seed = 5 after loading"),
        ({"seed": 0}, {"seed": 3}, "has seed=3, but seed=0 was given"),
        (
            {"distribution": "uniform"},
            {"distribution": "hadamard"},
            "has distribution='hadamard', but distribution='uniform' was given",
        ),
        ({"normalization": 0.5}, {}, "has normalization='layer', but normalization=0.5 was given"),
        ({"normalization": False}, {}, "has normalization='layer', but normalization='shared'"),
        ({"normalization": tinydfa_scales}, {}, "has normalization='layer', but normalization=<f"),
        ({"shared": False}, {}, "has shared=True, but shared=False was given"),
        ({"shared": True}, {"shared": False}, "has shared=False, but shared=True was given"),
    ],
)
def test_a_loaded_state_wins_and_says_what_it_changed(ours, theirs, message):
    x, y = batch()
    model, saved = network(**ours), perceptron(**theirs)
    for strict in (True, False):
        with pytest.warns(UserWarning, match=message) as said:
            model.load_state_dict(saved.state_dict(), strict=strict)
        assert [warning.filename for warning in said] == [__file__]
        assert torch.equal(model.state_dict()[KEY], saved.state_dict()[KEY])
    assert_equal(backward(model, x, y), backward(saved, x, y))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"seed": 3, "distribution": "uniform", "normalization": 0.5, "shared": False}),
        ({"normalization": True}, {"normalization": 0.5}),
        ({"seed": 3, "shared": True}, {"seed": 3}),
        ({"distribution": "normal", "normalization": "layer"}, {}),
        ({"normalization": tinydfa_scales}, {"normalization": tinydfa_scales}),
        ({"matrix": MATRIX, "seed": 1}, {"matrix": MATRIX, "seed": 2}),  # a seed of no use
        ({"matrix": Multiplied(MATRIX), "seed": 1}, {"matrix": Multiplied(MATRIX)}),
    ],
)
def test_nothing_is_said_where_nothing_was_given_or_nothing_differs(ours, theirs):
    network(**ours).load_state_dict(perceptron(**theirs).state_dict())


def test_a_seed_of_ones_own_is_kept_by_setting_it_after_loading():
    x, y = batch()
    state = perceptron(seed=3).state_dict()
    model = network()
    model.load_state_dict(state)
    model.dfa.seed = 5
    expected = network(seed=5)
    assert_equal(backward(model, x, y), backward(expected, x, y))
    with pytest.warns(UserWarning, match="has seed=3, but seed=5 was given"):
        model.load_state_dict(state)  # every time: it would be overwritten in silence
    model.dfa.seed = None
    model.load_state_dict(state)
    assert model.dfa.seed == 3


def test_a_source_that_was_set_is_a_choice():
    model = network()
    model.dfa.source = network(seed=6).dfa.source
    with pytest.warns(UserWarning, match="has seed=3, but seed=6 was given"):
        model.load_state_dict(perceptron(seed=3).state_dict())


def test_a_resumed_run_of_an_attached_model_with_another_seed_is_told():
    handles = [
        attach(nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 5)), ["1"], seed=seed)
        for seed in (1, 2)
    ]
    with pytest.warns(UserWarning, match="has seed=1, but seed=2 was given"):
        handles[1].dfa.load_state_dict(handles[0].dfa.state_dict())


# --- functions of one name ---


class Constant:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, sizes, error_size):
        return [self.scale / error_size for _ in sizes]


def local(scale):
    def law(sizes, error_size):
        return [scale * size for size in sizes]

    return law


def times(scale, sizes, error_size):
    return [scale / size for size in sizes]


NAMESAKES = [
    lambda scale: lambda sizes, error_size: [scale] * len(sizes),
    lambda scale: functools.partial(times, scale),
    local,
    Constant,
]


@pytest.mark.parametrize("make", NAMESAKES)
def test_functions_of_one_name_are_told_apart_by_what_they_give(make):
    saved = perceptron(normalization=make(0.5)).state_dict()
    other = network(normalization=make(0.25))
    before = other.state_dict()[KEY]
    with pytest.raises(
        RuntimeError, match=r"which gives layer 0 the scale .* got another function"
    ):
        other.load_state_dict(saved)
    assert torch.equal(other.state_dict()[KEY], before)
    network(normalization=make(0.5 * (1 + 1e-9))).load_state_dict(saved)  # rounded otherwise


@pytest.mark.parametrize("make", NAMESAKES)
def test_states_without_scales_load(make):
    """Those of a model that has not trained, and of earlier versions."""
    trained = values(perceptron(normalization=make(0.5)))
    earlier = {key: trained[key] for key in trained if key not in ("error_size", "scales")}
    network(normalization=make(0.25)).dfa.set_extra_state(packed(earlier))
    untrained = network(normalization=make(0.5)).state_dict()
    assert "scales" not in values(network(normalization=make(0.5)))
    network(normalization=make(0.25)).load_state_dict(untrained)


def test_a_function_that_is_a_module_has_a_state_of_its_own():
    class Law(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, sizes, error_size):
            return [self.scale.item()] * len(sizes)

    saved = perceptron(normalization=Law(0.5))
    assert "scales" not in values(saved)
    other = network(normalization=Law(0.25))
    other.load_state_dict(saved.state_dict())
    assert other.dfa.normalization.scale.item() == 0.5


def test_a_function_that_cannot_take_a_states_sizes_refuses_it():
    def picky(sizes, error_size):
        return [{16: 1.0, 12: 2.0}[size] for size in sizes]

    facts = values(perceptron(normalization=picky))
    facts["layers"][1][1] = 13
    with pytest.raises(ValueError, match=r"DFA: state must be for sizes that normalization takes"):
        network(normalization=picky).dfa.set_extra_state(packed(facts))


@pytest.mark.parametrize("name", ["law", "a_law_with_a_very_long_name" * 20])
@pytest.mark.parametrize("scale", [1.0, -1 / 3 * 1e-30, 0.0])
def test_a_states_length_does_not_change_in_training(name, scale):
    """Its names decide it, however long, also where many layers have scales of many digits."""

    def law(sizes, error_size):
        return [scale] * len(sizes)

    law.__qualname__ = name
    model = network(widths=(16,) * 20, normalization=law, shared=False)
    before = len(model.state_dict()[KEY])
    backward(model, *batch())
    assert len(values(model)["scales"]) == 20
    assert len(model.state_dict()[KEY]) == before


# --- damage ---

JUNK = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.5, math.nan,
    math.inf, "", "a", "foo", "normal", "layer", "0", [], [None], [0], [0, 0, 0], ["a"],
    [[]], [["h0", 16]], [-1, 0, 0], [0, 0, 2**63 - 1], [0, 0, 2**63], {}, {"function": None},
    {"function": 3}, {"function": "a.b"}, {"name": 1},
]  # fmt: skip


def places(value, path=()):
    """The path of every value in nested JSON."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


def refused_or_trains(model, facts):
    """Whether a state is taken. If so the model trains; if not it is what it was."""
    before = model.dfa.get_extra_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.dfa.set_extra_state(packed(facts))
    except (TypeError, ValueError) as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith("DFA: state")
        assert "got" in refusal
        assert torch.equal(model.dfa.get_extra_state(), before)
        return False
    backward(model, *batch())
    backward(model, *batch(), skip=(1,))  # by the sizes of the state
    return True


DAMAGED = [
    {},
    {"normalization": "shared", "distribution": "hadamard", "shared": False},
    {"normalization": 0.5, "lean": True},
    {"normalization": tinydfa_scales},
    {"matrix": MATRIX},
    {"matrix": Multiplied(MATRIX)},
]


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(one, marks=[pytest.mark.battery] * (i > 0)) for i, one in enumerate(DAMAGED)],
)
@pytest.mark.usefixtures("one_thread")
def test_a_state_damaged_anywhere_is_refused_or_trains(arguments):
    model = perceptron(**arguments)
    facts = values(model)
    refused = 0
    for path in places(facts):
        for junk in JUNK:
            new = replaced(facts, path, junk)
            if json.dumps(new) != json.dumps(facts):
                refused += not refused_or_trains(network(**arguments), new)
    for key in facts:
        if key not in ("error_size", "scales"):
            without = {name: value for name, value in facts.items() if name != key}
            assert not refused_or_trains(model, without)
    assert refused > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_offsets": None}, "row_offsets must be a sequence of ints, got NoneType"),
        ({"row_offsets": [0, 0]}, r"must have one of row_offsets per layer \(3\), got 2"),
        ({"row_offsets": [0, 2**63, 0]}, r"row_offsets\[1\] must be in .* got 9223372036854775808"),
        ({"row_offsets": [0, 2**63 - 12, 0]}, None),
        ({"row_offsets": [0, 2**63 - 11, 0]}, r"row_offsets\[1\] must leave the rows below"),
        ({"normalization": "foo"}, "normalization must be .* got 'foo'"),
        ({"normalization": None}, "normalization must be .* got None"),
        ({"normalization": True}, "normalization must be .* got True"),
        ({"normalization": [1.0]}, r"normalization must be .* got list \[1.0\]"),
        ({"normalization": math.nan}, "normalization must be finite, got nan"),
        ({"normalization": {"name": 1}}, "must have the normalization 'layer', got {'name': 1}"),
        ({"layers": [["h0", "a"], ["h1", 12], ["h2", 16]]}, r"layers\[0\]'s size must be an int"),
        ({"layers": [["h0", 0], ["h1", 12], ["h2", 16]]}, r"layers\[0\]'s size must be in .* 0"),
        ({"layers": [["h0", 1], ["h1", -1], ["h2", 1]]}, r"layers\[1\]'s size must be in .* -1"),
        ({"layers": [["h0", True], ["h1", 1], ["h2", 1]]}, r"layers\[0\]'s size must .* bool"),
        ({"layers": [1, 2, 3]}, r"layers must be a list of \[name, size\], got \[1, 2, 3\]"),
        ({"layers": None}, r"layers must be a list of \[name, size\], got None"),
        ({"layers": "abc"}, r"layers must be a list of \[name, size\], got 'abc'"),
        ({"stream": None}, "must be of version 1 of the stream, got None"),
        ({"stream": True}, "must be of version 1 of the stream, got True"),
        ({"seed": None}, "seed must not be null"),
        ({"seed": 1.5}, "seed must be an int, got float"),
        ({"seed": 2**64}, r"seed must be in \[0, "),
        ({"distribution": ["normal"]}, r"distribution must be one of .* got \['normal'\]"),
        ({"distribution": None}, "distribution must not be null"),
        ({"stored": 0}, "stored must be true or false, got 0"),
    ],
)
def test_what_a_damaged_value_is_refused_by(changes, message):
    model = perceptron()
    facts = {**values(model), **changes}
    if message is None:
        assert refused_or_trains(model, facts)
        return
    with pytest.raises((TypeError, ValueError), match=f"^DFA: state:? {message}"):
        model.dfa.set_extra_state(packed(facts))


@pytest.mark.parametrize(
    ("state", "kind", "message"),
    [
        (None, TypeError, "must be a uint8 tensor, got NoneType"),
        (b"{}", TypeError, "must be a uint8 tensor, got bytes"),
        (torch.zeros(3, dtype=torch.int8), TypeError, r"must be a uint8 tensor, got torch\.int8"),
        (torch.zeros(0, dtype=torch.uint8), ValueError, "must be what a DFA saved, got b''"),
        (torch.zeros((), dtype=torch.uint8), ValueError, r"must have one dimension .* got \[\]"),
        (torch.zeros(2, 2, dtype=torch.uint8), ValueError, r"must have one dimension .* \[2, 2\]"),
        (
            torch.zeros(9, dtype=torch.uint8, device="meta"),
            ValueError,
            "must .* hold data, .* on meta",
        ),
        (
            torch.zeros(9, dtype=torch.uint8).to_sparse(),
            ValueError,
            r"must .*data, .*torch\.sparse",
        ),
        (packed([1]), ValueError, r"must be what a DFA saved, got b'\[1\]'"),
        (packed(b"[" * 100_000), ValueError, "must be what a DFA saved"),
        (packed(b'{"stream": ' + b"1" * 5000 + b"}"), ValueError, "must be what a DFA saved"),
        (packed(b'{"stream": 1}'), ValueError, "must have .* got"),
    ],
)
def test_what_is_no_state_is_refused(state, kind, message):
    model = perceptron()
    before = model.state_dict()[KEY]
    with pytest.raises(kind, match=f"^DFA: state {message}"):
        model.dfa.set_extra_state(state)
    with pytest.raises(RuntimeError, match=f'"{KEY}": DFA: state {message}'):
        model.load_state_dict({**model.state_dict(), KEY: state})
    assert torch.equal(model.state_dict()[KEY], before)


@pytest.mark.usefixtures("one_thread")
def test_bytes_that_are_cut_off_or_flipped_are_refused_or_train():
    model = perceptron(normalization=tinydfa_scales)
    data = bytes(model.state_dict()[KEY].tolist()).rstrip()
    for length in range(len(data)):
        assert not refused_or_trains(model, data[:length])
    generator = torch.Generator().manual_seed(0)
    for place in range(len(data)):
        byte = int(torch.randint(256, (), generator=generator))
        refused_or_trains(
            network(normalization=tinydfa_scales),
            data[:place] + bytes([byte]) + data[place + 1 :],
        )
