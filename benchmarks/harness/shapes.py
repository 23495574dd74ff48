"""What is measured: shapes, the contenders of each, and the ratios that were promised."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dfa_kernels.backends.registry import BACKENDS

# In the place of a rival.
RATE = "entries/s"
WRITE_ROOF = "write roof"
# Our projection with the distribution "hadamard". Our dense ones go by the names of the backends.
STRUCTURED = "structured"


@dataclass(frozen=True)
class Promise:
    """`ours` is at least `at_least` times as fast as `rival`; `aim` is what is hoped for.

    With `RATE` as the rival, `at_least` is the number of entries that `ours` generates and uses a
    second; with `WRITE_ROOF`, the fraction of the write bandwidth that its signals reach.
    """

    ours: str
    rival: str
    at_least: float
    aim: float | None = None


@dataclass(frozen=True)
class Case:
    """The signals of all layers for one error [batch, n]: one row of a table.

    All available backends take part, our structured projection beside those of normal entries, and
    the `rivals`, named as in contenders.py. All run under the `precision`, which is torch's
    float32_matmul_precision. With `graph`, all are replayed from a CUDA graph. `threads` is 0 for
    torch's default. `series` and `x` place the case in a figure.
    """

    name: str
    sizes: tuple[int, ...]
    batch: int
    n: int
    rivals: tuple[str, ...]
    device_type: str = "cpu"
    dtype: torch.dtype = torch.float32
    precision: str = "highest"
    distribution: str = "normal"
    graph: bool = False
    threads: int = 0
    matrix: bool = False  # the matrix itself, [sizes[0], n], instead of a projection
    promises: tuple[Promise, ...] = ()
    series: str | None = None
    x: int = 0

    @property
    def all_promises(self) -> tuple[Promise, ...]:
        """The case's own, and on a GPU that "cuda" is nowhere slower than "triton"."""
        no_slower = Promise("cuda", "triton", 1 / 1.05)
        return (*self.promises, *([no_slower] if self.device_type == "cuda" else []))

    @property
    def written_bytes(self) -> int:
        """Bytes of the signals, where layers of equal size share one."""
        if self.matrix:
            return self.sizes[0] * self.n * self.dtype.itemsize
        return self.batch * sum(set(self.sizes)) * self.dtype.itemsize

    @property
    def all_signals_bytes(self) -> int:
        """Bytes of the signals with one for each layer."""
        return self.batch * sum(self.sizes) * self.dtype.itemsize


# What tables and figures call the rivals. Our backends go by their own names.
TITLES = {
    "views": "mm alone",
    "views bf16": "mm alone, bf16",
    "stored": "stored matrix",
    "compiled": "stored, compiled",
    "naive": "matrix per layer",
    "scikit-learn": "scikit-learn",
    "randn blocks": "randn blocks",
    "torch.randn": "torch.randn",
    "fill": "fill",
}


def is_ours(name: str) -> bool:
    """Whether a contender is a kernel of this project."""
    return name in BACKENDS or name == STRUCTURED


def title(name: str) -> str:
    """The name of a contender in tables and figures."""
    return TITLES.get(name, name)


STORED = ("naive", "stored", "views")
ALL = (*STORED, "randn blocks", "scikit-learn")

# Sizes of the hidden layers, and the length of the error.
PAPER_MLP = ((800,) * 3, 10)
DEEP_MLP = ((4096,) * 48, 1000)
UNEQUAL_MLP = (tuple(round(2049 + i * 2047 / 47) for i in range(48)), 1000)  # 2,049 to 4,096
# Output channels of VGG-16's convolutions (Simonyan, Zisserman 2014, D); "pool" halves both sides.
VGG16_CONVOLUTIONS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool")
VGG16_CONVOLUTIONS += (512, 512, 512, "pool") * 2
VGG16_LINEAR = (4096, 4096)


def vgg16_sizes(resolution: int) -> tuple[int, ...]:
    """channels * height * width after each convolution, then the hidden linear layers."""
    sizes, side = [], resolution
    for channels in VGG16_CONVOLUTIONS:
        if isinstance(channels, str):
            side //= 2
        else:
            sizes.append(channels * side**2)
    return (*sizes, *VGG16_LINEAR)


VGG16 = (vgg16_sizes(224), 1000)  # on ImageNet
# Three signals a block: attention's output, the wide layer, the block's output.
GPT2_SMALL = ((768, 3072, 768) * 12, 50_257)
# Two signals a block: attention's output and the wide layer.
LLAMA = ((4096, 11_008) * 32, 32_000)


def layer_name(size: int, batch: int, n: int, *details: str) -> str:
    """The name of a case with one layer."""
    return ", ".join((f"M={batch:,}, n={n:,}, one layer of {size:,}", *details))


def with_batch(
    network: tuple[tuple[int, ...], int], batch: int
) -> tuple[tuple[int, ...], int, int]:
    """Sizes, batch and length of the error, in the order of `Case`."""
    sizes, n = network
    return sizes, batch, n
