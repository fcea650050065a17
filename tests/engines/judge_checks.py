"""One process of a group whose batches are not all right (started by tests/test_shards.py)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import cppo
from cppo.engines.support import TrustRegionLoss
from cppo.errors import UserError
from cppo.tokens import TokenBatch


def reduce(sums: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    dist.all_reduce(sums := sums.clone())
    dist.all_reduce(maxima := maxima.clone(), dist.ReduceOp.MAX)
    return sums, maxima


def judged(loss: TrustRegionLoss, logp: Tensor, mask: Tensor) -> str:
    try:
        loss.judge(TokenBatch(logp, logp.clone(), torch.ones(2), mask), on_policy=True, reduce=reduce)
    except UserError as error:
        return str(error)
    return "judged"


def check(rank: int, size: int) -> str:
    """A wrong batch of the last process stops all of them: each in a sentence, none waiting for the others."""
    logp, mask = torch.full((2, 3), -1.0), torch.ones(2, 3)
    wrong, empty = torch.full((2, 3), float("nan")), torch.zeros(2, 3)
    last = rank == size - 1
    said = judged(TrustRegionLoss(cppo.CPPO(divergence="binary_tv"), "TRL"), wrong if last else logp, mask)
    assert ("another process" in said) != last and said.startswith("TRL: ") and (not last or "NaN" in said), said
    # one with padding alone is not looked at and takes part in the rest
    loss = TrustRegionLoss(cppo.CPPO(divergence="binary_tv"), "TRL")
    assert judged(loss, wrong if last else logp, empty if last else mask) == "judged" and not loss.first
    return "ok"
