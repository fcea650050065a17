"""What tasks on a scratchpad share: families of problems that are solved step by step, and a teacher with gaps.

* Problems are made on demand and are a pure function of (seed, index): a million cost nothing until they are read.
* A hash of the prompt decides whether a problem is for training or for validation, so the two cannot overlap,
  whatever the seeds.
* The warm-up teacher is ignorant of a fixed share of the facts and answers them at random. That pins the accuracy
  after the warm-up below 1 at every sampling temperature, and leaves reinforcement learning something to do. Noise
  at every step would not: nucleus sampling removes it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from cppo.errors import UserError
from cppo.tasks.base import Example, LazyExamples

_VALIDATION_SHARE = 16  # one prompt in 16 belongs to validation

Recall = Callable[[str, int], int]  # (fact, its right value) -> the value that the teacher writes


class Family(Protocol):
    """A kind of problem at one length."""

    @property
    def name(self) -> str: ...

    @property
    def response_length(self) -> int:
        """Characters of the longest right response, without the end of sequence."""

    def draw(self, rng: random.Random) -> str:
        """A prompt, which ends in '='."""

    def solve(self, prompt: str, recall: Recall) -> tuple[list[str], str]:
        """Scratchpad and answer for `prompt`, where every fact is asked of `recall`."""

    def facts(self) -> Iterator[str]:
        """Every fact that `solve` can ask."""


class Scratchpad:
    """Families of one kind, mixed in equal parts. A completion is the scratchpad, '#' and the answer.

    Args:
        name: of the task.
        make_family: the family of a name; raises ValueError for one that there is not.
        alphabet: every character that prompts and completions use.
        values: how many values a fact can have; a teacher who does not know it draws one of them.
        families: names (a list, or one string with commas).
        ignorance: share of the facts that the teacher of `demonstration` does not know, in [0, 1].
        validation_count: validation problems a family unless `validation` is told otherwise.

    Raises:
        UserError: unknown, repeated or no family; `ignorance` or `validation_count` out of range.
    """

    def __init__(
        self,
        name: str,
        make_family: Callable[[str], Family],
        alphabet: str,
        values: int,
        families: str | Sequence[str],
        ignorance: float,
        validation_count: int,
    ) -> None:
        names = [part.strip() for part in families.split(",")] if isinstance(families, str) else list(families)
        if not names or len(set(names)) != len(names):
            raise UserError(f"families={names}: name at least one family, and each of them once")
        if not 0 <= ignorance <= 1:
            raise UserError(f"ignorance={ignorance} is a share of the facts: set it between 0 and 1")
        if validation_count < 1:
            raise UserError(f"validation_count={validation_count}: set it to at least 1")
        self.name = name
        self.alphabet = alphabet
        self.families: dict[str, Family] = {each: make_family(each) for each in names}
        self.ignorance = ignorance
        self.validation_count = validation_count
        self._values = values
        self._unknown = {each: _unknown_facts(family, ignorance) for each, family in self.families.items()}

    @property
    def max_response_tokens(self) -> int:
        """Characters of the longest right response, plus one for the end of sequence."""
        return max(family.response_length for family in self.families.values()) + 1

    def train(self, count: int, seed: int) -> Sequence[Example]:
        """`count` training problems, families in turn; made when read."""
        return LazyExamples(count, partial(_example, list(self.families.values()), f"train/{seed}", False))

    def validation(self, count: int | None = None) -> dict[str, Sequence[Example]]:
        """One benchmark a family. A longer list begins with the shorter one."""
        count = self.validation_count if count is None else count
        return {
            name: LazyExamples(count, partial(_example, [family], "validation", True))
            for name, family in self.families.items()
        }

    def score(self, example: Example, completion: str) -> float:
        """1.0 if what follows the last '#' is the answer exactly (white space around it aside), else 0.0."""
        _, mark, answer = completion.rpartition("#")
        return float(bool(mark) and answer.strip() == example.answer)

    def demonstration(self, example: Example, rng: random.Random) -> str:
        """Scratchpad and answer as the teacher writes them: right, except for the facts it does not know.

        An error is carried on: later values and the answer follow from what was written.
        """
        unknown = self._unknown[example.family]

        def recall(fact: str, right: int) -> int:
            return rng.randrange(self._values) if fact in unknown else right

        written, answer = self.families[example.family].solve(str(example.prompt), recall)
        return ",".join(written) + "#" + answer


def _example(families: Sequence[Family], stream: str, validation: bool, position: int) -> Example:
    """One problem of one side of the split: a pure function of (families, stream, position)."""
    family = families[position % len(families)]
    identity = f"{family.name}/{stream}/{position}"
    rng = random.Random(identity)  # seeded by SHA-512 of the text: the same in every process
    prompt = family.draw(rng)
    while _is_validation(prompt) != validation:
        prompt = family.draw(rng)
    _, answer = family.solve(prompt, _know_all)
    return Example(prompt=prompt, answer=answer, family=family.name, id=identity)


def _is_validation(prompt: str) -> bool:
    # Not Python's hash(), which differs from process to process.
    return int.from_bytes(_digest(prompt), "big") % _VALIDATION_SHARE == 0


def _unknown_facts(family: Family, share: float) -> frozenset[str]:
    """The same facts in every run: those whose digests come first."""
    facts = sorted(family.facts(), key=_digest)
    return frozenset(facts[: round(share * len(facts))])


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _know_all(fact: str, right: int) -> int:
    return right
