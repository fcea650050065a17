"""DPPO: one divergence limit for all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from cppo.rules.base import (
    Reason,
    TrustRegion,
    Verdict,
    moves_away,
    register,
    require_cap,
    require_divergence,
    require_positive,
)
from cppo.rules.limits import Limit
from cppo.tokens import TokenBatch


@register
@dataclass(frozen=True)
class DPPO(TrustRegion):
    """c_t = M_t min(rho_t, ratio_cap); M_t = 0 where A_t (rho_t - 1) > 0 and D_t > delta, else 1.

    A uniform token-level trust region: the limit does not know where in the response a token stands.

    Parameters
    ----------
    delta : limit of D_t. Probability units for TV (0.15; DPPO uses 0.1 to 0.2), nats for KL (about 0.05).
    divergence : which D_t (see `cppo.divergence`).
    ratio_cap : bound of the ratio in the coefficient (DPPO's code: 5 to 20; its paper finds that it hurts); None: off.
    """

    delta: float = 0.15
    divergence: str = "topk_tv"
    ratio_cap: float | None = None

    name = "dppo"
    source = "DPPO (2602.04879) Eq. 12-16"
    limits: ClassVar[Mapping[str, Limit]] = {"delta": Limit()}
    limits_tokens = True

    def __post_init__(self) -> None:
        require_positive(self.name, delta=self.delta)
        require_divergence(self.name, self.divergence)
        require_cap(self.name, self.ratio_cap)

    def judge(self, batch: TokenBatch) -> Verdict:
        mask, divergence = batch.loss_mask, self.token_divergence(batch)
        log_ratio = batch.log_ratio()
        over = divergence > self.delta
        drop = over & moves_away(batch.token_advantages(), log_ratio)
        coefficient, capped = self.capped_ratio(log_ratio, mask)
        coefficient.masked_fill_(drop, 0.0)
        # uint8 arithmetic instead of nested where: KEPT 0, TOWARDS 1, TOKEN_LIMIT 2
        reason = over.to(torch.uint8).add_(drop)
        reason = reason.masked_fill_(~mask, int(Reason.OUTSIDE))
        return Verdict(
            coefficient, reason, divergence, divergence.new_full((1,) * divergence.dim(), self.delta), capped=capped
        )
