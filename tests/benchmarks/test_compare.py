"""The comparison of two checkouts: what each is asked, what is made of it, and its tables."""

import json
import shutil
import statistics

import pytest
import torch

from benchmarks import compare, compared
from benchmarks.harness import gate, provenance
from benchmarks.harness.shapes import Case
from benchmarks.report import __main__ as report
from benchmarks.report import compare_tables, pages
from dfa_kernels import project
from tests import ROOT

SMALL = Case("small", (70, 40, 70), 5, 30, compared.RIVALS)
NAME = "3x800 (the paper's), n=10, M=32"
STEP = compared.Perceptron(6, (8, 5), batch=4, n=3)


def test_two_checkouts_take_turns(tmp_path, capsys):
    path = tmp_path / "compare.json"
    options = ["--case", NAME, "--rounds", "2", "--threads", "1", "--json", str(path)]
    compare.main([str(ROOT), *options])
    text = path.read_text()
    measured = json.loads(text)
    assert measured["finished"]
    assert measured["threads"] == 1
    assert measured["before"] == {
        "commit": provenance.commit(ROOT),
        "version": measured["versions"]["dfa_kernels"],
    }
    assert [case["case"] for case in measured["cases"]] == [
        name for name in compared.CASES if NAME in name
    ]
    for case in measured["cases"]:
        assert set(case["calls"]) >= {"project", *compared.RIVALS}
        for row in case["calls"].values():
            assert row["faster"] > 0
            assert all(len(row["times"][side]) == 2 for side in compare.SIDES)
            assert all(row["seconds"][side] > 0 for side in compare.SIDES)
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    shown = capsys.readouterr().out
    assert all(case["case"] in shown for case in measured["cases"])
    report.main([str(path)])
    assert "Before: commit" in capsys.readouterr().out


def test_a_checkout_that_fails_says_so(tmp_path, capfd):
    (tmp_path / "dfa_kernels").mkdir()
    (tmp_path / "dfa_kernels" / "__init__.py").write_text("raise RuntimeError('not built')")
    with (
        compare.Process(tmp_path, "cpu", threads=1) as process,
        pytest.raises(SystemExit, match="failed, see above"),
    ):
        process.about()
    assert "not built" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "has no dfa_kernels"),
        ([str(ROOT), "--case", "no such"], "there are: 3x800 (the paper's), n=10, M=1;"),
        ([str(ROOT), "--instructions"], "needs valgrind"),
    ],
)
def test_what_cannot_be_compared(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        compare.main([one.format(empty=tmp_path) for one in arguments])
    assert message in capsys.readouterr().err


BACKENDS = {"before": "cpp", "after": "cpp"}


class Fake:
    """In place of a process: what is before takes twice as long and a third more instructions."""

    def __init__(self, root, device, threads, counting=False):
        self.side = "after" if root == provenance.ROOT else "before"
        self.counting = counting

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def about(self):
        return {"backend": BACKENDS[self.side], "threads": 2, "version": "0.1"}

    def ask(self, request, *arguments):
        slow = self.side == "before"
        assert self.counting == (request == "count")
        if request == "prepare":
            return {"project": 1e-3, "stored": 1.0} | ({} if slow else {"operator": 1.0})
        if request == "count":
            return {"project": 4000 if slow else 3000} | ({} if slow else {"operator": 1})
        call, repeats = arguments
        assert repeats == {"project": 10, "stored": 1}[call]
        return 3e-3 if call == "stored" else 2e-3 if slow else 1e-3


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "Process", Fake)
    monkeypatch.setattr(compare, "PAUSE", 0)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    (tmp_path / "dfa_kernels").mkdir()
    (tmp_path / "dfa_kernels" / "__init__.py").touch()
    return tmp_path


def test_times_instructions_and_tables(fakes, capsys):
    path = fakes / "compare.json"
    options = ["--case", NAME, "--rounds", "3", "--instructions", "--json", str(path)]
    compare.main([str(fakes), *options])
    measured = json.loads(path.read_text())
    (case,) = measured["cases"]
    assert set(case["calls"]) == {"project", "stored"}  # what both have
    assert case["calls"]["project"] == {
        "seconds": {"before": 2e-3, "after": 1e-3},
        "faster": 2.0,
        "times": {"before": [2e-3] * 3, "after": [1e-3] * 3},
        "instructions": {"before": 4000, "after": 3000},
    }
    lines = compare_tables.compare(measured)
    assert lines[2:4] == [
        f"| {NAME} | `project` | 2 ms | 1 ms | 2.00x | 4,000 | 3,000 | 1.33x |",
        f"| {NAME} | stored matrix | 3 ms | 3 ms | 1.00x |  |  |  |",
    ]
    assert "Medians of 3 rounds; threads: 2; backend: `cpp`." in lines[-1]
    assert lines[-1].endswith("What is the same in both is faster by 1.00x to 1.00x.")
    rivals = compare_tables.compare_rivals(measured)
    assert rivals[2:] == [f"| {NAME} | `project` | stored matrix | 1.50x | 3.00x |"]
    for table in (lines[:-2], rivals):
        assert len({line.count("|") for line in table}) == 1
    shown = capsys.readouterr().out
    assert all(line in shown for line in (*lines, *rivals))
    provenance.save(path, measured)
    page = pages.page(fakes)
    assert "## Before and after\n" in page
    assert all(line in page for line in (*lines, *rivals))


def test_tables_of_no_case_are_empty():
    assert compare_tables.compare({"cases": []}) == compare_tables.compare_rivals({"cases": []})


def test_different_backends_are_no_comparison(fakes, monkeypatch, capsys):
    monkeypatch.setitem(BACKENDS, "before", "torch")
    with pytest.raises(SystemExit):
        compare.main([str(fakes)])
    assert "different backends, {'before': 'torch', 'after': 'cpp'}" in capsys.readouterr().err


def test_ratios_are_of_the_same_rounds():
    row = compare.row({"before": [1.0, 8.0, 3.0], "after": [1.0, 2.0, 1.0]})
    assert row["faster"] == 3.0
    assert row["seconds"] == {"before": 3.0, "after": 1.0}
    times = {"before": [1.0, 1.0, 1.0], "after": [2.0, 4.0, 2.0]}
    case = {"calls": {"project": row, "stored": {"times": times}}}
    assert compare_tables._faster(case, "project", "stored", "after") == statistics.median(
        [2, 2, 2]
    )
    assert compare_tables._faster(case, "project", "stored", "before") == pytest.approx(1 / 3)


def test_a_case_that_takes_long_ends_early(monkeypatch):
    monkeypatch.setattr(compare, "PAUSE", 0)
    monkeypatch.setattr(compare, "PATIENCE", 0)
    sides = {"before": Fake(ROOT / "other", "cpu", 1), "after": Fake(provenance.ROOT, "cpu", 1)}
    calls = compare.measure(sides, NAME, rounds=31)
    assert {len(calls["project"]["times"][side]) for side in compare.SIDES} == {compare.FEW}
    measured = {"cases": [{"case": NAME, "calls": calls}], "before": {"commit": "a"}, "commit": "b"}
    text = compare_tables.about(measured | {"threads": 1, "backend": "cpp"})
    assert "Medians of 5 rounds;" in text
    calls["project"]["times"]["after"] *= 2
    text = compare_tables.about(measured | {"threads": 1, "backend": "cpp"})
    assert "Medians of 5 to 10 rounds;" in text


# --- what one checkout answers ---


def test_the_operator_is_what_the_public_function_calls():
    calls = compared.calls(SMALL, "cpu")
    assert set(calls) == {"operator", "project", "views", "stored"}
    error = calls["project"].prepared.args[0]
    first, second, third = project(error, [70, 40, 70])
    assert first is third
    for made, expected in zip(calls["operator"](), (first, second), strict=True):
        assert torch.equal(made, expected)
    assert set(compared.calls(SMALL, "cpu", counted=True)) == {"operator", "project"}


def test_what_is_wrong_is_not_measured(monkeypatch):
    def wrong(*arguments, **options):
        return [1.01 * signal for signal in project(*arguments, **options)]

    monkeypatch.setattr(compared, "project", wrong)
    with pytest.raises(gate.Wrong):
        compared.calls(SMALL, "cpu")


def test_training_steps_are_calls():
    calls = compared.calls(STEP, "cpu")
    assert set(calls) == {"DFA", "backprop"}
    step = calls["DFA"].__self__
    before = [weight.clone() for weight in step.model.parameters()]
    calls["DFA"]()
    assert any(map(torch.ne, map(torch.norm, before), map(torch.norm, step.model.parameters())))


def test_a_checkout_answers(monkeypatch):
    monkeypatch.setattr(compared, "CASES", {"small": SMALL, "step": STEP})
    checkout = compared.Checkout("cpu", None)
    told = checkout.about()
    assert (told["version"], told["threads"]) == (
        provenance.dfa_kernels.__version__,
        torch.get_num_threads(),
    )
    once = checkout.prepare("small")
    assert all(time > 0 for time in once.values())
    assert checkout.time("project", 2) > 0
    assert set(checkout.prepare("step")) == {"DFA", "backprop"}


def test_instructions_are_the_difference_of_two_counts(tmp_path, monkeypatch):
    calls = []

    def dump():
        counted = 7000 + 100 * (len(calls) - warm[0])  # 7,000 of the counting itself
        (tmp_path / "counts.1").write_text(f"events: Ir\nsummary: {counted}\ntotals: {counted}\n")

    warm = [0]
    monkeypatch.setattr(torch._C, "_valgrind_toggle", lambda: warm.__setitem__(0, len(calls)))
    monkeypatch.setattr(torch._C, "_valgrind_toggle_and_dump_stats", dump)
    instructions = compared.Instructions(tmp_path)
    assert instructions.a_call(lambda: calls.append(1)) == 100
    assert len(calls) == 10 + 10 + 5
    monkeypatch.setattr(compared.time, "perf_counter", iter(range(0, 100, 3)).__next__)
    assert instructions.a_call(lambda: calls.append(1)) == 7100  # of seconds: one count
    assert len(calls) == 25 + 1 + 1
    assert not list(tmp_path.iterdir())


def test_a_torch_that_cannot_count_says_so(tmp_path, monkeypatch):
    monkeypatch.delattr(torch._C, "_valgrind_toggle")
    with pytest.raises(RuntimeError, match="leave out --instructions"):
        compared.Instructions(tmp_path)


def test_every_case_has_the_same_rivals():
    shapes = list(compared.shapes())
    assert len(compared.CASES) == len(shapes) + len(compared.STEPS)
    assert all(case.rivals == compared.RIVALS for case in shapes)
    assert all(
        case.name.endswith(case.distribution) or case.distribution == "normal" for case in shapes
    )
