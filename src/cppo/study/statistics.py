"""What a handful of seeds say: means with intervals, paired differences, the probability of improvement.

All of it is over *seeds*. An evaluation stores Avg@k a benchmark and not a problem's own score, and all runs are judged
by the same held-out problems, so the intervals are about other seeds on these problems, not about other problems.

Every interval is a percentile bootstrap (Efron & Tibshirani 1993, ch. 13; `scipy.stats.bootstrap`) with the expansion
of Hesterberg 2015 ("What Teachers Should Know about the Bootstrap", The American Statistician 69, sec. 4.3), since

* the plain percentile interval of n values is too narrow by sqrt((n - 1) / n) and by z in place of t;
* BCa corrects for skewness with an acceleration that is estimated by leaving out one value at a time, which is noise
  with five values.

Of nominal 95% for the mean of normal data (simulated, 3000 times) the plain percentile covers 84% with 5 seeds and 87%
with 8, BCa 84% and 87%, the expanded one 92% and 94%.

What no bootstrap can do is to leave the range of its sample: see `attainable_coverage`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cppo.errors import UserError

Array = NDArray[np.float64]

RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """A figure over `count` seeds with its interval; `low` and `high` are None with one seed, which tells nothing of
    the spread, and all three are None with none.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int


def expanded_level(count: int, level: float = 0.95, resamples: int = RESAMPLES) -> float:
    """Hesterberg's level for the percentiles of a bootstrap of `count` values.

    1 - 2 a' with a' = Phi(-sqrt(n / (n - 1)) t_{n-1, 1 - a/2}), a = 1 - level: for normal data the ends then lie where
    those of the t interval do. Not beyond the smallest and the largest of the resamples.
    """
    tail = stats.t.ppf(0.5 + level / 2, count - 1)
    expanded = 1 - 2 * stats.norm.cdf(-math.sqrt(count / (count - 1)) * tail)
    return float(min(expanded, 1 - 2 / (resamples + 1)))


def attainable_coverage(count: int) -> float:
    """The most that an interval within the range of `count` values can cover of a symmetric distribution's mean.

    1 - 2^(1 - n): it is missed at least where all values lie on one side of it. 2 seeds: 0.5, 3: 0.75, 4: 0.875,
    5: 0.9375, 6: 0.969.
    """
    return 1.0 - 2.0 ** (1 - count) if count > 0 else 0.0


def mean_interval(values: Sequence[float], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean of one figure a seed, with a bootstrap interval over the seeds.

    Parameters
    ----------
    values : [n], a number a seed. Empty: an estimate of nothing; one: no interval.
    level : nominal coverage, between 0 and 1.  resamples : drawn with replacement.  seed : of the drawing.

    Raises
    ------
    UserError : a value that is NaN or infinite, or a level outside (0, 1).
    """
    x = _checked(values, level)
    if len(x) < 2:
        return Estimate(float(x[0]) if len(x) else None, None, None, len(x))
    low, high = _interval(len(x), lambda index: x[index].mean(-1), level, resamples, seed)
    return Estimate(float(x.mean()), low, high, len(x))


def paired_difference(
    x: Mapping[int, float], y: Mapping[int, float], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean over seeds of x_s - y_s, for the seeds that both have; interval by resampling the differences.

    Two runs of a seed have the same start, prompts and random numbers: what these do to both cancels here.
    Parameters `x`, `y`: seed -> figure. Others and errors: as of `mean_interval`.
    """
    return mean_interval([x[s] - y[s] for s in sorted(x.keys() & y.keys())], level, resamples, seed)


def probability_of_improvement(
    x: Mapping[int, float], y: Mapping[int, float], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """P(X > Y) = 1/n^2 sum_{i,j} [x_i > y_j] + [x_i = y_j] / 2: a run of X beats a run of Y, whatever their seeds.

    Agarwal et al. 2021 (arXiv:2108.13264, sec. 4.3), the Mann-Whitney statistic; ties count half. For the seeds that
    both have. The interval resamples seeds, and with a seed both of its runs, since they share their start.

    Where X wins all pairs or none the bootstrap's interval is a point. Its inner end is then that of the exact binomial
    interval (Clopper & Pearson 1934) of n wins in n seeds: five seeds without exception say P > 0.48, not P = 1.

    Parameters `x`, `y`: seed -> figure. Others and errors: as of `mean_interval`.
    """
    shared = sorted(x.keys() & y.keys())
    a, b = _checked([x[s] for s in shared], level), _checked([y[s] for s in shared], level)
    if not shared:
        return Estimate(None, None, None, 0)
    wins = np.heaviside(a[:, None] - b[None, :], 0.5)  # [n, n]: what each pair counts
    value, n = float(wins.mean()), len(shared)
    if n < 2:
        return Estimate(value, None, None, n)

    def statistic(index: NDArray[np.intp]) -> Array:
        return wins[index[..., :, None], index[..., None, :]].mean((-1, -2))

    low, high = _interval(n, statistic, level, resamples, seed)
    if value in (0.0, 1.0):
        exact = stats.binomtest(round(value * n), n).proportion_ci(level)
        low, high = float(exact.low), float(exact.high)
    return Estimate(value, low, high, n)


def _interval(
    count: int, statistic: Callable[[NDArray[np.intp]], Array], level: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Expanded percentile interval of a statistic of resampled seeds; `statistic`: indices [..., n] -> [...]."""
    found = stats.bootstrap(
        (np.arange(count),),
        lambda index, axis=-1: statistic(index),
        n_resamples=resamples,
        vectorized=True,
        confidence_level=expanded_level(count, level, resamples),
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=1000,
    ).confidence_interval
    return float(found.low), float(found.high)


def _checked(values: Sequence[float], level: float) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise UserError(f"expected one figure a seed, got an array of shape {x.shape}.")
    if not np.isfinite(x).all():
        raise UserError(
            f"a figure is not finite ({', '.join(map(str, x.tolist()))}): leave out runs that have no result."
        )
    if not 0 < level < 1:
        raise UserError(f"level is {level!r}, expected a share between 0 and 1, such as 0.95.")
    return x
