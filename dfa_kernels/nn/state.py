"""What a `DFA` puts into its model's state_dict: enough to make the same signals again, no matrix.

It is a uint8 tensor of JSON, so whatever copies, moves or stores a state_dict's tensors takes it
along. Its length does not change in training:

    stream          stream.VERSION
    seed, distribution, row_offsets
    normalization   "layer", "shared", a number, or {"function": its qualified name}
    layers          [name or null, size or null] of each; "shared" and functions normalize by these
                    sizes where a forward pass skips a layer
    stored          whether stored matrices make the signals, which are not in the state

A source of the user's own has `source`, what it describes, in the place of seed, distribution and
stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfa_kernels import checks, stream

_KEYS = ("stream", "seed", "distribution", "row_offsets", "normalization", "layers", "stored")
_KEYS_OF_ANOTHER_SOURCE = ("stream", "source", "row_offsets", "normalization", "layers")


class Facts(NamedTuple):
    """What a state says of a `DFA`.

    `source` has the keys seed, distribution and stored, or the one key "source". `layers` has
    [name, size] of each.
    """

    source: dict[str, Any]
    row_offsets: Sequence[int]
    normalization: str | float | Callable
    layers: Sequence[Sequence[Any]]


def pack(facts: Facts) -> Tensor:
    """The state of a `DFA`."""
    values = {
        "stream": stream.VERSION,
        **facts.source,
        "row_offsets": facts.row_offsets,
        "normalization": _described(facts.normalization),
        "layers": facts.layers,
    }
    keys = _keys(values)
    # Room for the longest values; JSON ignores the spaces.
    room = 256 + sum(64 + len(json.dumps(name)) for name, _ in facts.layers)
    if "source" in values:
        room += len(json.dumps(values["source"]))
    text = json.dumps({key: values[key] for key in keys}).ljust(room).encode()
    return torch.tensor(list(text), dtype=torch.uint8, device="cpu")


def unpack(packed: Tensor, ours: Facts, *, rows_are_fixed: bool) -> Facts:
    """The facts in a state, after checking that a `DFA` of the facts `ours` can take them.

    `rows_are_fixed` says that it cannot take other row offsets (stored matrices, a source of the
    user's own, the lean mode).

    Raises:
        TypeError: `packed` is not a state.
        ValueError: it is damaged, of another version of the stream, for other layers, of a
            normalization function or a source that `ours` does not have, or its layers share rows
            otherwise although the rows are fixed.
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        raise TypeError(
            f"DFA: state must be a uint8 tensor, got {getattr(packed, 'dtype', type(packed))}"
        )
    values = _values(packed)
    if values["stream"] != stream.VERSION:
        raise ValueError(
            f"DFA: state must be of version {stream.VERSION} of the stream, got {values['stream']}"
        )
    names, others = ([name for name, _ in layers] for layers in (ours.layers, values["layers"]))
    if names != others:
        raise ValueError(f"DFA: state must be for the layers {names}, got {others}")
    kept = ("source",) if "source" in values else ("seed", "distribution", "stored")
    source = {key: values[key] for key in kept}
    _check_source(source, ours.source)
    if rows_are_fixed and values["row_offsets"] != list(ours.row_offsets):
        raise ValueError(
            "DFA: state must share one matrix between layers as this DFA does, by row offsets "
            f"{list(ours.row_offsets)}, got {values['row_offsets']}"
        )
    offsets = checks.integers(
        "DFA", "row_offsets", values["row_offsets"], low=0, high=stream.ROWS - 1
    )
    if len(offsets) != len(ours.layers):
        raise ValueError(
            f"DFA: state must have one of row_offsets per layer ({len(ours.layers)}), "
            f"got {len(offsets)}"
        )
    if "source" not in source:
        checks.seed("DFA", source["seed"])
        checks.distribution("DFA", source["distribution"])
    normalization = values["normalization"]
    if isinstance(normalization, dict):
        if normalization != _described(ours.normalization):
            raise ValueError(
                f"DFA: state must have the normalization {ours.normalization!r}, got the function "
                f"{normalization['function']}"
            )
        normalization = ours.normalization
    return Facts(source, values["row_offsets"], normalization, values["layers"])


def _values(packed: Tensor) -> dict[str, Any]:
    try:
        values = json.loads(bytes(packed.tolist()))
    except ValueError:
        values = None
    if not isinstance(values, dict) or "stream" not in values:
        raise ValueError(
            f"DFA: state must be what a DFA saved, got {bytes(packed[:40].tolist())!r}"
        )
    keys = _keys(values)
    if values["stream"] == stream.VERSION and not values.keys() >= set(keys):
        raise ValueError(f"DFA: state must have {sorted(keys)}, got {sorted(values)}")
    return values


def _keys(values: dict[str, Any]) -> tuple[str, ...]:
    """The keys that a state of this kind of source has, in order."""
    return _KEYS_OF_ANOTHER_SOURCE if "source" in values else _KEYS


def _check_source(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise where the signals come from another kind of source, or from another of the user's."""
    own = {"source": json.loads(json.dumps(ours["source"]))} if "source" in ours else ours
    if "source" in own or "source" in theirs:
        same, got = own == theirs, _name(theirs)
    else:
        same, got = own["stored"] == theirs["stored"], "the other one"
    if not same:
        raise ValueError(
            f"DFA: state must be of the same source of signals, {_name(own)}, got {got}"
        )


def _name(source: dict[str, Any]) -> str:
    if "source" in source:
        return f"the one of {source['source']}"
    return "a stored matrix" if source["stored"] else "a seed"


def _described(normalization: str | float | Callable) -> Any:
    """A normalization as JSON."""
    if not callable(normalization):
        return normalization
    kind = normalization if hasattr(normalization, "__qualname__") else type(normalization)
    return {"function": f"{kind.__module__}.{kind.__qualname__}"}
