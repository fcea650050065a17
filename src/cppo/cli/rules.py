"""`cppo rules` and `cppo recipes`: what there is."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cppo.errors import as_user_error


def rules(
    name: Annotated[str | None, typer.Argument(help="One rule: its formula and parameters.")] = None,
) -> None:
    """The trust regions: parameters, defaults, sources."""
    from cppo.rules import RULES
    from cppo.rules.base import rule_class

    console = Console(highlight=False)
    if name is not None:
        with as_user_error():
            rule = rule_class(name)
        console.print(f"[bold]{name}[/]  {escape(rule.source)}\n", soft_wrap=True)
        console.print(inspect.getdoc(rule) or "", markup=False, soft_wrap=True)
        console.print(f"\nDefaults: {escape(_parameters(rule) or 'no parameters')}", soft_wrap=True)
        return
    table = Table(show_lines=True)
    for title in ("rule", "parameters (defaults)", "source"):
        table.add_column(title, overflow="fold", no_wrap=title == "rule")
    for key, rule in RULES.items():
        table.add_row(key, escape(_parameters(rule)) or "-", escape(rule.source))
    console.print(table)
    console.print("cppo rules NAME shows the formula; cppo train rule=NAME rule.PARAMETER=VALUE trains with it.")


def _parameters(rule: Any) -> str:
    def shown(value: Any) -> str:
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    return ", ".join(f"{field.name}={shown(field.default)}" for field in dataclasses.fields(rule))


def list_recipes() -> None:
    """The shipped recipes, with their first comment line and their file."""
    from cppo.config.load import recipes
    from cppo.show.tables import Cells

    rows = [
        (key, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "), str(path))
        for key, path in recipes().items()
    ]
    Console(highlight=False).print(Cells("", ("recipe", "what it is", "file"), rows, text=3).rich())
