"""What the "cuda" backend decides in Python."""

from dfa_kernels.backends import cuda, slabs

DISTRIBUTIONS = ("normal", "uniform", "rademacher")


def test_which_way():
    """Few rows of error, or little to make: fused. Many: slabs, and sooner with more columns."""

    def by_slabs(
        sizes, rows, columns, terms, distribution="normal", in_place=False, row_offsets=None
    ):
        offsets = row_offsets or [0] * len(sizes)
        return cuda.prefers_slabs(offsets, sizes, rows, columns, terms, distribution, in_place)

    large = [200_000]
    for distribution in DISTRIBUTIONS:
        for in_place in (False, True):
            for rows in (0, 1, 64, 128):
                assert not by_slabs(large, rows, 1000, 1, distribution, in_place)
    assert not by_slabs(large, 64, 1000, 2)
    assert not by_slabs([800], 4096, 10, 2)
    assert not by_slabs([10**6], 128, 10, 2)
    assert by_slabs(large, 4096, 1000, 1)
    assert not by_slabs(large, 4096, 1000, 3)
    assert by_slabs(large, 4096, 8000, 2)
    assert by_slabs(large, 1024, 1000, 1, in_place=True)
    assert not by_slabs(large, 1024, 1000, 1, "rademacher", in_place=True)
    assert not by_slabs([10**6], 4096, 0, 1)
    for rows in range(1, 5000, 7):
        if by_slabs(large, rows, 1000, 1):
            assert by_slabs(large, rows, 50_000, 1)
            assert by_slabs(large, rows, 1000, 1, in_place=True)
    # Every slab and layer is a launch more, and what layers share is made once.
    assert by_slabs([3_211_264], 4096, 100, 1, in_place=True)
    assert not by_slabs([4096], 4096, 100, 1, in_place=True)
    many = [2049 + 43 * i for i in range(48)]
    own = [5000 * i for i in range(48)]
    assert by_slabs(many, 2048, 8000, 1, row_offsets=own)
    assert not by_slabs(many, 2048, 8000, 1)
    assert not by_slabs([10] * 20_000, 4096, 1000, 1, row_offsets=[10 * i for i in range(20_000)])


def test_union_rows():
    offsets, sizes = [30, 0, 5, 100, 0, 20], [10, 10, 10, 7, 3, 10]
    covered = {row + i for row, size in zip(offsets, sizes, strict=True) for i in range(size)}
    assert slabs.union_rows(offsets, sizes) == len(covered)


def test_why_not():
    assert cuda.unavailable("cpu").startswith("it serves CUDA devices only")
    assert cuda.unavailable("mps").startswith("it serves CUDA devices only")
    reason = cuda.unavailable("cuda")
    assert reason is None or "CUDA" in reason or "compute capability" in reason
