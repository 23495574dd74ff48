"""Everything there is to do on a GPU, in one command: build, tests, sanitizer, benchmarks, profile.

    make gpu-check                      in a virtual environment of its own
    make gpu-check GPU_PYTHON=python3   with a Python that has torch with CUDA; nothing is installed
    python benchmarks/gpu_check.py [--output DIR] [--only build tests ...]

A step that fails does not stop the next one. DIR gets `gpu-check.json` (what ran, how long, how it
ended, with device, versions, date and commit), `gpu-check.log` (all that was printed), and the JSON
and PNG of the benchmarks. The exit status is the number of steps that failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

import provenance
import torch

ROOT = Path(__file__).parent.parent


@dataclass
class Step:
    """A command, which stage it belongs to, and the seconds it may take."""

    stage: str
    command: str
    limit: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a command ended: its exit status, negative for the signal that killed it."""

    stage: str
    command: str
    status: int
    seconds: float


def cuda_tool(name: str) -> str:
    """A program of the CUDA toolkit: by its name on the PATH, else from where nvcc is."""
    nvcc = shutil.which("nvcc")
    if shutil.which(name) or nvcc is None:
        return name
    return shutil.which(name, path=str(Path(nvcc).resolve().parent)) or name


# Torch's own kernels are left out: their reads of fresh memory are not ours to judge.
SANITIZER = (
    "{sanitizer} --tool=TOOL --error-exitcode=1 --report-api-errors=no "
    "--kernel-name-exclude=kns=native {python} tests/small_shapes.py"
)
# Every tensor an allocation of its own, so that an access beyond it is seen.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Not chosen automatically before it has passed here.
WITH_CUDA = {"DFA_KERNELS_BACKEND": "cuda"}
# A file that cannot be imported, for want of a library, leaves the others their run.
PYTEST = "{python} -m pytest -q -p no:cacheprovider --continue-on-collection-errors -m ''"
ON_GPU = (
    "'test_gpu or test_triton_projection or test_stream_triton "
    "or torch-cuda or cuda-cuda or triton-cuda'"
)

# The commands in order; `placeholders` says what stands for the names in braces.
STEPS = [
    Step("build", "{python} setup.py build_ext --inplace", 400),
    Step("build", "{python} -m dfa_kernels info", 60),
    Step("tests", f"{PYTEST} -k {ON_GPU}", 900),
    *(
        Step("sanitize", SANITIZER.replace("TOOL", tool), 300, UNCACHED)
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    ),
    Step(
        "bench",
        "{python} -m dfa_kernels bench --full --device cuda --json {output}/bench.json",
        600,
    ),
    Step(
        "train",
        "{python} benchmarks/training_step.py --device cuda --dtype bfloat16 "
        "--json {output}/training_step.json",
        300,
        WITH_CUDA,
    ),
    *(
        Step("paper", f"{{python}} -m benchmarks.paper {table} --output {{output}}", 300, WITH_CUDA)
        for table in ("table1", "vgg16")
    ),
    Step(
        "profile",
        "{ncu} --clock-control=none --set=full "
        "--kernel-name='regex:fused|project_kernel|fill|matrix_kernel' "
        "--export={output}/profile --force-overwrite --print-details=body "
        "{python} tests/small_shapes.py --large",
        300,
    ),
]


def placeholders(output: Path) -> dict[str, str]:
    """What the names in braces stand for on this machine."""
    values = {
        "python": sys.executable,
        "output": str(output),
        "ncu": cuda_tool("ncu"),
        "sanitizer": cuda_tool("compute-sanitizer"),
    }
    return {name: shlex.quote(value) for name, value in values.items()}


def run(step: Step, output: Path, log: TextIO) -> Outcome:
    """Run one command, its output to the terminal and the log."""
    command = step.command.format_map(placeholders(output))
    for sink in (sys.stdout, log):
        print(f"\n$ {command}", file=sink, flush=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        shell=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path} | step.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    timer = threading.Timer(step.limit, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        for sink in (sys.stdout, log):
            print(line, end="", file=sink, flush=True)
    status = process.wait()
    timer.cancel()
    return Outcome(step.stage, step.command, status, time.perf_counter() - start)


def summary(outcomes: list[Outcome]) -> str:
    """A line a command."""
    lines = []
    for outcome in outcomes:
        ended = "well" if outcome.status == 0 else f"with status {outcome.status}"
        lines.append(f"{outcome.seconds:6.0f} s, ended {ended}: {outcome.command}")
    return "\n".join(lines)


def main() -> int:
    """Run the chosen stages; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    today = datetime.date.today().isoformat()
    parser.add_argument("--output", type=Path, default=ROOT / f"gpu-check-{today}")
    stages = list(dict.fromkeys(step.stage for step in STEPS))
    parser.add_argument("--only", nargs="+", choices=stages, default=stages, metavar="STAGE")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    outcomes = []
    # Without a GPU only a part can run, and what is checked is the CPU's.
    origin = provenance.origin("cuda" if torch.cuda.is_available() else "cpu")
    with (output / "gpu-check.log").open("a") as log:
        for step in STEPS:
            if step.stage in arguments.only:
                outcomes.append(run(step, output, log))
                # Written after every step: a run that is cut off leaves what it has.
                steps = {"steps": [asdict(outcome) for outcome in outcomes]}
                provenance.save(output / "gpu-check.json", origin | steps)
    print(f"\n{summary(outcomes)}")
    return sum(outcome.status != 0 for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
