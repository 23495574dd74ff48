"""The benchmark of pipelines: what it runs, its formulas, and the bytes it counts."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import pipeline
from benchmarks.training_step import Perceptron, Transformer
from dfa_kernels import DFALayer
from dfa_kernels.nn import FeedbackStage
from tests import processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

NETWORKS = {
    "perceptron": Perceptron(6, (8, 5), batch=4, n=3),
    "transformer": Transformer(2, width=8, heads=2, tokens=5, batch=4, n=11),
}


def test_a_quick_run(tmp_path, capsys):
    file = tmp_path / "pipeline.json"
    arguments = "--stages 2 --microbatches 1 4 --forward 1 --backward 2 --steps 1 --rounds 2"
    pipeline.main([*arguments.split(), "--json", str(file)], NETWORKS)
    results = json.loads(file.read_text())
    assert {"commit", "date", "device", "versions", "stages", "rounds"} <= results.keys()
    ran = [(one["way"], one["microbatches"]) for one in results["simulated"]]
    assert ran == [
        ("GPipe", 1),
        ("FeedbackStage", 1),
        *((way, 4) for way in ("1F1B", "GPipe", "FeedbackStage", "with ahead")),
    ]
    for one in results["simulated"]:
        # Sleeping takes no less than it is told to.
        assert one["seconds"] * (1 - one["bubble"]) >= one["microbatches"] * 3e-3
        assert one["seconds"] > one["microbatches"] * 3e-3
    assert [one["case"] for one in results["real"]] == ["perceptron"] * 4 + ["transformer"] * 4
    assert all(one["seconds"] > 0 for one in results["real"])
    shown = capsys.readouterr().out
    assert "S = 64, M =  512" in shown
    assert "what FeedbackStage sends" in shown


def test_formulas():
    seconds = {
        way: pipeline.by_formula(way, 4, 8, 20, 40)
        for way in ("1F1B", "GPipe", "zero bubble", "FeedbackStage", "with ahead")
    }
    assert seconds == {
        "1F1B": 11 * 60,
        "GPipe": 11 * 60,
        "zero bubble": 3 * 20 + 8 * 60,
        "FeedbackStage": 3 * 20 + 8 * 60,
        "with ahead": 8 * 60,
    }
    planned = pipeline.plan(64, 64)
    assert planned["bubble"]["1F1B"] == pytest.approx(63 / 127)
    assert planned["bubble"]["FeedbackStage"] == pytest.approx(63 / 255)
    assert planned["bubble"]["with ahead"] == 0
    assert planned["faster"]["with ahead"] == pytest.approx(127 / 64)
    assert planned["ahead"] == 1 + 32  # ceil(63 / 2)


@pytest.mark.parametrize(("backward", "ahead"), [(1.0, None), (2.0, None), (2.0, 3), (1.0, 5)])
def test_the_formula_of_a_step_is_what_its_order_takes(backward, ahead):
    """Simulated without processes: when each pass ends, of three steps."""
    stages, count, forward = 5, 8, 1.0
    if ahead:
        ahead = pipeline.enough_ahead(stages, forward, backward)
    orders = []
    for stage in range(stages):
        first = min(count, max(stages - stage, ahead or 1))
        order = [("F", index) for index in range(first)]
        for index in range(count):
            order.append(("B", index))
            if first + index < count:
                order.append(("F", first + index))
        orders.append([(kind, step, index) for step in range(3) for kind, index in order])
    ends, now = {}, [0.0] * stages
    while any(orders):
        for stage, order in enumerate(orders):
            if not order:
                continue
            kind, step, index = order[0]
            source = ("F", (stages if kind == "B" else stage) - 1, step, index)
            if source[1] < 0:
                ready = 0.0
            elif source in ends:
                ready = ends[source]
            else:
                continue
            now[stage] = max(now[stage], ready) + (forward if kind == "F" else backward)
            ends[kind, stage, step, index] = now[stage]
            order.pop(0)
    steps = [ends["B", stages - 1, step, count - 1] for step in range(3)]
    way = "with ahead" if ahead else "FeedbackStage"
    wanted = pipeline.by_formula(way, stages, count, forward, backward)
    assert [steps[1] - steps[0], steps[2] - steps[1]] == pytest.approx([wanted, wanted])


SIZES = pipeline.Sizes(rows=6, width=8, n=5, points=(8,), itemsize=4)


def counted(rank, send):
    """Bytes that this stage sends in a step, the first aside, which exchanges shapes too."""
    count = 2
    layers = [nn.Linear(8, 8), nn.Tanh(), DFALayer()]
    module = nn.Sequential(*layers, *[nn.Linear(8, SIZES.n)] * (rank == 2))
    stage = FeedbackStage(module, count, pipeline.loss, send=send)
    x = torch.ones(count * SIZES.rows, 8)
    y = torch.zeros(len(x), dtype=torch.long)
    stage.step(x, target=y)
    found = {}

    def counting(name, receivers):
        begin = getattr(dist, name)

        def counted(tensor, *args, **kwargs):
            found[name] = found.get(name, 0) + receivers * tensor.nbytes
            return begin(tensor, *args, **kwargs)

        return counted

    dist.isend, dist.broadcast = counting("isend", 1), counting("broadcast", rank)
    stage.step(x, target=y)
    return found.get("isend", 0) / count, found["broadcast"] / count


@pytest.mark.parametrize(
    ("send", "kind"),
    [("error", "errors"), ("signals", "signals"), (None, "what FeedbackStage sends")],
)
def test_the_bytes_that_are_sent(tmp_path, send, kind):
    ranks = processes.run(counted, 3, tmp_path, send)
    wanted = pipeline.sent(SIZES, 3)
    assert sum(sent for sent, _ in ranks) == wanted["activations"]
    assert ranks[-1][1] == wanted[kind]
