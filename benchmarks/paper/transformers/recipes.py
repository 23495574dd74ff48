"""What is compared: recipes on one transformer, other sizes, other networks, fine-tuning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper import data, text
from benchmarks.paper.data import Data
from benchmarks.paper.transformers.feedback import RANK
from benchmarks.paper.transformers.summary import BACKPROP, FROZEN, ONLY_EMBEDDING, Part
from benchmarks.paper.transformers.trials import Recipe, Setting
from dfa_kernels.stream import DISTRIBUTIONS

VOCABULARY, TOKENS = 1024, 64
SMALL = Setting("transformer", text.name(VOCABULARY), depth=4, width=64, steps=400, batch=8)

BACKPROPAGATION = Recipe(BACKPROP, mode="backprop", matched=False)
BLOCKS_FROZEN = Recipe(FROZEN, mode="shallow", matched=False, zero=False)
# No norm, blocks as torch initializes them, and the better of two rates for the transformer.
PUBLISHED = Recipe(
    "DFA as published", matched=False, zero=False, through_norm=False, hidden_rate=1e-4
)
MATCHED = Recipe("matched")
OUTPUT_WEIGHTS = Recipe("output weights", matched=False, feedback="output weights")


def changed(recipe: Recipe, what: str, **changes: Any) -> Recipe:
    """A recipe with one thing changed."""
    return replace(recipe, name=f"{recipe.name}: {what}", **changes)


ALONE = {"points": "embedding", "learns": "embedding"}
EMBEDDING = Recipe(ONLY_EMBEDDING, matched=False, feedback="output weights", **ALONE)
PUBLISHED_FASTER = changed(PUBLISHED, "block rate 1e-3", hidden_rate=1e-3)
UNMATCHED = replace(MATCHED, name="not matched", matched=False)
MAIN = (BACKPROPAGATION, BLOCKS_FROZEN, EMBEDDING, PUBLISHED, UNMATCHED, MATCHED, OUTPUT_WEIGHTS)
CHANGED = (
    changed(BACKPROPAGATION, "block rate 3e-4", hidden_rate=3e-4),
    changed(BACKPROPAGATION, "block rate 3e-3", hidden_rate=3e-3),
    PUBLISHED_FASTER,
    changed(MATCHED, "only the embedding learns", **ALONE),
    changed(MATCHED, "not through a norm", through_norm=False),
    changed(MATCHED, "branches do not start at 0", zero=False),
    changed(MATCHED, "a point at the embedding too", points="embedding too"),
    changed(MATCHED, "points at sublayers", points="sublayers"),
    changed(MATCHED, "last block by backpropagation", points="all but the last"),
    changed(MATCHED, "scale 0.25/sqrt(l)", scale=0.25),
    changed(MATCHED, "scale 0.5/sqrt(l)", scale=0.5),
    changed(MATCHED, "scale 2/sqrt(l)", scale=2.0),
    changed(MATCHED, "output rate 1e-3", output_rate=1e-3),
    changed(MATCHED, "output rate 1e-2", output_rate=1e-2),
    changed(MATCHED, "block rate 3e-4", hidden_rate=3e-4),
    changed(MATCHED, "block rate 3e-3", hidden_rate=3e-3),
    changed(MATCHED, "warm-up, cosine", schedule="cosine", warmup=40),
    changed(MATCHED, "weights decay to 0", output_decay=3.0),
    changed(MATCHED, "weights decay to the feedback", pull=3.0),
    changed(MATCHED, "weights frozen for 100 steps", frozen=100),
    changed(MATCHED, "weights frozen", frozen=-1),
    changed(MATCHED, "a tenth of backpropagation", backprop_every=10),
    changed(MATCHED, "SGD", optimizer="sgd", output_rate=0.3, hidden_rate=0.1, embedding_rate=0.3),
    *(changed(MATCHED, name, distribution=name) for name in DISTRIBUTIONS if name != "normal"),
    changed(OUTPUT_WEIGHTS, "not through a norm", through_norm=False),
    changed(OUTPUT_WEIGHTS, "branches do not start at 0", zero=False),
    changed(OUTPUT_WEIGHTS, "points at every second block", points="every second block"),
)
LONGER = replace(SMALL, steps=1600)
BASIC = Part("main", "A transformer", (SMALL, LONGER), MAIN, seeds=3)
FLOORS = (BACKPROPAGATION, BLOCKS_FROZEN, EMBEDDING)
VARIANTS = Part(
    "variants",
    "One thing changed",
    (SMALL,),
    (*FLOORS, MATCHED, OUTPUT_WEIGHTS, *CHANGED),
    seeds=2,
)
SIZES = Part(
    "sizes",
    "Depth and width",
    (*(replace(SMALL, depth=depth) for depth in (2, 8, 12)), replace(SMALL, width=128)),
    (BACKPROPAGATION, EMBEDDING, MATCHED, OUTPUT_WEIGHTS),
    seeds=2,
)


def others(images: str) -> tuple[Part, ...]:
    """Other networks, on images of that name."""
    residual = (
        Setting("ViT", images, depth=4, width=64, steps=800, batch=32),
        Setting("residual perceptron", images, depth=8, width=128, steps=800, batch=32),
        Setting("ResNet", images, depth=4, width=32, steps=400, batch=32),
    )
    # Without an embedding to give a point, norms and branches.
    plain = Setting("perceptron", images, depth=3, width=256, steps=800, batch=32)
    recipes = (*MAIN, PUBLISHED_FASTER)
    without = tuple(one for one in recipes if one is not EMBEDDING)
    title = f"A network without skip connections, on {images}"
    return (
        Part("others", f"Other residual networks, on {images}", residual, recipes, seeds=3),
        Part("perceptron", title, (plain,), without, seeds=3),
    )


HEADERS = "C++ headers"
TUNED = Recipe("tuned", matched=False)
TUNING = Part(
    "fine-tuning",
    "From the standard library to C++ headers",
    (replace(SMALL, data=HEADERS, before=SMALL.data, before_steps=1600),),
    (
        BACKPROPAGATION,
        replace(BLOCKS_FROZEN, zero=True),  # as they were trained
        replace(TUNED, name="a seed"),
        *(
            replace(TUNED, name=feedback, feedback=feedback)
            for feedback in (
                *("output weights", "their start"),
                *(f"rank {RANK}", f"seed and rank {RANK}"),
            )
        ),
    ),
    seeds=3,
)
FIRST_PARTS = (BASIC, VARIANTS, SIZES, TUNING)


def loader(folder: Path | None, device: torch.device) -> tuple[str, Callable[[str], Data]]:
    """The name of the images that there are, and what loads data by name, once."""
    images = data.load(folder, device)
    files = {SMALL.data: text.sources, HEADERS: text.headers}

    @functools.cache
    def load(name: str) -> Data:
        if name == images.name:
            return images
        return text.load_sequences(name, files[name](), VOCABULARY, TOKENS, device)

    return images.name, load
