"""The stream against Triton's own Philox, `tl.philox` and `tl.randint4x`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfa_kernels import stream

pytestmark = pytest.mark.triton
# TRITON_INTERPRET must be set before Triton is imported, so the kernel runs in its own process.
PROGRAM = """
import torch, triton, triton.language as tl

@triton.jit
def words(out, seed, block, size: tl.constexpr):
    row = tl.arange(0, size)
    zero = tl.zeros([size], tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + block, zero, row.to(tl.uint32), zero)
    tl.store(out + row, w0.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out + size + row, w1.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out + 2 * size + row, w2.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out + 3 * size + row, w3.to(tl.int64) & 0xFFFFFFFF)

@triton.jit
def words4x(out, seed, size: tl.constexpr):
    block = tl.arange(0, size)
    w0, w1, w2, w3 = tl.randint4x(seed, block)
    tl.store(out + block, w0.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out + size + block, w1.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out + 2 * size + block, w2.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out + 3 * size + block, w3.to(tl.int64) & 0xFFFFFFFF)

saved = {}
for seed in (0, 1, 0x0123456789abcdef, 2**63 - 1):
    saved["philox", seed] = torch.full((4, 16), -1, device=DEVICE)
    words[(1,)](saved["philox", seed], seed, 5, 16)
    saved["randint4x", seed] = torch.full((4, 16), -1, device=DEVICE)
    words4x[(1,)](saved["randint4x", seed], seed, 16)
torch.save({key: words.cpu() for key, words in saved.items()}, PATH)
"""


def philox_words(seed, block, row):
    zero = torch.zeros_like(block + row)
    return torch.stack(
        stream.philox((block + zero, zero, row + zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    )


@pytest.mark.parametrize("device", ["interpreter", "cuda"])
def test_words_are_those_of_triton(device, tmp_path: Path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    interpret = device == "interpreter"
    program = tmp_path / "program.py"  # Triton reads a kernel's source from its file
    saved = tmp_path / "words.pt"
    device = "cpu" if interpret else device
    program.write_text(PROGRAM.replace("PATH", repr(str(saved))).replace("DEVICE", repr(device)))
    subprocess.run(
        [sys.executable, program],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret))},
        timeout=300,
    )
    count = torch.arange(16)
    for (function, seed), words in torch.load(saved).items():
        if function == "philox":  # block 5 of rows 0..15
            expected = philox_words(seed, torch.tensor(5), count)
        else:  # blocks 0..15 of row 0
            expected = philox_words(seed, count, torch.tensor(0))
        assert torch.equal(words, expected), (function, seed)
