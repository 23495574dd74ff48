"""Data-parallel ranks must project with one matrix, or their gradients do not add up.

Nothing is sent but a digest, once. It is sent inside the forward pass of a DistributedDataParallel,
which all its ranks run.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel


def inside_data_parallel() -> bool:
    """Whether a DistributedDataParallel is in its forward pass."""
    return DistributedDataParallel._get_active_ddp_module() is not None


def check_equal(state: Tensor, description: str) -> None:
    """Raise on every rank of the DistributedDataParallel around this call unless all states agree.

    `state` says what makes the signals, in bytes, `description` in words.
    """
    parallel: Any = DistributedDataParallel._get_active_ddp_module()
    digest = hashlib.blake2b(bytes(state.tolist()), digest_size=7).digest()
    mine = torch.tensor(int.from_bytes(digest, "little"), device=parallel.device)
    group = parallel.process_group
    others = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(others, mine, group=group)
    values = torch.stack(others).tolist()
    unlike = [rank for rank, value in enumerate(values) if value != values[0]]
    if unlike:
        raise ValueError(
            "DFA: seed and whatever else makes the signals must be the same on all ranks of "
            f"DistributedDataParallel, got others on ranks {unlike} than on rank 0, and here "
            f"{description}"
        )
