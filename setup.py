"""Builds the package, with the compiled extension `dfa_kernels._C` wherever it can be built.

Without torch in the build environment or without a C++ compiler the package is pure Python, and
one line says what was left out. `pip install --no-build-isolation .` builds against the torch that
is installed; the binary then serves every Python >= 3.10 and every torch >= 2.10.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
COMPILE_ARGUMENTS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # torch's headers
    "-Wno-uninitialized",  # these two: GCC 12's own AVX-512 headers (its bug 105593)
    "-Wno-maybe-uninitialized",
]


def why_not() -> str | None:
    """Why the extension cannot be built here, or None."""
    try:
        import torch
    except (ImportError, OSError):
        return "torch is not in the build environment (pip install --no-build-isolation . has it)"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}"
    return None


def extension() -> dict:
    """The arguments of `setup` for the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildIfPossible(BuildExtension):
        """A failed build leaves the package without its extension, and says so."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                self.extensions = []
                print(f"dfa_kernels: left out the compiled kernels: {error}", file=sys.stderr)

    sources = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    module = CppExtension(
        "dfa_kernels._C",
        [str(source.relative_to(ROOT)) for source in sources],
        depends=[str(header.relative_to(ROOT)) for header in sorted(ROOT.glob("csrc/**/*.h"))],
        py_limited_api=True,
        define_macros=[
            ("Py_LIMITED_API", "0x030A0000"),  # Python 3.10
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # torch 2.10
        ],
        extra_compile_args=COMPILE_ARGUMENTS,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildIfPossible},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reason = why_not()
if reason is not None:
    print(f"dfa_kernels: left out the compiled kernels: {reason}", file=sys.stderr)
setup(**({} if reason else extension()))
