"""Exact TV between two bounds that K classes give: a certificate that needs no pass over the vocabulary.

For any set C of tokens, with mu_rest and pi_rest the mass outside of it,

    TV_C = (sum_{v in C} |mu(v) - pi(v)| + |mu_rest - pi_rest|) / 2  <=  TV  <=  TV_C + min(mu_rest, pi_rest).

Left: the triangle inequality outside of C. Right: there sum |mu - pi| <= mu_rest + pi_rest = |mu_rest - pi_rest| + 2
min(mu_rest, pi_rest). A rule that is given the upper bound D' >= D has w_t D_t <= w_t D'_t and S_m(D) <= S_m(D'), so
that thresholds which D' satisfies hold for the exact TV, and with them Theorem 1 (`cppo.divergence.topk_tv_upper`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cppo.theory.checks import Array


def topk_interval(rollout: Any, policy: Any, k: int) -> tuple[Array, Array]:
    """(TV_C, TV_C + min(rest)) with C = the k likeliest tokens of mu, each float64 ``[...]``.

    rollout, policy : distributions ``[..., V]``, float64. k : at least 1; with k >= V both are the exact TV.

    Raises
    ------
    ValueError : shapes that differ, k below 1, rows that are no distributions.
    """
    mu, pi = np.asarray(rollout, dtype=np.float64), np.asarray(policy, dtype=np.float64)
    if mu.shape != pi.shape or mu.ndim < 1:
        raise ValueError(f"rollout {list(mu.shape)} and policy {list(pi.shape)} must have one shape, [..., V].")
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1.")
    for name, p in (("rollout", mu), ("policy", pi)):
        if not (np.isfinite(p).all() and (p >= 0).all() and np.allclose(p.sum(-1), 1, rtol=0, atol=1e-9)):
            raise ValueError(f"{name}: a row is no distribution (numbers >= 0 that add up to 1).")
    ids = np.argsort(-mu, axis=-1, kind="stable")
    mu, pi = np.take_along_axis(mu, ids, -1), np.take_along_axis(pi, ids, -1)
    mu_rest, pi_rest = mu[..., k:].sum(-1), pi[..., k:].sum(-1)
    lower = (np.abs(mu - pi)[..., :k].sum(-1) + np.abs(mu_rest - pi_rest)) / 2
    return lower, np.minimum(lower + np.minimum(mu_rest, pi_rest), 1.0)
