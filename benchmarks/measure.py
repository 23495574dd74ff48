"""Seconds and bytes of a call, on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def seconds(call: Callable[[], object], device_type: str, repeats: int = 1) -> float:
    """Seconds of one call, over `repeats` calls in a row; by the GPU's own clock on a GPU.

    Nothing is flushed between calls: what fits a cache stays there, as it does in a training loop.
    """
    if device_type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def peak_bytes(call: Callable[[], T], device_type: str) -> tuple[T, int]:
    """The result of a call, and the most memory that was in use during it beyond what was before.

    Of the allocator on a GPU; resident memory of the process on the CPU, from Linux.
    """
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not to be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _from_proc("/proc/self/status", "VmRSS")
    result = call()
    return result, max(_from_proc("/proc/self/status", "VmHWM") - before, 0)


def available_bytes(device_type: str) -> int:
    """Memory that can still be allocated without swapping."""
    if device_type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return _from_proc("/proc/meminfo", "MemAvailable")


def _from_proc(path: str, key: str) -> int:
    with open(path) as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
