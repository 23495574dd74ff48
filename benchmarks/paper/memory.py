"""Peak memory of a piece of work, in its own process: resident memory counts all of a process."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType

import torch

from benchmarks.harness.measure import MISSING, available_bytes, is_out_of_memory, proc_bytes


def available(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes("cpu")


class Peak:
    """After `with Peak(device) as peak:`, `peak.bytes` is the peak beyond the start's memory."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before = proc_bytes("/proc/self/status", "VmRSS")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            after = torch.cuda.max_memory_allocated(self.device)
        else:
            # ru_maxrss would start at the parent's size.
            after = proc_bytes("/proc/self/status", "VmHWM")
        self.bytes = after - self.before


def in_child(
    work: Callable[..., dict], need: int, device: torch.device, **arguments: object
) -> dict:
    """The result of `work`, a function of a module, for device and arguments in a new process.

    It is {MISSING: need} where fewer than `need` bytes are available or the process runs out of
    memory. A tenth of the memory is left free: without any, the kernel may end other processes.
    """
    if need > 0.9 * available(device):
        return {MISSING: need}
    if device.type == "cuda":
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    else:
        context = multiprocessing.get_context("forkserver")  # imports torch once for all children
        context.set_forkserver_preload([work.__module__])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(sender, work, {"device": device, **arguments}))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    child.join()
    if child.exitcode == -signal.SIGKILL:
        return {MISSING: need}
    if child.exitcode:
        raise RuntimeError(f"{work.__module__} ended with status {child.exitcode}, see above")
    return result or {MISSING: need}


def _serve(sender: Connection, work: Callable[..., dict], arguments: dict) -> None:
    """The child's side. It sends nothing if memory runs out."""
    try:
        result = work(**arguments)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return
        raise
    sender.send(result)
