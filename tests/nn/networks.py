"""Small networks for the trainer's tests, eq. 3 by hand, and counters of work and memory."""

import math
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfa_kernels import DFA, DFALayer, feedback_matrix
from dfa_kernels.nn import INDEPENDENT_ROWS

INPUTS, CLASSES, BATCH = 8, 5, 6
WIDTHS = (16, 12, 16)


class Perceptron(nn.Module):
    """Fully connected, tanh; keeps the last pass's activations in `hidden` if `keep`."""

    def __init__(self, widths=WIDTHS, keep=False, watch=False, **arguments):
        super().__init__()
        pairs = zip((INPUTS, *widths), widths, strict=False)
        self.linears = nn.ModuleList(nn.Linear(*pair) for pair in pairs)
        self.points = nn.ModuleList(DFALayer(f"h{i}") for i in range(len(widths)))
        self.output = nn.Linear(widths[-1], CLASSES)
        self.dfa = DFA(self.points, **arguments)
        self.keep, self.hidden = keep, []
        if watch:
            self.dfa.watch(self)

    def forward(self, x, skip=(), fail_before=None):
        self.hidden = []
        for i, (linear, point) in enumerate(zip(self.linears, self.points, strict=True)):
            if i == fail_before:
                raise KeyboardInterrupt
            x = torch.tanh(linear(x))
            if self.keep:
                self.hidden.append(x)
            if i not in skip:
                x = point(x)
        return self.dfa(self.output(x))


class Convolutions(nn.Module):
    """Two convolutions, each a layer of C*H*W, then a linear classifier."""

    inputs = (BATCH, 2, 6, 6)

    def __init__(self, keep=False, **arguments):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3)
        self.points = nn.ModuleList([DFALayer(), DFALayer()])
        self.output = nn.Linear(16, CLASSES)
        self.dfa = DFA(self.points, **arguments)
        self.hidden = []

    def forward(self, x):
        first = torch.tanh(self.first(x))
        second = torch.tanh(self.second(self.points[0](first)))
        self.hidden = [first, second]
        return self.dfa(self.output(self.points[1](second).flatten(1)))


class Tokens(nn.Module):
    """A sequence model: every token is a row of the activations and of the error."""

    inputs = (BATCH, 4, INPUTS)

    def __init__(self, keep=False, **arguments):
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, 16), nn.Linear(16, 12)
        self.points = nn.ModuleList([DFALayer(), DFALayer()])
        self.output = nn.Linear(12, CLASSES)
        self.dfa = DFA(self.points, batch_dims=(0, 1), **arguments)
        self.hidden = []

    def forward(self, x):
        first = torch.tanh(self.first(x))
        second = torch.tanh(self.second(self.points[0](first)))
        self.hidden = [first, second]
        return self.dfa(self.output(self.points[1](second)))


class Block(nn.Module):
    """A residual block that returns a tuple, as transformer blocks do."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x))), None


class Stack(nn.Module):
    """A transformer-like stack with its loss inside; returns a mapping."""

    def __init__(self, width=12, blocks=3):
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens, labels=None):
        x = self.embedding(tokens)
        for block in self.blocks:
            x, _ = block(x)
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"logits": logits, "loss": loss}


class Multiplied:
    """Imitates stored matrices: one for shared rows, one per layer for independent rows."""

    def __init__(self, *matrices, name="mine"):
        self.matrices, self.name = matrices, name

    def project(self, error, layers, dtype):
        return [
            (error @ self.matrices[first // INDEPENDENT_ROWS][:size].T * scale).to(dtype)
            for first, size, scale in zip(*layers, strict=True)
        ]

    def describe(self):
        return {"name": self.name, "shapes": [tuple(matrix.shape) for matrix in self.matrices]}


class Learned(nn.Module):
    """A source that is a module, like one that learns its matrix."""

    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix.clone())

    def project(self, error, layers, dtype):
        return Multiplied(self.matrix).project(error, layers, dtype)

    def describe(self):
        return {}


def perceptron(seed=None, dtype=torch.float32, **arguments):
    """A `Perceptron` with weights drawn from torch's seed 0."""
    torch.manual_seed(0)
    return Perceptron(seed=seed, **arguments).to(dtype)


def batch(dtype=torch.float32, seed=1, size=BATCH):
    """Inputs and classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, INPUTS, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (size,), generator=generator)


def backward(model, x, y, call=None, **arguments):
    """Runs one forward and backward pass from zero gradients; returns clones of the gradients."""
    model.zero_grad()
    F.cross_entropy((model if call is None else call)(x, **arguments), y).backward()
    return gradients(model)


def signals(error, sizes, **arguments):
    """The signals that activations [M, size] get for an error [M, n]."""
    points = [DFALayer() for _ in sizes]
    dfa = DFA(points, **arguments)
    hidden = [torch.zeros(len(error), size, requires_grad=True) for size in sizes]
    for point, h in zip(points, hidden, strict=True):
        point(h)
    dfa(torch.zeros_like(error, requires_grad=True)).backward(error)
    return [h.grad for h in hidden]


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def train(model, steps=5, call=None, lr=0.1):
    """Trains with Adam on a fixed sequence of batches; returns the parameters."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        x, y = batch(next(model.parameters()).dtype, seed=step)
        optimizer.zero_grad()
        F.cross_entropy((model if call is None else call)(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(ours, theirs, **tolerance):
    """Lists of tensors or None, equal bit for bit unless a tolerance is given."""
    for one, other in zip(ours, theirs, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0, "atol": 0}))


def by_hand(model, x, y, *, rows, seed, shared=True, distribution="normal", normalization="layer"):
    """The parameters' gradients by eq. 3: B_i e from a materialised matrix, then each layer alone.

    rows(tensor) -> [M, size] flattens an activation or the output.
    """
    model.dfa.mode = "shallow"  # each activation's graph ends at the layer before
    output = model(x)
    model.dfa.mode = "dfa"
    loss = F.cross_entropy(output.flatten(0, -2), y.flatten())
    (error,) = torch.autograd.grad(loss, output, retain_graph=True)
    e = rows(error)  # [M, n]
    sizes = [rows(h).shape[1] for h in model.hidden]
    ends = [(loss, None)]
    for index, (h, size) in enumerate(zip(model.hidden, sizes, strict=True)):
        matrix = feedback_matrix(
            size,
            e.shape[1],
            seed=seed,
            distribution=distribution,
            row_offset=0 if shared else index * INDEPENDENT_ROWS,
            dtype=torch.float64,
        )
        length = size if normalization == "layer" else max(sizes)
        signal = e.double() @ matrix.T / math.sqrt(length * e.shape[1])
        ends.append((h, signal.to(h.dtype).reshape(h.shape)))
    parameters = list(model.parameters())
    expected = [None] * len(parameters)
    for end, signal in ends:
        found = torch.autograd.grad(end, parameters, signal, allow_unused=True)
        expected = [old if new is None else new for old, new in zip(expected, found, strict=True)]
    return expected


class Calls(TorchDispatchMode):
    """Counts products and projections; a projection counts as one, whatever it runs."""

    def __init__(self):
        super().__init__()
        self.products = self.projections = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.projections += name.startswith("dfa_kernels::project")
        self.products += name in ("aten::mm", "aten::addmm", "aten::bmm")
        return func(*args, **(kwargs or {}))


class Allocations(TorchDispatchMode):
    """Measures the peak of live bytes that operators under it allocate."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            t.untyped_storage()._cdata
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage not in self.known:
                    self.known.add(storage)
                    self._count(storage.nbytes())
                    weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, bytes_):
        self.now += bytes_
        self.peak = max(self.peak, self.now)
