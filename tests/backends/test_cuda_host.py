"""The CUDA kernels and their host code, run on the CPU by the emulator in `cuda_host`.

The kernels' own source is compiled by the host compiler with the address and undefined-behaviour
sanitizers; only the primitives of csrc/cuda/device.h are emulated.
"""

import hashlib
import math
import os
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dfa_kernels.cases import Case
from dfa_kernels.layers import Layers
from tests import ROOT, reference
from tests.backends.emulation import (
    ORDERS,
    SHARED,
    TYPES,
    UNIT,
    Projection,
    as_tensors,
    reference_project,
    run,
    run_all,
    words,
)
from tests.conftest import EPSILON, needs
from tests.reference import DENSE
from tests.samples import random_error

COMPILER = shutil.which("g++")
needs("g++", COMPILER is not None)

HOST = Path(__file__).parent / "cuda_host"
SOURCES = [HOST / "main.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory, pytestconfig):
    """The compiled emulator; pytest's cache keeps it until a source changes."""
    folder = tmp_path_factory.mktemp("emulator")
    flags = ["-std=c++17", "-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HOST}"]

    version = subprocess.run([COMPILER, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(repr((version, flags)).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), *HOST.iterdir()]):
        digest.update(path.read_bytes())
    cache = getattr(pytestconfig, "cache", None)  # none with -p no:cacheprovider
    kept = (cache.mkdir("emulator") if cache else folder) / digest.hexdigest()
    if kept.exists():
        return kept

    def build(source):
        target = folder / f"{source.name}.o"
        subprocess.run([COMPILER, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, SOURCES))
    program = folder / "emulator"
    subprocess.run([COMPILER, *flags, *objects, "-o", program], check=True)
    unfinished = kept.with_suffix(f".{os.getpid()}")
    shutil.copy2(program, unfinished)
    unfinished.replace(kept)
    return kept


FAR = [2**62, 3, 20, 2**32 - 4, 2**63 - 1, 2**32 - 4, 60]  # row offsets, in no order
FAR_SIZES = [5, 40, 5, 9, 1, 9, 3]


# The tiles


class Tile(NamedTuple):
    """A tile of csrc/cuda/kernels.h."""

    index: int
    rows: int
    errors: int
    stage_columns: int
    name: str


OPERANDS = {
    "bfloat16": (torch.bfloat16, 1),
    "float16": (torch.float16, 1),
    **{f"float32 as {terms} terms": (torch.float32, terms) for terms in (1, 2, 3)},
}


def tiles(emulator, dtype, terms, shared=SHARED["sm_90"]):
    """The tiles that an error of this dtype may take."""
    listing = run(emulator, words(4, shared, TYPES.index(dtype), terms), ORDERS["at-once"])
    lines = (line.split("\t") for line in listing.decode().splitlines())
    return [Tile(*map(int, line[:4]), line[4]) for line in lines]


@pytest.mark.parametrize(
    ("operand", "distribution"),
    [  # every tile of every operand; the slow tests add every distribution
        pytest.param(operand, distribution, marks=[pytest.mark.slow] * (i % 3 != j))
        for i, operand in enumerate(OPERANDS)
        for j, distribution in enumerate(DENSE)
    ],
)
def test_every_tile(emulator, distribution, operand):
    """Several tiles per block, three steps of columns, layers that overlap and cross row 2**32."""
    dtype, terms = OPERANDS[operand]
    for tile in tiles(emulator, dtype, terms):
        rows, far = tile.rows, 2**32 - 5
        built = Case.of(
            dtype,
            distribution,
            columns=2 * tile.stage_columns + 5,
            # Two tiles of the batch, or part of one for the largest tiles.
            unit_rows=max(5, tile.errors - 22 if tile.errors <= 32 else tile.errors - 32),
            layers=Layers(
                row_offsets=(far - rows // 2, far, 2**40 + 1),
                sizes=(rows + 7, rows // 2, 1),
                scales=(1.0, -0.5, 2.0),
            ),
        )
        case = Projection(
            built.error,
            built.layers.sizes,
            scales=[scale / UNIT[distribution] for scale in built.layers.scales],
            row_offsets=built.layers.row_offsets,
            seed=built.stream.seed % 2**64,
            distribution=distribution,
            column_offset=built.stream.column_offset,
            dtype=torch.float32,
            terms=terms,
            tile=tile.index,
            processors=1,
            shared=SHARED["sm_90"],
        )
        turn = tile.index + list(OPERANDS).index(operand) + DENSE.index(distribution)
        order = list(ORDERS)[turn % len(ORDERS)]
        (((_, taken, blocks), signals),) = run_all(emulator, [case], ORDERS[order])
        print(f"{tile.name}: {order}")
        assert taken == tile.index
        assert 3 * -(-len(case.error) // tile.errors) >= 2 * blocks
        check_exact_rows(case, built.rows, signals)


def check_exact_rows(case, rows, signals):
    """Entries, integer sums that are exact in any order, and 24-bit numbers times an entry."""
    exact = reference_project(case, case.error)
    in_any_order = ["unit"] if case.where["distribution"] == "normal" else ["unit", "integer"]
    left_out = 2.0 ** -(8 * case.terms) if case.error.dtype == torch.float32 else 0.0
    for signal, expected in zip(signals, exact, strict=True):
        for kind in in_any_order:
            assert torch.equal(signal[rows[kind]], expected[rows[kind]].float())
        needle = signal[rows["needle"]].double(), expected[rows["needle"]]
        torch.testing.assert_close(*needle, rtol=left_out + 4 * EPSILON[torch.float32], atol=0)


def test_there_is_every_tile(emulator):
    """Every kind of error has tiles; GPUs with less shared memory have fewer."""
    names = [tile.name for tile in tiles(emulator, torch.bfloat16, 1)]
    assert names == [tile.name for tile in tiles(emulator, torch.float16, 1)]
    assert len(set(names)) == len(names) >= 5
    assert "128 x 128" in names
    for terms in (1, 2, 3):
        on = {gpu: tiles(emulator, torch.float32, terms, SHARED[gpu]) for gpu in SHARED}
        assert {*on["sm_86"]} <= {*on["sm_80"]} <= {*on["sm_90"]}
        grouped = {gpu: [t for t in on[gpu] if "warpgroups" in t.name] for gpu in on}
        assert grouped["sm_80"] == grouped["sm_86"] == []
        assert grouped["sm_90"]
        assert any(tile.errors == 64 for tile in on["sm_86"])
    assert len(on["sm_86"]) < len(on["sm_90"])


def test_what_verify_projects_is_three_steps_of_every_tile(emulator):
    """So that its two stages come round again before the columns end."""
    for dtype, terms in OPERANDS.values():
        columns = Case.of(dtype, "normal").error.shape[1]
        for tile in tiles(emulator, dtype, terms):
            assert columns > 2 * tile.stage_columns, tile.name


def test_a_tile_that_is_not_there_is_refused(emulator):
    there = [tile.index for tile in tiles(emulator, torch.float32, 3)]
    assert 0 not in there
    for tile in (0, 99):
        case = Projection(random_error(3, 4), [5], tile=tile, shared=SHARED["sm_90"])
        done = subprocess.run([emulator], input=case.request(), capture_output=True)
        assert f"project: tile must be one of {there}, got {tile}" in done.stderr.decode()


def test_a_tile_that_does_not_fit_is_not_taken(emulator):
    """The tile's stages alone fill the shared memory."""
    (large,) = [tile for tile in tiles(emulator, torch.float32, 2) if tile.name == "128 x 128"]
    too_little = 2 * 2 * large.errors * 2 * large.stage_columns
    assert large in tiles(emulator, torch.float32, 2)
    assert large not in tiles(emulator, torch.float32, 2, too_little)
    case = Projection(random_error(128, 40), [3000], terms=2, shared=too_little)
    (((_, tile, _), _),) = run_all(emulator, [case])
    assert tile != large.index


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_in_any_order_of_threads_and_copies(emulator, order):
    """Errors of one or two steps, which stay in shared memory for as long as their tile lasts."""
    cases = [
        Projection(
            random_error(tile.errors + 3, columns),
            [3 * tile.rows, 30],
            row_offsets=[0, 2**32 - 20],
            distribution=kind,
            tile=tile.index,
            processors=1,
        )
        for tile in tiles(emulator, torch.float32, 3, SHARED["sm_86"])
        if tile.errors <= 32
        for kind, columns in (("normal", 10), ("rademacher", tile.stage_columns + 3))
    ]
    grouped = [t for t in tiles(emulator, torch.bfloat16, 1) if "warpgroups" in t.name]
    small = min(grouped, key=lambda tile: tile.errors)
    error = random_error(small.errors + 3, small.stage_columns + 3).bfloat16()
    cases.append(
        Projection(error, [2 * small.rows], tile=small.index, processors=1, shared=SHARED["sm_90"])
    )
    run_all(emulator, cases, order)


@pytest.mark.parametrize("distribution", DENSE)
def test_which_tile(emulator, distribution):
    """The largest tiles for many rows of U; for few, tiles that divide the columns."""

    def tile_for(rows, errors, columns=1000, dtype=torch.bfloat16, terms=1, gpu="sm_90"):
        where = DENSE.index(distribution), rows, errors, columns, TYPES.index(dtype), terms
        log = run(emulator, words(3, 132, SHARED[gpu], *where), ORDERS["at-once"])
        (tile,) = (
            tile
            for tile in tiles(emulator, dtype, terms, SHARED[gpu])
            if tile.index == struct.unpack("<2q", log)[0]
        )
        return tile

    for dtype in (torch.bfloat16, torch.float16):
        for errors in (8, 32):
            assert "columns in" in tile_for(4096, errors, dtype=dtype).name
        assert tile_for(200_000, 128, dtype=dtype).name == "256 x 128, warpgroups"
        assert tile_for(200_000, 128, dtype=dtype, gpu="sm_80").name == "128 x 128"
        large = tile_for(200_000, 1024, dtype=dtype)
        assert "warpgroups" in large.name
        assert large.errors == (128 if distribution == "rademacher" else 256)
        assert tile_for(200_000, 1024, dtype=dtype, gpu="sm_80").name == "128 x 128"
        for errors, most in ((32, 32), (16, 16), (1, 8)):
            assert tile_for(200_000, errors, dtype=dtype).name == f"128 x {most}"
    for terms in (2, 3):
        assert "columns in" in tile_for(1024, 32, dtype=torch.float32, terms=terms).name
        assert "columns in" not in tile_for(200_000, 32, dtype=torch.float32, terms=terms).name
        for errors in (128, 1024):
            name = tile_for(200_000, errors, dtype=torch.float32, terms=terms).name
            assert "warpgroups" in name
    assert tile_for(200_000, 128, dtype=torch.float32, terms=3, gpu="sm_80").errors == 64


def test_the_maps_of_the_fragments(emulator):
    assert struct.unpack("<q", run(emulator, words(2), ORDERS["at-once"])) == (1,)


# The entries


@pytest.mark.parametrize("dtype", TYPES[:3], ids=str)
@pytest.mark.parametrize("distribution", DENSE)
def test_projected_identity_is_the_matrix(emulator, distribution, dtype):
    """Bit for bit: every sum has one nonzero term. All levels of "normal" occur."""
    places = [(16, 4096, 0, 0), (9, 40, 7, 2**32 - 3), (40, 50, 2**34 - 40, 2**63 - 50)]
    places += [(1, 129, 127, 17), (129, 33, 100, 5)]
    cases = [
        Projection(
            torch.eye(columns, dtype=dtype),
            [size],
            scales=[1 / UNIT[distribution]],
            distribution=distribution,
            column_offset=column,
            row_offsets=[row],
            seed=2**64 - 1 - row,
        )
        for columns, size, column, row in places
    ]
    for case, (_, (signal,)) in zip(cases, run_all(emulator, cases, check=False), strict=True):
        where = {**case.where, "row_offset": case.where["row_offsets"][0]}
        del where["row_offsets"]
        u = reference.lattice(signal.shape[1], signal.shape[0], **where)
        if distribution == "normal" and signal.shape[0] == 16:
            k = reference.indices(signal.shape[1], signal.shape[0], **where)
            assert len(set(k.flatten().tolist())) == 4096
        assert torch.equal(signal.double(), torch.from_numpy(u).T)


def test_feedback_matrices(emulator):
    """Any shape, place, type and alignment; the slabs' lattice too."""
    sizes = (1, 7, 8, 9, 65, 140)
    kinds = [(d, t, False) for d in DENSE for t in TYPES]
    kinds += [("uniform", t, True) for t in TYPES]
    requests, expected = [], []
    for i, (rows, columns) in enumerate((r, c) for r in sizes for c in sizes):
        for distribution, dtype, lattice in kinds[i % 4 :: 4]:
            place = {
                "seed": 0x9E3779B97F4A7C15,
                "distribution": distribution,
                "row_offset": (0, 5, 2**32 - 3, 2**33 - 100, 2**63 - 140)[i % 5],
                "column_offset": (0, 1, 8, 16, 100, 127, 2**34 - 140)[i % 7],
            }
            numbers = DENSE.index(distribution), TYPES.index(dtype)
            requests.append(
                words(1, place["seed"], numbers[0], place["column_offset"], place["row_offset"])
                + words(rows, columns, numbers[1], lattice, (0, 8, 16)[i % 3])
            )
            if lattice:
                u = torch.from_numpy(reference.lattice(rows, columns, **place)).to(dtype)
            else:
                u = reference.matrix(rows, columns, dtype=dtype, **place)
            expected.append(u)
    data = run(emulator, b"".join(requests), ORDERS["at-once"])
    for want in expected:
        part, data = data[: want.nbytes], data[want.nbytes :]
        (made,) = as_tensors(part, want.dtype, [want.shape])
        assert torch.equal(made, want)
    assert not data


# Layers


def test_row_offsets_anywhere(emulator):
    case = Projection(random_error(4, 19), FAR_SIZES, row_offsets=FAR, seed=2**64 - 1)
    run_all(emulator, [case])


@pytest.mark.parametrize("layers", [1, 33, 87, 88, 1100])
def test_any_number_of_layers_is_one_launch(emulator, layers):
    """A table too long for the kernel arguments is uploaded in separate launches."""
    generator = torch.Generator().manual_seed(layers)
    sizes = torch.randint(1, 20 + 300 // layers, (layers,), generator=generator).tolist()
    shared = [0] * layers
    own = [sum(sizes[:i]) for i in range(layers)]
    apart = (torch.randint(0, 15 * layers, (layers,), generator=generator) + 2**40).tolist()
    error = random_error(2, 8, dtype=torch.bfloat16)
    cases = [Projection(error, sizes, row_offsets=rows) for rows in (shared, own, apart)]
    for (log, _), case in zip(run_all(emulator, cases), cases, strict=True):
        covered = set()
        for row, size in zip(case.where["row_offsets"], sizes, strict=True):
            covered.update(range(row, row + size))
        intervals = sum(row - 1 not in covered for row in covered)
        table = 5 * layers + 3 * intervals
        assert log[0] == 1 + (-(-table // 500) if table > 440 else 0)


# The error


def test_an_aligned_16_bit_error_is_read_where_it_lies(emulator):
    wide = random_error(20, 96, dtype=torch.bfloat16)
    shard = Projection(wide[:, :72], [30], distribution="rademacher", column_offset=256)
    row = Projection(random_error(20, 97, dtype=torch.bfloat16)[:1, :72], [30])  # of any stride
    as_it_is = [Projection(wide, [30]), shard, row, Projection(wide[:1, 8:16].clone(), [30])]
    copied = [
        Projection(wide, [30], misaligned=2),
        Projection(wide, [30], column_offset=4),
        Projection(wide[:, :72], [30], distribution="rademacher", column_offset=8),
        Projection(wide[:, :71], [30]),
        Projection(random_error(20, 97, dtype=torch.bfloat16)[:, :72], [30]),  # rows begin anywhere
        Projection(wide.T, [30]),
        Projection(wide[:, ::2], [30]),
        Projection(wide[0].expand(5, 96), [30]),
    ]
    found = run_all(emulator, as_it_is + copied)
    assert [log[0] for log, _ in found] == [1] * 4 + [2] * 7 + [1]


def test_strided_errors_of_32_bits(emulator):
    wide = random_error(20, 33)
    views = [wide.T, wide[::2, ::3], wide[:1].expand(9, 33), wide[:, :1]]
    run_all(emulator, [Projection(view, [30]) for view in views])


def test_no_columns_give_zeros(emulator):
    for dtype in TYPES[:3]:
        ((_, (signal,)),) = run_all(emulator, [Projection(torch.empty(3, 0, dtype=dtype), [40])])
        assert torch.equal(signal, torch.zeros(3, 40, dtype=dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38, 1e-45])
def test_extreme_errors(emulator, value):
    """Non-finite, huge and subnormal errors give what fp32 products would."""
    error = torch.zeros(3, 10)
    error[1, 4] = value
    case = Projection(error, [40], scales=[0.5])
    ((_, (signal,)),) = run_all(emulator, [case], check=False)
    column = torch.from_numpy(reference.lattice(40, 1, seed=3, column_offset=4)).flatten()
    assert torch.equal(signal[[0, 2]], torch.zeros(2, 40))
    if math.isnan(value):
        assert signal[1].isnan().all()
    else:
        expected = error[1, 4].double() * column
        finite = expected.abs() < 3.3e38
        assert (signal[1][~finite].isinf() | ~expected[~finite].isinf()).all()
        wanted = (expected * 0.5)[finite]
        torch.testing.assert_close(signal[1][finite].double(), wanted, rtol=2e-7, atol=3e-45)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_the_terms_of_an_fp32_error(emulator, terms):
    """Three are as good as an fp32 matrix product, although tensor cores truncate their sums."""
    case = Projection(random_error(8, 1000), [40], terms=terms, dtype=torch.float64)
    ((_, (signal,)),) = run_all(emulator, [case])
    (exact,) = reference_project(case, case.error)
    (magnitude,) = reference_project(case, case.error.abs(), absolute=True)
    worst = ((signal - exact).abs() / magnitude).max().item()
    print(f"{terms} terms: {worst / EPSILON[torch.float32]:.3g} fp32 roundoffs of sum |e||U|")
    fp32 = case.error @ (exact.new_tensor(reference.lattice(40, 1000, seed=3)).float().T)
    fp32_worst = ((fp32 * case.scales[0] - exact).abs() / magnitude).max().item()
    print(f"fp32 matrix product: {fp32_worst / EPSILON[torch.float32]:.3g}")
    if terms == 3:
        assert worst < 2 * fp32_worst
    else:
        assert 2.0 ** (-8 * terms - 8) < worst < 2.0 ** (-8 * terms)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("error_type", TYPES[:3], ids=str)
def test_output_types(emulator, error_type, dtype):
    error = random_error(5, 20, dtype=error_type)
    cases = [Projection(error, [7, 40], row_offsets=[0, 9], dtype=dtype)]
    run_all(emulator, cases)


def test_the_emulator_sees_mistakes(tmp_path):
    """Unawaited or unaligned copies, diverging lanes, waits without end, and too much memory."""
    source = """
        #include "../csrc/cuda/device.h"
        using namespace dfa;
        struct Nothing {};
        alignas(16) char from[16];
        void no_wait(Nothing) { device::copy_async(device::shared(), from, true); }
        void parted(Nothing) {
          device::thread() < 3 ? device::sync_warp() : void(device::ballot(true));
        }
        void left(Nothing) { if (device::thread() != 5) device::sync_block(); }
        void unaligned(Nothing) { device::copy_async(device::shared() + 8, from, true); }
        void outside(Nothing) { device::shared()[64] = 1; }
        void nothing(Nothing) {}
        int main(int, char** a) {
          void (*kernels[])(Nothing) = {no_wait, parted, left, unaligned, outside, nothing};
          const int which = a[1][0] - '0';
          launch(kernels[which], Nothing{}, 1, 32, which == 5 ? 100 << 10 : 64, nullptr);
        }
    """
    program = tmp_path / "mistakes"
    flags = ["-std=c++17", "-fsanitize=address,undefined", f"-I{HOST}", f"-I{HOST}"]
    (tmp_path / "m.cpp").write_text(source.replace("../csrc", str(ROOT / "csrc")))
    subprocess.run([COMPILER, *flags, tmp_path / "m.cpp", "-o", program], check=True)
    messages = ["copies under way", "different operations", "for ever", "unaligned", "overflow"]
    messages += ["too much shared memory"]
    for i, message in enumerate(messages):
        done = subprocess.run(
            [program, str(i)], capture_output=True, env={**os.environ, **ORDERS["late"]}
        )
        assert done.returncode != 0
        assert message in done.stderr.decode()
