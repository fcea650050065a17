"""The verifier of the task `math` as verl's reward function.

    reward.custom_reward_function.path=pkg://cppo.engines.verl.reward
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.time_limit=5.0     # seconds an answer
    +reward.custom_reward_function.reward_kwargs.workers=2          # helper processes of each of reward.num_workers

verl calls it from several threads. Answers are checked by math-verify in helper processes, so that none can hang or
crash a run (`cppo.tasks.worker`).
"""

from __future__ import annotations

import threading
from typing import Any

from cppo.tasks.math_verifier import MathVerifier

_lock = threading.Lock()
_verifiers: dict[tuple[float, int], MathVerifier] = {}


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    time_limit: float = 5.0,
    workers: int = 2,
) -> float:
    """1.0 if the final answer of a response is mathematically equal to the right one, else 0.0.

    Parameters
    ----------
    solution_str, ground_truth : decoded response; right answer. `data_source` and `extra_info` play no part.
    time_limit : seconds; beyond that the answer scores 0.0.
    workers : helper processes of this process.

    Raises
    ------
    MissingDependency : math-verify is not installed.
    """
    with _lock:
        key = (float(time_limit), int(workers))
        verifier = _verifiers.get(key) or _verifiers.setdefault(key, MathVerifier(*key))
    return verifier.score(solution_str, str(ground_truth))
