"""The experiment on residual networks, at sizes where a training takes a moment."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.paper import __main__ as command
from benchmarks.paper import data, drawings, text
from benchmarks.paper.training import Store
from benchmarks.paper.transformers import recipes, summary, trials
from benchmarks.paper.transformers.feedback import RANK, feedback_of
from benchmarks.paper.transformers.recipes import (
    EMBEDDING,
    MAIN,
    MATCHED,
    OUTPUT_WEIGHTS,
    SMALL,
    VARIANTS,
)
from benchmarks.paper.transformers.residual import NETWORKS
from benchmarks.paper.transformers.trials import Trainee, Trial
from benchmarks.report import transformer_tables
from dfa_kernels import feedback_matrix
from dfa_kernels.layers import Layers

CPU = torch.device("cpu")
TINY = replace(SMALL, depth=2, width=32, steps=2, batch=4)


def few_tokens():
    torch.manual_seed(0)
    x, y = text.sequences(torch.randint(40, (60,)), 8, CPU)
    return data.Data(SMALL.data, x, y, x, y, 40)


def few_images():
    torch.manual_seed(0)
    x, y = torch.randn(30, 1, 8, 8), torch.randint(10, (30,))
    return data.Data("digits", x, y, x, y)


def tiny(network):
    setting = replace(TINY, network=network)
    return (setting, few_tokens()) if network == "transformer" else (setting, few_images())


@pytest.mark.parametrize(
    "recipe", dict.fromkeys((*MAIN, *VARIANTS.recipes)), ids=lambda recipe: recipe.name
)
def test_every_recipe_trains(recipe):
    trainee = Trainee(Trial(TINY, recipe, 0), few_tokens())
    before = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}
    trainee.learn(few_tokens(), range(2))
    changed = {
        name for name, p in trainee.model.named_parameters() if not torch.equal(p, before[name])
    }
    output = set() if recipe.frozen else {"output.weight"}
    norm = {"norm.weight", "norm.bias"}
    embedding = {"embed.token.weight", "embed.place.weight"}
    if recipe.mode == "shallow":
        assert changed == output | norm
    elif recipe.learns == "embedding":
        assert changed == output | norm | embedding
    else:
        ours = {name for name in before if name != "output.weight"} | output
        # Inside a branch that starts at 0 the second step is the first to change anything.
        assert changed == ours


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("recipe", MAIN, ids=lambda recipe: recipe.name)
def test_every_network_trains(network, recipe):
    if (network, recipe) == ("perceptron", EMBEDDING):
        pytest.skip("it has no embedding")
    setting, part = tiny(network)
    ticks = []
    result = trials.train(Trial(setting, recipe, 0), part, lambda: ticks.append(1))
    assert [one["step"] for one in result["curve"]] == [1, 2]
    assert len(ticks) == 2
    last = result["curve"][-1]
    assert 0 < last["loss"] < 5
    assert ("alignment" in last) == (recipe.mode == "dfa")


@pytest.mark.parametrize("network", ["transformer", "ViT", "residual perceptron", "ResNet"])
def test_before_any_step_the_output_weights_give_backpropagations_signals(network):
    """Blocks at 0 have no Jacobian of their own; another seed's signals have no angle to it."""
    setting, part = tiny(network)
    for recipe in (OUTPUT_WEIGHTS, MATCHED):
        found = trials.measure(Trainee(Trial(setting, recipe, 0), part), part)
        assert [*found["alignment"].values()] == pytest.approx([1.0, 1.0], abs=0.01)
        assert max(map(abs, found["null"].values())) < 0.6
        assert found["output"] == pytest.approx(1)


def test_what_is_measured_is_left_as_it_was():
    trainee = Trainee(Trial(TINY, MATCHED, 0), few_tokens())
    source, mode = trainee.handle.dfa.source, trainee.handle.mode
    trials.measure(trainee, few_tokens())
    assert (trainee.handle.dfa.source, trainee.handle.mode) == (source, mode)


def test_only_the_matched_output_layer_starts_as_the_feedback():
    model = Trainee(Trial(TINY, MATCHED, 3), few_tokens()).model
    expected = feedback_matrix(32, 40, seed=3).T / 32**0.5
    torch.testing.assert_close(model.output.weight, expected)
    other = Trainee(Trial(TINY, OUTPUT_WEIGHTS, 3), few_tokens()).model.output.weight
    assert F.cosine_similarity(other.flatten(), expected.flatten(), 0).abs() < 0.2
    assert other.std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_feedback_from_an_output_layer_that_is_trained():
    trainee = Trainee(Trial(TINY, replace(OUTPUT_WEIGHTS, feedback="seed"), 0), few_tokens())
    output, dfa = trainee.model.output, trainee.handle.dfa
    start = feedback_of("their start", output, dfa)
    torch.testing.assert_close(start / start.norm(), output.weight.T / output.weight.norm())
    assert start.std().item() == pytest.approx(1, rel=0.01)
    error, layers = torch.randn(5, 40), Layers((0,), (32,), (0.5,))
    exact = 0.5 * error @ start.T
    (low,) = feedback_of(f"rank {RANK}", output, dfa).project(error, layers, torch.float32)
    angle = F.cosine_similarity(low, exact).mean()
    assert 0.5 < angle < 0.999
    both = feedback_of(f"seed and rank {RANK}", output, dfa)
    (corrected,) = both.project(error, layers, torch.float32)
    assert 0.5 < F.cosine_similarity(corrected, exact).mean() < 0.999


# --- summaries ---


def made_up():
    """Two seeds: the way from 4 to 2 is closed by three quarters and by a half."""
    losses = {summary.BACKPROP: (2.0, 2.0), summary.FROZEN: (4.0, 4.0), "ours": (2.5, 3.0)}
    losses |= {summary.ONLY_EMBEDDING: (3.0, 4.0)}
    part = summary.Part("variants", "Title", (TINY,), (), seeds=2)
    results = []
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            end = {"step": 2, "loss": loss, "accuracy": 0.5, "output": 0.9}
            if name == "ours":
                end |= {"alignment": {"blocks.0": 0.25}, "null": {"blocks.0": -0.01}}
            trial = Trial(TINY, replace(MATCHED, name=name), seed)
            results.append((trial, {"curve": [end | {"step": 1}, end], "commit": "0" * 40}))
    return summary.summarize(part, results)


def test_the_way_closed_is_seed_by_seed():
    found = {row["recipe"]["name"]: row for row in made_up()["rows"]}
    closed = found["ours"]["closed"]
    assert closed["mean"] == pytest.approx(0.625)
    assert closed["deviation"] == pytest.approx(0.125 * 2**0.5)
    assert found["ours"]["beyond"]["mean"] == pytest.approx(0.5)
    assert "closed" not in found[summary.BACKPROP]
    assert "beyond" not in found[summary.ONLY_EMBEDDING]
    assert [one["step"] for one in found["ours"]["curve"]] == [1, 2]
    assert found["ours"]["alignment"]["blocks.0"]["mean"] == 0.25


def test_seeds_without_a_floor_do_not_count():
    part = summary.Part("variants", "Title", (TINY,), (), seeds=2)
    end = {"step": 2, "accuracy": 0.5, "output": 0.9}
    losses = {(summary.BACKPROP, 0): 2.0, (summary.FROZEN, 0): 4.0, ("x", 0): 3.0, ("x", 1): 9.0}
    results = [
        (Trial(TINY, replace(MATCHED, name=name), seed), {"curve": [end | {"loss": loss}]})
        for (name, seed), loss in losses.items()
    ]
    rows = summary.summarize(part, [(t, r | {"commit": "0" * 40}) for t, r in results])["rows"]
    assert rows[2]["closed"] == {"mean": 0.5, "deviation": 0}
    assert rows[2]["seeds"] == 2
    assert "beyond" not in rows[2]


def test_the_tables_show_it():
    lines = transformer_tables.transformer_variants({"parts": [made_up()]})
    row = "| ours | 2.750 (0.354) | 50.0 (0.0) | 62 (18) | 50 (0) | 0.25 | 0.01 | 0.90 |"
    assert row in lines
    assert lines[-1] == "2 seeds, trained at commit 000000000."
    alone = made_up()["rows"][2] | {"seeds": 1}
    assert transformer_tables._results(alone)[:2] == ["2.750", "50.0"]
    assert summary.table(made_up()).row_count == 4
    many = {"alignment": {str(i): {"mean": i / 100} for i in range(12)}}
    assert transformer_tables._angles(many) == "0.00 0.02 0.04 0.07 0.09 0.11"


def test_what_is_stored_is_not_trained_again(tmp_path, monkeypatch):
    setting = replace(TINY, before="other", before_steps=1)
    part = summary.Part("fine-tuning", "Title", (setting,), MAIN, seeds=1)
    loaded = []

    def load(name):
        loaded.append(name)
        return few_tokens()

    todo = [*part.trials(quick=False, seeds=None)]
    first = summary.run(part, todo, load, Store(tmp_path), lambda n: None)
    assert set(loaded) == {"other", SMALL.data}
    assert len([*tmp_path.glob("learned-*.pt")]) == 1
    monkeypatch.setattr(summary, "train", None)
    ticks = []
    assert summary.run(part, todo, load, Store(tmp_path), ticks.append) == first
    assert ticks == [2] * len(MAIN)
    more = [*part.trials(quick=False, seeds=2)]
    assert summary.run(part, more, load, Store(tmp_path), lambda n: None, stored=True) == first


def test_fine_tuning_begins_with_what_was_learned():
    part, trial = few_tokens(), Trial(replace(TINY, before_steps=2), OUTPUT_WEIGHTS, 0)
    learned = trials.learned_before(trial, part)
    trainee = Trainee(trial, part, learned)
    for name, value in trainee.model.named_parameters():
        assert torch.equal(value, learned[name])


def test_the_command_runs_it(tmp_path, monkeypatch, capsys):
    images = replace(TINY, network="residual perceptron", data="digits")
    plain = replace(TINY, network="perceptron", data="digits")
    parts = [
        summary.Part("main", "Main", (TINY, replace(TINY, steps=4)), MAIN, 1),
        summary.Part("variants", "Variants", (TINY,), MAIN, 1),
        summary.Part("sizes", "Sizes", (replace(TINY, depth=3),), MAIN, 1),
        summary.Part("fine-tuning", "Tuning", (replace(TINY, before_steps=1),), MAIN, 1),
    ]
    monkeypatch.setattr(recipes, "FIRST_PARTS", parts)
    others = (
        summary.Part("others", "Others", (images,), MAIN, 1),
        summary.Part("perceptron", "Plain", (plain,), (*MAIN[:2], *MAIN[-3:]), 1),
    )
    monkeypatch.setattr(recipes, "others", lambda name: others)
    makes = {"digits": few_images, SMALL.data: few_tokens}
    monkeypatch.setattr(recipes, "loader", lambda *_: ("digits", lambda name: makes[name]()))
    options = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
    command.main(["transformers", *options])
    written = json.loads((tmp_path / "paper_transformers.json").read_text())
    assert (tmp_path / "paper_transformers.png").read_bytes().startswith(b"\x89PNG")
    assert "Variants" in capsys.readouterr().out
    for name in ("main", "variants", "sizes", "others", "tuning"):
        lines = getattr(transformer_tables, f"transformer_{name}")(written)
        (row, *_) = [line for line in lines if "output weights" in line]
        assert row.count(" | ") == lines[0].count(" | ")
    figure = drawings.transformers(written)
    assert [axes.get_xlabel() for axes in figure.axes] == ["step", "step", "blocks"]


def test_quick_is_a_sample_of_everything():
    for part in (*recipes.FIRST_PARTS, *recipes.others("digits")):
        quick, whole = [*part.trials(True, None)], [*part.trials(False, None)]
        assert len(quick) <= 5 < len(whole)
        assert {trial.setting.steps for trial in quick} == {2}
        assert {trial.seed for trial in whole} == {*range(part.seeds)}
    assert len({trial.file_name for trial in whole}) == len(whole)


def test_the_data_is_loaded_by_name(monkeypatch):
    monkeypatch.setattr(text, "headers", lambda: ["int x;\n" * 40] * 10)
    monkeypatch.setattr(text, "sources", lambda: ["x = 1\n" * 40] * 10)
    monkeypatch.setattr(recipes, "VOCABULARY", 260)
    text.learned_pairs.cache_clear()
    name, load = recipes.loader(None, CPU)
    assert name == load(name).name == "digits"
    python, headers = load(SMALL.data), load(recipes.HEADERS)
    assert load(SMALL.data) is python
    assert python.train_x.shape[1] == python.train_y.shape[1] == recipes.TOKENS
    assert torch.equal(python.train_x[0, 1:], python.train_y[0, :-1])
    assert not torch.equal(python.train_x[0], headers.train_x[0])
    text.learned_pairs.cache_clear()


def test_the_headers_are_there():
    assert sum(map(len, text.headers())) > 10**5
