"""Memory and time of the end of a language model: output layer, loss and signals.

    python -m benchmarks.large_vocabulary [--device cpu] [--tokens 1024 2048 4096 8192 16384]
                                          [--vocabulary 50257] [--width 768] [--json FILE]

"whole" computes F.cross_entropy of all logits, "chunks" is `DFA.linear_cross_entropy`, by
backpropagation and by DFA with each kind of signals. A step is forward, loss and backward, without
an optimizer. The network is what GPT-2 small has beside the insides of its blocks: 12 residual
branches, of which only the biases are left, a norm and the output layer. A point after each branch
gets a signal [tokens, width], which all share.

So a step holds little but what is measured: the gradient of the output layer's weights [vocabulary,
width], a few tensors [tokens, width] (the norm's input and output, the gradient of the output, the
signal), and what the way makes of logits. Its memory is the peak beyond the weights and the input:
resident memory on the CPU, the allocator's on a GPU.

First both losses must give the same gradients for the smallest number of tokens. Then, for each
number of tokens, every way takes a step whose memory is measured, and a few more for time, in
turns. A way whose steps are long has only the first. One that does not fit into memory is left out.

"limit" is the time of the matrix products alone: logits, the gradients of the weights and of the
output layer's input, and the projection to signals where it multiplies, unless it is the second of
these gradients, as with `OutputWeights`. Their rate is the best that torch.mm reaches in them in
this run, or that a whole step does.
"""

import argparse
import importlib.util
import statistics
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import provenance
from benchmarks.harness.gate import Wrong
from benchmarks.harness.measure import (
    MISSING,
    available_bytes,
    empty_pool,
    is_out_of_memory,
    peak_bytes,
    return_freed_memory,
    seconds,
)
from dfa_kernels import DFA, DFALayer
from dfa_kernels.nn import OutputWeights
from dfa_kernels.stream import DISTRIBUTIONS

BACKPROP, WEIGHTS = "backprop", "output weights"  # beside distributions
LOSSES = ("whole", "chunks")
# Of the gradients by both losses, relative to their norm.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class Network(nn.Module):
    """Biases in residual branches, a norm and an output layer."""

    def __init__(self, width, vocabulary, branches):
        super().__init__()
        self.biases = nn.ParameterList(torch.zeros(width) for _ in range(branches))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x, points):
        """The output layer's input; [tokens, width] of both. The points are those of branches."""
        for bias, point in zip(self.biases, points, strict=True):
            x = x + point(bias.expand_as(x))
        return self.norm(x)


class Way:
    """A way of training the network, whose weights all ways share."""

    def __init__(self, network, signals, loss):
        self.network, self.signals, self.loss = network, signals, loss
        self.points = [DFALayer() for _ in network.biases]
        if signals == WEIGHTS:
            self.dfa = DFA(self.points, matrix=OutputWeights(network.head))
        elif signals == BACKPROP:
            self.dfa = DFA(self.points)
            self.dfa.mode = "backprop"
        else:
            self.dfa = DFA(self.points, distribution=signals)

    def step(self, x, target):
        """Add to the gradients; the loss."""
        hidden, weight = self.network(x, self.points), self.network.head.weight
        if self.loss == "chunks":
            loss = self.dfa.linear_cross_entropy(hidden, weight, target)
        else:
            loss = F.cross_entropy(self.dfa(F.linear(hidden, weight)), target)
        loss.backward()
        return loss.detach()

    def gradients(self, x, target):
        """All gradients, and the loss, of a step."""
        self.network.zero_grad()
        loss = self.step(x, target)
        return [loss, *(parameter.grad for parameter in self.network.parameters())]

    def measure(self, x, target):
        """Seconds and peak bytes of a step."""
        self.network.zero_grad()
        empty_pool()
        step = partial(self.step, x, target)
        return peak_bytes(partial(seconds, step, x.device.type), x.device.type)

    def products(self, tokens):
        """Multiplications that a step cannot do without."""
        count = 3 if self.signals in (BACKPROP, WEIGHTS, "hadamard") else 4
        return count * tokens * self.network.head.weight.numel()

    def least_bytes(self, tokens):
        """A part of the memory that a step takes."""
        weight = self.network.head.weight
        # The logits, their logarithmic softmax and its gradient live at once.
        logits = 3 * tokens * len(weight) if self.loss == "whole" else 0
        return (weight.numel() + logits) * weight.itemsize


def data(network, tokens):
    """Input [tokens, width] and targets [tokens]."""
    weight = network.head.weight
    vocabulary, width = weight.shape
    x = torch.randn(tokens, width, dtype=weight.dtype, device=weight.device)
    return x, torch.randint(vocabulary, (tokens,), device=weight.device)


def compare(ours, theirs, x, target):
    """Raise Wrong unless two ways have the same loss and gradients."""
    got, wanted = (way.gradients(x, target) for way in (ours, theirs))
    for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
        error = (one - other).double().norm() / other.double().norm()
        if not error <= TOLERANCES[x.dtype]:
            what = f"gradient {index - 1}" if index else "the loss"
            raise Wrong(f"{what} differs from that of whole logits by {error:.1e} of its norm")


def product_rate(x, weight):
    """Multiplications a second: the best of torch.mm in a step's products, of all tokens."""
    logits = x @ weight.T
    inputs, weights = torch.empty_like(x), torch.empty_like(weight)
    calls = (
        partial(torch.mm, x, weight.T, out=logits),
        partial(torch.mm, logits, weight, out=inputs),
        partial(torch.mm, logits.T, x, out=weights),
    )
    least = min(seconds(call, x.device.type) for call in calls for _ in range(2))
    return x.numel() * len(weight) / least


class Race:
    """All ways of training one network; those that failed stay out."""

    def __init__(self, network, signals, rounds, long):
        self.network, self.rounds, self.long = network, rounds, long
        self.ways = [Way(network, one, loss) for one in signals for loss in LOSSES]
        self.failed = {}
        self.rate = 0.0

    def check(self, tokens):
        """Compare both losses of all signals, which also warms up."""
        x, target = data(self.network, tokens)
        for theirs, ours in zip(self.ways[::2], self.ways[1::2], strict=True):
            if theirs.least_bytes(tokens) < available_bytes(x.device.type):
                self._try(ours, tokens, partial(compare, ours, theirs, x, target))
        self.network.zero_grad()

    def run(self, tokens):
        """What was measured of each way with so many tokens."""
        x, target = data(self.network, tokens)
        device_type, weight = x.device.type, self.network.head.weight.detach()
        times, peaks, left_out = {}, {}, {}
        for way in self.ways:
            if way in self.failed:
                left_out[way] = {"failed": self.failed[way]}
            elif (least := way.least_bytes(tokens)) > available_bytes(device_type):
                left_out[way] = {MISSING: least}
            else:
                times[way] = []
        if self.ways[0].least_bytes(tokens) < available_bytes(device_type):
            self.rate = max(self.rate, product_rate(x, weight))

        def measured(way):
            time, peaks[way] = way.measure(x, target)
            times[way].append(time)

        def timed(way):
            self.network.zero_grad()
            times[way].append(seconds(partial(way.step, x, target), device_type))

        for act in (measured, *[timed] * self.rounds):
            for way in list(times):
                if act is timed and times[way][0] > self.long:
                    continue
                if why := self._try(way, tokens, partial(act, way)):
                    left_out[way] = why
                    del times[way]
        self.network.zero_grad()
        found = []
        for way in self.ways:
            row = {"signals": way.signals, "loss": way.loss}
            if way in times:
                rounds = times[way][1:] or times[way]  # the first maps memory
                products = way.products(tokens)
                self.rate = max(self.rate, products / min(times[way]))
                row |= {"seconds": statistics.median(rounds), "rounds": len(rounds)}
                found.append(row | {"peak": peaks[way], "products": products})
            else:
                found.append(row | left_out[way])
        return {
            "tokens": tokens,
            "logit_bytes": tokens * len(weight) * weight.itemsize,
            "ways": found,
        }

    def _try(self, way, tokens, act):
        """Act; why that failed, in types of JSON. What is not for want of memory stays out."""
        try:
            act()
        except Exception as failure:
            if is_out_of_memory(failure):
                return {MISSING: way.least_bytes(tokens)}
            traceback.print_exc()
            self.failed[way] = f"{type(failure).__name__}: {failure}"
            return {"failed": self.failed[way]}
        return None


def show(case, rate):
    """Print what was measured with one number of tokens."""
    print(f"\n{case['tokens']:,} tokens; logits {case['logit_bytes'] / 1e6:,.0f} MB")
    for row in case["ways"]:
        name = f"  {row['signals']:15s} {row['loss']:7s}"
        if "seconds" in row:
            limit = row["products"] / rate
            print(
                f"{name} {row['seconds']:8.3f} s ({row['rounds']}), limit {limit:8.3f} s, "
                f"{row['peak'] / 1e6:10,.1f} MB"
            )
        else:
            print(name, row.get("failed", MISSING))
    print(end="", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=[str(one)[6:] for one in TOLERANCES])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**n for n in range(10, 15)])
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--branches", type=int, default=12, help="with a point each")
    parser.add_argument(
        "--distribution",
        nargs="*",
        choices=DISTRIBUTIONS,
        default=["hadamard", "normal"],
        help="of DFA's signals, beside OutputWeights (default: hadamard normal)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of steps for time")
    parser.add_argument(
        "--long", type=float, default=20.0, help="seconds; a longer step is taken only once"
    )
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args(arguments)
    origin = provenance.origin(torch.device(options.device).type)  # before measuring
    settings = {name: getattr(options, name) for name in ("dtype", "vocabulary", "width")}
    settings |= {"branches": options.branches, "threads": torch.get_num_threads()}
    print(f"{options.device}, {settings}")
    torch.manual_seed(0)
    network = Network(options.width, options.vocabulary, options.branches)
    network.to(options.device, getattr(torch, options.dtype))
    race = Race(network, [BACKPROP, *options.distribution, WEIGHTS], options.rounds, options.long)
    lengths = sorted(options.tokens)
    race.check(lengths[0])
    cases = []
    for tokens in lengths:
        cases.append(race.run(tokens))
        show(cases[-1], race.rate)
        finished = len(cases) == len(lengths)
        results = origin | settings | {"finished": finished, "rate": race.rate, "cases": cases}
        if options.json:  # now, so that a run that is killed keeps its results
            provenance.save(options.json, results)
    if options.json and importlib.util.find_spec("matplotlib"):
        from benchmarks.report import figures

        print(*(f"drawn: {path}" for path in figures.draw(results, options.json.parent)))
    return int(bool(race.failed))


if __name__ == "__main__":
    return_freed_memory()
    raise SystemExit(main())
