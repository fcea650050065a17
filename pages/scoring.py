"""Tables and targets from the figures of `benchmarks.scoring`, and how tables get into a page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGE = 151_936


def find(cpu: dict[str, Any], label: str, **where: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(comparison, row) of a method wherever it ran under these conditions, the most tokens first."""
    for c in sorted(cpu["comparisons"], key=lambda c: -c["tokens"]):
        row = c["methods"].get(label)
        if row and "left_out" not in row and all(c[key] == value for key, value in where.items()):
            yield c, row


def ratios(cpu: dict[str, Any], label: str, other: str, key: str, **where: Any) -> Iterator[tuple[str, float]]:
    """(conditions, label / other) of every comparison that holds both."""
    for c, row in find(cpu, label, **where):
        second = c["methods"].get(other, {})
        if key in row and key in second:
            yield f"{c['dtype']}, V = {c['vocabulary']:,}, N = {c['tokens']:,}", row[key] / second[key]


EXACT = "exact TV, logsumexps known"

#: claim, a method over another, which figure, at most; conditions
TARGETS: tuple[tuple[str, str, str, str, float, dict[str, Any]], ...] = (
    ("memory / naive", "ours", "naive", "peak_mib", 0.1, {"vocabulary": LARGE}),
    ("memory / naive", "ours", "naive, float32 products", "peak_mib", 0.1, {"vocabulary": LARGE}),
    ("time / naive", "ours", "naive", "seconds", 0.5, {"dtype": "bfloat16"}),
    ("time / naive, float32 products", "ours", "naive, float32 products", "seconds", 0.5, {"dtype": "bfloat16"}),
    ("time / naive", "ours", "naive", "seconds", 1.1, {"dtype": "float32"}),
    ("20 ids, entropy, logsumexp / log-prob only", "ours", "ours, log-prob only", "seconds", 1.05, {}),
    ("the same, forward alone", "forward, all", "forward, log-prob", "seconds", 1.05, {}),
    ("own top 20 / a scoring pass", "forward, own top 20", "forward, log-prob", "seconds", 1.3, {}),
    (
        "exact TV (logsumexps known), time / naive",
        EXACT,
        "naive exact TV",
        "seconds",
        0.5,
        {},
    ),
    ("the same / naive, float32 products", EXACT, "naive exact TV, float32 products", "seconds", 0.5, {}),
    ("exact TV, memory / naive", EXACT, "naive exact TV", "peak_mib", 0.02, {"vocabulary": LARGE}),
    ("adaptive TV / top-K TV, forward alone", "adaptive TV", "top-K TV", "seconds", 1.25, {}),
    ("the same, short tails", "adaptive TV, short tails", "top-K TV, short tails", "seconds", 1.25, {}),
)


def targets(cpu: dict[str, Any]) -> list[dict[str, Any]]:
    """Every claim at every setting where it was measured."""
    rows = [
        {"claim": claim, "where": where, "value": value, "at_most": limit, "met": value <= limit}
        for claim, label, other, key, limit, conditions in TARGETS
        for where, value in ratios(cpu, label, other, key, **conditions)
    ]
    sizes = {c["tokens"]: row["peak_mib"] for c, row in find(cpu, "ours", dtype="float32", vocabulary=32_768)}
    if len(sizes) > 1:
        few, many = min(sizes), max(sizes)
        value, claim = sizes[many] / sizes[few], f"memory at N = {many:,} / N = {few:,}"
        rows.append(
            {"claim": claim, "where": "float32, V = 32,768", "value": value, "at_most": 1.25, "met": value <= 1.25}
        )
    return rows


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _quantiles(row: dict[str, Any]) -> str:
    """How large the divergences were, on which the share of resolved tokens depends."""
    found = row.get("tv_quantiles", {})
    text = "exact TV " + ", ".join(f"{value:.2g} at {name.upper()}" for name, value in found.items())
    return text + (f"; {row['tail']:.2g} of mu outside its top 20" if "tail" in row else "")


def comparison_table(c: dict[str, Any]) -> list[str]:
    """One comparison; times relative to its first method that was timed."""
    rows = c["methods"]
    first = next(iter(rows))
    base = rows[first].get("seconds")
    naive: dict[bool, dict[str, Any]] = {
        of_tv: next((rows[n] for n in (name, f"{name}, float32 products") if n in rows), {})
        for of_tv, name in ((False, "naive"), (True, "naive exact TV"))
    }
    lines = [
        f"**{c['dtype']}, V = {c['vocabulary']:,}, N = {c['tokens']:,}, d = {c['width']:,}**",
        "",
        f"| | gives | seconds | / {first} | MiB | / naive | error | of the gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, row in rows.items():
        if "left_out" in row:
            lines.append(f"| {label} | {row['gives']} | {row['left_out']} | | | | | |")
            continue
        seconds = row.get("seconds")
        theirs = naive[row["gives"] == "TV"].get("peak_mib")
        memory = row["peak_mib"] / theirs if theirs else None
        cells = [
            label,
            row["gives"],
            _number(seconds),
            _number(seconds / base if seconds and base else None, ".2f"),
            _number(row["peak_mib"], ",.0f"),
            _number(memory, ".3f"),
            _number(row.get("error"), ".1e"),
            _number(row.get("gradient_error"), ".1e"),
        ]
        if "resolved_fraction" in row:
            cells[1] += f" ({row['resolved_fraction']:.1%} of the tokens resolved; {_quantiles(row)})"
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


#: What a training step asks for, in the words of docs/divergences.md.
COST_ROWS = {
    "forward, log-prob": "log-probability alone (`binary_*`)",
    "forward, all": "with 20 ids, entropy, logsumexp (`topk_*`)",
    "forward, own top 20": "with the policy's own top 20 (mu's side of `topk_*`)",
    "top-K TV": "`topk_tv`: scoring, interval and CPPO's verdict",
    "adaptive TV": "`adaptive_tv`: the same, resolved where it decides",
    "exact TV, logsumexps known": "`exact_tv`, after scoring: both logsumexps known",
    "exact TV": "`exact_tv` by itself: neither known",
    "naive exact TV": "`exact_tv` from full logits",
    "naive exact TV, float32 products": "`exact_tv` from full logits, float32 products",
}


def cost_table(cpu: dict[str, Any]) -> str:
    """Time relative to scoring one log-probability without gradient, and memory, of what the divergences need."""
    lines = []
    for c in cpu["comparisons"]:
        base = c["methods"].get("forward, log-prob", {}).get("seconds")
        if base:
            lines += [
                f"{c['dtype']}, V = {c['vocabulary']:,}, N = {c['tokens']:,}, d = {c['width']:,}, forward passes:",
                "",
                "| | time | memory, MiB |",
                "|---|---|---|",
            ]
            for label, words in COST_ROWS.items():
                row = c["methods"].get(label, {})
                if "seconds" in row:
                    resolved = row.get("resolved_fraction")
                    words += "" if resolved is None else f" ({resolved:.1%} of the tokens; {_quantiles(row)})"
                    lines.append(f"| {words} | {row['seconds'] / base:.2f} | {row['peak_mib']:,.0f} |")
            lines.append("")
    b = cpu["bfloat16_logits"]
    lines.append(
        f"Logits in bfloat16 instead of float32 (256 of these rows): a log-probability is off by {b['logp_mean']:.3f} "
        f"on average and {b['logp_max']:.2f} at most; the TV between a policy and itself shows as {b['tv_mean']:.4f} "
        f"on average and {b['tv_max']:.3f} at most."
    )
    return "\n".join(lines) + "\n"


def to_markdown(result: dict[str, Any]) -> str:
    lines: list[str] = []
    if cpu := result.get("cpu"):
        m = cpu["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
        lines += [
            f"{m['cpu']}, {m['threads']} threads; {versions}; median of {cpu['repeats']}. A bfloat16 product takes "
            f"{cpu['bfloat16_product_over_float32']:.0f} times as long as a float32 one here.",
            "",
            "| claim | where | measured | target | |",
            "|---|---|---|---|---|",
        ]
        for row in cpu["targets"]:
            met = "met" if row["met"] else "**missed**"
            lines.append(
                f"| {row['claim']} | {row['where']} | {row['value']:.3g} | at most {row['at_most']:g} | {met} |"
            )
        lines.append("")
        for c in cpu["comparisons"]:
            lines += comparison_table(c)
    if cuda := result.get("cuda"):
        from benchmarks.scoring_cuda import table

        lines += table(cuda)
    return "\n".join(lines).rstrip() + "\n"


def fill(page: Path, name: str, text: str) -> None:
    """Put `text` between the lines <!-- NAME:begin --> and <!-- NAME:end --> of a page.

    Raises
    ------
    ValueError : the page has no such lines.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no lines {begin} and {end} to write the tables between.")
    page.write_text(f"{before}{begin}\n\n{text.rstrip()}\n\n{end}{after}")
