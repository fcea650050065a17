"""TRM: a response whose divergence is too large is rejected as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cppo.rules.base import Reason, TrustRegion, Verdict, register, require_divergence, require_positive
from cppo.rules.limits import Limit
from cppo.tokens import TokenBatch


def _max(batch: TokenBatch, divergence: Tensor) -> Tensor:
    """max_t D_t, broadcastable; D is 0 outside the mask and never negative."""
    return batch.layout.maximum(divergence)


def _mean(batch: TokenBatch, divergence: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """mean_t D_t over loss tokens, broadcastable; and what the other tokens leave of T delta, shape of the tokens."""
    count = batch.layout.total(batch.loss_mask.to(divergence.dtype)).clamp(min=1)
    total = batch.layout.total(divergence)
    return total / count, divergence + (count * delta - total)


def _judge(rule: TrustRegion, batch: TokenBatch, divergence: Tensor, keep: Tensor, threshold: Tensor) -> Verdict:
    mask = batch.loss_mask
    ratio, capped = rule.capped_ratio(batch.log_ratio(), mask)
    reason = torch.where(keep, int(Reason.KEPT), int(Reason.SEQUENCE_LIMIT)).expand_as(mask)
    reason = torch.where(mask, reason, int(Reason.OUTSIDE)).to(torch.uint8)
    return Verdict(ratio * keep, reason, divergence, threshold, capped=capped)


@register
@dataclass(frozen=True)
class TRMMax(TrustRegion):
    """c_t = rho_t if max_s D_s <= delta over the response, else 0 for all of it.

    No exemption for tokens that move back to mu. Rejected responses stay in every denominator. The paper takes
    KL(mu || pi) from stored logits (0.05 nats alone); with sampled tokens only, k2 = (log rho)^2 / 2 can be passed as
    the batch's divergence.
    """

    delta: float = 0.05
    divergence: str = "topk_kl"

    name = "trm_max"
    source = "TRM (2512.23075), maximum criterion"
    limits: ClassVar[Mapping[str, Limit]] = {"delta": Limit()}

    def __post_init__(self) -> None:
        require_positive(self.name, delta=self.delta)
        require_divergence(self.name, self.divergence)

    def judge(self, batch: TokenBatch) -> Verdict:
        divergence = self.token_divergence(batch)
        keep = _max(batch, divergence) <= self.delta
        return _judge(self, batch, divergence, keep, divergence.new_full((1,) * divergence.dim(), self.delta))


@register
@dataclass(frozen=True)
class TRMAvg(TrustRegion):
    """c_t = rho_t if the mean of D_s over the response's loss tokens is at most delta, else 0 for all of it."""

    delta: float = 0.001
    divergence: str = "topk_kl"

    name = "trm_avg"
    source = "TRM (2512.23075), average criterion"
    limits: ClassVar[Mapping[str, Limit]] = {"delta": Limit()}

    def __post_init__(self) -> None:
        require_positive(self.name, delta=self.delta)
        require_divergence(self.name, self.divergence)

    def judge(self, batch: TokenBatch) -> Verdict:
        divergence = self.token_divergence(batch)
        mean, left = _mean(batch, divergence, self.delta)
        return _judge(self, batch, divergence, mean <= self.delta, left)


@register
@dataclass(frozen=True)
class TRMMaxAvg(TrustRegion):
    """c_t = rho_t if max_s D_s <= delta and mean_s D_s <= delta_avg over the response, else 0 for all of it."""

    delta: float = 0.1
    delta_avg: float = 0.002
    divergence: str = "topk_kl"

    name = "trm_max_avg"
    source = "TRM (2512.23075), both criteria"
    limits: ClassVar[Mapping[str, Limit]] = {"delta": Limit(), "delta_avg": Limit()}

    def __post_init__(self) -> None:
        require_positive(self.name, delta=self.delta, delta_avg=self.delta_avg)
        require_divergence(self.name, self.divergence)

    def judge(self, batch: TokenBatch) -> Verdict:
        divergence = self.token_divergence(batch)
        mean, left = _mean(batch, divergence, self.delta_avg)
        keep = (_max(batch, divergence) <= self.delta) & (mean <= self.delta_avg)
        return _judge(self, batch, divergence, keep, left.clamp(max=self.delta))
