"""What the callbacks share: the states of a model's DFAs as text, and their alignment as logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dfa_kernels.nn.angles import alignment
from dfa_kernels.nn.attachment import find_dfas
from dfa_kernels.nn.dfa import DFA
from dfa_kernels.nn.hooks import SaveHook


def dfas_of(model: nn.Module) -> list[DFA]:
    """The `DFA`s that train a model, at least one."""
    found = find_dfas(model)
    if not found:
        raise ValueError("DFACallback: the model must hold a DFA or have one attached, got none")
    return found


def states_of(model: nn.Module) -> list[str]:
    """The state of each `DFA`, as text that JSON takes."""
    return [bytes(dfa.get_extra_state().tolist()).decode("latin-1") for dfa in find_dfas(model)]


def restore(model: nn.Module, states: Sequence[str]) -> None:
    """Put states in force, as `DFA.set_extra_state` does, which warns of what was given otherwise.

    States that are in force already, as those that came with the model's, do nothing.
    """
    ours = states_of(model)
    if len(ours) != len(states):
        raise ValueError(
            f"DFACallback: the checkpoint holds the states of {len(states)} DFAs, the model has "
            f"{len(ours)}"
        )
    for dfa, before, state in zip(find_dfas(model), ours, states, strict=True):
        if state != before:
            packed = list(state.encode("latin-1"))
            dfa.set_extra_state(torch.tensor(packed, dtype=torch.uint8, device="cpu"))


def refuse_attached_states(model: nn.Module) -> None:
    """Raise where the model's state_dict has a `DFA`'s state without having that as a submodule.

    torch broadcasts a whole state to the ranks of sharded models by the names of submodules.
    """
    for module in model.modules():
        for hook in module._state_dict_hooks.values():
            if isinstance(hook, SaveHook) and module._modules.get(hook.name) is not hook.dfa:
                raise ValueError(
                    "DFACallback: a run with FSDP2 and state_dict_type='FULL_STATE_DICT' could not "
                    f"be resumed from a state_dict with {hook.name!r}, got one; attach with "
                    "state=None, as this callback keeps the state"
                )


def alignment_logs(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, float]:
    """The mean alignment cosine of each layer, under "dfa/alignment/<layer>"."""
    cosines = alignment(model, loss)
    return {f"dfa/alignment/{name}": cosine.mean for name, cosine in cosines.items()}
