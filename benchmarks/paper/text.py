"""Text to predict: the sources of Python's standard library, as byte pairs.

The library's modules are those of the Python that runs, so texts differ between its versions.
"""

from __future__ import annotations

import functools
import re
import sysconfig
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper.data import Data

BYTES = 256
WORDS = re.compile(r" ?\w+|\n *| ?[^\w\s]+|\s")
COMMON = 5_000  # words to learn byte pairs from
CONTEXT = 4  # tokens to predict the next one from
TEST_WINDOWS = 10_000


def name(vocabulary: int) -> str:
    """What a text of so many kinds of token is called."""
    return f"next token of {vocabulary:,}"


def sources() -> list[str]:
    """The modules at the top of the standard library by name, each byte a character."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [path.read_bytes().decode("latin-1") for path in sorted(folder.glob("*.py"))]


def headers() -> list[str]:
    """The C++ headers of c10, which come with torch: another kind of text."""
    folder = Path(torch.__file__).parent / "include" / "c10"
    return [path.read_bytes().decode("latin-1") for path in sorted(folder.rglob("*.h"))]


def byte_pairs(words: Counter[str], vocabulary: int) -> list[str]:
    """The pairs that become tokens 256, 257, .., as strings of two tokens.

    Byte-pair encoding (Sennrich, Haddow, Birch 2016): again and again, the most frequent pair of
    tokens within words becomes a token. Of equally frequent ones, the largest.
    """
    counts: Counter[str] = Counter()

    def count(word: str, times: int) -> None:
        for first, second in pairwise(word):
            counts[first + second] += times

    spelled, pairs = [*words.items()], []
    for word, times in spelled:
        count(word, times)
    for token in range(BYTES, vocabulary):
        pair = max(counts, key=lambda pair: (counts[pair], pair))
        pairs.append(pair)
        for index, (word, times) in enumerate(spelled):
            if pair in word:
                merged = word.replace(pair, chr(token))
                count(word, -times)
                count(merged, times)
                spelled[index] = merged, times
    return pairs


def encode(text: str, pairs: list[str]) -> Tensor:
    """The tokens of a text [length]."""
    words = WORDS.findall(text)
    known = "\0".join(dict.fromkeys(words))
    spelled = known
    for token, pair in enumerate(pairs, BYTES):
        spelled = spelled.replace(pair, chr(token))
    spelling = dict(zip(known.split("\0"), spelled.split("\0"), strict=True))
    return torch.tensor([ord(token) for word in words for token in spelling[word]])


def sequences(tokens: Tensor, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every `length` tokens [count, length] and what follows each of them, as views."""
    found = tokens.to(device).unfold(0, length + 1, 1)
    return found[:, :-1], found[:, 1:]


def windows(tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every CONTEXT tokens [count, CONTEXT] and the next token of each [count], as views."""
    contexts, following = sequences(tokens, CONTEXT, device)
    return contexts, following[:, -1]


def split(files: list[str]) -> tuple[str, str]:
    """The text to learn from and the one to test on, which is every tenth file."""
    train = "".join(text for index, text in enumerate(files) if index % 10)
    return train, "".join(files[::10])


@functools.cache
def learned_pairs(vocabulary: int) -> list[str]:
    """The byte pairs of the standard library's part to learn from."""
    train, _ = split(sources())
    words = Counter(dict(Counter(WORDS.findall(train)).most_common(COMMON)))
    return byte_pairs(words, vocabulary)


def encoded(files: list[str], vocabulary: int) -> tuple[Tensor, Tensor]:
    """The tokens to learn from and those to test on."""
    pairs = learned_pairs(vocabulary)
    train, test = split(files)
    return encode(train, pairs), encode(test, pairs)


def load_sequences(
    name: str, files: list[str], vocabulary: int, length: int, device: torch.device
) -> Data:
    """Sequences, and the next token at each of their places."""
    train, test = encoded(files, vocabulary)
    train_x, train_y = sequences(train, length, device)
    test_x, test_y = sequences(test, length, device)
    apart = max(length, len(test_y) // TEST_WINDOWS)
    return Data(name, train_x, train_y, test_x[::apart], test_y[::apart], vocabulary)


def load(vocabulary: int, device: torch.device) -> Data:
    """Contexts and their next tokens."""
    train, test = encoded(sources(), vocabulary)
    train_x, train_y = windows(train, device)
    test_x, test_y = windows(test, device)
    apart = max(1, len(test_y) // TEST_WINDOWS)
    test = (test_x[::apart][:TEST_WINDOWS], test_y[::apart][:TEST_WINDOWS])
    return Data(name(vocabulary), train_x, train_y, *test, vocabulary)
