"""The benchmark of every way of a projection on a GPU, without a GPU."""

import json
import sys

import pytest
import torch

from benchmarks import gpu_tiles
from benchmarks.gpu_tiles import Setting
from dfa_kernels.stream import DENSE

BF16 = Setting("normal", torch.bfloat16, "highest", 8, 2000, 1000)


def test_every_setting_is_timed_once_and_the_largest_first():
    every = list(gpu_tiles.settings(quick=False))
    shapes, operands, batches = gpu_tiles.SHAPES, gpu_tiles.OPERANDS, gpu_tiles.BATCHES
    assert len(set(every)) == len(every)
    assert len(every) == len(shapes) * len(operands) * len(DENSE) * len(batches)
    assert every[0] == Setting("normal", torch.bfloat16, "highest", 1, 200_000, 1000)
    assert [one.rows for one in every] == sorted((one.rows for one in every), reverse=True)


def test_a_quick_run_takes_fewer():
    quick = list(gpu_tiles.settings(quick=True))
    assert [one for one in gpu_tiles.settings(quick=False) if one in set(quick)] == quick
    assert {one.rows for one in quick} == {200_000, 16_384, 4096}
    assert {one.columns for one in quick} == {1000}
    kinds = {(one.dtype, one.precision, one.distribution) for one in quick}
    bf16 = {(torch.bfloat16, "highest", distribution) for distribution in DENSE}
    others = {(dtype, "highest", "normal") for dtype in (torch.float16, torch.float32)}
    assert kinds == bf16 | others


def test_a_line_names_the_best_way():
    times = {"cuda": 4e-6, "cuda fused 128 x 8": 2e-6, "cuda slabs": None, "stored": 3e-6}
    assert gpu_tiles.line(BF16, times) == (
        "norm bfloat16/highest  2000 x 1000 M=8:  best cuda fused 128 x 8 2.0 us 1e+12/s  "
        "cuda 4.0  stored 3.0 us, 1.50x"
    )


def test_a_line_without_the_stored_matrix():
    assert gpu_tiles.line(BF16, {"triton": 4e-6, "stored": None}).endswith(
        "best triton 4.0 us 5e+11/s  triton 4.0  stored nan us, nanx"
    )


@pytest.fixture
def clock(monkeypatch):
    """Replaces the ways and their times by made-up ones; what was timed, and how often."""
    calls = []
    # Of each way, what the clock shows from call to call, for one call.
    shown = {
        "cuda": [9e-3, 1e-3, 5e-3, 4e-3, 6e-3],
        "fused": [2e-4, 3e-4, 1e-4, 3e-4, 2e-4],
        "slow": [0.3, 0.2],  # is not timed again
        "stored": [1e-2, 1e-2, 3e-3, 2e-3, 1e-3],
    }

    def ways(setting, error, backends):
        assert error.shape == (setting.batch, setting.columns)
        assert error.dtype == setting.dtype
        assert torch.get_float32_matmul_precision() == setting.precision
        for name in (*shown, "broken"):
            yield name, name_of(name)

    def name_of(name):
        def way():
            if name == "broken":
                raise RuntimeError("no such kernel")
            return name

        return way

    def seconds(way, device_type, repeats=1):
        assert device_type == "cuda"
        name = way()
        number = sum(1 for called, _ in calls if called == name)
        calls.append((name, repeats))
        return shown[name][number % len(shown[name])]

    randn = torch.randn
    monkeypatch.setattr(gpu_tiles, "ways", ways)
    monkeypatch.setattr(gpu_tiles, "seconds", seconds)
    monkeypatch.setattr(gpu_tiles.torch, "randn", lambda *size, device: randn(*size))
    return calls


MEDIANS = {"cuda": 5e-3, "fused": 2e-4, "slow": 0.2, "stored": 2e-3, "broken": None}


def test_times_are_medians_of_the_rounds(clock, capsys):
    before = torch.get_float32_matmul_precision()
    setting = BF16._replace(dtype=torch.float32, precision="high")
    assert gpu_tiles.measure(setting, ["cuda"]) == MEDIANS
    assert torch.get_float32_matmul_precision() == before
    assert "broken, Setting(" in capsys.readouterr().err
    warm_up = [(name, 1) for name in ("cuda", "fused", "slow", "stored") for _ in range(2)]
    # In turns. By its best call alone, 1 ms, `cuda` is repeated twice to take 2 ms.
    turns = [("cuda", 2), ("fused", 10), ("stored", 1)]
    assert clock == [*warm_up, *turns * gpu_tiles.ROUNDS]


def test_a_run_saves_what_it_has_measured(clock, tmp_path, monkeypatch, capsys):
    origin = {"device": "GPU", "commit": "f00d"}
    monkeypatch.setattr(gpu_tiles.provenance, "origin", lambda device_type: origin)
    monkeypatch.setattr(gpu_tiles.registry, "unavailable", lambda name, device_type: None)
    settings = [BF16, BF16._replace(batch=64, dtype=torch.float32)]
    monkeypatch.setattr(gpu_tiles, "settings", lambda quick: iter(settings))
    path = tmp_path / "tiles.json"
    monkeypatch.setattr(sys, "argv", ["gpu_tiles", "--json", str(path)])
    gpu_tiles.main()
    common = {"distribution": "normal", "precision": "highest", "rows": 2000, "columns": 1000}
    assert json.loads(path.read_text()) == origin | {
        "timed": [
            common | {"batch": 8, "dtype": "bfloat16", "seconds": MEDIANS},
            common | {"batch": 64, "dtype": "float32", "seconds": MEDIANS},
        ]
    }
    shown = capsys.readouterr().out.splitlines()
    assert shown == [gpu_tiles.line(setting, MEDIANS) for setting in settings]


def test_a_run_ends_when_its_time_is_over(clock, monkeypatch, capsys):
    monkeypatch.setattr(gpu_tiles.provenance, "origin", lambda device_type: {})
    monkeypatch.setattr(gpu_tiles.registry, "unavailable", lambda name, device_type: None)
    monkeypatch.setattr(sys, "argv", ["gpu_tiles", "--seconds", "-1"])
    gpu_tiles.main()
    assert capsys.readouterr().out == "the rest is left out: no time is left\n"
    assert clock == []


def test_a_backend_that_cannot_serve_ends_a_run(monkeypatch, capsys):
    monkeypatch.setattr(gpu_tiles.registry, "unavailable", lambda name, device_type: "no GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_tiles", "--backends", "triton"])
    with pytest.raises(SystemExit):
        gpu_tiles.main()
    assert "backend 'triton' cannot serve cuda: no GPU" in capsys.readouterr().err
