"""Time of small shapes and of training steps with two checkouts of this project, in one run.

    python -m benchmarks.compare OTHER [--case TEXT] [--rounds 31] [--threads N] [--device cpu]
                                       [--instructions] [--json FILE]

OTHER is the root of another checkout with its kernels built: what was before. This one is what
comes after. Each has a process of its own. They take turns, call by call, in a new random order
every round, so background load affects both alike. A call that is short is repeated within a turn.
Times are medians, and ratios medians of the ratios within rounds. Rivals with a stored matrix and
backpropagation, which are the same in both, show how far ratios can be trusted.

`--instructions` also counts the instructions of a call, except of products with a stored matrix, by
valgrind's callgrind and with one thread. They repeat where times do not. Valgrind knows no AVX-512,
so the AVX2 kernels are counted.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import repeat
from pathlib import Path

from benchmarks.compared import CASES
from benchmarks.harness import provenance
from benchmarks.report import compare_tables
from benchmarks.report.compare_tables import SIDES

TURN = 0.01  # seconds; a shorter call is repeated to take about as long
FEW, PATIENCE = 5, 20.0  # a case ends early after so many rounds and seconds
PAUSE = 0.005  # seconds, in which the threads of the other process stop spinning


class Process:
    """A process with the `dfa_kernels` of one checkout; `ask` it by the methods of `Checkout`."""

    def __init__(self, root: Path, device: str, threads: int | None, counting: bool = False):
        self.root, self.folder = root, tempfile.TemporaryDirectory()
        place = Path(self.folder.name)
        # Beside the benchmarks of this checkout.
        (place / "dfa_kernels").symlink_to(root.resolve() / "dfa_kernels")
        command = [sys.executable, "-m", "benchmarks.compared", f"--device={device}"]
        env = dict(os.environ)
        if counting:
            valgrind = ["valgrind", "--tool=callgrind", "--collect-atstart=no"]
            valgrind += [f"--callgrind-out-file={place}/counts", f"--log-file={place}/log"]
            command, threads = [*valgrind, *command, f"--counts={place}"], 1
            env["PYTHONHASHSEED"] = "0"
        paths = [str(place), str(provenance.ROOT), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
        if threads:
            env["OMP_NUM_THREADS"] = str(threads)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=place, env=env, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()

    def ask(self, *request):
        """The answer to a request: a method's name and its arguments."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.process.wait()
            raise SystemExit(f"compare: the process of {self.root} failed, see above") from None

    def about(self) -> dict:
        """How the checkout computes; raises unless it is the one that was asked for."""
        told = self.ask("about")
        if not Path(told.pop("source")).is_relative_to(self.folder.name):
            raise SystemExit(f"compare: {self.root} was not imported; is dfa_kernels preloaded?")
        return told


def measure(sides: dict[str, Process], name: str, rounds: int) -> dict:
    """The times of each call of a case with both checkouts."""
    shuffle = random.Random(0).shuffle
    once = [process.ask("prepare", name) for process in sides.values()]
    repeats = {call: max(1, round(TURN / once[1][call])) for call in once[0] if call in once[1]}
    times = {call: {side: [] for side in sides} for call in repeats}
    turns, end = list(repeats), time.perf_counter() + PATIENCE
    for done in range(rounds):
        if done >= FEW and time.perf_counter() > end:
            break
        shuffle(turns)  # so that none always follows the same other one
        for call in turns:
            order = list(sides)
            shuffle(order)
            for side in order:
                time.sleep(PAUSE)
                times[call][side].append(sides[side].ask("time", call, repeats[call]))
    return {call: row(found) for call, found in times.items()}


def row(times: dict[str, list[float]]) -> dict:
    """One call with both checkouts."""
    return {
        "seconds": {side: statistics.median(found) for side, found in times.items()},
        "faster": statistics.median(
            before / after for before, after in zip(*(times[side] for side in SIDES), strict=True)
        ),
        "times": {side: [float(f"{time:.5g}") for time in times[side]] for side in SIDES},
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the root of the checkout to compare with")
    parser.add_argument("--case", default="", help="only cases with this text in their name")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's own)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--instructions", action="store_true", help="count them; takes half an hour"
    )
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args(arguments)
    cases = [name for name in CASES if options.case in name]
    if not cases:
        parser.error(f"no case has {options.case!r} in its name; there are: {'; '.join(CASES)}")
    if not (options.other / "dfa_kernels" / "__init__.py").exists():
        parser.error(f"{options.other} is no checkout: it has no dfa_kernels/__init__.py")
    if options.instructions and (options.device != "cpu" or not shutil.which("valgrind")):
        parser.error("--instructions needs valgrind and the CPU")
    roots = dict(zip(SIDES, (options.other, provenance.ROOT), strict=True))
    measured = provenance.origin(options.device) | {"device_type": options.device}
    measured["before"] = {"commit": provenance.commit(options.other.resolve())}
    with running(roots, options.device, options.threads) as sides:
        about = {side: process.about() for side, process in sides.items()}
        backends = {side: told["backend"] for side, told in about.items()}
        if len({*backends.values()}) > 1:
            parser.error(f"different backends, {backends}: build both, or set DFA_KERNELS_BACKEND")
        measured["before"]["version"] = about["before"]["version"]
        measured |= {key: about["after"][key] for key in ("backend", "threads")}
        measured |= {"finished": False, "cases": []}
        print("\n".join(compare_tables.titles()))
        for name in cases:
            found = {"case": name, "calls": measure(sides, name, options.rounds)}
            measured["cases"].append(found)
            print("\n".join(compare_tables.rows(found)), flush=True)
            save(options.json, measured)  # so that a run that is killed keeps its results
    if options.instructions:
        print("", *compare_tables.titles(counted=True), sep="\n", flush=True)
        for case, counted in zip(measured["cases"], count(roots, cases), strict=True):
            for call, counts in counted.items():
                case["calls"][call]["instructions"] = counts
            print("\n".join(compare_tables.rows(case, counted=True)), flush=True)
            save(options.json, measured)
    print(
        "", compare_tables.about(measured), "", *compare_tables.compare_rivals(measured), sep="\n"
    )
    save(options.json, measured | {"finished": True})


def count(roots: dict[str, Path], cases: list[str]) -> Iterator[dict[str, dict]]:
    """For each case, the instructions of the calls that both checkouts have."""
    with (
        running(roots, "cpu", threads=1, counting=True) as sides,
        ThreadPoolExecutor() as pool,  # both at once: counts do not depend on the load
    ):
        for name in cases:
            before, after = pool.map(Process.ask, sides.values(), repeat("count"), repeat(name))
            calls = [call for call in before if call in after]
            yield {
                call: dict(zip(SIDES, (before[call], after[call]), strict=True)) for call in calls
            }


@contextmanager
def running(roots: dict[str, Path], *arguments, **options) -> Iterator[dict[str, Process]]:
    """A process for each checkout."""
    with ExitStack() as stack:
        yield {
            side: stack.enter_context(Process(root, *arguments, **options))
            for side, root in roots.items()
        }


def save(path: Path | None, measured: dict) -> None:
    if path:
        provenance.save(path, measured)


if __name__ == "__main__":
    main()
