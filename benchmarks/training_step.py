"""Time of a training step (forward, backward, optimizer) by DFA against backpropagation.

    python -m benchmarks.training_step [--device cpu] [--distribution hadamard] [--json FILE]

The ways of training one network take turns, step by step, so background load affects all alike;
medians and ratios are of the same run. The peak memory of a step is what it takes beyond the
weights: activations, signals and gradients. "matrix=" has a stored matrix: the difference between
"DFA" and it is the cost of generating entries. Each other distribution of `--distribution` is
measured beside "DFA", which has normal entries. "limit" is the fraction of backpropagation's matrix
products that remain when no gradient is carried back between layers: the ratio that a step would
reach if the projection and all elementwise work were free.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import provenance
from benchmarks.harness.measure import peak_bytes
from dfa_kernels import DFA, DFALayer, feedback_matrix
from dfa_kernels.backends import registry
from dfa_kernels.stream import DISTRIBUTIONS

CASES = {  # inputs, hidden layers, batch, n
    "8 x 1024, n = 10": (784, [1024] * 8, 512, 10),
    "1 x 4096, n = 1000": (784, [4096], 512, 1000),
}
ACCELERATOR_CASES = {"24 x 4096, n = 1000": (4096, [4096] * 24, 4096, 1000)}


class Step:
    """One way of training one network; `run()` takes and times a step."""

    def __init__(self, case, mode, device, dtype, **arguments):
        inputs, widths, batch, classes = case
        torch.manual_seed(0)
        points = [DFALayer() for _ in widths]
        self.dfa = DFA(points, **arguments)
        self.dfa.mode = mode
        layers: list[nn.Module] = []
        for before, width, point in zip([inputs, *widths], widths, points, strict=False):
            layers += [nn.Linear(before, width), nn.Tanh(), point]
        self.model = nn.Sequential(*layers, nn.Linear(widths[-1], classes), self.dfa)
        self.model.to(device, dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
        self.x = torch.randn(batch, inputs, device=device, dtype=dtype)
        self.y = torch.randint(0, classes, (batch,), device=device)
        self.seconds: list[float] = []

    def run(self):
        """Take a step and keep its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    def peak(self):
        """Peak bytes of a step beyond the weights."""
        self.optimizer.zero_grad()
        return peak_bytes(self.run, self.x.device.type)[1]


def limit(case):
    """Multiplications of a DFA step without its projection, over those of backpropagation."""
    inputs, widths, _, classes = case
    sizes = [a * b for a, b in zip([inputs, *widths], [*widths, classes], strict=True)]
    return 2 * sum(sizes) / (3 * sum(sizes) - sizes[0])


def measure(case, device, dtype, seconds, distributions=()):
    """Median seconds and peak bytes of a step, by way of training.

    `distributions` are those beside normal entries.
    """
    _, widths, _, classes = case
    stored = feedback_matrix(max(widths), classes, dtype=dtype, device=device)
    ways = {
        "backprop": Step(case, "backprop", device, dtype),
        "shallow": Step(case, "shallow", device, dtype),
        "DFA, matrix=": Step(case, "dfa", device, dtype, matrix=stored),
        "DFA, lean": Step(case, "dfa", device, dtype, lean=True),
        "DFA": Step(case, "dfa", device, dtype),
    }
    for distribution in distributions:
        way = Step(case, "dfa", device, dtype, distribution=distribution)
        ways[f"DFA, {distribution}"] = way
    for way in ways.values():
        for _ in range(2):
            way.run()
    peaks = {name: way.peak() for name, way in ways.items()}
    for way in ways.values():
        way.seconds.clear()
    end = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < end or len(ways["DFA"].seconds) < 5:
        for way in ways.values():
            way.run()
    return {name: statistics.median(way.seconds) for name, way in ways.items()}, peaks


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="of measuring, for each way of training"
    )
    parser.add_argument(
        "--distribution",
        nargs="*",
        choices=[name for name in DISTRIBUTIONS if name != "normal"],
        default=["hadamard"],
        help="to measure beside normal entries (default: hadamard)",
    )
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    origin = provenance.origin(device.type)  # before measuring: files may be edited meanwhile
    backend = registry.choose("training_step", device, None)  # the one DFA_KERNELS_BACKEND names
    print(f"{device}, {dtype}, {torch.get_num_threads()} threads, backend {backend}")
    measured = []
    for name, case in (CASES if device.type == "cpu" else CASES | ACCELERATOR_CASES).items():
        times, peaks = measure(case, device, dtype, arguments.seconds, arguments.distribution)
        print(f"\n{name}, batch {case[2]}; limit {limit(case):.3f}")
        for way, median in times.items():
            ratio, peak = median / times["backprop"], peaks[way] / 1e6
            print(f"  {way:14s} {1e3 * median:8.2f} ms  {ratio:6.3f} {peak:8.1f} MB")
        ratios = {way: median / times["backprop"] for way, median in times.items()}
        measured.append(
            {
                "case": name,
                "batch": case[2],
                "limit": limit(case),
                "seconds": times,
                "ratio": ratios,
                "peak_bytes": peaks,
            }
        )
    if arguments.json:
        settings = {"backend": backend, "dtype": arguments.dtype}
        settings |= {"threads": torch.get_num_threads(), "device_type": device.type}
        provenance.save(arguments.json, origin | settings | {"cases": measured})


if __name__ == "__main__":
    main()
