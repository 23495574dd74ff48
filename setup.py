"""Builds the package, with the compiled extensions wherever they can be built.

`dfa_kernels._C` holds the CPU kernels, `dfa_kernels._CUDA` those for NVIDIA GPUs. The latter needs
a CUDA build of torch and its toolkit (CUDA_HOME), but no GPU. What cannot be built is left out, one
line says so, and the rest is a working package. `pip install --no-build-isolation .` builds against
the installed torch. The binaries then serve every Python >= 3.10 and torch >= 2.10; `_CUDA` also
needs a torch with the same major version of CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
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

# Binaries for sm_80 (and so 8.6, 8.9) and sm_90a. Newer GPUs compile the PTX of compute_90.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
SM90A = "-gencode=arch=compute_90a,code=sm_90a"
# What is built instead of what torch would build. Only code for sm_90a has the products of
# warpgroups, and the driver could take sm_90 if it were there too. PTX of compute_90a runs
# on no newer GPU.
INSTEAD = {
    "-gencode=arch=compute_90,code=sm_90": SM90A,
    "-gencode=arch=compute_90a,code=compute_90a": "-gencode=arch=compute_90,code=compute_90",
}
OLD_NAMES = ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")  # torch's, before sm_80


def why_not() -> str | None:
    """Why no extension can be built here, or None."""
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


def find_toolkit() -> str | None:
    """Why there is no toolkit, or None. Sets CUDA_HOME, unless it is set, to where nvcc says.

    Torch takes the folder above nvcc's, which is wrong if nvcc is a link or a script.
    """
    if "CUDA_HOME" not in os.environ and shutil.which("nvcc"):
        command = ["nvcc", "--dryrun", "-c", "-x", "cu", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
        if top:
            os.environ["CUDA_HOME"] = os.path.realpath(top[1])
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or shutil.which(os.path.join(CUDA_HOME, "bin", "nvcc")) is None:
        return f"there is no CUDA toolkit (CUDA_HOME is {CUDA_HOME})"
    return None


def architectures(asked: str) -> str:
    """The architectures of a TORCH_CUDA_ARCH_LIST from sm_80 on, which multiply bf16."""
    wanted = re.split(r"[ ;]+", asked.strip(" ;"))
    old = [one for one in wanted if re.match(r"\d\.", one) and int(one[0]) < 8]
    old += [one for one in wanted if one.startswith(OLD_NAMES)]
    if old:
        left_out(f"{' '.join(old)} part of the CUDA", "they need compute capability 8.0")
    return ";".join(one for one in wanted if one not in old) or CUDA_ARCHITECTURES


def nvcc_flags(asked: str) -> list[str]:
    """The flags of nvcc that build for a TORCH_CUDA_ARCH_LIST. With them torch adds none itself."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags  # resolves names and "native"

    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(asked)
    flags = sorted({INSTEAD.get(flag, flag) for flag in _get_cuda_arch_flags()})
    return [*flags, "-DDFA_KERNELS_SM90A"] if SM90A in flags else flags


def left_out(what: str, reason: object) -> None:
    """Say which kernels are missing, and why."""
    print(f"dfa_kernels: left out the {what} kernels: {reason}", file=sys.stderr)


def extensions() -> dict:
    """The arguments of `setup` that build the extensions."""
    import torch

    no_toolkit = find_toolkit() if torch.version.cuda is not None else None
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class BuildIfPossible(BuildExtension):
        """Builds each extension by itself; one that fails is left out."""

        def run(self) -> None:
            wanted, compiler, inplace, built = self.extensions, self.compiler, self.inplace, []
            for extension in wanted:
                self.extensions, self.compiler, self.inplace = [extension], compiler, inplace
                try:
                    super().run()
                    built.append(extension)
                except Exception as error:
                    left_out("CUDA" if extension.name.endswith("_CUDA") else "compiled", error)
            self.extensions, self.inplace = built, inplace

    common = {
        "depends": [str(header.relative_to(ROOT)) for header in sorted(ROOT.glob("csrc/**/*.h"))],
        "py_limited_api": True,
    }
    macros = [
        ("Py_LIMITED_API", "0x030A0000"),  # Python 3.10
        ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # torch 2.10
    ]

    def sources(*patterns: str) -> list[str]:
        return [str(p.relative_to(ROOT)) for one in patterns for p in sorted(ROOT.glob(one))]

    modules = [
        CppExtension(
            "dfa_kernels._C",
            sources("csrc/bindings.cpp", "csrc/cpu/*.cpp"),
            define_macros=macros,
            extra_compile_args=COMPILE_ARGUMENTS,
            **common,
        )
    ]
    if no_toolkit is not None:
        left_out("CUDA", no_toolkit)
    elif torch.version.cuda is not None:
        try:
            flags = nvcc_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES)
            modules.append(
                CUDAExtension(
                    "dfa_kernels._CUDA",
                    sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
                    define_macros=[*macros, ("USE_CUDA", None)],  # for torch's stream of the shim
                    extra_compile_args={
                        "cxx": COMPILE_ARGUMENTS,
                        "nvcc": ["-std=c++17", "-O3", *flags],
                    },
                    **common,
                )
            )
        except Exception as error:  # such as an architecture that torch does not know
            left_out("CUDA", error)
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": BuildIfPossible},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        left_out("compiled", reason)
    setup(**({} if reason else extensions()))
