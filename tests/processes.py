"""Runs a function in several processes that form one group of `torch.distributed`, over gloo.

    def worker(rank, scale):  # at the top level of a test module, so that it pickles
        ...
        return {"gradients": ...}  # tensors, numbers and strings in lists, tuples and dicts

    def test_it(tmp_path):
        first, second = processes.run(worker, 2, tmp_path, 3.0)

A server process imports torch and the library once, and each rank is a fork of it. Warnings are
errors in the ranks too. A rank that hangs says where, and ends.
"""

import contextlib
import datetime
import faulthandler
import importlib
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 300  # seconds, for what takes a second or two on an idle machine

_PRELOADED = [
    "pytest",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.testing._internal.distributed.fake_pg",
    "dfa_kernels",
]


def run(worker, world, folder, *args, group=True):
    """What `worker(rank, *args)` returned on each of `world` ranks; `group` says to form one."""
    mp.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    place = (worker.__module__, worker.__qualname__)
    mp.start_processes(
        _rank, (place, world, str(folder), group, args), nprocs=world, start_method="forkserver"
    )
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


@contextlib.contextmanager
def fake_group(world, rank=0):
    """A group of which this process is one rank, and whose collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rank(rank, place, world, folder, group, args):
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*barrier.*device")
    module, name = place
    worker = getattr(importlib.import_module(module), name)
    if group:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=LIMIT),
        )
    try:
        torch.save(worker(rank, *args), f"{folder}/{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
