"""Families of arithmetic problems: how a prompt is drawn, and how it is solved step by step on a scratchpad.

    chain-<n>   3+8-2=      n operations modulo 10; scratchpad: the n running values; answer: three of them
    add-<n>     471+982=    two n-digit numbers; scratchpad: the digits of the sum, lowest first; answer: the sum

The three are those after n/3, 2n/3 and n steps. Why three: a last digit alone is right by chance one time in ten, and
a policy under reinforcement learning finds that short cut (it drops the scratchpad and guesses). Three digits are right
by chance one time in 1,000. The same reason asks for n >= 3 in additions: the best constant guess for two digits is
right in 90 of 8,100 cases.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cppo.errors import UserError
from cppo.tasks.scratchpad import Family, Recall
from cppo.words import nearest

ALPHABET = "0123456789+-=,#"
COMMON = ("chain-12", "chain-24", "chain-48", "chain-120", "add-3", "add-4", "add-8")


@dataclass(frozen=True)
class Chain:
    """n additions and subtractions of digits, modulo 10, from left to right."""

    length: int

    def __post_init__(self) -> None:
        if self.length < 3:
            raise UserError(f"family 'chain-{self.length}' is too short: its answer is three running values, so n >= 3")

    @property
    def name(self) -> str:
        return f"chain-{self.length}"

    @property
    def response_length(self) -> int:
        return 2 * self.length - 1 + len("#") + 3

    def draw(self, rng: random.Random) -> str:
        digits = rng.choices("0123456789", k=self.length + 1)
        operations = rng.choices("+-", k=self.length)
        return digits[0] + "".join(o + d for o, d in zip(operations, digits[1:], strict=True)) + "="

    def solve(self, prompt: str, recall: Recall) -> tuple[list[str], str]:
        value, values = int(prompt[0]), []
        for operation, digit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
            right = value + int(digit) if operation == "+" else value - int(digit)
            value = recall(f"{value}{operation}{digit}", right % 10)
            values.append(str(value))
        checkpoints = (round(self.length * third / 3) for third in (1, 2, 3))
        return values, "".join(values[step - 1] for step in checkpoints)

    def facts(self) -> Iterator[str]:
        return (f"{a}{operation}{b}" for a in range(10) for operation in "+-" for b in range(10))


@dataclass(frozen=True)
class Addition:
    """The sum of two n-digit numbers (no leading zeros), written lowest digit first, then in reading order."""

    digits: int

    def __post_init__(self) -> None:
        if self.digits < 3:
            raise UserError(
                f"family 'add-{self.digits}' is too short: one guess is right in over 1% of its problems; set n >= 3"
            )

    @property
    def name(self) -> str:
        return f"add-{self.digits}"

    @property
    def response_length(self) -> int:
        return 2 * (self.digits + 1) - 1 + len("#") + self.digits + 1

    def draw(self, rng: random.Random) -> str:
        low, high = 10 ** (self.digits - 1), 10**self.digits
        return f"{rng.randrange(low, high)}+{rng.randrange(low, high)}="

    def solve(self, prompt: str, recall: Recall) -> tuple[list[str], str]:
        first, second = prompt[:-1].split("+")
        carry, written = 0, []
        for a, b in zip(reversed(first), reversed(second), strict=True):
            total = int(a) + int(b) + carry
            # Only the digit may be unknown. A wrong carry would be invisible in the text, so noise to the student.
            written.append(str(recall(f"{a}+{b}+{carry}", total % 10)))
            carry = total // 10
        if carry:
            written.append("1")
        return written, "".join(reversed(written))

    def facts(self) -> Iterator[str]:
        return (f"{a}+{b}+{carry}" for a in range(10) for b in range(10) for carry in (0, 1))


_KINDS: dict[str, Callable[[int], Family]] = {"chain": Chain, "add": Addition}


def make_family(name: str) -> Family:
    """The family called "chain-<n>" or "add-<n>".

    Raises:
        UserError: another name (the nearest right ones are named), or an n that is too small.
    """
    match = re.fullmatch(r"(chain|add)-([1-9][0-9]{0,3})", name)
    if match is None:
        near = nearest(name, COMMON)
        raise UserError(f"unknown arithmetic family {name!r}.{near} A family is chain-<n> or add-<n>, n below 10,000")
    return _KINDS[match[1]](int(match[2]))
