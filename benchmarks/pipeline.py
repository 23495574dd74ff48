"""Time of a step of a pipeline: backpropagation in 1F1B and GPipe against `FeedbackStage`.

    python -m benchmarks.pipeline [--stages 4] [--microbatches 4 8 16] [--json FILE]

A model is cut into S stages on S processes, and a batch into M microbatches. A stage takes F for a
microbatch's forward pass and B for its backward pass. What a step takes beyond M (F + B), the work
of one stage, is the bubble.

    1F1B, GPipe     (S - 1) (F + B)  the first microbatch goes up, and the last gradient comes down
    zero bubble     (S - 1) F        ZB-H1 (Qi et al. 2023): the products for weights fill gaps,
                                     which take half of B
    FeedbackStage   (S - 1) F        nothing comes down: all stages get the error at the same time
    with `ahead`    0                the first stages end a step early, and begin the next

By default all stages of a `FeedbackStage` end a step at the same time, so none can begin the next
while another works. With ahead = 1 + (S - 1) F/B, rounded up, stages do the same work in the same
order, each F after the one below, so that stage s ends a step at s F + M (F + B), takes its own
optimizer step, and goes on. Backpropagation cannot: its first stage begins a step and ends it. Only
the first step of all has a bubble, and each after something that all stages wait for. In memory
every stage then holds that many microbatches, where stage s of 1F1B holds S - s.

"Simulated" stages sleep for F and B, so processes may be more than cores. "Real" ones compute, and
share the cores: with fewer cores than stages, a bubble of one is time for another, and their times
say what all the work takes.

The time of a step is from the end of one to the end of the next, without a barrier between.

Bytes are those that all stages receive for a microbatch, activations included: gradients of the
activations, errors, or signals. Errors and signals that several stages get alike are one broadcast.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import provenance
from benchmarks.training_step import Perceptron, Transformer
from dfa_kernels import DFALayer
from dfa_kernels.nn import FeedbackStage


class Sleep(torch.autograd.Function):
    """Adds a weight; its passes take as long as they are told to."""

    @staticmethod
    def forward(ctx, x, weight, clock):
        ctx.clock = clock
        clock.sleep(clock.forward)
        return x + weight

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.sleep(ctx.clock.backward)
        return gradient, gradient.sum(0), None


class Simulated(nn.Module):
    """A stage that sleeps for its passes, and counts how long it did."""

    def __init__(self, size, forward, backward):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.times = Times(forward, backward)

    def forward(self, x):
        return Sleep.apply(x, self.weight, self.times)


class Times:
    """Seconds of the passes, and of all so far."""

    def __init__(self, forward, backward):
        self.forward, self.backward, self.busy = forward, backward, 0.0

    def sleep(self, seconds):
        start = time.perf_counter()
        time.sleep(seconds)
        self.busy += time.perf_counter() - start


class Case(NamedTuple):
    """A model in parts, of which a signal trains each but an output layer, and its data."""

    parts: list
    x: torch.Tensor
    y: torch.Tensor
    batch_dims: tuple[int, ...]
    output_layer: bool


def simulated(stages, microbatches, forward, backward):
    """One part for each stage."""
    parts = [Simulated(8, forward, backward) for _ in range(stages)]
    x = torch.ones(microbatches, 8)
    return Case(parts, x, torch.zeros(microbatches, dtype=torch.long), (0,), False)


def real(network, microbatches):
    """As `training_step` has it."""
    torch.manual_seed(0)
    x, y = network.data("cpu", torch.float32)
    return Case(network.parts(), x, y, network.batch_dims, True)


def loss(output, target):
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def of_stage(case, stage, stages, with_points):
    """A stage's part of the model."""
    hidden = len(case.parts) - case.output_layer
    first, last = (round(i * hidden / stages) for i in (stage, stage + 1))
    modules = []
    for part in case.parts[first:last]:
        modules += [part, DFALayer()] if with_points else [part]
    if case.output_layer and stage == stages - 1:
        modules.append(case.parts[-1])
    return nn.Sequential(*modules)


def enough_ahead(stages, forward=1.0, backward=2.0):
    """How many microbatches a stage needs on its way for steps to overlap."""
    return 1 + math.ceil((stages - 1) * forward / backward)


def by_feedback(overlap, case, stage, stages, microbatches):
    """A function that takes a step by DFA."""
    module = of_stage(case, stage, stages, with_points=True)
    options = {"ahead": enough_ahead(stages) if overlap else None, "batch_dims": case.batch_dims}
    own = FeedbackStage(module, microbatches, loss, seed=0, **options)
    return module, partial(own.step, case.x, target=case.y)


def by_backpropagation(schedule, case, stage, stages, microbatches):
    """A function that takes a step by backpropagation, in a schedule of torch's."""
    from torch.distributed import pipelining

    module = of_stage(case, stage, stages, with_points=False)
    own = pipelining.PipelineStage(module, stage, stages, torch.device("cpu"))
    make = getattr(pipelining, f"Schedule{schedule}")
    step = make(own, microbatches, loss_fn=loss).step
    if stage == 0:
        return module, partial(step, case.x)
    return module, partial(step, target=case.y) if stage == stages - 1 else step


WAYS = {
    "1F1B": partial(by_backpropagation, "1F1B"),
    "GPipe": partial(by_backpropagation, "GPipe"),
    "FeedbackStage": partial(by_feedback, False),
    "with ahead": partial(by_feedback, True),
}


def worker(stage, stages, folder, jobs, steps):
    """Takes steps of every job, (way, case, microbatches), as one of the stages."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=stage, world_size=stages
    )
    try:
        measured = []
        for way, make, microbatches in jobs:
            module, step = WAYS[way](make(microbatches), stage, stages, microbatches)
            clocks = [one.times for one in module.modules() if isinstance(one, Simulated)]
            ends, busy = [], []
            dist.barrier()
            for _ in range(2 + steps):
                module.zero_grad()
                step()
                ends.append(time.perf_counter())
                busy.append(sum(clock.busy for clock in clocks))
            # The first exchanges shapes, and the second fills the pipeline.
            measured.append([(last - first) / steps for _, first, *_, last in (ends, busy)])
        torch.save(measured, f"{folder}/{stage}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(stages, jobs, steps, rounds):
    """Seconds of a step of each job, and of the work of a stage in it: medians of rounds."""
    mp.get_context("forkserver").set_forkserver_preload(
        ["torch.distributed.pipelining", "benchmarks.training_step"]
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = (stages, folder, jobs * rounds, steps)
        mp.start_processes(worker, arguments, nprocs=stages, start_method="forkserver")
        ranks = [torch.load(f"{folder}/{stage}.pt") for stage in range(stages)]
    means = [  # over the stages, of each job in each round
        [statistics.mean(values) for values in zip(*of_stages, strict=True)]
        for of_stages in zip(*ranks, strict=True)
    ]
    return [
        [statistics.median(values) for values in zip(*means[index :: len(jobs)], strict=True)]
        for index in range(len(jobs))
    ]


def by_formula(way, stages, microbatches, forward, backward):
    """Seconds of a step, without what is sent."""
    waits = {"FeedbackStage": forward, "zero bubble": forward, "with ahead": 0.0}
    lost = (stages - 1) * waits.get(way, forward + backward)
    return lost + microbatches * (forward + backward)


def bubble(seconds, work):
    """The part of a step that is no work."""
    return 1 - work / seconds


def plan(stages, microbatches, forward=1.0, backward=2.0):
    """The bubbles of pipelines that are not here, in parts of a step, and the gain."""
    work = microbatches * (forward + backward)
    seconds = {
        way: by_formula(way, stages, microbatches, forward, backward)
        for way in ("1F1B", "zero bubble", "FeedbackStage", "with ahead")
    }
    return {
        "stages": stages,
        "microbatches": microbatches,
        "bubble": {way: bubble(one, work) for way, one in seconds.items()},
        "ahead": enough_ahead(stages, forward, backward),
        "faster": {way: seconds["1F1B"] / one for way, one in seconds.items()},
    }


class Sizes(NamedTuple):
    """Of one microbatch: rows, sizes of activations between stages, of the error and of points.

    `points` are the distinct sizes of a stage, which share a matrix.
    """

    rows: int
    width: int
    n: int
    points: tuple[int, ...]
    itemsize: int


SENT = {
    "8 x 1024, n = 10, 512 rows, fp32": Sizes(512, 1024, 10, (1024,), 4),
    "blocks of 4096, n = 32,000, 4096 rows, bf16": Sizes(4096, 4096, 32_000, (4096,), 2),
    "blocks of 8192, n = 128,256, 8192 rows, bf16": Sizes(8192, 8192, 128_256, (8192,), 2),
    "layers of 16384, n = 1,000, 4096 rows, bf16": Sizes(4096, 16_384, 1000, (16_384,), 2),
}


def sent(sizes, stages):
    """Bytes for a microbatch that all stages receive together."""
    activations = (stages - 1) * sizes.rows * sizes.width * sizes.itemsize
    row = min(sizes.n, sum(sizes.points))
    return {
        "activations": activations,
        "gradients, by backpropagation": activations,
        "errors": (stages - 1) * sizes.rows * sizes.n * sizes.itemsize,
        "signals": (stages - 1) * sizes.rows * sum(sizes.points) * sizes.itemsize,
        "what FeedbackStage sends": (stages - 1) * sizes.rows * row * sizes.itemsize,
    }


def measure_simulated(options):
    """Sleeping stages, by way and number of microbatches."""
    forward, backward = options.forward / 1e3, options.backward / 1e3
    make = partial(simulated, options.stages, forward=forward, backward=backward)
    jobs = [(way, make, count) for count in options.microbatches for way in fitting(options, count)]
    results = []
    measured = run(options.stages, jobs, options.steps, options.rounds)
    for (way, _, count), (seconds, busy) in zip(jobs, measured, strict=True):
        wanted = by_formula(way, options.stages, count, forward, backward)
        results.append(
            {
                "way": way,
                "microbatches": count,
                "seconds": seconds,
                "seconds by formula": wanted,
                "bubble": bubble(seconds, busy),
                "bubble by formula": bubble(wanted, count * (forward + backward)),
            }
        )
    return results


def fitting(options, microbatches):
    """The ways that take so few microbatches; torch's 1F1B needs as many as stages."""
    ways = {**WAYS}
    if microbatches < options.stages:
        del ways["1F1B"]
    if microbatches < enough_ahead(options.stages):
        del ways["with ahead"]
    return [*ways]


NETWORKS = {
    "8 x 1024, n = 10": Perceptron(784, (1024,) * 8, batch=512, n=10),
    "8 blocks of 256, 64 tokens, n = 1000": Transformer(
        blocks=8, width=256, heads=4, tokens=64, batch=32, n=1000
    ),
}


def measure_real(options, networks):
    """Stages that compute."""
    jobs = [
        (way, partial(real, network), options.microbatches[-1])
        for network in networks.values()
        for way in fitting(options, options.microbatches[-1])
    ]
    names = [name for name in networks for _ in fitting(options, options.microbatches[-1])]
    measured = run(options.stages, jobs, options.steps, options.rounds)
    return [
        {"case": name, "way": way, "microbatches": count, "seconds": seconds}
        for name, (way, _, count), (seconds, _) in zip(names, jobs, measured, strict=True)
    ]


def show(results):
    """Print what was measured and what formulas say."""
    print(f"\nsimulated, {results['stages']} stages:")
    for one in results["simulated"]:
        print(
            f"  {one['way']:14s} M = {one['microbatches']:3d} {1e3 * one['seconds']:8.1f} ms, "
            f"by formula {1e3 * one['seconds by formula']:8.1f}; bubble {one['bubble']:5.1%}, "
            f"by formula {one['bubble by formula']:5.1%}"
        )
    print("\nreal:")
    for one in results["real"]:
        print(f"  {one['case']:38s} {one['way']:14s} {1e3 * one['seconds']:8.1f} ms")
    print("\nby formula, B = 2F: bubble, and how many times 1F1B's speed")
    for one in results["plan"]:
        ways = [
            f"{way} {part:5.1%}, {one['faster'][way]:.2f}x" for way, part in one["bubble"].items()
        ]
        print(f"  S = {one['stages']}, M = {one['microbatches']:4d}: {'; '.join(ways)}")
    print("\nMB for a microbatch, received by all stages:")
    for name, kinds in results["sent"].items():
        print(f"  {name}: " + ", ".join(f"{kind} {n / 1e6:,.1f}" for kind, n in kinds.items()))


def main(arguments=None, networks=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--forward", type=float, default=20.0, help="ms of a simulated pass")
    parser.add_argument("--backward", type=float, default=40.0, help="ms of a simulated pass")
    parser.add_argument("--steps", type=int, default=5, help="that are measured in a row")
    parser.add_argument("--rounds", type=int, default=3, help="in which the ways take turns")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args(arguments)
    origin = provenance.origin("cpu")  # before measuring: files may be edited meanwhile
    settings = ("stages", "forward", "backward", "steps", "rounds")
    results = origin | {name: getattr(options, name) for name in settings}
    results["simulated"] = measure_simulated(options)
    results["real"] = measure_real(options, NETWORKS if networks is None else networks)
    results["plan"] = [plan(64, count) for count in (64, 128, 256, 512)]
    results["sent"] = {name: sent(sizes, options.stages) for name, sizes in SENT.items()}
    show(results)
    if options.json:
        provenance.save(options.json, results)


if __name__ == "__main__":
    main()
