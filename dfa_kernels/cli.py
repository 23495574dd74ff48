"""The command line: `python -m dfa_kernels` or `dfa-kernels`, with info, verify, demo and bench."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dfa_kernels import stream, verify
from dfa_kernels.backends import registry, verdicts
from dfa_kernels.version import __version__

_BACKENDS = list(registry.BACKENDS)
# By the demo's network: epochs, and the file of the figure.
_DEMOS = {"perceptron": (30, "demo-digits.png"), "transformer": (1, "demo-transformer.png")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="dfa-kernels",
        description="Feedback signals of Direct Feedback Alignment, from a seed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    info = commands.add_parser("info", help="versions, and which backends are available or why not")
    info.set_defaults(run=run_info)

    check = commands.add_parser(
        "verify",
        help="prove that the backends compute what they should on this machine",
        description="Checks the bits of the matrix's entries, and the signals of every kernel, "
        "against the definition. The exit status is 1 if anything is wrong.",
    )
    check.add_argument("--backend", choices=_BACKENDS, help="by default all available ones")
    check.add_argument(
        "--device", type=_device, help="by default the CPU, and the GPU where there is one"
    )
    check.add_argument("--only", metavar="NAME", help="one check, by its name in the table")
    check.add_argument(
        "--processes",
        type=_positive,
        default=min(8, len(os.sched_getaffinity(0))),
        help="side by side, for Triton, whose checks are mostly compiling",
    )
    check.add_argument("--json", type=_file, help="write the result there, too")
    check.set_defaults(run=run_verify)

    demo = commands.add_parser(
        "demo",
        help="train a network on real data by backpropagation, by DFA, and its last layer alone",
        description="The perceptron, of the paper's kind, learns scikit-learn's digits. The "
        "transformer, a small language model, learns Python's own sources; its DFA has the output "
        "layer's weights as the feedback, or an output layer that starts as a seed's matrix.",
    )
    demo.add_argument(
        "--network", choices=_DEMOS, default="perceptron", help="by default the perceptron"
    )
    defaults = " and ".join(f"{epochs} for the {name}" for name, (epochs, _) in _DEMOS.items())
    demo.add_argument(
        "--epochs", type=_positive, help=f"passes over the training set; by default {defaults}"
    )
    demo.add_argument(
        "--seed", type=_seed, default=0, help="of the weights, the batches and B; by default 0"
    )
    demo.add_argument(
        "--distribution",
        choices=stream.DISTRIBUTIONS,
        default="normal",
        help="of B's entries; by default normal",
    )
    demo.add_argument("--backend", choices=_BACKENDS, help="of the projection; by default the best")
    demo.add_argument("--device", type=_device, default="cpu", help="by default the CPU")
    demo.add_argument(
        "--figure",
        type=_file,
        help=f"learning curves; by default {' or '.join(file for _, file in _DEMOS.values())}",
    )
    demo.set_defaults(run=run_demo)

    bench = commands.add_parser(
        "bench",
        help="time the kernels against what they replace and against this machine's limits",
    )
    length = bench.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="the default: minutes")
    length.add_argument("--full", action="store_true", help="more shapes, more rounds")
    bench.add_argument(
        "--json", type=Path, help="results, by default bench-DATE/bench.json; figures beside"
    )
    bench.add_argument(
        "--device", choices=("cpu", "cuda"), help="by default cuda where torch can use it"
    )
    bench.add_argument("--select", metavar="EXPR", help="pytest's -k: VGG-16, promised, M-128")
    bench.set_defaults(run=run_bench)

    options = parser.parse_args(arguments)
    return options.run(options)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**64), got {text}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, RuntimeError) as error:  # the former if torch is built without it
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that is there, got {text}")
    return path


def run_info(options: argparse.Namespace) -> int:
    """Print the versions in use and every backend's state."""
    print(f"dfa_kernels {__version__}, stream v{stream.VERSION}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    print(
        f"threads {torch.get_num_threads()}, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}"
    )
    if torch.cuda.is_available():
        print(f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
    try:
        statuses = registry.backends()
    except ValueError as reason:
        print(reason)
        return 1
    if any(status.name == "cpp" and status.available for status in statuses):
        print(f"instruction set of cpp: {torch.ops.dfa_kernels.cpu_isa(None)}")
    asked = os.environ.get("DFA_KERNELS_BACKEND")
    if asked in registry.BACKENDS:
        print(f"DFA_KERNELS_BACKEND={asked} takes the place of the automatic choice")
    elif asked:
        print(f"DFA_KERNELS_BACKEND={asked} is no backend: calls that choose none will raise")
    mode = os.environ.get("DFA_KERNELS_CHECK")
    if mode in verdicts.MODES:
        print(f"DFA_KERNELS_CHECK={mode}: {verdicts.MODES[mode]}")
    print()
    print(f"{'backend':10}{'device':10}state")
    for status in statuses:
        state = (
            "available, chosen automatically" if status.automatic else "available when asked for"
        )
        print(f"{status.name:10}{status.device:10}{status.reason or status.check or state}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Check backends and print a table; see `dfa_kernels.verify`."""
    try:
        statuses = registry.backends()
    except ValueError as error:
        print(error)
        return 1
    chosen = []
    for status in statuses:
        asked = options.backend in (None, status.name)
        if asked and (options.device is None or options.device.type == status.device):
            device = options.device or torch.device(status.device)
            chosen.append((status.name, device, status.reason))
    available = [(name, device) for name, device, reason in chosen if reason is None]
    failures, cases = [], 0
    start = time.perf_counter()
    for name, device in available:
        print(f"{name} on {device}")
        wrong, began = [], time.perf_counter()
        if name == "triton" and options.only is None and options.processes > 1:
            found = verify.checks_side_by_side(name, device, options.processes)
        else:
            found = verify.checks_of(name, device, options.only)
        for check in found:
            cases += check.cases
            print(f"  {check.what:56}{check.cases:5} cases {check.seconds:7.1f} s  ", end="")
            print("wrong" if check.mistake else "passed", flush=True)
            if check.mistake:
                print(f"    {check.mistake}", flush=True)
                wrong.append(f"{check.what}: {check.mistake}")
        if options.only is None:
            registry.keep_check(name, device, wrong, time.perf_counter() - began)
        failures += wrong
    for name, device, reason in chosen:
        if reason is not None:
            print(f"{name} on {device} was not checked: {reason}")
            if options.backend is not None and not available:
                failures.append(reason)
    if not chosen:
        failures.append(f"there is no device {options.device}")
        print(f"dfa-kernels verify: {failures[-1]}")
    elif options.only is not None and available and not cases:
        failures.append(f"no check is named {options.only!r}")
        print(f"dfa-kernels verify: {failures[-1]}")
    if options.json:
        result = {
            "backend": options.backend,
            "device": str(options.device) if options.device else None,
            "passed": not failures,
            "seconds": round(time.perf_counter() - start, 3),
            "cases": cases,
            "failures": failures,
        }
        options.json.write_text(json.dumps(result) + "\n")
    return 1 if failures else 0


def run_demo(options: argparse.Namespace) -> int:
    """Train, compare and draw; see `dfa_kernels.demo`."""
    network = options.network
    try:
        demo = importlib.import_module(f"dfa_kernels.demo.{network}")
    except ModuleNotFoundError as missing:
        print(f"dfa-kernels demo: {missing}; it comes with `pip install dfa-kernels[demo]`")
        return 1
    epochs, figure = _DEMOS[network]
    try:
        registry.choose("demo", options.device, options.backend, options.distribution)
    except (RuntimeError, ValueError) as reason:
        print(f"dfa-kernels {reason}")
        return 1
    try:
        demo.run(
            options.epochs or epochs,
            options.seed,
            options.backend,
            options.device,
            options.figure or Path(figure),
            options.distribution,
        )
    except FileNotFoundError as missing:
        print(f"dfa-kernels {missing}")
        return 1
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Run the benchmarks of a source tree; see `benchmarks/`."""
    folder = _benchmarks()
    if folder is None:
        print(
            "dfa-kernels bench: the benchmarks come with the source: run it in a checkout of "
            "dfa_kernels, or where the package is installed from one with `pip install -e`"
        )
        return 1
    needed = ("pytest", "pytest_benchmark", "rich")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"dfa-kernels bench: no module named {', '.join(missing)}; "
            "it comes with `pip install dfa-kernels[bench]`"
        )
        return 1
    path = options.json or Path(f"bench-{datetime.date.today().isoformat()}") / "bench.json"
    command = [sys.executable, "-m", "pytest", str(folder), "--report", str(path.resolve())]
    command += ["--full"] if options.full else []
    command += ["--device", options.device] if options.device else []
    command += ["-k", options.select] if options.select else []
    return subprocess.run(command, cwd=folder.parent).returncode


def _benchmarks() -> Path | None:
    """The folder `benchmarks` of the imported source, else of the working directory, or None."""
    for root in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (root / "benchmarks" / "conftest.py").exists():
            return root / "benchmarks"
    return None
