"""The tables of what was measured on a GPU."""

import pytest

from benchmarks.harness import provenance
from benchmarks.report import gpu_tables, pages

SHAPE = {"rows": 2000, "columns": 1000}
WAYS = {"cuda": 4e-6, "cuda fused 128 x 8": 2e-6, "triton": None, "stored": 3e-6}


def timed(batch, seconds, dtype="bfloat16", **rest):
    setting = {"distribution": "normal", "dtype": dtype, "precision": "highest", "batch": batch}
    return setting | SHAPE | {"seconds": seconds} | rest


def test_the_best_way_of_every_batch():
    exact = timed(2048, {"cuda": 5e-3, "triton": 4e-3, "stored": None}, "float32", precision="high")
    assert gpu_tables.gpu_ways({"timed": [timed(8, WAYS), exact]}) == [
        "| error | entries | M | best | time | entries of U | stored matrix "
        "| `cuda` chooses | `triton` chooses |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
        "| bf16 | normal | 8 | cuda fused 128 x 8 | 2 us | 1e+12/s | 1.50x | 4 us |  |",
        '| fp32, "high" | normal | 2,048 | triton | 4 ms | 5e+08/s | not run | 5 ms | 4 ms |',
        "",
        "U has 2,000 x 1,000 entries.",
    ]


def test_tiles_without_a_choice_and_a_batch_without_tiles():
    tiles = [timed(1, {"128 x 8": 4e-6, "128 x 16": 5e-6, "stored": 2e-6})]
    tiles.append(timed(256, {"stored": 2e-6}, "float16"))
    assert gpu_tables.gpu_ways({"timed": tiles})[:4] == [
        "| error | entries | M | best | time | entries of U | stored matrix |",
        "|---|---|---:|---|---:|---:|---:|",
        "| bf16 | normal | 1 | 128 x 8 | 4 us | 5e+11/s | 0.50x |",
        "| fp16 | normal | 256 | not measured |  |  |  |",
    ]


def test_small_shapes_are_said_to_be_bound_by_the_host():
    few = [
        timed(1, {"cuda": 41e-6, "128 x 8": 9e-6, "stored": 20e-6}, rows=10),
        timed(128, {"cuda": 39e-6, "stored": 22e-6}, rows=10),
        timed(256, {"cuda": 1.0, "stored": 1.0}, rows=10),  # takes a GPU longer than its host
        timed(8, {"cuda": 1.0, "stored": 1.0}, "float32", rows=10),
    ]
    lines = gpu_tables.gpu_ways({"timed": [*few, timed(8, WAYS)]})
    assert lines[2:] == [
        "| bf16 | normal | 8 | cuda fused 128 x 8 | 2 us | 1e+12/s | 1.50x | 4 us |  |",
        "",
        "U has 2,000 x 1,000 entries.",
        "",
        "Small shapes are bound by the host's time of a call, not by the GPU. With 10 rows, a "
        "bf16 error and M up to 128, a call takes about as long whatever M is: `cuda` 39 to 41 "
        "us, the stored matrix 20 to 22 us. So they are not in the table.",
    ]
    assert len(gpu_tables.gpu_ways({"timed": [few[3], timed(8, WAYS)]})) == 5  # none in bf16


def test_the_steps_of_a_check():
    steps = [{"name": "info", "ended": "passed", "seconds": 7.9, "status": 0}]
    lines = gpu_tables.gpu_check({"steps": steps})
    assert lines == ["| step | ended | seconds |", "|---|---|---:|", "| info | passed | 8 |"]


def test_a_profile_shows_the_three_greatest():
    kernel = {
        "kernel": "128 x 8",
        "seconds": 1.5e-4,
        "warps": 3.96,
        "issue_slots": 48.4,
        "pipes": {"ALU": 55.4, "XU": 1.0, "tensor": 20.0, "FMA heavy": 30.0},
        "samples": {"selected": 40, "wait": 30, "not_selected": 20, "barrier": 9, "drain": 1},
    }
    assert gpu_tables.gpu_profile({"kernels": [kernel]})[2:] == [
        "| 128 x 8 | 150 us | 4.0 | 48% | ALU 55%, FMA heavy 30%, tensor 20% "
        "| wait 30%, not selected 20%, barrier 9% |"
    ]


@pytest.mark.parametrize("with_bench", [True, False])
def test_a_page_of_a_gpu(tmp_path, with_bench):
    origin = {"device": "GPU", "date": "today", "commit": "0123456789 (built by hand)"}
    origin |= {"versions": {"torch": "2.0"}}
    save = provenance.save
    save(tmp_path / "tiles.json", origin | {"timed": [timed(8, WAYS)], "note": "Made up."})
    save(tmp_path / "profile_first.json", origin | {"kernels": []})
    if with_bench:
        save(tmp_path / "bench.json", origin | {"cases": [], "full": False, "roofs": {}})
    (tmp_path / "profile.md").write_text("# What limits it\n")
    (tmp_path / "README.md").write_text("# Old\n")
    text = pages.page(tmp_path)
    assert "| today | 012345678 (built by hand) | torch 2.0 |" in text
    assert "[`profile_first.json`](profile_first.json)" in text
    assert "See also: [What limits it](profile.md)." in text
    assert "Old" not in text
    assert "\n\nMade up.\n\n| error |" in text
    assert ("There is no `bench.json` yet" in text) is not with_bench
