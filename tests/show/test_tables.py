"""One description of a table, two drawers; what means something to a drawer is shown as it is."""

from __future__ import annotations

import io

from rich.console import Console

from cppo.show.tables import Cells


def on_a_terminal(table: Cells, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table.rich())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_markup_and_pipes_are_text() -> None:
    table = Cells("[red]t[/]", ("a|b", "[x]"), [("[bold]one[/]", "1|2"), ("two\nlines", "[3, 4]")], caption="[c]")
    text = on_a_terminal(table)
    assert all(word in text for word in ("[red]t[/]", "a|b", "[bold]one[/]", "1|2", "[3, 4]", "[c]"))
    assert table.markdown().splitlines() == [
        "| a\\|b | [x] |",
        "| --- | ---: |",
        "| [bold]one[/] | 1\\|2 |",
        "| two lines | [3, 4] |",
    ]


def test_text_is_left_and_figures_are_right() -> None:
    table = Cells("", ("rule", "what", "share"), [("cppo", "words", "1"), ("trm", "w", "10")], text=2)
    assert table.markdown().splitlines()[1] == "| --- | --- | ---: |"
    rows = [line.split("│")[1:4] for line in on_a_terminal(table).splitlines() if line.startswith("│")]
    assert rows == [[" cppo ", " words ", "     1 "], [" trm  ", " w     ", "    10 "]]


def test_without_a_head_and_names_stay_whole_where_it_is_narrow() -> None:
    assert "━" not in on_a_terminal(Cells("", ("", ""), [("name", "value")]))
    narrow = on_a_terminal(Cells("", ("rule", *"abcd"), [("trm_max_avg", *["12345678"] * 4)]), width=42)
    assert "trm_max_avg" in narrow
