"""Show sampled responses: which tokens the trust region held back, and why.

Works on the records of samples/step-*.jsonl alone (docs/runs.md), so it needs neither torch nor a model.
`mark_response` is plain text with [[ ]] around held-back tokens; `render_response` colours every token by its reason
and keeps the marks where there is no colour.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cppo.rules import Reason
from cppo.rules.base import HELD
from cppo.runs.folder import RunFolder

Record = Mapping[str, Any]

#: Reason by its name in files -> (words, terminal style), in the order of the legend; styles differ in more than hue.
REASONS: dict[str, tuple[str, str]] = {
    reason.key: (reason.caption, style)
    for reason, style in {
        Reason.KEPT: "",
        Reason.TOWARDS: "green",
        Reason.TOKEN_LIMIT: "bold white on red",
        Reason.PREFIX_BUDGET: "bold black on yellow",
        Reason.SEQUENCE_LIMIT: "bold white on magenta",
        Reason.RATIO_CLIP: "bold black on cyan",
        Reason.CLAMPED: "underline black on bright_cyan",
        Reason.OUTSIDE: "dim",
    }.items()
}
HELD_BACK = frozenset(reason.key for reason in HELD)


def held_back(record: Record) -> int:
    """How many tokens of a response were held back."""
    return sum(reason in HELD_BACK for reason in record["reason"])


def pick_response(records: Sequence[Record]) -> Record | None:
    """The response that shows most: the most held-back tokens, then one with loss tokens at all, then the shorter one,
    then the first.
    """

    def order(record: Record) -> tuple[int, bool, int]:
        return -held_back(record), all(reason == "outside" for reason in record["reason"]), len(record["tokens"])

    return min(records, key=order, default=None)


def printable(text: str) -> str:
    """Model output that is safe in a terminal and in Markdown: control and direction characters become \\x1b etc."""

    def safe(char: str) -> str:
        bidirectional = "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"
        if char not in "\n\t" and (unicodedata.category(char) in ("Cc", "Cs") or bidirectional):
            return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
        return char

    return "".join(map(safe, text))


def _runs(record: Record, window: slice) -> list[tuple[str, str]]:
    """(reason, text) of neighbouring tokens with the same reason."""
    runs: list[tuple[str, str]] = []
    for piece, reason in zip(record["tokens"][window], record["reason"][window], strict=False):
        text = printable(piece)
        if runs and runs[-1][0] == reason:
            runs[-1] = (reason, runs[-1][1] + text)
        else:
            runs.append((reason, text))
    return runs


def _window(record: Record, limit: int | None) -> slice:
    """At most `limit` tokens, placed such that the first held-back one is seen with some text before it."""
    tokens = len(record["tokens"])
    if limit is None or tokens <= limit:
        return slice(0, tokens)
    first = next((at for at, reason in enumerate(record["reason"]) if reason in HELD_BACK), 0)
    start = 0 if first < limit * 3 // 4 else min(first - limit // 4, tokens - limit)
    return slice(start, start + limit)


def mark_response(record: Record, limit: int | None = None) -> str:
    """The response as plain text, runs of held-back tokens in [[ ]]; at most `limit` tokens of it (...: the rest)."""
    window = _window(record, limit)
    text = "".join(f"[[{text}]]" if reason in HELD_BACK else text for reason, text in _runs(record, window))
    return ("..." if window.start else "") + text + ("..." if window.stop < len(record["tokens"]) else "")


def legend(record: Record) -> str:
    """One line of counts: "412 loss tokens: 398 kept, 9 over the token limit, 5 prefix budget used up"."""
    counts: Counter[str] = Counter(record["reason"])
    total = sum(count for reason, count in counts.items() if reason != "outside")
    parts = [f"{counts[name]} {words}" for name, (words, _) in REASONS.items() if counts[name] and name != "outside"]
    return f"{total} loss token{'' if total == 1 else 's'}: {', '.join(parts) or 'none'}"


def render_response(record: Record, limit: int | None = None, colour: bool = True) -> Text:
    """The response for a terminal: held-back tokens marked, every token coloured by its reason if `colour`."""
    if not colour:
        return Text(mark_response(record, limit))
    window = _window(record, limit)
    text = Text("..." if window.start else "")
    for reason, piece in _runs(record, window):
        # a line break on a coloured background would paint the rest of the line: show it as a sign
        shown = piece.replace("\n", "\u21b5\n") if reason in HELD_BACK else piece
        text.append(shown, style=REASONS.get(reason, ("", ""))[1])
    return text.append("..." if window.stop < len(record["tokens"]) else "")


def render_sample(folder: str | Path, console: Console, step: int | None = None) -> bool:
    """Print the most telling response of `step` (default: of the last step that has any); False if there is none."""
    record = pick_response(RunFolder(folder).samples(step))
    if record is not None:
        print_response(record, console)
    return record is not None


def print_response(record: Record, console: Console, limit: int | None = 400) -> None:
    """Print prompt, response and legend of one record; colours where the terminal has them, else [[ ]]."""
    colour = console.color_system is not None and not console.no_color
    where = f"step {record.get('step', '?')}, update {int(record.get('update', 0)) + 1} of its rollout batch"
    advantage = record.get("advantage")
    extra = "" if advantage is None else f", advantage {advantage:+.2f}"

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)

    shown = "the coloured tokens" if colour else "what stands in [[ ]]"
    line(f"A sampled response ({where}{extra}). Held back by the trust region: {shown}.")
    prompt = printable(str(record.get("prompt", "")))
    console.print(Text("> " + prompt.strip("\n").replace("\n", "\n> "), style="dim"), soft_wrap=True)
    console.print(render_response(record, limit, colour), soft_wrap=True)
    if colour:
        present = [name for name in REASONS if name in record["reason"] and name not in ("kept", "outside")]
        console.print(
            Text("  ").join(Text(f" {REASONS[name][0]} ", style=REASONS[name][1]) for name in present), soft_wrap=True
        )
    line(legend(record) + ".")
