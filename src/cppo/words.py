"""Words for messages."""

from __future__ import annotations

import difflib
from typing import Any


def nearest(word: Any, words: Any) -> str:
    """' Did you mean ...?' or nothing."""
    found = difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
