"""Markdown tables of `python -m benchmarks.large_vocabulary`, a function for each table."""

from __future__ import annotations

from benchmarks.report.texts import bytes_text, peak, time_text, times_text

SIGNALS = {  # by their names in the JSON
    "backprop": "backpropagation",
    "hadamard": "DFA, structured",
    "normal": "DFA, normal entries",
    "uniform": "DFA, uniform entries",
    "rademacher": "DFA, entries of +-1",
    "output weights": "DFA, `OutputWeights`",
}


def large_vocabulary(measured: dict) -> list[str]:
    """A step with whole logits and one in chunks, by tokens and by what makes the signals."""
    lines = [
        "| tokens | logits | trained by | whole | memory | in chunks | memory | faster by "
        "| products alone |",
        "|---:|---:|---|" + "---:|" * 6,
    ]
    for case in measured["cases"]:
        tokens, logits = f"{case['tokens']:,}", bytes_text(case["logit_bytes"])
        for whole, chunks in pairs(case):
            cells = [tokens, logits, SIGNALS[whole["signals"]]]
            for row in (whole, chunks):
                cells += [time_text(row["seconds"]) if "seconds" in row else "", peak(row)]
            both = "seconds" in whole and "seconds" in chunks
            cells.append(times_text(whole["seconds"] / chunks["seconds"]) if both else "")
            timed = chunks if "seconds" in chunks else whole
            cells.append(time_text(limit(timed, measured)) if "seconds" in timed else "")
            lines.append(f"| {' | '.join(cells)} |")
            tokens = logits = ""
    return [*lines, "", _about(measured)]


def pairs(case: dict) -> list[tuple[dict, dict]]:
    """The rows of whole logits and of chunks, by what makes the signals."""
    rows = {(row["signals"], row["loss"]): row for row in case["ways"]}
    names = dict.fromkeys(signals for signals, _ in rows)
    return [(rows[name, "whole"], rows[name, "chunks"]) for name in names]


def limit(row: dict, measured: dict) -> float:
    """Seconds of a step's matrix products at the best rate of the run."""
    return row["products"] / measured["rate"]


def _about(measured: dict) -> str:
    counts = sorted(
        {row["rounds"] for case in measured["cases"] for row in case["ways"] if "rounds" in row}
    )
    rounds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(*counts)
    return (
        f"A vocabulary of {measured['vocabulary']:,}, width {measured['width']:,}, "
        f"{measured['branches']} points, {measured['dtype']}, {measured['threads']} threads; "
        f"medians of {rounds} steps. Products at {2 * measured['rate'] / 1e9:,.0f} GFLOP/s."
    )
