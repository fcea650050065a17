"""Tables before they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cells:
    """A table before it is drawn; the first column is text, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def pipes(table: Cells) -> str:
    """A table in Markdown, without its title."""
    head = [line(table.columns), line(["---", *["---:"] * (len(table.columns) - 1)])]
    return "\n".join([*head, *map(line, table.rows)])


def line(fields: Sequence[str]) -> str:
    return "| " + " | ".join(field.replace("|", "\\|") for field in fields) + " |"
