"""The "triton" backend: fused Triton kernels for CUDA and ROCm tensors."""

from __future__ import annotations


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device type, or None."""
    return "it is not built"
