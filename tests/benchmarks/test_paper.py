"""The paper's experiments: sizes, claims, resuming, data on disk, and a short run of each."""

import json
import os
import pickle
import signal
import sys
import types
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn

from benchmarks.harness import provenance, shapes
from benchmarks.harness.shapes import vgg16_sizes
from benchmarks.paper import __main__ as command
from benchmarks.paper import (
    architectures,
    data,
    distributions,
    drawings,
    memory,
    networks,
    published,
    table1,
    tables,
    text,
    vgg16,
)
from benchmarks.paper.architectures import ARCHITECTURES, Architecture
from benchmarks.paper.experiments import EXPERIMENTS, FIGURE4, TABLE2, TABLE4, Claim
from benchmarks.paper.networks import Practice
from benchmarks.paper.training import Job, Settings, Store, Trainee
from benchmarks.report import pages, paper_tables, texts
from dfa_kernels import stream
from dfa_kernels.backends import registry, slabs

CPU = torch.device("cpu")
SHORT = Settings(epochs=1, batch=24, hidden_rate=0.1, output_rate=0.01, side=8)


def few_images(side=8):
    """Two batches of random images."""
    torch.manual_seed(0)
    x, y = torch.randn(48, 1, side, side), torch.arange(48) % 10
    return data.Data("noise", x, y, x, y)


def test_vgg16_has_the_known_sizes():
    sizes = vgg16_sizes(224)
    assert len(sizes) == 15
    assert max(sizes) == 3_211_264
    vgg = next(a for a in ARCHITECTURES if a.name.startswith("VGG"))
    assert vgg.feedback_bytes("shared") == 12_845_056_000
    assert round(vgg.feedback_bytes("naive") / 1e9) == 54
    assert vgg.feedback_bytes("seeded") == 0


def test_the_vgg16_that_is_trained_has_those_sizes():
    with torch.device("meta"):
        model, points = architectures.vgg16(224, 1000)
        x, sizes = torch.empty(1, 3, 224, 224), {}
        for name, module in model.named_children():
            x = module(x)
            sizes[name] = x[0].numel()
    assert tuple(sizes[name] for name in points) == vgg16_sizes(224)
    # torchvision's vgg16 has as many parameters.
    assert sum(parameter.numel() for parameter in model.parameters()) == 138_357_544


def test_the_paper_cnn_has_the_sizes_of_table_1():
    model = networks.convolutional((3, 32, 32), 10, Practice("tanh"))
    x, sizes = torch.zeros(2, 3, 32, 32), []
    for name, module in model.named_children():
        x = module(x)
        if name != "output":
            sizes.append(x[0].numel())
    assert tuple(sizes) == ARCHITECTURES[1].sizes


@pytest.mark.parametrize(("storage", "stored"), [("naive", 240_000_000), ("seeded", 0)])
def test_the_measured_peak_is_what_is_stored(storage, stored):
    architecture = Architecture("three wide layers", (200_000,) * 3, 100)
    cell = table1.cell(architecture, storage, CPU, largest=2**63)
    assert cell["stored"] == stored
    # Beyond it the signals, the library's workspace, and what the allocator keeps.
    slack = slabs.WORKSPACE_BYTES + 16 * 2**20
    assert stored <= cell["peak"] <= stored + cell["signals"] + slack


def end(device, how):
    """Work in a child process that does not finish."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "crashed":
        os.kill(os.getpid(), signal.SIGABRT)
    if how == "too large":
        torch.empty(2**58, device=device)
    raise ValueError("wrong")


@pytest.mark.parametrize("how", ["killed", "too large"])
def test_a_child_that_memory_ran_out_for_does_not_fit(how):
    assert memory.in_child(end, 123, CPU, how=how) == {memory.MISSING: 123}


@pytest.mark.parametrize("how", ["crashed", "failed"])
def test_a_child_that_fails_is_no_lack_of_memory(how):
    with pytest.raises(RuntimeError, match="ended with status"):
        memory.in_child(end, 123, CPU, how=how)


def test_what_does_not_fit_says_how_much_it_needs():
    huge = Architecture("huge", (2**40,), 1000)
    cell = table1.cell(huge, "shared", CPU, largest=2**63)
    assert cell[memory.MISSING] >= 4 * 2**40 * 1000
    assert "does not fit" in texts.peak(cell)


def test_a_peak_below_what_resident_memory_can_show():
    assert texts.peak({"peak": -4096}) == "under 1 MB"
    assert texts.peak({"peak": 2e6}) == "2 MB"


def test_the_tables_of_memory():
    lines = paper_tables.paper_table1({"rows": table1.run(CPU, -1, lambda: None)})
    (vgg,) = [line for line in lines if "VGG" in line]
    assert vgg.count("not measured") == 3
    assert "| 54.2 GB |" in vgg
    assert "| 12.8 GB |" in vgg
    row = {"name": "naive", "stored": 2e9, "peak": 3e9, "seconds": 0.5}
    huge = {"name": "huge", "stored": 5e10, memory.MISSING: 6e10}
    lines = paper_tables.paper_vgg16({"resolution": 112, "batch": 4, "rows": [row, huge]})
    assert lines[2] == "| naive | 2 GB | 3 GB | 0.50 s |"
    assert lines[3] == "| huge | 50 GB | does not fit (60 GB) |  |"


def test_he_initialization():
    torch.manual_seed(0)
    model = networks.perceptron((1, 20, 20), 10, Practice("tanh"))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        assert linear.weight.var().item() == pytest.approx(2 / linear.in_features, rel=0.1)
        assert not linear.bias.any()


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_every_variant_trains(experiment, tmp_path):
    """Train on two batches each; every claim has its rows, every table is printed and drawn."""
    settings = replace(SHORT, side=experiment.settings["digits"].side)
    jobs = [
        replace(job, settings=settings, data="noise")
        for job in experiment.jobs("digits", quick=True, seeds=None, epochs=None)
    ]
    store = Store(tmp_path)
    runs = experiment.run(jobs, few_images(), store, lambda n: None)
    assert all(0 <= result["test_accuracy"] <= 1 for _, result in runs)
    for job, result in runs:
        layers = 4 if experiment is TABLE4 else 3
        assert len(result.get("alignment", ())) == (layers if job.mode == "dfa" else 0)
    summary = tables.summarize(experiment, runs)
    assert len(summary["rows"]) == len(jobs)
    assert len(summary["claims"]) == len(experiment.claims)
    assert tables.tables(summary)[0].row_count == len(jobs)
    drawn = drawings.draw(experiment.name, provenance.origin("cpu") | summary, tmp_path)
    assert drawn.stat().st_size > 10_000
    lines = (
        paper_tables.paper_figure4(summary)
        if experiment is FIGURE4
        else (paper_tables.paper_practices(summary))
    )
    rows = published.BOTTLENECKS if experiment is FIGURE4 else experiment.rows
    assert sum(line.startswith("|") for line in lines) == 2 + len(rows)


def committed(name):
    """A committed result of the paper's experiments."""
    path = min(pages.RESULTS.glob(f"*/paper_{name}.json"))
    return json.loads(path.read_text())


def test_figure_4_has_one_colour_for_each_way_and_no_cosine_beyond_1():
    figure = drawings.figure4(committed("figure4"))
    colours = {}
    for panel in figure.axes:
        for curve in panel.containers:
            line, _, (bars,) = curve
            assert len(line.get_xdata()) == len(published.BOTTLENECKS)
            assert colours.setdefault(curve.get_label(), line.get_color()) == line.get_color()
            assert all(abs(y) <= 1 for _, y in np.concatenate(bars.get_segments()))
    assert len(set(colours.values())) == len(colours) == 3
    assert all("published" in panel.lines[-1].get_label() for panel in figure.axes)
    plt.close(figure)


def test_the_figure_of_table_1_shows_every_measured_peak():
    results = committed("table1")
    figure = drawings.memory(results)
    (panel,) = figure.axes
    drawn = np.concatenate([points.get_offsets().filled(np.nan) for points in panel.collections])
    measured = [row[way] for row in results["rows"] for way in architectures.STORAGES]
    assert np.isfinite(drawn[:, 1]).sum() == sum("peak" in cell for cell in measured)
    assert np.nanmin(drawn[:, 1]) == texts.LEAST_PEAK
    assert len(panel.containers) == 2  # bars: from the seed nothing is stored
    plt.close(figure)


def test_the_variants_are_what_they_are_called():
    for practice, _ in TABLE2.rows:
        model = networks.perceptron((1, 8, 8), 10, practice)
        kinds = [type(module) for module in model.modules()]
        rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
        assert kinds.count(nn.BatchNorm1d) == 3 * practice.batch_norm
        assert rates == [practice.dropout[0]] + [practice.dropout[1]] * 3 * any(practice.dropout)
        assert kinds.count(type(networks.ACTIVATIONS[practice.activation]())) == 3


def test_a_masked_layer_learns_only_in_the_fraction():
    torch.manual_seed(0)
    model = networks.perceptron((1, 8, 8), 10, Practice("bottleneck", masked=0.25))
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    learning = model[1][0].weight.grad.count_nonzero().item()
    assert learning / 800**2 == pytest.approx(0.25, abs=0.01)
    assert model[0][2].weight.grad.count_nonzero() > 0.9 * 800 * 64


def test_a_narrow_layer_is_narrow():
    model = networks.perceptron((1, 8, 8), 10, Practice("bottleneck", narrow=5))
    assert model[1](model[0](torch.zeros(2, 1, 8, 8))).shape == (2, 5)


def test_an_interrupted_experiment_continues(tmp_path):
    jobs = [
        Job("table2", practice, "dfa", 0, SHORT, "noise")
        for practice in (Practice("tanh"), Practice("ReLU", activation="ReLU"))
    ]
    store, images, epochs = Store(tmp_path), few_images(), count()

    def interrupt(n):
        if next(epochs) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TABLE2.run(jobs, images, store, interrupt)
    assert store.get(jobs[0]) is not None
    assert store.get(jobs[1]) is None
    kept = json.loads((tmp_path / jobs[0].file_name).read_text())
    kept["test_accuracy"] = 0.123
    (tmp_path / jobs[0].file_name).write_text(json.dumps(kept))
    first, second = TABLE2.run(jobs, images, store, lambda n: None)
    assert first[1]["test_accuracy"] == 0.123  # was not trained again
    assert second[1] != first[1]
    other = replace(jobs[0], settings=replace(SHORT, hidden_rate=0.2))
    assert store.get(other) is None


def test_a_result_that_was_not_written_whole_is_none(tmp_path, monkeypatch):
    job = Job("table2", Practice("tanh"), "dfa", 0, SHORT, "noise")
    store, write = Store(tmp_path), Path.write_text

    def die(path, text):
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", die)
        with pytest.raises(KeyboardInterrupt):
            store.put(job, {"test_accuracy": 0.5})
    assert list(tmp_path.iterdir())
    assert store.get(job) is None
    store.put(job, {"test_accuracy": 0.5})
    assert store.get(job)["test_accuracy"] == 0.5


def test_a_run_is_repeatable(tmp_path):
    job = Job("table2", Practice("dropout", dropout=(0.1, 0.5)), "dfa", 3, SHORT, "noise")
    images = few_images()
    (once,), (again,) = (
        TABLE2.run([job], images, Store(tmp_path / name), lambda n: None) for name in "ab"
    )
    assert once == again


def test_claims_hold_where_the_difference_is_clear():
    alignments = {
        "good": {0: 0.50, 1: 0.52, 2: 0.51},
        "bad": {0: 0.30, 1: 0.31, 2: 0.33},
        "same": {0: 0.55, 1: 0.46, 2: 0.52},
    }
    assert tables.hold(Claim("good", "bad"), alignments)["holds"] == "yes"
    assert tables.hold(Claim("bad", "good"), alignments)["holds"] == "no"
    assert tables.hold(Claim("good", "same"), alignments)["holds"] == "unclear"
    alone = {name: {0: values[0]} for name, values in alignments.items()}
    assert tables.hold(Claim("good", "bad"), alone)["holds"] == "unclear"


@pytest.mark.parametrize("sign", [1, -1])
def test_rank_agreement_is_that_of_the_published_order(sign):
    rows = [
        {
            "practice": f"masked {size}",
            "mode": "dfa",
            "test_accuracy": {"mean": sign * accuracy},
            "alignment": {"layer 2": {"mean": sign * angle**3}},
        }
        for size, accuracy, angle in zip(
            published.BOTTLENECKS, published.TEST_ACCURACY, published.ALIGNMENT, strict=True
        )
    ]
    agreement = tables.rank_agreement(rows)
    assert agreement == pytest.approx({"test_accuracy": sign, "alignment": sign})
    level = [row | {"test_accuracy": {"mean": 0.9}} for row in rows]
    assert tables.rank_agreement(level)["test_accuracy"] is None


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    short = replace(TABLE2, rows=TABLE2.rows[:2], claims=TABLE2.claims[:1])
    monkeypatch.setitem(EXPERIMENTS, "table2", short)
    options = ["--quick", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
    command.main(["table2", *options])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "paper_table2.json").read_text())
    assert written["data"] == "digits"
    assert "on digits" in printed
    assert [row["practice"] for row in written["rows"]] == ["tanh"] * 3 + ["no norm"]
    for row in written["rows"]:
        assert tables.percent(row["test_accuracy"]) in printed
    assert (tmp_path / "paper_table2.png").stat().st_size > 10_000
    assert written["commit"]


def test_the_command_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        command.main(["table3"])
    assert "table3" in capsys.readouterr().err


def test_vgg16_trains_in_every_way(monkeypatch):
    monkeypatch.setattr(shapes, "VGG16_LINEAR", (64, 64))
    losses = {
        way: vgg16.measure(way, resolution=32, batch=1, steps=2, device=CPU)["losses"]
        for way in vgg16.WAYS
    }
    assert all(second < first for first, second in losses.values())
    assert losses["shared"] == pytest.approx(losses["seeded"], rel=1e-4)
    assert losses["lean"] == pytest.approx(losses["seeded"], rel=1e-4)
    assert losses["naive"][1] != pytest.approx(losses["seeded"][1], rel=1e-4)


def test_the_vgg16_command_says_what_is_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vgg16, "WAYS", {"naive": "DFA, a matrix per layer"})
    command.main(["vgg16", "--quick", "--batch", "2", "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "paper_vgg16.json").read_text())["rows"]
    assert row["stored"] == 4000 * sum(vgg16_sizes(32))
    assert row["peak"] > row["stored"]
    assert texts.bytes_text(row["stored"]) in capsys.readouterr().out


def test_vgg16_with_a_matrix_per_layer_does_not_fit_everywhere(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 24 * 2**30)
    monkeypatch.setattr(vgg16, "WAYS", {"naive": "DFA, a matrix per layer"})
    (row,) = vgg16.run(CPU, 224, 4, 1, lambda: None)
    assert row[memory.MISSING] > 54e9


def test_byte_pairs_are_the_most_frequent():
    written = "ab ab abc\n    ab"
    words = Counter(text.WORDS.findall(written))
    assert words == {"ab": 2, " ab": 1, " abc": 1, "\n    ": 1}
    first, second = text.byte_pairs(words, text.BYTES + 2)
    assert first == "ab"  # four times, "  " three times
    assert second == "  "
    tokens = text.encode(written, [first, second])
    assert tokens.tolist() == [256, 32, 256, 32, 256, ord("c"), 10, 257, 257, 256]


def test_overlapping_pairs_are_counted_again_after_a_merge():
    pairs = text.byte_pairs(Counter({"aaaa": 3, "ab": 1}), text.BYTES + 2)
    assert pairs == ["aa", "\u0100\u0100"]
    assert text.encode("aaaaa", pairs).tolist() == [257, ord("a")]


def test_the_text_is_the_standard_library(monkeypatch):
    modules = text.sources()
    assert any("def dedent(" in module for module in modules)
    monkeypatch.setattr(text, "sources", lambda: modules[:20])
    images = text.load(300, CPU)
    assert images.name == "next token of 300"
    assert images.classes == 300
    assert images.shape == (text.CONTEXT,)
    assert images.train_y.max() < 300
    assert images.train_y.unique().numel() > 100
    assert torch.equal(images.train_x[text.CONTEXT], images.train_y[: text.CONTEXT])
    assert len(images.test_x) == len(images.test_y) <= text.TEST_WINDOWS


def few_tokens():
    """Random tokens of 100 kinds."""
    torch.manual_seed(0)
    x, y = text.windows(torch.randint(100, (80,)), CPU)
    return data.Data(text.name(1024), x, y, x, y, 100)


@pytest.mark.parametrize("experiment", [distributions.IMAGES, distributions.TEXT])
def test_every_distribution_trains(experiment, tmp_path):
    part = few_images() if experiment is distributions.IMAGES else few_tokens()
    kind = "digits" if experiment is distributions.IMAGES else part.name
    settings = replace(experiment.settings[kind], batch=16, steps=2)
    jobs = [
        replace(job, settings=settings, data=part.name)
        for job in experiment.jobs(kind, quick=True, seeds=2, epochs=None)
    ]
    summary = distributions.run(experiment, jobs, part, Store(tmp_path), lambda n: None, rounds=1)
    rows = {texts.way(row): row for row in summary["rows"]}
    ways = ["backpropagation", "hidden layers frozen", *stream.DISTRIBUTIONS]
    assert [*rows] == ways
    assert len({row["test_loss"]["mean"] for row in rows.values()}) == len(ways)
    for name in stream.DISTRIBUTIONS:
        assert rows[name]["seeds"] == 2
        assert len(rows[name]["alignment"]) == 3
        assert all(angle["over_seeds"] > 0 for angle in rows[name]["alignment"].values())
        assert rows[name]["backend"] == registry.choose("project", CPU, None, name)
    assert all(row["step_seconds"] > 0 for row in rows.values())
    lines = paper_tables.paper_distributions({"parts": [summary]})
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][1:] == [
        f"| {way}" for way in ways
    ]
    assert tables.distributions_table(summary).row_count == len(ways)


def test_the_command_runs_distributions(tmp_path, monkeypatch, capsys):
    part = few_tokens()
    settings = {part.name: replace(distributions.NEXT_TOKEN, steps=1, batch=8)}
    short = replace(distributions.TEXT, settings=settings)
    monkeypatch.setattr(distributions, "parts", lambda folder, device: [(short, part)])
    options = ["--quick", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
    command.main(["distributions", *options])
    (written,) = json.loads((tmp_path / "paper_distributions.json").read_text())["parts"]
    assert written["n"] == part.classes
    printed = capsys.readouterr().out
    assert all(name in printed for name in stream.DISTRIBUTIONS)
    assert all(texts.time_text(row["step_seconds"]) in printed for row in written["rows"])


def test_adam_is_used_where_it_is_set(tmp_path):
    job = Job("x", Practice("normal"), "dfa", 0, replace(SHORT, adam=True), "noise")
    assert isinstance(Trainee(networks.perceptron, job, few_images()).optimizer, torch.optim.Adam)
    job = replace(job, settings=SHORT)
    assert isinstance(Trainee(networks.perceptron, job, few_images()).optimizer, torch.optim.SGD)


def test_digits():
    images = data.load(None, CPU)
    assert images.shape == (1, 8, 8)
    assert len(images.train_y) + len(images.test_y) == 1797
    assert images.resized(16).shape == (1, 16, 16)


def write_cifar10(folder, count):
    """Write random images in the files of CIFAR-10; return what each holds."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    parts = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        labels = rng.integers(0, 10, count).tolist()
        parts[name] = (pixels, labels)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    names = {"label_names": [str(i) for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    return parts


class Cifar10:
    """What the loader needs of torchvision's CIFAR10, reading the same files."""

    base_folder = "cifar-10-batches-py"
    train_list = tuple((f"data_batch_{i}", None) for i in range(1, 6))
    test_list = (("test_batch", None),)

    def __init__(self, root, train, download):
        assert not download
        files = self.train_list if train else self.test_list
        folder = Path(root) / self.base_folder
        batches = [pickle.loads((folder / name).read_bytes()) for name, _ in files]
        pixels = np.vstack([batch["data"] for batch in batches])
        self.data = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        self.targets = [label for batch in batches for label in batch["labels"]]


@pytest.fixture(params=["torchvision", "stand-in"])
def cifar10_class(request, monkeypatch):
    if request.param == "stand-in":
        datasets = types.ModuleType("torchvision.datasets")
        datasets.CIFAR10 = Cifar10
        monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
        return Cifar10
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError):
        pytest.skip("no torchvision for this torch")
    # Their checksums are of the real files.
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, name, [(file, None) for file, _ in getattr(CIFAR10, name)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    return CIFAR10


def test_cifar10_from_a_folder(tmp_path, cifar10_class):
    parts = write_cifar10(tmp_path / cifar10_class.base_folder, 4)
    images = data.load(tmp_path, CPU)
    assert images.name == "CIFAR-10"
    assert images.train_x.shape == (20, 3, 32, 32)
    assert images.test_x.shape == (4, 3, 32, 32)
    pixels, labels = parts["test_batch"]
    assert images.test_y.tolist() == labels
    assert images.train_y.tolist()[4:8] == parts["data_batch_2"][1]
    blue = torch.tensor(pixels[1, 2 * 32 * 32 :].reshape(32, 32) / 255)
    expected = ((blue - 0.4465) / 0.2010).float()
    torch.testing.assert_close(images.test_x[1, 2], expected)
    red = torch.tensor(pixels[2, : 32 * 32].reshape(32, 32) / 255)
    expected = ((red - 0.4914) / 0.2023).float()
    torch.testing.assert_close(images.test_x[2, 0], expected)


def write_images(folder, classes=10, side=32):
    """Two random images of each class for training and one for testing; the pixels by file."""
    written = {}
    rng = np.random.default_rng(1)
    for part, images in (("train", 2), ("test", 1)):
        for kind in range(classes):
            inner = folder / part / f"kind {kind}"
            inner.mkdir(parents=True)
            for index in range(images):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(inner / f"{index}.png")
                written[part, kind, index] = pixels
    return written


def test_cifar10_from_image_files(tmp_path):
    written = write_images(tmp_path)
    images = data.load(tmp_path, CPU)
    assert images.name == "CIFAR-10"
    assert sorted(images.train_y.tolist()) == [kind for kind in range(10) for _ in range(2)]
    assert sorted(images.test_y.tolist()) == list(range(10))
    assert len(images.train_y[:8].unique()) > 4  # a part has not only the first classes
    for pixels, kind in ((written["train", 3, 1], 3), (written["train", 8, 0], 8)):
        green = ((torch.tensor(pixels[:, :, 1] / 255) - 0.4822) / 0.1994).float()
        of_kind = images.train_x[images.train_y == kind, 1]
        assert any(torch.allclose(found, green, rtol=1e-5, atol=1e-6) for found in of_kind)
    assert images.test_x.shape == (10, 3, 32, 32)


def test_image_files_that_are_not_cifar10(tmp_path):
    write_images(tmp_path / "few", classes=9)
    with pytest.raises(SystemExit, match="no CIFAR-10 there: train has 9 classes, 18 files"):
        data.load(tmp_path / "few", CPU)
    write_images(tmp_path / "small", side=28)
    with pytest.raises(SystemExit, match=r"must be 32 x 32, got \[\(28, 28, 3\)\]"):
        data.load(tmp_path / "small", CPU)
    write_images(tmp_path / "text")
    (tmp_path / "text" / "train" / "kind 0" / "notes.txt").write_text("no image")
    with pytest.raises(SystemExit, match=r"notes\.txt is no image"):
        data.load(tmp_path / "text", CPU)


def test_cifar10_that_cannot_be_had_says_why(tmp_path):
    with pytest.raises(SystemExit, match=r"torchvision|no CIFAR-10 there"):
        data.load(tmp_path, CPU)
