"""Mathematical problems from files or the hub (DAPO-Math-17k, AIME), checked by math-verify in a helper process."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache

from cppo.errors import UserError
from cppo.tasks.base import Example, LazyExamples, Prompt
from cppo.tasks.math_data import Problem, load_problems
from cppo.tasks.math_verifier import MathVerifier

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
_INSTRUCTED = ("\\boxed", "answer:", "final answer")  # a prompt with one of these says already how to answer

_log = logging.getLogger(__name__)


class Math:
    """Problems with a known final answer.

    Args:
        train: path of a .parquet or .jsonl file, or a data set's id on the hub; None for evaluation alone.
        validation: the same, or one for each benchmark, as in {"aime24": "aime24.parquet"}.
        instruction: added to problems that do not say how to answer; "" adds nothing.
        split, validation_split: splits of data sets on the hub.
        time_limit: seconds for checking one answer; beyond that it scores 0.0 and is counted in `timeouts`.
        workers: processes that `score_many` uses at the same time.

    Attributes:
        notes: what was dropped: repeated rows, and training problems that are validation problems.

    Raises:
        UserError: as `math_data.load_problems`; or neither train nor validation is given.
        MissingDependency: math-verify (or pyarrow, datasets) is not installed.
    """

    def __init__(
        self,
        train: str | None = None,
        validation: str | Mapping[str, str] | None = None,
        instruction: str = INSTRUCTION,
        split: str = "train",
        validation_split: str = "train",
        time_limit: float = 5.0,
        workers: int = 2,
    ) -> None:
        if train is None and not validation:
            raise UserError("task 'math' needs data: set train=<file or hub id>, validation=<file or hub id>, or both")
        self.name = "math"
        self.instruction = instruction
        self._notes: list[str] = []
        self._verifier = MathVerifier(time_limit, workers)
        benchmarks = {"validation": validation} if isinstance(validation, str) else dict(validation or {})
        held_out = {name: self._load(source, validation_split) for name, source in benchmarks.items()}
        self._validation = {
            name: [self._example(problem, f"{name}/{i}", name) for i, problem in enumerate(problems)]
            for name, problems in held_out.items()
        }
        self._train: list[Example] | None = None
        if train is not None:
            keys = {problem.key for problems in held_out.values() for problem in problems}
            problems = self._without(self._load(train, split), keys, train)
            self._train = [self._example(problem, f"train/{i}", "train") for i, problem in enumerate(problems)]

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    @property
    def timeouts(self) -> int:
        """Completions that scored 0.0 because of the time limit."""
        return self._verifier.timeouts

    def train(self, count: int, seed: int) -> Sequence[Example]:
        """`count` problems in shuffled order; once all are used they come again in another order."""
        if self._train is None:
            raise UserError("task 'math' was made without training problems: set train=<file or hub id>")
        return LazyExamples(count, _Shuffle(self._train, seed))

    def validation(self, count: int | None = None) -> dict[str, Sequence[Example]]:
        """The benchmarks; the first `count` problems of each."""
        return {name: examples[:count] for name, examples in self._validation.items()}

    def score(self, example: Example, completion: str) -> float:
        """1.0 if the final answer is mathematically equal to the example's."""
        return self._verifier.score(completion, example.answer)

    def score_many(self, pairs: Sequence[tuple[Example, str]]) -> list[float]:
        """`score` of each (example, completion), several at a time."""
        return self._verifier.score_many([(completion, example.answer) for example, completion in pairs])

    def close(self) -> None:
        """End the verifier's processes; they also end with this one."""
        self._verifier.close()

    def _load(self, source: str, split: str) -> list[Problem]:
        loaded = load_problems(source, split)
        dropped = loaded.rows - len(loaded.problems)
        if dropped:
            self._note(f"{source}: {dropped:,} of {loaded.rows:,} rows repeat a problem and were dropped")
        return loaded.problems

    def _without(self, problems: list[Problem], keys: set[str], source: str) -> list[Problem]:
        kept = [problem for problem in problems if problem.key not in keys]
        if len(kept) < len(problems):
            self._note(f"{source}: {len(problems) - len(kept):,} problems are validation problems and were removed")
        if not kept:
            raise UserError(f"{source}: every training problem is a validation problem; give other validation data")
        return kept

    def _note(self, text: str) -> None:
        self._notes.append(text)
        _log.warning(text)

    def _example(self, problem: Problem, identity: str, family: str) -> Example:
        return Example(_instructed(problem.prompt, self.instruction), problem.answer, family, identity)


class _Shuffle:
    """Pass after pass over all examples, each pass in an order of its own."""

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self._examples, self._seed = examples, seed
        self._order = lru_cache(maxsize=4)(self._make_order)

    def __call__(self, position: int) -> Example:
        number, place = divmod(position, len(self._examples))
        return self._examples[self._order(number)[place]]

    def _make_order(self, number: int) -> list[int]:
        order = list(range(len(self._examples)))
        random.Random(f"{self._seed}/{number}").shuffle(order)
        return order


def _instructed(prompt: Prompt, instruction: str) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if instruction and not any(sign in m["content"].lower() for m in messages for sign in _INSTRUCTED):
        messages[-1]["content"] = f"{messages[-1]['content']}\n{instruction}"
    return messages
