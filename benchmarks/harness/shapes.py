"""What is measured: a shape, who takes part, and what has been promised about the outcome."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Promise:
    """`ours` takes at most 1/at_least of the time of `rival`; `aim` is what is hoped for.

    With the rival "entries/s", `at_least` is how many entries `ours` makes and uses a second.
    """

    ours: str
    rival: str
    at_least: float
    aim: float | None = None


@dataclass(frozen=True)
class Case:
    """All layers' signals of one error [batch, n]: a group of the report.

    The available backends take part, and `rivals`, by their names in contenders.py. `precision`
    is torch's float32_matmul_precision, for all of them. `graph`: all are replayed from a CUDA
    graph. `threads`: 0 for torch's own choice. `series` and `x` place the case in a figure.
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
    matrix: bool = False  # the matrix itself, [sizes[0], n], and no projection
    promises: tuple[Promise, ...] = ()
    series: str | None = None
    x: int = 0

    @property
    def all_promises(self) -> tuple[Promise, ...]:
        """Its own, and that on a GPU "cuda" is slower than "triton" on no shape."""
        no_slower = Promise("cuda", "triton", 1 / 1.05)
        return (*self.promises, *([no_slower] if self.device_type == "cuda" else []))

    @property
    def written_bytes(self) -> int:
        """Of all layers' signals, where equal layers are one."""
        if self.matrix:
            return self.sizes[0] * self.n * self.dtype.itemsize
        return self.batch * sum(set(self.sizes)) * self.dtype.itemsize

    @property
    def all_signals_bytes(self) -> int:
        """Of a signal for each layer."""
        return self.batch * sum(self.sizes) * self.dtype.itemsize


# What tables and figures call the rivals, by their names in cases and results; ours go by theirs.
TITLES = {
    "views": "mm alone",
    "stored": "stored matrix",
    "compiled": "stored, compiled",
    "naive": "matrix per layer",
    "scikit-learn": "scikit-learn",
    "randn blocks": "randn blocks",
    "torch.randn": "torch.randn",
    "fill": "fill",
}


def title(name: str) -> str:
    """What tables and figures call a contender."""
    return TITLES.get(name, name)


STORED = ("naive", "stored", "views")
ALL = (*STORED, "randn blocks", "scikit-learn")

# Hidden layers, and the length of the error.
PAPER_MLP = ((800,) * 3, 10)
DEEP_MLP = ((4096,) * 48, 1000)
UNEQUAL_MLP = (tuple(round(2049 + i * 2047 / 47) for i in range(48)), 1000)  # 2,049 to 4,096
# Output channels of VGG-16's convolutions; "pool" halves both sides (Simonyan, Zisserman 2014, D).
VGG16_CONVOLUTIONS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool")
VGG16_CONVOLUTIONS += (512, 512, 512, "pool") * 2
VGG16_LINEAR = (4096, 4096)


def vgg16_sizes(resolution: int) -> tuple[int, ...]:
    """channels x height x width after each convolution, then the hidden linear layers."""
    sizes, side = [], resolution
    for channels in VGG16_CONVOLUTIONS:
        if isinstance(channels, str):
            side //= 2
        else:
            sizes.append(channels * side**2)
    return (*sizes, *VGG16_LINEAR)


VGG16 = (vgg16_sizes(224), 1000)  # on ImageNet
# Three points a block: attention's output, the wide layer, the block's output.
GPT2_SMALL = ((768, 3072, 768) * 12, 50_257)
# Two points a block: attention's output and the wide layer.
LLAMA = ((4096, 11_008) * 32, 32_000)


def layer_name(size: int, batch: int, n: int, *details: str) -> str:
    """One layer as the reports name it."""
    return ", ".join((f"M={batch:,}, n={n:,}, one layer of {size:,}", *details))


def with_batch(
    network: tuple[tuple[int, ...], int], batch: int
) -> tuple[tuple[int, ...], int, int]:
    """A network's layers and error with a batch between them, as `Case` takes them."""
    sizes, n = network
    return sizes, batch, n
