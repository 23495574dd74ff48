"""Where a result comes from: device, date, commit and versions, which every result file states."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import dfa_kernels


def processor() -> str:
    """The CPU's name, the number of cores this process may use, and the instruction set in use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
    available = {s.name for s in dfa_kernels.backends() if s.device == "cpu" and s.available}
    isa = torch.ops.dfa_kernels.cpu_isa(None) if "cpp" in available else "no compiled kernels"
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {isa}"


ROOT = Path(__file__).parents[2]


def git(*arguments: str, root: Path = ROOT) -> str:
    """What git prints about a source tree, by default this one."""
    command = ["git", *arguments]
    ran = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return ran.stdout.strip()


def commit(root: Path = ROOT) -> str:
    """The commit of a source tree. DFA_KERNELS_COMMIT names this one's where git does not know."""
    if root == ROOT and (told := os.environ.get("DFA_KERNELS_COMMIT")):
        return told
    try:
        head = git("rev-parse", "HEAD", root=root)
        changed = git("status", "--porcelain", "--", ":!benchmarks/results", root=root)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "-dirty" * bool(changed)


def origin(device_type: str) -> dict:
    """Device, date, commit and versions. Call it before measuring: files may change meanwhile."""
    versions = {
        "dfa_kernels": dfa_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device_type == "cuda":
        versions |= {"cuda": torch.version.cuda}
        if importlib.util.find_spec("triton"):
            versions |= {"triton": importlib.import_module("triton").__version__}
    return {
        "device": torch.cuda.get_device_name() if device_type == "cuda" else processor(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": versions,
    }


def short(commit: str) -> str:
    """The first digits of a commit, whether files differed from it, and a note in parentheses."""
    digits, _, note = commit.partition(" ")
    return digits[:9] + "-dirty" * digits.endswith("-dirty") + f" {note}" * bool(note)


def source(measured: dict) -> str:
    """The line below a table or figure that says where and when it was measured."""
    return (
        f"{measured['device']}; torch {measured['versions']['torch']}, "
        f"{measured['date']}, commit {short(measured['commit'])}"
    )


def save(path: Path, results: dict) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.replace(path)  # atomic: a run that is killed leaves the old file or the new one


if __name__ == "__main__":
    print(json.dumps(origin("cuda" if torch.cuda.is_available() else "cpu")))
