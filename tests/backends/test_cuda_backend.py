"""What the "cuda" backend decides in Python."""

import re
from types import SimpleNamespace

import pytest
import torch

from dfa_kernels.backends import cuda, tensor_cores
from dfa_kernels.layers import Layers
from dfa_kernels.stream import Stream
from tests import ROOT
from tests.reference import DENSE


def test_which_way():
    """Fused for a small batch or few entries. Slabs for a large batch, sooner with more columns."""

    def by_slabs(
        sizes, rows, columns, terms, distribution="normal", in_place=False, row_offsets=None
    ):
        layers = Layers.of(row_offsets or [0] * len(sizes), sizes, [1.0] * len(sizes))
        return cuda.prefers_slabs(layers, rows, columns, terms, distribution, in_place)

    large = [200_000]
    for distribution in DENSE:
        for in_place in (False, True):
            for rows in (0, 1, 64, 128):
                assert not by_slabs(large, rows, 1000, 1, distribution, in_place)
    assert not by_slabs(large, 64, 1000, 2)
    assert not by_slabs([800], 4096, 10, 2)
    assert not by_slabs([10**6], 128, 10, 2)
    assert by_slabs(large, 4096, 1000, 1)
    assert not by_slabs(large, 4096, 1000, 3)
    assert by_slabs(large, 4096, 8000, 2)
    assert by_slabs(large, 512, 1000, 1, in_place=True)
    assert not by_slabs(large, 512, 1000, 1, "rademacher", in_place=True)
    assert not by_slabs([10**6], 4096, 0, 1)
    for rows in range(1, 5000, 7):
        if by_slabs(large, rows, 1000, 1):
            assert by_slabs(large, rows, 50_000, 1)
            assert by_slabs(large, rows, 1000, 1, in_place=True)
    # Every slab and layer costs a launch, and rows that layers share are generated once.
    assert by_slabs([3_211_264], 4096, 100, 1, in_place=True)
    assert not by_slabs([4096], 4096, 100, 1, in_place=True)
    many = [2049 + 43 * i for i in range(48)]
    own = [5000 * i for i in range(48)]
    assert by_slabs(many, 2048, 8000, 1, row_offsets=own)
    assert not by_slabs(many, 2048, 8000, 1)
    assert not by_slabs([10] * 20_000, 4096, 1000, 1, row_offsets=[10 * i for i in range(20_000)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_way(monkeypatch, dtype):
    """Each tile for the error, with thread blocks for one multiprocessor, and the slabs."""
    forced = []

    def tiles(distribution, dtype, terms, device):
        return [2, 5], [f"{distribution} {dtype} {terms}", "other"]

    def fused(error, row_offsets, sizes, scales, seed, column_offset, distribution, *rest):
        forced.append(rest)
        return [error.new_zeros(error.shape[0], size) for size in sizes]

    def entries(rows, columns, row_offset, stream, dtype, device, lattice):
        return torch.ones(rows, columns, dtype=dtype)

    monkeypatch.setattr(torch.ops.dfa_kernels, "cuda_tiles", tiles, raising=False)
    monkeypatch.setattr(torch.ops.dfa_kernels.cuda_fused, "default", fused)
    monkeypatch.setattr(cuda, "feedback_matrix", entries)
    error = torch.ones(2, 16, dtype=dtype)
    ways = dict(cuda.ways(error, "normal"))
    terms = 3 if dtype == torch.float32 else 1
    assert [*ways] == {
        torch.float32: [f"fused normal {dtype} 3", "fused other"],
        torch.bfloat16: [f"fused normal {dtype} 1", "fused other", "slabs"],
        torch.float64: ["slabs"],
    }[dtype]
    for name, way in ways.items():
        before = len(forced)
        (signal,) = way(error, Layers((0,), (4,), (1.0,)), Stream(0, 0, "normal"), dtype)
        assert signal.shape == (2, 4)
        assert (len(forced) > before) == name.startswith("fused")
    assert forced == [(dtype, terms, tile, 1) for tile in (2, 5) if dtype != torch.float64]


def test_a_projection_forces_nothing(monkeypatch):
    given = []

    def fused(*arguments):
        given.append(arguments)

    monkeypatch.setattr(torch.ops.dfa_kernels.cuda_fused, "default", fused)
    layers, stream = Layers((0,), (4,), (1.0,)), Stream(0, 0, "normal")
    cuda.project(torch.ones(1, 8), layers, stream, torch.float32)
    assert [arguments[-3:] for arguments in given] == [(3, -1, 0)]


def test_union_rows():
    offsets, sizes = [30, 0, 5, 100, 0, 20], [10, 10, 10, 7, 3, 10]
    covered = {row + i for row, size in zip(offsets, sizes, strict=True) for i in range(size)}
    assert Layers.of(offsets, sizes, [1.0] * 6).union_rows() == len(covered)


def test_why_not():
    assert cuda.unavailable("cpu").startswith("it serves CUDA devices only")
    assert cuda.unavailable("mps").startswith("it serves CUDA devices only")


def test_old_gpus_are_named(monkeypatch):
    """Whichever device is current; both backends that use tensor cores rely on it."""
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    tensor_cores.too_old.cache_clear()
    assert tensor_cores.too_old() == (
        "it needs compute capability 8.0 on every device, but GPU 1 is sm_75"
    )
    capabilities.pop()
    tensor_cores.too_old.cache_clear()
    assert tensor_cores.too_old() is None
    tensor_cores.too_old.cache_clear()


def test_failed_allocations_are_torchs_own_errors(monkeypatch):
    def fails(*_):
        raise RuntimeError(message)

    failing = SimpleNamespace(default=fails)
    monkeypatch.setattr(torch.ops.dfa_kernels, "cuda_entries", failing, raising=False)
    arguments = (2, 3, 0, Stream(0, 0, "normal"), torch.float32, torch.device("cpu"))
    message = f"feedback_matrix: cannot allocate {10**15} bytes"
    with pytest.raises(RuntimeError, match=f"tried to allocate {10**15} bytes"):
        cuda.feedback_matrix(*arguments)
    for message in ("feedback_matrix: cannot allocate 8 bytes", "something else"):
        with pytest.raises(RuntimeError, match=message):
            cuda.feedback_matrix(*arguments)


def test_architectures_without_bf16_are_left_out(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    import setup

    assert setup.architectures("8.0;9.0+PTX") == "8.0;9.0+PTX"
    assert setup.architectures("7.5 8.6;9.0a Ampere") == "8.6;9.0a;Ampere"
    assert "7.5 part of the CUDA kernels: they need compute" in capsys.readouterr().err
    assert setup.architectures("6.1;Volta;7.0+PTX") == setup.CUDA_ARCHITECTURES
    assert "6.1 7.0+PTX Volta part" in capsys.readouterr().err
    assert setup.architectures("10.0;12.0") == "10.0;12.0"


@pytest.fixture
def nvcc_flags(monkeypatch):
    """The function of setup.py, which sets a variable of the environment."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.syspath_prepend(str(ROOT))
    import setup

    return setup.nvcc_flags


def built(flags):
    """The code that nvcc is told to build, and whether the sources are told of sm_90a."""
    codes = []
    for flag in flags:
        code = re.fullmatch(r"-gencode=arch=compute_(\w+),code=((?:sm|compute)_\1)", flag)
        codes += [code[2]] if code else []
    others = [flag for flag in flags if not flag.startswith("-gencode")]
    assert len(codes) + len(others) == len(flags)
    assert others in ([], ["-DDFA_KERNELS_SM90A"])
    return " ".join(sorted(codes)), bool(others)


@pytest.mark.parametrize(
    ("asked", "codes", "sm90a"),
    [
        ("8.0;9.0+PTX", "compute_90 sm_80 sm_90a", True),
        ("9.0", "sm_90a", True),
        ("9.0a", "sm_90a", True),
        ("9.0a+PTX", "compute_90 sm_90a", True),
        ("9.0 9.0a", "sm_90a", True),
        ("Hopper", "compute_90 sm_90a", True),
        ("8.0", "sm_80", False),
        ("8.0+PTX", "compute_80 sm_80", False),
        ("7.5;8.6 8.9", "sm_86 sm_89", False),
        ("Ampere;Ada", "compute_86 compute_89 sm_80 sm_86 sm_89", False),
        ("10.0;12.0a", "sm_100 sm_120a", False),
        ("12.0+PTX;9.0", "compute_120 sm_120 sm_90a", True),
        ("Blackwell", "compute_121 sm_100 sm_103 sm_120 sm_121", False),
        ("Volta", "compute_90 sm_80 sm_90a", True),
    ],
)
def test_what_is_built_for_a_list_of_architectures(nvcc_flags, asked, codes, sm90a):
    """Never sm_90, beside which the driver would choose, nor PTX of compute_90a."""
    assert built(nvcc_flags(asked)) == (codes, sm90a)


def test_the_native_architecture(nvcc_flags, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90", "sm_120"])
    for capability, expected in (
        ((9, 0), ("compute_90 sm_90a", True)),
        ((8, 6), ("compute_86 sm_86", False)),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, of=capability: of)
        assert built(nvcc_flags("native")) == expected


def test_unknown_architectures_are_refused(nvcc_flags):
    with pytest.raises(ValueError, match=r"9\.7"):
        nvcc_flags("8.0;9.7")
