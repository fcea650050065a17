"""The constants of all rules side by side: what each promises at a horizon, and whether its conditions hold."""

from __future__ import annotations

from dataclasses import dataclass

from cppo.theory import bounds
from cppo.theory.checks import AssumptionError, above_0, at_least_0, at_most_1, horizon_of
from cppo.theory.schedules import make_schedule
from cppo.theory.tightest import tightest_residual


@dataclass(frozen=True)
class Constant:
    """A bound of |Delta|. bound : in units of the reward; None where its condition does not hold, or no bound exists.

    rule : as in `cppo rules`. statement : where it is proved. condition : what it needs of every rollout. remark : why
    there is no number, or what the number means.
    """

    rule: str
    statement: str
    condition: str
    bound: float | None
    remark: str = ""


def constants(
    horizon: int,
    delta: float = 0.15,
    delta_b: float = 0.02,
    w_min: float = 0.8,
    *,
    xi: float = 0.5,
    schedule: str = "linear",
    delta_kl: float = 0.05,
    delta_avg: float = 0.001,
    delta_kl_both: float = 0.1,
    delta_avg_both: float = 0.002,
) -> list[Constant]:
    """Every rule's bound at a horizon of T tokens.

    delta, delta_b, w_min, schedule : CPPO's thresholds, and delta is DPPO's, too. xi : half of the reward's range.
    delta_kl, delta_avg : limits of TRM-Max and TRM-Avg, on KL(mu || pi); delta_kl_both, delta_avg_both : of both at
    once.
    """
    T = horizon_of(horizon)
    above_0(xi=xi)
    at_least_0(delta_b=delta_b)
    at_most_1(delta=delta, w_min=w_min)
    w = make_schedule(schedule, T, w_min)
    L = min(delta / float(w.min()), 1.0)
    token, prefix = "w_t D_t <= delta", "S_m <= delta_b W_m"
    both, rule = f"{token}, {prefix}", "w_t D_t <= tau_t (8)"

    rows = [
        Constant("dppo", "uniform (Sec. 3)", "D_t <= delta", bounds.uniform(T, delta, xi=xi)),
        Constant("dppo", "uniform, product form", "D_t <= delta", bounds.uniform(T, delta, xi=xi, form="product")),
        Constant("trm_max", "Pinsker-marginal", f"KL_t <= {delta_kl:g}", bounds.trm_max(T, delta_kl, xi=xi)),
        Constant("trm_avg", "Pinsker and Jensen", f"mean KL_t <= {delta_avg:g}", bounds.trm_avg(T, delta_avg, xi=xi)),
        Constant(
            "trm_max_avg",
            "the smaller of both",
            f"KL_t <= {delta_kl_both:g}, mean <= {delta_avg_both:g}",
            bounds.trm_max_avg(T, delta_kl_both, delta_avg_both, xi=xi),
        ),
        Constant("cppo", "Cor. 6", f"D_t <= delta, {prefix}", bounds.corollary_6(T, delta, delta_b, xi=xi)),
    ]

    def closed(statement: str, condition: str, slack: float, product: bool = False) -> Constant:
        bound = bounds.product_form if product else bounds.theorem_1
        try:
            return Constant("cppo", statement, condition, bound(T, delta_b, L, weights=w, xi=xi, slack=slack))
        except AssumptionError as error:
            return Constant("cppo", statement, condition, None, str(error))

    def tightest(statement: str, condition: str, **options: object) -> Constant:
        found = tightest_residual(w, delta, delta_b, xi=xi, **options)  # type: ignore[arg-type]
        return Constant("cppo", statement, condition, found.bound)

    rows += [
        closed("Theorem 1, Cor. 7", both, 0.0),
        tightest("tightest through Prop. 4 (LP)", both),
        closed("product form (App. B.9)", both, 0.0, product=True),
        tightest("tightest product form (LP)", both, form="product"),
        closed("rule (8): Prop. 8", rule, delta),
        tightest("rule (8): tightest (LP)", rule, rule=True),
        tightest("rule (8): tightest product (LP)", rule, rule=True, form="product"),
    ]
    if schedule == "linear":
        rows.append(
            Constant(
                "cppo",
                "rule (8), own lengths, mu may have to end",
                rule,
                bounds.own_lengths(T, delta, delta_b, w_min, xi=xi, slack=delta),
            )
        )
    return rows
