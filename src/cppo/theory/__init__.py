"""The theory of trust regions for autoregressive policies, to compute with (numpy alone). docs/theory.md explains it.

`TabularProblem`: small problems solved exactly. `bounds`: what the theorems promise. `tightest_residual`: what the
constraints imply at best. `certificate`: the bound from a batch of rollouts. `constants`: all rules side by side.
"""

from cppo.theory.bounds import (
    coefficients,
    corollary_6,
    corollary_7,
    implemented_rule,
    own_lengths,
    product_form,
    residual_bound,
    saturating,
    suffix_tv_bounds,
    terminal_only,
    theorem_1,
    trm_avg,
    trm_max,
    trm_max_avg,
    uniform,
)
from cppo.theory.certificates import Certificate, Estimate, Positions, certificate
from cppo.theory.checks import AssumptionError
from cppo.theory.comparison import Constant, constants
from cppo.theory.mixtures import causal_gate, mixture, paper_gate
from cppo.theory.schedules import SCHEDULES, is_monotone, make_schedule, monotonicity_gaps
from cppo.theory.tabular import Constraints, TabularProblem
from cppo.theory.tightest import ScheduleCost, Tightest, compare_schedules, schedule_cost, tightest_residual

__all__ = [
    "SCHEDULES",
    "AssumptionError",
    "Certificate",
    "Constant",
    "Constraints",
    "Estimate",
    "Positions",
    "ScheduleCost",
    "TabularProblem",
    "Tightest",
    "causal_gate",
    "certificate",
    "coefficients",
    "compare_schedules",
    "constants",
    "corollary_6",
    "corollary_7",
    "implemented_rule",
    "is_monotone",
    "make_schedule",
    "mixture",
    "monotonicity_gaps",
    "own_lengths",
    "paper_gate",
    "product_form",
    "residual_bound",
    "saturating",
    "schedule_cost",
    "suffix_tv_bounds",
    "terminal_only",
    "theorem_1",
    "tightest_residual",
    "trm_avg",
    "trm_max",
    "trm_max_avg",
    "uniform",
]
