"""What the package refuses, in sentences; and that it needs numpy alone."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cppo.theory.tabular
from cppo import theory
from cppo.theory import AssumptionError, TabularProblem
from cppo.theory.tightest import prefix_budgets

PACKAGE = Path(cppo.theory.__file__).parent
HALF = np.full((1, 2), 0.5)
NEXT = np.full((2, 2), 0.5)
NAN = math.nan


def problem(**changes: Any) -> TabularProblem:
    given = {"rollout": (HALF, NEXT), "policy": (HALF, NEXT), "rewards": np.arange(4.0), "eos": None, **changes}
    return TabularProblem(**given)


def certify(**changes: Any) -> object:
    given: dict[str, Any] = {
        "divergence": np.full((2, 3), 0.1),
        "log_ratio": np.zeros((2, 3)),
        "mask": np.ones((2, 3)),
        "rewards": [0, 1],
        "xi": 0.5,
        **changes,
    }
    return theory.certificate(**given)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    # checks that many functions share
    "no horizon": (lambda: theory.uniform(0, 0.1), "horizon is 0, expected at least 1"),
    "half a token": (lambda: theory.uniform(2.5, 0.1), "whole number"),  # type: ignore[arg-type]
    "negative delta_b": (lambda: theory.theorem_1(4, -0.1, 0.1), "delta_b is -0.1"),
    "negative L": (lambda: theory.theorem_1(4, 0.1, -0.1), "largest is -0.1"),
    "negative xi": (lambda: theory.theorem_1(4, 0.1, 0.1, xi=-1), "xi is -1"),
    "negative slack": (lambda: theory.theorem_1(4, 0.1, 0.1, slack=-1), "slack is -1"),
    "NaN": (lambda: theory.corollary_6(4, NAN, 0.1), "is nan, expected a finite number"),
    "infinite": (lambda: theory.trm_max(4, math.inf), "delta is inf"),
    "too few weights": (lambda: theory.theorem_1(4, 0.1, 0.1, weights=[1, 1]), r"\[2\], expected \[4\]"),
    "a weight of 0": (lambda: theory.theorem_1(3, 0.1, 0.1, weights=[1, 0, 1]), "position 2 is 0.0"),
    "a weight NaN": (lambda: theory.terminal_only(3, 0.1, 0.1, weights=[1, 1, NAN]), "position 3 is nan"),
    # bounds
    "w_min 0": (lambda: theory.corollary_7(4, 0.1, 0.02, 0.0), "w_min is 0.0"),
    "w_min above 1": (lambda: theory.implemented_rule(4, 0.1, 0.02, 1.5), "w_min is 1.5"),
    "w_min of own lengths": (lambda: theory.own_lengths(4, 0.1, 0.02, -1), "w_min is -1"),
    "a KL for a TV": (lambda: theory.suffix_tv_bounds([0.1, 1.7]), "1.7 at position 2.*Pinsker"),
    "a negative TV": (lambda: theory.suffix_tv_bounds([-0.1, 0.7]), "-0.1 at position 1"),
    "a table of TVs": (lambda: theory.suffix_tv_bounds([[0.1]]), r"\[1, 1\], expected \[T\]"),
    "u and l differ": (lambda: theory.residual_bound([0.1], [0.1, 0.2]), r"expected has the shape \[1\]"),
    "u above l": (lambda: theory.residual_bound([0.1, 0.3], [0.1, 0.2]), "at position 2 the expected divergence 0.3"),
    "xi of Prop. 4": (lambda: theory.residual_bound([0.1], [0.1], xi=-1), "xi is -1"),
    "unknown form": (lambda: theory.residual_bound([0.1], [0.1], form="x"), "form is 'x'"),  # type: ignore[arg-type]
    "product of L > 1": (lambda: theory.product_form(4, 0.1, 1.2), "largest is 1.2"),
    "negative L, product": (lambda: theory.coefficients(4, -1.0), "largest is -1"),
    "negative delta_b, product": (lambda: theory.product_form(4, -0.1, 0.1), "delta_b is -0.1"),
    "negative slack, product": (lambda: theory.product_form(4, 0.1, 0.1, slack=-0.1), "slack is -0.1"),
    "negative delta_b, terminal": (lambda: theory.terminal_only(4, -0.1, 0.1), "delta_b is -0.1"),
    "negative L, terminal": (lambda: theory.terminal_only(4, 0.1, -0.1), "largest is -0.1"),
    "negative delta, uniform": (lambda: theory.uniform(4, -0.1), "is -0.1"),
    "TRM-Avg": (lambda: theory.trm_avg(4, -0.1), "delta is -0.1"),
    "TRM-Max&Avg": (lambda: theory.trm_max_avg(4, 0.1, -0.1), "delta_avg is -0.1"),
    "delta_b below 0": (lambda: theory.saturating(4, 0.1, -0.1), "delta_b is -0.1"),
    "delta 0": (lambda: theory.saturating(4, 0.0, 0.1), "delta is 0.0, expected a finite number above 0"),
    # schedules
    "unknown schedule": (lambda: theory.make_schedule("stairs", 4), "schedule is 'stairs', expected one of linear"),
    "w_min of a schedule": (lambda: theory.make_schedule("linear", 4, 2.0), "w_min is 2.0"),
    "horizon of a schedule": (lambda: theory.make_schedule("linear", 0), "horizon is 0"),
    "gaps of other weights": (lambda: theory.is_monotone([2, 1, 0], [1, 1]), r"\[2\], expected \[3\]"),
    # the program
    "rule and slack": (lambda: theory.tightest_residual([1, 1], 0.1, 0.1, rule=True, slack=0.1), "rule=True or slack"),
    "delta of the program": (lambda: theory.tightest_residual([1, 1], 0, 0.1), "delta is 0"),
    "delta_b of the program": (lambda: prefix_budgets([1, 1], 0.1, -1), "delta_b is -1"),
    "slack of the program": (lambda: prefix_budgets([1, 1], 0.1, 0.1, slack=-1), "slack is -1"),
    "weights of the program": (lambda: theory.tightest_residual([1, -1], 0.1, 0.1), "position 2 is -1"),
    "no weights": (lambda: theory.tightest_residual([], 0.1, 0.1), "horizon is 0"),
    "xi of the program": (lambda: theory.tightest_residual([1, 1], 0.1, 0.1, xi=-1), "xi is -1"),
    "form of the program": (
        lambda: theory.tightest_residual([1, 1], 0.1, 0.1, form="both"),  # type: ignore[arg-type]
        "form is 'both'",
    ),
    "scale of a schedule": (lambda: theory.schedule_cost("x", [0.5, 0.5], 0.1, 0.1), "largest weight is 0.5"),
    "delta_b 0 of a schedule": (lambda: theory.schedule_cost("x", [1, 1], 0.1, 0), "delta_b is 0"),
    # constants
    "horizon of the table": (lambda: theory.constants(0), "horizon is 0"),
    "delta of the table": (lambda: theory.constants(4, 0.0), "delta is 0.0"),
    "no TV as delta of the table": (lambda: theory.constants(4, 1.5), "delta is 1.5, expected .* at most 1"),
    "xi of the table": (lambda: theory.constants(4, xi=0.0), "xi is 0.0"),
    "delta_b of the table": (lambda: theory.constants(4, 0.1, -0.1), "delta_b is -0.1"),
    "w_min of the table": (lambda: theory.constants(4, w_min=0.0), "w_min is 0.0"),
    # tabular problems
    "no tables": (lambda: problem(rollout=()), "rollout: expected a tuple of tables"),
    "an array of tables": (lambda: problem(policy=NEXT), "policy: expected a tuple of tables.*got ndarray"),
    "a level too wide": (lambda: problem(rollout=(HALF, np.full((3, 2), 0.5))), r"position 2 has the shape \[3, 2\]"),
    "no level": (lambda: problem(rollout=(np.ones(2),)), r"position 1 has the shape \[2\]"),
    "no distribution": (
        lambda: problem(policy=(HALF, NEXT * 0.9)),
        "policy: a row of position 2 is not a distribution",
    ),
    "negative probability": (lambda: problem(rollout=(np.array([[1.5, -0.5]]), NEXT)), "rollout: a row of position 1"),
    "NaN probability": (lambda: problem(rollout=(HALF * NAN, NEXT)), "rollout: a row of position 1"),
    "two horizons": (lambda: problem(policy=(HALF,)), "differ in vocabulary or horizon"),
    "no such token": (lambda: problem(eos=2), "eos is 2, expected a token between 0 and 1"),
    "too few rewards": (lambda: problem(rewards=np.ones(3)), r"rewards have the shape \[3\], expected \[4\]"),
    "no common support": (lambda: problem(rollout=(HALF, np.array([[1.0, 0], [0.5, 0.5]]))), "at position 2 pi can"),
    "rewards beyond xi": (lambda: problem(reward_bound=2.0), "reward_bound is 2.0, and the largest reward"),
    "spread 0": (lambda: TabularProblem.random(np.random.default_rng(0), spread=0), "spread is 0"),
    "random horizon": (lambda: TabularProblem.random(np.random.default_rng(0), horizon=0), "horizon is 0"),
    "weights and w_min": (lambda: problem().constraints([1, 1], w_min=0.8), "give either weights"),
    "neither of the two": (lambda: problem().constraints(), "give either weights"),
    "weights of a problem": (lambda: problem().constraints([1, 1, 1]), r"\[3\], expected \[2\]"),
    # mixtures
    "gate above 1": (lambda: theory.mixture(problem(), [np.ones(1), np.full(2, 1.1)]), "gates of position 2"),
    "gate of another shape": (lambda: theory.mixture(problem(), [np.ones(2), np.ones(2)]), "gates of position 1"),
    "too few gates": (lambda: theory.mixture(problem(), [np.ones(1)]), "shorter"),
    "delta of a gate": (lambda: theory.paper_gate(problem(), [1, 1], 0, 0.1), "delta is 0"),
    "delta_b of a gate": (lambda: theory.causal_gate(problem(), [1, 1], 0.1, -1), "delta_b is -1"),
    "weights of a gate": (lambda: theory.causal_gate(problem(), [1, 1, 1], 0.1, 0), r"\[3\], expected \[2\]"),
    # the certificate
    "a flat mask": (lambda: certify(mask=np.ones(3)), r"mask has the shape \[3\]"),
    "no response": (lambda: certify(mask=np.ones((0, 3))), "at least one response"),
    "a certificate's xi": (lambda: certify(xi=-1), "xi is -1"),
    "level 1": (lambda: certify(level=1.0), "level is 1.0"),
    "another divergence": (lambda: certify(divergence=np.zeros((2, 4))), r"divergence has the shape \[2, 4\]"),
    "another log-ratio": (lambda: certify(log_ratio=np.zeros(3)), r"log_ratio has the shape \[3\]"),
    "NaN at a loss token": (lambda: certify(log_ratio=np.full((2, 3), NAN)), "log_ratio holds NaN"),
    "infinite ratio": (lambda: certify(log_ratio=np.full((2, 3), -math.inf)), "log_ratio holds NaN or infinity"),
    "a KL in a certificate": (lambda: certify(divergence=np.full((2, 3), 1.2)), "to 1.2; a total variation"),
    "a negative divergence": (lambda: certify(divergence=np.full((2, 3), -0.2)), "from -0.2"),
    "rewards of others": (lambda: certify(rewards=[1, 2, 3]), r"rewards have the shape \[3\]"),
    "a reward NaN": (lambda: certify(rewards=[1, NAN]), "2 finite numbers"),
    "groups of others": (lambda: certify(groups=[0]), r"groups have the shape \[1\], expected \[2\]"),
}

FAILS_AN_ASSUMPTION: dict[str, tuple[Callable[[], object], str]] = {
    "falls too fast": (lambda: theory.theorem_1(4, 0.1, 0.1, weights=[1, 0.1, 1, 1]), "Theorem 1 needs .* 1 to 2"),
    "too flat": (lambda: theory.product_form(4, 0.1, 1.0, weights=[1, 0.9, 0.8, 0.7]), "product form needs .* 1 to 2"),
    "never binds": (lambda: theory.saturating(4, 0.1, 0.2), "delta_b = 0.2 is above delta = 0.1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert not isinstance(caught.value, AssumptionError), "nothing is wrong with the theorem's assumption"


@pytest.mark.parametrize("name", FAILS_AN_ASSUMPTION)
def test_assumptions(name: str) -> None:
    call, sentence = FAILS_AN_ASSUMPTION[name]
    with pytest.raises(AssumptionError, match=sentence):
        call()


def test_the_bad_inputs_above_are_one_change_from_good_ones() -> None:
    problem(), problem(eos=1), problem(reward_bound=3.0), certify(), certify(groups=["a", "b"], level=0.5)
    theory.mixture(problem(), [np.ones(1), np.zeros(2)])
    theory.residual_bound([0.1, 0.2], [0.1, 0.2])
    # rounding is no error
    theory.residual_bound([0.1, 0.2 * (1 + 1e-12)], [0.1, 0.2])
    assert theory.suffix_tv_bounds([0.5, 1 + 1e-12])[0][0] == 1
    certify(divergence=np.full((2, 3), 1 + 1e-9))


def test_too_many_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cppo.theory.tabular, "LARGEST", 7)
    with pytest.raises(ValueError, match="2 tokens and 2 positions give 4 responses, too many"):
        problem()


# ------------------------------------------------------------------------------------------------------ dependencies


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package's imports are absolute"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports(path: Path) -> None:
    """The standard library, numpy and itself."""
    allowed = {*sys.stdlib_module_names, "numpy"}
    foreign = {
        name for name in imports(path) if name.split(".")[0] not in allowed and not name.startswith("cppo.theory")
    }
    assert not foreign


def test_numpy_is_enough() -> None:
    """In a process where `import cppo`, which needs torch, is left out."""
    program = (
        "import sys, types\n"
        "package = types.ModuleType('cppo')\n"
        f"package.__path__ = [{str(PACKAGE.parent)!r}]\n"
        "sys.modules['cppo'] = package\n"
        "from cppo import theory\n"
        "print(theory.corollary_6(2, 0.5, 0.25), sorted({'torch', 'scipy', 'transformers'} & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "0.5 []\n"
