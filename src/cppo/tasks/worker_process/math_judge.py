"""Is a completion's final answer equal to the reference? By math-verify (Apache-2.0), with its defaults."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

logging.disable(logging.CRITICAL)  # it warns that its own time-outs are off; ours surround it


def handle(request: dict[str, Any]) -> bool:
    """request: {"completion": text, "answer": LaTeX or a number, with or without dollar signs}."""
    reference = _reference(request["answer"])
    return bool(verify(reference, parse(request["completion"], parsing_timeout=None), timeout_seconds=None))


@lru_cache(maxsize=4096)  # a group of completions shares its reference
def _reference(answer: str) -> list[Any]:
    # Bare LaTeX such as \frac{1}{2} is only recognised inside an environment.
    return parse(f"\\boxed{{{answer.strip().strip('$')}}}", parsing_timeout=None)
