"""The command line, run as a user runs it and as a function."""

import re
import subprocess
import sys

import pytest
import torch

from dfa_kernels import cli
from dfa_kernels.backends import cpp
from dfa_kernels.demo import perceptron
from dfa_kernels.demo.common import Run
from dfa_kernels.nn import DFA
from dfa_kernels.version import __version__


def test_info_names_versions_and_backends(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"dfa_kernels {__version__}, stream v1" in text
    assert torch.__version__ in text
    states = {line.split()[0]: line for line in text.splitlines() if line.split()[1:2] == ["cpu"]}
    assert "available" in states["torch"]


def test_info_says_why_not_and_who_asked(capsys, monkeypatch):
    monkeypatch.setattr(cpp, "unavailable", lambda device_type: "not today")
    monkeypatch.setenv("DFA_KERNELS_BACKEND", "torch")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^cpp +cpu +not today$", text, re.MULTILINE)
    assert "DFA_KERNELS_BACKEND=torch takes the place" in text
    monkeypatch.setenv("DFA_KERNELS_BACKEND", "abacus")
    assert cli.main(["info"]) == 0
    assert "DFA_KERNELS_BACKEND=abacus is no backend" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--network", "rnn"], "invalid choice: 'rnn'"),
        (["--epochs", "0"], "must be at least 1, got 0"),
        (["--backend", "abacus"], "invalid choice: 'abacus'"),
        (["--distribution", "cauchy"], "invalid choice: 'cauchy'"),
        (["--seed", "-1"], "must be in [0, 2**64), got -1"),
        (["--device", "abacus"], "abacus"),
        (["--figure", "no/such/folder.png"], "got no/such/folder.png"),
    ],
)
def test_demo_refuses_bad_options(option, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", *option])
    shown = capsys.readouterr().err
    assert f"argument {option[0]}: " in shown
    assert message in shown


def test_demo_says_why_a_backend_cannot_serve(monkeypatch, capsys):
    monkeypatch.setattr(cpp, "unavailable", lambda device_type: "not today")
    assert cli.main(["demo", "--backend", "cpp"]) == 1
    assert "demo: backend 'cpp' cannot serve cpu: not today" in capsys.readouterr().out


def test_the_module_runs():
    command = [sys.executable, "-m", "dfa_kernels", "--help"]
    assert "demo" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["juggle"])
    assert "juggle" in capsys.readouterr().err


@pytest.mark.parametrize("network", ["perceptron", "transformer"])
def test_demo_without_its_extra_says_what_to_install(network, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    for module in ("common", network):
        monkeypatch.delitem(sys.modules, f"dfa_kernels.demo.{module}", raising=False)
    assert cli.main(["demo", "--network", network]) == 1
    assert "pip install dfa-kernels[demo]" in capsys.readouterr().out


def test_demo_shows_and_draws_what_it_did(tmp_path, capsys):
    figure = tmp_path / "curves.png"
    assert cli.main(["demo", "--epochs", "1", "--figure", str(figure)]) == 0
    text = capsys.readouterr().out
    for expected in ("backpropagation", "DFA", "hidden 3", "96,000", "32,000", "from the seed"):
        assert expected in text
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_demo_trains_with_the_distribution_asked_for(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        perceptron, "DFA", lambda *args, **options: made.append(DFA(*args, **options)) or made[-1]
    )
    options = ["--epochs", "1", "--distribution", "hadamard", "--figure", str(tmp_path / "a.png")]
    assert cli.main(["demo", *options]) == 0
    assert [dfa.distribution for dfa in made] == ["hadamard"] * len(perceptron.LABELS)


@pytest.mark.slow
def test_demo_accuracy():
    """After half the default epochs DFA is within 3 points of backpropagation, and beats frozen
    hidden layers."""
    data = perceptron.Data.load(torch.device("cpu"))
    runs = {mode: Run() for mode in perceptron.LABELS}
    for mode, run in runs.items():
        assert len(list(perceptron.train(mode, data, 15, 0, None, run))) == 15
    accuracy = {mode: run.values[-1] for mode, run in runs.items()}
    assert accuracy["backprop"] > 0.95
    assert accuracy["dfa"] > accuracy["backprop"] - 0.03
    assert accuracy["dfa"] > accuracy["shallow"]
    assert all(value.mean > 0 for value in runs["dfa"].alignments.values())
