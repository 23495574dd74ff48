"""What the demos share: ways of training that take turns, their tables and figure."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from dfa_kernels.nn.angles import Alignment


@dataclass
class Run:
    """The results of one way of training."""

    values: list[float] = field(default_factory=list)  # of held-out data, after each turn
    steps: list[int] = field(default_factory=list)  # until each value
    step_seconds: list[float] = field(default_factory=list)
    alignments: dict[str, Alignment] = field(default_factory=dict)
    peak_bytes: int = 0  # of a step

    def note(self, value: float) -> None:
        """Keep a result on held-out data at the present step."""
        self.values.append(value)
        self.steps.append(len(self.step_seconds))

    @property
    def seconds(self) -> float:
        """The median step."""
        return statistics.median(self.step_seconds)

    @property
    def milliseconds(self) -> str:
        """The median step, for a table."""
        return f"{1e3 * self.seconds:.2f}"


@contextlib.contextmanager
def timed(run: Run, device: torch.device) -> Iterator[None]:
    """Notes how long a step took, with the work that a GPU has of it."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    run.step_seconds.append(time.perf_counter() - start)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that a step had of torch's memory beyond what was in use, by torch's own count.

    On the CPU its profiler notes every allocation.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes lines about itself
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate((one["args"]["Bytes"] for one in changes), initial=0))


def take_turns(console: Console, ways: Mapping[str, Iterator[None]], turns: int) -> None:
    """Train in all ways, by label, turn by turn, so background load affects all alike."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = [progress.add_task(label, total=turns) for label in ways]
        for _ in zip(*ways.values(), strict=True):  # strict: each runs to its end
            for task in tasks:
                progress.advance(task)


def angles(alignments: Mapping[str, Mapping[str, Alignment]]) -> Table:
    """The alignment of each layer, in columns for each way of training."""
    table = Table("layer", title="Alignment of DFA with backpropagation (eq. 6)")
    for label in alignments:
        prefix = f"{label}: " if len(alignments) > 1 else ""
        table.add_column(f"{prefix}mean of cos(beta)")
        table.add_column("std")
    for layer in next(iter(alignments.values())):
        found = [by_layer[layer] for by_layer in alignments.values()]
        table.add_row(layer, *(f"{number:.3f}" for value in found for number in value))
    return table


def draw(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    figure: Path,
    *,
    across: str,
    up: str,
    title: str,
) -> None:
    """One curve (x, y) for each label, as a PNG."""
    fig, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, (x, y) in curves.items():
        axes.plot(x, y, label=label)
    axes.set(xlabel=across, ylabel=up, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    fig.savefig(figure, dpi=150)
    plt.close(fig)
