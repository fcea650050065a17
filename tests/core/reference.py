"""Slow reference of every rule and divergence: plain Python loops in float64, one response at a time.

Written from the formulas alone (spec of the rules, arXiv 2606.10968 Eq. 8-10 and 19-22), as the sequential recursions
of the papers, so that the vectorised package has something independent to agree with. Nothing here imports `cppo`.

A response is a set of equally long lists over its columns: `policy` (log pi), `rollout` (log mu), `advantage`, `mask`
(False: not a loss token, and then the other entries may hold anything) and, for rules that need it, `divergence`.

Every result carries `margin`: the smallest distance between a quantity and the limit that it was compared with.
Tests skip examples with a tiny margin, since a tie may legitimately fall either way in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

KEPT, TOWARDS, TOKEN_LIMIT, PREFIX_BUDGET, SEQUENCE_LIMIT, RATIO_CLIP, CLAMPED, OUTSIDE = range(8)
LOG_RATIO_MAX = 20.0


@dataclass
class Result:
    """What a rule decides about one response; lists over its columns."""

    coefficient: list[float]
    reason: list[int]
    threshold: list[float] | None = None
    delta_b: float | None = None
    budget_used: float | None = None
    weights: list[float] | None = None
    spent: list[float] | None = None  # S_t, inclusive
    allowed: list[float] | None = None  # delta + delta_b W_{t-1}
    limit: list[float] | None = None  # c_t of Eq. 8
    exceed: list[float] | None = None  # x_t of Eq. 19
    mask_value: list[float] | None = None  # M_t or gate, without the ratio
    capped: list[bool] = field(default_factory=list)
    margin: float = math.inf


def ratio(policy: float, rollout: float) -> float:
    """rho_t = exp(log pi - log mu), the exponent clamped from above at 20."""
    return math.exp(min(policy - rollout, LOG_RATIO_MAX))


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def towards(advantage: float, policy: float, rollout: float) -> bool:
    """The update moves pi back to mu, or does not move it at all: sign(A) log rho <= 0."""
    return sign(advantage) * sign(policy - rollout) <= 0


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics; 0 for no value."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def linear_weights(count: int, w_min: float) -> list[float]:
    """Eq. 9: w_1 = 1 down to w_T = w_min; a single token weighs 1."""
    return [1.0 if count == 1 else 1.0 - (1.0 - w_min) * t / (count - 1) for t in range(count)]


def shaped_weights(shape: str, count: int, w_min: float) -> list[float]:
    """The other schedules, position by position; a single token weighs 1."""
    if count == 1:
        return [1.0]
    t = range(1, count + 1)
    if shape == "cosine":
        return [w_min + (1 - w_min) * (1 + math.cos(math.pi * (k - 1) / (count - 1))) / 2 for k in t]
    if shape == "matched":
        return [max(w_min, (count - k) / (count - 1)) for k in t]
    assert shape == "reversed"
    return [w_min + (1 - w_min) * (k - 1) / (count - 1) for k in t]


def reciprocal(x: float) -> float:
    """g(x) = min(1, 1/x), the soft gate of Eq. 20."""
    return 1.0 if x <= 1.0 else 1.0 / x


def sapo(x: float) -> float:
    """SAPO's gate 4 s (1 - s), s = sigmoid(x - 1), lowered to 1/x where it exceeds that (inadmissible otherwise)."""
    s = 1 / (1 + math.exp(1 - max(x, 1.0)))
    return 1.0 if x <= 1.0 else min(1 / x, 4 * s * (1 - s))


# --------------------------------------------------------------------------------------------------------------- rules


def rule(
    name: str,
    policy: Sequence[float],
    rollout: Sequence[float],
    advantage: Sequence[float],
    mask: Sequence[bool],
    divergence: Sequence[float] | None = None,
    **parameters: object,
) -> Result:
    """The named rule on one response: drop the columns outside the mask, decide, put them back as OUTSIDE."""
    columns = [t for t in range(len(mask)) if mask[t]]
    pick = lambda values: [float(values[t]) for t in columns]  # noqa: E731
    function = RULES[name]
    arguments = [pick(policy), pick(rollout), pick(advantage)]
    if name in NEEDS_DIVERGENCE:
        assert divergence is not None
        arguments.append(pick(divergence))
    dense = function(*arguments, **parameters)

    def spread(values: Sequence | None, fill: object) -> list | None:
        if values is None:
            return None
        full = [fill] * len(mask)
        for column, value in zip(columns, values, strict=True):
            full[column] = value
        return full

    return Result(
        coefficient=spread(dense.coefficient, 0.0) or [],
        reason=spread(dense.reason, OUTSIDE) or [],
        threshold=spread(dense.threshold, 0.0),
        delta_b=dense.delta_b,
        budget_used=dense.budget_used,
        weights=spread(dense.weights, 0.0),
        spent=spread(dense.spent, 0.0),
        allowed=spread(dense.allowed, 0.0),
        limit=spread(dense.limit, 0.0),
        exceed=spread(dense.exceed, 0.0),
        mask_value=spread(dense.mask_value, 0.0),
        capped=spread(dense.capped or [False] * len(columns), False) or [],
        margin=dense.margin,
    )


def none(policy: list[float], rollout: list[float], advantage: list[float]) -> Result:
    """c_t = rho_t."""
    return Result([ratio(p, m) for p, m in zip(policy, rollout, strict=True)], [KEPT] * len(policy))


def ppo_clip(
    policy: list[float],
    rollout: list[float],
    advantage: list[float],
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    dual_clip: float | None = None,
) -> Result:
    """Gradient of max(-A r, -A clip(r)): zero iff A > 0 and r > 1 + eps_high, or A < 0 and r < 1 - eps_low.

    Dual clip: zero, too, where A < 0 and r > dual_clip.
    """
    result = Result([], [])
    for p, m, a in zip(policy, rollout, advantage, strict=True):
        r = ratio(p, m)
        result.margin = min(result.margin, abs(r - 1 - eps_high), abs(r - 1 + eps_low))
        outside = r > 1 + eps_high or r < 1 - eps_low
        dropped = (a > 0 and r > 1 + eps_high) or (a < 0 and r < 1 - eps_low)
        if dual_clip is not None:
            result.margin = min(result.margin, abs(r - dual_clip))
            dropped = dropped or (a < 0 and r > dual_clip)
        result.coefficient.append(0.0 if dropped else r)
        result.reason.append(RATIO_CLIP if dropped else TOWARDS if outside else KEPT)
    return result


def cispo(
    policy: list[float], rollout: list[float], advantage: list[float], ratio_min: float = 0.0, ratio_max: float = 1.2
) -> Result:
    """c_t = clip(rho_t, ratio_min, ratio_max); no token is dropped."""
    result = Result([], [])
    for p, m in zip(policy, rollout, strict=True):
        r = ratio(p, m)
        result.margin = min(result.margin, abs(r - ratio_max), abs(r - ratio_min) if ratio_min > 0 else math.inf)
        result.coefficient.append(min(max(r, ratio_min), ratio_max))
        result.reason.append(CLAMPED if r < ratio_min or r > ratio_max else KEPT)
    return result


def minpro(
    policy: list[float], rollout: list[float], advantage: list[float], eps_low: float = 0.2, eps_high: float = 0.28
) -> Result:
    """c_t = clip(m_t rho_t, 1 - eps_low, 1 + eps_high), m_t = min of the ratios before t, m_1 = 1."""
    result = Result([], [])
    smallest: float | None = None
    for p, m in zip(policy, rollout, strict=True):
        r = ratio(p, m)
        value = r if smallest is None else smallest * r
        smallest = r if smallest is None else min(smallest, r)
        result.margin = min(result.margin, abs(value - 1 + eps_low), abs(value - 1 - eps_high))
        result.coefficient.append(min(max(value, 1 - eps_low), 1 + eps_high))
        result.reason.append(CLAMPED if value < 1 - eps_low or value > 1 + eps_high else KEPT)
    return result


def dppo(
    policy: list[float],
    rollout: list[float],
    advantage: list[float],
    divergence: list[float],
    delta: float = 0.15,
    ratio_cap: float | None = None,
) -> Result:
    """Drop a token that moves away from mu while D_t > delta; c_t = M_t min(rho_t, cap)."""
    result = Result([], [], threshold=[delta] * len(policy))
    for p, m, a, d in zip(policy, rollout, advantage, divergence, strict=True):
        r = ratio(p, m)
        result.margin = min(result.margin, abs(d - delta))
        back = towards(a, p, m)
        keep = d <= delta or back
        if d > delta and a != 0.0:
            result.margin = min(result.margin, abs(p - m))  # its direction decides
        result.capped.append(ratio_cap is not None and r > ratio_cap)
        result.coefficient.append((min(r, ratio_cap) if ratio_cap is not None else r) if keep else 0.0)
        result.reason.append(KEPT if d <= delta else TOWARDS if back else TOKEN_LIMIT)
    return result


def _whole(policy: list[float], rollout: list[float], keep: bool, margin: float) -> Result:
    count = len(policy)
    coefficient = [ratio(p, m) if keep else 0.0 for p, m in zip(policy, rollout, strict=True)]
    return Result(coefficient, [KEPT if keep else SEQUENCE_LIMIT] * count, margin=margin)


def trm_max(
    policy: list[float], rollout: list[float], advantage: list[float], divergence: list[float], delta: float = 0.05
) -> Result:
    """Keep the response iff max_t D_t <= delta."""
    largest = max(divergence, default=0.0)
    return _whole(policy, rollout, largest <= delta, abs(largest - delta))


def trm_avg(
    policy: list[float], rollout: list[float], advantage: list[float], divergence: list[float], delta: float = 0.001
) -> Result:
    """Keep the response iff the mean of D_t over its loss tokens is at most delta."""
    mean = math.fsum(divergence) / max(len(divergence), 1)
    return _whole(policy, rollout, mean <= delta, abs(mean - delta))


def trm_max_avg(
    policy: list[float],
    rollout: list[float],
    advantage: list[float],
    divergence: list[float],
    delta: float = 0.1,
    delta_avg: float = 0.002,
) -> Result:
    """Keep the response iff both hold: max_t D_t <= delta and mean_t D_t <= delta_avg."""
    largest = max(divergence, default=0.0)
    mean = math.fsum(divergence) / max(len(divergence), 1)
    keep = largest <= delta and mean <= delta_avg
    return _whole(policy, rollout, keep, min(abs(largest - delta), abs(mean - delta_avg)))


def cppo(
    policy: list[float],
    rollout: list[float],
    advantage: list[float],
    divergence: list[float],
    delta: float = 0.15,
    delta_b: float = 0.02,
    budget: str = "adaptive",
    w_min: float = 0.8,
    weights: str | Sequence[float] = "linear",
    prefix_budget: bool = True,
    gate: Callable[[float], float] | None = None,
    quantile_level: float = 0.9,
    quantile_scale: float = 1.0,
    budget_max: float = 2.0,
    ratio_cap: float | None = None,
) -> Result:
    """Algorithm 1: the sequential recursion with S and W; `weights` may be the list of w_1..w_T itself."""
    count = len(policy)
    if weights == "linear":
        w = linear_weights(count, w_min)
    elif weights == "none":
        w = [1.0] * count
    elif isinstance(weights, str):
        w = shaped_weights(weights, count, w_min)
    else:
        w = [float(value) for value in weights]
    slope = delta_b
    if budget == "adaptive":
        slope = min(budget_max * delta_b, max(delta_b, quantile_scale * quantile(divergence, quantile_level)))

    result = Result([], [], threshold=[], delta_b=slope, weights=w, spent=[], allowed=[], limit=[], exceed=[])
    result.mask_value = []
    s = 0.0
    total = 0.0  # W_{t-1}
    allowed = delta
    for t in range(count):
        p, m, a, d = policy[t], rollout[t], advantage[t], divergence[t]
        z = w[t] * d
        allowed = delta + slope * total
        c = min(delta, allowed - s) if prefix_budget else delta
        s += z
        total += w[t]
        within = z <= c
        exceed_token, exceed_prefix = z / delta, s / allowed if prefix_budget else 0.0
        x = max(exceed_token, exceed_prefix)
        back = towards(a, p, m)
        if within or back:
            value = 1.0
        else:
            value = 0.0 if gate is None else gate(x)
        if within:
            reason = KEPT
        elif back:
            reason = TOWARDS
        elif gate is None:
            reason = TOKEN_LIMIT if z > delta else PREFIX_BUDGET
        else:
            reason = TOKEN_LIMIT if exceed_token >= exceed_prefix else PREFIX_BUDGET
            result.margin = min(result.margin, abs(exceed_token - exceed_prefix))
        r = ratio(p, m)
        result.margin = min(result.margin, abs(z - delta), abs(s - allowed) if prefix_budget else math.inf)
        if not within and a != 0.0:
            result.margin = min(result.margin, abs(p - m))  # its direction decides
        result.capped.append(ratio_cap is not None and r > ratio_cap)
        result.coefficient.append(value * (min(r, ratio_cap) if ratio_cap is not None else r))
        result.reason.append(reason)
        result.threshold.append(c / w[t])  # type: ignore[union-attr]
        result.spent.append(s)  # type: ignore[union-attr]
        result.allowed.append(allowed)  # type: ignore[union-attr]
        result.limit.append(c)  # type: ignore[union-attr]
        result.exceed.append(x)  # type: ignore[union-attr]
        result.mask_value.append(value)
    result.budget_used = s / allowed
    return result


RULES: dict[str, Callable[..., Result]] = {
    "none": none,
    "ppo_clip": ppo_clip,
    "cispo": cispo,
    "minpro": minpro,
    "dppo": dppo,
    "trm_max": trm_max,
    "trm_avg": trm_avg,
    "trm_max_avg": trm_max_avg,
    "cppo": cppo,
}
NEEDS_DIVERGENCE = ("dppo", "trm_max", "trm_avg", "trm_max_avg", "cppo")


# ---------------------------------------------------------------------------------------------------------- divergences


def total_variation(mu: Sequence[float], pi: Sequence[float]) -> float:
    return 0.5 * math.fsum(abs(m - p) for m, p in zip(mu, pi, strict=True))


def kullback_leibler(mu: Sequence[float], pi: Sequence[float]) -> float:
    """KL(mu || pi) in nats; 0 log 0 = 0."""
    total = 0.0
    for m, p in zip(mu, pi, strict=True):
        if m > 0:
            total += math.inf if p == 0 else m * math.log(m / p)
    return total


def coarsen(
    mu: Sequence[float], pi: Sequence[float], sampled: int, k: int, variant: str = "append"
) -> tuple[list[float], list[float]]:
    """The top-K partition: mu's K likeliest ids, the sampled id, and one class for the rest of the mass.

    append: the sampled id is one more class where it is not among the K. replace_last: it takes the K-th's place.
    """
    top = sorted(range(len(mu)), key=lambda v: -mu[v])[:k]
    if sampled not in top:
        top = [*top, sampled] if variant == "append" else [*top[:-1], sampled]
    rest = [v for v in range(len(mu)) if v not in top]
    coarse_mu = [mu[v] for v in top] + [math.fsum(mu[v] for v in rest)]
    coarse_pi = [pi[v] for v in top] + [math.fsum(pi[v] for v in rest)]
    return coarse_mu, coarse_pi


def divergence(
    kind: str, mu: Sequence[float], pi: Sequence[float], sampled: int, k: int = 20, variant: str = "append"
) -> float:
    """exact_tv, exact_kl, topk_tv, topk_kl, topk_tv_upper, binary_tv or binary_kl between two full distributions."""
    family, measure = kind.split("_", 1)
    if family == "exact":
        a, b = list(mu), list(pi)
    elif family == "binary":
        a, b = [mu[sampled], 1 - mu[sampled]], [pi[sampled], 1 - pi[sampled]]
    else:
        a, b = coarsen(mu, pi, sampled, k, variant)
    if measure == "tv":
        return total_variation(a, b)
    if measure == "tv_upper":
        return min(1.0, total_variation(a, b) + min(a[-1], b[-1]))
    return kullback_leibler(a, b)
