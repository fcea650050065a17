"""Any generator of reasoning_gym as a task, with that generator's own scorer.

Both run in a helper process (`worker`): several of the scorers raise on strange answers, some hand them to sympy or
`eval`, and none has a time limit. Training problems are made when read; validation problems are made once, and a
training problem whose question is among them is replaced by the next that is not. Different seeds alone would not do:
small generators repeat their questions.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from cppo.errors import UserError
from cppo.tasks.base import Example, LazyExamples, require
from cppo.tasks.extract import final_answer
from cppo.tasks.worker import WorkerPool
from cppo.words import nearest

_VALIDATION_SEED = -1  # training seeds are not negative
_TRIES = 64  # draws for one training problem before a generator counts as too small
_MAKE_LIMIT = 120.0  # seconds; one problem of futoshiki or knight_swap takes several
_STRIDE = 1 << 32  # replacements for problem i are i + k * _STRIDE: beyond every count


class ReasoningGym:
    """One generator of reasoning_gym.

    Args:
        generator: its name, e.g. "chain_sum"; `make_task` takes it from "reasoning_gym:chain_sum".
        config: the generator's own options, e.g. {"min_terms": 2, "max_terms": 4}.
        validation_count: problems that are set aside for validation.
        time_limit: seconds for one score; beyond that it is 0.0 and counted in `timeouts`.
        workers: processes that `score_many` uses at the same time.

    Raises:
        MissingDependency: reasoning_gym is not installed.
        UserError: unknown generator or option, or a configuration that the generator refuses.
    """

    def __init__(
        self,
        generator: str,
        config: Mapping[str, Any] | None = None,
        validation_count: int = 256,
        time_limit: float = 5.0,
        workers: int = 2,
    ) -> None:
        require("reasoning_gym", f"task 'reasoning_gym:{generator}'")
        if validation_count < 1:
            raise UserError(f"validation_count={validation_count}: set it to at least 1")
        self.name = f"reasoning_gym:{generator}"
        self.alphabet = "\n" + string.ascii_letters + string.digits + string.punctuation + " "
        self.generator = generator
        self.config = dict(config or {})
        self.validation_count = validation_count
        self._pool = WorkerPool("gym_host", workers, time_limit)
        self._held_out: list[Example] | None = None
        self._questions_repeat = False
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    @property
    def timeouts(self) -> int:
        """Completions that scored 0.0 because of the time limit."""
        return self._pool.timeouts

    def train(self, count: int, seed: int) -> Sequence[Example]:
        """`count` problems, made when read.

        Raises:
            ValueError: more than half of the generator's problems are validation problems: it is too small.
        """
        if seed < 0:
            raise UserError(f"seed={seed}: a seed cannot be negative")
        held_out = frozenset(str(example.prompt) for example in self._validation_problems())
        # A generator with fewer questions than twice the validation problems has repeated some while those were made.
        draws = range(_TRIES if count and self._questions_repeat else 0)
        probes = [self._example(seed, _STRIDE * _TRIES + i).prompt in held_out for i in draws]
        if sum(probes) > len(probes) / 2:
            raise UserError(self._too_small(f"{sum(probes)} of {len(probes)} training draws were validation problems"))
        return LazyExamples(count, partial(self._training_example, seed, held_out))

    def validation(self, count: int | None = None) -> dict[str, Sequence[Example]]:
        """The problems that were set aside, all different, as one benchmark."""
        problems = self._validation_problems()
        count = self.validation_count if count is None else count
        if not 0 <= count <= len(problems):
            raise UserError(f"count={count}, but {len(problems)} problems were set aside: set validation_count={count}")
        return {self.generator: problems[:count]}

    def score(self, example: Example, completion: str) -> float:
        """The generator's own score of the answer in `completion`, within [0, 1]; 0.0 where its scorer fails."""
        return _reward(self._pool.ask(*self._score_steps(example, completion)))

    def score_many(self, pairs: Sequence[tuple[Example, str]]) -> list[float]:
        """`score` of each (example, completion), several at a time."""
        return [_reward(reply) for reply in self._pool.ask_many([self._score_steps(*pair) for pair in pairs])]

    def demonstration(self, example: Example, rng: random.Random) -> str | None:
        """The generator's own answer, without reasoning; None for generators that have only a scorer."""
        return example.answer if example.extra["has_answer"] else None

    def close(self) -> None:
        """End the helper processes; they also end with this one."""
        self._pool.close()

    def _score_steps(self, example: Example, completion: str) -> list[dict[str, Any]]:
        seed, index = example.extra["seed"], example.extra["index"]
        # Boards and mazes use '#' in their answers: there it marks nothing.
        answer = final_answer(completion, hash_mark="#" not in example.answer)
        # The problem is made first, where this worker does not have it yet, so that only scoring is on the clock.
        return [self._entry_request(seed, index), self._request("score", seed, index) | {"answer": answer}]

    def _request(self, do: str, seed: int, index: int) -> dict[str, Any]:
        return {"do": do, "generator": self.generator, "config": self.config, "seed": seed, "index": index}

    def _entry_request(self, seed: int, index: int) -> dict[str, Any]:
        return self._request("entry", seed, index) | {"limit": _MAKE_LIMIT}

    def _example(self, seed: int, index: int) -> Example:
        reply = self._pool.ask(self._entry_request(seed, index)) or {"failure": "no answer in time"}
        if "value" not in reply:
            raise UserError(
                f"task {self.name!r} made no problem for seed {seed}, index {index}, config {self.config}: "
                f"{reply['failure']}; change 'config'"
            )
        question, answer = reply["value"]["question"], reply["value"]["answer"]
        return Example(
            prompt=question,
            answer=answer or "",
            family=self.generator,
            id=f"{self.generator}/{'validation' if seed == _VALIDATION_SEED else seed}/{index}",
            extra={"seed": seed, "index": index, "has_answer": answer is not None},
        )

    def _training_example(self, seed: int, held_out: frozenset[str], position: int) -> Example:
        for attempt in range(_TRIES):
            example = self._example(seed, position + attempt * _STRIDE)
            if example.prompt not in held_out:
                return example
        raise UserError(self._too_small(f"{_TRIES} draws in a row were validation problems"))

    def _validation_problems(self) -> list[Example]:
        if self._held_out is None:
            problems: dict[str, Example] = {}
            for index in range(8 * self.validation_count):
                example = self._example(_VALIDATION_SEED, index)
                self._questions_repeat |= example.prompt in problems
                problems.setdefault(str(example.prompt), example)
                if len(problems) == self.validation_count:
                    break
            else:
                draws = 8 * self.validation_count
                raise UserError(self._too_small(f"it gave {len(problems)} different questions in {draws} draws"))
            self._held_out = list(problems.values())
        return self._held_out

    def _too_small(self, why: str) -> str:
        return (
            f"task {self.name!r} is too small for validation_count={self.validation_count}: {why}. "
            "Set a smaller validation_count, or a config with harder problems"
        )

    def _check(self) -> None:
        """Everything that can be wrong with the name and the configuration, before any training starts."""
        names = self._fetch({"do": "names"})
        if self.generator not in names:
            raise UserError(
                f"reasoning_gym has no generator {self.generator!r}.{nearest(self.generator, names, listed=True)}"
            )
        known = self._fetch({"do": "options", "generator": self.generator})
        for option in self.config:
            if option not in known:
                hint = nearest(option, known, listed=True)
                raise UserError(f"reasoning_gym's {self.generator!r} has no option {option!r}.{hint}")
        try:
            json.dumps(self.config)
        except TypeError as error:
            raise UserError(f"config of {self.name!r} must consist of numbers, texts and lists: {error}") from error
        self._example(_VALIDATION_SEED, 0)

    def _fetch(self, request: dict[str, Any]) -> list[str]:
        reply = self._pool.ask(request)
        if reply is None or "value" not in reply:
            raise RuntimeError(f"reasoning_gym's process did not answer {request}: {reply}")
        return reply["value"]


def _reward(reply: dict[str, Any] | None) -> float:
    value = reply.get("value") if reply else None
    if not isinstance(value, float) or value != value:
        return 0.0
    return min(max(value, 0.0), 1.0)
