"""One process of a context-parallel group, adaptive TV: a zigzag slice of the rows decides as the whole rows do."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import cppo
from cppo import TokenBatch
from cppo.layout_sharded import Shard
from cppo.scoring.adaptive import adaptive_for_rule

from .adaptive_cases import Exact, scored

RULES = (
    cppo.CPPO(divergence="adaptive_tv"),
    cppo.CPPO(budget="fixed", delta_b=0.03, weights="shuffled", divergence="adaptive_tv"),
    cppo.TRMAvg(delta=0.04, divergence="adaptive_tv"),
    cppo.DPPO(divergence="adaptive_tv"),
)


def check(rank: int, size: int) -> str:
    whole = scored(21, count=40, width=12 * size)
    batch = whole.batch
    # The last responses have all their tokens on the first process: the others must keep it company.
    batch.mask[-10:, 6:] = False
    shard = Shard.zigzag()

    def mine(x: Tensor) -> Tensor:
        pieces = x.chunk(2 * size, dim=1)
        return torch.cat([pieces[c] for c in shard.chunks], 1)

    part = TokenBatch(
        mine(batch.policy_logp), mine(batch.rollout_logp), batch.advantages, mine(batch.mask), shard=shard
    )
    here = replace(whole, batch=part, lower=mine(whole.lower), upper=mine(whole.upper), truth=mine(whole.truth))
    asked = 0
    for rows in (slice(0, 40), slice(30, 40)):
        for rule in RULES:
            tokens = (x[rows] for x in (part.policy_logp, part.rollout_logp, part.advantages, part.mask))
            some = TokenBatch(*tokens, shard=shard)
            case = replace(here, batch=some, **{n: getattr(here, n)[rows] for n in ("lower", "upper", "truth")})
            exact = Exact(case)
            found = adaptive_for_rule(rule, some, case.lower, case.upper, exact)
            got = rule(some.with_divergence(found.divergence)).coefficient
            want = rule(batch.with_divergence(whole.truth.float())).coefficient
            assert torch.allclose(got, mine(want)[rows], rtol=1e-5, atol=0), (rank, rule)
            assert found.passes == len(exact.calls)
            asked += len(exact.calls)
    assert (asked > 0) or rank > 0
    return "all equal"
