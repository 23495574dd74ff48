"""The benchmark of large vocabularies: its ways, what it records of them, its table and figure."""

import json

import pytest
import torch
from matplotlib import pyplot as plt
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import large_vocabulary
from benchmarks.harness.measure import MISSING
from benchmarks.large_vocabulary import BACKPROP, LOSSES, WEIGHTS, Network, Race, Way
from benchmarks.report import __main__ as report
from benchmarks.report import figures, pages, vocabulary_tables

SIGNALS = (BACKPROP, "hadamard", "normal", WEIGHTS)
TOKENS, WIDTH, VOCABULARY = 9, 8, 33


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network(WIDTH, VOCABULARY, 3).double()


@pytest.fixture
def measured():
    """As in the JSON, of three numbers of tokens; whole logits do not fit with the last."""
    cases = []
    for tokens in (1024, 2048, 4096):
        ways = []
        for signals in (BACKPROP, "hadamard"):
            whole = {"seconds": tokens / 100, "rounds": 2, "peak": 3e5 * tokens, "products": 1e9}
            chunks = {"seconds": tokens / 200, "rounds": 3, "peak": 2.5e8, "products": 1e9}
            whole = {MISSING: 5 * 10**9} if tokens == 4096 else whole
            for loss, row in zip(LOSSES, (whole, chunks), strict=True):
                ways.append({"signals": signals, "loss": loss} | row)
        cases.append({"tokens": tokens, "logit_bytes": tokens * 10**5, "ways": ways})
    cases[1]["ways"][3] = {"signals": "hadamard", "loss": "chunks", "failed": "Wrong: all"}
    settings = {"vocabulary": 25_000, "width": 64, "branches": 12, "dtype": "float32", "threads": 2}
    origin = {"device": "a CPU", "date": "2026-11-28", "commit": "f00d", "versions": {"torch": "2"}}
    return origin | settings | {"finished": True, "rate": 5e8, "cases": cases}


def test_a_quick_run(tmp_path, capsys):
    file = tmp_path / "large_vocabulary.json"
    sizes = {"--vocabulary": 50, "--width": 12, "--branches": 2, "--rounds": 2, "--json": file}
    arguments = [str(one) for pair in sizes.items() for one in pair]
    assert large_vocabulary.main([*arguments, "--tokens", "16", "8"]) == 0
    results = json.loads(file.read_text())
    assert {"commit", "date", "device", "versions", "vocabulary", "width"} <= results.keys()
    assert results["finished"]
    assert [case["tokens"] for case in results["cases"]] == [8, 16]
    assert [case["logit_bytes"] for case in results["cases"]] == [8 * 50 * 4, 16 * 50 * 4]
    for case in results["cases"]:
        ways = [(row["signals"], row["loss"]) for row in case["ways"]]
        assert ways == [(signals, loss) for signals in SIGNALS for loss in LOSSES]
        for row in case["ways"]:
            assert row["seconds"] > 0
            assert row["rounds"] == 2
            assert row["peak"] >= 0
            assert 0 < row["products"] / results["rate"] <= row["seconds"]
    assert (tmp_path / "large_vocabulary.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    report.main([str(file)])
    assert "| 8 | 1.6 kB | backpropagation |" in capsys.readouterr().out


@pytest.mark.parametrize("signals", SIGNALS)
def test_all_of_the_network_learns_the_same_by_both_losses(network, signals):
    x, target = large_vocabulary.data(network, TOKENS)
    ways = [Way(network, signals, loss) for loss in LOSSES]
    whole, chunks = (way.gradients(x, target) for way in ways)
    assert all(one.any() for one in whole)
    torch.testing.assert_close(whole, chunks, rtol=1e-9, atol=1e-12)
    large_vocabulary.compare(*ways, x, target)


def test_each_way_has_its_signals(network):
    x, target = large_vocabulary.data(network, TOKENS)
    found = [Way(network, signals, "whole").gradients(x, target)[1] for signals in SIGNALS]
    for index, one in enumerate(found):
        assert not any(torch.allclose(one, other) for other in found[:index])


@pytest.mark.parametrize(("signals", "counted"), [(BACKPROP, 3), ("hadamard", 3), (WEIGHTS, 4)])
def test_the_limit_counts_the_products_that_are_needed(network, signals, counted):
    x, target = large_vocabulary.data(network, TOKENS)
    way = Way(network, signals, "whole")
    with FlopCounterMode(display=False) as counter:
        way.step(x, target)
    product = TOKENS * WIDTH * VOCABULARY
    assert counter.get_total_flops() == 2 * counted * product
    assert way.products(TOKENS) == 3 * product  # whose signals are the gradient of its input


def test_entries_are_multiplied_as_weights_are(network):
    product = TOKENS * WIDTH * VOCABULARY
    assert Way(network, "normal", "whole").products(TOKENS) == 4 * product


def test_a_way_that_does_not_fit_is_named_and_the_others_go_on(network, monkeypatch):
    race = Race(network, [BACKPROP, "hadamard"], 1, 20)
    failing, wanted = race.ways[3], race.ways[0].least_bytes(TOKENS)
    monkeypatch.setattr(large_vocabulary, "available_bytes", lambda _: wanted)
    assert all("seconds" in row for row in race.run(TOKENS)["ways"])
    monkeypatch.setattr(large_vocabulary, "available_bytes", lambda _: wanted - 1)

    def no_memory(x, target):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(failing, "step", no_memory)
    whole, chunks, *others = race.run(TOKENS)["ways"]
    assert whole[MISSING] == wanted
    assert chunks["seconds"] > 0
    assert all(MISSING in row for row in others)
    assert not race.failed


def test_gradients_that_differ_get_no_time(network, monkeypatch):
    race = Race(network, [BACKPROP, "hadamard"], 0, 20)
    step = race.ways[1].step
    monkeypatch.setattr(race.ways[1], "step", lambda x, target: step(x, target.flip(0)))
    race.check(TOKENS)
    rows = race.run(TOKENS)["ways"]
    assert "differs from that of whole logits" in rows[1]["failed"]
    assert all("seconds" in rows[index] for index in (0, 2, 3))


def test_a_long_step_is_taken_once(network):
    assert {row["rounds"] for row in Race(network, [WEIGHTS], 2, 0).run(TOKENS)["ways"]} == {1}


def test_the_table(measured):
    lines = vocabulary_tables.large_vocabulary(measured)
    rows = [line for line in lines if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2:4] == [
        "| 1,024 | 102 MB | backpropagation | 10.2 s | 307 MB | 5.12 s | 250 MB | 2.00x | 2 s |",
        "|  |  | DFA, structured | 10.2 s | 307 MB | 5.12 s | 250 MB | 2.00x | 2 s |",
    ]
    assert rows[5] == "|  |  | DFA, structured | 20.5 s | 614 MB |  | not measured |  | 2 s |"
    assert rows[6] == (
        "| 4,096 | 410 MB | backpropagation |  | does not fit (5 GB) | 20.5 s | 250 MB |  | 2 s |"
    )
    assert lines[-1] == (
        "A vocabulary of 25,000, width 64, 12 points, float32, 2 threads; medians of 2 to 3 steps. "
        "Products at 1 GFLOP/s."
    )


def test_the_figure_has_what_was_measured(measured):
    (figure,) = figures.drawings(measured).values()
    for panel, limit in zip(
        figure.axes, ("the logits alone", "backpropagation's products alone"), strict=True
    ):
        assert {line.get_label(): len(line.get_xdata()) for line in panel.lines} == {
            "backpropagation, whole logits": 2,
            "backpropagation": 3,
            "DFA, structured, whole logits": 2,
            "DFA, structured": 2,
            limit: 3,
        }
        assert panel.get_xscale() == panel.get_yscale() == "log"
    plt.close(figure)


def test_its_page_has_both(measured, tmp_path):
    (tmp_path / "large_vocabulary.json").write_text(json.dumps(measured))
    figures.draw(measured, tmp_path)
    text = pages.page(tmp_path)
    assert "\n".join(vocabulary_tables.large_vocabulary(measured)) in text
    assert "(large_vocabulary.png)" in text
