"""Collect mu's top K along every trajectory, row by row, whatever the agent loop does in between.

* A client right above the server sees every attempt with its whole prefix: turns of a conversation, and the pieces of a
  generation that was interrupted by a weight update and resumed (`FullyAsyncLLMServerClient`).
* When the trajectory is complete, each attempt is laid over it: its prefix must be the trajectory's beginning, and its
  tokens those that follow. An attempt that does not fit (an edited history, re-tokenised text) leaves its rows empty,
  and the loss refuses them: rows are never shifted or guessed.
* A server without top K (SGLang) is asked to score the finished sequence, in synchronous mode at temperature 1, where
  its weights are still those that sampled.
"""

from __future__ import annotations

import contextvars
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import ray
import torch
from torch import Tensor
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient

from cppo.engines.verl.config import IDS, LOGP
from cppo.errors import UserError

#: verl's names of the fields that carry a distribution a token (it made them for distillation).
TEACHER_IDS, TEACHER_LOGP = "teacher_ids", "teacher_logprobs"


class Attempt(NamedTuple):
    """One call of the server: the prefix, the tokens it returned, their log mu, and the top K ``[tokens, K]``."""

    prefix: np.ndarray
    tokens: np.ndarray
    logp: np.ndarray
    topk_ids: np.ndarray
    topk_logp: np.ndarray


# One list a trajectory: verl runs each in an asyncio task of its own.
_attempts: contextvars.ContextVar[list[Attempt] | None] = contextvars.ContextVar("cppo_attempts", default=None)


def lay_out(sequence: np.ndarray, attempts: list[Attempt], k: int) -> tuple[Tensor, Tensor]:
    """Rows ``[n, K + 1]`` of a sequence of n tokens: row t - 1 holds what is known of mu where token t was drawn.

    Column 0: the sampled token's id (-1: nothing is known) and log mu; columns 1 to K: mu's likeliest ids and their
    log mu (-inf: no such slot). Ids are int32, log-probabilities float32.
    """
    n = len(sequence)
    ids = np.zeros((n, k + 1), dtype=np.int32)
    ids[:, 0] = -1
    logp = np.full((n, k + 1), -np.inf, dtype=np.float32)
    logp[:, 0] = 0.0
    for attempt in attempts:
        start = len(attempt.prefix)
        count = min(len(attempt.tokens), n - start)
        if count <= 0 or start < 1:
            continue
        fits = np.array_equal(sequence[:start], attempt.prefix) and np.array_equal(
            sequence[start : start + count], attempt.tokens[:count]
        )
        if not fits:
            continue
        rows, width = slice(start - 1, start - 1 + count), min(k, attempt.topk_ids.shape[1])
        ids[rows, 0], logp[rows, 0] = attempt.tokens[:count], attempt.logp[:count]
        ids[rows, 1 : width + 1] = attempt.topk_ids[:count, :width]
        logp[rows, 1 : width + 1] = attempt.topk_logp[:count, :width]
    return torch.from_numpy(ids), torch.from_numpy(logp)


class _Listening(LLMServerClient):
    """Right above the call of the server; below whatever resumes an interrupted generation."""

    async def generate(self, request_id: Any, *, prompt_ids: Any, **kwargs: Any) -> Any:
        out = await super().generate(request_id, prompt_ids=prompt_ids, **kwargs)
        ids, logp = out.extra_fields.pop(IDS, None), out.extra_fields.pop(LOGP, None)
        attempts = _attempts.get()
        if attempts is not None and ids is not None and len(out.token_ids):
            attempts.append(
                Attempt(
                    np.asarray(prompt_ids, dtype=np.int64),
                    np.asarray(out.token_ids, dtype=np.int64),
                    np.asarray(out.log_probs, dtype=np.float32),
                    np.asarray(ids, dtype=np.int32).reshape(len(out.token_ids), -1),
                    np.asarray(logp, dtype=np.float32).reshape(len(out.token_ids), -1),
                )
            )
        return out


class TopKClient(_Listening):
    """For synchronous training."""


class FullyAsyncTopKClient(FullyAsyncLLMServerClient, _Listening):
    """For asynchronous training: the listener sits below the loop that resumes generations."""


class TopKAgentLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):  # type: ignore[misc, name-defined]
    """verl's worker, which adds mu's top K to each training trajectory."""

    async def _run_agent_loop(self, sampling_params: Any, trajectory: Any, **kwargs: Any) -> Any:
        _attempts.set(None if trajectory["validate"] else [])
        if trajectory["validate"]:  # nobody needs K log-probabilities of a validation token
            sampling_params = {**sampling_params, "logprobs": False}
        return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> Any:
        if not validate:
            for part in output if isinstance(output, list) else [output]:
                part.extra_fields[TEACHER_IDS], part.extra_fields[TEACHER_LOGP] = await self._top_k_of(part)
        return await super()._agent_loop_postprocess(output, validate, **kwargs)

    async def _compute_teacher_logprobs(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the fields are filled for every output above, and distillation is refused with top-K."""

    async def _top_k_of(self, output: Any) -> tuple[Tensor, Tensor]:
        k = int(self.config.actor_rollout_ref.actor.policy_loss.get("top_k", 20))
        sequence = np.asarray(list(output.prompt_ids) + list(output.response_ids), dtype=np.int64)
        attempts = _attempts.get() or []
        if not attempts:
            attempts = [await self._rescored(output, sequence, k)]
        return lay_out(sequence, attempts, k)

    async def _rescored(self, output: Any, sequence: np.ndarray, k: int) -> Attempt:
        rollout = self.config.actor_rollout_ref.rollout
        if self.config.trainer.v1.trainer_mode not in ("sync", "cppo_sync") or rollout.temperature != 1:
            raise UserError(
                f"the server ({rollout.name}) returned no top K. Scoring the finished sequence instead is right only "
                "in synchronous mode at temperature 1. Use rollout.name=vllm, or set "
                "+actor_rollout_ref.actor.policy_loss.rule.divergence=binary_tv."
            )
        if output.response_logprobs is None:
            raise UserError("the agent loop returned no log-probabilities: set rollout.calculate_log_probs=True.")
        answer = await self.llm_client.generate(
            uuid4().hex,
            prompt_ids=sequence.tolist(),
            sampling_params={"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k},
        )
        start = len(output.prompt_ids)
        ids = np.asarray(answer.extra_fields["prompt_ids"], dtype=np.int32)
        logp = np.asarray(answer.extra_fields["prompt_logprobs"], dtype=np.float32)
        # row t - 1 of a scored prompt is the distribution of token t; the last row is a dummy
        rows = slice(start - 1, len(sequence) - 1)
        return Attempt(
            sequence[:start],
            sequence[start:],
            np.asarray(output.response_logprobs, dtype=np.float32),
            ids[rows],
            logp[rows],
        )


class TopKAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager with these workers; CPPO's trainers put it in place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(TopKAgentLoopWorker)
