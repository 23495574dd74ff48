"""Images to train on: CIFAR-10 from a folder, or scikit-learn's digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# Of CIFAR-10's training images by channel, from the published code.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_DEVIATION = (0.2023, 0.1994, 0.2010)


@dataclass
class Data:
    """Images [count, channels, side, side] in fp32 and their classes [count].

    Or contexts [count, tokens] and their next tokens, see `text`.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int = 10

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.train_x.shape[1:])

    def resized(self, side: int | None) -> Data:
        """The images interpolated to `side` x `side`; what is no image has None."""
        if side is None or side == self.shape[1]:
            return self
        train_x, test_x = (
            F.interpolate(x, (side, side), mode="bilinear") for x in (self.train_x, self.test_x)
        )
        return Data(self.name, train_x, self.train_y, test_x, self.test_y, self.classes)


def load(folder: Path | None, device: torch.device) -> Data:
    """CIFAR-10 from a folder, as `cifar10` takes it; the digits if it is None."""
    return digits(device) if folder is None else cifar10(folder, device)


def digits(device: torch.device) -> Data:
    """scikit-learn's digits: 8x8 images in [-1, 1], a third of them held out for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = torch.tensor(found.images / 8 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(found.target)
    train, test = train_test_split(
        range(len(labels)), test_size=1 / 3, random_state=0, stratify=found.target
    )
    tensors = (images[train], labels[train], images[test], labels[test])
    return Data("digits", *(tensor.to(device) for tensor in tensors))


def cifar10(folder: Path, device: torch.device) -> Data:
    """CIFAR-10 from a folder, standardized by channel, without augmentation.

    The folder holds `train/<class>/` and `test/<class>/`, with an image in each file, or
    cifar-10-batches-py, for torchvision.
    """
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (CIFAR10_MEAN, CIFAR10_DEVIATION))
    read = of_files if (folder / "train").is_dir() else of_batches
    tensors = []
    for part in ("train", "test"):
        pixels, classes = read(folder, part)
        images = pixels.permute(0, 3, 1, 2).float() / 255
        tensors += [(images - mean) / deviation, classes]
    return Data("CIFAR-10", *(tensor.to(device) for tensor in tensors))


def of_files(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [count, 32, 32, 3] in uint8 and their classes, which are folders, sorted by name."""
    kinds = sorted(path for path in (folder / part).glob("*") if path.is_dir())
    files = [(file, kind) for kind, path in enumerate(kinds) for file in sorted(path.iterdir())]
    if len(kinds) != 10 or not files:
        found = f"{len(kinds)} classes, {len(files)} files"
        raise SystemExit(f"--data {folder}: no CIFAR-10 there: {part} has {found}")
    images = []
    for file, _ in files:
        try:
            with Image.open(file) as image:
                images.append(numpy.asarray(image.convert("RGB")))
        except OSError as error:
            raise SystemExit(f"--data {folder}: {file} is no image: {error}") from error
    shapes = {image.shape for image in images}
    if shapes != {(32, 32, 3)}:
        raise SystemExit(f"--data {folder}: images must be 32 x 32, got {sorted(shapes)}")
    # In an order in which every part has all classes.
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([kind for _, kind in files])
    return torch.tensor(numpy.stack(images))[order], classes[order]


def of_batches(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """The same by torchvision."""
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError) as error:  # the latter if it was built for another torch
        raise SystemExit(
            f"CIFAR-10 needs a torchvision that fits torch {torch.__version__} ({error}); without "
            "--data the experiments run on scikit-learn's digits"
        ) from error
    try:
        found = CIFAR10(str(folder), train=part == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise SystemExit(f"--data {folder}: no CIFAR-10 there: {error}") from error
    return torch.tensor(found.data), torch.tensor(found.targets)
