"""A sampler for machines without vLLM: it samples with the model in memory and records what it sampled from.

* mu is known exactly: log mu of every sampled token and its top K come from the very logits that were sampled from, in
  float32; for exact divergences, the hidden states behind them. No second pass over the responses recomputes them.
* Prompts are computed once for all responses to them. Sequences that have ended leave the batch.
* Random numbers come from torch's global generator, which is part of a checkpoint: a resumed run samples the same.

Left out: everything that bends the distribution (top-p, top-k, min-p, penalties). Training must not have it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cppo.engines.trl.head import causal_lm, hidden_states
from cppo.errors import StopError

#: Ended sequences are dropped from the batch once less than this share of it is alive: each time copies the cache.
ALIVE = 0.9


@dataclass(frozen=True)
class Sampled:
    """Responses, one for each row that was asked for.

    tokens : ids of each response, the end token included. logp : log mu of these, float32. top_ids, top_logp : mu's K
    likeliest ids (int64) and their log-probabilities (float32) where each token was sampled, ``[length, K]``; None
    without top K. hidden, logsumexp : the last hidden state that each token was sampled from, ``[length, d]``, and the
    logsumexp of its logits / temperature, float32; None unless asked for. dtype : in which the head computed.
    """

    tokens: list[Tensor]
    logp: list[Tensor]
    top_ids: list[Tensor] | None = None
    top_logp: list[Tensor] | None = None
    hidden: list[Tensor] | None = None
    logsumexp: list[Tensor] | None = None
    dtype: torch.dtype = torch.float32

    def padded_logp(self, length: int) -> Tensor:
        """log mu, float32 ``[B, length]``, 0 beyond a response."""
        return _filled(self.logp, length, 0.0)

    def padded_top(self, length: int) -> tuple[Tensor, Tensor]:
        """Top K ids int64 and log-probabilities float32, ``[B, length, K]``; beyond a response 0 and -inf.

        Raises
        ------
        ValueError : no top K were recorded.
        """
        if self.top_ids is None or self.top_logp is None:
            raise ValueError("no top K were recorded: sample with top_k.")
        return _filled(self.top_ids, length, 0), _filled(self.top_logp, length, -torch.inf)

    def padded_states(self, length: int) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, length, d]`` and logsumexp, float32 ``[B, length]``, 0 beyond a response.

        Raises
        ------
        ValueError : none were recorded.
        """
        if self.hidden is None or self.logsumexp is None:
            raise ValueError("no hidden states were recorded: sample with states=True.")
        return _filled(self.hidden, length, 0), _filled(self.logsumexp, length, 0.0)


class Sampler(Protocol):
    """What `TrustRegionTrainer(sampler=...)` samples with: `sample` bound to a model, or a function around another
    engine (vLLM's `generate` with `logprobs=K` returns all that is asked for), which keeps its own weights up to date.
    """

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        ends: Collection[int],
        top_k: int,
    ) -> Sampled:
        """One response to each of `prompts`; see `sample`."""


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    ends: Collection[int],
    pad: int,
    top_k: int = 0,
    states: bool = False,
) -> Sampled:
    """One response to each of `prompts` from the full softmax of logits / temperature.

    Parameters
    ----------
    prompts : token ids, a row for each response; equal prompts are computed once.
    ends : ids that end a response. pad : id that fills prompts up on the left; its value does not matter.
    top_k : K; of a smaller vocabulary all; 0: none. states : whether hidden states are recorded.
    """
    was_training = model.training
    model.eval()
    seen = _States()
    try:
        with hidden_states(causal_lm(model), seen) if states else nullcontext():
            return _sample(model, prompts, max_new_tokens, temperature, sorted(ends), pad, top_k, seen)
    finally:
        model.train(was_training)


class _States:
    """The newest hidden states at the last position, ``[rows, d]``, and the dtype in which the head computes."""

    hidden: Tensor | None = None
    dtype = torch.float32

    def __call__(self, hidden: Tensor, dtype: torch.dtype) -> None:
        self.hidden, self.dtype = hidden[:, -1], dtype


def _sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    length: int,
    temperature: float,
    ends: list[int],
    pad: int,
    top_k: int,
    seen: _States,
) -> Sampled:
    device = model.device
    places: dict[tuple[int, ...], int] = {}
    row_of = torch.tensor([places.setdefault(tuple(prompt), len(places)) for prompt in prompts], device=device)
    ids, attention = _padded(list(places), pad, device)
    cache = DynamicCache(config=model.config)
    out = model(
        input_ids=ids,
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_select_indices(row_of)
    attention, logits = attention[row_of], out.logits[row_of, -1]
    hidden = None if seen.hidden is None else seen.hidden[row_of]
    rows = torch.arange(len(prompts), device=device)  # which response each row of the batch is
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    end = torch.tensor(ends, device=device)
    book = _Book(len(prompts), length, min(top_k, logits.shape[-1]), device)
    for step in range(length):
        token = book.draw(step, rows, alive, logits.float() / temperature, hidden)
        alive = alive & ~torch.isin(token, end)
        if step == length - 1 or not bool(alive.any()):
            break
        if float(alive.float().mean()) < ALIVE:
            kept = alive.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            token, attention, rows, alive = token[kept], attention[kept], rows[kept], alive[kept]
        attention = torch.cat([attention, attention.new_ones(len(attention), 1)], 1)
        out = model(
            input_ids=token[:, None],
            attention_mask=attention,
            position_ids=attention.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        logits, hidden = out.logits[:, -1], seen.hidden
    return book.read(seen.dtype)


def draw_one(p: Tensor) -> Tensor:
    """One index for each row of probabilities ``[n, V]``, int64 ``[n, 1]``: where a uniform number falls in their sum.

    `torch.multinomial` draws V numbers a row for it: a sixth of a rollout at V = 49,152. The sum is float64:
    in float32 its rounding (1e-7 V) would exceed the probabilities of rare tokens.

    Raises
    ------
    StopError : NaN among the probabilities.
    """
    wide = torch.float32 if p.device.type == "mps" else torch.float64  # MPS has no float64
    edges = p.to(wide).cumsum(-1)
    total = edges[:, -1:]
    if not bool(total.isfinite().all()):
        raise StopError(
            "the model's logits hold NaN or infinity, so nothing can be sampled: its weights or precision are broken. "
            "Go back to an earlier checkpoint and lower the learning rate or set precision=float32."
        )
    u = torch.rand(len(p), 1, dtype=wide, device=p.device) * total
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))  # the product may round up to the total
    return torch.searchsorted(edges, u, right=True)  # the first edge above u: never an index of probability 0


def _filled(rows: Sequence[Tensor], length: int, value: float) -> Tensor:
    out = rows[0].new_full((len(rows), length, *rows[0].shape[1:]), value)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def _padded(prompts: list[tuple[int, ...]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts filled up on the left: ids and attention mask, int64 ``[P, longest]``."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


class _Book:
    """What has been sampled: tensors ``[responses, length(, K)]``, filled column by column."""

    def __init__(self, responses: int, length: int, top_k: int, device: torch.device) -> None:
        self.tokens = torch.zeros(responses, length, dtype=torch.long, device=device)
        self.logp = torch.zeros(responses, length, device=device)
        self.lengths = torch.zeros(responses, dtype=torch.long, device=device)
        self.top_k = top_k
        self.top_ids = torch.zeros(responses, length, top_k, dtype=torch.long, device=device)
        self.top_logp = torch.zeros(responses, length, top_k, device=device)
        self.logsumexp = torch.zeros(responses, length, device=device)
        self.hidden: Tensor | None = None

    def draw(self, step: int, rows: Tensor, alive: Tensor, logits: Tensor, hidden: Tensor | None) -> Tensor:
        """Sample a token for each row of the batch, write down those of rows that are alive; int64 ``[rows]``."""
        log_mu = logits.log_softmax(-1)
        token = draw_one(log_mu.exp())
        at = rows[alive]
        self.tokens[at, step] = token[alive, 0]
        self.logp[at, step] = log_mu.gather(-1, token)[alive, 0]
        self.lengths[at] = step + 1
        if self.top_k:
            top = log_mu.topk(self.top_k, -1)
            self.top_ids[at, step], self.top_logp[at, step] = top.indices[alive], top.values[alive]
        if hidden is not None:
            if self.hidden is None:
                self.hidden = hidden.new_zeros(*self.tokens.shape, hidden.shape[-1])
            self.hidden[at, step] = hidden[alive]
            # log mu = z - logsumexp, at the sampled token; no second pass over the vocabulary
            self.logsumexp[at, step] = (logits.gather(-1, token) - log_mu.gather(-1, token))[alive, 0]
        return token[:, 0]

    def read(self, dtype: torch.dtype) -> Sampled:
        """What was written, row by row. dtype : of the head."""
        lengths = self.lengths.tolist()

        def cut(values: Tensor) -> list[Tensor]:
            return [row[:length] for row, length in zip(values, lengths, strict=True)]

        found = Sampled(cut(self.tokens), cut(self.logp), dtype=dtype)
        if self.top_k:
            found = replace(found, top_ids=cut(self.top_ids), top_logp=cut(self.top_logp))
        if self.hidden is not None:
            found = replace(found, hidden=cut(self.hidden), logsumexp=cut(self.logsumexp))
        return found
