"""One process of a context-parallel group (started by test_shards.py).

Every process builds the same whole batch from a seed, takes its chunks of it, and compares what the package computes
over the process group with the same slice of what it computes on the whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import cppo
from cppo.layout import Layout
from cppo.layout_sharded import Shard
from cppo.tokens import layout

from .cases import CASES, make, random_responses


def chunk_orders(rank: int, size: int) -> dict[str, tuple[int, ...]]:
    """Which chunks a rank holds. `scattered`: three chunks a rank in an order that is neither sorted nor regular."""
    scattered = torch.randperm(3 * size, generator=torch.Generator().manual_seed(size)).tolist()
    return {
        "contiguous": (rank,),
        "zigzag": (rank, 2 * size - 1 - rank),
        "zigzag reversed": (2 * size - 1 - rank, rank),
        "scattered": tuple(scattered[3 * rank : 3 * rank + 3]),
    }


def take(x: Tensor, chunks: tuple[int, ...], size: int) -> Tensor:
    pieces = x.chunk(len(chunks) * size, dim=1)
    return torch.cat([pieces[c] for c in chunks], 1)


def check(rank: int, size: int) -> str:
    width = 6 * size * 3
    rows = 5
    responses = random_responses(seed=size, lengths=[width] * rows, holes=0.3, token_advantages=True)
    for r, valid in zip(responses, (width, width // 2, 3, 1, 0), strict=True):
        r.mask[valid:] = False  # padding: whole chunks without any loss token, and an empty response
    policy, rollout = torch.stack([r.policy for r in responses]), torch.stack([r.rollout for r in responses])
    advantage, mask = torch.stack([r.advantage for r in responses]), torch.stack([r.mask for r in responses])

    for name, chunks in chunk_orders(rank, size).items():
        shard = Shard(None, chunks)

        def mine(x: Tensor, chunks: tuple[int, ...] = chunks) -> Tensor:
            return take(x, chunks, size)

        # The operations themselves, in float64: any error of the order would show.
        x = torch.rand(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        whole: Layout = layout()
        part: Layout = layout(None, shard)

        def compare(
            what: str, got: Tensor, want: Tensor, exact: bool = False, name: str = name, mine: Any = mine
        ) -> None:
            want = mine(want) if want.shape[-1] == width else want
            close = torch.equal(got, want) if exact else torch.allclose(got, want, rtol=1e-6, atol=1e-7)
            assert close, f"{name}, rank {rank}: {what}\n{got}\n{want}"

        compare("exclusive_cumsum", part.exclusive_cumsum(mine(x).clone()), whole.exclusive_cumsum(x.clone()))
        for initial in (0.2, math.inf):
            compare(
                "exclusive_cummin",
                part.exclusive_cummin(mine(x), initial),
                whole.exclusive_cummin(x.clone(), initial),
                exact=True,
            )
        compare("total", part.total(mine(x)), whole.total(x))
        compare("maximum", part.maximum(mine(x)), whole.maximum(x), exact=True)
        for q in (0.0, 0.3, 0.9, 1.0):
            compare("quantile", part.quantile(mine(x), mine(mask), q), whole.quantile(x, mask, q))
        ranks, local = whole.rank(x, mask), part.rank(mine(x), mine(mask))
        assert torch.equal(local[mine(mask)], mine(ranks)[mine(mask)]), f"{name}: rank"

        for case in CASES:
            rule = make(case)
            want = rule(cppo.TokenBatch(policy, rollout, advantage, mask))
            # One advantage a response, too: [B] is the same on every process.
            batch = cppo.TokenBatch(mine(policy), mine(rollout), mine(advantage), mine(mask), shard=shard)
            got = rule(batch)
            compare(f"{case}: coefficient", got.coefficient, want.coefficient)
            compare(f"{case}: reason", got.reason, want.reason, exact=True)
            for key in ("threshold", "delta_b", "budget_used"):
                a, b = getattr(got, key), getattr(want, key)
                assert (a is None) == (b is None), (case, key)
                if a is not None:
                    if key == "threshold":
                        inside = mine(mask)
                        a, b = a.expand(inside.shape)[inside], mine(b.expand(mask.shape))[inside]
                    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), f"{name}, {case}: {key}\n{a}\n{b}"
    return "all equal"
