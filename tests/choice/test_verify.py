"""`verify` passes correct backends, and finds and names faults."""

import json
import math
import re
import shutil
import sys

import pytest
import torch

from dfa_kernels import cases, cli, ops, stream, verify
from dfa_kernels.backends import cpp, cuda, registry
from dfa_kernels.backends import torch as definition
from tests import reference
from tests.conftest import AVAILABLE
from tests.samples import DTYPES

CPU, F32 = torch.device("cpu"), torch.float32
# The CPU's backends other than the definition itself.
COMPILED = [s.name for s in AVAILABLE if s.device == "cpu" and s.name != "torch"]


@pytest.fixture
def small(monkeypatch):
    """Fewer and smaller cases, for faults that show in any case."""
    of = cases.Case.of
    less = {"columns": 70, "unit_rows": 30}
    monkeypatch.setattr(verify.Case, "of", lambda *a, **k: of(*a, **(k | less)), raising=True)
    monkeypatch.setattr(verify, "_BLOCKS", verify._BLOCKS[1:3])


def stand_in(monkeypatch, project):
    """Give backend "torch" another projection."""
    ways = lambda error, distribution: [("other", project)]  # noqa: E731
    monkeypatch.setattr(definition, "ways", ways, raising=False)


def faulty(fault, *, when=lambda error, dtype: True):
    """The definition's projection, with a fault in its signals."""

    def project(error, *arguments):
        signals = definition.project(error, *arguments)
        if when(error, arguments[-1]):
            fault(signals)
        return signals

    return project


def mistakes(what="signals"):
    found = [c for c in verify.checks_of("torch", CPU) if c.what.startswith(what)]
    return {check.what: check.mistake for check in found if check.mistake}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", reference.DENSE)
def test_a_case_expects_what_the_reference_gives(distribution, dtype):
    """Against the tests' own NumPy definition: entries bit for bit, exact sums, sums in float64."""
    case = cases.Case.of(dtype, distribution, columns=70, unit_rows=30)
    seed, column_offset, _ = case.stream
    where = {"seed": seed % 2**64, "distribution": distribution, "column_offset": column_offset}
    row_offsets, sizes, scales = case.layers
    expected = case.expected(torch.float64, terms=3, lattice=True)
    exact = reference.project(case.error, sizes, scales, row_offsets=row_offsets, **where)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for (values, bounds), signal, scale, size, row in zip(
        expected, exact, scales, sizes, row_offsets, strict=True
    ):
        torch.testing.assert_close(values, signal, rtol=2**-22, atol=1e-5)
        u = reference.matrix(size, 70, row_offset=row, dtype=wide, **where).double()
        units = case.error[case.rows["unit"]].double()
        assert torch.equal(values[case.rows["unit"]], units @ u.T * scale)
        assert (bounds[case.rows["unit"]] == 0).all()
        assert (bounds[case.rows["random"]] > 0).all()
        integers = case.rows["integer"]
        if distribution != "normal":
            lattice = torch.from_numpy(reference.lattice(size, 70, row_offset=row, **where))
            sums = case.error[integers].double() @ lattice.T
            assert torch.equal(sums * 256, (sums * 256).round())  # exact in any order
            assert sums.abs().max() * 256 < 2**24
            factor = math.sqrt(3) if distribution == "uniform" else 1.0
            factor = torch.tensor(factor * scale, dtype=wide)
            assert torch.equal(values[integers], (sums.to(wide) * factor).double())
            assert (bounds[integers] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_structured_case_expects_the_bits_of_the_reference(dtype):
    case = cases.Case.of(dtype, "hadamard", columns=70, unit_rows=30)
    seed, column_offset, _ = case.stream
    row_offsets, sizes, scales = case.layers
    seed %= 2**64
    where = {"seed": seed, "row_offsets": row_offsets, "column_offset": column_offset}
    exact = reference.structured_signals(case.error, sizes, scales, **where)
    for output in DTYPES:
        expected = case.expected(output, terms=3, lattice=False)
        for (values, bounds), signal in zip(expected, exact, strict=True):
            assert torch.equal(values, reference.rounded(signal, output).double())
            assert not bounds.any()


def test_a_case_is_what_it_says():
    case = cases.Case.of(torch.float32, "normal")
    assert sum(rows.stop - rows.start for rows in case.rows.values()) == len(case.error)
    assert case.error[case.rows["unit"]].count_nonzero(1).eq(1).all()
    assert case.error.shape[1] > 2 * 512  # three steps of the longest
    columns = case.error[case.rows["unit"]].nonzero()[:, 1]
    assert (columns[0], columns[-1], columns.unique().numel()) == (0, 1040, 141)
    needle = case.error[case.rows["needle"]].amax().item()
    terms, left = [], needle
    for _ in range(3):
        terms.append(torch.tensor(left).bfloat16().item())
        left -= terms[-1]
    assert left == 0
    # Each term but the first adds more than the error allowed for a needle.
    assert terms[1] / needle > 2**-15
    assert terms[2] / needle > 8 * 2**-24


@pytest.mark.parametrize("backend", COMPILED)
def test_what_is_compiled_for_the_cpu_passes(backend):
    found = list(verify.checks_of(backend, CPU))
    assert [check for check in found if check.mistake] == []
    if backend == "cpp":
        modes = {check.what.split(", ")[-1] for check in found[1:]}
        assert modes == set(cpp.modes())
        assert "portable" in modes
        dense, structured = 3 * 2 * 7, 3 * 2 * 6
        assert sum(check.cases for check in found) == len(modes) * (
            1 + 4 * 4 * 4 + dense + structured
        )
        assert torch.ops.dfa_kernels.cpu_isa(None) == torch.ops.dfa_kernels.cpu_isa("")


def test_checks_of_a_backend_that_cannot_serve_are_none_that_pass():
    with pytest.raises(RuntimeError, match="verify: backend 'cpp' cannot serve cuda: it serves"):
        next(verify.checks_of("cpp", torch.device("cuda")))


def test_every_normal_level_is_among_the_entries():
    seed, rows, columns, row, column = verify._BLOCKS[0]
    assert rows * columns >= 2**18
    k = reference.indices(rows, columns, seed=seed % 2**64, row_offset=row, column_offset=column)
    assert len(set(k.flatten().tolist())) == 4096


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda s: s[0][3, 5].add_(1e-2), "layer 0, the first of error 3 (unit) and unit 5"),
        (lambda s: s[0][33, 300].mul_(1 + 2**-7), "error 33 (integer) and unit 300"),
        (lambda s: s[4][-1, -1].fill_(math.nan), "error 56 (random) and unit 8: nan instead"),
        (lambda s: s[2].mul_(1.01), "signals in layer 2"),
        (lambda s: s[1].copy_(s[1].roll(1, 1)), "signals in layer 1"),
        (lambda s: s.pop(), "4 signals for 5 layers"),
        (
            lambda s: s.append(s.pop()[:, :8].contiguous()),
            "layer 4 has a signal of shape (57, 8), not (57, 9)",
        ),
        (lambda s: s.append(s.pop().double()), "a signal of torch.float64"),
        (lambda s: s.append(s.pop().T.contiguous().T), "a signal of strides (1, 57)"),
        (lambda s: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.usefixtures("small")
def test_faults_are_found_and_named(monkeypatch, fault, said):
    def only(error, dtype):
        return error.dtype == torch.bfloat16 and dtype == torch.float32

    monkeypatch.setattr(verify, "_errors", lambda backend: [(torch.bfloat16, "highest")])
    stand_in(monkeypatch, faulty(lambda s: len(s) == 5 and fault(s), when=only))
    found = mistakes()
    structured = "signals and transposes, hadamard, bfloat16"
    assert list(found) == ["signals, bfloat16", structured]
    assert said in found["signals, bfloat16"]
    assert "the first is other, normal, torch.float32: " in found["signals, bfloat16"]


@pytest.mark.usefixtures("small")
def test_a_number_of_structured_feedback_that_is_off_by_one_bit_is_found(monkeypatch):
    off = faulty(lambda s: s[1][4, 7].nextafter_(torch.tensor(9e9)), when=lambda _, d: d == F32)
    stand_in(monkeypatch, off)
    found = mistakes("signals and transposes")
    assert "unit 7" in found["signals and transposes, hadamard, float32"]


@pytest.mark.usefixtures("small")
def test_a_transpose_that_is_off_by_one_bit_is_found(monkeypatch):
    true = torch.ops.dfa_kernels.structured_adjoint.torch

    def off(signals, *arguments):
        error = true(signals, *arguments)
        if error.dtype == F32:
            error[2, 3].nextafter_(torch.tensor(9e9))
        return error

    monkeypatch.setattr(torch.ops.dfa_kernels.structured_adjoint, "torch", off)
    found = mistakes("signals and transposes")["signals and transposes, hadamard, float32"]
    assert "transpose, torch.float32 to torch.float32" in found
    assert "1 of 3990 numbers, the first in row 2, column 3" in found


@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.usefixtures("small")
def test_a_lost_term_of_an_fp32_error_is_found(monkeypatch, lost):
    """As from a kernel that leaves out the last one or two of three terms."""

    def project(error, *arguments):
        kept, left = torch.zeros_like(error), error.clone()
        for _ in range(3 - lost):
            term = left.bfloat16().float()
            kept, left = kept + term, left - term
        return definition.project(kept, *arguments)

    monkeypatch.setattr(verify, "_errors", lambda backend: [(torch.float32, "highest")])
    stand_in(monkeypatch, project)
    assert "(needle)" in mistakes()["signals, float32"]


@pytest.mark.usefixtures("small")
def test_what_a_kernel_leaves_unwritten_is_found(monkeypatch):
    """Even where its memory held the right signals before."""

    def project(error, layers, stream, dtype):
        signals = [error.new_empty(len(error), size, dtype=dtype) for size in layers.sizes]
        true = definition.project(error, layers, stream, dtype)
        for signal, right in zip(signals, true, strict=True):
            signal[:, :-1] = right[:, :-1]
        return signals

    monkeypatch.setattr(verify, "_errors", lambda backend: [(torch.float64, "highest")])
    stand_in(monkeypatch, project)
    assert "nan instead of" in mistakes()["signals, float64"]


@pytest.mark.usefixtures("small")
def test_wrong_entries_are_found(monkeypatch):
    true = ops.feedback_matrix

    def off(*arguments):
        entries = true(*arguments)
        if arguments[-1] == "cpp" and arguments[3].distribution == "uniform" and len(entries) == 5:
            entries[4, 7] *= 1 + 2**-7
        return entries

    monkeypatch.setattr(ops, "feedback_matrix", off)
    monkeypatch.setattr(verify, "_errors", lambda backend: [])
    pytest.importorskip("dfa_kernels._C")
    found = {c.what: c.mistake for c in verify.checks_of("cpp", CPU) if c.mistake}
    assert {what.split(", ")[1] for what in found} == {"uniform"}
    assert (
        f"1 of 700 entries, the first at row {2**31 + 2}, column 134"
        in found["entries, uniform, portable"]
    )


def test_the_known_answers_are_those_of_the_tests():
    answers = {
        (tuple(block["counter"]), tuple(block["key"])): block["out"]
        for block in reference.KNOWN["philox4x32"]
        if block["rounds"] == stream.PHILOX_ROUNDS
    }
    counter, key, out = (
        [f"{word:08x}" for word in words] for words in (verify._COUNTER, verify._KEY, verify._BLOCK)
    )
    assert answers[tuple(counter), tuple(key)] == out
    assert reference.KNOWN["codebook_bf16_sha256"] == verify._CODEBOOK


@pytest.mark.usefixtures("small")
def test_another_definition_is_found(monkeypatch):
    block = verify._BLOCK
    monkeypatch.setattr(verify, "_BLOCK", [0, 0, 0, 0])
    check = next(verify.checks_of("torch", CPU))
    assert "Philox4x32-10 is not Random123's" in check.mistake
    monkeypatch.setattr(verify, "_BLOCK", block)
    monkeypatch.setattr(verify, "_CODEBOOK", "0" * 64)
    assert "codebook" in next(verify.checks_of("torch", CPU)).mistake


@pytest.mark.usefixtures("small")
def test_a_lost_gpu_ends_the_checks(monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(verify, "_entries", lambda *_: "wrong")
    found = list(verify.checks_of("torch", torch.device("cuda", 0)))
    assert len(found) == 2
    assert found[-1].mistake == (
        "not checked: the GPU is out of use (CUDA error: an illegal memory access was encountered)"
    )


@pytest.mark.usefixtures("small")
def test_what_a_caller_had_set_is_as_before(monkeypatch):
    monkeypatch.setattr(verify, "_errors", lambda backend: [(torch.float32, "medium")])
    states = []
    stand_in(monkeypatch, lambda *_: states.append(torch.get_float32_matmul_precision()) or [])
    list(verify.checks_of("torch", CPU))
    assert set(states) == {"medium", "highest"}  # the latter where nothing is multiplied
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.are_deterministic_algorithms_enabled()  # as the tests set it


# The command


@pytest.mark.usefixtures("small")
def test_the_command_prints_a_table(capsys, tmp_path):
    path = tmp_path / "result.json"
    assert cli.main(["verify", "--backend", "torch", "--device", "cpu", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  entries, normal +8 cases +[\d.]+ s  passed$", text, re.MULTILINE)
    result = json.loads(path.read_text())
    assert result["seconds"] > 0
    assert (result["backend"], result["device"], result["passed"]) == ("torch", "cpu", True)
    assert result["failures"] == []


def test_the_command_says_what_is_wrong(monkeypatch, capsys, tmp_path):
    path = tmp_path / "result.json"
    checks = [verify.Check("entries", 3, 0.1, None), verify.Check("signals", 2, 0.1, "off by one")]
    kept = []
    monkeypatch.setattr(verify, "checks_of", lambda backend, device, only: checks)
    monkeypatch.setattr(registry, "keep_check", lambda *a: kept.append(a[:3]))
    assert cli.main(["verify", "--backend", "torch", "--device", "cpu", "--json", str(path)]) == 1
    assert kept == [("torch", CPU, ["signals: off by one"])]
    text = capsys.readouterr().out
    assert re.search(r"^  signals +2 cases +0.1 s  wrong\n    off by one$", text, re.MULTILINE)
    result = json.loads(path.read_text())
    assert (result["passed"], result["failures"]) == (False, ["signals: off by one"])


def test_a_backend_that_cannot_serve_is_not_verified(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "unavailable", lambda device_type: "not today")
    assert cli.main(["verify", "--backend", "cuda"]) == 1
    assert "cuda on cpu was not checked: not today" in capsys.readouterr().out
    monkeypatch.setattr(verify, "checks_of", lambda backend, device, only: [])
    monkeypatch.setattr(verify, "checks_side_by_side", lambda *_: [])
    assert cli.main(["verify"]) == 0  # the other backends are verified
    assert "cuda on cpu was not checked: not today" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_one_check_by_its_name(capsys):
    arguments = ["verify", "--backend", "torch", "--device", "cpu", "--only"]
    assert cli.main([*arguments, "entries, uniform"]) == 0
    assert re.findall(r"^  (\S.*?)  ", capsys.readouterr().out, re.MULTILINE) == [
        "entries, uniform"
    ]
    assert cli.main([*arguments, "entries"]) == 1
    assert "no check is named 'entries'" in capsys.readouterr().out


def test_checks_in_processes_side_by_side(monkeypatch):
    """Results come in order, with their mistakes, even if a process ends without a word."""
    names = ["the definition, against known answers", "entries, rademacher", "gone"]
    monkeypatch.setattr(verify, "_aspects", lambda *_: [(name, None) for name in names])
    found = list(verify.checks_side_by_side("torch", CPU, 2))
    assert [check.what for check in found] == names
    assert [check.cases for check in found] == [1, 16, 0]
    assert [check.mistake for check in found] == [None, None, "no check is named 'gone'"]
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    check = verify._in_a_process("torch", CPU, "entries, normal")
    assert check.mistake == "it ended with status 1: "


def test_triton_is_checked_side_by_side(monkeypatch, capsys):
    """Unless one check or one process is asked for."""
    status = registry.BackendStatus("triton", "cpu", True, False, None, None)
    monkeypatch.setattr(registry, "backends", lambda: [status])
    one = [verify.Check("alone", 1, 0.1, None)]
    several = [verify.Check("side by side", 1, 0.1, None)]
    monkeypatch.setattr(verify, "checks_of", lambda backend, device, only: one)
    monkeypatch.setattr(verify, "checks_side_by_side", lambda *_: several)
    for options, said in (
        (["--processes", "4"], "side by side"),
        (["--processes", "1"], "alone"),
        (["--processes", "4", "--only", "alone"], "alone"),
    ):
        assert cli.main(["verify", *options]) == 0
        assert said in capsys.readouterr().out


def test_an_unknown_mode_of_checks_is_said(monkeypatch, capsys):
    def refuses():
        raise ValueError("DFA_KERNELS_CHECK must be")

    monkeypatch.setattr(registry, "backends", refuses)
    assert cli.main(["verify"]) == 1
    assert "DFA_KERNELS_CHECK must be" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["verify", "--device", "cuda"])
    assert "argument --device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(dtype, "highest") for dtype in DTYPES] + [(torch.float32, "high"), (torch.float32, "medium")],
)
def test_every_way_on_a_gpu(gpu_backend, dtype, precision):
    """Each tile, each number of terms, and slabs."""
    if gpu_backend == "torch" and precision != "highest":
        pytest.skip("it leaves the precision of fp32 products to the vendor")
    with verify._precision(precision):
        error = torch.zeros(3, 5, dtype=dtype, device="cuda")
        distributions = registry.BACKENDS[gpu_backend].DISTRIBUTIONS
        ways = [verify.ways_of(gpu_backend, error, distribution) for distribution in distributions]
    expected = 0
    for names in ([name for name, _ in each] for each in ways):
        assert len(set(names)) == len(names)
        other = [name for name in names if not name.startswith("fused")]  # a single layer, too
        expected += (len(names) + len(other)) * len({dtype, torch.float32})
    signals = verify._signals(gpu_backend, torch.device("cuda"), dtype, precision)
    check = verify._check("signals", signals)
    assert check.mistake is None
    assert check.cases == expected
