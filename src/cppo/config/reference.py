"""The table of all settings in docs/configuration.md, written from the models so that it cannot go stale.

`python -m cppo.config.reference docs/configuration.md` rewrites it; a test compares.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from cppo.config import yaml_io
from cppo.config.keys import describe, dotted_keys, section_of
from cppo.config.settings import Settings
from cppo.files import atomic_write_text

BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"


def settings_table() -> str:
    """Markdown: one table a section, a row a key with what it expects, its default and what it means."""
    defaults: Any = Settings().model_dump()
    top: list[str] = []
    sections: list[str] = []
    for key, field in dotted_keys():
        if section := section_of(field.annotation):
            about = " ".join((section.__doc__ or "").split())
            note = f" {' '.join((field.description or '').split())}" if field.description else ""
            sections += ["", f"### `{key}`", "", about + note, "", *_head()]
            continue
        value = defaults
        for part in key.split("."):
            # A section that is null by default has the defaults of its model.
            value = (
                value[part]
                if isinstance(value, dict) and part in value
                else field.get_default(call_default_factory=True)
            )
        if value is PydanticUndefined:
            value = None
        shown = (
            yaml_io.dump({"v": value}).strip().removeprefix("v:").strip() if not isinstance(value, list) else str(value)
        )
        row = f"| `{key}` | {describe(field)} | `{shown}` | {' '.join((field.description or '').split())} |"
        (sections if "." in key else top).append(row)
    return "\n".join([*_head(), *top, *sections, ""])


def _head() -> list[str]:
    return ["| key | value | default | meaning |", "|---|---|---|---|"]


def with_table(page: str) -> str:
    """The page with the part between the markers replaced by `settings_table()`."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{settings_table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    atomic_write_text(path, with_table(path.read_text(encoding="utf-8")))
