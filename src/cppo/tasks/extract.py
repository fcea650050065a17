"""The final answer in a completion. Linear in its length: these run in the trainer, on whatever a model wrote."""

from __future__ import annotations

import re


def final_answer(completion: str, hash_mark: bool = True) -> str:
    """The last <answer>...</answer>, else the last \\boxed{...}, else what follows the last '#' (if `hash_mark`), else
    everything; without white space around it."""
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return completion[start + len("<answer>") : end].strip()
    boxed = last_boxed(completion)
    if boxed is not None:
        return boxed.strip()
    return (completion.rpartition("#")[2] if hash_mark else completion).strip()


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} with balanced braces holds; None without one."""
    found: tuple[int, int] | None = None
    open_braces: list[int | None] = []  # for each open brace: where its content starts if it belongs to \\boxed
    for brace in re.finditer(r"(\\boxed\s*)?\{|\}", text):
        if brace[0] != "}":
            open_braces.append(brace.end() if brace[1] else None)
        elif open_braces:
            start = open_braces.pop()
            if start is not None and (found is None or start > found[0]):
                found = (start, brace.start())
    return None if found is None else text[found[0] : found[1]]
