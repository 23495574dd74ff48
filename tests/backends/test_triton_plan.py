"""The tiles of the Triton kernels cover the union of the layers' rows, and name their layers."""

import pytest
import torch

pytest.importorskip("triton")

from dfa_kernels.backends.triton import plan
from dfa_kernels.layers import Layers


def layers_of(offsets, sizes):
    return Layers.of(offsets, sizes, [1.0] * len(sizes))


CASES = [
    ([0], [1]),
    ([0, 0, 0], [10, 25, 3]),
    ([0, 100, 50], [10, 10, 60]),
    ([2**63 - 5, 0], [5, 5]),
    ([4, 0, 2, 17], [1, 10, 8, 30]),
    ([7 * i % 50 for i in range(60)], [1 + 37 * i % 23 for i in range(60)]),
    ([40, 30, 20, 10], [10, 10, 10, 10]),
]


@pytest.mark.parametrize(("offsets", "sizes"), CASES)
@pytest.mark.parametrize("rows", [1, 8, 128])
def test_tiles_cover_every_row_once_and_name_its_layers(offsets, sizes, rows):
    tiles, order = plan.cut_into_tiles(layers_of(offsets, sizes), rows)
    assert sorted(order) == list(range(len(sizes)))
    covered = []
    for first, count, low, high in tiles.tolist():
        assert 0 < count <= rows
        mine = set(range(first, first + count))
        covered += mine
        sharing = [
            place
            for place, layer in enumerate(order)
            if mine & set(range(offsets[layer], offsets[layer] + sizes[layer]))
        ]
        assert (low, high) == (sharing[0], sharing[-1] + 1)
    wanted = {row for o, s in zip(offsets, sizes, strict=True) for row in range(o, o + s)}
    assert sorted(covered) == sorted(wanted)
    assert sum(last - first for first, last in layers_of(offsets, sizes).unions()) == len(wanted)


def test_layers_of_one_matrix_are_a_prefix_for_every_tile():
    """Of 1000 nested layers, a tile visits only those that share its rows."""
    sizes = [1 + 37 * i % 4001 for i in range(1000)]
    tiles, order = plan.cut_into_tiles(layers_of([0] * 1000, sizes), 128)
    for first, _, low, high in tiles.tolist():
        assert low == 0
        assert all(sizes[layer] > first for layer in order[:high])


def test_millions_of_rows_make_few_tiles():
    tiles, _ = plan.cut_into_tiles(layers_of([0, 0], [3_211_264, 800]), 128)
    assert len(tiles) == 25_088
    assert tiles[:7, 3].tolist() == [2] * 7
    assert (tiles[7:, 3] == 1).all()


def test_what_is_kept_is_bounded():
    kept = plan.Kept()
    for key in range(3 * plan._KEPT):
        kept.keep(key, -key)
    assert len(kept) == plan._KEPT
    assert kept[3 * plan._KEPT - 1] == 1 - 3 * plan._KEPT


def test_a_plan_holds_the_layers_in_its_order():
    made = plan.plan_for(Layers((3, 3), (9, 70), (1.0, 2.0)), 3.0, 16, torch.device("cpu"))
    assert made.order == [1, 0]
    assert made.layers.tolist() == [[3, 70], [3, 9]]
    assert made.scales.tolist() == [6, 3]
    assert made.scales.dtype == torch.float32
    again = plan.plan_for(Layers((3, 3), (9, 70), (1.0, 2.0)), 3.0, 16, torch.device("cpu"))
    assert again is made
    other = plan.plan_for(Layers((3, 3), (9, 70), (1.0, 2.0)), 3.0, 32, torch.device("cpu"))
    assert len(other.tiles) < len(made.tiles)


def test_a_default_device_is_not_where_plans_are_made():
    with torch.device("meta"):
        made = plan.plan_for(Layers((6,), (21,), (1.0,)), 1.0, 16, torch.device("cpu"))
    assert made.tiles.tolist() == [[6, 16, 0, 1], [22, 5, 0, 1]]
    assert made.layers.tolist() == [[6, 21]]


def test_what_a_graph_reads_is_kept(monkeypatch):
    monkeypatch.setattr(plan, "_captured", {})
    made = plan.plan_for(Layers((0,), (5,), (1.0,)), 1.0, 16, torch.device("cpu"))._replace(
        readers={0}
    )
    made.read_by(0, False)
    assert not plan._captured
    made.read_by(0, True)
    made.read_by(0, True)
    assert list(plan._captured.values()) == [made]
