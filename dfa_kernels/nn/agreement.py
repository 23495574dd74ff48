"""What the stages of a pipeline find out in the first step: what each trains, and what it is sent.

Settings that differ between stages are an error on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dfa_kernels.layers import Layers
from dfa_kernels.nn.dfa import DFA
from dfa_kernels.nn.links import Links, Meta
from dfa_kernels.nn.plan import Target, split_target
from dfa_kernels.nn.rows import split_shape
from dfa_kernels.nn.shards import layout_of
from dfa_kernels.nn.signals import dtype_of
from dfa_kernels.nn.sources import OutputWeights

WHERE = "FeedbackStage"  # that messages begin with

# Layers whose signals a stage needs, and their dtype.
Asked = tuple[Layers, torch.dtype]


class Said(NamedTuple):
    """What a stage tells all others in the first step: its settings, and what its DFA will train.

    `lean` says whether that needs one signal only. `output` is the network's, on the last stage.
    `parts` names what processes share, as in tensor parallelism.
    """

    settings: dict[str, Any]
    targets: list[Target]
    lean: bool
    output: Meta | None
    parts: list[str]


class Payload(NamedTuple):
    """What the last stage sends to `stages` for each microbatch.

    The error's rows where `layers` is None, else the signals of these.
    """

    stages: tuple[int, ...]
    layers: Layers | None
    metas: tuple[Meta, ...]


class Agreement(NamedTuple):
    """What the stages found out in the first step. `payloads` has an entry for each, or None."""

    mode: str
    said: Sequence[Said]
    output: Meta
    payloads: Sequence[Payload | None]

    def check_targets(self, stage: int, now: list[Target]) -> None:
        """Raise where another layer is to be trained than in the first step, or of another size."""
        before = self.said[stage].targets
        if now != before:
            raise ValueError(
                f"{WHERE}: the layers that train must be those of the first step, "
                f"{_described(before)}, got {_described(now)}; call forget() on all stages before "
                "others"
            )

    def asked(self, dfa: DFA, stage: int) -> dict[int, Asked]:
        """What signals every stage needs that is sent them, and `stage`; anew for every step.

        A normalization may change in training.
        """
        wanted = {
            other: _asked(dfa, one, self.output)
            for other, (one, payload) in enumerate(zip(self.said, self.payloads, strict=True))
            if one.targets and (other == stage or (payload and payload.layers))
        }
        for payload in self.payloads:
            if payload is not None and payload.layers is not None:
                ours = [wanted[other] for other in payload.stages]
                check_same(f"what stages {payload.stages} share", ours[:1] * len(ours), ours)
        return wanted


def agree(
    dfa: DFA,
    links: Links,
    settings: dict[str, Any],
    send: str | None,
    replicas: dist.ProcessGroup | None,
    output: Any,
) -> Agreement:
    """Find out what the other stages train and with which settings, which are to be equal.

    `output` is what this stage's module returned, and `replicas` the processes that have the same
    stage, if there are several. Every stage calls it.
    """
    is_last = links.stage == links.stages - 1
    targets = dfa.targets()
    lean = any(item.factor is not None for item in dfa._group.items())
    parts = [f"dfa_layers[{one.dfa_layer}]" for one in targets if one.layout is not None]
    if is_last and layout_of(WHERE, "output", output) is not None:
        parts.append("the output")
    whole = [target._replace(layout=None) for target in targets]
    meta = Meta.of(output) if is_last else None
    said: list[Said] = links.gather(Said(settings, whole, lean, meta, parts))
    for stage, one in enumerate(said):
        if one.parts:
            raise ValueError(
                f"{WHERE}: points and output must be whole in each process, got parts on stage "
                f"{stage}: {', '.join(one.parts)}; make their modules' outputs whole with "
                "output_layouts=Replicate()"
            )
    _check_settings("stages", [one.settings for one in said])
    if replicas is not None:
        others: list[Any] = [None] * dist.get_world_size(replicas)
        dist.all_gather_object(others, settings, replicas)
        _check_settings("replicas", others)
    for one in said:
        for target in one.targets:
            dfa.dfa_layers[target.dfa_layer]._size = split_target(target)[1]
    last = said[-1].output
    assert last is not None
    if not is_last:
        dfa._group.error_size = math.prod(split_shape(last.shape, dfa.batch_dims, WHERE)[1])
    payloads = _payloads(dfa, said, last, send)
    links.prepare([one.stages for one in dict.fromkeys(payloads) if one is not None])
    return Agreement(dfa.mode, said, last, payloads)


def check_same(what: str, before: Sequence[Any], now: Sequence[Any]) -> None:
    """Raise where something is no longer as in the first step."""
    if [*before] != [*now]:
        raise ValueError(
            f"{WHERE}: {what} must be as in the first step, {[*before]}, got {[*now]}; call "
            "forget() on all stages before a change"
        )


def _payloads(
    dfa: DFA, said: Sequence[Said], output: Meta, send: str | None
) -> list[Payload | None]:
    """What every stage is sent; what several are sent alike is one payload."""
    kinds = [_kind(dfa, one, output, send) if one.targets else None for one in said[:-1]]
    payloads: dict[Any, Payload] = {}
    for kind in kinds:
        if kind is not None:
            stages = tuple(stage for stage, other in enumerate(kinds) if other == kind)
            payloads[kind] = Payload(stages, *kind)
    return [*map(payloads.get, kinds), None]


def _kind(
    dfa: DFA, one: Said, output: Meta, send: str | None
) -> tuple[Layers | None, tuple[Meta, ...]]:
    """What a stage is sent: the layers of its signals, or None and the error."""
    batch, rest = split_shape(output.shape, dfa.batch_dims, WHERE)
    rows, n = math.prod(batch), math.prod(rest)
    error = (Meta(torch.Size([rows, n]), output.dtype),)
    layers, dtype = _asked(dfa, one, output)
    ready = tuple(Meta(torch.Size([rows, size]), dtype) for size in layers.sizes)
    weights = isinstance(dfa.source, OutputWeights)
    if weights and send == "error":
        raise ValueError(
            f"{WHERE}: send must be 'signals' or None where OutputWeights makes them, since the "
            "last stage alone has the weights, got 'error'"
        )
    fewer = _bytes(ready) < _bytes(error)
    if weights or send == "signals" or (send is None and fewer):
        return layers, ready
    return None, error


def _asked(dfa: DFA, one: Said, output: Meta) -> Asked:
    """The layers whose signals a stage needs, and the dtype."""
    plan = dfa.plan(one.targets, output.shape)
    return dfa.asked_for(plan, one.lean), dtype_of(plan.places, output.dtype)


def _bytes(metas: Sequence[Meta]) -> int:
    return sum(math.prod(meta.shape) * meta.dtype.itemsize for meta in metas)


def _described(targets: Sequence[Target]) -> list[tuple[int, list[int]]]:
    return [(target.dfa_layer, list(target.shape)) for target in targets]


def _check_settings(kind: str, settings: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless all stages or replicas have the same, naming the first that differs."""
    for name in dict.fromkeys(name for one in settings for name in one):
        values = [one.get(name) for one in settings]
        unlike = [stage for stage, value in enumerate(values) if value != values[0]]
        if unlike:
            raise ValueError(
                f"{WHERE}: {name} must be the same on all {kind}, got {values[unlike[0]]!r} on "
                f"{kind} {unlike} and {values[0]!r} on the first"
            )
