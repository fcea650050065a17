"""How large |Delta| can be, from what a batch of rollouts shows: the empirical certificate.

    J(pi) - J(mu)  >=  L'(pi) - |Delta|

Estimated from N responses y ~ mu, rho_t at their tokens, and D_t at their states where it was measured:

* ``ratios``: 2 xi E_mu[sum_t |rho_t - 1| max(0, 1 - prod_{j>t} rho_j)]. Needs no divergence. Proof: Delta is the sum
  over t of the mean of (rho_t - 1) times (E_mu[R] - E_pi[R] given y_1..y_t), which is at most 2 xi TV(what follows);
  and that TV is the mean of max(0, 1 - prod_{j>t} rho_j) given y_1..y_t.
* ``pathwise``: 2 xi E_mu[sum_t |rho_t - 1| sum_{j>t} D_j]: the same with TV(what follows) <= E_mu[sum_{j>t} D_j], by
  exchanging one conditional distribution at a time. Its mean is never below that of the ratios.
* ``prop4``: 4 xi sum_t u_t sum_{j>t} l_j (Prop. 4), and ``product``, its product form (App. B.9), with u_t the mean of
  D_t over all responses (0 after a response's end) and l_t the largest seen: a plug-in, since the largest seen is not
  the largest there is. The mean of `pathwise` never exceeds Prop. 4's number.
* ``surrogate``: L'(pi) = E_mu[R sum_t (rho_t - 1)], with a baseline that leaves its mean as it is.

The first two and the last are means of something that each rollout shows, so that their intervals mean what they say.
Neither of the two is in the paper. Intervals are percentiles of a bootstrap that resamples whole groups (the responses
to one prompt), since these depend on each other. What they cannot know: what no rollout visited, and the part of D_t
that a lower bound of it (binary, top-K) leaves out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cppo.theory.bounds import suffix_tv_bounds
from cppo.theory.checks import Array, at_least_0

#: log rho_t beyond this are cut: their exponential is as good as infinite.
LARGEST_LOG_RATIO = 300.0


@dataclass(frozen=True)
class Estimate:
    """A mean over rollouts with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Positions:
    """u_t with its interval, and the largest D_t seen, by position, each ``[T]``."""

    expected: Array
    expected_low: Array
    expected_high: Array
    largest: Array


@dataclass(frozen=True, eq=False)
class Certificate:
    """What `certificate` found, in units of the reward.

    surrogate : L'. ratios, pathwise, prop4, product : bounds of |Delta|, the last three None without a divergence.
    improvement : surrogate - ratios: above 0 pi is better than mu, as far as the estimates go. positions : u_t and l_t,
    None without a divergence. responses, groups, tokens, horizon : how much it rests on, and the longest response.
    """

    surrogate: Estimate
    ratios: Estimate
    improvement: Estimate
    pathwise: Estimate | None
    prop4: Estimate | None
    product: Estimate | None
    positions: Positions | None
    responses: int
    groups: int
    tokens: int
    horizon: int

    def figures(self) -> dict[str, Any]:
        """The scalars as a flat dictionary: surrogate, surrogate_low, surrogate_high, ..., responses, groups, ..."""
        flat: dict[str, Any] = {}
        for name in ("surrogate", "ratios", "improvement", "pathwise", "product", "prop4"):
            estimate = getattr(self, name)
            if estimate is not None:
                flat |= {name if key == "value" else f"{name}_{key}": x for key, x in asdict(estimate).items()}
        return flat | {name: getattr(self, name) for name in ("responses", "groups", "tokens", "horizon")}


def certificate(
    divergence: Any | None,
    log_ratio: Any,
    mask: Any,
    rewards: Any,
    *,
    xi: float,
    groups: Any = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Certificate:
    """The empirical certificate of a batch of rollouts from mu.

    Parameters
    ----------
    divergence : D_t, ``[N, T]``, in [0, 1]; exact TV or an upper bound of it, for a certificate of the exact residual.
        None: the bound from ratios alone.
    log_ratio : log pi(y_t) - log mu(y_t), ``[N, T]``. mask : ``[N, T]``, loss tokens; holes are closed: positions count
        loss tokens. What is masked out may hold anything.
    rewards : ``[N]``, with or without a baseline that does not depend on the response itself (the mean of the others in
        the group). xi : half of the reward's range: 0.5 for 0 or 1.
    groups : ``[N]``, the prompt of each response; default: every response its own.
    resamples, level, seed : of the bootstrap.

    Raises
    ------
    ValueError : shapes that do not fit, no response, numbers that are not finite under the mask, D_t outside of [0, 1].
    """
    mask = np.asarray(mask).astype(bool)
    if mask.ndim != 2 or mask.shape[0] == 0:
        raise ValueError(f"mask has the shape {list(mask.shape)}, expected [N, T] with at least one response.")
    N = mask.shape[0]
    at_least_0(xi=xi)
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a number between 0 and 1, such as 0.95.")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, expected at least 1 (1000 for intervals).")
    log_rho = _under(mask, "log_ratio", log_ratio).clip(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    R: Array = np.asarray(rewards, dtype=np.float64)
    if R.shape != (N,) or not np.isfinite(R).all():
        raise ValueError(f"rewards have the shape {list(R.shape)} and must be {N} finite numbers, one per response.")
    index = _group_index(groups, N)
    rates = _resampling(index, resamples, np.random.default_rng(seed))
    tails = ((1 - level) / 2, (1 + level) / 2)

    def estimate(score: Array) -> Estimate:
        low, high = np.quantile(_resampled(rates, index, score[:, None])[:, 0], tails)
        return Estimate(float(score.mean()), float(low), float(high))

    change = np.expm1(log_rho)
    lost = -np.expm1(np.minimum(_after(log_rho), 0.0))  # max(0, 1 - prod_{j>t} rho_j)
    surrogate = R * change.sum(1)
    ratios = 2 * xi * (np.abs(change) * lost).sum(1)
    pathwise = prop4 = product = positions = None
    if divergence is not None:
        D = _under(mask, "divergence", divergence)
        if D.size and (D.min() < 0 or D.max() > 1 + 1e-6):
            raise ValueError(f"divergence reaches from {D.min()} to {D.max()}; a total variation lies between 0 and 1.")
        largest = np.minimum(D.max(0, initial=0.0), 1.0)
        multiplied, added = suffix_tv_bounds(largest) if largest.size else (largest, largest)
        pathwise = estimate(2 * xi * (np.abs(change) * _after(D)).sum(1))
        prop4, product = estimate(4 * xi * D @ added), estimate(4 * xi * D @ multiplied)
        low, high = np.empty_like(largest), np.empty_like(largest)
        for start in range(0, largest.size, 512):  # [resamples, T] would not fit for long responses
            part = slice(start, start + 512)
            low[part], high[part] = np.quantile(_resampled(rates, index, D[:, part]), tails, axis=0)
        positions = Positions(D.mean(0), low, high, largest)
    return Certificate(
        estimate(surrogate),
        estimate(ratios),
        estimate(surrogate - ratios),
        pathwise,
        prop4,
        product,
        positions,
        responses=N,
        groups=rates.shape[1],
        tokens=int(mask.sum()),
        horizon=log_rho.shape[1],
    )


def _after(values: Array) -> Array:
    """sum_{j>t} of each row."""
    return np.cumsum(values[:, ::-1], axis=1)[:, ::-1] - values


def _under(mask: Any, name: str, values: Any) -> Array:
    """The values at the mask's tokens, moved to the left, zeros after them: ``[N, longest response]``."""
    found: Array = np.asarray(values, dtype=np.float64)
    if found.shape != mask.shape:
        raise ValueError(f"{name} has the shape {list(found.shape)}, expected that of the mask, {list(mask.shape)}.")
    inside = found[mask]
    if not np.isfinite(inside).all():
        raise ValueError(f"{name} holds NaN or infinity at a loss token.")
    lengths = mask.sum(1)
    compact = np.zeros((mask.shape[0], int(lengths.max(initial=0))))
    compact[np.arange(compact.shape[1]) < lengths[:, None]] = inside
    return compact


def _group_index(groups: Any, responses: int) -> Any:
    if groups is None:
        return np.arange(responses)
    found = np.asarray(groups)
    if found.shape != (responses,):
        raise ValueError(f"groups have the shape {list(found.shape)}, expected [{responses}]: each response's prompt.")
    return np.unique(found, return_inverse=True)[1]


def _resampling(index: Any, resamples: int, rng: np.random.Generator) -> Array:
    """How often each group is drawn in each resample, ``[resamples, groups]``."""
    count = int(index.max()) + 1
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def _resampled(rates: Array, index: Any, values: Array) -> Array:
    """Means over the responses of the groups drawn, ``[resamples, columns]`` of values ``[N, columns]``."""
    sums = np.zeros((rates.shape[1], values.shape[1]))
    np.add.at(sums, index, values)
    sizes = np.bincount(index, minlength=rates.shape[1])
    return (rates @ sums) / (rates @ sizes)[:, None]
