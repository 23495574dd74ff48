"""The pages of `results/`, and the tables in the project's other Markdown files.

Both come from the committed JSON alone. In other files a table stands between
`<!-- table NAME FILE -->` and `<!-- end -->`, where NAME is a function of `speed_tables`,
`compare_tables`, `gpu_tables`, `paper_tables`, `transformer_tables`, `distributed_tables` or
`vocabulary_tables`, and FILE a path in `results/`. A folder of results may have other Markdown
files, to which its page leads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import provenance
from benchmarks.report import (
    compare_tables,
    distributed_tables,
    gpu_tables,
    paper_tables,
    speed_tables,
    transformer_tables,
    vocabulary_tables,
)

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Part(NamedTuple):
    """A part of a page: a heading, what it shows, and a table or a figure or both."""

    heading: str
    about: str
    table: Callable[[dict], list[str]] | None
    figure: str | None = None


# The parts of a page, by the result file that they show.
PARTS: dict[str, tuple[Part, ...]] = {
    "bench.json": (
        Part(
            "Networks",
            "The signals of several layers, by the fastest of our backends and by each rival "
            "(`bench_networks.py`).",
            speed_tables.bench_networks,
        ),
        Part(
            "Memory",
            "Matrices and the peak of a call beyond them, signals included. In parentheses the "
            "matrices alone, where nothing was run.",
            speed_tables.bench_memory,
            "memory.png",
        ),
        Part(
            "One large layer",
            "By batch size (`bench_sweeps.py`).",
            speed_tables.bench_layer,
            "roofline.png",
        ),
        Part(
            "Precisions",
            "Other dtypes, distributions and lengths of the error (`bench_precisions.py`).",
            speed_tables.bench_precisions,
        ),
        Part(
            "Sweeps",
            "As the error, the layer or the number of layers grows (`bench_sweeps.py`). In the "
            'figure, dashed lines are the bounds of our work and of "mm alone".',
            speed_tables.bench_sweeps,
            "time.png",
        ),
        Part(
            "The matrix",
            "Entries written to memory by `feedback_matrix` (`bench_matrix.py`).",
            speed_tables.bench_matrix,
        ),
        Part(
            "Promises",
            "The ratios that the project promises, and what this run reached.",
            speed_tables.bench_promises,
        ),
        Part("Roofs", "The best rates seen in this run.", speed_tables.bench_machine),
    ),
    "tiles.json": (
        Part(
            "Ways of a projection on a GPU",
            "Every tile of the fused kernels, the slabs and each backend's own choice, beside "
            "`torch.mm` with a stored matrix of the error's dtype, as they were for the commit "
            "above (`benchmarks/gpu_tiles.py`). The best of them is shown, and how many times "
            "faster it is than the stored matrix. A fused way makes the entries of U again for "
            "each tile of the batch; their rate counts each once.",
            gpu_tables.gpu_ways,
        ),
    ),
    "tuned_tiles.json": (
        Part(
            "Tiles of tuned kernels",
            "The same, of the tiles of `cuda` that the commit above has; neither what `cuda` "
            "chooses of them nor `triton` was timed. The product with the stored matrix, in the "
            'same run, is in TF32 for fp32 at "high" and in true fp32 at "highest".',
            gpu_tables.gpu_ways,
        ),
    ),
    "fitted.json": (),  # what the estimates rest on
    "small_shapes.json": (),
    "profile_first.json": (),  # tables of a file beside the page
    "profile_intermediate.json": (),
    "training_step.json": (
        Part(
            "Training step",
            "Forward, backward and optimizer of a network (`benchmarks/training_step.py`). "
            "Memory is the peak of a step beyond the weights.",
            speed_tables.training_step,
        ),
    ),
    "compare.json": (
        Part(
            "Before and after",
            "Small shapes and training steps with the kernels of two commits, which took turns in "
            "one run (`benchmarks/compare.py`). Instructions are a call's, by callgrind, of one "
            "thread with AVX2.",
            compare_tables.compare,
        ),
        Part(
            "Before and after, against what they replace",
            "The same run.",
            compare_tables.compare_rivals,
        ),
    ),
    "large_vocabulary.json": (
        Part(
            "Large vocabularies",
            "The output layer, the loss and the signals of a language model: forward and backward "
            "(`benchmarks/large_vocabulary.py`). With whole logits, and with "
            "`DFA.linear_cross_entropy`, a chunk of tokens at a time. Memory is the peak of a step "
            "beyond the weights.",
            vocabulary_tables.large_vocabulary,
            "large_vocabulary.png",
        ),
    ),
    "communication.json": (
        Part(
            "What is sent",
            "By one of several processes in a step of a small transformer, where collectives run "
            "in a ring (`benchmarks/communication.py`).",
            distributed_tables.communication,
        ),
    ),
    "pipeline.json": (
        Part(
            "Pipelines",
            "Stages that sleep, each 20 ms for a forward and 40 ms for a backward pass "
            "(`benchmarks/pipeline.py`).",
            distributed_tables.pipeline_simulated,
        ),
        Part(
            "Pipelines that compute",
            "All stages share the cores, so times are of all work together, and bubbles hide.",
            distributed_tables.pipeline_real,
        ),
        Part("Pipelines of 64 stages", "", distributed_tables.pipeline_plan),
        Part("What pipelines send", "", distributed_tables.pipeline_sent),
    ),
    "gpu-check.json": (
        Part(
            "Check of the GPU backends",
            "Each step of `make gpu-check`: how it ended and how long it took.",
            gpu_tables.gpu_check,
        ),
    ),
    "paper_table1.json": (
        Part("The paper's table 1", "", paper_tables.paper_table1, "paper_table1.png"),
    ),
    "paper_table2.json": (
        Part("The paper's table 2", "", paper_tables.paper_practices, "paper_table2.png"),
    ),
    "paper_table4.json": (
        Part("The paper's table 4", "", paper_tables.paper_practices, "paper_table4.png"),
    ),
    "paper_figure4.json": (
        Part("The paper's figure 4", "", paper_tables.paper_figure4, "paper_figure4.png"),
    ),
    "paper_distributions.json": (
        Part("Distributions of the matrix", "", paper_tables.paper_distributions),
    ),
    "paper_transformers.json": (
        Part(
            "Feedback in residual networks",
            "[What was trained, and how](../../paper/transformers/README.md).",
            transformer_tables.transformer_main,
            "paper_transformers.png",
        ),
        Part("One thing changed", "", transformer_tables.transformer_variants),
        Part("Other sizes", "", transformer_tables.transformer_sizes),
        Part("Other networks", "", transformer_tables.transformer_others),
        Part("Fine-tuning", "", transformer_tables.transformer_tuning),
    ),
    "paper_vgg16.json": (Part("VGG-16", "", paper_tables.paper_vgg16, "paper_vgg16.png"),),
}


def page(folder: Path) -> str:
    """Every table and figure of the results in a folder, as Markdown."""
    found = {name: _load(folder / name) for name in PARTS if (folder / name).exists()}
    blocks = [
        "<!-- Generated by `python -m benchmarks.report` from the JSON files beside it. -->",
        f"# {', '.join(dict.fromkeys(measured['device'] for measured in found.values()))}",
        "\n".join(files(found)),
        "[What is timed, and what the columns mean](../../README.md). "
        "[The paper's experiments](../../paper/README.md).",
    ]
    if "tiles.json" in found and "bench.json" not in found:
        blocks.append("There is no `bench.json` yet: `bench` has still to run on this GPU.")
    for path in sorted(folder.glob("*.md")):
        if path.name != "README.md":
            title = path.read_text().splitlines()[0].removeprefix("# ")
            blocks.append(f"See also: [{title}]({path.name}).")
    for name, measured in found.items():
        for part in PARTS[name]:
            table = part.table(measured) if part.table else []
            figure = part.figure if part.figure and (folder / part.figure).exists() else None
            if not table and figure is None:
                continue
            note = measured.get("note", "") if part is PARTS[name][0] else ""
            blocks += [f"## {part.heading}", part.about, note, "\n".join(table)]
            blocks += [f"![{part.heading}]({figure})"] if figure else []
    return "\n\n".join(filter(None, blocks)) + "\n"


def files(found: dict[str, dict]) -> list[str]:
    """A table of the results: when, with which versions and from which commit each was measured."""
    lines = ["| result | date | commit | versions |", "|---|---|---|---|"]
    for name, measured in found.items():
        versions = ", ".join(f"{what} {version}" for what, version in measured["versions"].items())
        date = measured["date"] + ", unfinished" * (not measured.get("finished", True))
        cells = (f"[`{name}`]({name})", date, provenance.short(measured["commit"]), versions)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def render(text: str) -> str:
    """A Markdown file's text with every table generated again."""
    tables: dict = {}
    for module in (
        speed_tables,
        compare_tables,
        gpu_tables,
        paper_tables,
        transformer_tables,
        distributed_tables,
        vocabulary_tables,
    ):
        tables |= vars(module)

    def table(match: re.Match) -> str:
        measured = _load(RESULTS / match[3])
        lines = [*tables[match[2]](measured), "", f"{provenance.source(measured)}.", ""]
        return match[1] + "\n" + "\n".join(lines) + "\n" + match[4]

    return TABLE.sub(table, text)


def pages() -> Iterator[tuple[Path, str]]:
    """Every Markdown file of the source, and what should be in it."""
    folders = {path.parent for path in RESULTS.glob("*/*.json") if path.name in PARTS}
    for folder in sorted(folders):
        yield folder / "README.md", page(folder)
    written = [*ROOT.glob("*.md")]
    for source in (".ci", "benchmarks", "csrc", "dfa_kernels", "tests"):
        written += (ROOT / source).rglob("*.md")
    for path in sorted(written):
        if path.parent not in folders or path.name != "README.md":
            yield path, render(path.read_text())


def _load(path: Path) -> dict:
    return json.loads(path.read_text())
