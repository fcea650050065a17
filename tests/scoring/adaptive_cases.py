"""Random policies over a small vocabulary, with the top-K interval and the exact TV of each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

import cppo
from cppo import TokenBatch
from cppo.divergence import topk_interval

VOCABULARY, K = 50, 5


@dataclass(frozen=True)
class Scored:
    """Tokens ``[B, T]`` (or packed ``[N]``) in float32, as an engine has them, and the exact TV in float64."""

    batch: TokenBatch
    lower: Tensor
    upper: Tensor
    truth: Tensor

    @property
    def mask(self) -> Tensor:
        return self.batch.loss_mask

    def double(self) -> TokenBatch:
        """The same log-probabilities in float64 arithmetic."""
        b = self.batch
        return TokenBatch(b.policy_logp.double(), b.rollout_logp.double(), b.advantages, b.mask, b.cu_seqlens)

    def packed(self) -> Scored:
        """The rows, cut to their length, one behind the other."""
        b = self.batch
        position = torch.arange(self.mask.shape[1])
        length = torch.where(self.mask, position + 1, 0).amax(1)
        keep = position < length[:, None]
        edges = torch.cat([length.new_zeros(1), length.cumsum(0)])
        batch = TokenBatch(b.policy_logp[keep], b.rollout_logp[keep], b.advantages, b.mask[keep], edges)
        return Scored(batch, self.lower[keep], self.upper[keep], self.truth[keep])


@dataclass
class Exact:
    """The callback on a `Scored`: keeps the positions it was asked for, refuses what its contract excludes."""

    scored: Scored
    calls: list[Tensor] = field(default_factory=list)

    def __call__(self, index: Tensor) -> Tensor:
        assert index.dtype == torch.int64 and index.dim() == 1 and index.numel() > 0
        assert (index.diff() > 0).all(), "positions must ascend"
        assert self.scored.mask.flatten()[index].all(), "only loss tokens"
        seen = torch.cat([*self.calls, index])
        assert seen.unique().numel() == seen.numel(), "a token was evaluated twice"
        self.calls.append(index)
        return self.scored.truth.flatten()[index].float()


@cache
def scored(
    seed: int, count: int = 500, width: int = 60, peaked: float = 0.7, drift: float = 0.15, holes: float = 0.1
) -> Scored:
    """Responses of 1 to `width` columns, some of them holes; what is outside the mask is garbage.

    A share `peaked` of the states has one likely token. The policy has drifted by noise on its logits whose size,
    around `drift`, differs from state to state. A tenth of the responses has advantage 0.
    """
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, width + 1, (count, 1), generator=g)
    mask = (torch.arange(width) < length) & (torch.rand(count, width, generator=g) >= holes)
    tokens = int(mask.sum())
    steep = torch.where(torch.rand(tokens, 1, generator=g) < peaked, 6.0, 1.0)
    steep = steep * (0.7 + 0.6 * torch.rand(tokens, 1, generator=g))
    logits = (-steep * torch.arange(1, VOCABULARY + 1).log()).double()
    size = drift * torch.randn(tokens, 1, generator=g).exp()
    policy = (logits + size * torch.randn(tokens, VOCABULARY, generator=g)).log_softmax(-1)
    rollout = logits.log_softmax(-1)
    ids = torch.multinomial(rollout.exp(), 1, generator=g)
    top = rollout.topk(K, -1).indices
    pi, mu = (x.gather(-1, ids)[:, 0].float() for x in (policy, rollout))
    ends = topk_interval(policy.gather(-1, top).float(), rollout.gather(-1, top).float(), pi, mu, (top == ids).any(-1))
    advantages = torch.randn(count, generator=g)
    advantages[::10] = 0.0

    def spread(x: Tensor) -> Tensor:
        return torch.full(mask.shape, torch.nan, dtype=x.dtype).masked_scatter(mask, x)

    truth = spread(cppo.divergence.exact_tv(policy, rollout))
    return Scored(TokenBatch(spread(pi), spread(mu), advantages, mask), spread(ends[0]), spread(ends[1]), truth)


def share(tokens: Tensor, mask: Tensor) -> float:
    """Share of the tokens in `mask` that are among `tokens`; 0 without any."""
    return float((tokens & mask).sum() / mask.sum().clamp(min=1))
