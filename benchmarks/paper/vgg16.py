"""VGG-16 trained for a few steps on synthetic images: peak memory and time of a step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness.shapes import vgg16_sizes
from benchmarks.paper import memory
from benchmarks.paper.architectures import STORAGES, Architecture, vgg16
from dfa_kernels import attach, feedback_matrix

CLASSES = 1000
RATE = 1e-3
WAYS = {
    "backprop": "backpropagation",
    "naive": "DFA, a matrix per layer",
    "shared": "DFA, one stored matrix",
    "seeded": "DFA, from the seed",
    "lean": "DFA, from the seed, lean",
}


def feedback(way: str, sizes: tuple[int, ...], device: torch.device) -> dict:
    """Arguments of `attach` for one way of storing the feedback matrices."""
    if way == "naive":
        return {
            "matrix": [
                feedback_matrix(size, CLASSES, seed=i, device=device)
                for i, size in enumerate(sizes)
            ]
        }
    if way == "shared":
        return {"matrix": feedback_matrix(max(sizes), CLASSES, device=device)}
    return {"lean": way == "lean"}


def measure(way: str, resolution: int, batch: int, steps: int, device: torch.device) -> dict:
    """Train for `steps` steps; runs in a child process."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, resolution, resolution, device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    losses, seconds = [], []
    with memory.Peak(device) as peak:
        model, points = vgg16(resolution, CLASSES)
        model.to(device)
        if way != "backprop":
            attach(model, points, **feedback(way, vgg16_sizes(resolution), device))
        optimizer = torch.optim.SGD(model.parameters(), RATE)
        for _ in range(steps):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    if not all(map(math.isfinite, losses)):
        raise ArithmeticError(f"{way}: the loss is not finite: {losses}")
    # The first step also allocates memory and chooses algorithms.
    return {"peak": peak.bytes, "seconds": statistics.median(seconds[1:]), "losses": losses}


def needed(way: str, resolution: int, batch: int) -> int:
    """A lower bound in bytes: weights, gradients, outputs of layers and ReLUs, matrices."""
    sizes = vgg16_sizes(resolution)
    with torch.device("meta"):
        model, _ = vgg16(resolution, CLASSES)
    weights = sum(parameter.numel() for parameter in model.parameters())
    stored = Architecture("", sizes, CLASSES).feedback_bytes(way) if way in STORAGES else 0
    return 2 * 4 * weights + 2 * 4 * batch * sum(sizes) + stored


def run(
    device: torch.device, resolution: int, batch: int, steps: int, tick: Callable[[], None]
) -> list[dict]:
    """A row for each way of training."""
    rows = []
    for way, label in WAYS.items():
        stored = needed(way, resolution, batch) - needed("backprop", resolution, batch)
        measured = memory.in_child(
            measure,
            needed(way, resolution, batch),
            device,
            way=way,
            resolution=resolution,
            batch=batch,
            steps=steps,
        )
        rows.append({"name": label, "stored": stored} | measured)
        tick()
    return rows
