"""Time and memory of a call, on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from dfa_kernels.backends import registry

T = TypeVar("T")
CGROUPS = Path("/sys/fs/cgroup")
# In results, the key of the bytes that would have been needed.
MISSING = "does not fit"
# Options of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, so that results go to memory in use.

    Torch's allocator does so on a GPU. On the CPU a large result would otherwise go to fresh pages
    at every call, and Linux would take longer to hand them out than a kernel to write them.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Let this process return the memory of a large tensor as soon as that is freed.

    Otherwise resident memory depends on which holes of the heap a tensor happens to go to. Small
    ones stay in the heap.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


@contextmanager
def stream_writes(target: torch.Tensor, threads: int) -> Iterator[Callable[[], object]]:
    """A call that writes all of `target` with streaming stores, on the CPU.

    It is the C library's memcpy, a part of the tensor for each thread. Large copies go past the
    caches, and the source costs no bandwidth: pages that were never written are all one page of
    zeros, which stays in a cache.
    """
    copy = ctypes.CDLL(None).memcpy
    copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    size = target.nbytes // threads
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    zeros = torch.frombuffer(pages, dtype=torch.uint8)
    parts = [(target.data_ptr() + i * size, zeros.data_ptr(), size) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        yield lambda: list(pool.map(lambda part: copy(*part), parts))


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

    On a GPU it is the allocator's; on the CPU the resident memory of the process, from Linux, and
    what the result takes of the memory that our kernels keep for large signals.
    """
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    _trim_heap()  # it would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, idle = proc_bytes("/proc/self/status", "VmRSS"), _idle_bytes()
    result = call()
    peak = max(proc_bytes("/proc/self/status", "VmHWM") - before, 0)
    return result, peak + max(idle - _idle_bytes(), 0)


def available_bytes(device_type: str) -> int:
    """Memory that can still be allocated without swapping; file caches count as free."""
    if device_type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    _trim_heap()
    return min([proc_bytes("/proc/meminfo", "MemAvailable"), *_allowed_bytes()])


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: by torch on a GPU, by torch on the CPU, or by NumPy."""
    is_named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_named or "can't allocate memory" in str(error)


def proc_bytes(path: str, key: str) -> int:
    """A number of bytes from a file in /proc, which counts in kB."""
    return next(int(line.split()[1]) * 1024 for line in _lines(path) if line.startswith(key + ":"))


def empty_pool() -> None:
    """Return the memory that our kernels on the CPU keep for large signals.

    Before `peak_bytes` of a call that lets go of its signals, as a training step does.
    """
    if registry.unavailable("cpp", "cpu") is None:
        torch.ops.dfa_kernels.empty_pool()


def _idle_bytes() -> int:
    """Memory that our kernels on the CPU keep for large signals and that no tensor has."""
    if registry.unavailable("cpp", "cpu") is not None:
        return 0
    return torch.ops.dfa_kernels.pool_bytes()[1]


def _trim_heap() -> None:
    ctypes.CDLL(None).malloc_trim(0)


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
