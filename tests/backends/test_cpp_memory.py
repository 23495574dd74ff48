"""The memory of large signals, which the "cpp" backend uses again from call to call."""

import copy
import io
import itertools
import threading

import pytest
import torch

from dfa_kernels import project
from dfa_kernels.backends import cpp
from tests import reference
from tests.conftest import needs, run

needs("the compiled extension", cpp.unavailable("cpu") is None)
needs("torch 2.11", torch.__version__ >= (2, 11))  # whose tensors can give memory back

MIB = 2**20
CALLS = 64  # an idle block is kept for so many


def pool():
    """Bytes in tensors, and idle."""
    return tuple(torch.ops.dfa_kernels.pool_bytes())


def signal(size=2 * MIB, seed=0, **options):
    """8 MiB by default."""
    error = torch.full((1, 3), 0.5)
    return project(error, [size], seed=seed, backend="cpp", normalization=1.0, **options)[0]


@pytest.fixture(autouse=True)
def empty_pool():
    """Nothing is idle before a test, and no peak remembered: small calls let the pool grow old."""
    for _ in range(2 * CALLS):
        signal(1)
    assert pool()[1] == 0


def test_a_large_signal_takes_the_memory_of_one_that_is_gone():
    held = pool()[0]
    first = signal()
    place = first.data_ptr()
    assert place % (2 * MIB) == 0
    assert pool() == (held + 8 * MIB, 0)
    del first
    assert pool() == (held, 8 * MIB)
    again = signal(seed=1)
    assert again.data_ptr() == place
    assert pool() == (held + 8 * MIB, 0)


def test_a_signal_that_is_kept_is_never_written_to():
    kept = signal()
    before = kept.clone()
    view = signal()[0, 5:9]  # a view keeps the memory too
    ours = view.clone()
    for seed in range(1, 5):
        assert signal(seed=seed).data_ptr() != kept.data_ptr()
    assert torch.equal(kept, before)
    assert torch.equal(view, ours)


def test_every_signal_of_a_call_has_memory_of_its_own():
    sizes = [MIB // 4, MIB // 4 - 1, MIB // 4 + 1, 100]
    error = torch.randn(16, 4)
    for _ in range(3):
        signals = project(error, sizes, backend="cpp")
        for size, one in zip(sizes, signals, strict=True):
            torch.testing.assert_close(one, project(error, [size], backend="cpp")[0])
        places = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in signals)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))


def test_small_signals_are_left_to_the_allocator():
    before = pool()
    kept = signal(MIB // 64 - 16)
    assert pool() == before
    more = signal(MIB // 64)
    assert pool()[0] == before[0] + MIB // 16
    del kept, more


def test_small_signals_of_a_call_share_memory_until_the_last_is_gone():
    sizes = [6000, 6001, 6002, 2 * MIB]  # three of 24,000 bytes and more, and one of 8 MiB
    error = torch.full((1, 3), 0.5)
    first, second, third, large = project(error, sizes, backend="cpp")
    assert pool() == (8 * MIB + MIB // 8, 0)
    places = sorted(one.data_ptr() for one in (first, second, third))
    assert places[2] - places[0] < MIB // 8
    assert all(place % 64 == 0 for place in places)
    kept = second.clone()
    del first, third, large
    assert pool() == (MIB // 8, 8 * MIB)
    again = project(error, sizes[:3], seed=1, backend="cpp")
    assert pool()[0] == MIB // 4
    assert torch.equal(second, kept)
    assert [one.untyped_storage().nbytes() for one in again] == [one.nbytes for one in again]
    del second
    assert pool()[0] == MIB // 8
    del again
    assert pool() == (0, MIB // 4)  # never more than were held at once: the large one made room


def test_a_signal_that_is_kept_holds_little_of_the_others():
    error = torch.ones(32, 3)
    kept = project(error, [8000 - i for i in range(40)], backend="cpp")[0]  # 1 MB each
    assert pool()[0] <= 2 * MIB
    del kept


def test_many_kept_signals_have_few_mappings():
    """A process has some 65,000 of them."""
    kept = [signal(MIB // 64) for _ in range(500)]
    assert pool()[0] <= 64 * MIB // 16
    assert len({one.data_ptr() for one in kept}) == 500
    del kept


def test_only_a_block_that_fits_well_is_taken():
    large = signal(4 * MIB)
    place = large.data_ptr()
    del large
    fits = signal(4 * MIB - MIB // 4)
    assert fits.data_ptr() == place
    assert pool() == (16 * MIB, 0)
    del fits
    wastes = signal(3 * MIB)
    assert pool() == (12 * MIB, 0)  # with the other block it would be more than ever at once
    del wastes


def test_memory_that_calls_no_longer_take_goes_back():
    del_me = signal()
    del del_me
    for _ in range(CALLS - 1):
        signal(1)
    assert pool()[1] == 8 * MIB
    signal(1)
    assert pool()[1] == 0


def test_idle_memory_is_bounded_by_what_tensors_held_at_once():
    """Sizes that grow: each signal is gone before the next, which needs a block of its own."""
    size = 2 * MIB
    for _ in range(8):
        signal(size)
        assert sum(pool()) == size * 4
        size += size // 4 // 16384 * 16384
    first, second = signal(2 * MIB), signal(3 * MIB)
    del first, second
    assert pool() == (0, 20 * MIB)


def test_idle_memory_can_be_freed():
    kept = signal()
    signal(4 * MIB)
    assert pool() == (8 * MIB, 16 * MIB)
    assert 0 <= torch.ops.dfa_kernels.empty_pool() - 16 * MIB < MIB  # with entries that are kept
    assert torch.ops.dfa_kernels.empty_pool() == 0
    assert pool() == (8 * MIB, 0)
    del kept
    assert pool() == (0, 8 * MIB)


def test_a_gradient_may_keep_a_signal():
    """As autograd does, which hands a signal on instead of copying it."""
    bias = torch.zeros(1, 2 * MIB, requires_grad=True)
    bias.backward(signal())
    gradient = bias.grad.clone()
    for seed in range(1, 4):
        signal(seed=seed)
    assert torch.equal(bias.grad, gradient)


def test_what_one_does_with_a_tensor():
    one, expected = signal(), signal().clone()
    assert torch.equal(copy.deepcopy(one), expected)
    file = io.BytesIO()
    torch.save(one, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)
    assert torch.equal(signal().share_memory_(), expected)
    assert torch.equal(torch.from_numpy(one.numpy()), expected)
    array = one.numpy()
    del one
    signal(seed=3)
    assert torch.equal(torch.from_numpy(array), expected)  # NumPy's array keeps the memory
    for resize in (
        lambda: signal().resize_(4 * MIB),
        lambda: signal().untyped_storage().resize_(0),
    ):
        with pytest.raises(RuntimeError, match="not resizable"):
            resize()


def test_fresh_memory_is_filled_where_torch_is_asked_to():
    """`poison` of the tests asks for it: what a kernel leaves unwritten must show."""
    one = signal()
    one.fill_(1.0)
    place = one.data_ptr()
    del one
    again = torch.ops.dfa_kernels.project.cpp(
        torch.ones(1, 0), [0], [2 * MIB], [1.0], 0, 0, "normal", None
    )[0]
    assert again.data_ptr() == place
    assert torch.equal(again, torch.zeros(1, 2 * MIB))


def test_many_threads():
    """Each thread keeps some signals and drops others; what it keeps stays as it was."""
    mistakes = []

    def work(seed):
        kept = []
        for step in range(6):
            one = signal(MIB // 2, seed=100 * seed + step)
            if step % 2:
                kept.append((one, one.clone()))
        mistakes.extend(not torch.equal(*pair) for pair in kept)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(mistakes) == 12
    assert not any(mistakes)


PROGRAM = """
import os, threading, torch, dfa_kernels
def one():
    none = torch.ones(1, 0)
    return torch.ops.dfa_kernels.project.cpp(none, [0], [2**18], [1.0], 0, 0, "normal", None)[0]
torch.set_num_threads(1)
dfa_kernels.project(torch.ones(1, 3), [2**18], backend="cpp")
stop = False
def churn():
    while not stop:
        one()
threads = [threading.Thread(target=churn) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(60):
    child = os.fork()
    if child == 0:
        os._exit(0 if not one().any() else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True
for thread in threads:
    thread.join()
print(torch.ops.dfa_kernels.pool_bytes())
"""


def test_a_child_process_finds_no_lock_held():
    assert run(PROGRAM) != "[0, 0]\n"


def test_the_pool_can_be_turned_off():
    program = PROGRAM.replace("range(60)", "range(0)")
    assert run(program, DFA_KERNELS_POOL="0") == "[0, 0]\n"


@pytest.mark.parametrize("distribution", [*reference.DENSE, "hadamard"])
def test_signals_in_memory_used_again_are_the_same(distribution):
    error = torch.randn(40, 30)
    expected = project(error, [9000], distribution=distribution, backend="torch")[0]
    for _ in range(3):
        found = project(error, [9000], distribution=distribution, backend="cpp")[0]
        torch.testing.assert_close(found, expected)
        found.fill_(torch.nan)
