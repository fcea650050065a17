"""The built-in task that is not arithmetic: run a cellular automaton, row by row.

    prompt      dacb=                       (family 4x3: a row of 4 cells, 3 steps)
    completion  dbaa,dcbd#dadc              the rows after the first, '#' before the last; scored by the last alone

A cell's next letter follows from its own and from its left neighbour's (the first cell's left neighbour is the edge,
written '|' in a fact):

    next[i] = rule[left, own],   left = row[i - 1], or '|' for i = 0

For each left neighbour the rule is a permutation of the letters, drawn once and for all by a hash. So a step is a
bijection of rows: all last rows are equally likely (chance 8^-width), an error is never forgotten by itself, and what
is written early decides everything that comes after it. Prompts are short and responses long: `8x24` asks for 216
tokens from a prompt of 9.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cppo.errors import UserError
from cppo.tasks.scratchpad import Family, Recall, Scratchpad
from cppo.words import nearest

LETTERS = "abcdefgh"
ALPHABET = LETTERS + ",#="
COMMON = ("6x4", "8x12", "8x24", "12x40")
_EDGE = "|"


def _permutation(left: str) -> str:
    """The letters in the order of a hash: what a, b, c ... become beside `left`, the same in every process."""
    return "".join(
        sorted(LETTERS, key=lambda own: hashlib.blake2b(f"automaton:{left}{own}".encode(), digest_size=8).digest())
    )


#: What a cell becomes: rule[left][own], `left` a letter or the edge.
RULE = {left: dict(zip(LETTERS, _permutation(left), strict=True)) for left in (*LETTERS, _EDGE)}


@dataclass(frozen=True)
class Automaton:
    """`steps` steps of rows of `width` cells."""

    width: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.steps}"

    @property
    def response_length(self) -> int:
        return self.steps * (self.width + 1) - 1

    def draw(self, rng: random.Random) -> str:
        return "".join(rng.choices(LETTERS, k=self.width)) + "="

    def solve(self, prompt: str, recall: Recall) -> tuple[list[str], str]:
        row, rows = prompt[:-1], []
        for _ in range(self.steps):
            row = "".join(
                LETTERS[recall(left + own, LETTERS.index(RULE[left][own]))]
                for left, own in zip(_EDGE + row[:-1], row, strict=True)
            )
            rows.append(row)
        return rows[:-1], rows[-1]

    def facts(self) -> Iterator[str]:
        return (left + own for left in (*LETTERS, _EDGE) for own in LETTERS)


def make_family(name: str) -> Family:
    """The family called "<width>x<steps>".

    Raises:
        UserError: another name, fewer than 4 cells (too few rows to set some aside) or than 2 steps.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,2})x([1-9][0-9]{0,2})", name)
    if match is None:
        raise UserError(f"unknown automaton family {name!r}.{nearest(name, COMMON)} A family is <width>x<steps>")
    width, steps = int(match[1]), int(match[2])
    if width < 4 or steps < 2:
        raise UserError(f"family {name!r} is too small: at least 4 cells and 2 steps, such as 4x2")
    return Automaton(width, steps)


class CellularAutomaton(Scratchpad):
    """Families of rows and steps, mixed in equal parts.

    Args:
        families: names such as "8x24", width x steps (a list, or one string with commas).
        ignorance: share of the 72 facts that the teacher of `demonstration` does not know, in [0, 1].
        validation_count: validation problems a family unless `validation` is told otherwise.

    Raises:
        UserError: unknown, repeated or no family; `ignorance` or `validation_count` out of range.
    """

    def __init__(
        self,
        families: str | Sequence[str] = ("8x12",),
        ignorance: float = 0.014,
        validation_count: int = 256,
    ) -> None:
        super().__init__("automaton", make_family, ALPHABET, len(LETTERS), families, ignorance, validation_count)
