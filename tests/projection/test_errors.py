"""Bad input: every message names the function, the argument and what it got."""

import math

import pytest
import torch

from dfa_kernels import feedback_matrix, project

ERROR = torch.randn(2, 10)

PROJECT = [
    ({"error": [1.0, 2.0]}, TypeError, r"error must be a tensor, got list"),
    (
        {"error": torch.ones(2, 3, dtype=torch.int64)},
        TypeError,
        r"error must be float16.* got torch.int64",
    ),
    (
        {"error": torch.ones(2, dtype=torch.complex64)},
        TypeError,
        r"error must be .* got torch.complex64",
    ),
    (
        {"error": torch.tensor(1.0)},
        ValueError,
        r"error must have at least one dimension, got a scalar",
    ),
    ({"error": torch.ones(2, 0)}, ValueError, r"error must have a last dimension .* got \(2, 0\)"),
    (
        {"error": torch.eye(3).to_sparse()},
        TypeError,
        r"error must be a strided tensor, got torch.sparse_coo",
    ),
    ({"sizes": 2**63}, TypeError, r"sizes must be a sequence of ints, got int"),
    ({"sizes": [2**63]}, ValueError, r"sizes\[0\] must be in .* got 9223372036854775808"),
    (
        {"error": torch.nested.nested_tensor([torch.ones(10)], layout=torch.jagged)},
        TypeError,
        r"error must be a strided tensor, got a nested one",
    ),
    ({"sizes": {4, 1}}, TypeError, r"sizes must be a sequence of ints, got set {"),
    ({"sizes": {4: 1}}, TypeError, r"sizes must be a sequence of ints, got dict"),
    ({"distribution": ["normal"]}, ValueError, r"distribution must be one of .* got \['normal'\]"),
    ({"normalization": 10**400}, ValueError, r"normalization must be finite, got 1000"),
    (
        {"normalization": torch.tensor(2.0)},
        TypeError,
        r"normalization must be made of numbers, got Tensor",
    ),
    ({"normalization": {1.0: 2}}, TypeError, r"normalization must be made of numbers, got dict"),
    ({"sizes": []}, ValueError, r"sizes must hold at least one layer size, got none"),
    ({"sizes": 5}, TypeError, r"sizes must be a sequence of ints, got int 5"),
    ({"sizes": "55"}, TypeError, r"sizes must be a sequence of ints, got str '55'"),
    ({"sizes": [4, 0]}, ValueError, r"sizes\[1\] must be in \[1, .* got 0"),
    ({"sizes": [-3]}, ValueError, r"sizes\[0\] must be in \[1, .* got -3"),
    ({"sizes": [2.0]}, TypeError, r"sizes\[0\] must be an int, got float 2.0"),
    ({"sizes": [True]}, TypeError, r"sizes\[0\] must be an int, got bool True"),
    ({"sizes": [2**63 + 1]}, ValueError, r"sizes\[0\] must be in .* got 9223372036854775809"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 18446744073709551615\], got -1"),
    ({"seed": 2**64}, ValueError, r"seed must be in \[0, .* got 18446744073709551616"),
    ({"seed": 1.5}, TypeError, r"seed must be an int, got float 1.5"),
    ({"seed": None}, TypeError, r"seed must be an int, got NoneType None"),
    (
        {"distribution": "cauchy"},
        ValueError,
        r"distribution must be one of 'normal', .* got 'cauchy'",
    ),
    ({"normalization": "none"}, ValueError, r"normalization must be 'layer', .* got 'none'"),
    ({"normalization": math.nan}, ValueError, r"normalization must be finite, got nan"),
    ({"normalization": [math.inf]}, ValueError, r"normalization must be finite, got inf"),
    (
        {"normalization": 1e39},
        ValueError,
        r"normalization must be 0 or between .* for an error of torch.float32 .* got 1e\+39",
    ),
    ({"normalization": [-1e-45]}, ValueError, r"normalization must be 0 or .* got -1e-45"),
    (
        {"error": ERROR.half(), "normalization": 1e39},
        ValueError,
        r"normalization must be 0 or .* for an error of torch.float16 .* got 1e\+39",
    ),
    ({"normalization": True}, TypeError, r"normalization must be made of numbers, got bool True"),
    (
        {"normalization": None},
        TypeError,
        r"normalization must be made of numbers, got NoneType None",
    ),
    (
        {"normalization": [1.0, 2.0]},
        ValueError,
        r"normalization must have one scale per size \(1\), got 2",
    ),
    ({"row_offsets": [0, 0]}, ValueError, r"row_offsets must have one entry per size \(1\), got 2"),
    ({"row_offsets": [-1]}, ValueError, r"row_offsets\[0\] must be in \[0, .* got -1"),
    (
        {"row_offsets": [2**63 - 3]},
        ValueError,
        r"row_offsets must leave the rows below 2\*\*63, got 9223372036854775805 with 4 rows",
    ),
    ({"row_offsets": 0}, TypeError, r"row_offsets must be a sequence of ints, got int 0"),
    ({"column_offset": -1}, ValueError, r"column_offset must be in \[0, .* got -1"),
    (
        {"column_offset": 2**34 - 9},
        ValueError,
        r"column_offset must leave the columns below 2\*\*34, got 17179869175 with 10 columns",
    ),
    (
        {"error_size": 9},
        ValueError,
        r"error_size must be at least column_offset \+ error.shape\[-1\] = 10, got 9",
    ),
    (
        {"error_size": 12, "column_offset": 3},
        ValueError,
        r"error_size must be at least .* = 13, got 12",
    ),
    ({"error_size": "12"}, TypeError, r"error_size must be an int, got str '12'"),
    ({"dtype": torch.int32}, TypeError, r"dtype must be float16, .* got torch.int32"),
    ({"dtype": "float32"}, TypeError, r"dtype must be float16, .* got 'float32'"),
    ({"backend": "abacus"}, ValueError, r"backend must be one of 'torch'.* got 'abacus'"),
    ({"backend": ["cpp"]}, ValueError, r"backend must be one of .* got \['cpp'\]"),
]

MATRIX = [
    ({"rows": -1}, ValueError, r"rows must be in \[0, .* got -1"),
    ({"rows": 2**63}, ValueError, r"rows must be in \[0, .* got 9223372036854775808"),
    ({"rows": 3.0}, TypeError, r"rows must be an int, got float 3.0"),
    ({"columns": 2**34 + 1}, ValueError, r"columns must be in \[0, 17179869184\], got 17179869185"),
    ({"seed": 2**64}, ValueError, r"seed must be in \[0, .* got 18446744073709551616"),
    ({"distribution": None}, ValueError, r"distribution must be one of .* got None"),
    (
        {"row_offset": 2**63 - 1},
        ValueError,
        r"row_offset must leave the rows below 2\*\*63, got 9223372036854775807 with 2 rows",
    ),
    ({"row_offset": 2**63}, ValueError, r"row_offset must be in \[0, .* got 9223372036854775808"),
    (
        {"column_offset": 2**34},
        ValueError,
        r"column_offset must leave the columns below 2\*\*34, got 17179869184 with 3 columns",
    ),
    ({"dtype": torch.uint8}, TypeError, r"dtype must be float16, .* got torch.uint8"),
    ({"backend": "abacus"}, ValueError, r"backend must be one of .* got 'abacus'"),
    ({"backend": ["cpp"]}, ValueError, r"backend must be one of .* got \['cpp'\]"),
]


@pytest.mark.parametrize("distribution", ["normal", "hadamard"])
@pytest.mark.parametrize(("bad", "kind", "message"), PROJECT)
def test_project(bad, kind, message, distribution):
    with pytest.raises(kind, match=f"^project: {message}"):
        project(**{"error": ERROR, "sizes": [4], "distribution": distribution, **bad})


@pytest.mark.parametrize("distribution", ["normal", "hadamard"])
@pytest.mark.parametrize(("bad", "kind", "message"), MATRIX)
def test_feedback_matrix(bad, kind, message, distribution):
    with pytest.raises(kind, match=f"^feedback_matrix: {message}"):
        feedback_matrix(**{"rows": 2, "columns": 3, "distribution": distribution, **bad})


LIMITS = torch.finfo(torch.float32)
# The largest and the smallest scale, which "uniform" multiplies by sqrt(3), "hadamard" by 2^-10.
HELD = {
    "normal": (LIMITS.max, LIMITS.smallest_normal),
    "uniform": (LIMITS.max / math.sqrt(3), LIMITS.smallest_normal),
    "hadamard": (LIMITS.max, LIMITS.smallest_normal * 1024),
}


@pytest.mark.parametrize("distribution", HELD)
def test_scales_that_the_arithmetic_holds(backend, distribution):
    """They give finite signals and none that vanishes; others are refused, also by operators."""
    operator = getattr(torch.ops.dfa_kernels.project, backend)
    where, options = (0, 0, distribution, torch.float64), {"distribution": distribution}
    options |= {"dtype": torch.float64, "backend": backend}
    largest, smallest = HELD[distribution]
    error = torch.ones(1, 1, dtype=torch.float32)
    for scale in (largest, -largest, smallest, -smallest, 0.0):
        (signal,) = project(error / 4, [9], normalization=scale, **options)
        assert signal.isfinite().all()
        assert signal.all() == (scale != 0)
    for scale in (largest * 1.001, -largest * 1.001, smallest / 1.001, 1e39, 1e-45, -1e-300):
        (wide,) = project(error.double(), [9], normalization=scale, **options)
        assert wide.isfinite().all()
        assert wide.all()
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            with pytest.raises(ValueError, match=r"^project: normalization must be 0 or between"):
                project(error.to(dtype), [9], normalization=scale, **options)
            with pytest.raises((ValueError, RuntimeError), match=r"project: scales.* must be 0 or"):
                operator(error.to(dtype), [0], [9], [scale], *where)


def test_a_graph_refuses_them_when_it_runs(backend):
    torch.compiler.reset()
    signals = torch.compile(
        lambda error: project(error, [9], normalization=1e39, backend=backend), backend="eager"
    )
    assert signals(torch.ones(2, 3, dtype=torch.float64))[0].isfinite().all()
    with pytest.raises((ValueError, RuntimeError), match=r"project: scales.* must be 0 or between"):
        signals(torch.ones(2, 3))
    torch.compiler.reset()


def test_a_numpy_array_is_told_the_way_out():
    np = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=r"^project: error must be a tensor.* torch.from_numpy"):
        project(np.ones((2, 3)), [4])


def test_integers_of_other_libraries_are_welcome():
    np = pytest.importorskip("numpy")
    (signal,) = project(ERROR, np.array([4]), seed=np.uint64(2**63), normalization=np.float32(0.5))
    (expected,) = project(ERROR, (4,), seed=2**63, normalization=0.5)
    assert torch.equal(signal, expected)
    project(ERROR, torch.Size([4]))
