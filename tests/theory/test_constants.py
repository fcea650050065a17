"""The table of all rules' constants: each number is its function's, and missing exactly where its condition fails."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from cppo import theory
from cppo.theory import Constant, constants, make_schedule


def monotone(coefficients: Any, w: Any) -> bool:
    """By definition, t = 1..T-1."""
    rates = [float(c) / float(x) for c, x in zip(coefficients[:-1], w[:-1], strict=True)]
    return all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(rates))


def by_statement(rows: list[Constant]) -> dict[tuple[str, str], Constant]:
    found = {(row.rule, row.statement): row for row in rows}
    assert len(found) == len(rows)
    return found


CASES = [
    (8192, "linear", 0.8, 0.15, 0.02),
    (8192, "cosine", 0.05, 0.15, 0.02),
    (8192, "constant", 0.8, 0.15, 0.02),
    (6, "linear", 0.8, 0.02, 0.01),
    (50, "matched", 0.3, 0.15, 0.02),
    (50, "reversed", 0.3, 0.15, 0.2),
    (1, "linear", 0.8, 0.15, 0.02),
    (30, "linear", 0.05, 0.15, 0.02),
]


@pytest.mark.parametrize("T, schedule, w_min, delta, delta_b", CASES)
def test_every_number_is_its_functions(T: int, schedule: str, w_min: float, delta: float, delta_b: float) -> None:
    xi = 0.7
    w = make_schedule(schedule, T, w_min)
    L = min(1.0, delta / float(w.min()))
    sum_holds = monotone(theory.coefficients(T, L), w)
    product_holds = monotone(theory.coefficients(T, L, form="product"), w)

    def tightest(**options: Any) -> float:
        return theory.tightest_residual(w, delta, delta_b, xi=xi, **options).bound

    def closed(function: Any, holds: bool, slack: float = 0.0) -> float | None:
        return function(T, delta_b, L, weights=w, xi=xi, slack=slack) if holds else None

    want: dict[tuple[str, str], float | None] = {
        ("dppo", "uniform (Sec. 3)"): theory.uniform(T, delta, xi=xi),
        ("dppo", "uniform, product form"): theory.uniform(T, delta, xi=xi, form="product"),
        ("trm_max", "Pinsker-marginal"): theory.trm_max(T, 0.03, xi=xi),
        ("trm_avg", "Pinsker and Jensen"): theory.trm_avg(T, 0.004, xi=xi),
        ("trm_max_avg", "the smaller of both"): theory.trm_max_avg(T, 0.2, 0.005, xi=xi),
        ("cppo", "Cor. 6"): theory.corollary_6(T, delta, delta_b, xi=xi),
        ("cppo", "Theorem 1, Cor. 7"): closed(theory.theorem_1, sum_holds),
        ("cppo", "tightest through Prop. 4 (LP)"): tightest(),
        ("cppo", "product form (App. B.9)"): closed(theory.product_form, product_holds),
        ("cppo", "tightest product form (LP)"): tightest(form="product"),
        ("cppo", "rule (8): Prop. 8"): closed(theory.theorem_1, sum_holds, slack=delta),
        ("cppo", "rule (8): tightest (LP)"): tightest(rule=True),
        ("cppo", "rule (8): tightest product (LP)"): tightest(rule=True, form="product"),
    }
    if schedule == "linear":
        own = theory.own_lengths(T, delta, delta_b, w_min, xi=xi, slack=delta)
        want["cppo", "rule (8), own lengths, mu may have to end"] = own
    kl = {"delta_kl": 0.03, "delta_avg": 0.004, "delta_kl_both": 0.2, "delta_avg_both": 0.005}
    found = by_statement(constants(T, delta, delta_b, w_min, xi=xi, schedule=schedule, **kl))
    assert set(found) == set(want)
    for key, bound in want.items():
        row = found[key]
        if bound is None:
            assert row.bound is None and row.remark, key
        else:
            assert row.bound == pytest.approx(bound, rel=1e-12, abs=1e-15), key


def test_the_conditions_are_hit() -> None:
    """Of the cases above, both forms hold in one, both fail in one, and the product form alone fails in one."""
    seen = set()
    for T, schedule, w_min, delta, delta_b in CASES:
        found = by_statement(constants(T, delta, delta_b, w_min, schedule=schedule))
        row, product = found["cppo", "Theorem 1, Cor. 7"], found["cppo", "product form (App. B.9)"]
        seen.add((row.bound is not None, product.bound is not None))
        if row.bound is None:
            assert "Theorem 1 needs" in row.remark and "tightest_residual" in row.remark
        if product.bound is None:
            assert "product form needs" in product.remark
    assert seen == {(True, True), (True, False), (False, False)}


def test_for_the_papers_settings() -> None:
    """Rewards 0 or 1. Cor. 7 is 1/6 of the uniform rule's; the program takes little off, its product form most."""
    found = by_statement(constants(8192))
    bound = {key: row.bound for key, row in found.items() if row.bound is not None}
    assert bound["dppo", "uniform (Sec. 3)"] == pytest.approx(1_509_765.12)
    assert bound["cppo", "Theorem 1, Cor. 7"] == pytest.approx(251_627.52)
    assert bound["cppo", "Cor. 6"] == pytest.approx(201_302.016)
    assert 0.85 < bound["cppo", "tightest through Prop. 4 (LP)"] / bound["cppo", "Theorem 1, Cor. 7"] < 1
    assert found["cppo", "product form (App. B.9)"].bound is None
    assert bound["cppo", "tightest product form (LP)"] < 2 * 8192 / 0.8 * 0.02 + 1
    assert bound["cppo", "rule (8): Prop. 8"] > bound["cppo", "Theorem 1, Cor. 7"]
    conditions = {row.condition for row in found.values()}
    assert "KL_t <= 0.05" in conditions and "mean KL_t <= 0.001" in conditions


def test_units() -> None:
    """Every bound is proportional to xi."""
    for one, three in zip(constants(20, xi=0.5), constants(20, xi=1.5), strict=True):
        assert (one.bound is None) == (three.bound is None)
        assert one.bound is None or three.bound == pytest.approx(3 * one.bound, rel=1e-12)
    for one_, three_ in zip(
        theory.compare_schedules(20, 0.15, 0.02, xi=0.5), theory.compare_schedules(20, 0.15, 0.02, xi=1.5), strict=True
    ):
        assert one_.name == three_.name and three_.tightest == pytest.approx(3 * one_.tightest)
        assert np.isclose(one_.room, three_.room)
