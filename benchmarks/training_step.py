"""Time of a training step (forward, backward, optimizer) by DFA against backpropagation.

    python -m benchmarks.training_step [--device cpu] [--case TEXT] [--distribution hadamard]
                                       [--json FILE]

The ways of training one network take turns, in a new random order every round, so background load
affects all alike. A step that is short is repeated within a round. Times are medians, and ratios
medians of the ratios within rounds. The peak memory of a step is what it takes beyond the weights:
activations, signals and gradients. "matrix=" has a stored matrix: the difference between "DFA" and
it is the cost of generating entries. Each other distribution of `--distribution` is measured beside
"DFA", which has normal entries. Of small networks, the model and its loss are also compiled; such a
step is compared with a compiled one of backpropagation. "limit" is the fraction of
backpropagation's matrix products that remain when no gradient is carried back between layers: the
ratio that a step would reach if the projection and all elementwise work were free. A way of
training that fails, as one does that runs out of memory, is left out, and the others go on.
"""

import argparse
import gc
import random
import statistics
import time
import traceback
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import provenance, race
from benchmarks.harness.measure import MISSING, is_out_of_memory, peak_bytes, seconds
from dfa_kernels import DFA, DFALayer, feedback_matrix
from dfa_kernels.backends import registry
from dfa_kernels.stream import DISTRIBUTIONS


@dataclass(frozen=True)
class Perceptron:
    """Tanh layers of these widths, and an output layer."""

    inputs: int
    widths: tuple[int, ...]
    batch: int
    n: int
    compiled: bool = False  # whether to measure compiled steps too

    batch_dims = (0,)

    @property
    def widest(self):
        """The size of the largest layer that gets a signal."""
        return max(self.widths)

    def parts(self):
        """Modules in a row. A signal trains each but the last, which the error trains."""
        sizes = [self.inputs, *self.widths]
        hidden = [nn.Sequential(nn.Linear(*pair), nn.Tanh()) for pair in pairwise(sizes)]
        return [*hidden, nn.Linear(sizes[-1], self.n)]

    def data(self, device, dtype):
        """Inputs and targets."""
        x = torch.randn(self.batch, self.inputs, device=device, dtype=dtype)
        return x, torch.randint(self.n, (self.batch,), device=device)

    def products(self):
        """Multiplications for each row of the error: by backpropagation, by DFA."""
        sizes = [self.inputs, *self.widths, self.n]
        forward = [a * b for a, b in pairwise(sizes)]
        return 3 * sum(forward) - forward[0], 2 * sum(forward)


class Block(nn.Module):
    """A block of a transformer: causal attention, then two linear layers, around each a sum."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each [batch, heads, tokens, width / heads]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mixed(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


@dataclass(frozen=True)
class Transformer:
    """Embedded tokens through blocks, and an output layer that predicts a token at each.

    Backpropagation trains a block within from its signal. The last norm comes before the last
    signal, so the output layer needs no gradient of its input. Positions are not embedded.
    """

    blocks: int
    width: int
    heads: int
    tokens: int
    batch: int
    n: int

    batch_dims = (0, 1)  # each token has a row of the error
    compiled = False

    @property
    def widest(self):
        """The size of a block's output."""
        return self.width

    def parts(self):
        """Modules in a row. A signal trains each but the last, which the error trains."""
        parts = [Block(self.width, self.heads) for _ in range(self.blocks)]
        parts[0] = nn.Sequential(nn.Embedding(self.n, self.width), parts[0])
        parts[-1] = nn.Sequential(parts[-1], nn.LayerNorm(self.width))
        return [*parts, nn.Linear(self.width, self.n)]

    def data(self, device, dtype):
        """Tokens, and the next of each."""
        x = torch.randint(self.n, (self.batch, self.tokens + 1), device=device)
        return x[:, :-1], x[:, 1:]

    def products(self):
        """Multiplications for each row of the error: by backpropagation, by DFA.

        DFA saves one product, the gradient of the output layer's input: the norm that a block
        begins with learns too, from a gradient of its output. Tokens attend to half of all.
        """
        output = self.width * self.n
        block = 12 * self.width**2 + self.width * self.tokens
        all_products = 3 * (self.blocks * block + output)
        return all_products, all_products - output


PAPER = "3 x 800, n = 10"
CASES = {
    "8 x 1024, n = 10": Perceptron(784, (1024,) * 8, batch=512, n=10),
    "1 x 4096, n = 1000": Perceptron(784, (4096,), batch=512, n=1000),
} | {
    f"{PAPER}, batch {batch}": Perceptron(784, (800,) * 3, batch, n=10, compiled=True)
    for batch in (128, 32)
}
ACCELERATOR_CASES = {
    "24 x 4096, n = 1000": Perceptron(4096, (4096,) * 24, batch=4096, n=1000),
    "GPT-2 small, 1024 tokens, n = 50257": Transformer(
        blocks=12, width=768, heads=12, tokens=1024, batch=8, n=50_257
    ),
}


COMPILED = ", compiled"  # ends the name of a way of training


class Step:
    """One way of training one network; `run()` takes a step."""

    def __init__(self, case, device, dtype, mode, compiled=False, **arguments):
        torch.manual_seed(0)
        *hidden, output = case.parts()
        points = [DFALayer() for _ in hidden]
        self.dfa = DFA(points, batch_dims=case.batch_dims, **arguments)
        self.dfa.mode = mode
        layers = [module for pair in zip(hidden, points, strict=True) for module in pair]
        self.model = nn.Sequential(*layers, output, self.dfa)
        self.model.to(device, dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
        self.x, self.y = case.data(device, dtype)
        self.loss = _loss
        if compiled:
            self.loss = torch.compile(_loss, fullgraph=True, dynamic=False)

    def run(self):
        """Take a step."""
        self.optimizer.zero_grad()
        self.loss(self.model, self.x, self.y).backward()
        self.optimizer.step()

    def seconds(self, repeats=1):
        """Mean seconds of a step, over `repeats` in a row."""
        return seconds(self.run, self.x.device.type, repeats)

    def peak(self):
        """Peak bytes of a step beyond the weights."""
        self.optimizer.zero_grad()
        return peak_bytes(self.run, self.x.device.type)[1]


def _loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def limit(case):
    """Multiplications of a DFA step without its projection, over those of backpropagation."""
    by_backpropagation, by_dfa = case.products()
    return by_dfa / by_backpropagation


def measure(case, device, dtype, budget, distributions=()):
    """What a run's JSON holds of a case: by way of training, and why others were left out.

    `budget` is the seconds of measuring for each way, `distributions` are those beside normal
    entries.
    """
    new = partial(Step, case, device, dtype)

    def with_stored_matrix():
        matrix = feedback_matrix(case.widest, case.n, dtype=dtype, device=device)
        return new("dfa", matrix=matrix)

    from_seed = {"DFA": partial(new, "dfa")}
    for distribution in distributions:
        from_seed[f"DFA, {distribution}"] = partial(new, "dfa", distribution=distribution)
    ways = {
        "backprop": partial(new, "backprop"),
        "shallow": partial(new, "shallow"),
        "DFA, matrix=": with_stored_matrix,
        "DFA, lean": partial(new, "dfa", lean=True),
    } | from_seed
    if case.compiled:
        torch.compiler.reset()  # it gives up after 8 graphs of one function
        for name in ("backprop", *from_seed):
            ways[name + COMPILED] = partial(ways[name], compiled=True)
    steps, repeats, peaks, left_out = {}, {}, {}, {}

    def each(names, act):
        for name in list(names):
            try:
                act(name)
            except Exception as failure:
                if not is_out_of_memory(failure):
                    traceback.print_exc()
                left_out[name] = MISSING if is_out_of_memory(failure) else repr(failure)
                steps.pop(name, None)

    def begin(name):
        steps[name] = ways[name]()
        *_, last = (steps[name].seconds() for _ in range(3))
        repeats[name] = max(1, round(race.ROUND / last))

    each(ways, begin)
    each(steps, lambda name: peaks.update({name: steps[name].peak()}))
    times = {name: [] for name in steps}
    end, rounds = time.perf_counter() + budget * len(steps), 0
    shuffle = random.Random(0).shuffle
    while steps and (time.perf_counter() < end or rounds < 5):
        order = list(steps)
        shuffle(order)  # so that none always follows the same other one
        each(order, lambda name: times[name].append(steps[name].seconds(repeats[name])))
        rounds += 1
    return {
        "seconds": {name: statistics.median(times[name]) for name in steps},
        "ratio": {name: ratio(times, name) for name in steps if compared_with(name) in steps},
        "rounds": rounds,
        "peak_bytes": {name: peaks[name] for name in steps},
        "left_out": left_out,
    }


def compared_with(way):
    """The way of training by backpropagation that a way is compared with."""
    return "backprop" + COMPILED * way.endswith(COMPILED)


def ratio(times, way):
    """The median, over the rounds, of a step as a fraction of one by backpropagation."""
    pairs = zip(times[way], times[compared_with(way)], strict=True)
    return statistics.median(own / theirs for own, theirs in pairs)


def show(result):
    """Print what was measured of a case."""
    print(f"\n{result['case']}, batch {result['batch']}; limit {result['limit']:.3f}")
    for way, median in result["seconds"].items():
        ratio, peak = result["ratio"].get(way, float("nan")), result["peak_bytes"][way] / 1e6
        print(f"  {way:24s} {1e3 * median:8.2f} ms  {ratio:6.3f} {peak:8.1f} MB")
    for way, reason in result["left_out"].items():
        print(f"  {way:24s} left out: {reason}", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--case", default="", help="only cases with this text in their name")
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
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    # The large ones first, for a run that is cut short.
    known = CASES if device.type == "cpu" else ACCELERATOR_CASES | CASES
    cases = {name: case for name, case in known.items() if options.case in name}
    if not cases:
        parser.error(f"no case has {options.case!r} in its name; there are: {'; '.join(known)}")
    origin = provenance.origin(device.type)  # before measuring: files may be edited meanwhile
    backend = registry.choose("training_step", device, None)  # the one DFA_KERNELS_BACKEND names
    print(f"{device}, {dtype}, {torch.get_num_threads()} threads, backend {backend}")
    settings = {"backend": backend, "dtype": options.dtype}
    settings |= {"threads": torch.get_num_threads(), "device_type": device.type}
    measured = []
    for name, case in cases.items():
        facts = {"case": name.removesuffix(f", batch {case.batch}"), "batch": case.batch}
        facts["limit"] = limit(case)
        result = facts | measure(case, device, dtype, options.seconds, options.distribution)
        show(result)
        measured.append(result)
        if options.json:  # after every case, so that a run that is killed keeps its results
            finished = len(measured) == len(cases)
            everything = {"finished": finished, "cases": measured}
            provenance.save(options.json, origin | settings | everything)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    failed = any(why != MISSING for case in measured for why in case["left_out"].values())
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
