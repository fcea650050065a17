"""Reward functions, named by ``reward.custom_reward_function``."""

from __future__ import annotations

from typing import Any


def digits(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """Share of digits in the response: an untrained model's responses differ in it."""
    return sum(character.isdigit() for character in solution_str) / max(1, len(solution_str))


def task(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """The score of the project's own task, by its name in `data_source`."""
    from cppo.tasks import Example, make_task

    example = Example(prompt=extra_info["prompt"], answer=ground_truth, family=extra_info["family"])
    return make_task(data_source, families=[extra_info["family"]]).score(example, solution_str)
