"""Rules of the token's own ratio rho_t = pi(y_t)/mu(y_t): none, PPO clip (and dual clip), CISPO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cppo.rules.base import Reason, TrustRegion, Verdict, register, require, require_positive
from cppo.rules.limits import BELOW_ONE, Limit
from cppo.tokens import TokenBatch

#: Why the theory says nothing about these rules.
BY_RATIO = "limits the ratio of sampled tokens, which bounds no divergence"


@register
@dataclass(frozen=True)
class NoTrustRegion(TrustRegion):
    """c_t = rho_t: the importance-weighted policy gradient, without any trust region.

    The gradient of the surrogate E_mu[sum_t rho_t A_t]. The control of every comparison.
    """

    name = "none"
    source = "importance-weighted policy gradient"
    unbounded = "no limit"

    def judge(self, batch: TokenBatch) -> Verdict:
        mask = batch.loss_mask
        ratio, _ = self.capped_ratio(batch.log_ratio(), mask)
        return Verdict(ratio, torch.where(mask, int(Reason.KEPT), int(Reason.OUTSIDE)).to(torch.uint8))


@register
@dataclass(frozen=True)
class PPOClip(TrustRegion):
    """c_t = rho_t, and 0 where A_t > 0 and rho_t > 1 + eps_high, or A_t < 0 and rho_t < 1 - eps_low.

    The gradient of PPO's pessimistic surrogate min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A). With 0.2 / 0.28
    this is clip-higher (DAPO), the "GRPO" row of the CPPO paper; with equal values PPO's own clip. Dual clip: for A_t
    < 0 also 0 where rho_t > dual_clip.

    Parameters
    ----------
    eps_low, eps_high : width of the band below and above 1; eps_low < 1.
    dual_clip : upper bound of the ratio for negative advantages, above 1 (verl's default is 3); None: off.
    """

    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float | None = None

    name = "ppo_clip"
    source = "Schulman et al. 2017 (1707.06347) Eq. 7; clip-higher: DAPO (2503.14476); dual clip: 1912.09729"
    limits: ClassVar[Mapping[str, Limit]] = {"eps_high": Limit(), "eps_low": BELOW_ONE}
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"grpo": {"eps_low": 0.2, "eps_high": 0.28}}
    unbounded = BY_RATIO

    def __post_init__(self) -> None:
        require_positive(self.name, eps_low=self.eps_low, eps_high=self.eps_high)
        require(
            self.eps_low < 1, f"ppo_clip: eps_low is {self.eps_low!r}, expected below 1 (a ratio is never negative)."
        )
        if self.dual_clip is not None:
            require_positive(self.name, dual_clip=self.dual_clip)
            require(self.dual_clip > 1, f"ppo_clip: dual_clip is {self.dual_clip!r}, expected above 1, or none.")

    def ratio_range(self) -> tuple[float, float]:
        return 1 - self.eps_low, 1 + self.eps_high

    def judge(self, batch: TokenBatch) -> Verdict:
        mask, advantages = batch.loss_mask, batch.token_advantages()
        ratio, _ = self.capped_ratio(batch.log_ratio(), mask)
        above, below = ratio > 1 + self.eps_high, (ratio < 1 - self.eps_low) & mask
        drop = (above & (advantages > 0)) | (below & (advantages < 0))
        if self.dual_clip is not None:
            drop = drop | ((ratio > self.dual_clip) & (advantages < 0))
        reason = torch.where(above | below, int(Reason.TOWARDS), int(Reason.KEPT))
        reason = torch.where(drop, int(Reason.RATIO_CLIP), reason)
        reason = torch.where(mask, reason, int(Reason.OUTSIDE)).to(torch.uint8)
        return Verdict(ratio.masked_fill_(drop, 0.0), reason)


@register
@dataclass(frozen=True)
class CISPO(TrustRegion):
    """c_t = clip(rho_t, ratio_min, ratio_max): the weight is clamped, no token is dropped.

    The bounds are absolute values of the ratio, not distances from 1 (engines differ: verl and SkyRL take 1 + eps, TRL
    the bound itself). MiniMax-M1 tunes the upper bound only. The CPPO paper does not print its values.
    """

    ratio_min: float = 0.0
    ratio_max: float = 1.2

    name = "cispo"
    source = "MiniMax-M1 (2506.13585) Eq. 4-5"
    limits: ClassVar[Mapping[str, Limit]] = {
        "ratio_max": Limit(1.0),
        "ratio_min": Limit(1.0, -1.0, 1.0, by_default=False),
    }
    unbounded = BY_RATIO

    def __post_init__(self) -> None:
        require_positive(self.name, ratio_max=self.ratio_max)
        require(
            isinstance(self.ratio_min, int | float) and 0 <= self.ratio_min < self.ratio_max,
            f"cispo: ratio_min is {self.ratio_min!r} and ratio_max {self.ratio_max!r}, expected 0 <= ratio_min "
            f"< ratio_max.",
        )

    def ratio_range(self) -> tuple[float, float]:
        return self.ratio_min, self.ratio_max

    def judge(self, batch: TokenBatch) -> Verdict:
        mask = batch.loss_mask
        ratio, _ = self.capped_ratio(batch.log_ratio(), mask)
        weight = ratio.clamp(self.ratio_min, self.ratio_max)
        return Verdict(weight * mask, clamp_reason(ratio != weight, mask))


def clamp_reason(clamped: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """CLAMPED where a weight was clamped, else KEPT; OUTSIDE beyond the mask."""
    reason = torch.where(clamped, int(Reason.CLAMPED), int(Reason.KEPT))
    return torch.where(mask, reason, int(Reason.OUTSIDE)).to(torch.uint8)


@register
@dataclass(frozen=True)
class MinPRO(TrustRegion):
    """c_t = clip(m_t rho_t, 1 - eps_low, 1 + eps_high) with m_t = min_{k<t} rho_k over earlier loss tokens, m_1 = 1.

    A low-variance stand-in for the prefix product prod_{k<=t} rho_k. As published, m_t is not bounded by 1: it
    exceeds 1 when every earlier ratio does. The paper's eps are unverified; 0.2 / 0.28 are those of third-party
    implementations.
    """

    eps_low: float = 0.2
    eps_high: float = 0.28

    name = "minpro"
    source = "MinPRO (2601.22718), soft objective; checked against secondary sources only"
    limits: ClassVar[Mapping[str, Limit]] = {"eps_high": Limit(), "eps_low": BELOW_ONE}
    unbounded = BY_RATIO

    def __post_init__(self) -> None:
        require_positive(self.name, eps_low=self.eps_low, eps_high=self.eps_high)
        require(self.eps_low < 1, f"minpro: eps_low is {self.eps_low!r}, expected below 1 (a ratio is never negative).")

    def judge(self, batch: TokenBatch) -> Verdict:
        mask = batch.loss_mask
        ratio = batch.log_ratio().exp()
        inf = ratio.new_full((), math.inf)
        smallest = batch.layout.exclusive_cummin(torch.where(mask, ratio, inf), math.inf)
        product = torch.where(smallest == math.inf, ratio, smallest * ratio)
        weight = product.clamp(1 - self.eps_low, 1 + self.eps_high)
        return Verdict(weight * mask, clamp_reason(weight != product, mask))
