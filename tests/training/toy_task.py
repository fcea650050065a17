"""A user's own task, for tests: named on the command line as ``toy_task:Letters``.

The reward is the share of one digit in the response, so that nearly every response of even an untrained model has
another reward, and every update moves the weights.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from cppo.tasks import Example


class Letters:
    """Write many of `digit`. equal: every response gets the same reward. problems: training problems at most."""

    alphabet = "0123456789+-=,#"

    def __init__(self, digit: str = "3", equal: bool = False, problems: int = 1000) -> None:
        self.name, self.digit, self.equal, self.problems = "letters", digit, equal, problems

    def train(self, count: int, seed: int) -> Sequence[Example]:
        generator = random.Random(seed)
        numbers = [generator.randrange(1000) for _ in range(min(count, self.problems))]
        return [Example(prompt=f"{number}=", answer=self.digit) for number in numbers]

    def validation(self, count: int | None = None) -> dict[str, Sequence[Example]]:
        return {"letters": [Example(prompt=f"{n}=", answer=self.digit) for n in range(1000, 1004)][:count]}

    def score(self, example: Example, completion: str) -> float:
        return 0.5 if self.equal else completion.count(example.answer) / max(1, len(completion))

    def demonstration(self, example: Example, rng: random.Random) -> str:
        return "".join(rng.choice("0123456789") for _ in range(8))
