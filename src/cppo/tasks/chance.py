"""What constant answers score: a task that rewards one fixed text on every problem teaches that text.

Several of reasoning_gym's scorers do (findings/reasoning_gym_constant_answers.sh: `coin_flip` takes "0" for every
probability, since all begin with it), and a small task may have one right answer. Reinforcement learning finds such a
text at once and its reward is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cppo.errors import UserError
from cppo.tasks.base import Example, Task, score_all

#: Tried besides the right answers of some problems.
TEXTS = ("", "0", "1", "2", "-1", "nan", "inf", "yes", "no", "True", "False", "[]", "A", "hello")
#: Problems on which they are tried, and right answers that are tried.
PROBLEMS, ANSWERS = 16, 4
#: From this mean score on a constant answer is worth a word.
NOTABLE = 0.2


class Chance(NamedTuple):
    """The best constant answer: mean and lowest score over the problems it was tried on."""

    text: str
    mean: float
    lowest: float
    problems: int

    def sentence(self) -> str:
        """What it is, in words."""
        return f"The constant answer {self.text!r} scores {self.mean:.2f} on {self.problems} held-out problems"


def chance(task: Task, problems: Sequence[Example]) -> Chance:
    """Score constant answers on (the first `PROBLEMS` of) `problems`."""
    tried = list(problems[:PROBLEMS])
    answers = [example.answer for example in tried[:ANSWERS] if example.answer]
    texts = list(dict.fromkeys([*TEXTS, *answers]))
    pairs = [(example, text) for text in texts for example in tried]
    scores = score_all(task, pairs)
    rows = [scores[start : start + len(tried)] for start in range(0, len(scores), len(tried))]
    found = [Chance(text, sum(row) / len(row), min(row), len(row)) for text, row in zip(texts, rows, strict=True)]
    return max(found, key=lambda one: (one.lowest, one.mean))


def check_chance(task: Task, problems: Sequence[Example]) -> str | None:
    """A sentence where a constant answer scores `NOTABLE` or more.

    Raises
    ------
    UserError : one fixed text has the full score on every problem, although their right answers differ: the scorer
        does not see what was asked. (A task whose right answers are all the same asks for one text.)
    """
    found = chance(task, problems)
    if found.lowest >= 1 and len({example.answer for example in problems[: found.problems]}) > 1:
        raise UserError(
            f"task {task.name!r} cannot be trained on: {found.sentence()}, on each of them, whatever was asked. A "
            "policy would learn that text. Take another task, or another configuration of this one (docs/tasks.md)."
        )
    return f"{found.sentence()}: that much is chance." if found.mean >= NOTABLE else None
