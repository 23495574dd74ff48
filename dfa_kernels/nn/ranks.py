"""Ranks that train one model must project with one matrix, or their gradients do not add up.

Nothing is sent but a digest, once. It is sent inside the forward pass of a DistributedDataParallel,
or after that of a model with sharded parameters, which all its ranks run.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def inside_data_parallel() -> bool:
    """Whether a DistributedDataParallel is in its forward pass."""
    return DistributedDataParallel._get_active_ddp_module() is not None


def inside_search_for_unused() -> bool:
    """Whether one is that follows the graph from its outputs to find what parameters they use."""
    parallel: Any = DistributedDataParallel._get_active_ddp_module()
    return parallel is not None and parallel.find_unused_parameters


@torch.compiler.assume_constant_result
def fully_sharded() -> bool:
    """Whether anything in this process was given to `fully_shard`, in a group that still is."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # its import takes a second
    if fsdp is None or not distributed.is_initialized():
        return False
    # It makes a class for every class of modules that it meets. torch has one that is no module's.
    kinds = fsdp.FSDPModule.__subclasses__()
    kinds += [one for kind in kinds for one in kind.__subclasses__()]
    return any(issubclass(kind, nn.Module) for kind in kinds)


def fully_sharded_modules(model: nn.Module) -> Iterator[Any]:
    """The modules of a model that were given to `fully_shard`."""
    kind: Any = sys.modules["torch.distributed.fsdp"].FSDPModule
    return (module for module in model.modules() if isinstance(module, kind))


def check_data_parallel(state: Tensor, description: str) -> None:
    """Raise on every rank of the DistributedDataParallel around this call unless all states agree.

    `state` says what makes the signals, in bytes, `description` in words.
    """
    parallel: Any = DistributedDataParallel._get_active_ddp_module()
    _check_equal(state, description, parallel.process_group, parallel.device)


def check_meshes(meshes: Iterable[Any], state: Tensor, description: str) -> None:
    """Raise on every rank unless all states agree of the ranks of every dimension of device meshes.

    All of these ranks must call it.
    """
    for mesh in meshes:
        for dim in range(mesh.ndim):
            device = torch.device(mesh.device_type)
            _check_equal(state, description, mesh.get_group(dim), device)


def meshes_of(model: nn.Module) -> list[Any]:
    """The device meshes of a model's parameters, each once, in the model's order."""
    found: dict[Any, None] = {}
    for parameter in model.parameters():
        if (mesh := getattr(parameter, "device_mesh", None)) is not None:
            found[mesh] = None
    if fully_sharded():
        for module in fully_sharded_modules(model):
            # Parameters that are gathered just now are plain tensors, and torch has no public way
            # to ask for their mesh. Before torch 2.12 a module has one group of them.
            state = module._get_fsdp_state()
            several = getattr(state, "_fsdp_param_groups", None)
            for group in [state._fsdp_param_group] if several is None else several:
                if group is not None:
                    found[group.mesh_info.mesh] = None
    return list(found)


def _check_equal(state: Tensor, description: str, group: Any, device: torch.device) -> None:
    digest = hashlib.blake2b(bytes(state.tolist()), digest_size=7).digest()
    mine = torch.tensor(int.from_bytes(digest, "little"), device=device)
    others = [mine.clone() for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(others, mine, group=group)
    values = torch.stack(others).tolist()
    ranks = distributed.get_process_group_ranks(group)
    unlike = [rank for rank, value in zip(ranks, values, strict=True) if value != values[0]]
    if unlike:
        raise ValueError(
            "DFA: seed and layers, and whatever else makes the signals, must be the same on all "
            f"ranks of a model, got others on ranks {unlike} than on rank {ranks[0]}, and here "
            f"{description}; where a state was loaded on rank 0 to be broadcast, model.dfa = "
            "handle.dfa before that has an attached DFA's broadcast too"
        )
