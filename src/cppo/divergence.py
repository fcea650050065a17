"""Divergences between the rollout policy mu and the policy pi at one state (CPPO section 2.3 and App. D).

* exact (two full rows), top-K (mu's K likeliest tokens, the sampled token, and the rest as one class) and binary (the
  sampled token against the rest); total variation TV = 1/2 sum |mu - pi| and KL(mu || pi) in nats.
* A coarser partition never gives more: binary <= top-K replace_last <= top-K append <= exact (data processing), for
  TV and KL alike. For TV there is also an upper end: exact <= top-K + min(rest of pi, rest of mu).
* All functions take log-probabilities, compute in float32 or better without gradient, and return values that are never
  NaN, never negative; TV is never above 1.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

#: Smallest probability of a class in a KL, so that log(m/p) stays finite (Stable-RL uses the same figure).
KL_FLOOR = 1e-12

#: What a rule may ask for. `binary_*` is computed from the sampled token alone; the rest must come with the batch.
#: `adaptive_tv` decides as `exact_tv` does: by `topk_interval` where that is enough, by the exact TV where it is not.
DIVERGENCES = ("exact_tv", "exact_kl", "adaptive_tv", "topk_tv", "topk_kl", "topk_tv_upper", "binary_tv", "binary_kl")

Variant = Literal["append", "replace_last"]


def _float(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.dtype == torch.float64 else x.float()


def _kl_term(m: Tensor, log_m: Tensor, log_p: Tensor) -> Tensor:
    """m * (log m - log p), 0 where m = 0, with p at least KL_FLOOR."""
    floor = math.log(KL_FLOOR)
    gap = log_m.clamp(min=floor) - log_p.clamp(min=floor)
    return torch.where(m > 0, m * gap, torch.zeros_like(m))


def binary_tv(policy_logp: Tensor, rollout_logp: Tensor) -> Tensor:
    """TV over {y_t, everything else}: abs(pi(y_t) - mu(y_t)). Any shape; probability units (DPPO Eq. 13)."""
    return _float(policy_logp).exp().sub_(_float(rollout_logp).exp()).abs_().clamp_(max=1.0)


def binary_kl(policy_logp: Tensor, rollout_logp: Tensor) -> Tensor:
    """KL over {y_t, everything else}: m log(m/p) + (1-m) log((1-m)/(1-p)), m = mu(y_t), p = pi(y_t); nats (DPPO Eq.
    14).
    """
    log_p, log_m = _float(policy_logp).clamp(max=0.0), _float(rollout_logp).clamp(max=0.0)
    # log(1 - e^x) by expm1: exact where the token is almost certain, where 1 - e^x cancels.
    log_1p, log_1m = torch.log(-torch.expm1(log_p)), torch.log(-torch.expm1(log_m))
    return (_kl_term(log_m.exp(), log_m, log_p) + _kl_term(-torch.expm1(log_m), log_1m, log_1p)).clamp(min=0.0)


def _classes(
    policy_topk_logp: Tensor,
    rollout_topk_logp: Tensor,
    policy_logp: Tensor,
    rollout_logp: Tensor,
    inside: Tensor,
    variant: Variant,
) -> tuple[Tensor, Tensor]:
    """Probabilities of the classes without "other": ``[..., K + 1]`` of pi and of mu, absent classes with mass 0."""
    if variant not in ("append", "replace_last"):
        raise ValueError(
            f"variant is {variant!r}, expected 'append' (K + 2 classes) or 'replace_last' (K + 1 classes)."
        )
    if policy_topk_logp.shape != rollout_topk_logp.shape:
        raise ValueError(
            f"policy_topk_logp has shape {list(policy_topk_logp.shape)}, rollout_topk_logp "
            f"{list(rollout_topk_logp.shape)}: "
            "both must hold the log-probabilities at the same K ids (mu's most likely tokens)."
        )
    if inside.shape != policy_logp.shape or policy_topk_logp.shape[:-1] != policy_logp.shape:
        raise ValueError(
            f"inside has shape {list(inside.shape)} and policy_topk_logp {list(policy_topk_logp.shape)}, expected "
            f"{list(policy_logp.shape)} and {list(policy_logp.shape)} + [K] (the shape of policy_logp)."
        )
    inside = inside.bool()[..., None]
    both = []
    for top, sampled in ((policy_topk_logp, policy_logp), (rollout_topk_logp, rollout_logp)):
        probabilities, own = _float(top).exp(), _float(sampled).exp()[..., None]
        probabilities = torch.nan_to_num(probabilities, nan=0.0)
        own = torch.where(inside, torch.zeros_like(own), own)
        if variant == "replace_last":
            # A sampled token outside mu's top K takes the place of the K-th id, whose mass joins "other". That is what
            # a rollout server that may return only K log-probabilities does; it underestimates D.
            last = torch.where(inside, probabilities[..., -1:], own)
            both.append(torch.cat([probabilities[..., :-1], last], -1))
        else:
            both.append(torch.cat([probabilities, own], -1))
    return both[0], both[1]


def _rest(p: Tensor) -> Tensor:
    # Rounding can push the sum above 1 by an ulp or two: a negative rest is not mass.
    return (1.0 - p.sum(-1)).clamp(min=0.0)


def topk_tv(
    policy_topk_logp: Tensor,
    rollout_topk_logp: Tensor,
    policy_logp: Tensor,
    rollout_logp: Tensor,
    inside: Tensor,
    variant: Variant = "append",
) -> Tensor:
    """TV over {mu's top-K ids} + {sampled token} + {other}: half the L1 distance of the class masses.

    Parameters
    ----------
    policy_topk_logp, rollout_topk_logp : log pi and log mu at mu's K likeliest ids, ``[..., K]``; -inf marks an
        unused slot.
    policy_logp, rollout_logp : log pi and log mu of the sampled token, ``[...]``.
    inside : whether the sampled token is among the K ids, ``[...]``.
    variant : ``append`` (K + 2 classes; CPPO) or ``replace_last`` (the sampled token takes the K-th place; DPPO's and
        TRL's code, kept for parity).

    Returns
    -------
    ``[...]`` in [0, 1], a lower bound of the exact TV.
    """
    return topk_interval(policy_topk_logp, rollout_topk_logp, policy_logp, rollout_logp, inside, variant)[0]


def topk_tv_upper(
    policy_topk_logp: Tensor,
    rollout_topk_logp: Tensor,
    policy_logp: Tensor,
    rollout_logp: Tensor,
    inside: Tensor,
    variant: Variant = "append",
) -> Tensor:
    """Upper bound of the exact TV from the same classes: TV_K + min(rest of pi, rest of mu), at most 1.

    Inside "other" the two policies can differ by half the sum of both rests at most, of which TV_K already counts half
    their difference; what is left is the smaller rest. With this in place of D_t the conditions of CPPO's Theorem 1
    hold for the exact TV. Arguments as in `topk_tv`.
    """
    return topk_interval(policy_topk_logp, rollout_topk_logp, policy_logp, rollout_logp, inside, variant)[1]


def topk_interval(
    policy_topk_logp: Tensor,
    rollout_topk_logp: Tensor,
    policy_logp: Tensor,
    rollout_logp: Tensor,
    inside: Tensor,
    variant: Variant = "append",
) -> tuple[Tensor, Tensor]:
    """(TV_K, TV_K + min(rest of pi, rest of mu)): the exact TV lies between them. In one computation what `topk_tv`
    and `topk_tv_upper` give; arguments as there. `cppo.scoring.adaptive` decides by it.
    """
    p, m = _classes(policy_topk_logp, rollout_topk_logp, policy_logp, rollout_logp, inside, variant)
    rest_p, rest_m = _rest(p), _rest(m)
    lower = 0.5 * ((p - m).abs().sum(-1) + (rest_p - rest_m).abs())
    return lower.clamp(max=1.0), (lower + torch.minimum(rest_p, rest_m)).clamp(max=1.0)


def topk_kl(
    policy_topk_logp: Tensor,
    rollout_topk_logp: Tensor,
    policy_logp: Tensor,
    rollout_logp: Tensor,
    inside: Tensor,
    variant: Variant = "append",
) -> Tensor:
    """KL(mu || pi) over the classes of `topk_tv`, nats; masses below 1e-12 count as 1e-12. Arguments as in
    `topk_tv`.
    """
    p, m = _classes(policy_topk_logp, rollout_topk_logp, policy_logp, rollout_logp, inside, variant)
    p = torch.cat([p, _rest(p)[..., None]], -1)
    m = torch.cat([m, _rest(m)[..., None]], -1)
    return _kl_term(m, m.log(), p.log()).sum(-1).clamp(min=0.0)


def _rows(policy: Tensor, rollout: Tensor) -> tuple[Tensor, Tensor]:
    if policy.shape != rollout.shape:
        raise ValueError(f"policy row {list(policy.shape)} and rollout row {list(rollout.shape)} differ in shape.")
    return _float(policy).log_softmax(-1), _float(rollout).log_softmax(-1)


def exact_tv(policy_logits: Tensor, rollout_logits: Tensor) -> Tensor:
    """1/2 sum_v abs(mu(v) - pi(v)) from two full rows ``[..., V]`` of logits or log-probabilities (both of one
    temperature).
    """
    log_p, log_m = _rows(policy_logits, rollout_logits)
    return (0.5 * (log_p.exp() - log_m.exp()).abs().sum(-1)).clamp(max=1.0)


def exact_kl(policy_logits: Tensor, rollout_logits: Tensor) -> Tensor:
    """KL(mu || pi) = sum_v mu(v) log(mu(v)/pi(v)), nats, from two full rows ``[..., V]`` of logits or
    log-probabilities.
    """
    log_p, log_m = _rows(policy_logits, rollout_logits)
    return _kl_term(log_m.exp(), log_m, log_p).sum(-1).clamp(min=0.0)


#: Divergences that need nothing but the sampled token's two log-probabilities.
BINARY = ("binary_tv", "binary_kl")
