"""Position weights w_t of CPPO (Eq. 9), their prefix sums in closed form; for ablations other shapes and a seeded
shuffle.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cppo.tokens import TokenBatch


def linear_weights(position: Tensor, count: Tensor, w_min: float) -> Tensor:
    """w_t = 1 - (1 - w_min) (t - 1)/(T - 1); w = 1 where T = 1 (Eq. 9).

    `position` is t - 1 (0-based) of each token, `count` the T of its sequence, broadcastable.
    """
    slope = (1 - w_min) / (count - 1).clamp(min=1)
    return (position * -slope).add_(1)


def linear_prefix_weight(position: Tensor, count: Tensor, w_min: float) -> Tensor:
    """W_{t-1} = sum of the first k = t - 1 linear weights, as the arithmetic series k - (1 - w_min) k (k - 1) / (2 (T
    - 1)).
    """
    slope = (1 - w_min) / (2 * (count - 1).clamp(min=1))
    return (position - 1).mul_(-slope).add_(1).mul_(position)


def cosine_weights(position: Tensor, count: Tensor, w_min: float) -> Tensor:
    """w_t = w_min + (1 - w_min) (1 + cos(pi (t - 1)/(T - 1))) / 2; w = 1 where T = 1."""
    return (1 + (position * (math.pi / (count - 1).clamp(min=1))).cos()) * ((1 - w_min) / 2) + w_min


def matched_weights(position: Tensor, count: Tensor, w_min: float) -> Tensor:
    """w_t = max(w_min, (T - t)/(T - 1)): as the residual weighs a token (Prop. 4), with a floor; w = 1 where T = 1."""
    return (1 - position / (count - 1).clamp(min=1)).clamp(min=w_min)


def reversed_weights(position: Tensor, count: Tensor, w_min: float) -> Tensor:
    """The linear weights from the end, w_1 = w_min, w_T = 1: late tokens are limited most."""
    return linear_weights(count - 1 - position, count, w_min)


#: Shapes without a closed prefix sum: (t - 1, T, w_min) -> w_t, broadcastable. As in `cppo.theory.schedules`.
SHAPES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cosine": cosine_weights,
    "matched": matched_weights,
    "reversed": reversed_weights,
}


def _mix(x: Tensor) -> Tensor:
    """A bijective scrambling of int64 (xorshift-multiply; products wrap around)."""
    # `>>` on int64 copies the sign bit; the mask makes it a logical shift.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def shuffled_position(batch: TokenBatch, position: Tensor, seed: int) -> Tensor:
    """A random permutation of 0..T-1 within each response, in the dtype of `position`.

    Tokens are ranked by a hash of (seed, position, bits of log mu(y_t)): no generator, so that the same response gets
    the same permutation in every update, layout and micro-batch, and different responses different ones.
    """
    bits = batch.clean(batch.rollout_logp).float().contiguous().view(torch.int32).long()
    code = _mix(_mix(position.long() + seed * 1_000_003 + 1) ^ bits)
    key = ((code >> 11) & 0x1FFFFFFFFFFFFF).double() / 2**53
    return batch.layout.rank(key, batch.loss_mask).to(position.dtype)
