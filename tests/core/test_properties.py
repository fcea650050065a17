"""What must hold for every batch: invariances of the layout, reductions, monotonicity, symmetry, causality."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cppo
from cppo import Reason

from . import reference
from .cases import (
    CASES,
    GARBAGE,
    NEEDS_DIVERGENCE,
    REFERENCE_CASES,
    Batch,
    Response,
    gradient,
    make,
    pack,
    pad,
    random_responses,
)

MARGIN = 2e-5
shapes = st.lists(st.integers(1, 20), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)
scales = st.sampled_from([0.05, 0.3, 0.6])
few = settings(max_examples=12, deadline=None)
every_case = pytest.mark.parametrize("case", CASES)


def clear_of_ties(case: str, responses: list[Response]) -> bool:
    if case == "cppo shuffled":  # its limits are not known here: judge by those of all weights between w_min and 1
        d = [
            d
            for r in responses
            for d in (r.policy[r.mask].double().exp() - r.rollout[r.mask].double().exp()).abs().tolist()
        ]
        return all(abs(x - 0.1) > MARGIN for x in d)
    return min(r.reference(case).margin for r in responses) > MARGIN


def same(a: Any, b: Any, x: Batch, y: Batch, exact: bool = False) -> None:
    """Two verdicts agree response by response, within float32 rounding of the prefix sums (reasons: exactly)."""
    for mine, theirs in zip(x.split(a.reason), y.split(b.reason), strict=True):
        assert mine.tolist() == theirs.tolist()
    for mine, theirs in zip(x.split(a.coefficient), y.split(b.coefficient), strict=True):
        assert torch.equal(mine, theirs) if exact else torch.allclose(mine, theirs, rtol=1e-5, atol=0)
    for name in ("delta_b", "budget_used"):
        mine, theirs = getattr(a, name), getattr(b, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- layouts


@every_case
@few
@given(seed=seeds, lengths=shapes, scale=scales, holes=st.sampled_from([0.0, 0.3]))
def test_padding_packing_prompt_and_split(case: str, seed: int, lengths: list[int], scale: float, holes: float) -> None:
    """Padded = more padded = behind a prompt = packed = packed in reverse = one response at a time."""
    responses = random_responses(seed, lengths, scale, holes, token_advantages=seed % 2 == 0)
    for r in responses:
        r.mask[0] = True  # an empty response has a test of its own
        r.policy[0], r.rollout[0] = -1.0, -1.1
    assume(clear_of_ties(case, responses))
    rule = make(case)
    plain = pad(responses)
    want = rule(plain.tokens)
    for other in (pad(responses, right=7), pad(responses, left=5, right=2, garbage=math.nan), pack(responses)):
        same(want, rule(other.tokens), plain, other)
    backwards = pack(responses[::-1])
    verdict = rule(backwards.tokens)
    for got, wanted in zip(backwards.split(verdict.reason)[::-1], plain.split(want.reason), strict=True):
        assert got.tolist() == wanted.tolist()
    for i, r in enumerate(responses):
        for alone in (pad([r]), pack([r])):
            verdict = rule(alone.tokens)
            assert alone.split(verdict.reason)[0].tolist() == plain.split(want.reason)[i].tolist()
            torch.testing.assert_close(
                alone.split(verdict.coefficient)[0], plain.split(want.coefficient)[i], rtol=1e-5, atol=0
            )


@every_case
@few
@given(seed=seeds, lengths=shapes, scale=scales)
def test_deleting_masked_tokens_changes_nothing(case: str, seed: int, lengths: list[int], scale: float) -> None:
    """Tool output in the middle of a response: the same verdict as without those columns."""
    responses = random_responses(seed, lengths, scale, holes=0.4, token_advantages=True)
    for r in responses:
        r.mask[0] = True
        r.policy[0], r.rollout[0] = -1.0, -1.1
    assume(clear_of_ties(case, responses))
    deleted = [r.columns(r.mask) for r in responses]
    rule = make(case)
    for lay in (pad, pack):
        whole, less = lay(responses), lay(deleted)
        a, b = rule(whole.tokens), rule(less.tokens)
        for r, mine, theirs in zip(responses, whole.split(a.reason), less.split(b.reason), strict=True):
            assert mine[r.mask].tolist() == theirs.tolist()
            assert (mine[~r.mask] == Reason.OUTSIDE).all()
        for r, mine, theirs in zip(responses, whole.split(a.coefficient), less.split(b.coefficient), strict=True):
            torch.testing.assert_close(mine[r.mask], theirs, rtol=1e-5, atol=0)
        for name in ("delta_b", "budget_used"):
            if getattr(a, name) is not None:
                torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-6)


@every_case
@pytest.mark.parametrize("lay", [pad, pack])
def test_what_the_mask_leaves_out_may_hold_anything(case: str, lay: Any) -> None:
    """NaN, infinities, absurd numbers outside the mask: loss and gradient are the same bit for bit, and 0 there."""
    rule = make(case)
    for seed in range(3):
        responses = random_responses(seed, [17, 9, 4], 0.4, 0.4, True, divergence=case in NEEDS_DIVERGENCE)
        results = []
        for fill in (-1.0, *GARBAGE):
            for r in responses:
                for values in (r.policy, r.rollout, r.advantage, r.divergence):
                    if values is not None:
                        values[~r.mask] = fill
            batch = lay(responses, grad=True)
            loss, grad, verdict = gradient(batch, rule)
            outside = ~batch.tokens.mask
            assert loss.isfinite().all() and grad.isfinite().all(), fill
            assert (loss[outside] == 0).all() and (grad[outside] == 0).all()
            assert (verdict.coefficient[outside] == 0).all() and (verdict.reason[outside] == Reason.OUTSIDE).all()
            stats = cppo.metrics(batch.tokens, verdict)
            results.append((loss, grad, verdict.reason, stats))
        for loss, grad, reason, stats in results[1:]:
            assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])
            assert torch.equal(reason, results[0][2])
            assert stats == results[0][3]


@every_case
def test_huge_log_ratios_under_the_mask(case: str) -> None:
    """log-ratios of +-95 (and beyond what e^20 allows) at loss tokens: no NaN, no infinity."""
    name, _ = CASES[case]
    for given_divergence, sign in itertools.product((False, True), (1.0, -1.0, 0.0)):
        policy = torch.tensor([-96.0, -1.0, -0.01, -96.0, -500.0, -0.5, 0.0, -1e-6])
        rollout = torch.tensor([-1.0, -96.0, -95.01, -1.0, -0.3, -500.0, -95.0, 0.0])
        d = torch.full((8,), 0.01) if given_divergence and name in reference.NEEDS_DIVERGENCE else None
        response = Response(policy, rollout, torch.full((8,), sign), torch.ones(8, dtype=torch.bool), d)
        for batch in (pad([response, response], right=1, garbage=math.nan, grad=True), pack([response], grad=True)):
            loss, grad, verdict = gradient(batch, make(case))
            assert loss.isfinite().all() and grad.isfinite().all()
            for value in (verdict.coefficient, verdict.divergence, verdict.delta_b, verdict.budget_used):
                assert value is None or value.isfinite().all()
            assert all(math.isfinite(x) for x in cppo.metrics(batch.tokens, verdict).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_case
def test_half_precision_inputs_are_computed_in_float32(case: str, dtype: torch.dtype) -> None:
    responses = random_responses(3, [40, 11], 0.3, 0.2)
    wide = [Response(r.policy.to(dtype).float(), r.rollout.to(dtype).float(), r.advantage, r.mask) for r in responses]
    for lay in (pad, pack):
        a, b = lay(responses, dtype=dtype, grad=True), lay(wide, grad=True)
        loss, grad, verdict = gradient(a, make(case))
        want_loss, want_grad, want = gradient(b, make(case))
        assert loss.dtype == verdict.coefficient.dtype == torch.float32 and grad.dtype == dtype
        assert torch.equal(verdict.reason, want.reason)
        assert torch.equal(verdict.coefficient, want.coefficient)
        assert torch.equal(loss, want_loss)
        assert torch.equal(grad, want_grad.to(dtype))


@every_case
def test_empty_responses(case: str) -> None:
    """A response without any loss token: nothing kept, no NaN, and its neighbours do not notice (spec row 28)."""
    responses = random_responses(5, [6, 4, 9, 3], 0.3)
    responses[1].mask[:] = False
    responses[3].mask[:] = False
    full = [responses[0], responses[2]]
    rule = make(case)
    for lay in (pad, pack):
        batch, others = lay(responses, grad=True), lay(full, grad=True)
        loss, grad, verdict = gradient(batch, rule)
        want = rule(others.tokens)
        assert loss.isfinite().all() and grad.isfinite().all()
        reasons, coefficients = batch.split(verdict.reason), batch.split(verdict.coefficient)
        for i in (1, 3):
            assert (reasons[i] == Reason.OUTSIDE).all() and (coefficients[i] == 0).all()
        for i, j in ((0, 0), (2, 1)):
            assert reasons[i].tolist() == others.split(want.reason)[j].tolist()
        for value in (verdict.delta_b, verdict.budget_used):
            assert value is None or value.isfinite().all()
        assert all(math.isfinite(x) for x in cppo.metrics(batch.tokens, verdict).values())


def test_sequences_of_length_zero_in_a_pack() -> None:
    """cu_seqlens with equal boundaries, in front, in between and behind."""
    a, b = random_responses(6, [5, 7], 0.3)
    policy, rollout = torch.cat([a.policy, b.policy]), torch.cat([a.rollout, b.rollout])
    advantages = torch.stack([a.advantage[0], b.advantage[0]])
    dense = pack([a, b])
    cu = torch.tensor([0, 0, 5, 5, 12, 12, 12], dtype=torch.int32)
    per_sequence = torch.tensor([9.0, advantages[0], 9.0, advantages[1], 9.0, 9.0])
    tokens = cppo.TokenBatch(policy, rollout, per_sequence, torch.ones(12, dtype=torch.bool), cu_seqlens=cu)
    assert tokens.check() is tokens
    for case in CASES:
        rule = make(case)
        want, got = rule(dense.tokens), rule(tokens)
        assert torch.equal(want.reason, got.reason)
        torch.testing.assert_close(want.coefficient, got.coefficient)
        for name in ("delta_b", "budget_used"):
            if getattr(got, name) is not None:
                assert getattr(got, name).shape == (6,)
                torch.testing.assert_close(getattr(got, name)[[1, 3]], getattr(want, name))
        x, y = cppo.metrics(dense.tokens, want), cppo.metrics(tokens, got)
        assert x.keys() == y.keys()
        for key in x:
            assert x[key] == pytest.approx(y[key], rel=1e-6, abs=1e-9), key


@every_case
@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (0,)])
def test_batches_without_any_token(case: str, shape: tuple[int, ...]) -> None:
    """A process whose share of a micro-batch is empty: empty results, as of any other operation."""
    cu = torch.zeros(3, dtype=torch.int32) if len(shape) == 1 else None
    advantages = torch.zeros(2 if cu is not None else shape[0])
    batch = cppo.TokenBatch(torch.zeros(shape), torch.zeros(shape), advantages, torch.zeros(shape), cu_seqlens=cu)
    verdict = make(case)(batch.check())
    assert (
        cppo.token_loss(batch, verdict.coefficient).shape == verdict.coefficient.shape == verdict.reason.shape == shape
    )
    assert all(math.isfinite(value) for value in cppo.metrics(batch, verdict).values())


# --------------------------------------------------------------------------------------------------- relations of rules


@few
@given(seed=seeds, lengths=shapes, scale=scales, delta_b=st.sampled_from([1.0, 1.5]))
def test_cppo_reduces_to_dppo(seed: int, lengths: list[int], scale: float, delta_b: float) -> None:
    """w_min = 1 and delta_b >= 1: the prefix clause is slack since D <= 1. So it is without weights and budget."""
    responses = random_responses(seed, lengths, scale, holes=0.2)
    assume(clear_of_ties("dppo", responses))
    for lay in (pad, pack):
        batch = lay(responses)
        want = cppo.DPPO(delta=0.1, divergence="binary_tv")(batch.tokens)
        variants: list[dict[str, Any]] = [
            {"w_min": 1.0, "budget": "fixed", "delta_b": delta_b},
            {"weights": "none", "budget": "fixed", "delta_b": delta_b},
            {"weights": "none", "budget": "adaptive", "delta_b": delta_b},
            {"weights": "none", "prefix_budget": False},
        ]
        for parameters in variants:
            got = cppo.CPPO(delta=0.1, divergence="binary_tv", **parameters)(batch.tokens)
            assert torch.equal(got.reason, want.reason)
            assert torch.equal(got.coefficient, want.coefficient)


@few
@given(seed=seeds, lengths=shapes, scale=scales)
def test_trm_max_is_cppos_token_test_on_sequences(seed: int, lengths: list[int], scale: float) -> None:
    """A response is rejected whole iff CPPO without weights and budget finds any token infeasible, towards or not."""
    responses = random_responses(seed, lengths, scale, holes=0.2)
    assume(clear_of_ties("dppo", responses))
    for lay in (pad, pack):
        batch = lay(responses)
        trm = cppo.TRMMax(delta=0.1, divergence="binary_tv")(batch.tokens)
        token: Any = cppo.CPPO(delta=0.1, divergence="binary_tv", weights="none", prefix_budget=False)(batch.tokens)
        infeasible = token.divergence > token.threshold.expand_as(token.divergence)
        exceeded = (token.reason == Reason.TOWARDS) | (token.reason == Reason.TOKEN_LIMIT)
        assert torch.equal(infeasible & batch.tokens.mask, exceeded)
        for reasons, bad in zip(batch.split(trm.reason), batch.split(exceeded), strict=True):
            inside = reasons[reasons != Reason.OUTSIDE]
            assert (inside == (Reason.SEQUENCE_LIMIT if bad.any() else Reason.KEPT)).all()


@pytest.mark.parametrize("case", NEEDS_DIVERGENCE)
@few
@given(seed=seeds, lengths=shapes, scale=scales)
def test_threshold_is_the_largest_divergence_kept(case: str, seed: int, lengths: list[int], scale: float) -> None:
    """A token is within its limits iff D_t <= threshold_t (moves towards mu are kept beyond it)."""
    responses = random_responses(seed, lengths, scale, holes=0.2)
    assume(clear_of_ties(case, responses))
    for lay in (pad, pack):
        batch = lay(responses)
        mask = batch.tokens.mask
        verdict = make(case)(batch.tokens)
        threshold = verdict.threshold.expand_as(verdict.divergence)
        gap = (verdict.divergence - threshold)[mask]
        assume(bool((gap.abs() > MARGIN).all()))
        within = gap <= 0
        if case.startswith("trm"):
            for r, ok, kept in zip(
                responses, batch.split(verdict.divergence <= threshold), batch.split(verdict.reason), strict=True
            ):
                assert not r.mask.any() or bool(ok[r.mask].all()) == bool((kept[r.mask] == Reason.KEPT).all())
        else:
            assert torch.equal(within, verdict.reason[mask] == Reason.KEPT)
            dropped = verdict.coefficient[mask] == 0
            if "soft" not in case:
                moves = (batch.tokens.token_advantages().sign() * batch.tokens.log_ratio() > 0).expand_as(mask)[mask]
                assert torch.equal(dropped, ~within & moves)


@few
@given(seed=seeds, lengths=shapes, scale=scales, factor=st.floats(1.05, 4))
def test_monotone_in_delta_and_delta_b(seed: int, lengths: list[int], scale: float, factor: float) -> None:
    """Raising either limit never drops a token that was kept."""
    responses = random_responses(seed, lengths, scale, holes=0.2)
    batch = pad(responses)
    for budget in ("fixed", "adaptive"):
        for weights in ("linear", "none", "shuffled"):
            parameters: dict[str, Any] = {"budget": budget, "weights": weights, "divergence": "binary_tv"}
            kept = cppo.CPPO(delta=0.08, delta_b=0.01, **parameters)(batch.tokens).coefficient > 0
            raised: list[dict[str, Any]] = [
                {"delta": 0.08 * factor, "delta_b": 0.01},
                {"delta": 0.08, "delta_b": 0.01 * factor},
            ]
            for more in raised:
                wider = cppo.CPPO(**more, **parameters)(batch.tokens).coefficient > 0
                assert not (kept & ~wider).any()
    kept = cppo.DPPO(delta=0.08, divergence="binary_tv")(batch.tokens).coefficient > 0
    assert not (kept & ~(cppo.DPPO(delta=0.08 * factor, divergence="binary_tv")(batch.tokens).coefficient > 0)).any()


def test_thresholds_of_trm() -> None:
    """A response is kept iff all its tokens are within theirs: what the others leave of T delta, and the maximum."""
    rows = [[0.01, 0.03, 0.02, 9.0], [0.01, 0.03, 0.05, 9.0], [0.0, 0.06, 0.0, 9.0]]  # the last column is masked out
    mask = torch.tensor([[True, True, True, False]]).expand(3, 4)
    logp = torch.zeros(3, 4)
    batch = cppo.TokenBatch(logp, logp, torch.ones(3), mask, divergence=torch.tensor(rows))
    for rule, kept, threshold in (
        (cppo.TRMAvg(delta=0.025), [True, False, True], [0.025, 0.045, 0.035]),
        (cppo.TRMMaxAvg(delta=0.04, delta_avg=0.025), [True, False, False], [0.025, 0.04, 0.035]),
        (cppo.TRMMax(delta=0.055), [True, True, False], [0.055, 0.055, 0.055]),
    ):
        verdict: Any = rule(batch)
        within = verdict.divergence <= verdict.threshold.expand_as(mask)
        assert (within | ~mask).all(1).tolist() == (verdict.coefficient[:, 0] > 0).tolist() == kept
        torch.testing.assert_close(verdict.threshold.expand_as(mask)[0, :3], torch.tensor(threshold))


@few
@given(seed=seeds, lengths=shapes, scale=scales, gate=st.sampled_from(["reciprocal", "sapo"]))
def test_soft_gate_is_between_hard_and_none(seed: int, lengths: list[int], scale: float, gate: str) -> None:
    """hard <= soft <= 1; equal where the token is kept; g(x) w D <= delta and g(x) S <= its allowance."""
    responses = random_responses(seed, lengths, scale, holes=0.2)
    assume(clear_of_ties("cppo soft", responses))
    batch = pack(responses)
    hard = cppo.CPPO(divergence="binary_tv", delta_b=0.01)(batch.tokens)
    soft = cppo.CPPO(divergence="binary_tv", delta_b=0.01, gate=gate)(batch.tokens)
    free = cppo.NoTrustRegion()(batch.tokens).coefficient
    assert (hard.coefficient <= soft.coefficient).all() and (soft.coefficient <= free).all()
    assert torch.equal(hard.reason == Reason.KEPT, soft.reason == Reason.KEPT)
    assert torch.equal(hard.reason == Reason.TOWARDS, soft.reason == Reason.TOWARDS)
    kept = (hard.reason == Reason.KEPT) | (hard.reason == Reason.TOWARDS)
    assert torch.equal(hard.coefficient[kept], soft.coefficient[kept])
    reduced = ~kept & batch.tokens.mask
    assert (soft.coefficient[reduced] > 0).all() and (soft.coefficient[reduced] < free[reduced]).all()
    weight = soft.coefficient[reduced] / free[reduced]
    wants = [r.reference("cppo soft") for r in responses]
    x = torch.tensor([v for w, r in zip(wants, responses, strict=True) for v in (w.exceed or [])])[reduced]
    assert (weight * x <= 1 + 1e-5).all()


# ------------------------------------------------------------------------------------------------- signs and the anchor


@pytest.mark.parametrize("case", ["dppo", "cppo fixed", "cppo adaptive", "ppo_clip symmetric"])
@few
@given(seed=seeds, lengths=shapes, scale=scales)
def test_signs(case: str, seed: int, lengths: list[int], scale: float) -> None:
    """(A, rho) -> (-A, 1/rho) leaves the towards set as it is; A -> -A complements it."""
    responses = random_responses(seed, lengths, scale, divergence=case in NEEDS_DIVERGENCE)
    swapped = [Response(r.rollout, r.policy, -r.advantage, r.mask, r.divergence) for r in responses]
    negated = [Response(r.policy, r.rollout, -r.advantage, r.mask, r.divergence) for r in responses]
    assume(clear_of_ties(case, responses))
    assume(all((r.policy != r.rollout).all() and (r.advantage != 0).all() for r in responses))
    rule = make(case)
    plain = pad(responses)
    a = rule(plain.tokens)
    mask = plain.tokens.mask
    if case in NEEDS_DIVERGENCE:  # D is symmetric here since it is given
        b = rule(pad(swapped).tokens)
        assert torch.equal(a.reason, b.reason)
    c = rule(pad(negated).tokens)
    limited = (a.reason != Reason.KEPT) & mask
    assert torch.equal(limited, (c.reason != Reason.KEPT) & mask)
    assert torch.equal((a.reason == Reason.TOWARDS)[limited], (c.reason != Reason.TOWARDS)[limited])


@every_case
@few
@given(seed=seeds, lengths=shapes, scale=scales)
def test_zero_advantage_keeps_all(case: str, seed: int, lengths: list[int], scale: float) -> None:
    """A = 0 counts as towards. TRM alone rejects, as it asks for no sign."""
    responses = random_responses(seed, lengths, scale)
    for r in responses:
        r.advantage = torch.zeros_like(r.advantage)
    batch = pad(responses, grad=True)
    loss, grad, verdict = gradient(batch, make(case))
    assert (loss == 0).all() and (grad == 0).all()
    if not case.startswith("trm"):
        assert (verdict.coefficient[batch.tokens.mask] > 0).all()
    if case.startswith(("dppo", "cppo", "ppo")):
        assert set(verdict.reason[batch.tokens.mask].tolist()) <= {Reason.KEPT, Reason.TOWARDS}


@every_case
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 7.0, 1e20])
def test_only_the_sign_of_the_advantage_enters(case: str, scale: float) -> None:
    responses = random_responses(12, [30, 14], 0.3, 0.2)
    scaled = [Response(r.policy, r.rollout, r.advantage * scale, r.mask) for r in responses]
    a, b = make(case)(pad(responses).tokens), make(case)(pad(scaled).tokens)
    assert torch.equal(a.reason, b.reason) and torch.equal(a.coefficient, b.coefficient)


@every_case
def test_on_policy_keeps_everything(case: str) -> None:
    """pi = mu: D = 0, every token kept with coefficient 1."""
    responses = random_responses(2, [20, 5, 1], 0.0, holes=0.2)
    for lay in (pad, pack):
        batch = lay(responses)
        verdict = make(case)(batch.tokens)
        mask = batch.tokens.mask
        assert (verdict.reason[mask] == Reason.KEPT).all()
        assert (verdict.coefficient[mask] == 1).all()
        assert verdict.divergence is None or (verdict.divergence.abs() < 1e-7).all()


@few
@given(seed=seeds, length=st.integers(2, 25), scale=scales, at=st.floats(0, 1))
def test_fixed_budget_is_causal(seed: int, length: int, scale: float, at: float) -> None:
    """With a fixed budget and T, what comes after t changes nothing at t; the adaptive budget sees all of it."""
    (response,) = random_responses(seed, [length], scale)
    cut = 1 + int(at * (length - 2))
    (other,) = random_responses(seed + 1, [length], 0.9)
    changed = Response(response.policy.clone(), response.rollout.clone(), response.advantage, response.mask)
    changed.policy[cut:], changed.rollout[cut:] = other.policy[cut:], other.rollout[cut:]
    for case in ("cppo fixed", "cppo fixed w_min .6", "cppo without budget", "dppo", "minpro", "cppo soft"):
        parameters = {"budget": "fixed"} if case == "cppo soft" else {}
        name, given_parameters = CASES[case]
        if name == "minpro":
            rule = make(case)
        else:
            rule = cppo.make_rule(name, **{"divergence": "binary_tv", **given_parameters, **parameters})
        for lay in (pad, pack):
            a, b = rule(lay([response]).tokens), rule(lay([changed]).tokens)
            assert torch.equal(a.reason.flatten()[:cut], b.reason.flatten()[:cut])
            assert torch.equal(a.coefficient.flatten()[:cut], b.coefficient.flatten()[:cut])


def test_reference_cases_cover_all_cases() -> None:
    assert set(REFERENCE_CASES) | {"cppo shuffled"} == set(CASES)
    assert {name for name, _ in CASES.values()} == set(cppo.RULES)
