"""Every process has its part of the tokens: signals need those tokens' errors and nothing else."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dfa_kernels import attach
from tests import processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

RANKS, SAMPLES, TOKENS, WIDTH, WORDS = 2, 3, 8, 6, 7


def gathered(part):
    """All tokens, whose gradients are summed over the processes on their way back."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    return DTensor.from_local(part, mesh, [Shard(1)]).full_tensor(grad_placements=[Partial()])


class Attention(nn.Module):
    """Own tokens attend to those of all processes, whose keys and values are gathered."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        query, key_value = self.qkv(x).split((WIDTH, 2 * WIDTH), -1)
        if dist.is_initialized():
            key_value = gathered(key_value)
        key, value = key_value.chunk(2, -1)
        return x + F.scaled_dot_product_attention(query, key, value)


def gradients(part=slice(None)):
    """Of the mean loss over all tokens, what those in `part` add to it."""
    torch.manual_seed(0)
    blocks = [Attention(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), Attention()]
    model = nn.Sequential(nn.Embedding(WORDS, WIDTH), *blocks, nn.Linear(WIDTH, WORDS)).double()
    attach(model, ["1", "3", "4"], batch_dims=(0, 1), seed=1)
    words = torch.randint(WORDS, (2, SAMPLES, TOKENS))
    x, y = words[:, :, part]
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
    (loss / (SAMPLES * TOKENS)).backward()
    return [parameter.grad for parameter in model.parameters()]


def worker(rank):
    own = TOKENS // RANKS
    grads = gradients(slice(rank * own, (rank + 1) * own))
    for grad in grads:
        dist.all_reduce(grad)
    return grads


def test_gradients_of_parts_of_a_sequence_add_up(tmp_path):
    wanted = gradients()
    for found in processes.run(worker, RANKS, tmp_path):
        torch.testing.assert_close(found, wanted)
