"""What `attach` takes beside points: inputs, cuts, a name for its state, wrappers of the model."""

import copy
import dataclasses
import inspect
import io
from collections import OrderedDict, UserDict, defaultdict

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dfa_kernels import DFA, DFALayer, attach
from tests.nn.networks import (
    CLASSES,
    INPUTS,
    Calls,
    Learned,
    assert_equal,
    backward,
    batch,
    perceptron,
)
from tests.nn.test_attach import POINTS, plain, stack, tokens

KEY = "dfa._extra_state"

# --- arguments ---


def test_attach_names_every_option_of_a_dfa():
    ours = inspect.signature(attach).parameters
    theirs = dict(inspect.signature(DFA).parameters)
    del theirs["dfa_layers"]
    own = {"model", "points", "output", "head", "inputs", "cut", "state", "match_output"}
    assert theirs.keys() == ours.keys() - own
    differ = {name for name in theirs if ours[name].default != theirs[name].default}
    assert differ == {"requires_grad"}
    assert all(ours[name].annotation == theirs[name].annotation for name in theirs.keys() - differ)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("normalization", "shared"),
        ("rp_device", torch.device("cpu")),
        ("no_training", True),
        ("batch_dims", (0, 1)),
        ("seed", 7),
        ("distribution", "rademacher"),
        ("shared", False),
        ("error_transform", torch.sign),
        ("signal_transform", torch.add),
        ("scale_repeats", False),
        ("lean", True),
        ("requires_grad", True),
        ("backend", "torch"),
    ],
)
def test_every_option_reaches_the_dfa(option, value):
    assert getattr(attach(plain(), POINTS, **{option: value}).dfa, option) == value


def test_wrong_names_show_the_nearest():
    model = stack()
    with pytest.raises(ValueError, match=r"got 'blocks.9'; the nearest are 'blocks.\d', "):
        attach(model, ["blocks.9"])
    with pytest.raises(
        ValueError, match=r"got 'x'; it has \d+: 'embedding', .*, \.\.\.$"
    ) as caught:
        attach(model, ["x"])
    assert len(str(caught.value)) < 200
    with pytest.raises(
        ValueError, match=r"inputs must be submodules of the model, got 'heat'; .*head"
    ):
        attach(model, inputs=["heat"])
    with pytest.raises(ValueError, match=r"cut must be submodules .* got Linear; it has"):
        attach(model, ["head"], cut=[nn.Linear(2, 2)])
    with pytest.raises(TypeError, match=r"cut must be a sequence of submodules .* got 'head'"):
        attach(model, ["head"], cut="head")
    with pytest.raises(ValueError, match=r"points must be one or more .* got .. and no inputs"):
        attach(model)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.att, self.blocks = nn.MultiheadAttention(8, 2), nn.ModuleList([nn.Linear(8, 8)])
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x):
        return self.linear(self.blocks[0](self.att(x, x, x, need_weights=False)[0]))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("att.out_proj", "attention takes the weights of its parts and calls none; give 'att'"),
        ("blocks", "a ModuleList has no forward; give its elements"),
        ("linear.parametrizations", "a ModuleDict has no forward"),
        ("linear.parametrizations.weight.0", "it makes a weight, no activation; give 'linear'"),
    ],
)
def test_modules_that_nothing_calls_are_refused(name, why):
    model = Attention()
    for arguments in ({"points": [name]}, {"inputs": [name]}, {"points": ["att"], "output": name}):
        with pytest.raises(ValueError, match=rf"that the forward pass calls, got '{name}': {why}"):
            attach(model, **arguments)
    attach(model, ["att", "blocks.0"], output="linear", batch_dims=(0, 1))
    model(torch.randn(3, 2, 8)).sum().backward()
    assert model.att.out_proj.weight.grad.any()


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match=r"attach: model must not be an nn.DataParallel"):
        attach(nn.DataParallel(plain()), ["module.1"])


# --- inputs ---


class Functional(nn.Module):
    """Its activations are functions, so no module makes them."""

    def __init__(self, by_name=False):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, CLASSES)
        self.by_name = by_name

    def forward(self, x):
        for layer in (self.fc1, self.fc2):
            x = layer(input=x) if self.by_name else layer(x)
            x = F.relu(x)
        return self.fc3(input=x) if self.by_name else self.fc3(x)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"shared": False}, {"mask": [None, torch.zeros(12)]}])
def test_inputs_are_points_of_functional_activations(by_name, arguments):
    x, y = batch()
    model = Functional(by_name)
    handle = attach(model, inputs=["fc2", "fc3"], **arguments)
    assert [layer.name for layer in handle.dfa.dfa_layers] == ["fc2.input", "fc3.input"]
    found = backward(model, x, y)
    twin = Functional()
    points = [DFALayer(), DFALayer()]
    dfa = DFA(points, **arguments)

    def call(x):
        x = points[0](F.relu(twin.fc1(x)))
        return dfa(twin.fc3(points[1](F.relu(twin.fc2(x)))))

    assert_equal(found, backward(twin, x, y, call=call))
    if by_name and "mask" in arguments:
        call = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(backward(model, x, y, call=call), found)
    handle.detach()
    assert_equal(backward(model, x, y), backward(Functional(), x, y))


def test_an_input_that_is_cut_is_a_point_still():
    x, y = batch()
    model = Functional()
    handle = attach(model, inputs=["fc2", "fc3"])
    expected = backward(model, x, y)
    handle.detach()
    handle = attach(model, inputs=["fc2", "fc3"], cut=["fc2", "fc3"])
    assert handle.dfa.requires_grad
    assert_equal(backward(model, x, y), expected)


def test_points_and_inputs_together_and_batch_dimensions():
    model = Functional()
    handle = attach(
        model, {"fc2": (0, 1)}, inputs={model.fc3: (1, 0)}, mask={"fc2": torch.ones(12)}
    )
    assert [layer.name for layer in handle.dfa.dfa_layers] == ["fc2", "fc3.input"]
    assert [layer.row_dims for layer in handle.dfa.dfa_layers] == [(0, 1), (1, 0)]


def test_an_input_without_a_tensor():
    class Text(nn.Module):
        def forward(self, text):
            return text

    model = nn.Sequential(Text())
    attach(model, inputs=["0"])
    with pytest.raises(TypeError, match=r"attach: '0' must be called with a tensor, got \(str\)"):
        model("text")


# --- cuts ---


class Checkpointed(nn.Module):
    """Blocks, each inside a reentrant checkpoint."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 16), nn.Tanh()) for size in (8, 16, 16)
        )
        self.points = nn.ModuleList(nn.Identity() for _ in self.blocks)
        self.head = nn.Linear(16, CLASSES)
        self.reentrant = reentrant

    def forward(self, x):
        for block, point in zip(self.blocks, self.points, strict=True):
            x = point(checkpoint(block, x, use_reentrant=self.reentrant))
        return self.head(x)


NAMES = ["points.0", "points.1", "points.2"]
BLOCKS = ["blocks.1", "blocks.2", "head"]


def test_cut_blocks_inside_reentrant_checkpoints_train():
    x, y = batch()
    expected = Checkpointed(False)
    attach(expected, NAMES)
    expected = backward(expected, x, y)
    model = Checkpointed(True)
    handle = attach(model, NAMES, cut=BLOCKS)
    assert handle.dfa.requires_grad
    x.requires_grad_()
    assert_equal(backward(model, x, y), expected)
    handle.mode = "backprop"
    plain = Checkpointed(False)
    assert_equal(backward(model, x, y), backward(plain, x, y))


@pytest.mark.parametrize(("cut", "products"), [((), 6), (("2", "4", "6"), 4)])
def test_a_cut_saves_the_products_for_gradients_of_inputs(cut, products):
    x, y = batch()
    model = plain()
    attach(model, POINTS, requires_grad=True, cut=cut)
    loss = F.cross_entropy(model(x), y)
    with Calls() as calls:
        loss.backward()
    assert calls.products == products + (0 if cut else 1)


# --- the state ---


def attached(seed=None, points=POINTS, **arguments):
    model = plain()
    return model, attach(model, points, seed=seed, **arguments)


def test_the_models_state_holds_the_seed():
    model, _ = attached(seed=3, normalization="shared")
    for whole, strict in ((False, True), (False, False), (True, True)):
        other, handle = attached()
        if whole:  # as part of another model
            state = nn.ModuleDict({"a": model, "b": nn.Linear(2, 2)}).state_dict()
            assert f"a.{KEY}" in state
            keys = nn.ModuleDict({"a": other, "b": nn.Linear(2, 2)}).load_state_dict(state)
        else:
            keys = other.load_state_dict(model.state_dict(), strict=strict)
        assert not keys.missing_keys
        assert not keys.unexpected_keys
        assert handle.dfa.seed == 3
        assert handle.dfa.normalization == "shared"


def test_a_resumed_run_with_another_seed_is_warned_and_goes_on_as_before():
    model, _ = attached(seed=3)
    other, handle = attached(seed=4)
    with pytest.warns(UserWarning, match="loaded state has seed=3, but seed=4 was given"):
        other.load_state_dict(model.state_dict())
    assert handle.dfa.seed == 3
    assert_equal(backward(other, *batch()), backward(perceptron(seed=3), *batch()))


def test_states_of_a_plain_model():
    model, handle = attached(seed=3)
    model.load_state_dict(plain().state_dict())
    assert handle.dfa.seed == 3
    with pytest.raises(RuntimeError, match=f'Unexpected key.* "{KEY}"'):
        plain().load_state_dict(model.state_dict())
    handle.detach()
    plain().load_state_dict(model.state_dict())


def test_a_state_that_does_not_fit_is_reported_with_the_keys():
    model, _ = attached()
    other, _ = attached(points=["1"])
    for parameter in other.parameters():
        parameter.data.zero_()
    with pytest.raises(RuntimeError, match=rf'"{KEY}": DFA: state must be for the layers'):
        other.load_state_dict(model.state_dict())
    assert_equal(other.parameters(), model.parameters())
    with pytest.warns(UserWarning, match="DFA: state must be for the layers"):
        keys = other.load_state_dict(model.state_dict(), strict=False)
    assert keys.unexpected_keys == [KEY]


def test_a_name_for_the_state():
    model, handle = attached(state="feedback")
    assert "feedback._extra_state" in model.state_dict()
    assert model.feedback is handle.dfa
    assert handle.dfa not in set(model.modules())
    handle.detach()
    assert not hasattr(model, "feedback")
    model, _ = attached(state=None)
    assert list(model.state_dict()) == list(plain().state_dict())
    for name in ("0", "training", "forward", "", "a.b", 3):
        with pytest.raises(ValueError, match="attach: state must be a name"):
            attached(state=name)


def test_a_model_may_own_its_dfa():
    """As code from before the state's name did."""
    model, handle = Functional(), None
    handle = attach(model, inputs=["fc2"], seed=3)
    model.dfa = handle.dfa
    other = Functional()
    second = attach(other, inputs=["fc2"])
    other.dfa = second.dfa
    other.load_state_dict(model.state_dict())
    assert second.dfa.seed == 3
    second.detach()
    assert list(other.state_dict()) == list(Functional().state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_source_that_is_a_module_is_in_the_models_state(assign):
    model, _ = attached(matrix=Learned(torch.ones(16, CLASSES)))
    other, handle = attached(matrix=Learned(torch.ones(16, CLASSES)))
    state = {key: value + 1 for key, value in model.state_dict().items() if key != KEY}
    state[KEY] = model.state_dict()[KEY]
    other.load_state_dict(state, assign=assign)
    matrix = handle.dfa.source.matrix
    assert torch.equal(matrix, torch.full((16, CLASSES), 2.0))
    assert (matrix.data_ptr() == state["dfa.source.matrix"].data_ptr()) == assign


def test_copies_and_files_hold_the_state():
    pair = attached(seed=3)
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    for twin, handle in (copy.deepcopy(pair), torch.load(file, weights_only=False)):
        handle.dfa.seed = 5
        other, loaded = attached()
        other.load_state_dict(twin.state_dict())
        assert loaded.dfa.seed == 5
    assert pair[1].dfa.seed == 3


def test_distributed_checkpoints_hold_the_state():
    model, _ = attached(seed=3)
    other, handle = attached()
    set_model_state_dict(other, get_model_state_dict(model))
    assert handle.dfa.seed == 3


# --- wrappers ---


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("names", [POINTS, [f"module.{name}" for name in POINTS]])
@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_attached_to_a_data_parallel_wrapper(process_group, names, find_unused_parameters):
    x, y = batch()
    wrapped = DistributedDataParallel(plain(), find_unused_parameters=find_unused_parameters)
    handle = attach(wrapped, names, seed=3)
    for _ in range(2):
        assert_equal(backward(wrapped, x, y), backward(perceptron(seed=3), x, y))
    assert f"module.{KEY}" in wrapped.state_dict()
    handle.detach()
    assert_equal(backward(wrapped, x, y), backward(plain(), x, y))


def test_a_data_parallel_part_that_looks_for_unused_parameters_is_refused(process_group):
    part = DistributedDataParallel(plain(), find_unused_parameters=True)
    with pytest.raises(ValueError, match=r"attach: model must not hold a DistributedDataParallel"):
        attach(nn.Sequential(part), ["0.module.1"])


@pytest.mark.parametrize("names", [POINTS, [f"_orig_mod.{name}" for name in POINTS]])
def test_attached_to_a_compiled_wrapper(names):
    x, y = batch()
    wrapped = torch.compile(plain(), backend="eager")
    attach(wrapped, names, seed=3)
    assert_equal(backward(wrapped, x, y), backward(perceptron(seed=3), x, y))


# --- outputs ---


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


@dataclasses.dataclass
class Both(OrderedDict):
    """A mapping and a dataclass, as Hugging Face's outputs are."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None

    def __post_init__(self):
        self["logits"] = self.logits

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


class Kept(dict):
    """Its constructor takes no keywords."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept


def kept(logits):
    made = Kept("kept")
    made["logits"] = logits
    return made


@pytest.mark.parametrize(
    "make",
    [
        lambda logits: {"logits": logits, 1: None, ("a", 2): "kept"},
        lambda logits: OrderedDict([(None, 1), ("logits", logits)]),
        lambda logits: defaultdict(list, {"logits": logits}),
        lambda logits: UserDict({"logits": logits, 3: 4}),
        kept,
        Output,
        Both,
    ],
)
def test_mappings_and_dataclasses_keep_what_they_hold(make):
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(INPUTS, 16), nn.Linear(16, CLASSES)

        def forward(self, x):
            return make(self.head(self.body(x)))

    x, y = batch()
    model = Returns()
    attach(model, ["body"])
    output = model(x)
    assert type(output) is type(make(x))
    logits = output.logits if dataclasses.is_dataclass(output) else output["logits"]
    assert type(logits.grad_fn).__name__ == "FeedbackBackward"
    if not dataclasses.is_dataclass(output):
        assert set(output) == set(make(x))
        assert vars(output).get("kept", "kept") == "kept" if isinstance(output, Kept) else True
    F.cross_entropy(logits, y).backward()
    assert model.body.weight.grad.any()


def test_tokens_with_cuts_and_compile():
    x, y = tokens()
    found = []
    for arguments in ({}, {"cut": ["blocks.1", "blocks.2", "head"]}):
        model = stack()
        names = ["embedding", "blocks.0", "blocks.1", "blocks.2"]
        attach(model, names, output="head", batch_dims=(0, 1), **arguments)
        compiled = torch.compile(model, backend="eager")
        for call in (model, compiled) if arguments else (model,):
            model.zero_grad()
            call(x, y)["loss"].backward()
            found.append([p.grad.clone() for p in model.parameters()])
    for other in found[1:]:
        assert_equal(other, found[0], rtol=1e-5, atol=1e-6)
