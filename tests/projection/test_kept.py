"""What `project` keeps from call to call never changes what a call returns or raises."""

import itertools
import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dfa_kernels import functional, project
from dfa_kernels.backends import registry

ERROR = torch.randn(2, 10)
VALID = {
    "sizes": [1, 1],
    "row_offsets": [1, 1],
    "normalization": [1, 1.0],
    "column_offset": 1,
    "error_size": 11,
    "seed": 1,
}


def called(error=ERROR, **options):
    return project(error, **{**VALID, **options})


@pytest.fixture(autouse=True)
def nothing_kept():
    functional._kept.cache_clear()


def test_a_repeated_call_is_kept():
    first, second = called(), called()
    assert functional._kept.cache_info()[:2] == (1, 1)
    assert all(map(torch.equal, first, second))
    called(torch.randn(5, 10))  # of any batch
    assert functional._kept.cache_info().hits == 2


@pytest.mark.parametrize(
    "invalid",
    [
        {"sizes": [True, 1]},
        {"sizes": [1.0, 1]},
        {"sizes": (1.0, 1.0)},
        {"row_offsets": [1, True]},
        {"row_offsets": (1.0, 1.0)},
        {"normalization": [True, 1.0]},
        {"normalization": True},
        {"column_offset": True},
        {"column_offset": 1.0},
        {"error_size": 11.0},
        {"seed": True},
        {"seed": 1.0},
        {"seed": np.float64(1)},
        {"sizes": [np.float64(1), 1]},
        {"sizes": np.array([1.0, 1.0])},
    ],
    ids=str,
)
def test_what_equals_a_kept_argument_may_be_invalid(invalid):
    (name,) = invalid
    called(normalization=1) if invalid == {"normalization": True} else called()
    for _ in range(2):  # nor is an error kept
        with pytest.raises(TypeError, match=f"project: {name}"):
            called(**invalid)
    called()


def test_numpys_integers_after_plain_ones_and_before():
    numbers = {
        "sizes": [np.int64(1), np.int32(1)],
        "row_offsets": np.array([1, 1]),
        "column_offset": np.int8(1),
        "error_size": np.uint16(11),
        "seed": np.uint64(1),
    }
    expected = called()
    for _ in range(2):
        for some in itertools.chain([numbers], ({name: numbers[name]} for name in numbers)):
            assert all(map(torch.equal, called(**some), expected))


def test_sequences_may_change_between_calls():
    sizes, offsets, scales = [2, 3], [0, 4], [1.0, 2.0]
    options = {"row_offsets": offsets, "normalization": scales}
    project(ERROR, sizes, **options)
    sizes[0], offsets[1], scales[1] = 5, 6, 3.0
    found = project(ERROR, sizes, **options)
    expected = project(ERROR, (5, 3), row_offsets=(0, 6), normalization=(1.0, 3.0))
    assert all(map(torch.equal, found, expected))


def test_every_argument_counts():
    for name, other in {
        "sizes": [1, 2],
        "row_offsets": [1, 2],
        "normalization": [1, 2.0],
        "column_offset": 0,
        "seed": 2,
        "distribution": "uniform",
    }.items():
        before, after = called(), called(**{name: other})
        assert not all(map(torch.equal, before, after)), name
    shard = {"normalization": "layer"}
    assert not torch.equal(called(**shard)[0], called(**shard, error_size=99)[0])
    assert called(dtype=torch.float64)[0].dtype == torch.float64
    assert called()[0].dtype == torch.float32


def test_the_error_s_dtype_counts():
    tiny = {"normalization": 1e-40}
    assert called(ERROR.double(), **tiny)[0].dtype == torch.float64
    with pytest.raises(ValueError, match="project: normalization must be 0 or between"):
        called(**tiny)
    with pytest.raises(ValueError, match="at least 1, got"):
        called(torch.ones(2, 0), error_size=None)


def test_autocast_and_the_default_dtype_are_asked_in_each_call():
    called()
    with torch.autocast("cpu", torch.bfloat16):
        assert called()[0].dtype == torch.bfloat16
    assert called()[0].dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert called()[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_variable_is_asked_in_each_call(monkeypatch):
    called()
    monkeypatch.setenv("DFA_KERNELS_BACKEND", "none")
    with pytest.raises(ValueError, match="DFA_KERNELS_BACKEND must be one of"):
        called()
    monkeypatch.setenv("DFA_KERNELS_BACKEND", "")
    called()
    monkeypatch.delenv("DFA_KERNELS_BACKEND")
    called()


@pytest.mark.parametrize("environment", [{}, {"DFA_KERNELS_BACKEND": "none"}], ids=str)
def test_an_environment_that_is_put_in_place_of_the_real_one(monkeypatch, environment):
    monkeypatch.setattr("os.environ", environment)
    assert registry._from_environment() == environment.get("DFA_KERNELS_BACKEND")


def test_a_graph_keeps_nothing():
    torch.compiler.reset()

    @torch.compile(backend="eager", dynamic=True, fullgraph=True)
    def compiled(error, size):
        return project(error, [size, 4])

    for size in (3, 5, 6):
        error = torch.randn(size, size + 2)
        for found, expected in zip(compiled(error, size), project(error, [size, 4]), strict=True):
            torch.testing.assert_close(found, expected)
    assert functional._kept.cache_info().misses == 3  # those of the uncompiled calls
    torch.compiler.reset()


def test_an_error_of_no_memory_outside_its_mode():
    with FakeTensorMode():
        error = torch.empty(4, 10)
    signals = project(error, [7, 3])
    assert [type(one) for one in signals] == [type(error)] * 2
    assert [tuple(one.shape) for one in signals] == [(4, 7), (4, 3)]


def test_threads_get_their_own():
    wanted = {seed: project(ERROR, [7, 3], seed=seed)[0] for seed in range(8)}
    functional._kept.cache_clear()
    failed = []

    def call(first):
        for i in range(200):
            seed = (first + i) % 8
            if not torch.equal(project(ERROR, [7, 3], seed=seed)[0], wanted[seed]):
                failed.append(seed)

    threads = [threading.Thread(target=call, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_what_is_kept_is_bounded():
    limit = functional._kept.cache_info().maxsize
    for seed in range(limit + 3):
        project(ERROR, [1], seed=seed)
    assert functional._kept.cache_info().currsize == limit
