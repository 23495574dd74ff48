"""What a `DFA` puts into its model's state_dict: enough to make the same signals again, no matrix.

A uint8 tensor of JSON, so that whatever copies, moves or stores a state_dict's tensors does so with
it too, and of a length that training does not change:

    stream          stream.VERSION
    seed, distribution, row_offsets
    normalization   "layer", "shared", a number, or {"function": its qualified name}
    layers          [name or null, size or null] of each; sizes are what "shared" and functions
                    normalize by where a forward pass skips a layer
    stored          whether the signals come from stored matrices, which are not in the state
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfa_kernels import checks, stream

if TYPE_CHECKING:
    from dfa_kernels.nn.dfa import DFA

_KEYS = {"stream", "seed", "distribution", "row_offsets", "normalization", "layers", "stored"}


def pack(dfa: DFA) -> Tensor:
    """The state of `dfa`."""
    facts = {
        "stream": stream.VERSION,
        "seed": dfa.seed,
        "distribution": dfa.distribution,
        "row_offsets": dfa.row_offsets,
        "normalization": _normalization(dfa),
        "layers": [[layer.name, layer.size] for layer in dfa.dfa_layers],
        "stored": bool(dfa.matrices),
    }
    # Room for the longest values; JSON ignores the spaces.
    room = 256 + sum(64 + len(json.dumps(layer.name)) for layer in dfa.dfa_layers)
    text = json.dumps(facts).ljust(room).encode()
    return torch.tensor(list(text), dtype=torch.uint8, device="cpu")


def unpack(dfa: DFA, packed: Tensor) -> None:
    """Give `dfa` the state of another, after checking that it can take it.

    Raises:
        TypeError: `packed` is not a state.
        ValueError: it is damaged, of another version of the stream, for other layers, of a
            normalization function that `dfa` does not have, one of the two has stored matrices, or
            its layers share rows in a way that `dfa` cannot (stored matrices, the lean mode).
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        raise TypeError(
            f"DFA: state must be a uint8 tensor, got {getattr(packed, 'dtype', type(packed))}"
        )
    facts = _facts(packed)
    if facts["stream"] != stream.VERSION:
        raise ValueError(
            f"DFA: state must be of version {stream.VERSION} of the stream, got {facts['stream']}"
        )
    ours = [layer.name for layer in dfa.dfa_layers]
    theirs = [name for name, _ in facts["layers"]]
    if ours != theirs:
        raise ValueError(f"DFA: state must be for the layers {ours}, got {theirs}")
    if facts["stored"] != bool(dfa.matrices):
        raise ValueError(
            "DFA: state must be of the same source of signals, "
            f"{'a stored matrix' if dfa.matrices else 'a seed'}, got the other one"
        )
    fixed = bool(dfa.matrices) or dfa._group.lean
    if fixed and facts["row_offsets"] != dfa.row_offsets:
        raise ValueError(
            "DFA: state must share one matrix between layers as this DFA does, by row offsets "
            f"{dfa.row_offsets}, got {facts['row_offsets']}"
        )
    checks.seed("DFA", facts["seed"])
    checks.distribution("DFA", facts["distribution"])
    normalization = facts["normalization"]
    if isinstance(normalization, dict) and normalization != _normalization(dfa):
        raise ValueError(
            f"DFA: state must have the normalization {dfa.normalization!r}, got the function "
            f"{normalization['function']}"
        )
    if not isinstance(normalization, dict):
        dfa.normalization = normalization
    dfa.seed, dfa.distribution = facts["seed"], facts["distribution"]
    dfa.row_offsets = facts["row_offsets"]
    for layer, (_, size) in zip(dfa.dfa_layers, facts["layers"], strict=True):
        layer.size = size


def _facts(packed: Tensor) -> dict[str, Any]:
    try:
        facts = json.loads(bytes(packed.tolist()))
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or "stream" not in facts:
        raise ValueError(
            f"DFA: state must be what a DFA saved, got {bytes(packed[:40].tolist())!r}"
        )
    if facts["stream"] == stream.VERSION and not facts.keys() >= _KEYS:
        raise ValueError(f"DFA: state must have {sorted(_KEYS)}, got {sorted(facts)}")
    return facts


def _normalization(dfa: DFA) -> Any:
    if not callable(dfa.normalization):
        return dfa.normalization
    function = dfa.normalization
    kind = function if hasattr(function, "__qualname__") else type(function)
    return {"function": f"{kind.__module__}.{kind.__qualname__}"}
