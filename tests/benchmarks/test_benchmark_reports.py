"""What a run of the benchmarks writes and shows, the pages made of it, and the command."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.harness import contenders, gate, provenance, race
from benchmarks.harness.measure import MISSING
from benchmarks.harness.shapes import ALL, STRUCTURED, Case, Promise, is_ours, title
from benchmarks.report import __main__ as report
from benchmarks.report import figures, pages, speed_tables, terminal
from benchmarks.report import results as data
from dfa_kernels import cli
from tests.benchmarks.races import SMALL, new_race
from tests.conftest import needs


def test_a_save_that_is_killed_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    provenance.save(path, {"cases": [1]})

    def killed(self, text):
        self.write_bytes(text.encode()[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        provenance.save(path, {"cases": [2]})
    assert json.loads(path.read_bytes()) == {"cases": [1]}


# --- reports ---


@pytest.fixture(scope="module")
def results():
    """A run of a few tiny cases, as read back from JSON."""
    rest = {"series": "batch", "promises": (Promise(STRUCTURED, "write roof", 0.6, 0.8),)}
    sweep = [Case(f"M={m}", (64,), m, 20, ("views", "stored"), x=m, **rest) for m in (1, 4)]
    layers = [
        Case(f"{n} layers", tuple(range(30, 30 - n, -1)), 2, 20, ("naive", "stored"), x=n)
        for n in (1, 3)
    ]
    sweep.append(Case("large", (500,), 2, 20, (), series="size", x=500))
    layers = [dataclasses.replace(case, series="layers") for case in layers]
    options = {"matrix": True, "threads": 1}
    low = Case("low", (50,), 2, 20, ("views",), dtype=torch.bfloat16)
    cases = [SMALL, *sweep, *layers, Case("matrix", (9,), 1, 9, ("torch.randn",), **options), low]
    runner = new_race()
    outcomes = {case.name: runner.run(case, contenders.names(case)) for case in cases}
    naive = contenders.contender("naive", SMALL)
    naive.stored_bytes = 54 * 10**9
    outcomes["small"]["naive"] = race.LeftOut("does not fit into memory", naive)
    outcomes["small"]["stored"] = gate.Wrong("[/of] its norm")
    measured = data.measured(outcomes, {case.name: case for case in cases}, runner.machine)
    return json.loads(json.dumps(provenance.origin("cpu") | measured | {"full": False}))


def test_results_say_what_was_reached(results):
    for case in results["cases"]:
        for row in case["contenders"].values():
            assert row["fraction_of_bound"] == pytest.approx(row["bound_seconds"] / row["seconds"])
            assert 0 < row["bound_seconds"] <= row["seconds"]  # roofs were raised to it
    small = results["cases"][0]
    assert small["left_out"]["naive"]["stored_bytes"] == 54 * 10**9
    assert small["promises"][0]["reached"] is None


def test_ratios_are_of_the_same_rounds():
    case = {"contenders": {"cpp": {"times": [1.0, 2.0, 8.0]}, "naive": {"times": [3.0, 8.0, 8.0]}}}
    assert data.ratio(case, "cpp", "naive") == 3.0
    assert data.ratio(case, "cpp", "stored") is None
    case["contenders"]["cpp"] |= {"work": {"entries": 100}, "seconds": 4.0}
    assert data.reached(case, "cpp", "entries/s") == 25.0
    case["contenders"]["cpp"] |= {"fraction_of_write_roof": 0.5}
    assert data.reached(case, "cpp", "write roof") == 0.5
    assert data.reached(case, "structured", "write roof") is None


def test_tables_show_every_contender(results):
    console = terminal.console()
    with console.capture() as captured:
        for case in results["cases"]:
            console.print(terminal.progress(case))
        terminal.show(console, results)
    text = captured.get()
    for expected in (
        *map(title, ALL),
        "fill",
        "torch.randn",
        "54 GB",
        "[/of] its norm",
        "does not fit",
        "not measured",
        "2.00x",
        "80%",
        "write roof",
        "additions, fp32",
    ):
        assert expected in text


def curves(panel):
    """The lengths of a panel's lines by their labels; those of lines without one are a list."""
    found = {"": []}
    for line in panel.lines:
        label = line.get_label()
        if label.startswith("_"):
            found[""].append(len(line.get_xdata()))
        else:
            found[label] = len(line.get_xdata())
    return found


def test_figures_have_every_contender(results):
    drawn = figures.drawings(results)
    assert set(drawn) == {"time.png", "memory.png", "roofline.png"}
    in_series = contenders.names(dataclasses.replace(SMALL, series="batch"))
    ours = [name for name in in_series if is_ours(name)]
    rivals = {"batch": ("views", "stored"), "size": (), "layers": ("naive", "stored")}
    lengths = {"batch": 2, "size": 1, "layers": 2}
    panels = {panel.get_title().split()[0]: panel for panel in drawn["time.png"].axes}
    assert set(panels) == set(rivals)
    for name, panel in panels.items():
        length, limits = lengths[name], len(ours) + ("views" in rivals[name])
        expected = dict.fromkeys(map(title, (*ours, *rivals[name])), length)
        assert curves(panel) == {"": [length] * limits} | expected
    (panel,) = drawn["memory.png"].axes
    assert curves(panel) == {"": []} | dict.fromkeys(map(title, (*ours, "naive", "stored")), 2)
    (panel,) = drawn["roofline.png"].axes
    reached = curves(panel)
    dense = [name for name in ours if name != STRUCTURED]
    assert set(reached) == {"", *map(title, (*dense, "views", "stored"))}
    assert {"M=1", "M=4"} <= {text.get_text() for text in panel.texts}
    for figure in drawn.values():
        plt.close(figure)


def test_figures_are_written_and_say_where_they_come_from(results, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **_: titles.append(text))
    drawn = figures.draw(results, tmp_path)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert titles == [provenance.source(results)] * 3


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("bench_networks", "| small |"),
        ("bench_networks", "`, structured |"),
        (
            "bench_networks",
            "| dense | fastest stored | mm alone | stored matrix | matrix per layer |",
        ),
        ("bench_networks", "Medians of 2 rounds of a quick run."),
        ("bench_networks", "| 54 GB do not fit |"),
        ("bench_networks", "| not run |"),  # it was wrong
        ("bench_layer", "| M=4 |"),
        ("bench_precisions", "| low |"),
        ("bench_sweeps", "| 3 layers |"),
        ("bench_matrix", "| matrix |"),
        ("bench_memory", "(54 GB)"),
        ("bench_memory", "| from the seed | structured | stored matrix |"),
        ("headline", "| small |"),
        ("headline", "| structured faster by | mm alone | stored matrix | matrix per layer |"),
        ("headline", "| 54 GB do not fit |"),
        ("bench_memory", "A layer of 500 with n = 20 and M = 2 takes"),
        ("bench_promises", "| small | `cpp` | matrix per layer | 2.00x | not measured |"),
        ("bench_promises", "| M=4 | `structured` | write roof | 60% |"),
        ("bench_machine", "| threads | a call | written | moved | products in fp32 |"),
        ("bench_machine", "| products in bf16 | additions |"),
    ],
)
def test_tables(results, table, expected):
    lines = getattr(speed_tables, table)(results)
    assert expected in "\n".join(lines)
    rows = [line for line in lines if line.startswith("|")]
    assert len({row.count("|") for row in rows}) <= 1


def test_the_fastest_of_those_that_keep_a_matrix_is_named():
    rows = {
        "cpp": {"times": [2.0, 4.0], "seconds": 3.0, "stored_bytes": 0},
        "views": {"times": [3.0, 3.0], "seconds": 3.0, "stored_bytes": 8},
        "scikit-learn": {"times": [1.0, 3.0], "seconds": 2.0, "stored_bytes": 8},
        "fill": {"times": [0.1, 0.1], "seconds": 0.1, "stored_bytes": 0},
    }
    case = {"contenders": rows, "left_out": {}}
    assert speed_tables.than_fastest_stored(case, "cpp") == "0.62x, scikit-learn"
    del rows["views"], rows["scikit-learn"]
    assert speed_tables.than_fastest_stored(case, "cpp") == ""


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (race.NO_ROOM, "3 GB do not fit"),
        (race.OUT_OF_MEMORY, "3 GB do not fit"),
        (race.TOO_LONG, "over 7 s"),
        ("No module named 'sklearn'", "not run"),
    ],
)
def test_why_a_rival_was_not_timed(reason, expected):
    why = {"reason": reason, "stored_bytes": 3e9, "least_seconds": 7.0}
    case = {"contenders": {}, "left_out": {"stored": why}}
    assert speed_tables.faster(case, "cpp", "stored") == expected
    assert speed_tables.faster(case, "cpp", "naive") == ""  # was no contender


def test_a_run_without_structured_projections_has_tables_without_them(results):
    rest = [
        case | {"contenders": {k: v for k, v in case["contenders"].items() if k != STRUCTURED}}
        for case in results["cases"]
    ]
    old = results | {"cases": rest}
    assert speed_tables.headline(old) == []
    for table in (
        speed_tables.bench_networks,
        speed_tables.bench_memory,
        speed_tables.bench_sweeps,
    ):
        assert table(old)
        assert not any("structured" in line or "dense" in line for line in table(old))


def test_tables_of_no_case_are_empty():
    empty = {"cases": [], "full": False}
    tables = (part.table for part in pages.PARTS["bench.json"] if part.heading != "Roofs")
    assert [table(empty) for table in tables] == [[]] * 7


def test_the_table_of_a_training_step():
    seconds = {"backprop": 2.0, "DFA": 1.0, "DFA, hadamard": 0.9}
    case = {"case": "net", "batch": 8, "seconds": seconds, "limit": 0.4}
    case["ratio"] = {"backprop": 1.0, "DFA": 0.5, "DFA, hadamard": 0.45}
    lines = speed_tables.training_step({"cases": [case | {"peak_bytes": {"DFA": 3e6}}]})
    assert lines[2:] == [
        "| net, batch 8 | backpropagation | 2 s | 1.00 |  |",
        "| net, batch 8 | DFA, from the seed | 1 s | 0.50 | 3 MB |",
        "| net, batch 8 | DFA, from the seed, structured | 900 ms | 0.45 |  |",
        "| net, batch 8 | DFA, if projecting were free |  | 0.40 |  |",
    ]


def test_the_table_of_a_training_step_marks_what_is_compiled():
    seconds = {"backprop": 2.0, "backprop, compiled": 1.0, "DFA, hadamard, compiled": 0.8}
    ratio = {"backprop": 1.0, "backprop, compiled": 1.0, "DFA, hadamard, compiled": 0.8}
    case = {"case": "net", "batch": 8, "seconds": seconds, "ratio": ratio, "limit": 0.4}
    case["left_out"] = {"DFA, compiled": "ValueError()"}
    lines = speed_tables.training_step({"cases": [case]})
    assert lines[2:6] == [
        "| net, batch 8 | backpropagation | 2 s | 1.00 |  |",
        "| net, batch 8 | backpropagation, compiled | 1 s | 1.00 |  |",
        "| net, batch 8 | DFA, from the seed, structured, compiled | 800 ms | 0.80 |  |",
        "| net, batch 8 | DFA, from the seed, compiled | not run |  |  |",
    ]
    assert lines[-1] == "A compiled step is a fraction of a compiled one of backpropagation."


def test_the_table_of_a_training_step_says_what_was_left_out():
    left_out = {"backprop": MISSING, "DFA, lean": "ValueError()"}
    case = {"case": "net", "batch": 8, "seconds": {"DFA": 1.0}, "ratio": {}, "limit": 0.4}
    lines = speed_tables.training_step({"cases": [case | {"left_out": left_out}]})
    assert lines[2:5] == [
        "| net, batch 8 | DFA, from the seed | 1 s |  |  |",
        f"| net, batch 8 | backpropagation | {MISSING} |  |  |",
        "| net, batch 8 | DFA, from the seed, lean | not run |  |  |",
    ]


def test_a_page_has_what_its_folder_has(results, tmp_path):
    matrices = [case for case in results["cases"] if case["matrix"]]
    provenance.save(tmp_path / "bench.json", results | {"cases": matrices, "finished": False})
    text = pages.page(tmp_path)
    assert text.startswith("<!-- Generated")
    assert f"# {results['device']}" in text
    assert f"{results['date']}, unfinished" in text
    assert provenance.short(results["commit"]) in text
    assert f"torch {results['versions']['torch']}" in text
    assert re.findall("^## (.*)", text, re.MULTILINE) == ["The matrix", "Roofs"]
    (tmp_path / "time.png").touch()
    assert "## Sweeps" in pages.page(tmp_path)
    assert "![Sweeps](time.png)" in pages.page(tmp_path)


def test_the_committed_pages_are_what_the_command_makes(capsys, monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda path, text: None)
    report.main([])
    assert capsys.readouterr().out == "", "run python -m benchmarks.report"
    monkeypatch.setattr(pages, "page", lambda folder: "other\n")
    report.main([])
    assert len(capsys.readouterr().out.split()) == 2 * len(list(pages.RESULTS.iterdir()))


def test_the_command_shows_a_run_again(results, tmp_path, capsys):
    path = tmp_path / "bench.json"
    provenance.save(path, results)
    report.main([str(path)])
    shown = capsys.readouterr().out
    assert all(case["case"] in shown for case in results["cases"])
    assert (tmp_path / "time.png").exists()


def test_rounds_are_counted_over_the_cases_of_a_table():
    cases = [{"contenders": {"cpp": {"rounds": rounds}}} for rounds in (7, 3, 15)]
    assert speed_tables.rounds({"full": True}, cases) == "Medians of 3 to 15 rounds of a full run."


# --- the command ---


def test_bench_without_its_source_says_where_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "dfa_kernels" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 1
    assert "checkout" in capsys.readouterr().out


def test_bench_without_its_extra_says_what_to_install(monkeypatch, capsys):
    find_spec = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "pytest_benchmark" else find_spec(name, *rest),
    )
    assert cli.main(["bench"]) == 1
    assert "pip install dfa-kernels[bench]" in capsys.readouterr().out


def test_bench_refuses_two_lengths(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--quick", "--full"])
    assert "not allowed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_a_few(tmp_path):
    needs("pytest-benchmark", importlib.util.find_spec("pytest_benchmark"))
    path = tmp_path / "results" / "bench.json"
    command = [sys.executable, "-m", "dfa_kernels", "bench", "--json", str(path)]
    command += ["--device", "cpu", "--select", "matrix-1000-x-1000-normal-float32"]
    root = Path(__file__).parents[2]
    theirs = tmp_path / "pytest-benchmark.json"
    options = {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": f"--benchmark-json={theirs}"}
    # Under pytest-xdist, of which this test may be a part, pytest-benchmark measures nothing.
    own = {name: value for name, value in os.environ.items() if "PYTEST_XDIST" not in name}
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, env=own | options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    measured = json.loads(path.read_text())
    assert {"device", "date", "commit", "versions", "roofs", "cases"} <= set(measured)
    assert measured["finished"]
    assert "torch.randn" in measured["cases"][0]["contenders"]
    assert "normal float32" in ran.stdout
    for benchmark in json.loads(theirs.read_text())["benchmarks"]:
        case = next(case for case in measured["cases"] if case["case"] == benchmark["group"])
        row = case["contenders"][benchmark["params"]["name"]]
        assert benchmark["extra_info"] == row
        assert benchmark["stats"]["median"] == pytest.approx(row["seconds"])
