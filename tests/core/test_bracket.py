"""`TrustRegion.bracket`: when D_t is known to lie in an interval, every verdict lies between two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cppo
from cppo import TokenBatch
from cppo.rules.base import TrustRegion

from .cases import CASES, GARBAGE, NEEDS_DIVERGENCE, make, pack, pad, random_responses

shapes = st.lists(st.integers(1, 25), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)
some = settings(max_examples=8, deadline=None)
both_layouts = pytest.mark.parametrize("lay", [pad, pack])


def budget_grows(case: str) -> bool:
    """Whether a larger D_s can help: CPPO's adaptive budget."""
    rule = make(case)
    return isinstance(rule, cppo.CPPO) and rule.budget == "adaptive" and rule.prefix_budget


def drawn(seed: int, lengths: list[int], lay: Any) -> tuple[TokenBatch, torch.Generator]:
    """A batch in float64, so that rounding makes no ties, without divergence; garbage outside the mask."""
    responses = random_responses(seed, lengths, 0.3, holes=0.2, token_advantages=seed % 2 == 0)
    return lay(responses, dtype=torch.float64).tokens, torch.Generator().manual_seed(seed)


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=torch.float64)


def interval(batch: TokenBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random ends; most intervals are narrow, some are points, some are wide. Outside the mask anything."""
    lower = 0.2 * uniform(batch.policy_logp, generator).pow(2)
    width = 0.2 * uniform(batch.policy_logp, generator).pow(6)
    width = torch.where(uniform(width, generator) < 0.3, 0, width)
    garbage = torch.tensor(GARBAGE).double()[torch.randint(len(GARBAGE), lower.shape, generator=generator)]
    return torch.where(batch.loss_mask, lower, garbage), torch.where(batch.loss_mask, lower + width, garbage)


@pytest.mark.parametrize("case", CASES)
@both_layouts
@some
@given(seed=seeds, lengths=shapes)
def test_every_divergence_of_the_box_is_between_the_ends(case: str, lay: Any, seed: int, lengths: list[int]) -> None:
    batch, generator = drawn(seed, lengths, lay)
    rule: Any = make(case)
    lower, upper = interval(batch, generator)
    permissive, strict = rule.bracket(batch, lower, upper)
    outside = ~batch.loss_mask
    assert not strict.coefficient[outside].any() and not permissive.coefficient[outside].any()
    shares = [uniform(lower, generator) for _ in range(3)]  # anywhere; each token at one of its ends; all at one end
    shares += [(share < at).double() for share, at in zip(shares, (0.1, 0.5, 0.9), strict=True)]
    shares += [torch.zeros_like(lower), torch.ones_like(lower)]
    for share in shares:
        verdict = rule(batch.with_divergence(torch.lerp(lower, upper, share)))
        assert (strict.coefficient <= verdict.coefficient * (1 + 1e-9)).all()
        assert (verdict.coefficient <= permissive.coefficient * (1 + 1e-9)).all()
        if verdict.delta_b is not None:
            assert (strict.delta_b <= verdict.delta_b + 1e-12).all()
            assert (verdict.delta_b <= permissive.delta_b + 1e-12).all()


@pytest.mark.parametrize("case", [c for c in CASES if not budget_grows(c)])
@both_layouts
@some
@given(seed=seeds, lengths=shapes)
def test_no_coefficient_increases_with_any_divergence(case: str, lay: Any, seed: int, lengths: list[int]) -> None:
    """What makes the default bracket right. One token's D alone, or all of them, rises: no coefficient does."""
    batch, generator = drawn(seed, lengths, lay)
    rule: Any = make(case)
    lower, upper = interval(batch, generator)
    before = rule(batch.with_divergence(lower)).coefficient
    one = torch.zeros(lower.numel(), dtype=torch.bool)
    one[seed % lower.numel()] = True
    for raised in (torch.where(one.view_as(lower), upper, lower), upper):
        assert (rule(batch.with_divergence(raised)).coefficient <= before * (1 + 1e-9)).all()


def test_every_rule_is_tried_and_knows_its_own_bracket() -> None:
    assert {name for name, _ in CASES.values()} == set(cppo.RULES)
    own = {type(make(case)).bracket is not TrustRegion.bracket for case in CASES if budget_grows(case)}
    assert own == {True}


def test_the_adaptive_budget_needs_a_bracket_of_its_own() -> None:
    """A larger D at the end of a response raises its P90, and with it the budget of an earlier token."""
    count = 20
    policy, rollout = torch.full((1, count), -0.9), torch.full((1, count), -1.0)
    batch = TokenBatch(policy, rollout, torch.ones(1), torch.ones(1, count, dtype=torch.bool))
    lower = torch.full((1, count), 0.05)
    upper = lower.clone()
    upper[:, -4:] = 0.12
    rule = cppo.CPPO(delta=0.15, delta_b=0.02, quantile_scale=0.5, w_min=1.0, divergence="exact_tv")
    low, high = (rule(batch.with_divergence(d)).coefficient[0] for d in (lower, upper))
    assert low[:12].tolist() != high[:12].tolist() and (low <= high)[:12].all()  # not monotone
    permissive, strict = rule.bracket(batch, lower, upper)
    for middle in (low, high):
        assert (strict.coefficient[0] <= middle).all() and (middle <= permissive.coefficient[0]).all()
    assert (strict.coefficient[0] < high)[:12].any()
    assert strict.delta_b is not None and permissive.delta_b is not None
    assert strict.delta_b.item() < permissive.delta_b.item()


@pytest.mark.parametrize("case", CASES)
@both_layouts
def test_equal_ends_are_the_verdict(case: str, lay: Any) -> None:
    batch, generator = drawn(3, [30, 12, 1], lay)
    rule: Any = make(case)
    d, _ = interval(batch, generator)
    verdict = rule(batch.with_divergence(d))
    for end in rule.bracket(batch, d, d):
        assert torch.equal(end.coefficient, verdict.coefficient) and torch.equal(end.reason, verdict.reason)
        assert not end.coefficient.requires_grad


def test_the_divergence_of_the_batch_is_not_looked_at() -> None:
    batch, generator = drawn(4, [20, 9], pad)
    lower, upper = interval(batch, generator)
    for rule in (cppo.CPPO(), cppo.TRMAvg(delta=0.03), cppo.DPPO()):
        for end, other in zip(
            rule.bracket(batch, lower, upper),
            rule.bracket(batch.with_divergence(torch.ones_like(lower)), lower, upper),
            strict=True,
        ):
            assert torch.equal(end.coefficient, other.coefficient)


@pytest.mark.parametrize("case", NEEDS_DIVERGENCE)
def test_ends_of_another_shape_are_refused(case: str) -> None:
    batch, generator = drawn(5, [8, 8], pad)
    lower, upper = interval(batch, generator)
    with pytest.raises(ValueError, match="shape"):
        make(case).bracket(batch, lower[:, :-1], upper)
    with pytest.raises(ValueError, match="shape"):
        make(case).bracket(batch, lower, upper[:1])


@pytest.mark.parametrize("case", [c for c in CASES if budget_grows(c)])
@both_layouts
@some
@given(seed=seeds, lengths=shapes)
def test_the_pivotal_tokens_fix_the_budget(case: str, lay: Any, seed: int, lengths: list[int]) -> None:
    """`pivotal`: with D_t of those known, the adaptive budget is, too."""
    batch, generator = drawn(seed, lengths, lay)
    rule: Any = make(case)
    lower, upper = interval(batch, generator)
    pivotal = rule.pivotal(batch, lower, upper)
    assert pivotal.dtype == torch.bool and not pivotal[~batch.loss_mask].any()
    truth = torch.lerp(lower, upper, uniform(lower, generator))
    permissive, strict = rule.bracket(batch, torch.where(pivotal, truth, lower), torch.where(pivotal, truth, upper))
    torch.testing.assert_close(permissive.delta_b, strict.delta_b, rtol=0, atol=1e-12)


def test_few_tokens_are_pivotal() -> None:
    """Narrow intervals: those near the ninetieth percentile of a long response, and none where the clamp decides."""
    batch, generator = drawn(8, [500], pad)
    lower = 0.05 * uniform(batch.policy_logp, generator)
    rule = cppo.CPPO(delta_b=0.03)
    pivotal = rule.pivotal(batch, lower, lower + 1e-3)
    assert pivotal is not None and 0 < pivotal.sum().item() < 50
    for clamped in (cppo.CPPO(delta_b=0.01), cppo.CPPO(delta_b=0.1)):
        pivotal = clamped.pivotal(batch, lower, lower + 1e-3)
        assert pivotal is not None and not pivotal.any()


def test_fixed_budgets_and_other_rules_have_no_pivotal_tokens() -> None:
    batch, generator = drawn(6, [9, 4], pad)
    lower, upper = interval(batch, generator)
    for case in CASES:
        assert (make(case).pivotal(batch, lower, upper) is not None) == budget_grows(case), case


def test_the_message_says_where_an_adaptive_divergence_comes_from() -> None:
    batch, _ = drawn(7, [5], pad)
    with pytest.raises(ValueError, match=r"divergence='adaptive_tv'.*adaptive_for_rule.*binary_tv"):
        cppo.CPPO(divergence="adaptive_tv")(batch)
