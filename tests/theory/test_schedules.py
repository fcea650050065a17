"""Schedules: their formulas, Prop. 5, and which of them the bounds refuse."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cppo import theory
from cppo.theory import SCHEDULES, AssumptionError, is_monotone, make_schedule, monotonicity_gaps


@given(T=st.integers(1, 200), w_min=st.floats(0.01, 1))
def test_formulas(T: int, w_min: float) -> None:
    """Each schedule by its own formula; the largest weight is 1, the smallest w_min unless it is constant."""
    linear = [1.0 if T == 1 else 1 - (1 - w_min) * (t - 1) / (T - 1) for t in range(1, T + 1)]
    half = [0.0 if T == 1 else math.pi * (t - 1) / (T - 1) for t in range(1, T + 1)]
    want = {
        "linear": linear,
        "constant": [1.0] * T,
        "cosine": [w_min + (1 - w_min) * (1 + math.cos(x)) / 2 for x in half],
        "reversed": linear[::-1],
        "matched": [1.0] if T == 1 else [max(w_min, (T - t) / (T - 1)) for t in range(1, T + 1)],
    }
    assert set(want) == set(SCHEDULES)
    for name, expected in want.items():
        w = make_schedule(name, T, w_min)
        assert w.dtype == np.float64 and w == pytest.approx(expected, rel=1e-12), name
        assert w.max() == pytest.approx(1, rel=1e-12)
        assert w.min() == pytest.approx(1.0 if T == 1 or name == "constant" else w_min, rel=1e-9)


@given(T=st.integers(2, 300), w_min=st.floats(0.01, 1))
def test_proposition_5(T: int, w_min: float) -> None:
    """(T - t) / w_t - (T - t - 1) / w_{t+1} = w_min / (w_t w_{t+1}), so that every w_min is allowed."""
    w = make_schedule("linear", T, w_min)
    gaps = monotonicity_gaps(np.arange(T - 1, -1, -1), w)
    assert gaps == pytest.approx(w_min / (w[:-1] * w[1:]), rel=1e-9, abs=1e-11 * T)
    assert is_monotone(np.arange(T - 1, -1, -1), w)
    assert theory.theorem_1(T, 0.02, 0.1, weights=w) == theory.theorem_1(T, 0.02, 0.1)


@pytest.mark.parametrize("w_min", [Fraction(1, 100), Fraction(4, 5), Fraction(1)])
def test_proposition_5_in_fractions(w_min: Fraction) -> None:
    T = 17
    w = [1 - (1 - w_min) * Fraction(t - 1, T - 1) for t in range(1, T + 1)]
    gaps = [(T - t) / w[t - 1] - (T - t - 1) / w[t] for t in range(1, T)]
    assert gaps == [w_min / (w[t - 1] * w[t]) for t in range(1, T)]
    found = monotonicity_gaps([float(T - t) for t in range(1, T + 1)], make_schedule("linear", T, float(w_min)))
    assert found == pytest.approx([float(gap) for gap in gaps], rel=1e-12, abs=1e-13)


def test_gaps_by_hand() -> None:
    """a = (3, 8, 1): it rises once; the last gap is a_{T-1} itself. The last weight plays no part."""
    assert monotonicity_gaps([3, 2, 1, 0], [1, 0.25, 1, 7]).tolist() == [-5, 7, 1]
    assert not is_monotone([3, 2, 1, 0], [1, 0.25, 1, 7]) and is_monotone([3, 2, 1, 0], [1, 1, 1, 1e-9])
    assert monotonicity_gaps([0], [1]).size == 0 and is_monotone([0], [1])
    assert monotonicity_gaps([1, 0], [0.5, 1]).tolist() == [2]


@st.composite
def rates(draw: Any, rises: bool) -> tuple[list[float], int]:
    """(a_1..a_{T-1}, p): each step falls by 0.1% or more, but if it rises, the one from position p does by as much, and
    those after it go either way. No ties: steps are large against the tolerance, 1e-12 of the largest a_t.
    """
    T = draw(st.integers(3, 40))
    down, up = st.floats(0.8, 0.999), st.floats(1.001, 1.25)
    steps = draw(st.lists(down, min_size=T - 2, max_size=T - 2))
    p = draw(st.integers(1, T - 2)) if rises else 0
    if rises:
        steps[p - 1 :] = [draw(up), *(draw(down | up) for _ in steps[p:])]
    return np.cumprod([1.0, *steps]).tolist(), p


def weights_for(coefficients: np.ndarray, a: list[float], last: float) -> np.ndarray:
    return np.append(coefficients[:-1] / np.array(a), last)


@given(drawn=rates(rises=True), L=st.floats(0.001, 0.9), last=st.floats(0.01, 5))
def test_schedules_that_rise_are_refused(drawn: tuple[list[float], int], L: float, last: float) -> None:
    """By the first position from which the coefficient over the weight increases."""
    a, p = drawn
    T = len(a) + 1
    sentence = f"increases from position {p} to {p + 1}:"
    w = weights_for(theory.coefficients(T, 1.0), a, last)
    assert not is_monotone(theory.coefficients(T, L), w)
    with pytest.raises(AssumptionError, match=f"Theorem 1 needs .* {sentence}"):
        theory.theorem_1(T, 0.02, L, weights=w)
    w = weights_for(theory.coefficients(T, L, form="product"), a, last)
    with pytest.raises(AssumptionError, match=f"the product form needs .* {sentence}"):
        theory.product_form(T, 0.02, L, weights=w)


@given(drawn=rates(rises=False), L=st.floats(0.001, 0.9), last=st.floats(0.01, 5))
def test_schedules_that_fall_are_accepted(drawn: tuple[list[float], int], L: float, last: float) -> None:
    a, _ = drawn
    T = len(a) + 1
    w = weights_for(theory.coefficients(T, 1.0), a, last)
    assert is_monotone(theory.coefficients(T, L), w)
    assert theory.theorem_1(T, 0.02, L, weights=w) == theory.theorem_1(T, 0.02, L)
    w = weights_for(theory.coefficients(T, L, form="product"), a, last)
    assert theory.product_form(T, 0.02, L, weights=w) == pytest.approx(theory.product_form(T, 0.02, L))


def test_which_schedules_the_theorems_allow() -> None:
    """At T = 8192. The cosine falls faster than T - t in its middle, once w_min is small."""
    T = 8192
    later = np.arange(T - 1, -1, -1)
    allowed = {
        (name, w_min): is_monotone(later, make_schedule(name, T, w_min)) for name in SCHEDULES for w_min in (0.05, 0.8)
    }
    assert [key for key, value in allowed.items() if not value] == [("cosine", 0.05)]
    with pytest.raises(AssumptionError, match="tightest_residual"):
        theory.theorem_1(T, 0.02, 0.15, weights=make_schedule("cosine", T, 0.05))
    # the product form's coefficient is flat over most of T: only weights that do not fall are allowed
    for name in SCHEDULES:
        w = make_schedule(name, T, 0.8)
        if name in ("constant", "reversed"):
            assert theory.product_form(T, 0.02, 0.1875, weights=w) < 4 * T * 0.02
        else:
            with pytest.raises(AssumptionError, match="product form"):
                theory.product_form(T, 0.02, 0.1875, weights=w)
    # with T L small it is close to L (T - t), and the linear schedule passes
    w = make_schedule("linear", 8, 0.8)
    assert theory.product_form(8, 0.02, 0.01, weights=w) == theory.product_form(8, 0.02, 0.01)
