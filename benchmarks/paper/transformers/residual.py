"""Residual networks that end in a linear output layer, and the paper's perceptron beside them.

Each has `points`, the names of what gets feedback by way of placing, and `dims`, their batch
dimensions; those of the output are `output_dims`. The output layer is `output`, what turns tokens
or patches into a state is `embed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 32  # width of an attention head
PATCH = 4  # side of a ViT's patch
PLACES = (0, 2, 3)  # batch dimensions of [batch, channels, height, width]


class Attention(nn.Module):
    """Multi-head self-attention, causal or not."""

    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.heads, self.causal = max(1, width // HEAD), causal
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        into = self.into(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = into.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Add(nn.Module):
    """x + scale * branch(x), where `branch` normalizes first."""

    def __init__(self, *branch: nn.Module):
        super().__init__()
        self.branch, self.scale = nn.Sequential(*branch), 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape that the branch keeps."""
        return x + self.scale * self.branch(x)

    def start_at_zero(self, scale: float) -> None:
        """Set the last layer of the branch to 0, and the factor of what it learns."""
        self.scale = scale
        last = self.branch[-1]
        for parameter in (last.out if isinstance(last, Attention) else last).parameters():
            nn.init.zeros_(parameter)


def perceptron(width: int) -> Add:
    """The residual two-layer perceptron of a transformer block."""
    inner = 4 * width
    return Add(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class Residual(nn.Module):
    """Embedding, blocks, a norm, pooling and the output layer."""

    def __init__(
        self,
        embed: nn.Module,
        blocks: list[nn.Module],
        norm: nn.Module,
        pool: nn.Module,
        width: int,
        classes: int,
        dims: tuple[int, ...],
    ):
        super().__init__()
        self.embed, self.blocks, self.norm, self.pool = embed, nn.ModuleList(blocks), norm, pool
        self.output = nn.Linear(width, classes, bias=False)
        self.dims = dims
        self.output_dims = dims if isinstance(pool, nn.Identity) else (0,)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs as `embed` takes them, to logits."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.output(self.pool(self.norm(x)))

    def through(self, x: Tensor) -> Tensor:
        """The norm of a block's output, without weights that learn."""
        norm = self.norm
        if isinstance(norm, nn.LayerNorm):
            return F.layer_norm(x, norm.normalized_shape)
        return F.group_norm(x, norm.num_groups) if isinstance(norm, nn.GroupNorm) else x

    def points(self, places: str) -> list[str]:
        """The names of what gets feedback; see `Recipe.points`."""
        count = len(self.blocks)
        blocks = [f"blocks.{index}" for index in range(count)]
        if places == "sublayers":
            return [f"{block}.{part}" for block in blocks for part in range(2)]
        if places == "embedding":
            return ["embed"]
        if places == "embedding too":
            return ["embed", *blocks]
        if places == "every second block":
            return blocks[::-2][::-1]
        if places == "all but the last":
            return blocks[:-1]
        assert places == "blocks", places
        return blocks


class Embedding(nn.Module):
    """The sum of a token's and a place's vectors."""

    def __init__(self, kinds: int, tokens: int, width: int):
        super().__init__()
        self.token, self.place = nn.Embedding(kinds, width), nn.Embedding(tokens, width)
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [batch, tokens] to [batch, tokens, width]."""
        return self.token(x) + self.place.weight[: x.shape[1]]


class Patches(nn.Module):
    """Linearly embedded patches, each with a vector for its place."""

    def __init__(self, shape: tuple[int, ...], width: int):
        super().__init__()
        channels, side = shape[0], shape[1]
        patch = min(PATCH, side // 4)
        self.cut = nn.Conv2d(channels, width, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        """Images to [batch, patches, width]."""
        return self.cut(x).flatten(2).transpose(1, 2) + self.place


class Mean(nn.Module):
    """The mean over all patches, or over all places of an image."""

    def __init__(self, dims: tuple[int, ...]):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """To [batch, width]."""
        return x.mean(self.dims)


def blocks(width: int, depth: int, causal: bool) -> list[nn.Module]:
    """Pre-norm transformer blocks, each of two residual sublayers."""
    return [
        nn.Sequential(Add(nn.LayerNorm(width), Attention(width, causal)), perceptron(width))
        for _ in range(depth)
    ]


def transformer(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Residual:
    """A causal language model of [tokens], with an output layer of its own."""
    embed = Embedding(classes, shape[0], width)
    layers = blocks(width, depth, causal=True)
    return Residual(embed, layers, nn.LayerNorm(width), nn.Identity(), width, classes, (0, 1))


def vit(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Residual:
    """A vision transformer that classifies the mean of its patches."""
    embed, layers = Patches(shape, width), blocks(width, depth, causal=False)
    return Residual(embed, layers, nn.LayerNorm(width), Mean((1,)), width, classes, (0, 1))


def residual_perceptron(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Residual:
    """Fully connected, with skip connections."""
    embed = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), width))
    layers: list[nn.Module] = [perceptron(width) for _ in range(depth)]
    return Residual(embed, layers, nn.LayerNorm(width), nn.Identity(), width, classes, (0,))


def resnet(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Residual:
    """Residual 3x3 convolutions of one width, at half of the image's side, pooled at the end."""

    def convolution() -> list[nn.Module]:
        return [nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]

    embed = nn.Conv2d(shape[0], width, 3, stride=2, padding=1)
    layers: list[nn.Module] = [Add(*convolution(), *convolution()) for _ in range(depth)]
    norm, pool = nn.GroupNorm(8, width), Mean((2, 3))
    return Residual(embed, layers, norm, pool, width, classes, PLACES)


def plain(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Residual:
    """The paper's tanh perceptron: no skip connections, no norms."""
    embed = nn.Flatten()
    sizes = [math.prod(shape), *[width] * depth]
    layers: list[nn.Module] = [
        nn.Sequential(nn.Linear(inputs, width), nn.Tanh()) for inputs in sizes[:-1]
    ]
    return Residual(embed, layers, nn.Identity(), nn.Identity(), width, classes, (0,))


Network = Callable[[tuple[int, ...], int, int, int], Residual]
NETWORKS: dict[str, Network] = {
    "transformer": transformer,
    "ViT": vit,
    "residual perceptron": residual_perceptron,
    "ResNet": resnet,
    "perceptron": plain,
}
