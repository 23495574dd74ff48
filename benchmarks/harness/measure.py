"""Time and memory of a call, on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
CGROUPS = Path("/sys/fs/cgroup")
# In results, the key of the bytes that would have been needed.
MISSING = "does not fit"


def seconds(call: Callable[[], object], device_type: str, repeats: int = 1) -> float:
    """Mean seconds of a call, over `repeats` calls in a row; on a GPU by the GPU's own clock.

    Caches are not flushed between calls, as they are not in a training loop.
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
    """The result of a call, and its peak memory beyond what was in use before it.

    On a GPU it is the allocator's; on the CPU the resident memory of the process, from Linux.
    """
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = proc_bytes("/proc/self/status", "VmRSS")
    result = call()
    return result, max(proc_bytes("/proc/self/status", "VmHWM") - before, 0)


def available_bytes(device_type: str) -> int:
    """Memory that can still be allocated without swapping; file caches count as free."""
    if device_type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min([proc_bytes("/proc/meminfo", "MemAvailable"), *_allowed_bytes()])


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: by torch on a GPU, by torch on the CPU, or by NumPy."""
    is_named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_named or "can't allocate memory" in str(error)


def proc_bytes(path: str, key: str) -> int:
    """A number of bytes from a file in /proc, which counts in kB."""
    return next(int(line.split()[1]) * 1024 for line in _lines(path) if line.startswith(key + ":"))


def _allowed_bytes() -> Iterator[int]:
    """What this process's control group (version 2) and each of its parents still allow."""
    own = next((line[3:] for line in _lines("/proc/self/cgroup") if line.startswith("0::")), "/")
    group = CGROUPS / own.lstrip("/")
    for folder in (group, *group.parents):
        limit = folder / "memory.max"
        if limit.exists() and limit.read_text().strip() != "max":
            used = int((folder / "memory.current").read_text())
            stat = dict(line.split() for line in _lines(folder / "memory.stat"))
            yield max(int(limit.read_text()) - used + int(stat["inactive_file"]), 0)


def _lines(path: str | Path) -> list[str]:
    return Path(path).read_text().splitlines()
