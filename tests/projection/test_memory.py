"""Memory: the workspace is bounded, and outputs may be larger than 2^31 elements."""

import pytest
import torch

from dfa_kernels import project
from dfa_kernels.backends import slabs
from tests import reference
from tests.conftest import definition_is_slow


@definition_is_slow
def test_extra_memory_is_bounded_and_does_not_grow_with_the_layer(extra_bytes, backend):
    small, large = extra_bytes(backend, 200_000, 10), extra_bytes(backend, 3_211_264, 10)
    assert small <= slabs.WORKSPACE_BYTES
    assert large <= slabs.WORKSPACE_BYTES
    assert large - small <= 16 * 2**20  # the stored matrix would have added 120 MB


@definition_is_slow
@pytest.mark.parametrize(("layer", "n"), [(20_000, 1000), (300, 200_000)])
def test_extra_memory_is_bounded_for_long_errors(extra_bytes, backend, layer, n):
    assert extra_bytes(backend, layer, n) <= slabs.WORKSPACE_BYTES  # 80 and 240 MB of entries


@definition_is_slow
def test_extra_memory_is_bounded_for_short_errors_and_long_blocks(extra_bytes, backend):
    """One column of rademacher entries takes a block of 128 to make."""
    assert extra_bytes(backend, 200_000, 1, "rademacher") <= slabs.WORKSPACE_BYTES


@definition_is_slow
@pytest.mark.parametrize(("layer", "n"), [(3_211_264, 10), (20_000, 1000), (300, 200_000)])
def test_extra_memory_of_structured_feedback_is_bounded(extra_bytes, backend, layer, n):
    assert extra_bytes(backend, layer, n, "hadamard") <= slabs.WORKSPACE_BYTES


@definition_is_slow
def test_more_than_two_to_the_31_elements(backend):
    count, size = 4097, 2**19
    error = torch.linspace(-2, 2, count, dtype=torch.bfloat16)[:, None]
    (signal,) = project(error, [size], normalization=1.0, backend=backend)
    assert signal.numel() > 2**31
    u = reference.matrix(size, 1).flatten()
    for row in (0, 1, 2048, count - 1):
        expected = (error[row].double() * u).to(torch.bfloat16)
        torch.testing.assert_close(signal[row], expected, rtol=2**-7, atol=0)
    last = (error[:, 0].double() * u[-1]).to(torch.bfloat16)
    torch.testing.assert_close(signal[:, -1], last, rtol=2**-7, atol=0)
