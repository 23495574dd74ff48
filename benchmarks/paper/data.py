"""Images to train on: CIFAR-10 from a folder, or scikit-learn's digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
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
    """CIFAR-10 from the `folder` that holds cifar-10-batches-py; the digits if it is None."""
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
    """CIFAR-10 through torchvision, standardized by channel, without augmentation."""
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError) as error:  # the latter if it was built for another torch
        raise SystemExit(
            f"CIFAR-10 needs a torchvision that fits torch {torch.__version__} ({error}); without "
            "--data the experiments run on scikit-learn's digits"
        ) from error
    tensors = []
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (CIFAR10_MEAN, CIFAR10_DEVIATION))
    for train in (True, False):
        try:
            part = CIFAR10(str(folder), train=train, download=False)
        except (RuntimeError, OSError) as error:
            raise SystemExit(f"--data {folder}: no CIFAR-10 there: {error}") from error
        images = torch.tensor(part.data).permute(0, 3, 1, 2).float() / 255
        tensors += [(images - mean) / deviation, torch.tensor(part.targets)]
    return Data("CIFAR-10", *(tensor.to(device) for tensor in tensors))
