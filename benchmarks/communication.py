"""What every process sends in a training step of a transformer, by backpropagation and by DFA.

    python -m benchmarks.communication [--json FILE]

For each kind of parallelism of torch.distributed one process runs its part of a step in a group
that sends nothing, and every collective is counted. Bytes are those that a process sends where
collectives run in a ring: of r processes, (r - 1)/r of the whole tensor in an all-gather or a
reduce-scatter, twice that in an all-reduce. What loss_parallel sends for its softmax, some numbers
a token, is left out. A feedback matrix is never sent: a seed makes it. In DFA a signal goes to each
block's output. DistributedDataParallel is not run: it sends the gradients of all parameters, by
both.
"""

import argparse
import collections
import contextlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import provenance
from dfa_kernels import attach

PROCESSES = 4
LAYERS, WIDTH, HEADS, VOCABULARY = 4, 256, 4, 8192
BATCH, TOKENS = 4, 128
# Of a ring: how often a process sends the whole tensor, but for its own part.
ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "broadcast": 1}


class Attention(nn.Module):
    """Causal attention, of the heads that this process has."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.mixed = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        heads = (
            linear(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.mixed(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two linear layers, around each a sum."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A language model whose first and last layers are those of its vocabulary."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def sharded(model, mesh):
    """Parameters in parts, gathered block by block."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def head_parallel(model, mesh):
    """The output layer by its vocabulary, the rest whole."""
    plan = {"head": ColwiseParallel(use_local_output=False)}
    return parallelize_module(model, mesh, plan)


def tensor_parallel(model, mesh, between=None):
    """All layers by their features; `between` blocks activations are whole, or split by tokens."""
    between = between or Replicate()
    columns, rows = ColwiseParallel(), RowwiseParallel(output_layouts=between)
    gather = PrepareModuleInput(input_layouts=between, desired_input_layouts=Replicate())
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, use_local_output=False),
    }
    for index in range(LAYERS):
        styles = {"attention": gather, "up": ColwiseParallel(input_layouts=between)}
        styles |= {f"attention.{name}": columns for name in ("query", "key", "value")}
        styles |= dict.fromkeys(("attention.mixed", "down"), rows)
        if between.is_shard():
            styles |= dict.fromkeys(("norm1", "norm2"), SequenceParallel())
        plan |= {f"blocks.{index}.{name}": style for name, style in styles.items()}
    if between.is_shard():
        plan["norm"] = SequenceParallel()
    return parallelize_module(model, mesh, plan)


def sequence_parallel(model, mesh):
    """The same, and tokens between the blocks."""
    return tensor_parallel(model, mesh, Shard(1))


KINDS = {
    "fully_shard": sharded,
    "head by its vocabulary": head_parallel,
    "tensor parallel": tensor_parallel,
    "tensor and sequence parallel": sequence_parallel,
}


class Sent(TorchDispatchMode):
    """Counts collectives, and the bytes that a process sends in them."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()
        self.bytes = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        namespace, name = function.name().split("::")
        if namespace in ("_c10d_functional", "c10d"):
            name = (
                name.strip("_")
                .replace("allreduce", "all_reduce")
                .replace("allgather", "all_gather")
            )
            for kind, rounds in ROUNDS.items():
                if name.startswith(kind):
                    whole = max(map(size, (args, result)))
                    self.calls[kind] += 1
                    self.bytes[kind] += rounds * whole * (PROCESSES - 1) // PROCESSES
        return result


def size(values):
    """The bytes of the tensors in nested values."""
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    return sum(map(size, values)) if isinstance(values, (list, tuple)) else 0


def step(kind, points):
    """The collectives of a forward and of a backward pass."""
    model = Transformer()
    if points:
        attach(model, list(model.blocks), batch_dims=(0, 1), seed=0)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = KINDS[kind](model, mesh)
    tokens = torch.randint(VOCABULARY, (BATCH, TOKENS))
    with contextlib.nullcontext() if kind == "fully_shard" else loss_parallel():
        for _ in range(2):  # the first step sets up and compares the ranks
            found = []
            with Sent() as forward:
                logits = model(tokens)
                loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            with Sent() as backward:
                loss.backward()
            found = [forward, backward]
    return [{"calls": dict(one.calls), "bytes": dict(one.bytes)} for one in found]


def measure():
    """All kinds, by backpropagation and by DFA."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=PROCESSES)
    try:
        measured = []
        for kind in KINDS:
            ways = {"backprop": step(kind, False), "DFA": step(kind, True)}
            measured.append({"kind": kind, "what": KINDS[kind].__doc__, **ways})
        return measured
    finally:
        distributed.destroy_process_group()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write what was counted to this file")
    options = parser.parse_args(arguments)
    origin = provenance.origin("cpu")
    torch.manual_seed(0)
    parameters = sum(parameter.numel() for parameter in Transformer().parameters())
    model = {"layers": LAYERS, "width": WIDTH, "vocabulary": VOCABULARY, "parameters": parameters}
    settings = {"processes": PROCESSES, "tokens": BATCH * TOKENS, "model": model}
    kinds = measure()
    for one in kinds:
        print(one["kind"])
        for way in ("backprop", "DFA"):
            for phase, found in zip(("forward", "backward"), one[way], strict=True):
                total = sum(found["bytes"].values()) / 1e6
                print(f"  {way:9s} {phase:9s} {total:8.2f} MB  {found['calls']}")
    if options.json:
        provenance.save(options.json, origin | settings | {"kinds": kinds})


if __name__ == "__main__":
    main()
