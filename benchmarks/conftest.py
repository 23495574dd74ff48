"""Every bench_*.py asks one question: its `cases(device_type, full)` are the shapes, and each
contender of a shape is a benchmark of pytest-benchmark, in the shape's group.

All contenders of a shape are timed in turn when the first of them comes up (harness/race.py); each
benchmark then reports its own times, through a clock that goes forward by them. At the end
everything is held against the machine's limits (harness/roofs.py), shown and written (report/).
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

# NumPy's threads would spin for a while after a product, in the next contender's time. Read when
# NumPy is imported, so set before.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import pytest
import torch

from benchmarks.harness import contenders, provenance, race
from benchmarks.harness.shapes import Case
from benchmarks.report import results, terminal


class Clock:
    """A timer that stands still until it is told how much time has passed."""

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
    """A name in characters that -k takes: "M=4, n=1,000" is M-4-n-1000."""
    return re.sub(r"[^\w.+]+", "-", re.sub(r"(?<=\d),(?=\d)", "", name))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(group=item.callspec.params["case"].name, timer=CLOCK))


def pytest_configure(config: pytest.Config) -> None:
    device_type(config)  # raises before anything is collected
    # The report is ours, but a comparison with an earlier run is pytest-benchmark's.
    config.option.benchmark_quiet |= not config.option.benchmark_compare
    config.pluginmanager.register(Session(config), "dfa_kernels session")


CLOCK = Clock()


class Session:
    """What one run has measured, its progress, and its report."""

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
        # Now, so that a file edited during the run is not taken for what was measured.
        self.origin = provenance.origin(device_type(self.config))

    def outcome(self, case: Case, name: str) -> race.Result | Exception:
        """Of one contender, after a race of all of them if there has been none."""
        if case.name not in self.outcomes:
            elapsed = time.perf_counter() - self.began
            place = f"{len(self.outcomes) + 1}/{len(self.names)}"
            self.console.print(f"\n[dim]{elapsed:5.0f} s[/]  {place}  [bold]{case.name}[/]")
            outcome = self.race.run(case, self.names[case.name])
            self.outcomes[case.name], self.cases[case.name] = outcome, case
            rows = results.case_results(case, outcome, self.race.machine[case.threads])
            self.console.print(terminal.progress(rows))
            self.save()  # a run that is killed keeps what it has measured
        return self.outcomes[case.name][name]

    def save(self) -> dict:
        """Write everything measured so far to the file that was asked for, and return it."""
        measured = results.measured(self.outcomes, self.cases, self.race.machine)
        measured["full"] = self.config.getoption("full")
        measured["finished"] = len(self.outcomes) == len(self.names)
        measured["seconds"] = time.perf_counter() - self.began
        measured = self.origin | measured
        if self.config.getoption("report") is not None:
            provenance.save(self.config.getoption("report"), measured)
        return measured

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Rows of the tables stand for the dots."""
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
    """Runs a contender of a case: its times go to pytest-benchmark, or it is skipped or fails."""
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
