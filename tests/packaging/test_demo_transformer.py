"""The demo's language model, on a text so small that it trains for a few steps."""

import pytest
import torch

from dfa_kernels import cli, feedback_matrix
from dfa_kernels.demo import transformer
from dfa_kernels.demo.common import Run, peak_bytes
from dfa_kernels.nn import OutputWeights

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A standard library of ten modules, the last of which is held out."""
    monkeypatch.setattr(transformer.sysconfig, "get_path", lambda name: str(tmp_path))
    window = bytes(range(32, 32 + transformer.CONTEXT))
    for index in range(8):
        (tmp_path / f"m0{index}.py").touch()
    (tmp_path / "m08.py").write_bytes(window * (3 * transformer.BATCH + 1))
    (tmp_path / "m09.py").write_bytes(window * 3)
    return tmp_path


def test_it_shows_and_draws_what_it_did(folder, monkeypatch, capsys):
    figure, made = folder / "curves.png", []
    feedback = transformer.feedback

    def noting(*args):
        made.append(feedback(*args))
        return made[-1]

    monkeypatch.setattr(transformer, "feedback", noting)
    options = ["--epochs", "2", "--seed", "3", "--backend", "torch", "--figure", str(figure)]
    options += ["--network", "transformer", "--distribution", "hadamard"]
    assert cli.main(["demo", *options]) == 0
    text = capsys.readouterr().out
    for expected in ("backpropagation", *transformer.LABELS.values(), "6 steps", "blocks.3"):
        assert expected in " ".join(text.split())
    for expected in ("tokens", "peak MB"):
        assert expected in text
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert [handle.mode for handle in made] == ["backprop", "dfa", "dfa", "shallow"]
    source = made[2].dfa.source
    assert (source.seed, source.backend, source.distribution) == (3, "torch", "hadamard")
    assert isinstance(made[1].dfa.source, OutputWeights)


def start(way):
    torch.manual_seed(0)
    model = transformer.Transformer()
    return model, transformer.feedback(model, way, 5, None, "normal")


def test_only_the_matched_output_layer_starts_as_the_feedback():
    plain, _ = start("backprop")
    for way in transformer.LABELS:
        model, handle = start(way)
        assert isinstance(handle.dfa.source, OutputWeights) == (way == "weights")
        for name, parameter in model.named_parameters():
            expected = plain.get_parameter(name)
            if way == "matched" and name == "output.weight":
                matrix = feedback_matrix(transformer.WIDTH, transformer.BYTES, seed=5)
                expected = matrix.T / transformer.WIDTH**0.5
            torch.testing.assert_close(parameter, expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", transformer.LABELS)
def test_each_way_trains_what_it_says(way, folder, monkeypatch):
    model, handle = start(way)
    monkeypatch.setattr(transformer, "Transformer", lambda random: model)
    monkeypatch.setattr(transformer, "feedback", lambda *_: handle)
    if way == "shallow":  # blocks that start at 0 would hide whether they learn
        model.load_state_dict(transformer.Transformer(random=True).state_dict())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    run, text = Run(), transformer.Text.load(CPU)
    assert len(list(transformer.train(way, text, 1, 0, None, run))) == 3
    after = dict(model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    last = {name for name in before if name.startswith(("norm.", "output."))}
    assert changed == (last if way == "shallow" else before.keys())
    assert run.values[-1] < run.values[0]
    assert run.steps == [1, 2, 3]
    weights = sum(value.nbytes for value in after.values() if value.grad is not None)
    logits = 4 * transformer.BATCH * transformer.CONTEXT * transformer.BYTES
    assert run.peak_bytes > weights + logits
    assert bool(run.alignments) == (way in ("weights", "matched"))


def test_the_peak_of_a_step_is_of_what_lives_at_once():
    number = torch.float32.itemsize * 100_000

    def step():
        ones = [torch.ones(100_000) for _ in range(3)]
        ones.pop()
        ones.append(torch.cat(ones))
        return ones

    kept = step()
    assert peak_bytes(step, CPU) == 4 * number
    assert peak_bytes(kept.clear, CPU) == 0


def test_the_table_has_speed_and_memory():
    runs = {
        way: Run([2.0], [1], [0.5, 0.25, 0.25], peak_bytes=20_500_000) for way in transformer.LABELS
    }
    columns = {str(one.header): list(one.cells) for one in transformer.report(runs)[0].columns}
    assert columns["tokens per second"] == ["4,096"] * 4  # BATCH x CONTEXT each quarter of a second
    assert columns["peak MB"] == ["20.50"] * 4


def test_the_model_sees_no_byte_before_its_turn():
    model = transformer.Transformer(random=True)
    tokens = torch.randint(256, (2, 10))
    other = tokens.clone()
    other[:, 6:] = 0
    assert torch.equal(model(tokens)[:, :6], model(other)[:, :6])
    assert not torch.equal(model(tokens)[:, 6:], model(other)[:, 6:])


def test_every_tenth_module_is_held_out_each_up_to_a_limit(folder, monkeypatch):
    length = 2 * transformer.CONTEXT
    for index in range(10, 32):
        (folder / f"m{index}.py").write_bytes(bytes([index]) * length + b"more")
    monkeypatch.setattr(transformer, "BATCH", 1)
    monkeypatch.setattr(transformer, "BEGINNING", length)
    text = transformer.Text.load(CPU)
    held_out = {19, 29}
    assert set(text.test.flatten().tolist()) & {*range(32)} == held_out
    assert set(text.train.flatten().tolist()) & {*range(32)} == {*range(10, 32)} - held_out
    assert ord("r") not in text.train


def test_windows_share_a_byte_with_the_next():
    text = bytes(range(2 * transformer.CONTEXT + 3))
    first, second = transformer.windows(text).tolist()
    assert first == [*range(65)]
    assert second == [*range(64, 129)]


def test_a_python_without_sources_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transformer.sysconfig, "get_path", lambda name: str(tmp_path))
    assert cli.main(["demo", "--network", "transformer"]) == 1
    shown = capsys.readouterr().out
    assert "demo: the standard library's sources must be files" in shown
    assert f"in {tmp_path}, got 0 files" in shown


def test_the_way_is_measured_from_frozen_blocks():
    runs = {"shallow": Run([2.5]), "backprop": Run([2.0]), "matched": Run([2.1])}
    assert transformer.closed(runs, "matched") == "80 %"
    assert transformer.closed(runs, "shallow") == "0 %"
    assert transformer.closed({**runs, "backprop": Run([2.6])}, "matched") == "-"


@pytest.mark.parametrize(
    ("options", "epochs", "figure"),
    [([], 1, "demo-transformer.png"), (["--epochs", "2", "--figure", "a.png"], 2, "a.png")],
)
def test_what_is_left_out_goes_by_the_network(options, epochs, figure, monkeypatch):
    given = []
    monkeypatch.setattr(transformer, "run", lambda *args: given.append(args))
    assert cli.main(["demo", "--network", "transformer", *options]) == 0
    ((got_epochs, seed, backend, device, got_figure, distribution),) = given
    assert (got_epochs, str(got_figure)) == (epochs, figure)
    assert (seed, backend, device, distribution) == (0, None, CPU, "normal")
