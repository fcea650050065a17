"""A task that rewards one fixed text on every problem is refused, whatever that text is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from cppo.errors import UserError
from cppo.tasks import make_task
from cppo.tasks.base import Example
from cppo.tasks.chance import PROBLEMS, chance, check_chance


class Scored:
    name = "scored"

    def __init__(self, score: Callable[[Example, str], float]) -> None:
        self.score = score
        self.problems = [Example(f"{i} + {i} =", str(2 * i)) for i in range(30)]

    def train(self, count: int, seed: int) -> Sequence[Example]:
        return random.Random(seed).choices(self.problems, k=count)

    def validation(self, count: int | None = None) -> dict[str, Sequence[Example]]:
        return {"scored": self.problems[:count]}


@pytest.mark.parametrize(
    "score, text",
    [
        (lambda example, text: 1.0, "''"),
        (lambda example, text: float(text == "nan"), "'nan'"),
        (lambda example, text: float(text.isdigit() and int(text) % 2 == 0), "'0'"),
        (lambda example, text: float(text in ("4", "6")), "'4'"),  # the right answer of another problem
    ],
)
def test_one_text_for_every_problem_is_refused(score: Callable[[Example, str], float], text: str) -> None:
    task = Scored(score)
    with pytest.raises(UserError, match=f"task 'scored' cannot be trained on: The constant answer {text} scores 1.00"):
        check_chance(task, task.problems)


def test_chance_is_the_mean_of_the_best_constant_answer() -> None:
    task = Scored(lambda example, text: float(text == example.answer))
    found = chance(task, task.problems)
    assert found.mean == 1 / PROBLEMS and found.lowest == 0 and check_chance(task, task.problems) is None
    half = Scored(lambda example, text: float(text == ("yes" if int(example.answer) % 4 else "no")))
    assert "scores 0.50 on 16 held-out problems: that much is chance" in str(check_chance(half, half.problems))


def test_a_task_that_asks_for_one_text_is_no_fault() -> None:
    task = Scored(lambda example, text: text.count("4") / max(len(text), 1))
    task.problems = [Example(f"{i}: write fours", "4") for i in range(5)]
    assert "The constant answer '4' scores 1.00 on 5 held-out" in str(check_chance(task, task.problems))


@pytest.mark.parametrize("name", ["arithmetic", "automaton"])
def test_the_built_in_tasks_have_no_constant_answer(name: str) -> None:
    task = make_task(name)
    (problems,) = task.validation(64).values()
    assert chance(task, problems).mean < 0.1


@pytest.mark.parametrize("generator", ["coin_flip", "complex_arithmetic", "puzzle24", "game_of_life_halting"])
def test_generators_that_reward_a_constant_are_refused(generator: str) -> None:
    pytest.importorskip("reasoning_gym")
    task = make_task(f"reasoning_gym:{generator}", validation_count=4, workers=1)
    try:
        with pytest.raises(UserError, match="cannot be trained on"):
            check_chance(task, task.validation(4)[generator])
    finally:
        task.close()
