"""Runs the benchmarks under pytest-benchmark.

Each bench_*.py answers one question. Its `cases(device_type, full)` are groups of pytest-benchmark,
and each contender of a case is one benchmark. When the first of a case comes up, all its contenders
are timed in interleaved rounds (harness/race.py). Each benchmark then reports its own times through
a clock that is advanced by them. At the end of the run, all times are compared with the roofs
(harness/roofs.py), shown and written (report/).
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

# Otherwise NumPy's threads keep spinning after a product, into the next contender's time. NumPy
# reads this when it is imported.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import pytest
import torch

from benchmarks.harness import contenders, measure, provenance, race
from benchmarks.harness.shapes import Case
from benchmarks.report import results, terminal


class Clock:
    """A timer that moves only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dfa_kernels")
    group.addoption("--full", action="store_true", help="more shapes, more rounds")
    group.addoption(
        "--device", choices=("cpu", "cuda"), help="by default cuda where torch can use it"
    )
    group.addoption("--report", type=Path, help="write results to this JSON file, figures beside")


def device_type(config: pytest.Config) -> str:
    chosen = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no GPU that torch can use")
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    cases = metafunc.module.cases(device_type(config), config.getoption("full"))
    parameters = [
        pytest.param(
            case,
            name,
            id=selectable(f"{case.name}-{name}"),
            marks=[pytest.mark.promised] * bool(case.promises),
        )
        for case in cases
        for name in contenders.names(case)
    ]
    metafunc.parametrize(("case", "name"), parameters)


def selectable(name: str) -> str:
    """A name in characters that -k accepts: "M=4, n=1,000" becomes M-4-n-1000."""
    return re.sub(r"[^\w.+]+", "-", re.sub(r"(?<=\d),(?=\d)", "", name))


# On a GPU, which may be rented by the minute, the most important come first.
CUDA_ORDER = ("bench_precisions", "bench_networks", "bench_sweeps", "bench_matrix")


def cuda_place(item: pytest.Item) -> int:
    """The place of a benchmark's file in that order; others come after."""
    return [*CUDA_ORDER, item.path.stem].index(item.path.stem)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if device_type(config) == "cuda":
        items.sort(key=cuda_place)
    for item in items:
        item.add_marker(pytest.mark.benchmark(group=item.callspec.params["case"].name, timer=CLOCK))


def pytest_configure(config: pytest.Config) -> None:
    device_type(config)  # raises before anything is collected
    # pytest-benchmark's own table is shown only to compare with an earlier run.
    config.option.benchmark_quiet |= not config.option.benchmark_compare
    measure.keep_freed_memory()
    config.pluginmanager.register(Session(config), "dfa_kernels session")


CLOCK = Clock()


class Session:
    """One run: what it has measured, its progress and its report."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.console = terminal.console()
        self.race = race.Race(race.FULL if config.getoption("full") else race.QUICK)
        self.names: dict[str, list[str]] = {}  # of the selected contenders, by case
        self.cases: dict[str, Case] = {}
        self.outcomes: dict[str, dict[str, race.Result | Exception]] = {}
        self.benchmarks: list[tuple[race.Result, dict]] = []
        self.origin: dict = {}
        self.began = time.perf_counter()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            case, name = item.callspec.params["case"], item.callspec.params["name"]
            self.names.setdefault(case.name, []).append(name)
        # Before the run, because files may be edited while it goes on.
        self.origin = provenance.origin(device_type(self.config))

    def outcome(self, case: Case, name: str) -> race.Result | Exception:
        """The outcome of a contender; the first of a case starts the race of all."""
        if case.name not in self.outcomes:
            elapsed = time.perf_counter() - self.began
            place = f"{len(self.outcomes) + 1}/{len(self.names)}"
            self.console.print(f"\n[dim]{elapsed:5.0f} s[/]  {place}  [bold]{case.name}[/]")
            outcome = self.race.run(case, self.names[case.name])
            self.outcomes[case.name], self.cases[case.name] = outcome, case
            rows = results.case_results(case, outcome, self.race.machine[case.threads])
            self.console.print(terminal.progress(rows))
            self.save()  # so that a run that is killed keeps its results
        return self.outcomes[case.name][name]

    def save(self) -> dict:
        """Everything measured so far, also written to the file of --report."""
        measured = results.measured(self.outcomes, self.cases, self.race.machine)
        measured["full"] = self.config.getoption("full")
        measured["finished"] = len(self.outcomes) == len(self.names)
        measured["seconds"] = time.perf_counter() - self.began
        measured = self.origin | measured
        if self.config.getoption("report") is not None:
            provenance.save(self.config.getoption("report"), measured)
        return measured

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Print no dots: the tables show progress."""
        if report.failed:
            return None
        return ("left out" if report.skipped else "passed" * (report.when == "call"), "", "")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self):
        for result, extra_info in self.benchmarks:
            machine = self.race.machine[result.case.threads]
            extra_info.update(results.row(result, machine))
        yield
        if not self.outcomes:
            return
        measured = self.save()
        terminal.show(self.console, measured)
        path = self.config.getoption("report")
        if path is not None:
            self.console.print(f"written: {path}")
            terminal.draw(self.console, measured, path)


@pytest.fixture
def compete(request: pytest.FixtureRequest, benchmark):
    """Run a contender of a case and hand its times to pytest-benchmark; else skip or fail."""
    session = request.config.pluginmanager.getplugin("dfa_kernels session")

    def run(case: Case, name: str) -> None:
        outcome = session.outcome(case, name)
        if isinstance(outcome, race.LeftOut):
            pytest.skip(outcome.reason)
        if isinstance(outcome, Exception):
            raise outcome
        times = iter(outcome.times)

        def pass_time() -> None:
            CLOCK.now += next(times)

        session.benchmarks.append((outcome, benchmark.extra_info))
        benchmark.pedantic(pass_time, rounds=len(outcome.times))

    return run
