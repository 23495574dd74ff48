"""What a `DFA` puts into its model's state_dict: enough to make the same signals again, no matrix.

It is a uint8 tensor of JSON, so whatever copies, moves or stores a state_dict's tensors takes it
along. Its length does not change in training:

    stream          stream.VERSION
    seed, distribution, row_offsets
    normalization   "layer", "shared", a number, or {"function": its qualified name}
    layers          [name or null, size or null] of each; "shared" and functions normalize by these
                    sizes where a forward pass skips a layer
    stored          whether stored matrices make the signals, which are not in the state
    error_size, scales   where normalization is a function, once a forward pass has trained: n, and
                    what the function gives for these sizes, to 9 digits. Names do not tell lambdas
                    apart. Not of an nn.Module, whose own state says what it gives

A source of the user's own has `source`, what it describes, in the place of seed, distribution and
stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfa_kernels import checks, stream
from dfa_kernels.nn.sources import Slicing, check_normalization, check_seeded

_KEYS = ("stream", "seed", "distribution", "row_offsets", "normalization", "layers", "stored")
_KEYS_OF_ANOTHER_SOURCE = ("stream", "source", "row_offsets", "normalization", "layers")
_WHERE = "DFA: state"


class Facts(NamedTuple):
    """What a state says of a `DFA`.

    `source` has the keys seed, distribution and stored, or the one key "source". `layers` has
    [name, size] of each. `error_size` is n in the last forward pass that trained.
    """

    source: dict[str, Any]
    row_offsets: Sequence[int]
    normalization: str | float | Callable
    layers: Sequence[Sequence[Any]]
    error_size: int | None


def pack(facts: Facts) -> Tensor:
    """The state of a `DFA`."""
    values = {
        "stream": stream.VERSION,
        **facts.source,
        "row_offsets": list(facts.row_offsets),
        "normalization": described(facts.normalization),
        "layers": facts.layers,
    }
    values = {key: values[key] for key in _keys(values)}
    # Room for the longest values; JSON ignores the spaces.
    room = 256 + sum(64 + len(json.dumps(name)) for name, _ in facts.layers)
    if "source" in values:
        room += len(json.dumps(values["source"]))
    room = max(room, len(json.dumps(_widest(values))))
    scales = _scales(facts.normalization, facts.layers, facts.error_size)
    if scales is not None:
        values["error_size"] = facts.error_size
        values["scales"] = [float(f"{scale:.8e}") for scale in scales]
    text = json.dumps(values).ljust(room).encode()
    return torch.tensor(list(text), dtype=torch.uint8, device="cpu")


def unpack(packed: Tensor, ours: Facts, *, rows_are_fixed: bool) -> Facts:
    """The facts in a state, after checking that a `DFA` of the facts `ours` can take them.

    `rows_are_fixed` says that it cannot take other row offsets (stored matrices, a source of the
    user's own, the lean mode).

    Raises:
        TypeError: `packed` is not a state, or a value in it has the wrong type.
        ValueError: it is damaged, of another version of the stream, for other layers, of a
            normalization function or a source that `ours` does not have, or its layers share rows
            otherwise although the rows are fixed.
    """
    values = _values(packed)
    if type(values["stream"]) is not int or values["stream"] != stream.VERSION:
        raise ValueError(
            f"{_WHERE} must be of version {stream.VERSION} of the stream, got {values['stream']!r}"
        )
    layers = _check_layers(values["layers"], [name for name, _ in ours.layers])
    kept = ("source",) if "source" in values else ("seed", "distribution", "stored")
    source = {key: values[key] for key in kept}
    _check_source(source, ours.source)
    row_offsets = _check_rows(values["row_offsets"], layers)
    if rows_are_fixed and row_offsets != list(ours.row_offsets):
        raise ValueError(
            f"{_WHERE} must share one matrix between layers as this DFA does, by row offsets "
            f"{list(ours.row_offsets)}, got {row_offsets}"
        )
    error_size = values.get("error_size")
    if error_size is not None:
        checks.integer(_WHERE, "error_size", error_size, low=1, high=stream.COLUMNS)
    normalization = values["normalization"]
    if isinstance(normalization, dict):
        normalization = _check_function(normalization, ours.normalization)
        _check_scales(values.get("scales"), normalization, layers, error_size)
    elif isinstance(normalization, bool) or normalization is None:
        raise TypeError(
            f"{_WHERE}: normalization must be a name, a number or a function's name, "
            f"got {normalization}"
        )
    else:
        normalization = check_normalization(normalization, _WHERE)
    return Facts(source, row_offsets, normalization, layers, error_size)


def _values(packed: Tensor) -> dict[str, Any]:
    """The JSON values of a state, which has all keys of its kind."""
    data = _bytes(packed)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or "stream" not in values:
        raise ValueError(f"{_WHERE} must be what a DFA saved, got {data[:40]!r}")
    keys = _keys(values)
    if values["stream"] == stream.VERSION and not values.keys() >= set(keys):
        raise ValueError(f"{_WHERE} must have {sorted(keys)}, got {sorted(values)}")
    return values


def _bytes(packed: Tensor) -> bytes:
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        got = packed.dtype if isinstance(packed, Tensor) else type(packed).__name__
        raise TypeError(f"{_WHERE} must be a uint8 tensor, got {got}")
    if packed.dim() != 1 or packed.layout != torch.strided or packed.is_meta:
        kind = f"{packed.layout} on {packed.device}"
        raise ValueError(
            f"{_WHERE} must have one dimension and hold data, got {list(packed.shape)}, {kind}"
        )
    try:
        return bytes(packed.tolist())
    except RuntimeError as reason:
        raise ValueError(f"{_WHERE} must hold data, got a {type(packed).__name__}") from reason


def _keys(values: dict[str, Any]) -> tuple[str, ...]:
    """The keys that a state of this kind of source has, in order."""
    return _KEYS_OF_ANOTHER_SOURCE if "source" in values else _KEYS


def _widest(values: dict[str, Any]) -> dict[str, Any]:
    """Values of a state that are as long as any that training can put in their place."""
    layers = [[name, 2**63] for name, _ in values["layers"]]
    wide = {"layers": layers, "row_offsets": [2**63] * len(layers)}
    if "seed" in values:
        wide |= {"seed": 2**64 - 1, "distribution": max(stream.DISTRIBUTIONS, key=len)}
    if isinstance(values["normalization"], dict):
        wide |= {"error_size": stream.COLUMNS, "scales": [-1.23456789e-100] * len(layers)}
    return values | wide


def _check_layers(layers: Any, names: list[str | None]) -> list[list[Any]]:
    """[name, size] of each layer, in a state for the layers of those names."""
    pairs = isinstance(layers, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in layers
    )
    if not pairs:
        raise ValueError(f"{_WHERE}: layers must be a list of [name, size], got {layers!r}")
    others = [name for name, _ in layers]
    if names != others:
        raise ValueError(f"{_WHERE} must be for the layers {names}, got {others}")
    for index, (_, size) in enumerate(layers):
        if size is not None:
            checks.integer(_WHERE, f"layers[{index}]'s size", size, low=1, high=stream.ROWS)
    return layers


def _check_rows(row_offsets: Any, layers: list[list[Any]]) -> list[int]:
    """One row offset for each layer, whose rows are all rows of U."""
    offsets = checks.integers(_WHERE, "row_offsets", row_offsets, low=0, high=stream.ROWS - 1)
    if len(offsets) != len(layers):
        raise ValueError(
            f"{_WHERE} must have one of row_offsets per layer ({len(layers)}), got {len(offsets)}"
        )
    for index, (first, (_, size)) in enumerate(zip(offsets, layers, strict=True)):
        checks.rows(_WHERE, f"row_offsets[{index}]", first, size or 1)
    return offsets


def _check_source(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise where the signals come from another kind of source, or from another of the user's."""
    if "source" not in theirs:
        check_seeded(theirs["seed"], theirs["distribution"], None, _WHERE)
        for name in ("seed", "distribution"):
            if theirs[name] is None:
                raise TypeError(f"{_WHERE}: {name} must not be null, got None")
        if not isinstance(theirs["stored"], bool):
            raise TypeError(f"{_WHERE}: stored must be true or false, got {theirs['stored']!r}")
    if "source" in ours or "source" in theirs:
        # By their text, in which tuples are lists.
        same, got = _text(theirs) == _text(ours), _name(theirs)
    else:
        same, got = ours["stored"] == theirs["stored"], "the other one"
    if not same:
        raise ValueError(
            f"{_WHERE} must be of the same source of signals, {_name(ours)}, got {got}"
        )


def _text(source: dict[str, Any]) -> str:
    return json.dumps(json.loads(json.dumps(source)), sort_keys=True)


def _name(source: dict[str, Any]) -> str:
    if "source" in source:
        return f"the one of {source['source']}"
    return "a stored matrix" if source["stored"] else "a seed"


def described(normalization: str | float | Callable) -> Any:
    """A normalization as JSON."""
    if not callable(normalization):
        return normalization
    kind = normalization if hasattr(normalization, "__qualname__") else type(normalization)
    return {"function": f"{kind.__module__}.{kind.__qualname__}"}


def _check_function(theirs: dict[str, Any], ours: str | float | Callable) -> Callable:
    """Our normalization, if it is a function of that name."""
    if not callable(ours) or theirs != described(ours):
        got = f"the function {theirs['function']}" if "function" in theirs else theirs
        raise ValueError(f"{_WHERE} must have the normalization {ours!r}, got {got}")
    return ours


def _scales(
    normalization: str | float | Callable,
    layers: Sequence[Sequence[Any]],
    error_size: int | None,
) -> list[float] | None:
    """What a function gives for the layers as they are; None where nothing is to be compared."""
    if not callable(normalization) or isinstance(normalization, nn.Module) or error_size is None:
        return None
    return Slicing((), normalization).scales([size or 1 for _, size in layers], error_size)


def _check_scales(
    theirs: Any, normalization: Callable, layers: list[list[Any]], error_size: int | None
) -> None:
    """Raise where a function of the same name gives other scales than a state's did."""
    if theirs is None:
        return
    sizes = [size or 1 for _, size in layers]
    if not isinstance(theirs, list):
        raise TypeError(f"{_WHERE}: scales must be a list, got {theirs!r}")
    theirs = checks.scales(f"{_WHERE}: scales", theirs, sizes, 1)
    if error_size is None:
        raise ValueError(f"{_WHERE} with scales must have their error_size, got None")
    try:
        ours = _scales(normalization, layers, error_size)
    except Exception as reason:
        raise ValueError(
            f"{_WHERE} must be for sizes that normalization takes, got {sizes} and {error_size}: "
            f"{reason!r}"
        ) from reason
    if ours is None:
        return
    for index, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if abs(own - other) > 1e-6 * max(abs(own), abs(other)):
            raise ValueError(
                f"{_WHERE} must have the normalization {normalization!r}, which gives layer "
                f"{index} the scale {own:.6g}, got another function of its name, which gave "
                f"{other:.6g}"
            )
