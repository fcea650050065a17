"""Call a command of the program as a function and have what it printed."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any
from unittest import mock


def said(command: Callable[..., None], *arguments: Any, width: int = 200, **options: Any) -> str:
    """What `command` prints on a terminal of that width; what it raises (UserError, typer.Exit) goes through."""
    plain = {"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.dict(os.environ, plain), contextlib.redirect_stdout(io.StringIO()) as out:
        command(*arguments, **options)
    return out.getvalue()
