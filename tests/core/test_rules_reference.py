"""Every rule against the slow float64 loops: coefficient, reason, threshold, delta_b, budget used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cppo
from cppo import Reason

from . import reference
from .cases import CASES, NEEDS_DIVERGENCE, REFERENCE_CASES, Batch, Response, make, pack, pad, random_responses

MARGIN = 2e-5  # distance from a limit below which float32 may legitimately decide otherwise


def compare(batch: Batch, verdict: Any, wants: list[reference.Result], divergence_error: float = 0.0) -> None:
    """A verdict against the reference of each response; `divergence_error`: of a D_t in float32."""
    parts: dict[str, Any] = {key: batch.split(getattr(verdict, key)) for key in ("coefficient", "reason")}
    for name in ("divergence", "threshold", "capped"):
        value = getattr(verdict, name)
        parts[name] = None if value is None else batch.split(value.expand(verdict.reason.shape))
    for i, (response, want) in enumerate(zip(batch.responses, wants, strict=True)):
        inside = response.mask
        got = parts["coefficient"][i].double()
        torch.testing.assert_close(
            got, torch.tensor(want.coefficient, dtype=torch.float64), rtol=2e-5, atol=1e-30, msg=lambda m: f"c: {m}"
        )
        assert parts["reason"][i].tolist() == want.reason
        assert (got[~inside] == 0).all()
        if want.threshold is not None and parts["threshold"] is not None:
            threshold = torch.tensor(want.threshold, dtype=torch.float64)[inside]
            torch.testing.assert_close(parts["threshold"][i][inside].double(), threshold, rtol=2e-5, atol=1e-5)
        if parts["capped"] is not None:
            assert parts["capped"][i][inside].tolist() == torch.tensor(want.capped)[inside].tolist()
        for name in ("delta_b", "budget_used"):
            value, expected = getattr(verdict, name), getattr(want, name)
            if value is not None and inside.any():
                assert value.shape == (len(batch.responses),)
                # a sum of T divergences over a limit of at least 0.05
                error = 1e-6 + divergence_error * int(inside.sum()) / 0.05
                assert value[i].item() == pytest.approx(expected, rel=2e-5, abs=error)


@pytest.mark.parametrize("case", REFERENCE_CASES)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    scale=st.sampled_from([0.02, 0.2, 0.6]),
    holes=st.sampled_from([0.0, 0.3]),
    per_token=st.booleans(),
    given_divergence=st.booleans(),
)
def test_rule(
    case: str,
    seed: int,
    lengths: list[int],
    scale: float,
    holes: float,
    per_token: bool,
    given_divergence: bool,
) -> None:
    responses = random_responses(seed, lengths, scale, holes, per_token, given_divergence and case in NEEDS_DIVERGENCE)
    wants = [r.reference(case) for r in responses]
    assume(min(w.margin for w in wants) > MARGIN)
    for batch in (pad(responses, left=2, right=1), pack(responses)):
        # A KL near 0 is a difference of terms of order 1 (spec 5.5: the error is absolute, 1e-7).
        compare(batch, make(case)(batch.tokens), wants, divergence_error=1e-7 if case == "cppo kl" else 0.0)


@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_long_responses(case: str) -> None:
    """3000 tokens: errors of the prefix sums would show. Reasons must agree except where the margin is tiny."""
    responses = random_responses(11, [3000, 1700, 1], scale=0.05, holes=0.1)
    wants = [r.reference(case) for r in responses]
    for batch in (pad(responses), pack(responses)):
        verdict = make(case)(batch.tokens)
        for reasons, want in zip(batch.split(verdict.reason), wants, strict=True):
            differ = (reasons != torch.tensor(want.reason)).sum().item()
            assert differ <= 3


def test_every_reason_occurs() -> None:
    """The random batches do exercise each clause; otherwise the tests above would prove nothing."""
    seen: dict[str, set[int]] = {}
    responses = [r for s in range(20) for r in random_responses(s, [20, 7], 0.3, 0.2)]
    for case in REFERENCE_CASES:
        for r in responses:
            seen.setdefault(case, set()).update(r.reference(case).reason)
    K, T, L, P, S, R, C, out = Reason
    assert seen["none"] == {K, out}
    assert seen["ppo_clip"] == {K, T, R, out}
    assert seen["cispo"] == seen["minpro"] == {K, C, out}
    assert seen["dppo"] == {K, T, L, out}
    assert seen["trm_max"] == seen["trm_avg"] == seen["trm_max_avg"] == {K, S, out}
    assert seen["cppo adaptive"] == seen["cppo fixed"] == seen["cppo soft"] == {K, T, L, P, out}
    assert seen["cppo without budget"] == {K, T, L, out}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 25), min_size=1, max_size=4), st.integers(0, 5))
def test_shuffled_weights(seed: int, lengths: list[int], shuffle: int) -> None:
    """Given the shuffled weights (read off the thresholds of the rule without budget), the verdict is Algorithm 1's."""
    responses = random_responses(seed, lengths, 0.3, holes=0.2)
    parameters: dict[str, Any] = {
        "divergence": "binary_tv",
        "weights": "shuffled",
        "w_min": 0.5,
        "delta": 0.1,
        "seed": shuffle,
    }
    for batch in (pad(responses, left=1), pack(responses)):
        read: Any = cppo.CPPO(**parameters, prefix_budget=False)(batch.tokens)
        weights = [0.1 / x for x in batch.split(read.threshold.expand(read.reason.shape).double())]
        wants = []
        for r, w in zip(responses, weights, strict=True):
            count = int(r.mask.sum())
            linear = torch.tensor(reference.linear_weights(count, 0.5), dtype=torch.float64)
            torch.testing.assert_close(w[r.mask].sort(descending=True).values, linear, rtol=1e-5, atol=1e-6)
            wants.append(r.reference("cppo shuffled", weights=w[r.mask].tolist()))
        assume(min(w.margin for w in wants) > MARGIN)
        rule = cppo.CPPO(**parameters, budget="fixed", delta_b=0.03)
        compare(batch, rule(batch.tokens), wants)


def binary(policy: list[float], rollout: list[float], advantage: float) -> Response:
    """A response from probabilities."""
    p, m = torch.tensor(policy).log(), torch.tensor(rollout).log()
    return Response(p, m, torch.full((len(policy),), advantage), torch.ones(len(policy), dtype=torch.bool))


def test_sign_clause_does_not_underflow() -> None:
    """A = 1e-30 and rho = 1 + 1e-6 still move away: only the sign of the advantage enters a mask (spec row 7)."""
    r = binary([0.5], [0.5], 1e-30)
    r.policy = r.policy + 1e-6
    r.divergence = torch.tensor([0.5])
    for name in ("dppo", "cppo"):
        for scale in (1.0, 1e-30, 1e30):
            r.advantage = torch.tensor([1e-8 * scale])
            verdict = cppo.make_rule(name)(pack([r]).tokens)
            assert verdict.reason.tolist() == [Reason.TOKEN_LIMIT], (name, scale)


@pytest.mark.parametrize("case", NEEDS_DIVERGENCE)
def test_a_missing_divergence_is_refused(case: str) -> None:
    """Binary is never a silent fall-back of a rule that asks for the top-K or the exact divergence."""
    name, parameters = CASES[case]
    responses = random_responses(0, [5])
    for divergence in ("topk_tv", "topk_kl", "exact_tv", "exact_kl", "topk_tv_upper"):
        rule = cppo.make_rule(name, **{**parameters, "divergence": divergence})
        assert rule.divergence == divergence
        with pytest.raises(ValueError, match=r"divergence=.*binary_tv"):
            rule(pad(responses).tokens)
        with pytest.raises(ValueError, match=r"divergence=.*binary_tv"):
            rule(pack(responses).tokens)


@pytest.mark.parametrize("kind", ["binary_tv", "binary_kl"])
def test_the_divergence_reported_is_the_one_used(kind: str) -> None:
    responses = random_responses(4, [9, 4], holes=0.3)
    batch = pad(responses)
    for name in ("dppo", "cppo", "trm_max"):
        verdict: Any = cppo.make_rule(name, divergence=kind)(batch.tokens)
        for got, r in zip(batch.split(verdict.divergence), responses, strict=True):
            want = [
                reference.divergence(kind, [m, 1 - m], [p, 1 - p], 0)
                for p, m in zip(r.policy[r.mask].double().exp(), r.rollout[r.mask].double().exp(), strict=True)
            ]
            torch.testing.assert_close(got[r.mask], torch.tensor(want, dtype=torch.float32), rtol=1e-4, atol=1e-6)
            assert (got[~r.mask] == 0).all()


def test_a_given_divergence_is_taken_at_its_word() -> None:
    """Whatever the rule would have computed itself."""
    responses = random_responses(4, [9, 4], divergence=True, holes=0.3)
    batch = pack(responses)
    for divergence in ("topk_tv", "binary_tv", "binary_kl", "exact_kl"):
        verdict: Any = cppo.CPPO(divergence=divergence)(batch.tokens)
        mask = batch.tokens.mask
        assert torch.equal(verdict.divergence[mask], batch.tokens.divergence[mask])


def test_defaults_are_those_of_the_table() -> None:
    """the table of rules."""
    want: dict[str, dict[str, Any]] = {
        "none": {},
        "ppo_clip": {"eps_low": 0.2, "eps_high": 0.28, "dual_clip": None},
        "cispo": {"ratio_min": 0.0, "ratio_max": 1.2},
        "minpro": {"eps_low": 0.2, "eps_high": 0.28},
        "dppo": {"delta": 0.15, "divergence": "topk_tv", "ratio_cap": None},
        "trm_max": {"delta": 0.05, "divergence": "topk_kl"},
        "trm_avg": {"delta": 0.001, "divergence": "topk_kl"},
        "trm_max_avg": {"delta": 0.1, "delta_avg": 0.002, "divergence": "topk_kl"},
        "cppo": {
            "delta": 0.15,
            "delta_b": 0.02,
            "budget": "adaptive",
            "w_min": 0.8,
            "weights": "linear",
            "prefix_budget": True,
            "gate": None,
            "divergence": "topk_tv",
            "quantile": 0.9,
            "quantile_scale": 1.0,
            "budget_max": 2.0,
            "ratio_cap": None,
            "seed": 0,
        },
    }
    assert set(cppo.RULES) == set(want)
    for name, parameters in want.items():
        rule = cppo.make_rule(name)
        assert {key: getattr(rule, key) for key in parameters} == parameters
        assert rule.name == name and rule.source and type(rule).__doc__
        if not hasattr(parameters, "divergence") and name not in reference.NEEDS_DIVERGENCE:
            assert rule.divergence is None


@pytest.mark.parametrize(
    "name, parameters, named",
    [
        ("cpo", {}, "cppo"),
        ("ppo-clip", {}, "ppo_clip"),
        ("cppo", {"detla": 0.1}, "delta"),
        ("cppo", {"delta_B": 0.1}, "delta_b"),
        ("none", {"delta": 0.1}, "delta"),
        ("cppo", {"delta": 0}, "delta"),
        ("cppo", {"delta": -0.1}, "delta"),
        ("cppo", {"delta": math.nan}, "delta"),
        ("cppo", {"delta": "oops"}, "delta"),
        ("cppo", {"delta_b": -0.01}, "delta_b"),
        ("cppo", {"w_min": 0}, "w_min"),
        ("cppo", {"w_min": 1.5}, "w_min"),
        ("cppo", {"budget": "adaptiv"}, "adaptive"),
        ("cppo", {"weights": "linaer"}, "linear"),
        ("cppo", {"quantile": 1.5}, "quantile"),
        ("cppo", {"quantile_scale": -1}, "quantile_scale"),
        ("cppo", {"budget_max": 0.5}, "budget_max"),
        ("cppo", {"divergence": "top_tv"}, "topk_tv"),
        ("cppo", {"gate": "recipocal"}, "reciprocal"),
        ("cppo", {"ratio_cap": 0}, "ratio_cap"),
        ("dppo", {"delta": 0}, "delta"),
        ("dppo", {"divergence": "tv"}, "divergence"),
        ("ppo_clip", {"eps_low": 0}, "eps_low"),
        ("ppo_clip", {"eps_low": 1.0}, "eps_low"),
        ("ppo_clip", {"eps_high": -1}, "eps_high"),
        ("ppo_clip", {"dual_clip": 0.9}, "dual_clip"),
        ("cispo", {"ratio_min": 2.0}, "ratio_min"),
        ("cispo", {"ratio_min": -1.0}, "ratio_min"),
        ("cispo", {"ratio_max": 0}, "ratio_max"),
        ("minpro", {"eps_low": 1.0}, "eps_low"),
        ("trm_max", {"delta": 0}, "delta"),
        ("trm_avg", {"delta": -1}, "delta"),
        ("trm_max_avg", {"delta_avg": 0}, "delta_avg"),
    ],
)
def test_bad_parameters_get_a_sentence(name: str, parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        cppo.make_rule(name, **parameters)
    assert str(error.value).rstrip()[-1] in ".?"


def test_rules_are_frozen_and_comparable() -> None:
    assert cppo.make_rule("cppo", delta=0.1) == cppo.CPPO(delta=0.1)
    with pytest.raises(AttributeError):
        cppo.CPPO().delta = 0.2  # type: ignore[misc]


@pytest.mark.parametrize(
    "gate, why",
    [
        (lambda x: torch.ones_like(x), "1/x"),
        (lambda x: x.clamp(min=1) ** -0.5, "1/x"),
        (lambda x: torch.where(x <= 1, 0.9, 0.0), "not 1"),
        (lambda x: torch.where((x <= 1) | (x > 5), 1 / x.clamp(min=1), 0.0), "increases"),
        (lambda x: torch.where(x <= 1, 1.0, -1 / x), "negative"),
        (lambda x: torch.where(x <= 1, 1.0, torch.nan), "finite"),
        (lambda x: 4 * torch.sigmoid(x.clamp(min=1) - 1) * (1 - torch.sigmoid(x.clamp(min=1) - 1)), "1/x"),
    ],
    ids=["constant", "square root", "below one", "up again", "negative", "nan", "sapo alone"],
)
def test_inadmissible_gates_are_refused(gate: Any, why: str) -> None:
    with pytest.raises(ValueError, match="admissible") as error:
        cppo.CPPO(gate=gate)
    assert why in str(error.value)


def test_a_gate_of_ones_own() -> None:
    """g(x) = 1/x^2 beyond 1; and the hard mask as a gate gives the hard coefficients."""
    responses = random_responses(8, [30, 12], 0.3, holes=0.2)
    batch = pad(responses)
    square = cppo.CPPO(divergence="binary_tv", gate=lambda x: x.clamp(min=1) ** -2)(batch.tokens)
    wants = [r.reference("cppo adaptive", gate=lambda x: max(x, 1.0) ** -2) for r in responses]
    compare(batch, square, wants)
    hard = cppo.CPPO(divergence="binary_tv")(batch.tokens)
    step = cppo.CPPO(divergence="binary_tv", gate=lambda x: (x <= 1).to(x.dtype))(batch.tokens)
    assert torch.equal(hard.coefficient, step.coefficient)
