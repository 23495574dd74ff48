"""Markdown tables of the paper's experiments, from the JSON that `benchmarks.paper` writes."""

from __future__ import annotations

from benchmarks.harness import provenance
from benchmarks.report.texts import STORAGES, bytes_text, deviating, peak, time_text, way


def paper_table1(measured: dict) -> list[str]:
    """Table 1: bytes of feedback matrices, and measured peaks."""
    titles = " | peak | ".join(STORAGES.values())
    lines = [f"| network | {titles} | peak |", "|---|---:|---:|---:|---:|---:|---:|"]
    for row in measured["rows"]:
        cells = [f"{bytes_text(row[way]['stored'])} | {peak(row[way])}" for way in STORAGES]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def runs(measured: dict) -> str:
    """Seeds, epochs and the commit that trained; the table may have been made by a later one."""
    seeds, epochs = measured["rows"][0]["seeds"], measured["settings"]["epochs"]
    commits = ", ".join(map(provenance.short, measured["run_commits"]))
    return f"{seeds} seeds, {epochs} epochs, trained at commit {commits}."


def paper_practices(measured: dict) -> list[str]:
    """Tables 2 and 4: accuracy, alignment, and whether the paper's claims hold."""
    rows = {(row["practice"], row["mode"]): row for row in measured["rows"]}
    practices = dict.fromkeys(row["practice"] for row in measured["rows"])
    layers = rows[next(iter(practices)), "dfa"]["alignment"]

    def percent(practice: str, mode: str) -> str:
        if (practice, mode) not in rows:
            return ""
        accuracy = rows[practice, mode]["test_accuracy"]
        return f"{100 * accuracy['mean']:.1f} ({100 * accuracy['deviation']:.1f})"

    lines = [
        f"| {measured['data']}: test accuracy, % | BP | DFA | shallow | {' | '.join(layers)} |",
        f"|---|---:|---:|---:|{'---:|' * len(layers)}",
    ]
    for practice in practices:
        angles = rows[practice, "dfa"]["alignment"].values()
        cosines = (f"{angle['mean']:.2f} ({angle['deviation']:.2f})" for angle in angles)
        accuracies = (percent(practice, mode) for mode in ("backprop", "dfa", "shallow"))
        name = practice.replace("|", "\\|")
        lines.append(f"| {name} | {' | '.join((*accuracies, *cosines))} |")
    found: dict[str, list[str]] = {"yes": [], "no": [], "unclear": []}
    for claim in measured["claims"]:
        found[claim["holds"]].append(f"{claim['better']} over {claim['worse']}")
    names = {"yes": "As the paper says", "no": "The other way round", "unclear": "Unclear"}
    held = (f"{names[key]}: {', '.join(claims)}." for key, claims in found.items() if claims)
    return [*lines, "", f"{runs(measured)} Alignment by practice. " + " ".join(held)]


def paper_figure4(measured: dict) -> list[str]:
    """Figure 4 as a table, beside what was published for other data."""
    rows = {(row["practice"], row["mode"]): row for row in measured["rows"]}
    published, agreement = measured["published"], measured["rank_agreement"]
    data, theirs = measured["data"], published["data"]
    lines = [
        f"| b | {data}: accuracy, cos(beta) | {theirs}, as published | {data}: b units, DFA "
        "| accuracy by BP |",
        "|---:|---:|---:|---:|---:|",
    ]
    numbers = zip(
        *(published[key] for key in ("bottlenecks", "test_accuracy", "alignment")), strict=True
    )
    for size_of, accuracy, angle in numbers:
        masked, narrow = (
            f"{100 * row['test_accuracy']['mean']:.1f}, {row['alignment']['layer 2']['mean']:.3f}"
            for row in (rows[f"{kind} {size_of}", "dfa"] for kind in ("masked", "narrow"))
        )
        backprop = rows[f"narrow {size_of}", "backprop"]["test_accuracy"]["mean"]
        cells = (masked, f"{accuracy:.1f}, {angle:.3f}", narrow, f"{100 * backprop:.1f}")
        lines.append(f"| {size_of} | {' | '.join(cells)} |")
    found = {key: "none" if v is None else f"{v:+.3f}" for key, v in agreement.items()}
    ranks = f"{found['test_accuracy']} for accuracy, {found['alignment']} for alignment"
    return [
        *lines,
        "",
        f"{runs(measured)} Rank correlation with the published values over b: {ranks}.",
    ]


def paper_distributions(measured: dict) -> list[str]:
    """Distributions of U: loss, accuracy, alignment and time of a step, a table for each data."""
    lines: list[str] = []
    for part in measured["parts"]:
        layers = next(row["alignment"] for row in part["rows"] if "alignment" in row)
        lines += [""] if lines else []
        lines += [
            f"| {part['data']}, n = {part['n']:,} | test loss | test accuracy, % "
            f"| {' | '.join(layers)} | a step |",
            f"|---|---:|---:|{'---:|' * len(layers)}---:|",
        ]
        for row in part["rows"]:
            accuracy = row["test_accuracy"]
            angles = row.get("alignment", {})
            cells = (
                way(row),
                deviating(*row["test_loss"].values()),
                f"{100 * accuracy['mean']:.1f} ({100 * accuracy['deviation']:.1f})",
                *(
                    deviating(angles[layer]["mean"], angles[layer]["over_seeds"]) if angles else ""
                    for layer in layers
                ),
                time_text(row["step_seconds"]),
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", runs(part)]
    return lines


def paper_vgg16(measured: dict) -> list[str]:
    """VGG-16: peak memory and time of a training step."""
    side, batch = measured["resolution"], measured["batch"]
    lines = [
        f"| VGG-16, {side}x{side}, batch {batch} | matrices | peak memory | a step |",
        "|---|---:|---:|---:|",
    ]
    for row in measured["rows"]:
        seconds = f"{row['seconds']:.2f} s" if "seconds" in row else ""
        lines.append(f"| {row['name']} | {bytes_text(row['stored'])} | {peak(row)} | {seconds} |")
    return lines
