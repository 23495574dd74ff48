"""Which rows of U the layers read, and how their union is cut into slabs."""

import torch

from dfa_kernels.layers import Layers
from dfa_kernels.stream import Stream


def test_layers_and_stream_are_an_operators_arguments():
    layers, stream = Layers((0, 3), (7, 2), (0.5, -1.0)), Stream(-3, 5, "uniform")
    operator = torch.ops.dfa_kernels.project.torch
    names = [argument.name for argument in operator._schema.arguments]
    assert names == ["error", *Layers._fields, *Stream._fields, "dtype"]
    signals = operator(torch.ones(4, 10), *layers, *stream, None)
    assert [signal.shape[1] for signal in signals] == [7, 2]


def test_equal_layers_are_one():
    layers, places = Layers.distinct([0, 5, 0, 0], [8, 8, 8, 9], [1.0, 1.0, 1.0, 1.0])
    assert layers == ((0, 5, 0), (8, 8, 9), (1.0, 1.0, 1.0))
    assert places == [0, 1, 0, 2]
    assert Layers.distinct([0, 0], [4, 4], [1.0, -1.0])[0] == ((0, 0), (4, 4), (1.0, -1.0))
    assert hash(layers) == hash(Layers.of([0, 5, 0], [8, 8, 9], [1.0] * 3))


def test_a_stream_further_on():
    assert Stream(3, 8, "normal").after(-5).after(2) == Stream(3, 5, "normal")


def test_slabs_cover_every_row_once():
    cases = [
        ([0, 0, 0], [10, 25, 3], 8),
        ([0, 100, 50], [10, 10, 60], 7),
        ([2**63 - 5, 0], [5, 5], 3),
        ([4, 0, 2], [1, 10, 8], 1),
    ]
    for offsets, sizes, rows in cases:
        covered = []
        wanted = set()
        for offset, size in zip(offsets, sizes, strict=True):
            wanted.update(range(offset, offset + size))
        layers = Layers.of(offsets, sizes, [1.0] * len(sizes))
        assert layers.union_rows() == len(wanted)
        for slab in layers.slabs(rows):
            assert 0 < slab.rows <= rows
            covered += range(slab.first, slab.last)
            for layer, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                overlaps = offset < slab.last and slab.first < offset + size
                assert overlaps == (layer in slab.layers)
                if overlaps:
                    in_layer, in_slab = layers.overlap(layer, slab)
                    shared = range(max(offset, slab.first), min(offset + size, slab.last))
                    assert range(offset, offset + size)[in_layer] == shared
                    assert range(slab.first, slab.last)[in_slab] == shared
        assert sorted(covered) == sorted(wanted)


def test_a_slabs_layers_come_in_one_order_however_given():
    layers = [(3, 5, -1.0), (0, 9, 2.0), (3, 5, 0.5), (0, 9, 1.0), (3, 4, 7.0)]
    for given in (layers, layers[::-1]):
        (slab,) = Layers(*zip(*given, strict=True)).slabs(10)
        assert [given[layer] for layer in slab.layers] == [layers[i] for i in (3, 1, 4, 0, 2)]


def test_blocks_are_those_that_layers_read():
    """Whole and aligned, each once and rising, with the layers that read some of their rows."""
    layers = Layers((2**63 - 3, 5, 0, 39, 20), (3, 4, 11, 2, 1), (1.0,) * 5)
    blocks = [(block.first, block.last, list(block.layers)) for block in layers.blocks(10)]
    last = (2**63 - 3) // 10 * 10
    assert blocks == [
        (0, 10, [2, 1]),
        (10, 20, [2]),
        (20, 30, [4]),
        (30, 40, [3]),
        (40, 50, [3]),
        (last, last + 10, [0]),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        count, rows = 6, int(torch.randint(1, 9, (), generator=generator))
        offsets = torch.randint(0, 60, (count,), generator=generator).tolist()
        sizes = torch.randint(1, 20, (count,), generator=generator).tolist()
        layers = Layers.of(offsets, sizes, [1.0] * count)
        read = {
            row // rows: {
                i
                for i in range(count)
                if set(range(offsets[i], offsets[i] + sizes[i]))
                & set(range(row // rows * rows, row // rows * rows + rows))
            }
            for first, end in layers.unions()
            for row in range(first, end)
        }
        found = {block.first // rows: {*block.layers} for block in layers.blocks(rows)}
        assert found == read
        assert [*found] == sorted(found)
