"""What the GPU check does: its stages, their steps, and what each step needs."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROCESSES = 8  # that share the GPU in the tests, so that a dead CUDA context spoils only one
TEST_SECONDS = 75  # the limit of one test


@dataclass(frozen=True)
class Step:
    """A command, the seconds it is estimated to take, and its limit in seconds.

    It is skipped if one of its `programs` or Python `modules` is missing. `unless` says why its
    work is done already, or None. A step without it is done if it passed before.
    """

    name: str
    command: str
    estimate: float
    limit: float
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    unless: Callable[[], str | None] | None = None

    def why_skip(self) -> str | None:
        """Why there is nothing to run here, or None."""
        absent = [name for name in self.programs if find(name) is None]
        absent += [name for name in self.modules if importlib.util.find_spec(name) is None]
        if absent:
            return f"there is no {', no '.join(absent)} here"
        return self.unless() if self.unless else None

    def command_line(self, output: Path) -> str:
        """The command on this machine, for results in `output`."""
        named = {
            "python": sys.executable,
            "output": str(output),
            "ncu": find("ncu") or "ncu",
            "sanitizer": find("compute-sanitizer") or "compute-sanitizer",
        }
        return self.command.format(
            architecture=architecture(),
            cores=cores(),
            parallel=parallel(),
            test_limit=test_limit(),
            **{name: shlex.quote(value) for name, value in named.items()},
        )


def find(program: str) -> str | None:
    """A program on the PATH, else in the CUDA toolkit: in CUDA_HOME, or beside nvcc."""
    home, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    toolkit = [str(Path(home) / "bin")] if home else []
    toolkit += [str(Path(nvcc).resolve().parent)] if nvcc else []
    return shutil.which(program) or shutil.which(program, path=os.pathsep.join(toolkit))


def parallel() -> str:
    """Options of pytest that spread the tests over processes, if its plugin is here."""
    return f"-n {PROCESSES}" if importlib.util.find_spec("xdist") else ""


def test_limit() -> str:
    """Options of pytest that end the process of a test that hangs, wherever it hangs."""
    if importlib.util.find_spec("pytest") is None:
        return ""
    if int(importlib.metadata.version("pytest").split(".")[0]) >= 9:
        exits = "-o faulthandler_exit_on_timeout=true"
        return f"-o faulthandler_timeout={TEST_SECONDS} {exits}"
    if importlib.util.find_spec("pytest_timeout"):
        return f"--timeout={TEST_SECONDS} --timeout-method=thread"
    return ""


def remarks() -> list[str]:
    """What the tests have to do without on this machine."""
    lines = []
    if not parallel():
        lines.append("skipped pytest-xdist, which is not here: the tests run in one process")
    if not test_limit():
        lines.append(
            "skipped the limit of one test: it needs pytest 9, or pytest-timeout, which is not here"
        )
    return lines


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


@functools.cache
def architecture() -> str:
    """The GPU's compute capability, as TORCH_CUDA_ARCH_LIST takes it; "" if it is not known."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""  # setup.py then builds for its default architectures
    return ";".join(sorted(set(said.stdout.split())))


def built(root: Path = ROOT) -> str | None:
    """A line if the CUDA extension is newer than everything it is built from, else None."""
    sources = [root / "setup.py", *(path for path in (root / "csrc").rglob("*") if path.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    for extension in (root / "dfa_kernels").glob("_CUDA.*so"):
        if extension.stat().st_mtime > newest:
            return f"{extension.name} is newer than its sources"
    return None


# setup.py leaves out what it cannot build and goes on, so the extension is imported to see that it
# is there. An old one is removed first, because it would pass for the new one.
BUILD = (
    "rm -f dfa_kernels/_CUDA.*so && TORCH_CUDA_ARCH_LIST='{architecture}' MAX_JOBS={cores} "
    "{python} setup.py build_ext --inplace && {python} -c 'import torch, dfa_kernels._CUDA'"
)

# There is no initcheck: torch's and the vendor's kernels are excluded, so it would not see their
# writes, and would take what they made for never written. The tests fill fresh memory with NaN, and
# so find what our own kernels leave unwritten.
# API errors are not reported: torch makes some on purpose and handles them, and our launches check
# their own.
# The launch timeout is raised: Python takes more than the default of 10 seconds to its first call
# of CUDA.
# The calls are shared out to as many processes as there are cores: racecheck is slow.
SANITIZER = (
    "seq {cores} | xargs -P {cores} -I@ "
    "{sanitizer} --tool=TOOL --error-exitcode=1 --report-api-errors=no "
    "--destroy-on-device-error=kernel --target-processes=application-only --launch-timeout=120 "
    "--kernel-name-exclude='regex=FOREIGN' "
    "{python} tests/backends/small_shapes.py BACKENDS --part @/{cores}"
)
# Parts of the mangled names of torch's kernels and of the vendor's matrix products.
FOREIGN = "at6native|at_cuda|cublas|cutlass|nvjet|gemm|gemv"
# Compiles on all cores most of what verify and the sanitizers would compile one by one.
COMPILE = (
    "seq {cores} | xargs -P {cores} -I@ "
    "{python} tests/backends/small_shapes.py triton --part @/{cores}"
)
# Gives every tensor its own allocation, so that an access beyond it is seen.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

# A file that cannot be imported, because a library is missing, does not stop the others. Every test
# has its line in the log, because a run that is killed writes no XML.
PYTEST = (
    "{python} -m pytest -v --tb=short -p no:cacheprovider -p no:benchmark "
    "--continue-on-collection-errors {parallel} {test_limit} --junitxml={output}/NAME.xml "
    "-m 'MARKS'"
)
# Each of the processes gets its part of the cores.
SHARED_CORES = {"OMP_NUM_THREADS": str(max(1, cores() // PROCESSES))}


def verify(backend: str, estimate: float, limit: float) -> Step:
    """Entries and every tile of a backend, compared with the definition."""
    name = f"verify-{backend}"
    command = f"{{python}} -m dfa_kernels verify --backend {backend} --json {{output}}/{name}.json"
    modules = ("triton",) if backend == "triton" else ()
    return Step(name, command, estimate, limit, modules=modules)


def tests(name: str, marks: str, estimate: float, limit: float, *modules: str) -> Step:
    """The tests with these marks, which run on a GPU."""
    command = PYTEST.replace("NAME", name).replace("MARKS", marks)
    modules = ("pytest", "numpy", *modules)
    return Step(name, command, estimate, limit, modules=modules, environment=SHARED_CORES)


def sanitize(tool: str, estimate: float, limit: float, *backends: str) -> Step:
    """Every tile of the backends (of all if none is named) under compute-sanitizer."""
    command = SANITIZER.replace("TOOL", tool).replace("FOREIGN", FOREIGN)
    command = command.replace("BACKENDS", " ".join(backends))
    return Step(
        "-".join((tool, *backends)),
        command,
        estimate,
        limit,
        programs=("compute-sanitizer",),
        modules=("triton",) if "triton" in backends else (),
        environment=UNCACHED,
    )


# The steps of each stage, the most important first. Seconds are those of a machine with an H100
# and 16 cores, but estimates in stage C.
STAGES: dict[str, tuple[Step, ...]] = {
    "A": (
        Step("build", BUILD, 70, 150, programs=("nvcc",), unless=built),
        Step("info", "{python} -m dfa_kernels info", 10, 20),
        verify("cuda", 16, 60),
        sanitize("memcheck", 15, 90, "cuda"),
        tests("tests-cuda", "gpu and not triton", 90, 180),
    ),
    "B": (
        Step("compile-triton", COMPILE, 45, 70, modules=("triton",)),
        verify("triton", 60, 85),
        tests("tests-triton", "triton", 85, 120, "triton"),
        sanitize("memcheck", 25, 50, "triton"),
        sanitize("synccheck", 30, 50),
        sanitize("racecheck", 100, 125),
    ),
    "C": (
        Step(
            "bench",
            "{python} -m dfa_kernels bench --quick --device cuda --json {output}/bench.json",
            180,
            250,
            modules=("pytest", "pytest_benchmark", "rich"),
        ),
        Step(
            "paper",
            "{python} -m benchmarks.paper table1 vgg16 --output {output}",
            45,
            80,
            modules=("matplotlib", "rich", "scipy", "sklearn"),
        ),
        Step(
            "profile",
            "{ncu} --set=full --clock-control=none --target-processes=application-only "
            "--kernel-name='regex:fused|project_kernel|fill|matrix_kernel|walk|gather|structured' "
            "--export={output}/profile --force-overwrite --page=details --print-details=all "
            "{python} tests/backends/small_shapes.py --large",
            60,
            100,
            programs=("ncu",),
        ),
    ),
    "D": (
        Step(
            "training-step",
            "{python} -m benchmarks.training_step --device cuda --dtype bfloat16 --seconds 1 "
            "--json {output}/training_step.json",
            150,
            240,
        ),
        Step(
            "large-vocabulary",
            "{python} -m benchmarks.large_vocabulary --device cuda --dtype bfloat16 "
            "--json {output}/large_vocabulary.json",
            90,
            240,
            modules=("matplotlib", "rich"),
        ),
    ),
}


def environment(step: Step | None = None) -> dict[str, str]:
    """The environment of a step's command, or what all steps share.

    In the source tree only the folder build/ and the extensions are written.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    caches = {
        "TRITON_CACHE_DIR": str(ROOT / "build" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "inductor"),
        "DFA_KERNELS_CACHE": str(ROOT / "build" / "verdicts"),
    }
    python = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": path}
    return os.environ | python | caches | dict(step.environment if step else {})
