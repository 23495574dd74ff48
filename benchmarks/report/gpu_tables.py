"""Markdown tables of what was measured on a GPU: ways of a projection, checks and profiles.

Each function takes what the JSON of a run holds and returns lines.
"""

from __future__ import annotations

from benchmarks.report.texts import rate_text, time_text, times_text

CHOICES = ("cuda", "triton")  # a backend's own choice goes by the backend's name
OPERANDS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
FEW = 128  # up to this batch, kernels of few rows take less time than the host takes to call them


def gpu_ways(measured: dict) -> list[str]:
    """The best way of every batch at the largest matrix, beside the stored one.

    Then what calls of few rows take, if any were measured.
    """
    largest = max(_entries(timed) for timed in measured["timed"])
    found = [timed for timed in measured["timed"] if _entries(timed) == largest]
    chosen = [name for name in CHOICES if any(name in timed["seconds"] for timed in found)]
    titles = ["error", "entries", "M", "best", "time", "entries of U", "stored matrix"]
    titles += [f"`{name}` chooses" for name in chosen]
    lines = [f"| {' | '.join(titles)} |", "|---|---|---:|---|" + "---:|" * (len(titles) - 4)]
    for timed in found:
        known = {name: time for name, time in timed["seconds"].items() if time}
        stored = known.pop("stored", None)
        cells = [operand(timed), timed["distribution"], f"{timed['batch']:,}"]
        if known:
            best = min(known, key=known.__getitem__)
            cells += [best, time_text(known[best]), rate_text(largest / known[best])]
            cells.append(times_text(stored / known[best]) if stored else "not run")
        else:
            cells += ["not measured", "", "", ""]
        cells += [time_text(known[name]) if name in known else "" for name in chosen]
        lines.append(f"| {' | '.join(cells)} |")
    rows, columns = found[0]["rows"], found[0]["columns"]
    return [*lines, "", f"U has {rows:,} x {columns:,} entries.", *_few_rows(measured, chosen)]


def _few_rows(measured: dict, chosen: list[str]) -> list[str]:
    """A sentence on calls whose time is that of the host."""
    rows = min(timed["rows"] for timed in measured["timed"])
    if rows == max(timed["rows"] for timed in measured["timed"]):
        return []
    few = [one for one in measured["timed"] if one["rows"] == rows and one["batch"] <= FEW]
    few = [one for one in few if one["dtype"] == "bfloat16"]
    taken = []
    for name in (*chosen, "stored"):
        times = [time for one in few if (time := one["seconds"].get(name))]
        if times:
            title = "the stored matrix" if name == "stored" else f"`{name}`"
            taken.append(f"{title} {1e6 * min(times):.0f} to {1e6 * max(times):.0f} us")
    if not taken:
        return []
    return [
        "",
        f"Small shapes are bound by the host's time of a call, not by the GPU. With {rows:,} rows, "
        f"a bf16 error and M up to {FEW}, a call takes about as long whatever M is: "
        f"{', '.join(taken)}. So they are not in the table.",
    ]


def operand(timed: dict) -> str:
    """The error's dtype, and of fp32 the precision of its products."""
    name = OPERANDS[timed["dtype"]]
    return f'{name}, "{timed["precision"]}"' if name == "fp32" else name


def _entries(timed: dict) -> int:
    return timed["rows"] * timed["columns"]


def gpu_check(measured: dict) -> list[str]:
    """Each step of `make gpu-check`: how it ended and how long it took."""
    lines = ["| step | ended | seconds |", "|---|---|---:|"]
    for step in measured["steps"]:
        lines.append(f"| {step['name']} | {step['ended']} | {step['seconds']:.0f} |")
    return lines


def gpu_profile(measured: dict) -> list[str]:
    """What Nsight Compute counted of each kernel: its three busiest pipes and greatest waits."""
    lines = [
        "| kernel | time | warps a scheduler | issue slots busy | busiest pipes | warps wait for |",
        "|---|---:|---:|---:|---|---|",
    ]
    for kernel in measured["kernels"]:
        total = sum(kernel["samples"].values())
        waits = {name: count / total for name, count in kernel["samples"].items()}
        waits.pop("selected", None)  # issued an instruction
        cells = [kernel["kernel"], time_text(kernel["seconds"]), f"{kernel['warps']:.1f}"]
        cells.append(f"{kernel['issue_slots']:.0f}%")
        cells.append(_greatest({name: share / 100 for name, share in kernel["pipes"].items()}))
        cells.append(_greatest(waits))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _greatest(shares: dict[str, float]) -> str:
    """The three greatest shares and their names."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in ordered)
