"""What is said when a state is loaded: that it does not fit, or differs from what was given."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from dfa_kernels.nn.guards import warn_once
from dfa_kernels.nn.settings import Settings
from dfa_kernels.nn.sources import Seeded


def report(refusal: str, key: str, unexpected_keys: list[str], error_msgs: list[str]) -> None:
    """Report a state that was refused as torch reports a key that it did not expect.

    It does so once everything else is loaded: a strict load_state_dict raises an error, another one
    returns the key. The latter gets the reason as a warning.
    """
    if _is_strict():
        error_msgs.append(f'While loading "{key}": {refusal}.')
    else:
        unexpected_keys.append(key)
        warn_once(set(), key, f"{refusal}. load_state_dict left this DFA as it was")


def warn_of_other_choices(dfa: Settings, chosen: Mapping[str, Any]) -> None:
    """Warn of each argument that was `chosen` where a loaded state has put another in force."""
    for name, ours in chosen.items():
        theirs = getattr(dfa, name)
        if name != "normalization" and not isinstance(dfa.source, Seeded):
            continue  # makes nothing
        if theirs is not ours and theirs != ours:
            warn_once(
                set(),
                name,
                f"DFA: the loaded state has {name}={theirs!r}, but {name}={ours!r} was given. "
                f"{theirs!r} is in force, so that a resumed run goes on as before; to keep yours, "
                f"set the DFA's {name} = {ours!r} after loading, and if you mean to resume, leave "
                f"{name} out",
            )


def _is_strict() -> bool:
    """Whether the load_state_dict under way is strict. torch tells its modules that all are."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "load_state_dict" and "error_msgs" in frame.f_locals:
            return frame.f_locals.get("strict", True)
    return True
