"""The "cuda" backend: hand-written CUDA kernels, compiled from `csrc/cuda`."""

from __future__ import annotations


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device type, or None."""
    return "it is not built"
