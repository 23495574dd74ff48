"""Markdown tables of `python -m dfa_kernels bench` and `python -m benchmarks.training_step`.

Each function takes what the JSON of a run holds and returns lines, or none where the run has no
such case.
"""

from __future__ import annotations

from benchmarks.harness.measure import MISSING
from benchmarks.harness.race import NO_ROOM, OUT_OF_MEMORY, TOO_LONG
from benchmarks.harness.roofs import BEYOND_CACHES, addition_rate, bandwidth
from benchmarks.harness.shapes import STRUCTURED, TITLES, title
from benchmarks.report.results import best_of_ours, fastest_stored, memory, ratio
from benchmarks.report.texts import bytes_text, promise_text, rate_text, time_text, times_text

GROWING = ("n", "size", "layers")  # the sweeps of bench_sweeps.py beside that over the batch


def comparison(measured: dict, cases: list[dict]) -> list[str]:
    """Our fastest backend in every case: its time, its limit, how many times faster it is.

    Then the same of the structured projection, and how many times faster than the other it is.
    """
    cases = [case for case in cases if best_of_ours(case)]
    if not cases:
        return []
    rivals = rivals_in(cases)
    titles = ["case", "ours", "time", "of roofline, bound by"]
    with_structured = any(STRUCTURED in case["contenders"] for case in cases)
    titles += ["dense"] * with_structured
    with_stored = any(map(fastest_stored, cases))
    titles += ["fastest stored"] * with_stored + [TITLES[name] for name in rivals]
    lines = [f"| {' | '.join(titles)} |", "|---|---|---:|---|" + "---:|" * (len(titles) - 4)]
    for case in cases:
        dense = best_of_ours(case)
        for ours in (dense, STRUCTURED):
            row = case["contenders"].get(ours)
            if row is None:
                continue
            by = f"`{dense}`" if ours == dense else f"`{row['work']['source']}`, structured"
            cells = [case["case"], by, time_text(row["seconds"])]
            cells.append(f"{row['fraction_of_bound']:.0%}, {row['limit']}")
            than_dense = "" if ours == dense else faster(case, ours, dense)
            cells += [than_dense] * with_structured
            cells += [than_fastest_stored(case, ours)] * with_stored
            cells += [faster(case, ours, rival) for rival in rivals]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", rounds(measured, cases)]


def headline(measured: dict) -> list[str]:
    """Networks in short: time and limit of both kinds of matrices, and both against each rival.

    Each with the largest of its batches.
    """
    networks = [case for case in measured["cases"] if _is_network(case)]
    networks.sort(key=lambda case: case["batch"])
    largest = {(case["layers"], case["units"], case["n"]): case for case in networks}
    found = [case for case in measured["cases"] if case in largest.values()]
    cases = [case for case in found if best_of_ours(case) and STRUCTURED in case["contenders"]]
    if not cases:
        return []
    rivals = rivals_in(cases)
    titles = ["case", "dense", "of roofline", "structured", "of roofline", "structured faster by"]
    titles += [TITLES[name] for name in rivals]
    lines = [f"| {' | '.join(titles)} |", "|---|---:|---|---:|---|" + "---:|" * (len(rivals) + 1)]
    for case in cases:
        dense, cells = best_of_ours(case), [case["case"]]
        for ours in (dense, STRUCTURED):
            row = case["contenders"][ours]
            limit = row["limit"].removesuffix(" bandwidth")
            cells += [time_text(row["seconds"]), f"{row['fraction_of_bound']:.0%}, {limit}"]
        cells.append(faster(case, STRUCTURED, dense))
        for rival in rivals:
            both = [faster(case, ours, rival) for ours in (dense, STRUCTURED)]
            cells.append(", ".join(dict.fromkeys(both)))  # once, if it was not timed
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", rounds(measured, cases)]


def rivals_in(cases: list[dict]) -> list[str]:
    """The rivals that take part in any of the cases, or were left out of it."""
    return [
        name
        for name in TITLES
        if any(name in (*case["contenders"], *case["left_out"]) for case in cases)
    ]


def rounds(measured: dict, cases: list[dict]) -> str:
    """How many rounds each median is taken over, and whether the run was quick or full."""
    counts = [row["rounds"] for case in cases for row in case["contenders"].values()]
    least, most = min(counts), max(counts)
    many = f"{least}" if least == most else f"{least} to {most}"
    return f"Medians of {many} rounds of a {'full' if measured['full'] else 'quick'} run."


def than_fastest_stored(case: dict, ours: str) -> str:
    """How many times faster `ours` is than the fastest contender with a stored matrix; its name."""
    rival = fastest_stored(case)
    return f"{faster(case, ours, rival)}, {TITLES[rival]}" if rival else ""


def faster(case: dict, ours: str, rival: str) -> str:
    """How many times faster `ours` is, or why `rival` was not timed."""
    times = ratio(case, ours, rival)
    if times is not None:
        return times_text(times)
    why = case["left_out"].get(rival)
    if why is None:
        return ""
    if why["reason"] in (NO_ROOM, OUT_OF_MEMORY):
        return f"{bytes_text(why['stored_bytes'])} do not fit"
    return f"over {time_text(why['least_seconds'])}" if why["reason"] == TOO_LONG else "not run"


def bench_networks(measured: dict) -> list[str]:
    """Several layers, mostly networks that people have, against what the kernels replace."""
    return comparison(measured, [case for case in measured["cases"] if _is_network(case)])


def bench_layer(measured: dict) -> list[str]:
    """One large layer, by batch size."""
    return comparison(measured, [case for case in measured["cases"] if case["series"] == "batch"])


def bench_precisions(measured: dict) -> list[str]:
    """One layer with other dtypes, distributions or lengths of the error."""
    outside = [case for case in measured["cases"] if case["series"] not in ("batch", *GROWING)]
    one = [case for case in outside if case["layers"] == 1 and not case["matrix"]]
    return comparison(measured, one)


def bench_sweeps(measured: dict) -> list[str]:
    """As the error, the layer or the number of layers grows."""
    return comparison(measured, [case for case in measured["cases"] if case["series"] in GROWING])


def bench_matrix(measured: dict) -> list[str]:
    """The matrix itself, from `feedback_matrix`."""
    return comparison(measured, [case for case in measured["cases"] if case["matrix"]])


def bench_memory(measured: dict) -> list[str]:
    """Matrices, and the peak of a call beyond them, signals included.

    In parentheses the matrices alone, where nothing was run.
    """
    lines = []
    networks = [case for case in measured["cases"] if _is_network(case) and not case["graph"]]
    with_structured = any(STRUCTURED in case["contenders"] for case in networks)
    beside = [STRUCTURED] * with_structured
    for case in networks:
        cells = [case["case"]]
        for name in (best_of_ours(case), *beside, "stored", "naive"):
            row, why = case["contenders"].get(name), case["left_out"].get(name, {})
            if row is not None and row["peak_bytes"] is not None:
                cells.append(bytes_text(memory(row)))
            else:
                cells.append(
                    f"({bytes_text(why['stored_bytes'])})" if "stored_bytes" in why else ""
                )
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    titles = ["network", "from the seed", *beside, TITLES["stored"], TITLES["naive"]]
    rule = "|---|" + "---:|" * (len(titles) - 1)
    return [f"| {' | '.join(titles)} |", rule, *lines, *_largest_layer(measured)]


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
        f"{time_text(row['seconds'])} and {extra:.1f} MiB beyond its signal. The stored fp32 "
        f"matrix would take {bytes_text(stored)}.",
    ]


def bench_promises(measured: dict) -> list[str]:
    """Each promised ratio, what was reached, and what was asked."""
    lines = []
    for case in measured["cases"]:
        for promise in case["promises"]:
            value, rival = promise["reached"], promise["rival"]
            cells = [case["case"], f"`{promise['ours']}`", title(rival)]
            cells.append(promise_text(rival, promise["at_least"]))
            cells.append("not measured" if value is None else promise_text(rival, value))
            lines.append(f"| {' | '.join(cells)} |")
    titles = ["| case | ours | rival | promised at least | reached |", "|---|---|---|---:|---:|"]
    return [*titles, *lines] if lines else []


def bench_machine(measured: dict) -> list[str]:
    """The roofs: the best rates seen in this run, for each number of threads."""
    every = measured["roofs"].values()
    kinds = dict.fromkeys(kind for roofs in every for kind in roofs["multiply"])
    sources = [rates for roofs in every for rates in roofs["generation"].values()]
    distributions = dict.fromkeys(name for rates in sources for name in rates)
    titles = ["threads", "a call", "written", "moved"]
    titles += [f"products in {kind}" for kind in kinds]
    with_additions = any("addition" in roofs for roofs in every)
    titles += ["additions"] * with_additions
    titles += [f"{distribution} entries" for distribution in distributions]
    lines = [f"| {' | '.join(titles)} |", "|" + "---:|" * len(titles)]
    for roofs in every:
        cells = [str(roofs["threads"]), time_text(roofs["latency"]["call"])]
        for moved in ("write", "memory"):
            rates = {int(size): rate for size, rate in roofs[moved].items()}
            cells.append(f"{bandwidth(rates, BEYOND_CACHES) / 1e9:.0f} GB/s")
        cells += [f"{2 * roofs['multiply'][kind] / 1e12:.3g} TFLOP/s" for kind in kinds]
        if with_additions:
            cells.append(rate_text(addition_rate(roofs["multiply"], roofs["addition"])))
        made = [rates for name, rates in roofs["generation"].items() if name != "torch.randn"]
        for distribution in distributions:
            cells.append(rate_text(max(rates.get(distribution, 0.0) for rates in made)))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _is_network(case: dict) -> bool:
    return case["layers"] > 1 and not case["series"]


WAYS = {  # of training, by their names in the JSON
    "backprop": "backpropagation",
    "shallow": "the last layer alone",
    "DFA, matrix=": "DFA, stored matrix",
    "DFA": "DFA, from the seed",
    "DFA, lean": "DFA, from the seed, lean",
    "DFA, uniform": "DFA, from the seed, uniform",
    "DFA, rademacher": "DFA, from the seed, +-1",
    "DFA, hadamard": "DFA, from the seed, structured",
}


def way_text(way: str) -> str:
    """A way of training, which may be compiled, by its name in the JSON."""
    name, *compiled = way.partition(", compiled")
    return "".join((WAYS[name], *compiled))


def training_step(measured: dict) -> list[str]:
    """A training step each way, as a fraction of one by backpropagation."""
    lines = [
        "| network | trained by | a step | of backpropagation | memory |",
        "|---|---|---:|---:|---:|",
    ]
    for case in measured["cases"]:
        network = f"{case['case']}, batch {case['batch']}"
        peaks = case.get("peak_bytes", {})
        for way, seconds in case["seconds"].items():
            fraction = f"{case['ratio'][way]:.2f}" if way in case["ratio"] else ""
            cells = [network, way_text(way), time_text(seconds), fraction]
            lines.append(f"| {' | '.join((*cells, bytes_text(peaks.get(way))))} |")
        for way, reason in case.get("left_out", {}).items():
            why = reason if reason == MISSING else "not run"
            lines.append(f"| {network} | {way_text(way)} | {why} |  |  |")
        lines.append(f"| {network} | DFA, if projecting were free |  | {case['limit']:.2f} |  |")
    if any("compiled" in way for case in measured["cases"] for way in case["seconds"]):
        lines += ["", "A compiled step is a fraction of a compiled one of backpropagation."]
    return lines
