"""Statistics over seeds: slow references, known cases, coverage on simulated data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import stats

from cppo.errors import UserError
from cppo.study.statistics import (
    attainable_coverage,
    expanded_level,
    mean_interval,
    paired_difference,
    probability_of_improvement,
)

figures = st.floats(0, 1).map(lambda value: round(value, 3))
DRAWS = 99  # of the properties; few, since hypothesis asks often


def by_seed(values):
    return dict(enumerate(values))


# -- levels ----------------------------------------------------------------------------------------------------------


def test_expanded_level_is_hesterbergs():
    """His table: for n = 10 the one-sided 0.025 becomes about 0.0086, for n = 20 about 0.016."""
    assert (1 - expanded_level(10)) / 2 == pytest.approx(0.0086, abs=2e-4)
    assert (1 - expanded_level(20)) / 2 == pytest.approx(0.016, abs=3e-4)
    assert expanded_level(10_000) == pytest.approx(0.95, abs=1e-4)


def test_expanded_level_stays_within_the_resamples():
    assert expanded_level(2, resamples=999) == 1 - 2 / 1000


@pytest.mark.parametrize(("count", "share"), [(0, 0), (1, 0), (2, 0.5), (3, 0.75), (5, 0.9375)])
def test_attainable_coverage(count, share):
    assert attainable_coverage(count) == share


def test_attainable_coverage_is_that_of_the_range():
    x = np.random.default_rng(0).normal(size=(40_000, 4))
    assert np.mean((x.min(1) <= 0) & (x.max(1) >= 0)) == pytest.approx(attainable_coverage(4), abs=0.01)


# -- mean ------------------------------------------------------------------------------------------------------------


def test_mean_interval_against_all_resamples():
    """Four values: all 256 resamples, and the percentiles of their means."""
    x = [0.1, 0.4, 0.45, 0.9]
    means = np.array([np.mean(resample) for resample in itertools.product(x, repeat=4)])
    tail = (1 - expanded_level(4, 0.6)) / 2
    found = mean_interval(x, level=0.6, resamples=40_000)
    assert found.value == pytest.approx(np.mean(x))
    assert found.low == pytest.approx(np.quantile(means, tail), abs=0.02)
    assert found.high == pytest.approx(np.quantile(means, 1 - tail), abs=0.02)


def test_mean_interval_nears_the_t_interval():
    x = np.random.default_rng(3).normal(size=200)
    found = mean_interval(x.tolist())
    low, high = stats.t.interval(0.95, 199, x.mean(), stats.sem(x))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_mean_of_one_and_of_none():
    one, none = mean_interval([0.25]), mean_interval([])
    assert (one.value, one.low, one.high, one.count) == (0.25, None, None, 1)
    assert (none.value, none.low, none.high, none.count) == (None, None, None, 0)


def test_mean_of_equal_values_is_a_point():
    found = mean_interval([0.5] * 5)
    assert (found.low, found.value, found.high) == (0.5, 0.5, 0.5)


@given(st.lists(figures, min_size=2, max_size=7), figures)
@hypothesis_settings(max_examples=30)
def test_mean_interval_properties(x, shift):
    found = mean_interval(x, resamples=DRAWS)
    tolerance = 1e-9
    assert min(x) - tolerance <= found.low <= found.high <= max(x) + tolerance
    moved = mean_interval([value + shift for value in x], resamples=DRAWS)
    assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift))
    assert mean_interval(x, resamples=DRAWS) == found


def test_wider_level_wider_interval():
    x = [0.1, 0.5, 0.3, 0.8, 0.6, 0.2]
    narrow, wide = mean_interval(x, level=0.5), mean_interval(x, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("count", [5, 8])
def test_coverage_of_the_mean(count):
    """Nominal 95%; the plain percentile interval and BCa cover 84% with five seeds."""
    rng, n = np.random.default_rng(2), 800
    hits = 0
    for draw in range(n):
        found = mean_interval(rng.normal(size=count).tolist(), resamples=1999, seed=draw)
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / n <= 0.98


# -- differences -----------------------------------------------------------------------------------------------------


def test_paired_difference_cancels_what_seeds_share():
    x = {0: 0.1, 1: 0.5, 2: 0.9}
    found = paired_difference({seed: value + 0.1 for seed, value in x.items()}, x)
    assert (found.low, found.value, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_paired_difference_takes_the_seeds_that_both_have():
    found = paired_difference({0: 0.5, 1: 0.7, 5: 9.0}, {1: 0.3, 0: 0.4, 7: -9.0})
    assert found.value == pytest.approx(0.25) and found.count == 2
    assert paired_difference({0: 1.0}, {1: 1.0}).value is None


# -- probability of improvement --------------------------------------------------------------------------------------


def slow_probability(x, y):
    pairs = [(a, b) for a in x for b in y]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@given(st.lists(st.tuples(figures, figures), min_size=2, max_size=7))
@hypothesis_settings(max_examples=30)
def test_probability_against_the_definition(pairs):
    x, y = (list(side) for side in zip(*pairs, strict=True))
    found = probability_of_improvement(by_seed(x), by_seed(y), resamples=DRAWS)
    assert found.value == pytest.approx(slow_probability(x, y))
    assert 0 <= found.low <= found.high <= 1
    statistic = stats.mannwhitneyu(x, y).statistic / len(x) ** 2
    assert found.value == pytest.approx(statistic)
    other = probability_of_improvement(by_seed(y), by_seed(x), resamples=DRAWS)
    assert found.value + other.value == pytest.approx(1)


def test_probability_interval_against_all_resamples():
    """A seed is drawn with both of its runs."""
    x, y = [0.5, 0.2, 0.9, 0.4], [0.3, 0.45, 0.6, 0.1]
    drawn = []
    for index in itertools.product(range(4), repeat=4):
        drawn.append(slow_probability([x[i] for i in index], [y[i] for i in index]))
    tail = (1 - expanded_level(4, 0.6)) / 2
    found = probability_of_improvement(by_seed(x), by_seed(y), level=0.6, resamples=40_000)
    assert found.low == pytest.approx(np.quantile(drawn, tail), abs=0.035)
    assert found.high == pytest.approx(np.quantile(drawn, 1 - tail), abs=0.035)


def test_probability_of_equals_is_a_half():
    assert probability_of_improvement(by_seed([0.5] * 4), by_seed([0.5] * 4)).value == 0.5


@pytest.mark.parametrize("count", [2, 5, 10])
def test_without_exception_is_not_certain(count):
    """All n seeds won: the smallest P with P^n >= 0.025."""
    better, worse = by_seed([1.0 + i for i in range(count)]), by_seed([0.0] * count)
    won = probability_of_improvement(better, worse)
    assert (won.value, won.high) == (1.0, 1.0)
    assert won.low == pytest.approx(0.025 ** (1 / count))
    lost = probability_of_improvement(worse, better)
    assert (lost.value, lost.low) == (0.0, 0.0) and lost.high == pytest.approx(1 - won.low)


def test_probability_of_one_seed_and_of_none():
    one = probability_of_improvement({0: 0.4}, {0: 0.3})
    assert (one.value, one.low, one.high) == (1.0, None, None)
    assert probability_of_improvement({0: 0.4}, {1: 0.3}).value is None


def test_coverage_of_the_probability():
    rng, n = np.random.default_rng(11), 300
    truth = stats.norm.cdf(0.5 / math.sqrt(2))
    hits = 0
    for draw in range(n):
        x, y = rng.normal(0.5, 1, 8), rng.normal(0, 1, 8)
        found = probability_of_improvement(by_seed(x.tolist()), by_seed(y.tolist()), resamples=499, seed=draw)
        hits += found.low <= truth <= found.high
    assert hits / n >= 0.90


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_figures_must_be_finite(bad):
    with pytest.raises(UserError, match="not finite"):
        mean_interval([0.1, bad])
    with pytest.raises(UserError, match="leave out runs"):
        probability_of_improvement({0: bad, 1: 0.1}, {0: 0.1, 1: 0.1})


@pytest.mark.parametrize("level", [0, 1, 95])
def test_level_is_a_share(level):
    with pytest.raises(UserError, match=r"such as 0\.95"):
        mean_interval([0.1, 0.2], level=level)


# -- problems --------------------------------------------------------------------------------------------------------


def test_a_problem_each_is_a_number_each():
    x, y = [0.2, 0.5, 0.9, 0.4], [0.3, 0.1, 0.6, 0.5]
    listed, other = [[[value]] for value in x], [[[value]] for value in y]
    assert mean_interval(listed) == mean_interval(x)
    assert paired_difference(by_seed(listed), by_seed(other)) == paired_difference(by_seed(x), by_seed(y))
    assert probability_of_improvement(by_seed(listed), by_seed(other)) == probability_of_improvement(
        by_seed(x), by_seed(y)
    )


def test_problems_against_all_resamples():
    """Two seeds, benchmarks of 2 and 3 problems: all 2^2 * 2^2 * 3^3 resamples, each benchmark's problems on their own
    and the same for both seeds.
    """
    tables = [np.array([[0.1, 0.5], [0.3, 0.9]]), np.array([[0.2, 0.6, 0.7], [0.25, 0.4, 1.0]])]
    means = [
        np.mean(
            [
                np.mean([[table[s][p] for p in picked] for s in seeds])
                for table, picked in zip(tables, both, strict=True)
            ]
        )
        for seeds in itertools.product(range(2), repeat=2)
        for both in itertools.product(itertools.product(range(2), repeat=2), itertools.product(range(3), repeat=3))
    ]
    found = mean_interval([[table[s].tolist() for table in tables] for s in range(2)], level=0.5)
    tail = (1 - expanded_level(2, 0.5)) / 2
    assert found.value == pytest.approx(np.mean([table.mean() for table in tables]))
    assert found.low == pytest.approx(np.quantile(means, tail), abs=0.02)
    assert found.high == pytest.approx(np.quantile(means, 1 - tail), abs=0.02)


def test_few_problems_widen_the_interval():
    rng = np.random.default_rng(0)
    scores = 0.5 + rng.normal(size=(5, 1)) * 0.02 + rng.normal(size=(1, 20)) * 0.2
    over_seeds, over_both = mean_interval(scores.mean(1).tolist()), mean_interval([[row.tolist()] for row in scores])
    assert over_both.high - over_both.low > 2 * (over_seeds.high - over_seeds.low)
    # with one other rule on the same problems, how hard they are cancels
    other = scores + 0.1
    mine, theirs = ({s: [row.tolist()] for s, row in enumerate(table)} for table in (scores, other))
    difference = paired_difference(theirs, mine)
    assert difference.value == pytest.approx(0.1) and difference.high - difference.low < 1e-9


def test_coverage_over_seeds_and_problems():
    """Seeds, problems and noise, all normal: of nominal 95% at least 90% hold the mean (the plain interval over seeds
    holds it in under 60%).
    """
    rng = np.random.default_rng(1)
    hits = np.zeros(2)
    for _ in range(150):
        seed, problem = rng.normal(size=(5, 1)), rng.normal(size=(1, 12))
        x = 0.1 * seed + 0.4 * problem + 0.2 * rng.normal(size=(5, 12))
        both = mean_interval([[row.tolist()] for row in x], resamples=799)
        seeds = mean_interval(x.mean(1).tolist(), resamples=799)
        hits += [both.low <= 0 <= both.high, seeds.low <= 0 <= seeds.high]
    assert hits[0] / 150 >= 0.88 and hits[1] / 150 < 0.75


def test_a_certain_win_is_not_certain_over_other_problems():
    """All pairs are won on these problems, but by one of four: other problems would have given others."""
    mine = {s: [[1.0, 0.2, 0.2, 0.2]] for s in range(8)}
    theirs = {s: [[0.0, 0.3, 0.3, 0.3]] for s in range(8)}
    found = probability_of_improvement(mine, theirs)
    assert found.value == 1.0 and found.low == 0.0


@pytest.mark.parametrize(
    "values", [[[[0.1, 0.2]], [[0.1]]], [[[0.1, 0.2]], 0.5], [[[0.1], [0.2]], [[0.1]]], [[[]], [[]]], [[0.1], [0.2]]]
)
def test_figures_have_one_form(values):
    with pytest.raises(UserError, match="one figure per seed"):
        mean_interval(values)
