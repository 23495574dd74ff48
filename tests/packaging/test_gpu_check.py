"""The check for a machine with a GPU, tested without one: its plan, runs, and what it inspects."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import gpu_check
import gpu_steps
import pytest
from gpu_steps import STAGES, Step

from tests import ROOT

ORIGIN = {"device": "a GPU", "commit": "f00d", "versions": {}}


def step(name, command, **options):
    return Step(name, command, **{"estimate": 1.0, "limit": 300.0} | options)


@pytest.fixture
def check(tmp_path):
    """Makes a check in one folder, where an earlier run may have left files."""

    def make(again=False, **origin):
        return gpu_check.Check(
            tmp_path / "check", tmp_path / "back" / "check.tar.gz", ORIGIN | origin, again
        )

    return make


def run(check, *steps, seconds=3000.0):
    check.run("A", steps, time.monotonic() + seconds)
    return check


def archived(check):
    """The files in the archive, by their names in the folder."""
    with tarfile.open(check.archive) as archive:
        members = archive.getmembers()
        return {m.name.removeprefix("check/"): archive.extractfile(m).read() for m in members}


def ran(check):
    """How often each step ran, counted by the lines its command wrote."""
    return {path.stem: len(path.read_text().split()) for path in check.output.glob("*.ran")}


# --- the plan ---


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_ends_within_its_nine_minutes(stage):
    """Including its last archive, and the 25 seconds it first takes to ask torch for the GPU."""
    assert sum(step.limit for step in STAGES[stage]) + gpu_check.RESERVE + 25 <= 9 * 60
    assert all(gpu_check.LEAST < step.estimate < step.limit for step in STAGES[stage])


def test_names_of_steps_differ():
    names = [step.name for steps in STAGES.values() for step in steps]
    assert len(set(names)) == len(names)


def test_the_plan_has_every_command_and_runs_none(tmp_path, capsys):
    output = tmp_path / "check"
    assert gpu_check.main(["--plan", "--stage", "B", "--output", str(output)]) == 0
    plan = capsys.readouterr().out
    for step in STAGES["B"]:
        assert step.command_line(output) in plan
        assert f"at most {step.limit / 60:.1f}" in plan
    assert "stage A" not in plan
    assert not output.exists()


def test_what_is_written_goes_to_the_folder(tmp_path):
    for steps in STAGES.values():
        for step in steps:
            for option in ("--json", "--output", "--export", "--junitxml"):
                for path in re.findall(rf"{option}[= ](\S+)", step.command_line(tmp_path)):
                    assert Path(path).is_relative_to(tmp_path)


def test_the_extension_is_built_where_a_source_is_newer(tmp_path):
    source, extension = tmp_path / "csrc" / "cuda" / "a.cu", tmp_path / "dfa_kernels" / "_CUDA.so"
    for path, age in ((source, 1), (tmp_path / "setup.py", 2)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert gpu_steps.built(tmp_path) is None
    extension.parent.mkdir()
    extension.touch()
    os.utime(extension, (1000, 1000))
    assert "newer than its sources" in gpu_steps.built(tmp_path)
    os.utime(source, (1001, 1001))
    assert gpu_steps.built(tmp_path) is None


def test_our_own_kernels_are_among_those_that_are_looked_at():
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").iterdir())
    names = re.findall(r"^DFA_KERNEL\([^)]*\)\s+(\w+)\(", sources, re.MULTILINE)
    for path in (ROOT / "dfa_kernels" / "backends" / "triton").glob("*.py"):
        names += re.findall(r"^@triton\.jit[^\n]*\ndef (\w+)", path.read_text(), re.MULTILINE)
    assert {"fused", "fill", "project_kernel", "matrix_kernel"} <= set(names)
    assert not [name for name in names if re.search(gpu_steps.FOREIGN, name)]
    profiled = re.search(r"--kernel-name='regex:(.*?)'", STAGES["C"][-1].command)[1]
    assert {"fused", "fill", "project_kernel", "matrix_kernel"} <= {
        name for name in names if re.search(profiled, name)
    }


TRITON = ("triton_projection", "triton_tiles", "stream_triton")  # these files as a whole
FAKE_GPU = """
import dfa_kernels, torch
here = dfa_kernels.backends()
there = [s._replace(device="cuda", available=s.name != "cpp", reason=None) for s in here]
dfa_kernels.backends = lambda: here + there
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *device: (9, 0)
"""


# Collects once for each selection, in one process: the imports take the longest.
COLLECT = """
import sys, pytest
files, *selections = (line.split("\\t") for line in sys.argv[1:])
for selection in selections:
    options = ["--collect-only", "-q", "-p", "fake_gpu", "-p", "no:cacheprovider", "-m", *selection]
    assert pytest.main([*options, *files]) == 0
    print("end of a selection")
"""
SELECTIONS = [
    ("A", "tests-cuda", {"cuda", "torch", "cuda-cuda", "torch-cuda"}, "triton"),
    ("B", "tests-triton", {"triton", "triton-cuda"}, "cuda-cuda"),
]


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """What pytest lists for the marks of each of SELECTIONS where there is a GPU."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "fake_gpu.py").write_text(FAKE_GPU)
    marks = []
    for stage, name, *_ in SELECTIONS:
        (tests,) = (step for step in STAGES[stage] if step.name == name)
        marks.append(re.search(r"-m '(.*)'", tests.command)[1])
    files = (
        "packaging/test_gpu_check",
        "projection/test_ops",
        "choice/test_verify",
        *(f"backends/test_{name}" for name in ("gpu", "cuda_backend", *TRITON)),
    )
    command = [sys.executable, "-c", COLLECT, "\t".join(f"tests/{file}.py" for file in files)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*command, *marks], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    lists = done.stdout.split("end of a selection\n")[:-1]
    return {one[0]: listed for one, listed in zip(SELECTIONS, lists, strict=True)}


@pytest.mark.parametrize(
    ("stage", "words", "others"), [(stage, *rest) for stage, _, *rest in SELECTIONS]
)
def test_the_marks_select_the_tests_of_a_gpu(collected, stage, words, others):
    """As collected where there is a GPU: by their parameters, or a whole file."""
    found = set()
    for line in collected[stage].splitlines():
        node = re.match(r"tests/\w+/test_(\w+)\.py::\w+(?:\[(.*)\])?$", line)
        if node and node[1] in TRITON:
            assert stage == "B"
        elif node:
            parameters = (node[2] or "").split("-")
            pairs = {"-".join(pair) for pair in itertools.pairwise(parameters)}
            seen = words & ({*parameters} | pairs)
            assert seen, line
            assert others not in {*parameters} | pairs, line
            found |= seen
    assert found >= words, found
    assert "test_gpu.py::" in collected[stage]
    for file in TRITON:
        assert (f"test_{file}.py::" in collected[stage]) == (stage == "B")


# --- a run ---


def test_a_failure_and_what_is_not_here_do_not_stop_the_others(check, capsys):
    done = run(
        check(),
        step("good", "echo found {output}"),
        step("bad", "echo lost; exit 3"),
        step("tool", "exit 1", programs=("no-such-program",)),
        step("library", "exit 1", modules=("no_such_module",)),
        step("made", "exit 1", unless=lambda: "it is there"),
        step("last", "echo end"),
    )
    assert done.failed == 1
    assert {name: record["status"] for name, record in done.records.items()} == {
        "good": 0,
        "bad": 3,
        "tool": None,
        "library": None,
        "made": None,
        "last": 0,
    }
    shown = capsys.readouterr().out
    assert "A tool: skipped, there is no no-such-program here" in shown
    assert "A library: skipped, there is no no_such_module here" in shown
    assert "A made: skipped, it is there" in shown
    assert "A bad: failed with status 3" in shown
    assert f"found {done.output}" in shown
    files = archived(done)
    assert set(files) == {"gpu-check.json", "gpu-check.log", "good.log", "bad.log", "last.log"}
    assert files["bad.log"] == b"lost\n"
    assert b"skipped, there is no no-such-program here" in files["gpu-check.log"]
    saved = json.loads(files["gpu-check.json"])
    assert saved["device"] == "a GPU"
    assert [record["name"] for record in saved["steps"]] == list(done.records)
    assert all(record["commit"] == "f00d" for record in saved["steps"])


def test_the_archive_is_written_after_every_step(check):
    listing = "tar -tzf {output}/../back/check.tar.gz"
    done = run(check(), step("first", "echo 1"), step("second", listing), step("third", listing))
    assert b"check/first.log" in archived(done)["second.log"]
    assert b"check/second.log" not in archived(done)["second.log"]
    assert b"check/second.log" in archived(done)["third.log"]
    assert [path.name for path in done.archive.parent.iterdir()] == ["check.tar.gz"]


def test_the_archive_leaves_out_the_largest_files(check, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "ARCHIVE_BYTES", 60_000)
    noise = "head -c {size} /dev/urandom > {{output}}/{size}.bin"
    steps = [step(f"n{size}", noise.format(size=size)) for size in (90_000, 20_000, 70_000)]
    done = run(check(), *steps)
    assert done.archive.stat().st_size <= 60_000
    assert {"20000.bin", "gpu-check.json"} <= set(archived(done))
    assert not {"90000.bin", "70000.bin"} & set(archived(done))
    shown = capsys.readouterr().out
    assert shown.count("left 90000.bin out of the archive") == 1
    assert shown.count("left 70000.bin out of the archive") == 1
    assert b"left 70000.bin out" in archived(done)["gpu-check.log"]


def is_running(pid):
    """Whether a process still runs. A zombie, which waits for its parent, does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ")[-1][0] != "Z"
    return False


def test_a_step_that_hangs_is_killed_with_what_it_started(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.1)
    deaf = "trap '' INT; sleep 600 & echo $!; wait"
    done = run(check(), step("hangs", deaf, limit=1.0), step("next", "true"))
    assert done.records["hangs"]["status"] == -signal.SIGKILL
    assert "cut off at its limit of 1 s" in done.records["hangs"]["ended"]
    assert not is_running(int((done.output / "hangs.log").read_text()))
    assert done.records["next"]["status"] == 0
    assert done.failed == 1


def test_a_step_at_its_limit_may_write_what_it_has(check, monkeypatch):
    class Patient(subprocess.Popen):
        """Reaches its limit once the command has begun."""

        def wait(self, timeout=None):
            while timeout and "begun" not in (done.output / "long.log").read_text():
                time.sleep(0.01)
            if timeout:
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait()

    done = check()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in `main`
    try:
        monkeypatch.setattr(gpu_check.subprocess, "Popen", Patient)
        writes = "trap 'echo saved; exit 0' INT; echo begun; while :; do sleep 0.01; done"
        run(done, step("long", writes))
    finally:
        signal.signal(signal.SIGINT, before)
    assert archived(done)["long.log"] == b"begun\nsaved\n"
    assert done.records["long"]["status"] != 0


def test_a_step_gets_no_more_than_what_is_left_of_its_stage(check, monkeypatch, capsys):
    now, limits = [1000.0], {}

    def execute(command, environment, log, limit):
        log.write_text("")
        limits[command] = limit
        now[0] += limit
        return 0, ""

    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(gpu_check, "time", clock)
    monkeypatch.setattr(gpu_check, "execute", execute)
    done = check()
    end = 1000.0 + 400 + gpu_check.RESERVE
    done.run("A", [step(name, name, limit=250.0) for name in ("one", "two", "three")], end)
    assert limits == {"one": 250.0, "two": 150.0}
    assert "A three: skipped, no time is left of its stage" in capsys.readouterr().out
    assert done.records["three"]["status"] is None
    assert done.failed == 0


# --- a run that continues an earlier one ---

COUNTED = [
    step("good", "echo x >> {output}/good.ran"),
    step("bad", "echo x >> {output}/bad.ran; false"),
    step("made", "echo x >> {output}/made.ran", unless=lambda: None),
]


def test_a_second_call_repeats_what_did_not_pass(check, capsys):
    """And it repeats a step whose files may be gone; the step's condition says whether they are."""
    assert run(check(), *COUNTED).failed == 1
    done = run(check(), *COUNTED)
    assert ran(done) == {"good": 1, "bad": 2, "made": 2}
    assert "A good: passed before" in capsys.readouterr().out
    assert done.records["good"]["status"] == 0
    assert "good.log" in archived(done)


@pytest.mark.parametrize(
    "changed",
    [{"again": True}, {"commit": "cafe"}, {"device": "another GPU"}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_second_call_repeats_what_passed_elsewhere(check, changed):
    run(check(), *COUNTED)
    assert ran(run(check(**changed), *COUNTED))["good"] == 2


@pytest.mark.parametrize("commit", ["unknown", "f00d-dirty"])
def test_a_commit_that_does_not_tell_the_files_is_repeated(check, commit):
    for _ in range(2):
        done = run(check(commit=commit), *COUNTED)
    assert ran(done)["good"] == 2
    assert done.records["good"]["commit"] == commit


# --- the command ---

# The check with the test's own stages, in a tree without .git.
DRIVER = """
import sys
sys.path.insert(0, {folder!r})
import gpu_check
from gpu_steps import Step
stages = {{"A": (Step("first", "echo 1; false", 9, 99), Step("wait", {wait!r}, 9, 500)), "B": ()}}
sys.exit(gpu_check.main(sys.argv[1:], stages))
"""


@pytest.fixture
def start(tmp_path):
    """Starts the command in a tree without .git, where the second step is `wait`."""
    tree = tmp_path / "tree"
    for path in (ROOT / ".ci" / "gpu_check.py", ROOT / ".ci" / "gpu_steps.py"):
        (tree / ".ci").mkdir(parents=True, exist_ok=True)
        (tree / ".ci" / path.name).write_text(path.read_text())
    provenance = Path("benchmarks", "harness", "provenance.py")
    (tree / provenance).parent.mkdir(parents=True)
    (tree / provenance).write_text((ROOT / provenance).read_text())

    def begin(wait):
        program = tree / "driver.py"
        program.write_text(DRIVER.format(folder=str(tree / ".ci"), wait=wait))
        command = [sys.executable, str(program), "--stage", "A"]
        command += ["--output", str(tmp_path / "check")]
        command += ["--archive", str(tmp_path / "back" / "check.tar.gz")]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "DFA_KERNELS_COMMIT": "f00d-dirty",
            "GIT_CEILING_DIRECTORIES": str(tmp_path.parent),
        }
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    return begin


def test_the_command_says_how_many_failed_and_of_which_commit(start, check):
    """Without .git, the commit and its mark of changed files come from the environment."""
    with start("echo $TRITON_CACHE_DIR; exit 1") as process:
        shown = process.communicate()[0]
    assert process.returncode == 2
    assert "commit f00d-dirty" in shown
    assert "A wait: failed with status 1" in shown.splitlines()[-1]
    done = check()
    assert done.records["wait"]["commit"] == "f00d-dirty"
    assert json.loads(archived(done)["gpu-check.json"])["commit"] == "f00d-dirty"
    assert b"build/triton" in archived(done)["wait.log"]
    tree = done.output.parent / "tree"
    written = {path.name for path in tree.rglob("*") if path.is_file()}
    written = {name for name in written if not name.endswith(".pyc")}
    assert written == {"driver.py", "gpu_check.py", "gpu_steps.py", "provenance.py"}


def test_a_run_that_is_terminated_leaves_what_it_has(start, check, tmp_path):
    with start(f"echo $$ > {tmp_path}/pid; echo begun; exec sleep 600") as process:
        while process.poll() is None and not (tmp_path / "pid").exists():
            time.sleep(0.05)
        log = tmp_path / "check" / "wait.log"
        while process.poll() is None and log.read_text() != "begun\n":
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not is_running(int((tmp_path / "pid").read_text()))
    done = check()
    assert archived(done)["wait.log"] == b"begun\n"
    assert archived(done)["first.log"] == b"1\n"
    assert done.records["wait"]["status"] is None
    assert done.records["wait"]["ended"] == "cut off with the whole run"
    assert json.loads(archived(done)["gpu-check.json"])["steps"] == list(done.records.values())
