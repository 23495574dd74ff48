"""What is built from `csrc`: the headers, the binary's symbols, and builds without it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dfa_kernels import stream
from tests import ROOT, reference
from tests.conftest import COMPILER, needs
from tests.reference import DENSE

BINARY = ROOT / "dfa_kernels" / "_C.abi3.so"


@pytest.fixture
def extension():
    """The binary in this checkout."""
    needs("the compiled extension", BINARY.exists())


@pytest.mark.parametrize("compiler", ["c++", "nvcc"])
def test_the_headers_make_the_stream_under_every_compiler(compiler, tmp_path):
    """Host code is run; nvcc compiles the device code too."""
    needs(compiler, shutil.which(compiler) is not None)
    source, binary = str(Path(__file__).parent / "stream_headers.cpp"), tmp_path / "headers"
    cuda = ["-x", "cu", "-gencode=arch=compute_80,code=sm_80"] if compiler == "nvcc" else []
    cuda += ["-gencode=arch=compute_90a,code=sm_90a"] if compiler == "nvcc" else []
    subprocess.run([compiler, "-std=c++17", *cuda, source, "-o", binary], check=True)
    lines = subprocess.run([binary], check=True, capture_output=True, text=True).stdout.splitlines()
    *vectors, codebook, corner, facts = lines
    for line, vector in zip(vectors, reference.KNOWN["philox4x32"], strict=True):
        assert line.split() == vector["out"]
    patterns = np.array([int(word, 16) for word in codebook.split()], dtype=np.uint32) << 16
    values = patterns.view(np.float32).astype(np.float64)
    assert reference.codebook_digest(values) == reference.KNOWN["codebook_bf16_sha256"]
    fields = np.array(corner.split()).reshape(2, 4, 3)  # rows, columns, distributions
    for place, distribution in enumerate(DENSE):
        known = next(a for a in reference.KNOWN["entries"] if a["distribution"] == distribution)
        expected = [[str(value) for value in row[:4]] for row in known["values"][:2]]
        assert fields[:, :, place].tolist() == expected
    assert facts.split() == [
        text
        for name, of in stream.DENSE.items()
        for text in (name, f"{of.block}", f"{of.bits}", f"{of.factor:.17g}")
    ]


def test_the_binary_needs_only_torchs_stable_symbols(extension):
    command = ["nm", "-DC", "--undefined-only", BINARY]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "aoti_torch" in symbols
    assert [s for s in symbols.splitlines() if "at::" in s or "c10::" in s] == []


def test_the_binary_needs_only_pythons_stable_symbols(extension):
    command = ["abi3audit", "--strict", "--assume-minimum-abi3", "3.10", BINARY]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, check=True, env=env)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout, so that builds leave nothing behind in the real one."""
    for name in ("dfa_kernels", "csrc"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def empty_sources(checkout):
    """For speed: a build still compiles all of them."""
    for source in checkout.glob("csrc/**/*.c*"):
        if source.suffix in (".cpp", ".cu"):
            source.write_text("")


def build_wheel(checkout, **environment):
    """Build as an installer does, with these variables set: the wheel's path and the output."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", checkout / "wheels", checkout],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    (wheel,) = (checkout / "wheels").iterdir()
    return wheel, done.stdout + done.stderr


def test_without_a_compiler_the_wheel_is_pure_python(checkout):
    wheel, printed = build_wheel(checkout, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "left out the compiled kernels: there is no C++ compiler 'no-such-compiler'" in printed
    names = zipfile.ZipFile(wheel).namelist()
    assert "dfa_kernels/backends/torch.py" in names
    assert not any(name.endswith(".so") for name in names)


def test_without_torch_the_wheel_is_pure_python(checkout):
    hidden = checkout / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden')")
    wheel, printed = build_wheel(checkout, PYTHONPATH=str(hidden))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "left out the compiled kernels: torch is not in the build environment" in printed


@pytest.mark.slow
def test_a_failed_build_leaves_a_working_package(extension, checkout):
    empty_sources(checkout)
    (checkout / "csrc" / "cpu" / "broken.cpp").write_text("#error broken on purpose\n")
    wheel, printed = build_wheel(checkout)
    assert "left out the compiled kernels" in printed
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    program = (
        "import sys; "  # an editable install would lend this package the checkout's extension
        "finders = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]; "
        "sys.meta_path = finders; "
        "import torch, dfa_kernels; "
        "cpp = [s for s in dfa_kernels.backends() if s.name == 'cpp'][0]; "
        "print(cpp.available, cpp.reason); dfa_kernels.project(torch.ones(2, 3), [4])"
    )
    site = checkout / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert done.stdout.startswith("False the compiled extension is not there")
    assert done.stderr.count("RuntimeWarning: dfa_kernels: backend 'cpp' cannot serve cpu") == 1


# A build as if torch were a CUDA build.
CUDA_BUILD = """
import runpy, sys, torch
torch.version.cuda = "13.0"
torch.cuda._is_compiled, torch.cuda.is_available = lambda: True, lambda: False
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
ONLY_VERSION = '[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.1"'


def cuda_build(checkout, nvcc, architectures):
    """Build from emptied sources with this script as nvcc, if any, for these architectures."""
    needs("c++", COMPILER is not None)
    empty_sources(checkout)
    if nvcc is not None:
        (checkout / "bin").mkdir()
        (checkout / "bin" / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (checkout / "bin" / "nvcc").chmod(0o755)
    variables = {"CUDA_HOME": str(checkout), "TORCH_CUDA_ARCH_LIST": architectures}
    done = subprocess.run(
        [sys.executable, "-c", CUDA_BUILD],
        capture_output=True,
        text=True,
        cwd=checkout,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("nvcc", "architectures", "reason"),
    [
        (None, "", "there is no CUDA toolkit"),
        ("exit 1", "", "--version"),
        (ONLY_VERSION, "", "Error compiling objects"),
        (ONLY_VERSION, "8.0;9.7", "Unknown CUDA arch (9.7)"),
    ],
    ids=["no-toolkit", "no-version", "compiles-nothing", "no-such-architecture"],
)
def test_a_failed_cuda_build_leaves_the_cpu_kernels(checkout, nvcc, architectures, reason):
    done = cuda_build(checkout, nvcc, architectures)
    lines = [line for line in done.stderr.splitlines() if "dfa_kernels: left out" in line]
    assert len(lines) == 1, done.stderr
    (line,) = lines
    assert line.startswith("dfa_kernels: left out the CUDA kernels: ")
    assert reason in line
    names = {binary.name for binary in (checkout / "dfa_kernels").glob("*.so")}
    assert names == {"_C.abi3.so"}


@pytest.mark.parametrize(
    ("architectures", "codes", "macros"),
    [
        ("", ["compute_80,code=sm_80", "compute_90,code=compute_90", "compute_90a,code=sm_90a"], 1),
        ("8.6", ["compute_86,code=sm_86"], 0),
    ],
)
def test_what_nvcc_is_told_to_build(checkout, architectures, codes, macros):
    nvcc = f'{ONLY_VERSION} && exit; echo "$@" >> {checkout}/told; exit 1'
    cuda_build(checkout, nvcc, architectures)
    lines = (checkout / "told").read_text().splitlines()
    assert lines
    for line in lines:
        told = line.split()
        assert ".cu" in line
        assert sorted(word for word in told if "arch=" in word) == [
            f"-gencode=arch={code}" for code in codes
        ]
        assert told.count("-DDFA_KERNELS_SM90A") == macros
