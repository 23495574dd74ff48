"""The trainer with other training tools: accumulation, mixed precision, checkpointing, devices,
data parallelism. For torch.compile see test_compile.py."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dfa_kernels import DFA, DFALayer, FeedbackPointsHandling
from tests import processes
from tests.nn.networks import (
    Perceptron,
    assert_equal,
    backward,
    batch,
    gradients,
    perceptron,
    signals,
)

# --- accumulation and mixed precision ---


def test_accumulated_gradients_are_those_of_the_joint_batch():
    x, y = batch(torch.float64, size=8)
    expected = backward(perceptron(dtype=torch.float64), x, y)
    model = perceptron(dtype=torch.float64)
    for part in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
    assert_equal(gradients(model), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("lean", [False, True])
def test_autocast(inside, lean):
    """The backward pass may run outside autocast, as recommended, or inside."""
    x, y = batch()
    model = perceptron(keep=True, lean=lean)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert model.hidden[0].dtype == torch.bfloat16
    for ours, exact in zip(gradients(model), backward(perceptron(), x, y), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 0.05 * exact.norm()


def test_grad_scaler():
    """Scaling by a power of two passes the projection exactly; an overflow skips the step."""
    x, y = batch()
    model = perceptron()
    expected = backward(perceptron(), x, y)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.unscale_(optimizer)
    assert_equal(gradients(model), expected)
    scaler.step(optimizer)
    scaler.update()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_equal(model.parameters(), before)
    assert scaler.get_scale() == 2.0**11


# --- activation checkpointing ---


class Checkpointed(Perceptron):
    """A `Perceptron` whose layers are recomputed in the backward pass, with or without their
    points."""

    def __init__(self, with_points, **arguments):
        super().__init__(**arguments)
        self.with_points = with_points

    def forward(self, x, skip=(), fail_before=None, use_reentrant=False):
        def segment(linear, point, x):
            return point(torch.tanh(linear(x))) if self.with_points else torch.tanh(linear(x))

        for linear, point in zip(self.linears, self.points, strict=True):
            if use_reentrant:
                x = x.detach().requires_grad_()
            x = checkpoint(segment, linear, point, x, use_reentrant=use_reentrant)
            x = x if self.with_points else point(x)
        return self.dfa(self.output(x))


def checkpointed(**arguments):
    torch.manual_seed(0)
    return Checkpointed(**arguments)


@pytest.mark.parametrize("with_points", [True, False])
@pytest.mark.parametrize("handling", ["LAST", "REDUCE"])
def test_checkpointing_recomputes_and_registers_nothing_twice(with_points, handling):
    x, y = batch()
    handling = FeedbackPointsHandling[handling]
    model = checkpointed(with_points=with_points, feedback_points_handling=handling)
    expected = backward(perceptron(), x, y)
    for _ in range(2):
        assert_equal(backward(model, x, y), expected)
        assert not model.dfa._group.waiting


def test_whole_model_checkpointed():
    x, y = batch()
    model = perceptron()
    for _ in range(2):
        call = functools.partial(checkpoint, model, use_reentrant=False)
        assert_equal(backward(model, x, y, call=call), backward(perceptron(), x, y))
        assert not model.dfa._group.waiting


def test_reentrant_checkpointing_between_points():
    x, y = batch()
    model = checkpointed(with_points=False)
    found = backward(model, x, y, use_reentrant=True)
    assert_equal(found, backward(perceptron(), x, y))


def test_reentrant_checkpointing_around_a_point_or_the_output_is_refused():
    x = batch()[0].requires_grad_()
    model = checkpointed(with_points=True)

    def segment(x):
        h = torch.tanh(model.linears[0](x))
        return model.points[0](h) + h

    output = checkpoint(segment, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="DFALayer: cannot be inside checkpoint"):
        output.sum().backward()
    with pytest.raises(RuntimeError, match="DFA: cannot be inside checkpoint"):
        checkpoint(
            model.dfa, torch.zeros(6, 5, requires_grad=True), use_reentrant=True
        ).sum().backward()


# --- a device to project on ---


def test_projection_on_another_device_comes_back():
    """The error goes to rp_device, the signals to their activations. "meta" tensors have no values,
    so the source answers with numbers that are easy to recognise."""

    class Sevens:
        def project(self, error, layers, dtype):
            self.seen = error.device.type
            return [torch.full((len(error), size), 7.0) for size in layers.sizes]

        def describe(self):
            return {}

    source = Sevens()
    found = signals(torch.randn(3, 5), [6, 4], rp_device="meta", matrix=source)
    assert source.seen == "meta"
    assert_equal(found, [torch.full((3, 6), 7.0), torch.full((3, 4), 7.0)])
    x, y = batch()
    assert_equal(backward(perceptron(rp_device="cpu"), x, y), backward(perceptron(), x, y))


def test_stored_matrix_lives_on_the_projections_device():
    dfa = DFA([DFALayer()], matrix=torch.zeros(4, 3), rp_device="meta")
    assert dfa.matrices[0].device.type == "meta"


def test_matrix_and_masks_move_to_where_they_are_needed():
    point = DFALayer()
    dfa = DFA([point], matrix=torch.zeros(4, 3), mask=[torch.ones(4)])
    with torch.device("meta"):
        point(torch.zeros(2, 4, requires_grad=True))
        dfa(torch.zeros(2, 3))
    assert dfa.matrices[0].device.type == dfa.masks[0].device.type == "meta"


def test_layers_on_other_devices_need_a_device_to_project_on():
    point = DFALayer()
    dfa = DFA([point])
    point(torch.zeros(3, 4, requires_grad=True, device="meta"))
    with pytest.raises(ValueError, match=r"dfa_layers\[0\] is on meta, the output on cpu; give rp"):
        dfa(torch.zeros(3, 5))


# --- data parallelism ---


def gradients_of_half_a_batch(rank):
    """Frees its wrapper on return. The wrapper holds the process group, which joins its threads
    when freed; if that happens under the interpreter's lock, they can wait for it forever."""
    parallel = DistributedDataParallel(perceptron(seed=3, dtype=torch.float64))
    x, y = batch(torch.float64, size=8)
    half = slice(4 * rank, 4 * rank + 4)
    for _ in range(2):
        found = backward(parallel.module, x[half], y[half], call=parallel)
    return found


def refusal_of_another_seed(rank):
    parallel = DistributedDataParallel(perceptron(seed=rank))
    for _ in range(2):  # each time
        with pytest.raises(ValueError, match="DFA: seed and") as refusal:
            parallel(batch()[0])
    return str(refusal.value)


def worker(rank):
    return gradients_of_half_a_batch(rank), refusal_of_another_seed(rank)


def test_two_processes_make_the_gradient_of_the_joint_batch(tmp_path):
    """Those with different seeds are refused, on every rank."""
    expected = backward(perceptron(seed=3, dtype=torch.float64), *batch(torch.float64, size=8))
    for rank, (found, refusal) in enumerate(processes.run(worker, 2, tmp_path)):
        assert_equal(found, expected, rtol=1e-10, atol=1e-12)
        assert re.match(rf"DFA: seed and .* on ranks \[1\] than .* seed={rank}, ", refusal)
