"""The empirical certificate: its formulas by loops, the layouts it must not depend on, and what its intervals cover."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from cppo import theory
from cppo.theory import Certificate, TabularProblem, certificate

NAMES = ("surrogate", "ratios", "pathwise", "prop4", "product", "improvement")


@dataclass
class Batch:
    divergence: np.ndarray
    log_ratio: np.ndarray
    mask: np.ndarray
    rewards: np.ndarray
    groups: np.ndarray

    def certify(self, **options: Any) -> Certificate:
        options = {"xi": 0.5, "groups": self.groups, "resamples": 200, **options}
        return certificate(self.divergence, self.log_ratio, self.mask, self.rewards, **options)


def batch(seed: int, N: int = 14, T: int = 9, groups: int = 5) -> Batch:
    """Responses of 0 to T tokens with holes in between; groups of unequal sizes; NaN where the mask is False."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(T) < rng.integers(1, T + 1, (N, 1))) & (rng.random((N, T)) < 0.8)
    mask[0] = False
    mask[1] = True
    divergence, log_ratio = rng.uniform(0, 0.4, (N, T)) ** 2, 0.3 * rng.standard_normal((N, T))
    divergence[~mask], log_ratio[~mask] = np.nan, np.nan
    index = np.concatenate([np.arange(groups), rng.integers(0, groups, N - groups)])
    return Batch(divergence, log_ratio, mask, rng.integers(0, 2, N) - rng.random(N), rng.permutation(index))


def scores(b: Batch, xi: float) -> tuple[dict[str, list[float]], list[float], list[float]]:
    """({figure: its number for each response}, u, l), a response at a time, without padding."""
    D = [[float(d) for d, m in zip(*row, strict=True) if m] for row in zip(b.divergence, b.mask, strict=True)]
    rho = [[math.exp(x) for x, m in zip(*row, strict=True) if m] for row in zip(b.log_ratio, b.mask, strict=True)]
    longest = max(map(len, D))
    at = [[row[t] for row in D if t < len(row)] for t in range(longest)]
    u, l = [math.fsum(x) / len(D) for x in at], [max(x) for x in at]  # noqa: E741
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for R, d, r in zip(b.rewards, D, rho, strict=True):
        n = len(d)
        found["surrogate"].append(R * math.fsum(x - 1 for x in r))
        found["pathwise"].append(2 * xi * math.fsum(abs(r[t] - 1) * math.fsum(d[t + 1 :]) for t in range(n)))
        found["prop4"].append(4 * xi * math.fsum(d[t] * math.fsum(l[t + 1 :]) for t in range(n)))
        found["product"].append(4 * xi * math.fsum(d[t] * (1 - math.prod(1 - x for x in l[t + 1 :])) for t in range(n)))
        lost = [max(0.0, 1 - math.prod(r[t + 1 :])) for t in range(n)]
        found["ratios"].append(2 * xi * math.fsum(abs(x - 1) * y for x, y in zip(r, lost, strict=True)))
        found["improvement"].append(found["surrogate"][-1] - found["ratios"][-1])
    return found, u, l


# ---------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("seed", range(10))
def test_by_loops(seed: int) -> None:
    b, xi = batch(seed), 0.5 + seed
    found = b.certify(xi=xi)
    want, u, l = scores(b, xi)  # noqa: E741
    for name in NAMES:
        estimate = getattr(found, name)
        assert estimate.value == pytest.approx(math.fsum(want[name]) / len(want[name]), rel=1e-12, abs=1e-15), name
        assert estimate.low <= estimate.value <= estimate.high
    assert found.positions.expected == pytest.approx(u, rel=1e-12) and found.positions.largest == pytest.approx(
        l, rel=1e-12
    )
    assert (found.positions.expected_low <= found.positions.expected).all() and (
        found.positions.expected <= found.positions.expected_high
    ).all()
    assert (found.responses, found.groups, found.tokens) == (14, 5, int(b.mask.sum()))
    assert found.product.value <= found.prop4.value and found.pathwise.value > 0
    bound = theory.residual_bound(found.positions.expected, found.positions.largest, xi=xi)
    assert found.prop4.value == pytest.approx(bound, rel=1e-12)


def quantile(ordered: list[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def test_intervals_by_an_independent_bootstrap() -> None:
    """Groups drawn with replacement, the mean over all their responses, percentiles; within the draws' own noise."""
    b = batch(3, N=60, T=6, groups=20)
    level = 0.8
    found = b.certify(resamples=20_000, level=level)
    want, _, _ = scores(b, 0.5)
    members = {g: [i for i, own in enumerate(b.groups) if own == g] for g in range(20)}
    first = [float(row[m][0]) if m.any() else 0.0 for row, m in zip(b.divergence, b.mask, strict=True)]
    rng = random.Random(0)
    draws = [[i for g in rng.choices(range(20), k=20) for i in members[g]] for _ in range(5000)]
    for values, low, high in [
        *((want[name], getattr(found, name).low, getattr(found, name).high) for name in NAMES),
        (first, found.positions.expected_low[0], found.positions.expected_high[0]),
    ]:
        means = sorted(math.fsum(values[i] for i in draw) / len(draw) for draw in draws)
        ends = quantile(means, (1 - level) / 2), quantile(means, (1 + level) / 2)
        assert (low, high) == pytest.approx(ends, rel=0, abs=0.05 * (ends[1] - ends[0]))


def test_the_level_and_the_seed() -> None:
    b = batch(4)
    wide, narrow = b.certify(level=0.99, resamples=2000), b.certify(level=0.5, resamples=2000)
    assert narrow.pathwise.high - narrow.pathwise.low < 0.6 * (wide.pathwise.high - wide.pathwise.low)
    assert b.certify(seed=1).pathwise == b.certify(seed=1).pathwise != b.certify(seed=2).pathwise
    assert b.certify(seed=1).pathwise.value == b.certify(seed=2).pathwise.value


def test_figures() -> None:
    found = batch(5).certify()
    flat = found.figures()
    ends = {f"{name}{end}" for name in NAMES for end in ("", "_low", "_high")}
    assert set(flat) == ends | {"responses", "groups", "tokens", "horizon"}
    assert flat["product_high"] == found.product.high and flat["improvement"] == found.improvement.value
    assert flat["surrogate_low"] == found.surrogate.low and flat["tokens"] == found.tokens


# -------------------------------------------------------------------------------------------------------- invariances


def same(one: Certificate, other: Certificate, rel: float = 1e-12) -> None:
    for key, value in one.figures().items():
        assert other.figures()[key] == pytest.approx(value, rel=rel, abs=1e-14), key
    for name in ("expected", "expected_low", "expected_high", "largest"):
        assert getattr(one.positions, name) == pytest.approx(getattr(other.positions, name), rel=rel, abs=1e-15), name


def wider(b: Batch, columns: list[int], T: int, filler: float) -> Batch:
    """Column t of the batch at columns[t] of T."""
    divergence, log_ratio = np.full((len(b.mask), T), filler), np.full((len(b.mask), T), filler)
    mask = np.zeros((len(b.mask), T), dtype=bool)
    divergence[:, columns], log_ratio[:, columns], mask[:, columns] = b.divergence, b.log_ratio, b.mask
    return Batch(divergence, log_ratio, mask, b.rewards, b.groups)


@pytest.mark.parametrize("filler", [math.nan, math.inf, -5.0, 1e30])
def test_layout(filler: float) -> None:
    """Padding left, right and between, and whatever it holds; order of rows; names of groups."""
    b = batch(6)
    plain = b.certify()
    same(plain, wider(b, list(range(9)), 12, filler).certify())
    same(plain, wider(b, list(range(3, 12)), 12, filler).certify())
    same(plain, wider(b, [0, 2, 3, 7, 8, 10, 11, 17, 19], 20, filler).certify())
    order = np.random.default_rng(0).permutation(len(b.mask))
    rows = Batch(*(getattr(b, name)[order] for name in ("divergence", "log_ratio", "mask", "rewards", "groups")))
    same(plain, rows.certify())
    named = np.array([f"prompt {chr(97 + g)}" for g in b.groups])
    same(plain, b.certify(groups=named))
    same(plain, Batch(b.divergence, b.log_ratio, b.mask.astype(np.int64), b.rewards, b.groups).certify())


def test_long_responses() -> None:
    """Intervals of u_t are computed a block of positions at a time: they depend on the position's numbers alone."""
    rng, N, T = np.random.default_rng(0), 12, 1100
    b = Batch(rng.random((N, T)), np.zeros((N, T)), np.ones((N, T)), np.zeros(N), np.arange(N) // 2)
    turned = Batch(b.divergence[:, ::-1], b.log_ratio, b.mask, b.rewards, b.groups).certify()
    found = b.certify()
    assert (found.positions.expected_low == turned.positions.expected_low[::-1]).all() and len(
        set(found.positions.expected_low)
    ) > 1000
    assert (found.positions.expected_high == turned.positions.expected_high[::-1]).all() and len(
        set(found.positions.expected_high)
    ) > 1000


def test_every_response_its_own_group_by_default() -> None:
    b = batch(7)
    same(b.certify(groups=None), b.certify(groups=np.arange(len(b.mask))))
    assert b.certify(groups=None).groups == 14


def test_copies_within_a_group_add_nothing() -> None:
    """Each response k times in its group: the same interval, as it is the groups that are resampled. As responses of
    their own they would make it narrower by sqrt(k).
    """
    b, k = batch(8, N=40, groups=20), 9
    copies = Batch(*(np.repeat(x, k, axis=0) for x in (b.divergence, b.log_ratio, b.mask, b.rewards, b.groups)))
    one, many = b.certify(resamples=2000), copies.certify(resamples=2000)
    for name in NAMES:
        a, c = getattr(one, name), getattr(many, name)
        assert (c.value, c.low, c.high) == pytest.approx((a.value, a.low, a.high), rel=1e-9)
    assert (many.responses, many.groups) == (360, 20)
    alone = [x.certify(resamples=2000, groups=None).pathwise for x in (b, copies)]
    assert (alone[0].high - alone[0].low) / (alone[1].high - alone[1].low) == pytest.approx(3, rel=0.1)


def test_empty_responses() -> None:
    """They count as responses: D is 0 there. With no token at all everything is 0."""
    b = batch(9)
    half = Batch(
        np.concatenate([b.divergence, np.full_like(b.divergence, np.nan)]),
        np.concatenate([b.log_ratio, np.full_like(b.log_ratio, np.nan)]),
        np.concatenate([b.mask, np.zeros_like(b.mask)]),
        np.concatenate([b.rewards, np.ones_like(b.rewards)]),
        np.concatenate([b.groups, b.groups]),
    )
    assert half.certify().pathwise.value == pytest.approx(b.certify().pathwise.value / 2)
    assert half.certify().positions.expected == pytest.approx(b.certify().positions.expected / 2)
    none = certificate(np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4)), [1, 0, 1], xi=0.5)
    assert none.tokens == 0 and none.positions.largest.size == 0 and none.pathwise.value == none.prop4.high == 0


def test_without_a_divergence() -> None:
    """The ratios alone: the same numbers, nothing of what D_t is needed for, and D_t may be anything."""
    b = batch(10)
    plain, found = (
        b.certify(),
        certificate(None, b.log_ratio, b.mask, b.rewards, xi=0.5, groups=b.groups, resamples=200),
    )
    assert (found.surrogate, found.ratios, found.improvement) == (plain.surrogate, plain.ratios, plain.improvement)
    assert found.pathwise is found.prop4 is found.product is found.positions is None
    assert set(plain.figures()) - set(found.figures()) == {
        f"{name}{end}" for name in ("pathwise", "prop4", "product") for end in ("", "_low", "_high")
    }


def test_ratios_that_overflow() -> None:
    """A token that mu almost never emits: no infinity minus infinity."""
    log_ratio = np.array([[800.0, 0.1], [0.1, -900.0]])
    found = certificate(None, log_ratio, np.ones((2, 2)), [1.0, 0.0], xi=0.5, resamples=10)
    assert all(math.isfinite(x) for x in found.figures().values())


# ---------------------------------------------------------------------------------------------------------- statistics


PROBLEM = TabularProblem.random(np.random.default_rng(8), 3, 5, scale=0.4)


def sample(rng: np.random.Generator, N: int) -> Batch:
    p = PROBLEM
    rows = rng.choice(p.rewards.size, size=N, p=p.rollout_probability / p.rollout_probability.sum())
    mask = np.arange(p.horizon) < p.lengths[rows][:, None]
    return Batch(p.path_divergence[rows], np.log(p.path_ratio[rows]), mask, p.rewards[rows], np.arange(N))


def deviation(score: np.ndarray) -> float:
    """Of one rollout, exactly."""
    m = PROBLEM.rollout_probability
    return math.sqrt(m @ score**2 - (m @ score) ** 2)


def exact_scores() -> dict[str, np.ndarray]:
    """surrogate, pathwise and ratios of each response; their means are the problem's."""
    p = PROBLEM
    D, change = p.path_divergence, p.path_ratio - 1
    later = np.stack([D[:, t + 1 :].sum(1) for t in range(p.horizon)], axis=1)
    lost = np.stack([np.maximum(0, 1 - p.path_ratio[:, t + 1 :].prod(1)) for t in range(p.horizon)], axis=1)
    return {
        "surrogate": p.rewards * change.sum(1),
        "pathwise": 2 * p.xi * (np.abs(change) * later).sum(1),
        "ratios": 2 * p.xi * (np.abs(change) * lost).sum(1),
    }


def test_estimates_converge() -> None:
    """Within 5 standard errors of the exact values, which bound the exact residual."""
    p, N = PROBLEM, 40_000
    found = sample(np.random.default_rng(0), N).certify(xi=p.xi, resamples=50)
    exact = {"surrogate": p.surrogate, "pathwise": p.pathwise_bound, "ratios": p.ratio_bound}
    error = {}
    for name, score in exact_scores().items():
        assert p.rollout_probability @ score == pytest.approx(exact[name])
        error[name] = deviation(score) / math.sqrt(N)
        assert abs(getattr(found, name).value - exact[name]) < 5 * error[name] < 0.1 * abs(exact[name])
    for t in range(p.horizon):
        error_t = deviation(p.path_divergence[:, t]) / math.sqrt(N)
        assert abs(found.positions.expected[t] - p.expected_divergence[t]) <= 5 * error_t + 1e-15
    assert found.positions.largest == pytest.approx(
        p.largest_divergence, rel=1e-12
    )  # with so many rollouts each state is seen
    for name in ("pathwise", "ratios"):
        assert getattr(found, name).value + 5 * error[name] >= abs(p.residual)
    prop4 = theory.residual_bound(p.expected_divergence, p.largest_divergence, xi=p.xi)
    assert found.prop4.value == pytest.approx(prop4, rel=0.02) and found.pathwise.value < found.prop4.value


def test_intervals_cover() -> None:
    """In about 95% of 200 batches; percentiles from 64 rollouts fall a little short. l_t is never above the exact."""
    p, rng = PROBLEM, np.random.default_rng(1)
    covered = {"surrogate": 0, "pathwise": 0, "ratios": 0, "improvement": 0, "expected": 0}
    above = 0
    for seed in range(200):
        found = sample(rng, 64).certify(xi=p.xi, resamples=400, seed=seed)
        for name, exact in (
            ("surrogate", p.surrogate),
            ("pathwise", p.pathwise_bound),
            ("ratios", p.ratio_bound),
            ("improvement", p.surrogate - p.ratio_bound),
        ):
            covered[name] += getattr(found, name).low <= exact <= getattr(found, name).high
        covered["expected"] += (
            found.positions.expected_low[1] <= p.expected_divergence[1] <= found.positions.expected_high[1]
        )
        assert (found.positions.largest <= p.largest_divergence[: found.positions.largest.size] * (1 + 1e-12)).all()
        above += found.pathwise.value >= abs(p.residual)
    assert all(0.88 <= count / 200 <= 0.99 for count in covered.values()), covered
    assert above >= 198


def test_a_baseline_changes_the_noise_alone() -> None:
    """E_mu[sum_t (rho_t - 1)] = 0: the mean of the others in a group may be taken off the rewards."""
    p, rng, n = PROBLEM, np.random.default_rng(2), 8
    b = sample(rng, 40_000)
    high = b.rewards + 3.0  # rewards far from 0, where a baseline matters
    others = (high.reshape(-1, n).sum(1, keepdims=True) - high.reshape(-1, n)) / (n - 1)
    b.rewards = (high.reshape(-1, n) - others).reshape(-1)
    with_baseline = b.certify(groups=np.arange(40_000) // n)
    b.rewards = high
    without = b.certify(groups=np.arange(40_000) // n)
    for found in (with_baseline, without):
        assert found.surrogate.low - 0.002 < p.surrogate < found.surrogate.high + 0.002
    spread = [x.surrogate.high - x.surrogate.low for x in (with_baseline, without)]
    assert spread[0] < 0.5 * spread[1] and with_baseline.pathwise.value == without.pathwise.value
