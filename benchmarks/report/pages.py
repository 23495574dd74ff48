"""The pages of `results/`, and the tables in the project's other Markdown files.

Both come from the committed JSON alone. A table stands between `<!-- table NAME FILE -->` and
`<!-- end -->`: NAME is a function of `speed_tables` or `paper_tables`, FILE a result in `results/`.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import provenance
from benchmarks.report import paper_tables, speed_tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

# For each result of a run: the heading of each part, its table if it has one, and its figures.
Part = tuple[str, Callable[[dict], list[str]] | None, list[str]]
PARTS: dict[str, list[Part]] = {
    "bench.json": [
        ("Networks", speed_tables.bench_networks, []),
        ("Memory", speed_tables.bench_memory, ["memory.png"]),
        ("One large layer", speed_tables.bench_layer, ["roofline.png"]),
        ("As one thing grows", speed_tables.bench_sweeps, ["time.png"]),
        ("The matrix itself", speed_tables.bench_matrix, []),
        ("The machine", speed_tables.bench_machine, []),
    ],
    "training_step.json": [("A training step", speed_tables.training_step, [])],
    "paper_table1.json": [("The paper's table 1", paper_tables.paper_table1, ["paper_table1.png"])],
    "paper_table2.json": [
        ("The paper's table 2", paper_tables.paper_practices, ["paper_table2.png"])
    ],
    "paper_table4.json": [
        ("The paper's table 4", paper_tables.paper_practices, ["paper_table4.png"])
    ],
    "paper_figure4.json": [
        ("The paper's figure 4", paper_tables.paper_figure4, ["paper_figure4.png"])
    ],
    "paper_vgg16.json": [("VGG-16", paper_tables.paper_vgg16, ["paper_vgg16.png"])],
}


def page(folder: Path) -> str:
    """Every table and figure of the results in a folder, as Markdown."""
    found = {name: _load(folder / name) for name in PARTS if (folder / name).exists()}
    first = next(iter(found.values()))
    lines = [
        f"# {first['device']}",
        "",
        "Made by `python -m benchmarks.report` from the JSON beside it. "
        "[How it was measured](../../README.md), and what the columns are.",
        "",
    ]
    for name, measured in found.items():
        for heading, table, figures in PARTS[name]:
            rows = table(measured) if table else []
            drawn = [figure for figure in figures if (folder / figure).exists()]
            if len(rows) <= 2 and not any(row.startswith("- ") for row in rows):
                rows = []  # a head without a row
            if not rows and not drawn:
                continue
            lines += [f"## {heading}", "", *rows, *[""] * bool(rows)]
            for figure in drawn:
                lines += [f"![{heading}]({figure})", ""]
            lines += [f"{provenance.source(measured)}: [`{name}`]({name}).", ""]
    return "\n".join(lines)


def render(text: str) -> str:
    """A Markdown file's text with every table made anew."""
    tables = vars(speed_tables) | vars(paper_tables)

    def table(match: re.Match) -> str:
        measured = _load(RESULTS / match[3])
        lines = [*tables[match[2]](measured), "", f"{provenance.source(measured)}.", ""]
        return match[1] + "\n" + "\n".join(lines) + "\n" + match[4]

    return TABLE.sub(table, text)


def pages() -> Iterator[tuple[Path, str]]:
    """Every generated file, or file with generated tables, and what should be in it."""
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        yield folder / "README.md", page(folder)
    command = ["git", "ls-files", "*.md", ":!benchmarks/results"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.split():
        yield ROOT / name, render((ROOT / name).read_text())


def _load(path: Path) -> dict:
    return json.loads(path.read_text())
