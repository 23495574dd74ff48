"""Markdown tables of training on several processes, a function for each table."""

from __future__ import annotations


def communication(measured: dict) -> list[str]:
    """What a process sends in a step, by kind of parallelism."""
    model = measured["model"]
    lines = [
        "| parallelism | forward, both | backward, backpropagation | backward, DFA |",
        "|---|---|---|---|",
    ]
    for one in measured["kinds"]:
        (forward, theirs), (_, ours) = one["backprop"], one["DFA"]
        cells = (one["kind"], *map(_collectives, (forward, theirs, ours)))
        lines.append(f"| {' | '.join(cells)} |")
    about = (
        f"{measured['processes']} processes; {measured['tokens']} tokens in fp32, "
        f"{model['layers']} blocks of width {model['width']}, {model['vocabulary']:,} words, "
        f"{model['parameters'] / 1e6:.1f} million parameters."
    )
    return [*lines, "", about]


def _collectives(found: dict) -> str:
    total = sum(found["bytes"].values()) / 1e6
    calls = [
        f"{count} {name.replace('_', '-')}{'s' * (count > 1)}"
        for name, count in sorted(found["calls"].items())
    ]
    return f"{total:.1f} MB: {', '.join(calls)}" if calls else "nothing"


def pipeline_simulated(measured: dict) -> list[str]:
    """Stages that sleep."""
    lines = [
        "| microbatches | schedule | a step | by formula | bubble | by formula |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for one in measured["simulated"]:
        times = [f"{1e3 * one[name]:.0f} ms" for name in ("seconds", "seconds by formula")]
        parts = [f"{one[name]:.1%}" for name in ("bubble", "bubble by formula")]
        cells = (str(one["microbatches"]), _schedule(one["way"]), *times, *parts)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"{measured['stages']} stages on as many processes."]


def pipeline_real(measured: dict) -> list[str]:
    """Stages that compute, and share the cores."""
    lines = ["| network | microbatches | schedule | a step |", "|---|---:|---|---:|"]
    for one in measured["real"]:
        seconds = f"{1e3 * one['seconds']:.0f} ms"
        cells = (one["case"], str(one["microbatches"]), _schedule(one["way"]), seconds)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pipeline_plan(measured: dict) -> list[str]:
    """More stages than there are here, by formula."""
    ways = [*measured["plan"][0]["bubble"]]
    head = " | ".join(map(_schedule, ways))
    lines = [f"| stages | microbatches | {head} |", "|---:|---:|" + "---:|" * len(ways)]
    for one in measured["plan"]:
        parts = [f"{one['bubble'][way]:.0%}, {one['faster'][way]:.2f}x" for way in ways]
        lines.append(f"| {one['stages']} | {one['microbatches']} | {' | '.join(parts)} |")
    return [*lines, "", "The bubble, and how many times 1F1B's speed; B = 2 F."]


def pipeline_sent(measured: dict) -> list[str]:
    """Bytes for a microbatch."""
    kinds = [*next(iter(measured["sent"].values()))]
    lines = [f"| network | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    for name, sent in measured["sent"].items():
        cells = [f"{sent[kind] / 1e6:,.1f} MB" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"Received for a microbatch by all of {measured['stages']} stages together.",
    ]


def _schedule(way: str) -> str:
    return {"with ahead": "FeedbackStage, `ahead`"}.get(way, way)
