"""The "cpp" backend: SIMD kernels on the CPU, compiled from `csrc`.

Importing the extension registers its kernels for the operators of `dfa_kernels.ops`.
"""

from __future__ import annotations

try:
    import dfa_kernels._C  # noqa: F401

    _missing = None
except ImportError as error:
    _missing = f"the compiled extension is not there ({error})"


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device type, or None."""
    if device_type != "cpu":
        return "it serves the CPU only"
    return _missing
