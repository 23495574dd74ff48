"""The harness: roofs and bounds, the correctness check, measuring, and races."""

import dataclasses
import functools
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    bench_matrix,
    bench_networks,
    bench_precisions,
    bench_sweeps,
    conftest,
    training_step,
)
from benchmarks.harness import contenders, gate, measure, race, roofs
from benchmarks.harness.roofs import Roofs, Work
from benchmarks.harness.shapes import ALL, PAPER_MLP, STRUCTURED, WRITE_ROOF, Case
from benchmarks.report import results
from benchmarks.report.speed_tables import WAYS
from dfa_kernels import feedback_matrix, project
from tests.benchmarks.races import ONCE, SMALL, machine, new_race
from tests.conftest import COMPILER, needs


@pytest.fixture(autouse=True)
def single_calls(monkeypatch):
    """One call a round, because these tests are not about times."""
    monkeypatch.setattr(race, "ROUND", 0.0)


# --- bounds ---


@pytest.mark.parametrize(
    ("work", "seconds", "name"),
    [
        (Work(calls=3), 3e-6, "latency"),
        (Work(calls=2, launch="replay"), 2e-7, "latency"),
        (Work(written=10**9), 1.0, "write bandwidth"),
        (Work(written=10**6), 10**6 / 8e9, "write bandwidth"),
        (Work(written=1000), 1e-6, "latency"),  # 1000 bytes at 8e9 a second, the best above
        (Work(read=10**9, written=10), (10**9 + 10) / 2e9, "memory bandwidth"),
        (Work(multiplications=10**11), 1.0, "multiplication"),
        (Work(multiplications=10**11, arithmetic="bf16"), 0.5, "multiplication"),
        (Work(additions=10**11, source="torch"), 0.5, "addition"),  # the best transform's rate
        (Work(additions=10**10, written=10**9), 1.0, "write bandwidth"),
        (Work(entries=10**9, source="torch"), 1.0, "generation"),  # the best backend's rate
        (Work(entries=3 * 10**8, source="torch.randn"), 1.0, "generation"),
    ],
)
def test_bound(work, seconds, name):
    assert roofs.bound(work, machine()) == (pytest.approx(seconds), name)


def test_expected_seconds_go_by_the_source_of_the_entries():
    work = Work(entries=10**9, source="torch")
    assert roofs.expected_seconds(work, machine()) == pytest.approx(10.0)
    assert roofs.expected_seconds(Work(written=10**9), machine()) == pytest.approx(1.0)
    work = Work(additions=10**9, source="torch")
    assert roofs.expected_seconds(work, machine()) == pytest.approx(10.0)
    work = Work(additions=10**9, source="cuda")  # of which no rate is known
    assert roofs.expected_seconds(work, machine()) == pytest.approx(0.005)


def test_a_roof_that_was_passed_is_raised():
    lifted = machine()
    work = Work(written=10**6, multiplications=10**9, entries=10**8, source="cpp")
    roofs.raise_to(lifted, work, 1e-3)
    assert lifted.multiply["fp32"] == pytest.approx(1e12)
    assert lifted.generation["cpp"]["normal"] == pytest.approx(1e11)
    assert lifted.write[10**6] == 8e9  # was higher than this
    assert roofs.bound(work, lifted)[0] == pytest.approx(1e-3)
    work = Work(additions=10**9, source="cpp", distribution="hadamard")
    roofs.raise_to(lifted, work, 1e-3)
    assert lifted.addition["cpp"] == pytest.approx(1e12)
    assert roofs.bound(work, lifted) == (pytest.approx(1e-3), "addition")


def test_additions_go_at_least_as_fast_as_multiply_adds():
    assert roofs.addition_rate({"fp32": 3.0, "bf16": 9.0}, {}) == 3.0
    assert roofs.addition_rate({"fp32": 3.0}, {"torch": 1.0, "cpp": 5.0}) == 5.0


def test_a_transform_that_fails_leaves_the_others_their_roofs(monkeypatch, capsys):
    def fails(error, sizes, *, backend, distribution):
        assert distribution == "hadamard"
        if backend == "torch":
            raise RuntimeError("out of order")

    monkeypatch.setattr(roofs, "project", fails)
    monkeypatch.setattr(roofs, "sources", lambda device_type, distribution: ["torch", "cpp"])
    measured = Roofs("cpu", 1)
    roofs._measure_addition(measured, lambda call: (call(), 0.5)[1])
    additions = 64 * (2**17 * 10 + 20 * 1024)
    assert measured.addition == {"cpp": additions / 0.5}
    assert "out of order" in capsys.readouterr().err


def test_a_backend_that_fails_leaves_the_others_their_roofs(monkeypatch, capsys):
    def fails(error, sizes, *, backend, **options):
        if backend == "torch":
            raise RuntimeError("out of order")

    monkeypatch.setattr(roofs, "project", fails)
    monkeypatch.setattr(roofs, "sources", lambda device_type: ["torch", "cpp"])
    measured = Roofs("cpu", 1)
    roofs._measure_generation(measured, lambda call: (call(), 0.5)[1])
    assert set(measured.generation) == {"cpp", "torch.randn"}
    assert "out of order" in capsys.readouterr().err
    measured.latency, measured.write, measured.memory = machine().latency, {2**28: 1}, {2**28: 1}
    measured.multiply = machine().multiply
    assert roofs.expected_seconds(Work(entries=10**9, source="torch"), measured) == 5.0


def test_a_slow_large_piece_does_not_become_its_own_roof():
    lifted = machine()
    roofs.raise_to(lifted, Work(written=10**10), 100.0)  # a tenth of the rate measured before
    assert roofs.bound(Work(written=10**10), lifted)[0] == pytest.approx(10.0)


@pytest.mark.parametrize("name", ALL)
def test_what_a_contender_has_to_do(name):
    case = Case("", (100, 50), 4, 10, ALL)
    work = contenders.contender(name, case).work()
    naive = name == "naive"
    assert work.multiplications == 4 * 10 * (150 if naive else 100)
    assert work.written == 4 * 4 * (100 if name in ("views", "scikit-learn") else 150)
    matrices = 0 if name == "randn blocks" else 4 * 10 * (150 if naive else 100)
    assert work.read == 4 * 4 * 10 + matrices  # and the error
    assert work.entries == (1000 if name == "randn blocks" else 0)


def test_what_ours_has_to_do():
    case = Case("", (100, 50, 100), 4, 10, (), distribution="uniform")
    work = contenders.contender("cpp", case).work()
    assert (work.written, work.read, work.entries) == (4 * 4 * 150, 160, 1000)  # equal layers: one
    on_cuda = dataclasses.replace(case, device_type="cuda", precision="high")
    work = contenders.contender("triton", on_cuda).work()
    assert (work.multiplications, work.arithmetic) == (2 * 4 * 1000, "bf16")


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, 2 * 100 * 10),
        ({"batch": 129}, 0),
        ({"n": 20_000}, 0),
        ({"distribution": "uniform"}, 0),
    ],
)
def test_what_is_kept_is_read_not_made(monkeypatch, changed, kept):
    case = dataclasses.replace(Case("", (100, 50), 4, 10, ()), **changed)
    made = contenders.contender("torch", case).work()
    ours = contenders.contender("cpp", case)
    assert ours.kept_bytes == kept
    assert (ours.work().entries == 0) == (kept > 0)
    assert ours.work().read == made.read + kept
    monkeypatch.setenv("DFA_KERNELS_KEEP", "0")
    assert contenders.contender("cpp", case).work().entries == made.entries


@pytest.mark.parametrize(
    ("n", "additions"),
    [
        (1, 4 * (1024 * 10 + 20 * 1024)),
        (1024, 4 * (1024 * 10 + 20 * 1024)),
        (1025, 4 * (1024 * 11 + 20 * 2048)),
    ],
)
def test_what_a_structured_projection_has_to_do(n, additions):
    case = Case("", (100, 50, 100), 4, n, ())
    work = contenders.contender(STRUCTURED, case).work()
    assert (work.written, work.read) == (4 * 4 * 150, 4 * 4 * n)
    assert (work.additions, work.multiplications, work.entries) == (additions, 0, 0)
    assert work.source == roofs.sources("cpu", "hadamard")[0]


def test_a_structured_matrix_is_transformed_not_generated():
    case = Case("", (100,), 1, 30, (), matrix=True, distribution="hadamard")
    work = contenders.contender("torch", case).work()
    assert (work.additions, work.entries, work.written) == (30_000, 0, 12_000)


# --- the correctness check ---


def spoil_scale(signals):
    signals[1].mul_(1.01)


def spoil_last_row(signals):
    signals[0][:, -1] = 0


def spoil_with_nan(signals):
    signals[2][0, 0] = math.nan


def spoil_number(signals):
    signals.pop()


def spoil_shape(signals):
    signals[0] = signals[0][:, 1:]


def spoil_seed(signals):
    signals[1].copy_(signals[1].roll(1, 1))


def spoil_precision(signals):
    signals[1].view(torch.int32).bitwise_and_(-(2**13))  # of TF32


SPOILERS = [
    spoil_scale,
    spoil_last_row,
    spoil_with_nan,
    spoil_number,
    spoil_shape,
    spoil_seed,
    spoil_precision,
]


def signals_and_check():
    torch.manual_seed(0)
    error, sizes = torch.randn(5, 30), [70, 40, 66]
    scales = [1 / math.sqrt(size * 30) for size in sizes]
    signals = project(error, sizes)
    relative = gate.tolerance(torch.float32, "highest", 30)

    def row(index):
        return gate.exact_row(index, 30, "normal")

    return signals, lambda: gate.check_signals(signals, error, sizes, scales, row, relative)


def test_right_signals_pass():
    signals_and_check()[1]()


@pytest.mark.parametrize("spoil", SPOILERS)
def test_wrong_signals_do_not_pass(spoil):
    signals, check = signals_and_check()
    spoil(signals)
    with pytest.raises(gate.Wrong):
        check()


@pytest.mark.parametrize(("index", "n"), [(0, 30), (1023, 1030), (2050, 5)])
def test_an_exact_structured_row_is_a_row_of_the_matrix(index, n):
    options = {"row_offset": index, "distribution": "hadamard", "backend": "torch"}
    expected = feedback_matrix(1, n, dtype=torch.float64, **options)[0]
    assert torch.equal(gate.exact_row(index, n, "hadamard"), expected)


def test_dense_signals_are_not_structured_ones():
    error, sizes = torch.randn(5, 30), [70, 40, 70]
    contender = contenders.contender(STRUCTURED, SMALL)
    contender.check(error, project(error, sizes, distribution="hadamard", backend="torch"))
    with pytest.raises(gate.Wrong):
        contender.check(error, project(error, sizes))


def test_wrong_entries_do_not_pass():
    matrix = feedback_matrix(20, 30)

    def definition(index):
        return feedback_matrix(1, 30, row_offset=index, backend="torch")[0]

    gate.check_entries(matrix, definition)
    matrix[-1, -1] += 1e-6
    with pytest.raises(gate.Wrong):
        gate.check_entries(matrix, definition)


@pytest.mark.parametrize(("factor", "shift"), [(1.05, 0.0), (1.0, 0.05)])
def test_numbers_that_are_not_standard_normal_do_not_pass(factor, shift):
    torch.manual_seed(0)
    numbers = torch.randn(300, 300)
    gate.check_normal(numbers)
    with pytest.raises(gate.Wrong):
        gate.check_normal(numbers * factor + shift)


def test_a_wrong_contender_gets_no_time_and_the_others_do(monkeypatch):
    class Careless(contenders.Naive):
        def scales(self):
            return [1.0] * len(self.case.sizes)

        def check(self, error, signals):
            contenders.Naive(self.case).check(error, signals)

    monkeypatch.setitem(contenders.KINDS, "naive", Careless)
    outcome = new_race().run(SMALL, ["torch", "naive", "stored"])
    assert isinstance(outcome["naive"], gate.Wrong)
    assert len(outcome["torch"].times) == len(outcome["stored"].times) == 2


# --- measuring ---


def test_peak_counts_what_a_call_takes_and_returns():
    needs("Linux", sys.platform == "linux")
    size = 2**26

    def call():
        passing = torch.ones(size // 4)
        return passing.add(1)

    result, peak = measure.peak_bytes(call, "cpu")
    assert result.nbytes == size
    assert 1.9 * size < peak < 2.3 * size


def test_peak_counts_signals_in_memory_that_is_used_again():
    here = contenders.names(SMALL)
    needs("Linux and cpp", sys.platform == "linux" and "cpp" in here)
    error, size = torch.ones(64, 10), 2**18

    def call():
        return project(error, [size], backend="cpp")

    for _ in range(3):
        _, peak = measure.peak_bytes(call, "cpu")
        assert 0.9 * 256 * size < peak < 1.5 * 256 * size


def test_streaming_writes_reach_every_part():
    target = torch.ones(2**12)
    with measure.stream_writes(target, 2) as write:
        write()
    assert not target.any()


def test_seconds_are_of_one_call():
    calls = []
    began = time.perf_counter()
    one = measure.seconds(lambda: calls.append(time.sleep(0.01)), "cpu", 3)
    assert len(calls) == 3
    assert 0.01 <= one <= (time.perf_counter() - began) / 3


def test_available_memory_is_what_the_control_group_allows(tmp_path, monkeypatch):
    needs("Linux", sys.platform == "linux")
    monkeypatch.setattr(measure, "CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\ninactive_file 1000000\n")
    assert measure.available_bytes("cpu") > 2**24
    (tmp_path / "memory.max").write_text("5000000\n")
    assert measure.available_bytes("cpu") == 3_000_000  # the file's cache gives way


# --- races ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contender_is_right_and_timed(dtype):
    names = [n for n in contenders.names(SMALL) if dtype.itemsize == 4 or n != "scikit-learn"]
    names.append("views bf16")
    outcome = new_race().run(dataclasses.replace(SMALL, dtype=dtype), names)
    for name in names:
        assert isinstance(outcome[name], race.Result), outcome[name]
        assert len(outcome[name].times) == 2
        assert all(time > 0 for time in outcome[name].times)
    assert outcome["naive"].stored_bytes == 180 * 30 * dtype.itemsize
    assert outcome["stored"].stored_bytes == 70 * 30 * dtype.itemsize
    assert outcome["views bf16"].stored_bytes == 70 * 30 * 2
    assert outcome["torch"].stored_bytes == outcome[STRUCTURED].stored_bytes == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own compiler's
def test_what_is_compiled_is_right_and_timed():
    needs("a C++ compiler", COMPILER)
    case = Case("compiled", (40, 33), 3, 20, ("compiled",))
    result = new_race().run(case, ["compiled"])["compiled"]
    assert isinstance(result, race.Result), result
    assert result.stored_bytes == 40 * 20 * 4
    assert len(result.times) == 2


def test_what_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(race, "available_bytes", lambda device_type: 2**20)
    (outcome,) = new_race().run(SMALL, ["naive"]).values()
    assert isinstance(outcome, race.LeftOut)
    assert "fit" in outcome.reason
    assert outcome.stored_bytes == 4 * 180 * 30


def too_large(self, error, storage):
    self.prepared = lambda: [torch.empty(2**58)]


def too_large_for_numpy(self, error, storage):
    self.prepared = lambda: [np.empty(2**58)]


@pytest.mark.parametrize("prepare", [too_large, too_large_for_numpy])
def test_who_runs_out_of_memory_is_left_out(prepare, monkeypatch):
    monkeypatch.setattr(contenders.Naive, "prepare", prepare)
    outcome = new_race().run(SMALL, ["naive", "stored"])
    assert isinstance(outcome["naive"], race.LeftOut), outcome["naive"]
    assert isinstance(outcome["stored"], race.Result)


def test_what_takes_too_long_is_not_run(monkeypatch):
    least = roofs.expected_seconds(contenders.contender("naive", SMALL).work(), machine())
    limits = dataclasses.replace(ONCE, slowest=1.1 * least)
    case = dataclasses.replace(SMALL, promises=())
    assert isinstance(new_race(limits).run(case, ["naive"])["naive"], race.Result)
    limits = dataclasses.replace(ONCE, slowest=0.9 * least)
    assert isinstance(new_race(limits).run(SMALL, ["naive"])["naive"], race.Result)  # is promised
    monkeypatch.delattr(contenders.Naive, "prepare")
    (outcome,) = new_race(limits).run(case, ["naive"]).values()
    assert isinstance(outcome, race.LeftOut)
    assert "too long" in outcome.reason
    assert roofs.expected_seconds(outcome.work, machine()) == least


@pytest.mark.parametrize(
    ("rounds", "elapsed", "over"),
    [(0, 99.0, False), (4, 2.0, False), (1, 41.0, True), (5, 0.5, False), (5, 1.5, True)],
)
def test_rounds_end(rounds, elapsed, over):
    assert race.QUICK.are_over(rounds, elapsed) == over
    assert race.QUICK.are_over(race.QUICK.most, elapsed)


def reduced(case):
    """A case for a GPU, made small enough for the CPU, with the same rivals and promises."""
    stand_ins = {"cuda": "cpp", "triton": "torch"}
    promises = [
        dataclasses.replace(
            promise,
            ours=stand_ins.get(promise.ours, promise.ours),
            rival=stand_ins.get(promise.rival, promise.rival),
        )
        for promise in case.promises
    ]
    return dataclasses.replace(
        case,
        sizes=tuple(size // 2000 + 1 for size in case.sizes),
        batch=min(case.batch, 4),
        n=min(case.n, 20),
        rivals=tuple(name for name in case.rivals if name != "compiled"),  # takes seconds each
        device_type="cpu",
        precision="highest",
        graph=False,
        promises=tuple(promises),
    )


def test_the_gpu_cases_run_at_reduced_size(monkeypatch):
    monkeypatch.setenv("DFA_KERNELS_KEEP", "0")  # on a GPU all entries are made
    here = contenders.names(SMALL)
    needs("two backends", "cpp" in here)
    modules = (bench_networks, bench_sweeps, bench_precisions, bench_matrix)
    cases = [case for module in modules for case in module.cases("cuda", False)]
    assert len({case.name for case in cases}) == len(cases)
    runner, promised = new_race(), 0
    for case in map(reduced, cases):
        ours = roofs.sources("cpu", case.distribution)
        beside = [name for name in contenders.names(case) if name == STRUCTURED]
        names = [*ours, *beside, *case.rivals]
        outcome = runner.run(case, names)
        row = results.case_results(case, outcome, runner.machine[0])
        assert not row["left_out"], row["left_out"]
        assert all(promise["reached"] > 0 for promise in row["promises"])
        promised += len(row["promises"])
    assert promised > 40


def test_a_gpu_case_holds_cuda_against_triton():
    matrix = bench_matrix.cases("cuda", False)[0]
    assert [(promise.ours, promise.rival) for promise in matrix.all_promises] == [
        ("cuda", "triton")
    ]
    assert not bench_matrix.cases("cpu", False)[1].all_promises


def test_the_definition_sits_out_what_it_is_slow_on():
    here = contenders.names(SMALL)
    needs("two backends", "cpp" in here)
    assert "torch" in here
    many = tuple(range(1000, 2000))
    for changed in ({"series": "batch"}, {"sizes": (2**20,)}, {"sizes": many}, {"graph": True}):
        assert "torch" not in contenders.names(dataclasses.replace(SMALL, **changed))


def test_the_structured_projection_is_beside_every_projection_of_normal_entries():
    assert STRUCTURED in contenders.names(SMALL)
    assert STRUCTURED in contenders.names(dataclasses.replace(SMALL, series="n"))
    for changed in ({"distribution": "rademacher"}, {"matrix": True}):
        assert STRUCTURED not in contenders.names(dataclasses.replace(SMALL, **changed))


@pytest.mark.parametrize("full", [False, True])
def test_what_structured_projections_are_held_to(full):
    cases = [*bench_networks.cases("cpu", full), *bench_sweeps.cases("cpu", full)]
    asked = {
        (case.sizes[0], case.batch, case.n, promise.rival): (promise.at_least, promise.aim)
        for case in cases
        for promise in case.promises
        if promise.ours == STRUCTURED
    }
    assert asked == {
        (3_211_264, 4, 1000, "cpp"): (60, 120),
        (100_000, 128, 1000, "views"): (12, 30),
        (100_000, 1, 1000, "views"): (20, 100),
        (100_000, 128, 1000, WRITE_ROOF): (0.6, 0.8),
        (2049, 512, 1000, "views"): (1, None),
        (768, 1024, 50_257, "stored"): (12, 20),
    }


@pytest.mark.parametrize("full", [False, True])
def test_dense_feedback_with_little_to_compute_is_held_to_a_stored_matrix(full):
    modules = (bench_networks, bench_sweeps, bench_precisions)
    asked = {}
    for case in (case for module in modules for case in module.cases("cpu", full)):
        kind = (len(case.sizes), case.sizes[0], case.batch, case.n, case.distribution)
        for promise in case.promises:
            if promise.ours == "cpp" and (promise.rival == "stored" or case.batch == 1):
                assert promise.rival in case.rivals
                asked[(*kind, promise.rival)] = promise.at_least
    for batch in (1, 32, 128):
        assert asked[3, 800, batch, 10, "normal", "stored"] == 1
    for n in (10, 100):
        assert asked[1, 20_000, 32, n, "normal", "stored"] == 1
    assert asked[1, 1000, 4, 1000, "normal", "stored"] == 1
    assert asked[48, 4096, 32, 1000, "normal", "stored"] == 1
    assert asked[48, 2049, 512, 1000, "normal", "stored"] == 1
    assert asked[1, 100_000, 1, 1000, "normal", "views"] == 0.9
    assert asked[1, 100_000, 1, 1000, "rademacher", "views"] == 2


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_small_shapes_stand_beside_views_and_scaled_copies(device_type):
    modules = (bench_networks, bench_sweeps, bench_precisions)
    cases = [case for module in modules for case in module.cases(device_type, False)]
    small = [case for case in cases if sum(case.sizes) * (case.n + case.batch) < 5e6]
    small += [case for case in cases if len(case.sizes) == 48 and len(set(case.sizes)) == 48]
    assert len(small) > 5
    assert all({"views", "stored"} <= set(case.rivals) for case in small)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_names_of_cases_differ(device_type, full):
    modules = (bench_networks, bench_sweeps, bench_precisions, bench_matrix)
    names = [case.name for module in modules for case in module.cases(device_type, full)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_most_important_come_first_on_a_gpu(device_type, monkeypatch):
    class Item:
        def __init__(self, stem):
            self.path = Path(f"{stem}.py")
            self.callspec = SimpleNamespace(params={"case": SMALL})

        def add_marker(self, marker):
            pass

    monkeypatch.setattr(conftest, "device_type", lambda config: device_type)
    here = ["bench_matrix", "bench_networks", "bench_new", "bench_precisions", "bench_sweeps"]
    items = [Item(stem) for stem in here]
    conftest.pytest_collection_modifyitems(None, items)
    first = ["bench_precisions", "bench_networks", "bench_sweeps", "bench_matrix", "bench_new"]
    assert [item.path.stem for item in items] == (first if device_type == "cuda" else here)


# --- training steps ---

CPU = torch.device("cpu")
NETWORKS = {
    "perceptron": training_step.Perceptron(6, (8, 5), batch=4, n=3),
    "transformer": training_step.Transformer(2, width=8, heads=2, tokens=5, batch=3, n=11),
}
every_network = pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS)


@every_network
def test_a_training_step_is_measured_with_both_kinds_of_matrices(case):
    result = training_step.measure(case, CPU, torch.float32, 0, ["hadamard"])
    times = result["seconds"]
    assert set(times) == set(result["peak_bytes"]) == set(result["ratio"]) <= set(WAYS)
    assert {"backprop", "shallow", "DFA", "DFA, matrix=", "DFA, lean"} <= set(times)
    assert "DFA, hadamard" in times
    assert not result["left_out"]
    assert all(time > 0 for time in times.values())
    assert result["rounds"] == 5


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own compiler's
def test_compiled_steps_stand_beside_a_compiled_one_of_backpropagation(monkeypatch):
    compiled = functools.partial(torch.compile, backend="aot_eager")  # needs no C++ compiler
    monkeypatch.setattr(torch, "compile", compiled)
    case = dataclasses.replace(NETWORKS["perceptron"], compiled=True)
    result = training_step.measure(case, CPU, torch.float32, 0, ["hadamard"])
    assert not result["left_out"]
    eager = ["backprop", "DFA", "DFA, hadamard"]
    others = ["shallow", "DFA, matrix=", "DFA, lean"]
    assert {*eager, *others, *(f"{way}, compiled" for way in eager)} == set(result["ratio"])
    for way in ("backprop", "backprop, compiled"):
        assert result["ratio"][way] == 1
    learned = []
    for options in ({}, {"compiled": True}):
        step = training_step.Step(case, CPU, torch.float32, "dfa", **options)
        step.run()
        learned.append([weight.grad for weight in step.model.parameters()])
    torch.testing.assert_close(*learned)


def test_ratios_of_training_steps_are_of_the_same_rounds():
    times = {"backprop": [1.0, 4.0, 2.0], "DFA": [2.0, 2.0, 3.0]}
    times |= {"backprop, compiled": [4.0, 1.0, 1.0], "DFA, compiled": [1.0, 4.0, 2.0]}
    assert training_step.ratio(times, "DFA") == 1.5
    assert training_step.ratio(times, "DFA, compiled") == 2.0


def test_a_short_step_is_repeated_within_a_round(monkeypatch):
    monkeypatch.setattr(race, "ROUND", 1.0)
    asked = []

    class Asked(training_step.Step):
        def seconds(self, repeats=1):
            asked.append(repeats)
            return 0.1

    monkeypatch.setattr(training_step, "Step", Asked)
    training_step.measure(NETWORKS["perceptron"], CPU, torch.float32, 0)
    assert asked == [1] * 15 + [10] * 25  # 3 to begin and 5 rounds, of 5 ways


def test_the_papers_network_has_its_batches():
    cases = [case for name, case in training_step.CASES.items() if training_step.PAPER in name]
    assert [(case.widths, case.n, case.batch) for case in cases] == [
        (PAPER_MLP[0], PAPER_MLP[1], batch) for batch in (128, 32)
    ]
    assert all(case.compiled for case in cases)


@every_network
def test_a_training_step_takes_its_distribution(monkeypatch, case):
    seen = []

    class Seen(training_step.Step):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            seen.append(self.dfa.distribution)

    monkeypatch.setattr(training_step, "Step", Seen)
    training_step.measure(case, CPU, torch.float32, 0, ["uniform", "hadamard"])
    assert seen[-3:] == ["normal", "uniform", "hadamard"]


@every_network
def test_a_training_step_learns_the_same_however_its_signals_are_made(case):
    matrix = feedback_matrix(case.widest, case.n)
    learned = []
    for options in ({}, {"lean": True}, {"matrix": matrix}):
        step = training_step.Step(case, CPU, torch.float32, "dfa", **options)
        step.run()
        assert all(weight.grad.any() for weight in step.model.parameters() if weight.dim() > 1)
        learned.append([weight.grad for weight in step.model.parameters()])
    for other in learned[1:]:
        torch.testing.assert_close(learned[0], other, rtol=1e-4, atol=1e-7)


@every_network
def test_the_limit_counts_the_products_that_are_saved(case):
    counted = []
    for mode, options in (("backprop", {}), ("dfa", {"matrix": NoProducts()})):
        step = training_step.Step(case, CPU, torch.float32, mode, **options)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step.run()
        counted.append(counter.get_total_flops() / 2)
    by_backpropagation, by_dfa = case.products()
    rows = step.y.numel()
    assert counted[0] - counted[1] == rows * (by_backpropagation - by_dfa)
    masked = 0  # products that causal attention does without, and the counter counts
    if isinstance(case, training_step.Transformer):
        masked = 3 * case.blocks * case.width * case.tokens
    assert counted[0] == rows * (by_backpropagation + masked)
    assert training_step.limit(case) == by_dfa / by_backpropagation < 1


class NoProducts:
    """A source of signals without products."""

    def project(self, error, layers, dtype):
        return [error.new_ones(len(error), size, dtype=dtype) for size in layers.sizes]

    def describe(self):
        return {}


def test_the_large_transformer_is_gpt_2_small():
    case = training_step.ACCELERATOR_CASES["GPT-2 small, 1024 tokens, n = 50257"]
    with torch.device("meta"):
        parts = case.parts()
        x, y = case.data("meta", torch.bfloat16)
    assert len(parts) == 13
    weights = sum(weight.numel() for part in parts for weight in part.parameters())
    assert weights == pytest.approx(124e6 + 768 * 50_257, rel=0.01)  # whose output layer is tied
    assert x.shape == y.shape == (8, 1024)
    assert (case.widest, case.n) == (768, 50_257)


@pytest.mark.parametrize("when", ["made", "run"])
def test_a_way_of_training_that_does_not_fit_leaves_the_others_their_results(when, monkeypatch):
    class Failing(training_step.Step):
        def __init__(self, case, device, dtype, mode, lean=False, **arguments):
            super().__init__(case, device, dtype, mode, lean=lean, **arguments)
            self.lean, self.taken = lean, 0
            if when == "made":
                self.fail()

        def fail(self):
            if self.dfa.mode == "backprop":
                raise torch.OutOfMemoryError
            if self.lean:
                raise ValueError("out of order")

        def run(self):
            super().run()
            self.taken += 1
            if self.taken > 5:
                self.fail()

    monkeypatch.setattr(training_step, "Step", Failing)
    case = NETWORKS["perceptron"]
    result = training_step.measure(case, CPU, torch.float32, 0)
    assert set(result["seconds"]) == set(result["peak_bytes"]) == {"shallow", "DFA", "DFA, matrix="}
    assert result["ratio"] == {}
    assert result["left_out"] == {
        "backprop": measure.MISSING,
        "DFA, lean": "ValueError('out of order')",
    }


def test_the_command_writes_every_case(tmp_path, monkeypatch, capsys):
    path, saved = tmp_path / "training_step.json", []
    monkeypatch.setattr(training_step, "CASES", NETWORKS)
    save = training_step.provenance.save
    monkeypatch.setattr(
        training_step.provenance,
        "save",
        lambda path, results: (save(path, results), saved.append(len(results["cases"]))),
    )
    options = ["--seconds", "0", "--json", str(path)]
    assert training_step.main(options) == 0
    written = json.loads(path.read_text())
    assert [case["case"] for case in written["cases"]] == [*NETWORKS]
    assert saved == [1, 2]
    assert written["finished"]
    assert written["cases"][1]["ratio"]["backprop"] == 1
    monkeypatch.setattr(training_step, "CASES", {"net, batch 4": NETWORKS["perceptron"]} | NETWORKS)
    assert training_step.main([*options, "--case", "batch 4"]) == 0
    (case,) = json.loads(path.read_text())["cases"]
    assert (case["case"], case["batch"]) == ("net", 4)
    assert training_step.main([*options, "--case", "former"]) == 0
    (case,) = json.loads(path.read_text())["cases"]
    assert case["case"] == "transformer"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        training_step.main(["--case", "no such"])
    assert "net, batch 4; perceptron; transformer" in capsys.readouterr().err
