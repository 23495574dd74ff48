"""Runs of `python -m dfa_kernels bench` and of `benchmarks.training_step` as Markdown tables."""

from __future__ import annotations

from benchmarks.harness.roofs import BEYOND_CACHES, bandwidth
from benchmarks.harness.shapes import TITLES
from benchmarks.report.results import best_of_ours, fastest_stored, memory, ratio
from benchmarks.report.texts import bytes_text, time_text, times_text


def comparison(measured: dict, cases: list[dict]) -> list[str]:
    """Our fastest backend in every case: its time, its limit, how many times faster it is."""
    cases = [case for case in cases if best_of_ours(case)]
    rivals = [
        name
        for name in TITLES
        if any(name in (*case["contenders"], *case["left_out"]) for case in cases)
    ]
    titles = ["case", "ours", "time", "of its limit, which is"]
    with_stored = any(map(fastest_stored, cases))
    titles += ["fastest stored"] * with_stored + [TITLES[name] for name in rivals]
    lines = [f"| {' | '.join(titles)} |", "|---|---|---:|---|" + "---:|" * (len(titles) - 4)]
    for case in cases:
        ours = best_of_ours(case)
        row = case["contenders"][ours]
        cells = [case["case"], f"`{ours}`", time_text(row["seconds"])]
        cells.append(f"{row['fraction_of_bound']:.0%}, {row['limit']}")
        cells += [than_fastest_stored(case, ours)] * with_stored
        cells += [faster(case, ours, rival) for rival in rivals]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", rounds(measured, cases)]


def rounds(measured: dict, cases: list[dict]) -> str:
    """How many rounds the medians of a table are of, and of which run."""
    counts = [row["rounds"] for case in cases for row in case["contenders"].values()]
    least, most = min(counts), max(counts)
    many = f"{least}" if least == most else f"{least} to {most}"
    return f"Medians of {many} rounds of a {'full' if measured['full'] else 'quick'} run."


def than_fastest_stored(case: dict, ours: str) -> str:
    """How many times faster `ours` is than the fastest contender that keeps a matrix, and which."""
    rival = fastest_stored(case)
    return f"{faster(case, ours, rival)}, {TITLES[rival]}" if rival else ""


def faster(case: dict, ours: str, rival: str) -> str:
    """How many times faster `ours` is, or why that is not known."""
    times = ratio(case, ours, rival)
    if times is not None:
        return times_text(times)
    why = case["left_out"].get(rival, {})
    if why.get("reason") == "does not fit into memory":
        return f"{bytes_text(why['stored_bytes'])} do not fit"
    return f"over {time_text(why['least_seconds'])}" if "least_seconds" in why else ""


def bench_networks(measured: dict) -> list[str]:
    """`bench_networks.py`: every network's signals against what they replace."""
    return comparison(measured, [case for case in measured["cases"] if _is_network(case)])


def bench_layer(measured: dict) -> list[str]:
    """One large layer by batch, dtype and distribution."""
    single = [case for case in measured["cases"] if case["layers"] == 1 and not case["matrix"]]
    by_batch = [case for case in single if (case["series"] or "batch").startswith("batch")]
    return comparison(measured, by_batch)


def bench_sweeps(measured: dict) -> list[str]:
    """The rest of `bench_sweeps.py`: as the error, the layer and the number of layers grow."""
    others = ("n", "size", "layers")
    return comparison(measured, [case for case in measured["cases"] if case["series"] in others])


def bench_matrix(measured: dict) -> list[str]:
    """`bench_matrix.py`: the matrix itself."""
    return comparison(measured, [case for case in measured["cases"] if case["matrix"]])


def bench_memory(measured: dict) -> list[str]:
    """Matrices and the most that a call takes, signals included; in parentheses, matrices alone."""
    lines = [
        f"| network | from the seed | {TITLES['stored']} | {TITLES['naive']} |",
        "|---|---:|---:|---:|",
    ]
    for case in measured["cases"]:
        if not _is_network(case) or case["graph"]:
            continue
        cells = [case["case"]]
        for name in (best_of_ours(case), "stored", "naive"):
            row, why = case["contenders"].get(name), case["left_out"].get(name, {})
            if row is not None and row["peak_bytes"] is not None:
                cells.append(bytes_text(memory(row)))
            else:
                cells.append(
                    f"({bytes_text(why['stored_bytes'])})" if "stored_bytes" in why else ""
                )
        lines.append(f"| {' | '.join(cells)} |")
    return lines + _largest_layer(measured)


def _largest_layer(measured: dict) -> list[str]:
    """A sentence on the largest layer of the sweep over sizes."""
    case = max(
        (case for case in measured["cases"] if case["series"] == "size"),
        key=lambda case: case["x"],
        default=None,
    )
    ours = case and best_of_ours(case)
    if not ours:
        return []
    row = case["contenders"][ours]
    extra = max(row["peak_bytes"] - case["signal_bytes"], 0) / 2**20
    stored = 4 * case["largest"] * case["n"]
    return [
        "",
        f"A layer of {case['largest']:,} with n = {case['n']:,} and M = {case['batch']} takes "
        f"{time_text(row['seconds'])} and {extra:.1f} MiB beyond its signal; the stored fp32 "
        f"matrix would take {bytes_text(stored)}.",
    ]


def bench_machine(measured: dict) -> list[str]:
    """The machine's best rates, in one sentence for each number of threads."""
    lines = []
    for roofs in measured["roofs"].values():
        written = {int(size): rate for size, rate in roofs["write"].items()}
        write = bandwidth(written, BEYOND_CACHES)
        products = ", ".join(f"{2 * r / 1e12:.3g} in {n}" for n, r in roofs["multiply"].items())
        kinds = ("normal", "uniform", "rademacher")
        made = [source for name, source in roofs["generation"].items() if name != "torch.randn"]
        entries = ", ".join(f"{max(s.get(kind, 0.0) for s in made):.2g} {kind}" for kind in kinds)
        threads = f", {roofs['threads']} thread" + "s" * (roofs["threads"] > 1)
        threads = threads if roofs["device_type"] == "cpu" else ""
        lines.append(
            f"- this machine{threads}: {write / 1e9:.0f} GB/s written, TFLOP/s: {products}; "
            f"entries made and used a second: {entries}"
        )
    return lines


def _is_network(case: dict) -> bool:
    return case["layers"] > 1 and not case["series"]


def training_step(measured: dict) -> list[str]:
    """`benchmarks/training_step.py`: a step by DFA as a fraction of one by backpropagation."""
    lines = [
        "| network | backpropagation | DFA | of it | a free projection would make it |",
        "|---|---:|---:|---:|---:|",
    ]
    for case in measured["cases"]:
        lines.append(
            f"| {case['case']}, batch {case['batch']} | {1e3 * case['seconds']['backprop']:.0f} ms "
            f"| {1e3 * case['seconds']['DFA']:.0f} ms | {case['ratio']['DFA']:.2f} "
            f"| {case['limit']:.2f} |"
        )
    return lines
