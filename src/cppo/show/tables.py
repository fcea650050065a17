"""Tables before they are drawn, and their drawers. Cells are plain text: the drawers escape what means something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Cells:
    """A table before it is drawn.

    columns : their names; all empty for a table without a head. text : how many columns, from the left, hold text; the
    others hold figures and are aligned to the right. bold : the first cell of a row that stands out. caption : below.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 1
    bold: str | None = None
    caption: str = ""

    def rich(self) -> Group:
        """For a terminal: title, table, caption."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        table = Table(show_header=any(self.columns))
        # names stay whole where it gets narrow
        names = not any(" " in row[0] for row in self.rows)
        for at, column in enumerate(self.columns):
            side = "left" if at < self.text else "right"
            table.add_column(escape(column), justify=side, overflow="fold", no_wrap=names and at == 0)  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*map(escape, row), style="bold" if row[0] == self.bold else None)
        # not the table's own title, which is broken to the table's width
        around = [f"[italic]{escape(text)}[/]" if text else None for text in (self.title, self.caption)]
        return Group(*(part for part in (around[0], table, around[1]) if part is not None))

    def markdown(self) -> str:
        """In Markdown, without title and caption."""
        ruler = ["---"] * self.text + ["---:"] * (len(self.columns) - self.text)
        return "\n".join(_line(row) for row in (self.columns, ruler, *self.rows))


def _line(fields: Sequence[str]) -> str:
    return "| " + " | ".join(field.replace("|", "\\|").replace("\n", " ") for field in fields) + " |"
