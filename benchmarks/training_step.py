"""Time of a training step (forward, backward, optimizer) by DFA against backpropagation.

    python -m benchmarks.training_step [--device cpu] [--json FILE]

The ways of one case take turns, step by step, so background load affects all alike. Medians and
their ratios to backpropagation come from the same run. Beside them is the peak memory of a step
beyond the weights: activations, signals and gradients. "matrix=" has a stored matrix; what "DFA"
takes longer is the cost of generating entries. "limit" is the ratio that a free projection and free
elementwise work would reach: the share of backpropagation's matrix products that is left when no
gradient is carried back between layers.
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

CASES = {  # inputs, hidden layers, batch, n
    "8 x 1024, n = 10": (784, [1024] * 8, 512, 10),
    "1 x 4096, n = 1000": (784, [4096], 512, 1000),
}
ACCELERATOR_CASES = {"24 x 4096, n = 1000": (4096, [4096] * 24, 4096, 1000)}


class Step:
    """One way of training one network; `run()` is a step, timed."""

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
        """One step; returns its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    def peak(self):
        """The most bytes that a step takes beyond the weights."""
        self.optimizer.zero_grad()
        return peak_bytes(self.run, self.x.device.type)[1]


def limit(case):
    """Multiplications of a DFA step without its projection over those of a backprop step."""
    inputs, widths, _, classes = case
    sizes = [a * b for a, b in zip([inputs, *widths], [*widths, classes], strict=True)]
    return 2 * sum(sizes) / (3 * sum(sizes) - sizes[0])


def measure(case, device, dtype, seconds):
    """Median seconds of a step, and its peak of bytes, by way of training."""
    _, widths, _, classes = case
    stored = feedback_matrix(max(widths), classes, dtype=dtype, device=device)
    ways = {
        "backprop": Step(case, "backprop", device, dtype),
        "shallow": Step(case, "shallow", device, dtype),
        "DFA, matrix=": Step(case, "dfa", device, dtype, matrix=stored),
        "DFA, lean": Step(case, "dfa", device, dtype, lean=True),
        "DFA": Step(case, "dfa", device, dtype),
    }
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
    parser.add_argument("--seconds", type=float, default=6.0, help="for each way of training")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    origin = provenance.origin(device.type)  # now, so that it is of what is measured
    backend = registry.choose("training_step", device, None)  # DFA_KERNELS_BACKEND's, if set
    print(f"{device}, {dtype}, {torch.get_num_threads()} threads, backend {backend}")
    measured = []
    for name, case in (CASES if device.type == "cpu" else CASES | ACCELERATOR_CASES).items():
        times, peaks = measure(case, device, dtype, arguments.seconds)
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
