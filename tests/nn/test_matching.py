"""`DFA.match_output_`: the output layer's weights start as the feedback matrix."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from dfa_kernels import DFA, DFALayer, attach, feedback_matrix, stream
from dfa_kernels.checks import DTYPES
from dfa_kernels.nn import INDEPENDENT_ROWS, matching
from tests.nn.networks import Learned, Multiplied

WIDTH, CLASSES, INPUTS, BATCH = 12, 7, 5, 4
SHAPE = (WIDTH, CLASSES)
MATRIX = feedback_matrix(*SHAPE, seed=5)


class Residual(nn.Module):
    """An embedding and residual blocks; a point after each, all of the size of the head's input."""

    def __init__(self, blocks=2, width=WIDTH, **options):
        super().__init__()
        self.embed = nn.Linear(INPUTS, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.points = nn.ModuleList(DFALayer() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.dfa = DFA(self.points, **options)

    def forward(self, x):
        x = self.embed(x)
        for block, point in zip(self.blocks, self.points, strict=True):
            x = point(x + torch.tanh(block(x)))
        return self.dfa(self.head(x[:, :WIDTH]))


def samples(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, INPUTS, generator=generator).to(dtype), torch.arange(BATCH)


def step(model):
    x, y = samples(next(model.parameters()).dtype)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def matched_weight(scale=None, dtype=torch.float32, head=None, layers=None, **options):
    """The weights after matching a head of 12 inputs and 7 outputs."""
    head = head or nn.Linear(WIDTH, CLASSES, dtype=dtype)
    dfa = DFA([DFALayer("first"), DFALayer("second")], **options)
    return dfa.match_output_(head, scale, layers=layers).detach()


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def scaled(matrix, scale, dtype=torch.float32):
    """The definition: the entries times scale, rounded once more to a dtype of 16 bits."""
    return (matrix.T * scale).to(dtype)


# The weights.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", stream.DISTRIBUTIONS)
def test_the_weights_are_the_scaled_transposed_matrix(distribution, dtype):
    options = {"seed": 3, "distribution": distribution}
    wide = torch.promote_types(dtype, torch.float32)
    matrix = feedback_matrix(*SHAPE, dtype=wide, **options)
    for scale in (None, 0.1):
        expected = scaled(matrix, scale or 1 / math.sqrt(WIDTH), dtype)
        assert_same(matched_weight(scale, dtype, **options), expected)


def test_it_runs_where_the_weights_are(target):
    head = nn.Linear(WIDTH, CLASSES, device=target.device)
    head.weight.data.zero_()
    weight = matched_weight(0.1, head=head, seed=3, backend=target.name)
    assert weight.device.type == target.device
    assert_same(weight.cpu(), scaled(feedback_matrix(*SHAPE, seed=3), 0.1))


@pytest.mark.parametrize("distribution", stream.DISTRIBUTIONS)
def test_made_in_pieces_they_are_the_same(distribution, monkeypatch):
    monkeypatch.setattr(matching, "CHUNK", 2**11)
    head = nn.Linear(2, 2500)  # three pieces
    weight = matched_weight(0.5, head=head, distribution=distribution)
    assert_same(weight, scaled(feedback_matrix(2, 2500, distribution=distribution), 0.5))


def test_no_distribution_has_entries_larger_than_its_limit_of_scales_says():
    largest = {
        distribution: feedback_matrix(1024, 1024, distribution=distribution).abs().max()
        for distribution in stream.DISTRIBUTIONS
    }
    assert max(largest.values()) <= matching.LARGEST
    # Box and Muller's normal numbers of 32 bits end before 7.
    assert math.sqrt(2 * 33 * math.log(2)) < 7 < matching.LARGEST


@pytest.mark.parametrize("scale", [0.25, np.float32(0.25), np.float64(0.25), Fraction(1, 4)])
def test_the_scale_is_any_number(scale):
    assert_same(matched_weight(scale), scaled(feedback_matrix(*SHAPE), 0.25))


def test_the_weights_stay_the_parameter_that_they_were():
    model = Residual()
    head = model.head
    weight, bias, memory = head.weight, head.bias.clone(), head.weight.data_ptr()
    assert model.dfa.match_output_(head) is weight
    assert head.weight is weight
    assert weight.data_ptr() == memory
    assert weight.is_leaf
    assert weight.requires_grad
    assert weight.grad is None
    assert_same(head.bias, bias)
    step(model)
    assert weight.grad is not None


def test_without_a_bias_and_frozen():
    head = nn.Linear(WIDTH, CLASSES, bias=False).requires_grad_(False)
    assert_same(matched_weight(0.1, head=head), scaled(feedback_matrix(*SHAPE), 0.1))
    assert not head.weight.requires_grad


def test_weights_of_any_strides():
    head = nn.Linear(WIDTH, CLASSES)
    head.weight = nn.Parameter(torch.zeros(WIDTH, CLASSES).T)
    assert_same(matched_weight(0.1, head=head), scaled(feedback_matrix(*SHAPE), 0.1))
    base = torch.zeros(2 * CLASSES, WIDTH)
    head.weight = nn.Parameter(base[::2])
    matched_weight(0.1, head=head)
    assert_same(base[::2], scaled(feedback_matrix(*SHAPE), 0.1))
    assert_same(base[1::2], torch.zeros(CLASSES, WIDTH))


def test_tied_embeddings_are_set_too_and_learn_on():
    model = attached_language_model()
    table, weight = model.table.weight, model.head.weight
    assert table is weight
    assert_same(weight, scaled(feedback_matrix(*SHAPE, seed=3), 1 / math.sqrt(WIDTH)))
    before = weight.detach().clone()
    F.cross_entropy(model(torch.arange(6).view(2, 3)).flatten(0, 1), torch.arange(6)).backward()
    torch.optim.SGD([weight], 0.1).step()
    assert (weight != before).any(dim=1).all()


def attached_language_model():
    model = nn.Sequential()
    model.table = nn.Embedding(CLASSES, WIDTH, padding_idx=0)
    model.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    model.head = nn.Linear(WIDTH, CLASSES, bias=False)
    model.head.weight = model.table.weight
    attach(model, ["block"], batch_dims=(0, 1), seed=3, match_output="head")
    return model


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_may_be_off(context):
    model = Residual()
    with context():
        model.dfa.match_output_(model.head, 0.1)
    assert_same(model.head.weight.detach(), scaled(feedback_matrix(*SHAPE), 0.1))
    step(model)


def test_under_a_default_dtype_and_autocast():
    head = nn.Linear(WIDTH, CLASSES)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            weight = matched_weight(0.1, head=head)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(weight, scaled(feedback_matrix(*SHAPE), 0.1))


# Which matrix.


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_stored_matrices_and_sources_of_ones_own(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    matrix = MATRIX.to(wide)
    stored = torch.cat([matrix, matrix])  # more rows than the layers have
    for source in (stored, nn.Parameter(stored), Multiplied(stored), Learned(stored)):
        assert_same(matched_weight(0.1, dtype, matrix=source), scaled(matrix, 0.1, dtype))


def test_a_stored_matrix_of_16_bits_is_scaled_in_32():
    matrix = MATRIX.to(torch.bfloat16)
    assert_same(matched_weight(0.1, matrix=matrix), scaled(matrix.float(), 0.1))


def test_of_one_layer_where_each_has_its_own():
    first = {"shared": False, "layers": [0]}
    assert_same(matched_weight(0.1, **first), scaled(feedback_matrix(*SHAPE), 0.1))
    rows = feedback_matrix(*SHAPE, row_offset=INDEPENDENT_ROWS)
    layer = DFALayer("second")
    for chosen in ([1], ("second",), iter([1, "second"]), [np.int64(1)]):
        assert_same(matched_weight(0.1, shared=False, layers=chosen), scaled(rows, 0.1))
    dfa = DFA([DFALayer(), layer], shared=False)
    for chosen in ([layer], nn.ModuleList([layer, layer])):
        weight = dfa.match_output_(nn.Linear(WIDTH, CLASSES), 0.1, layers=chosen)
        assert_same(weight.detach(), scaled(rows, 0.1))
    pair = [torch.zeros(1, CLASSES), MATRIX]
    for source in (pair, Multiplied(*pair)):
        weight = matched_weight(0.1, shared=False, layers=[1], matrix=source)
        assert_same(weight, scaled(MATRIX, 0.1))


# Parts.


@pytest.mark.parametrize("matrix", [None, MATRIX])
def test_parts_make_up_the_whole(matrix):
    whole = matched_weight(0.1, matrix=matrix)
    dfa = DFA([DFALayer()], matrix=matrix)
    made = torch.empty_like(whole)
    for rows in (range(5), range(5, WIDTH)):
        for columns in (range(3), range(3, CLASSES)):
            weight = dfa.match_output_(
                nn.Linear(len(rows), len(columns)),
                0.1,
                row_offset=rows.start,
                column_offset=np.int64(columns.start),
            )
            made[columns.start : columns.stop, rows.start : rows.stop] = weight.detach()
    assert_same(made, whole)


def test_a_part_of_the_outputs_has_the_whole_layers_default_scale():
    weight = DFA([DFALayer()]).match_output_(nn.Linear(WIDTH, 3), column_offset=4)
    assert_same(weight.detach(), matched_weight()[4:])


def test_a_part_may_begin_at_the_last_rows_and_columns():
    row, column = stream.ROWS - 1 - WIDTH, stream.COLUMNS - CLASSES
    for distribution in stream.DISTRIBUTIONS:
        dfa = DFA([DFALayer()], distribution=distribution)
        weight = dfa.match_output_(
            nn.Linear(WIDTH, CLASSES), 0.1, row_offset=row, column_offset=column
        )
        rows = feedback_matrix(
            *SHAPE, distribution=distribution, row_offset=row, column_offset=column
        )
        assert_same(weight.detach(), scaled(rows, 0.1))


def test_a_part_of_the_inputs_still_wants_all_of_the_outputs():
    for head, offset, message in (
        (nn.Linear(4, CLASSES + 1), {"row_offset": 8}, "the error must .* outputs, 8, got 7"),
        (nn.Linear(4, CLASSES), {"row_offset": 9}, r"layers\[0\] .* inputs, at least 13, got 12"),
        (nn.Linear(WIDTH - 1, 4), {"column_offset": 2}, r"layers\[0\] .* inputs, 11, got 12"),
        (nn.Linear(WIDTH, 4), {"column_offset": 4}, "error .* outputs, at least 8, got 7"),
    ):
        model = Residual(1)
        model.dfa.match_output_(head, 0.1, **offset)
        with pytest.raises(ValueError, match=message):
            step(model)
    model.dfa.match_output_(nn.Linear(4, 3), 0.1, row_offset=8, column_offset=4)
    step(model)


# What cannot be set.


def refused(kind, message, linear=None, dfa=None, **arguments):
    linear = nn.Linear(WIDTH, CLASSES) if linear is None else linear
    dfa = dfa or DFA([DFALayer(), DFALayer()])
    weight = getattr(linear, "weight", None)
    ordinary = type(weight) is nn.Parameter and not weight.is_meta
    before = weight.detach().clone() if ordinary else None
    with pytest.raises(kind, match=rf"^DFA.*{message}"):
        dfa.match_output_(linear, **arguments)
    assert dfa._match is None
    if ordinary:
        assert_same(weight.detach(), before)


def test_what_is_no_linear_layer_is_refused():
    for module in (nn.Embedding(CLASSES, WIDTH), nn.Bilinear(2, 2, 2), "head"):
        refused(TypeError, "linear must be an nn.Linear, got (Embed|Bilin|str)", module)
    refused(TypeError, "linear must be an nn.Linear, got Parameter", nn.Linear(2, 2).weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_are_computed_from_others_are_refused():
    def linear():
        return nn.Linear(WIDTH, CLASSES)

    doubled = linear()
    register_parametrization(doubled, "weight", nn.Identity())
    for module in (
        doubled,
        nn.utils.weight_norm(linear()),
        parametrizations.weight_norm(linear()),
        nn.utils.spectral_norm(linear()),
    ):
        refused(ValueError, "weight must be a parameter, got one .* computed from others", module)


def test_weights_without_entries_are_refused():
    message = "weight must have entries, got none yet; call it once they are made"
    refused(ValueError, message, nn.LazyLinear(CLASSES))
    refused(ValueError, message, nn.Linear(WIDTH, CLASSES, device="meta"))
    with pytest.warns(UserWarning, match="zero-element"):
        empty = [nn.Linear(0, CLASSES), nn.Linear(WIDTH, 0)]
    flat = nn.Linear(WIDTH, CLASSES)
    flat.weight = nn.Parameter(torch.zeros(0))  # as where another process has them
    for linear in (*empty, flat):
        refused(ValueError, r"entries \[outputs, inputs\], got \[.*0.*\]; of sharded", linear)


def test_weights_of_another_kind_are_refused():
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64):
        linear = nn.Linear(WIDTH, CLASSES)
        linear.weight = nn.Parameter(torch.zeros(CLASSES, WIDTH, dtype=dtype), False)
        with pytest.raises(TypeError, match=rf"linear.weight must be .*float64, got {dtype}"):
            DFA([DFALayer()]).match_output_(linear)
    linear = nn.Linear(WIDTH, CLASSES)
    linear.weight = nn.Parameter(torch.eye(CLASSES, WIDTH).to_sparse())
    with pytest.raises(
        TypeError, match=r"linear.weight must be a strided tensor, got torch.sparse"
    ):
        DFA([DFALayer()]).match_output_(linear)


def test_weights_made_in_inference_mode_are_torchs_to_refuse():
    with torch.inference_mode():
        linear = nn.Linear(WIDTH, CLASSES)
    with pytest.raises(RuntimeError, match="inference tensor"):
        DFA([DFALayer()]).match_output_(linear)


@pytest.mark.parametrize("scale", [True, "1", torch.tensor(1.0), 1j, np.bool_(True), [1.0]])
def test_a_scale_that_is_no_number_is_refused(scale):
    refused(TypeError, f"scale must be a number or None, got {type(scale).__name__}", scale=scale)


@pytest.mark.parametrize("scale", [0, -0.0, -1, math.nan, math.inf, 10**400, 1e-39, 1e38])
def test_a_scale_that_makes_no_signal_or_no_weights_is_refused(scale):
    refused(ValueError, "scale must be above 0, .* weights of torch.float32, got", scale=scale)


def test_weights_of_16_bits_do_not_overflow_in_silence():
    linear = nn.Linear(WIDTH, CLASSES, dtype=torch.float16)
    for scale in (1e4, 1e-5):
        refused(ValueError, r"between 6.1e-05 and 2.05e\+03 for.*16", linear, scale=scale)
    assert matched_weight(2000, torch.float16).isfinite().all()


def test_offsets_are_checked():
    for name, value in (("row_offset", True), ("column_offset", 1.0), ("row_offset", False)):
        refused(TypeError, f"{name} must be an int, got", scale=1.0, **{name: value})
    refused(ValueError, "row_offset must be in", scale=1.0, row_offset=-1)
    refused(ValueError, "row_offset must be in", scale=1.0, row_offset=2**63)
    refused(ValueError, r"row_offset must leave .* 2\*\*63", scale=1.0, row_offset=2**63 - 3)
    refused(ValueError, r"column_offset must leave .* 2\*\*34", column_offset=2**34 - 3)
    for offset in (0, 4):
        refused(ValueError, "scale must be given with row_offset", row_offset=offset)
    dfa = DFA([DFALayer()], matrix=MATRIX)
    message = "column_offset must leave the outputs in the 7 columns .* got 3 with 7 outputs"
    refused(ValueError, message, dfa=dfa, column_offset=3)
    dfa = DFA([DFALayer()], matrix=Multiplied(MATRIX))
    refused(ValueError, "column_offset must be None for a Multiplied", dfa=dfa, column_offset=0)


def test_stored_matrices_of_another_size_are_refused():
    for matrix in (MATRIX[:8], MATRIX[:, :5], torch.cat([MATRIX, MATRIX], 1)):
        dfa = DFA([DFALayer()], matrix=matrix)
        refused(ValueError, "matrix must have at least 12 rows .* exactly 7 columns", dfa=dfa)


def test_layers_that_cannot_match_are_refused():
    two = r"one feedback matrix \(shared=True\), or one alone by `layers`, got 2 matrices"
    for options in ({"shared": False}, {"matrix": [MATRIX, MATRIX]}):
        refused(ValueError, two, dfa=DFA([DFALayer(), DFALayer()], **options))
    refused(ValueError, "got no layers", layers=[])
    refused(ValueError, "got no layers", dfa=DFA([]))
    for layers in ("first", DFALayer(), 0, {0, 1}):
        refused(TypeError, "layers must be a sequence of layers, got", layers=layers)
    refused(ValueError, "layer must be one of the DFA's, .* got DFALayer", layers=[DFALayer()])
    refused(ValueError, r"layer must be in \[0, 1\], got 2", layers=[2])
    refused(ValueError, "must be one of the DFA's, .* got 'third'", layers=["third"])
    masked = DFA([DFALayer(), DFALayer()], mask=[None, torch.ones(WIDTH)])
    refused(ValueError, r"dfa_layers\[1\] must have no mask, got one", dfa=masked)
    masked.match_output_(nn.Linear(WIDTH, CLASSES), layers=[0])


def test_sizes_that_are_known_are_checked_at_once():
    model = Residual(width=WIDTH + 3)
    step(model)
    message = (
        r"dfa_layers\[0\] must have the size of the output layer's inputs, 12, got 15; .*`layers`"
    )
    refused(ValueError, message, dfa=model.dfa)
