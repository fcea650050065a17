"""Words for messages: what somebody may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

#: Names that are listed where nothing is near.
LISTED = 12


def nearest(word: Any, words: Iterable[Any], *, listed: bool = False, cutoff: float = 0.5) -> str:
    """' Did you mean ...?' or nothing. listed : what there is where nothing is near. cutoff : the likeness of near."""
    known = list(map(str, words))
    found = difflib.get_close_matches(str(word), known, n=1, cutoff=cutoff)
    if found:
        return f" Did you mean {found[0]!r}?"
    if not listed:
        return ""
    more = f", ... ({len(known)} in all)" if len(known) > LISTED else ""
    return f" There is {', '.join(sorted(known)[:LISTED])}{more}."


def nearest_keys(key: str, known: Iterable[str]) -> list[str]:
    """At most two dotted keys that `key` may have meant, the likelier one first: the last part counts most."""
    rated = sorted(((_likeness(key, name), name) for name in known), reverse=True)[:2]
    if not rated:
        return []
    best, first = rated[0]
    if best >= 0.65 and "." not in key and "." not in first:
        return [first]
    return [name for score, name in rated if score >= max(0.65, best - 0.03)]


def _likeness(given: str, known: str) -> float:
    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()

    last = ratio(given.rpartition(".")[2], known.rpartition(".")[2])
    # the full key settles which of two equal last parts it is
    return max(0.7 * last + 0.3 * ratio(given, known), 0.9 * last)
