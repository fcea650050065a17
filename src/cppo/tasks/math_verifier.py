"""Checks mathematical answers with math-verify, in processes of their own with a time limit.

    with MathVerifier() as verifier:
        verifier.score(r"... so the answer is \\boxed{\\frac{1}{2}}", "0.5")    # 1.0

Only the last 4,000 characters of a completion are looked at: the final answer is there, and a response that ran to its
limit of 30,000 tokens would cost a hundred times more to search.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from cppo.tasks.base import require
from cppo.tasks.worker import WorkerPool

TAIL = 4_000  # characters


class MathVerifier:
    """A pool of math-verify processes, started on first use.

    Args:
        time_limit: seconds a completion; beyond that it scores 0.0 and is counted in `timeouts`.
        workers: processes that `score_many` uses at the same time; `score` alone uses one.
        command: the program to run instead of the worker (tests).

    Raises:
        MissingDependency: math-verify is not installed.
    """

    def __init__(self, time_limit: float = 5.0, workers: int = 2, command: Sequence[str] | None = None) -> None:
        require("math_verify", "checking mathematical answers")
        self.pool = WorkerPool("math_judge", workers, time_limit, command)

    @property
    def timeouts(self) -> int:
        """Completions that scored 0.0 because of the time limit."""
        return self.pool.timeouts

    @property
    def crashes(self) -> int:
        """Times that a verifier process died."""
        return self.pool.crashes

    def score(self, completion: str, answer: str) -> float:
        """1.0 if the final answer of `completion` is mathematically equal to `answer`, else 0.0."""
        return _reward(self.pool.ask(_request(completion, answer)))

    def score_many(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """`score` of each (completion, answer), several at a time."""
        return [_reward(reply) for reply in self.pool.ask_many([[_request(*pair)] for pair in pairs])]

    def close(self) -> None:
        """End the processes; they also end with this one."""
        self.pool.close()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _request(completion: str, answer: str) -> dict[str, str]:
    return {"completion": completion[-TAIL:], "answer": answer}


def _reward(reply: dict[str, Any] | None) -> float:
    return float(reply is not None and reply.get("value") is True)
