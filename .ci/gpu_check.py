"""What to do on a GPU, most important first, in stages that each end within minutes.

    python3 .ci/gpu_check.py [--stage A|B|C|D] [--output DIR] [--archive FILE]
                             [--minutes 9] [--again]
    python3 .ci/gpu_check.py --plan     what would run and how long it may take; needs no GPU
    make gpu-check [GPU_PYTHON=python3] [ARGS="--stage A"]

A builds the extension for the GPU that is here, checks its entries and tiles, and runs memcheck and
the tests of "cuda" and "torch". B does the same for Triton, with racecheck and synccheck for both.
C measures: benchmarks, the paper's memory and VGG-16, profiles of the kernels. D measures training
steps and large vocabularies.
Without a stage all run. `gpu_steps.py` has the steps.

On a rented machine, one command at a time; $OUT is the folder that comes back:

    export DFA_KERNELS_COMMIT=...    needed only where there is no .git; it is what
                                     git describe --always --abbrev=40 --dirty --exclude '*' prints
    python3 .ci/gpu_check.py --stage A --output /tmp/check --archive $OUT/check.tar.gz
    python3 .ci/gpu_check.py --stage B --output /tmp/check --archive $OUT/check.tar.gz
    python3 .ci/gpu_check.py --stage C --output /tmp/check --archive $OUT/check.tar.gz
    python3 .ci/gpu_check.py --stage D --output /tmp/check --archive $OUT/check.tar.gz

DIR gets gpu-check.json (what ran, how long, how it ended, on which device, of which commit),
gpu-check.log, a log for each step, and what the steps leave: JUnit XML, JSON, figures, a profile.
The archive holds all of it and is rewritten after every step, so a run that is cut off keeps its
results. To continue a run on another machine, unpack its archive over DIR.

A step that passed is not repeated with the same DIR, commit and device, unless --again is given or
the commit does not identify the files (it is unknown, or they have changed since). A step that
fails or exceeds its limit does not stop the next one. A step that needs what the machine lacks is
skipped, with a line that says so. The exit status is the number of steps that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import gpu_steps
from gpu_steps import ROOT, STAGES, Step

RESERVE = 15.0  # seconds of a stage that are kept for its last archive
LEAST = 5.0  # a step needs that many seconds to begin
GRACE = 10.0  # the last seconds of a step's limit, for it to write what it has
ARCHIVE_BYTES = 15 * 2**20
SHOWN = 25  # last lines of a step's log, on the terminal


def origin() -> dict:
    """The device, commit and versions, from a process that ends and so releases the GPU."""
    command = [sys.executable, str(ROOT / "benchmarks" / "harness" / "provenance.py")]
    environment = gpu_steps.environment()
    return json.loads(subprocess.check_output(command, cwd=ROOT, env=environment, timeout=90))


def tells_the_files(commit: str) -> bool:
    """Whether two runs of this commit are of the same files."""
    return commit != "unknown" and not commit.endswith("-dirty")


def write(path: Path, text: str) -> None:
    """Replace a file at once: a process that is killed here leaves the old one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


class Check:
    """The records of steps in a folder, and the archive of the folder."""

    def __init__(self, output: Path, archive: Path, origin: dict, again: bool = False):
        self.output, self.archive = output, archive
        self.origin, self.again = origin, again
        self.left_out: set[Path] = set()
        self.failed = 0
        output.mkdir(parents=True, exist_ok=True)
        archive.parent.mkdir(parents=True, exist_ok=True)
        self.path = output / "gpu-check.json"
        before = json.loads(self.path.read_text())["steps"] if self.path.exists() else []
        self.records: dict[str, dict] = {record["name"]: record for record in before}

    def say(self, line: str) -> None:
        """Print a line, and add it to the log of the whole run."""
        print(line, flush=True)
        with (self.output / "gpu-check.log").open("a") as log:
            print(line, file=log)

    def run(self, stage: str, steps: Sequence[Step], end: float) -> None:
        """Run the steps of a stage that ends at `end`, on the monotonic clock."""
        for step in steps:
            left = end - RESERVE - time.monotonic()
            if self.passed_before(step):
                self.say(f"{stage} {step.name}: passed before, for this commit and device")
            elif reason := step.why_skip():
                self.skip(stage, step, reason)
            elif left < LEAST:
                self.skip(stage, step, "no time is left of its stage")
            else:
                self.run_step(stage, step, min(step.limit, left))

    def passed_before(self, step: Step) -> bool:
        """Whether a step need not be repeated.

        A step with `unless` makes files, which another machine may lack, so `unless` decides.
        """
        if self.again or step.unless:
            return False
        record = self.records.get(step.name, {})
        here = self.origin["commit"], self.origin["device"]
        same = (record.get("commit"), record.get("device")) == here
        return same and record["status"] == 0 and tells_the_files(self.origin["commit"])

    def skip(self, stage: str, step: Step, reason: str) -> None:
        """Leave a step out, and say so."""
        self.say(f"{stage} {step.name}: skipped, {reason}")
        self.record(stage, step, None, 0.0, f"skipped, {reason}")

    def run_step(self, stage: str, step: Step, limit: float) -> None:
        """Run one step: its output goes to its own log, and the end of it to the terminal."""
        command = step.command_line(self.output)
        self.say(f"\n{stage} {step.name}, at most {limit:.0f} s\n$ {command}")
        path = self.output / f"{step.name}.log"
        start = time.perf_counter()
        try:
            status, remark = execute(command, gpu_steps.environment(step), path, limit)
        except BaseException:
            seconds = time.perf_counter() - start
            self.record(stage, step, None, seconds, "cut off with the whole run")
            raise
        seconds = time.perf_counter() - start
        print("".join(path.read_text(errors="replace").splitlines(True)[-SHOWN:]), end="")
        self.failed += status != 0
        ended = "passed" if status == 0 else f"failed with status {status}"
        self.say(f"{stage} {step.name}: {ended} after {seconds:.0f} s{remark}")
        self.record(stage, step, status, seconds, ended + remark)

    def record(
        self, stage: str, step: Step, status: int | None, seconds: float, ended: str
    ) -> None:
        """Keep how a step ended, and write all records and the archive."""
        self.records[step.name] = {
            "name": step.name,
            "stage": stage,
            "command": step.command,
            "status": status,
            "ended": ended,
            "seconds": seconds,
            "commit": self.origin["commit"],
            "device": self.origin["device"],
        }
        steps = list(self.records.values())
        write(self.path, json.dumps(self.origin | {"steps": steps}, indent=2) + "\n")
        self.pack()

    def pack(self) -> None:
        """Write the archive, without the largest files if it would be too large."""
        unfinished = self.archive.with_name(f"{self.archive.name}.unfinished")
        own = {self.archive, unfinished}
        files = [path for path in sorted(self.output.rglob("*")) if path.is_file()]
        files = [path for path in files if path not in own | self.left_out]
        while True:
            with tarfile.open(unfinished, "w:gz") as archive:
                for path in files:
                    archive.add(path, self.output.name / path.relative_to(self.output))
            if unfinished.stat().st_size <= ARCHIVE_BYTES or len(files) <= 1:
                break
            largest = max(files, key=lambda path: path.stat().st_size)
            files.remove(largest)
            self.left_out.add(largest)
            self.say(f"left {largest.name} out of the archive, which is not to be larger")
        unfinished.replace(self.archive)


def execute(
    command: str, environment: Mapping[str, str], log: Path, limit: float
) -> tuple[int, str]:
    """Run a command, its output to a file: its exit status, and a remark if it took too long.

    Shortly before its limit it is interrupted, so that pytest and the benchmarks write what they
    have. At its limit it is killed with all that it started.
    """
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            shell=True,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + limit
        try:
            return process.wait(max(limit - GRACE, limit / 2)), ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            while is_there(process) and time.monotonic() < end:
                time.sleep(0.05)
            return process.poll() or -signal.SIGKILL, f", cut off at its limit of {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_there(process: subprocess.Popen) -> bool:
    """Whether any process of a command's session is still there."""
    process.poll()  # one that has ended stays there until it is waited for
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def plan(stages: Mapping[str, Sequence[Step]], output: Path) -> str:
    """What would run: each step's command, and minutes by stage and step, estimated and at most."""
    lines = ["Minutes are estimated, not measured."]
    for stage, steps in stages.items():
        estimate, limit = (sum(getattr(s, name) for s in steps) for name in ("estimate", "limit"))
        lines.append(f"\nstage {stage}: about {estimate / 60:.1f} min, at most {limit / 60:.1f}")
        for step in steps:
            times = f"about {step.estimate / 60:.1f} min, at most {step.limit / 60:.1f}"
            lines.append(f"  {step.name:16} {times}\n      {step.command_line(output)}")
    return "\n".join(lines)


def parse(
    arguments: Sequence[str] | None, stages: Mapping[str, Sequence[Step]]
) -> argparse.Namespace:
    """The options on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    today = datetime.date.today().isoformat()
    parser.add_argument("--stage", choices=stages, help="by default all, in order")
    parser.add_argument("--output", type=Path, default=ROOT / f"gpu-check-{today}", metavar="DIR")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="by default DIR.tar.gz")
    parser.add_argument("--minutes", type=float, default=9.0, help="for a stage; 9 by default")
    parser.add_argument("--again", action="store_true", help="repeat what passed before")
    parser.add_argument("--plan", action="store_true", help="only print what would run")
    options = parser.parse_args(arguments)
    options.output = options.output.resolve()
    archive = options.archive or options.output.with_name(f"{options.output.name}.tar.gz")
    options.archive = archive.resolve()
    return options


def terminated(number: int, frame: object) -> None:
    """End the run on a signal by an exception, so that records and archive are written."""
    raise SystemExit(128 + number)


def main(
    arguments: Sequence[str] | None = None, stages: Mapping[str, Sequence[Step]] = STAGES
) -> int:
    """Run the chosen stages; see the module's docstring."""
    begin = time.monotonic()
    options = parse(arguments, stages)
    chosen = {options.stage: stages[options.stage]} if options.stage else stages
    if options.plan:
        print(plan(chosen, options.output))
        return 0
    signal.signal(signal.SIGTERM, terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # after a shell's & it is ignored
    check = Check(options.output, options.archive, origin(), options.again)
    check.say(f"{check.origin['device']}, commit {check.origin['commit']}")
    for remark in gpu_steps.remarks():
        check.say(remark)
    for stage, steps in chosen.items():
        check.run(stage, steps, begin + 60 * options.minutes)
        begin = time.monotonic()
    check.say("")
    for stage, steps in chosen.items():
        for step in steps:
            check.say(f"{stage} {step.name}: {check.records[step.name]['ended']}")
    check.pack()
    return check.failed


if __name__ == "__main__":
    sys.exit(main())
