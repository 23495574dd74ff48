"""The networks of table 1 as sizes of layers and errors, and VGG-16 as a model."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from benchmarks.harness import shapes


def vgg16(resolution: int, classes: int) -> tuple[nn.Sequential, list[str]]:
    """VGG-16 without dropout, from He initialization; the names of its 15 hidden activations."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    points: list[str] = []
    pools, channels, side = 0, 3, resolution
    for width in shapes.VGG16_CONVOLUTIONS:
        if isinstance(width, str):
            pools, side = pools + 1, side // 2
            modules[f"pool {pools}"] = nn.MaxPool2d(2)
            continue
        points.append(f"relu {len(points) + 1}")
        modules[f"convolution {len(points)}"] = nn.Conv2d(channels, width, 3, padding=1)
        modules[points[-1]] = nn.ReLU()
        channels = width
    modules["flatten"] = nn.Flatten()
    inputs = channels * side**2
    for width in shapes.VGG16_LINEAR:
        points.append(f"relu {len(points) + 1}")
        modules[f"linear {len(points)}"] = nn.Linear(inputs, width)
        modules[points[-1]] = nn.ReLU()
        inputs = width
    modules["output"] = nn.Linear(inputs, classes)
    model = nn.Sequential(modules)
    he_initialization(model)
    return model, points


def he_initialization(model: nn.Module) -> None:
    """Draw weights with variance 2 / fan-in and set biases to zero (He et al. 2015)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class Architecture:
    """What a projection needs to know about a network."""

    name: str
    sizes: tuple[int, ...]
    n: int

    def feedback_bytes(self, storage: str) -> int:
        """Bytes of feedback matrices in fp32: one for each layer, one for all, or none."""
        entries = {"naive": sum(self.sizes), "shared": max(self.sizes), "seeded": 0}
        return 4 * self.n * entries[storage]

    def signal_bytes(self, storage: str, batch: int) -> int:
        """Bytes of the signals of an error [batch, n], in fp32.

        With stored matrices each layer has its own signal, with the shared one after a product for
        the largest. From the seed, layers of equal size share a tensor.
        """
        entries = {
            "naive": sum(self.sizes),
            "shared": sum(self.sizes) + max(self.sizes),
            "seeded": sum(set(self.sizes)),
        }
        return 4 * batch * entries[storage]


STORAGES = ("naive", "shared", "seeded")
ARCHITECTURES = (
    Architecture("3 x 800, n = 10", *shapes.PAPER_MLP),
    # The paper's CNN for 32 x 32 images: three convolutions with pooling and a linear layer.
    Architecture("3 convolutions, 32 x 32, n = 10", (7200, 3136, 576, 128), 10),
    Architecture("48 x 4,096, n = 1,000", *shapes.DEEP_MLP),
    Architecture("VGG-16, ImageNet, n = 1,000", *shapes.VGG16),
    Architecture("GPT-2 small, 36 points, n = 50,257", *shapes.GPT2_SMALL),
    Architecture("Llama-like, 64 points, n = 32,000", *shapes.LLAMA),
)
