"""Entries of small matrices, which the "cpp" backend keeps from call to call."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dfa_kernels.backends import cpp
from tests.backends.test_cpp_kernels import (
    available,
    check_projection,
    cpu_isa,
    isa,
    project,
    same,
    threads,
)
from tests.conftest import needs, run
from tests.samples import DTYPES

needs("the compiled extension", cpp.unavailable("cpu") is None)

__all__ = ["isa", "threads"]  # fixtures

MIB = 2**20


def drop():
    """Frees what is kept; returns the bytes."""
    _, idle = torch.ops.dfa_kernels.pool_bytes()
    return torch.ops.dfa_kernels.empty_pool() - idle


@pytest.fixture(autouse=True)
def nothing_kept():
    drop()
    yield
    drop()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "column_offset"), [(1, 7), (10, 0), (131, 5), (700, 9)])
def test_kept_entries_give_the_same_bits(isa, threads, n, column_offset, dtype):
    """Also to other batches, whose tasks are other rows."""
    where = [7, 2**32 - 20, 0, 2**50], [140, 40, 131, 35], [0.5, -2.0, 1e-3, 1.0], 3, column_offset
    generator = torch.Generator().manual_seed(0)
    for m in (1, 2, 3, 14, 33, 100, 128):
        error = torch.randn(m, n, generator=generator).to(dtype)
        drop()
        made = project(error, *where)
        assert drop() == 0  # asked for once
        for _ in range(2):
            project(error[:5], *where)
        for signal, again in zip(made, project(error, *where), strict=True):
            same(signal, again)
        assert (drop() > 0) == (dtype != torch.float64)


def test_every_part_of_a_stream_tells_matrices_apart(threads):
    """By turns, so that a mistaken one would be read."""
    error = torch.randn(5, 40)
    plain = {"offsets": [64], "sizes": [96], "seed": 1, "column_offset": 8}
    kinds = [
        plain,
        *({**plain, **change} for change in (
            {"seed": 2}, {"seed": 2**63 + 1}, {"offsets": [96]}, {"offsets": [64 + 2**32]},
            {"column_offset": 16}, {"column_offset": 9}, {"sizes": [128]},
            {"offsets": [64, 160], "sizes": [32, 64]},
        )),
    ]  # fmt: skip
    for _ in range(3):
        for name in available():
            cpu_isa(name)
            for kind in kinds:
                scales = [0.5] * len(kind["sizes"])
                check_projection(error, kind["offsets"], kind["sizes"], scales, kind["seed"],
                                 kind["column_offset"], "normal")  # fmt: skip
    cpu_isa("")


def test_what_is_kept_is_bounded():
    error = torch.randn(1, 1000)
    for seed in range(3):
        for _ in range(3):
            project(error, [0], [960], [1.0], seed)
    assert 3 * MIB < drop() <= 4 * MIB  # two of three
    for _ in range(3):
        project(error, [0], [1200], [1.0])  # too large
        project(torch.randn(129, 10), [0], [800], [1.0])  # too many rows to pay
        project(torch.randn(5, 10), [0], [800], [1.0], 0, 0, "rademacher")
        project(torch.randn(5, 10), [0], [800], [1.0], 0, 0, "uniform")
    assert drop() == 0


def test_threads_share_what_is_kept():
    error = torch.randn(5, 100)
    seeds = [0, 1, 2] * 40
    expected = {}
    for seed in set(seeds):
        drop()
        (expected[seed],) = project(error, [0], [3000], [1.0], seed)

    def right(seed):
        (signal,) = project(error, [0], [3000], [1.0], seed)
        if seed == 2:
            drop()
        return torch.equal(signal, expected[seed])

    with ThreadPoolExecutor(4) as workers:
        assert all(workers.map(right, seeds))


PROGRAM = """
import os, threading, torch, dfa_kernels
torch.set_num_threads(1)
error = torch.ones(1, 3)
def one():
    return dfa_kernels.project(error, [300], backend="cpp")[0]
expected = one()
stop = False
def churn():
    while not stop:
        one()
        torch.ops.dfa_kernels.empty_pool()
threads = [threading.Thread(target=churn) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(FORKS):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(one(), expected) for _ in range(4)) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True
for thread in threads:
    thread.join()
for _ in range(4):
    one()
print(torch.ops.dfa_kernels.empty_pool())
"""


def test_a_child_process_waits_for_no_lock():
    assert int(run(PROGRAM.replace("FORKS", "20"))) > 0


SEEDS = """
import os, torch, dfa_kernels
def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
def ask(seeds):
    error = torch.randn(4, 100)
    for seed in seeds:
        for _ in range(3):
            dfa_kernels.project(error, [3000], seed=seed, backend="cpp")
ask(range(100))
before = resident()
ask(range(100, 400))
print((resident() - before) // 1024)
"""


def test_memory_of_what_is_no_longer_kept_is_used_again():
    """300 matrices of 0.6 MiB by turns."""
    needs("Linux", sys.platform == "linux")
    assert int(run(SEEDS, OMP_NUM_THREADS="1")) < 60


def test_keeping_can_be_turned_off():
    assert int(run(PROGRAM.replace("FORKS", "1"), DFA_KERNELS_KEEP="0")) == 0
