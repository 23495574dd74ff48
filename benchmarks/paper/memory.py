"""Peak memory of a piece of work in a process of its own, because resident memory has no owner."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

ROOT = Path(__file__).parents[2]
MISSING = "does not fit"


def status(key: str) -> int:
    """Bytes of this process by /proc: "VmRSS" is resident now, "VmHWM" the most there has been."""
    # Not ru_maxrss, which starts at the parent's size.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def available(device: torch.device) -> int:
    """Bytes that a process could still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


class Peak:
    """`with Peak(device) as peak:`, then `peak.bytes` is the most held beyond the beginning."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before = status("VmRSS")
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
            after = status("VmHWM")
        self.bytes = after - self.before


def in_child(module: str, need: int, device: torch.device, **arguments: object) -> dict:
    """What `serve` of a module returns for the arguments, from a process of its own.

    Where `need` bytes are not to be had, or the process runs out of memory, {"does not fit": need}.
    A tenth of the memory is left to others: the kernel ends whom it likes when there is none.
    """
    if need > 0.9 * available(device):
        return {MISSING: need}
    command = [sys.executable, "-m", module, json.dumps(arguments | {"device": str(device)})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == -9 or "OutOfMemoryError" in done.stderr:
        return {MISSING: need}
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def serve(work: Callable[..., dict]) -> None:
    """The child's side: run `work` on the command line's JSON and print what it returns."""
    arguments = json.loads(sys.argv[1])
    device = torch.device(arguments.pop("device"))
    print(json.dumps(work(device=device, **arguments)))
