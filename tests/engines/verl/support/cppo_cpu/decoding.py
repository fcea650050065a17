"""Sampling from a transformers model, a batch of requests at a time, with log-probabilities of what was sampled.

A request's samples are a function of its seed and of the model alone, not of the batch that it falls into (up to
rounding), so that a run can be repeated although requests arrive in any order.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass
class Request:
    """One prompt to continue, and what has come of it.

    Attributes
    ----------
    prompt : token ids, at least one.
    max_tokens : the most tokens to sample.
    temperature : above 0; the distribution sampled from, and scored, is softmax(logits / temperature).
    interrupt_after : give up after this many tokens with `stop_reason` "aborted", as a server does that is about to
        receive new weights; None: never.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float
    stop: frozenset[int]
    seed: str
    interrupt_after: int | None = None
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_logp: list[list[float]] = field(default_factory=list)
    stop_reason: str | None = None

    def __post_init__(self) -> None:
        if not self.prompt or self.max_tokens < 1:
            raise ValueError(f"prompt of {len(self.prompt)} tokens, max_tokens={self.max_tokens}: both at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: this server samples, it has no greedy decoding")
        self.uniform = random.Random(self.seed)

    def take(self, token: int, logp: float, top: tuple[list[int], list[float]] | None) -> None:
        """The next token; sets `stop_reason` if it is the last."""
        self.tokens.append(token)
        self.logp.append(logp)
        if top is not None:
            self.top_ids.append(top[0])
            self.top_logp.append(top[1])
        if token in self.stop:
            self.stop_reason = "completed"
        elif len(self.tokens) >= self.max_tokens:
            self.stop_reason = "completed"  # vLLM's "length"; verl's servers report both as completed
        elif self.interrupt_after is not None and len(self.tokens) >= self.interrupt_after:
            self.stop_reason = "aborted"


@torch.no_grad()
async def decode(
    model: PreTrainedModel, requests: Sequence[Request], top_k: int, aborted: Callable[[], bool] = lambda: False
) -> None:
    """Sample until every request has its `stop_reason`; float32. Other tasks of the event loop run between tokens.

    `top_k` > 0 also keeps the ids and log-probabilities of the K most probable tokens, most probable first, of each
    distribution that was sampled from. Where `aborted()` becomes true, unfinished requests end as "aborted".
    """
    width = max(len(request.prompt) for request in requests)
    mask = torch.zeros(len(requests), width, dtype=torch.long)
    ids = torch.zeros(len(requests), width, dtype=torch.long)  # any id: hidden by the mask
    for row, request in enumerate(requests):
        mask[row, width - len(request.prompt) :] = 1
        ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    temperature = torch.tensor([request.temperature for request in requests])
    cache = None
    while True:
        output = model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logp = torch.log_softmax(output.logits[:, -1].float() / temperature[:, None], -1)
        sampled = _sample(logp, requests)
        chosen = logp.gather(-1, sampled[:, None])[:, 0].tolist()
        top = logp.topk(min(top_k, logp.shape[-1])) if top_k else None
        for row, request in enumerate(requests):
            if request.stop_reason is None:
                best = None if top is None else (top.indices[row].tolist(), top.values[row].tolist())
                request.take(int(sampled[row]), chosen[row], best)
        await asyncio.sleep(0)
        if aborted():
            for request in requests:
                request.stop_reason = request.stop_reason or "aborted"
        if all(request.stop_reason for request in requests):
            return
        ids, position = sampled[:, None], position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(requests), 1)], -1)


def _sample(logp: Tensor, requests: Sequence[Request]) -> Tensor:
    """One token a row by the inverse of the cumulative distribution, in float64; rows that are done get any token."""
    cumulative = logp.double().exp().cumsum(-1)
    uniform = torch.tensor(
        [[0.0 if request.stop_reason else request.uniform.random()] for request in requests], dtype=torch.float64
    )
    token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    return token.clamp(max=logp.shape[-1] - 1)


@torch.no_grad()
def score_prompt(model: PreTrainedModel, tokens: list[int], top_k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and log-probabilities of the K most probable tokens after each token of a sequence, ``[T][K]``.

    As verl's servers answer ``prompt_logprobs``: row t belongs to token t + 1, the last row is zeros; K = 0 gives the
    token itself.
    """
    logp = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0, :-1].float(), -1)
    ids = logp.topk(top_k).indices if top_k else torch.tensor(tokens[1:])[:, None]
    return [*ids.tolist(), [0] * ids.shape[1]], [*logp.gather(-1, ids).tolist(), [0.0] * ids.shape[1]]
