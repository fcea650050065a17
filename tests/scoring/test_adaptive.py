"""Adaptive TV: the mask of the exact TV, from the top-K interval and a few exact evaluations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cppo
from cppo import TokenBatch, Verdict
from cppo.divergence import topk_interval
from cppo.rules.base import TrustRegion
from cppo.scoring import adaptive
from cppo.scoring.adaptive import PASSES, TOLERANCE, AdaptiveDivergence, adaptive_for_rule
from cppo.scoring.exact import Distributions, exact_divergence

from .adaptive_cases import Exact, Scored, scored, share

TV = {"divergence": "adaptive_tv"}
#: Limits that bind: the lower and the upper end of the interval, taken for the TV, would both give other masks.
RULES: dict[str, Any] = {
    "cppo fixed": cppo.CPPO(budget="fixed", delta_b=0.03, **TV),
    "cppo adaptive": cppo.CPPO(**TV),
    "cppo adaptive, wide": cppo.CPPO(delta_b=0.01, budget_max=6.0, quantile_scale=0.5, delta=0.1, **TV),
    "cppo w_min 0.5": cppo.CPPO(budget="fixed", delta_b=0.03, delta=0.1, w_min=0.5, **TV),
    "cppo without weights": cppo.CPPO(weights="none", delta_b=0.015, **TV),
    "cppo shuffled": cppo.CPPO(weights="shuffled", w_min=0.5, delta=0.1, **TV),
    "cppo without budget": cppo.CPPO(prefix_budget=False, delta=0.08, ratio_cap=1.2, **TV),
    "dppo": cppo.DPPO(**TV),
    "trm_max": cppo.TRMMax(delta=0.25, **TV),
    "trm_avg": cppo.TRMAvg(delta=0.04, **TV),
    "trm_max_avg": cppo.TRMMaxAvg(delta=0.3, delta_avg=0.04, **TV),
}
SOFT = cppo.CPPO(gate="reciprocal", delta=0.1, **TV)


def run(rule: TrustRegion, case: Scored, **more: Any) -> tuple[AdaptiveDivergence, Exact]:
    exact = Exact(case)
    return adaptive_for_rule(rule, case.batch, case.lower, case.upper, exact, **more), exact


def dropped(rule: TrustRegion, batch: TokenBatch, divergence: Tensor) -> Tensor:
    return rule(batch.with_divergence(divergence)).coefficient == 0


def clear_of_ties(rule: TrustRegion, case: Scored) -> tuple[Tensor, Tensor]:
    """What the exact TV drops, in float64, and the tokens of responses where rounding of D cannot change that."""
    batch, truth = case.double(), case.truth
    want = dropped(rule, batch, truth)
    same = torch.ones_like(want)
    for near in (truth + 3e-6, truth - 3e-6, truth * (1 + 1e-5), truth * (1 - 1e-5)):
        same &= dropped(rule, batch, near.clamp(min=0)) == want
    return want, batch.layout.maximum((~same).double()).expand_as(want) == 0


def compare(rule: TrustRegion, case: Scored) -> tuple[int, int, int, int, int]:
    """Asserts the mask; tokens: in the mask, resolved, wrong with the lower end, wrong with the upper end; ties."""
    found, exact = run(rule, case)
    want, clear = clear_of_ties(rule, case)
    mask, batch = case.mask, case.batch
    got = rule(batch.with_divergence(found.divergence))
    assert torch.equal((got.coefficient == 0)[clear], want[clear])
    kept = clear & ~want
    exactly = rule(batch.with_divergence(case.truth.float()))
    torch.testing.assert_close(got.coefficient[kept], exactly.coefficient[kept], rtol=1e-6, atol=0)

    asked = torch.zeros(mask.numel(), dtype=torch.bool)
    for index in exact.calls:
        asked[index] = True
    assert torch.equal(asked.view_as(mask), found.resolved) and found.passes == len(exact.calls) <= PASSES + 1
    error = (found.divergence - case.truth)[mask]
    assert error[found.resolved[mask]].abs().max() < 1e-6
    inside = found.divergence[mask]
    assert (inside >= case.lower[mask] - 1e-6).all() and (inside <= case.upper[mask] + 1e-6).all()
    assert (found.divergence[~mask] == 0).all()
    lower, upper = ((dropped(rule, batch, end) != want)[mask].sum().item() for end in (case.lower, case.upper))
    return int(mask.sum()), int(found.resolved.sum()), int(lower), int(upper), int((~clear & mask).sum())


@pytest.mark.parametrize("name", RULES)
def test_the_mask_is_that_of_the_exact_tv(name: str) -> None:
    """10,000 responses for CPPO's two budgets, 1,000 for every other rule; padded and packed in turn."""
    counts = torch.zeros(5)
    batches, count = (10, 500) if name in ("cppo fixed", "cppo adaptive") else (4, 250)
    for seed in range(batches):
        case = scored(seed, count, drift=0.15 if seed % 4 < 2 else 0.3)
        counts += torch.tensor(compare(RULES[name], case.packed() if seed % 2 else case))
    tokens, resolved, lower, upper, ties = counts.tolist()
    assert ties < 0.01 * tokens
    assert lower > 0.002 * tokens and upper > 0.002 * tokens  # the interval alone would not do
    assert 0 < resolved < 0.35 * tokens


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from([*RULES]),
    count=st.integers(1, 6),
    width=st.integers(1, 30),
    peaked=st.sampled_from([0.0, 0.5, 1.0]),
    drift=st.sampled_from([0.03, 0.3, 1.0]),
    packed=st.booleans(),
)
def test_small_batches(seed: int, name: str, count: int, width: int, peaked: float, drift: float, packed: bool) -> None:
    case = scored.__wrapped__(seed, count, width, peaked, drift, holes=0.3)
    if not case.mask.any():
        return
    found, _ = run(RULES[name], case.packed() if packed else case)
    case = case.packed() if packed else case
    want, clear = clear_of_ties(RULES[name], case)
    assert torch.equal(dropped(RULES[name], case.batch, found.divergence)[clear], want[clear])


@pytest.mark.parametrize("peaked, most", [(0.5, 0.6), (0.8, 0.3), (0.95, 0.1)])
def test_the_more_peaked_the_fewer_are_resolved(peaked: float, most: float) -> None:
    case = scored(3, count=100, peaked=peaked)
    for rule in (RULES["cppo adaptive"], RULES["cppo fixed"], RULES["trm_avg"], RULES["dppo"]):
        found, _ = run(rule, case)
        assert share(found.resolved, case.mask) < most


class WithoutPivots(cppo.CPPO):
    def pivotal(self, *_: Any) -> None:
        return None


def test_the_plan_saves_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long responses: tokens at the quantile of an open budget come early, and prefixes are resolved step by step."""
    resolved = {"plan": 0, "without pivotal tokens": 0}
    for seed in range(3):
        case = scored(seed, 20, 600, peaked=0.8)
        mean = float(case.truth[case.mask].mean())
        rule = cppo.CPPO(delta_b=0.5 * mean, quantile_scale=0.3, budget_max=6.0, **TV)
        for name, each in (("plan", rule), ("without pivotal tokens", WithoutPivots(**rule.parameters()))):
            resolved[name] += int(run(each, case)[0].resolved.sum())
    assert resolved["plan"] < 0.95 * resolved["without pivotal tokens"]

    resolved = {"plan": 0, "at once": 0}
    for seed in range(3):
        case = scored(seed, 20, 600, peaked=0.8, drift=0.3)
        rule = cppo.CPPO(budget="fixed", delta_b=float(case.truth[case.mask].mean()), **TV)
        resolved["plan"] += int(run(rule, case)[0].resolved.sum())
        with monkeypatch.context() as patch:
            patch.setattr(adaptive, "KEEP", 0.0)
            resolved["at once"] += int(run(rule, case)[0].resolved.sum())
    assert resolved["plan"] < 0.85 * resolved["at once"]


@pytest.mark.parametrize("packed", [False, True])
def test_limits_far_from_every_interval_need_no_exact_evaluation(packed: bool) -> None:
    case = scored(5, count=50, peaked=1.0, drift=0.05)
    case = case.packed() if packed else case
    assert case.upper[case.mask].max() < 0.4
    lax = [cppo.DPPO(delta=0.5, **TV), cppo.CPPO(delta=0.5, delta_b=0.5, **TV), cppo.TRMMax(delta=0.5, **TV)]
    lax += [cppo.TRMAvg(delta=0.5, **TV), cppo.CPPO(delta=0.5, delta_b=0.5, gate="sapo", **TV)]
    tiny = cppo.TRMMax(delta=1e-9, **TV)  # every response has a token that is surely beyond it
    for rule in (*lax, tiny):
        found, exact = run(rule, case)
        assert found.passes == 0 and not exact.calls and not found.resolved.any()
        assert share(found.resolved, case.mask) == 0
        mask = case.mask
        assert torch.equal(found.divergence[mask], case.lower[mask])


def test_directions_and_masks_that_do_not_matter_cost_nothing() -> None:
    """Tokens that move towards mu are kept whatever D is: with A = 0 nothing is left to decide."""
    case = scored(6, count=50)
    b = case.batch
    idle = replace(case, batch=TokenBatch(b.policy_logp, b.rollout_logp, torch.zeros(50), b.mask))
    for name, rule in RULES.items():
        found, _ = run(rule, idle)
        assert (found.passes == 0) == (not name.startswith("trm")), name


def test_soft_gate() -> None:
    """The coefficient varies with D itself: those beyond their limit are resolved with their prefix."""
    for packed in (False, True):
        case = scored(8, count=100)
        case = case.packed() if packed else case
        found, _ = run(SOFT, case)
        exactly = SOFT(case.double().with_divergence(case.truth)).coefficient
        got = SOFT(case.batch.with_divergence(found.divergence)).coefficient
        torch.testing.assert_close(got.double(), exactly, rtol=1e-4, atol=0)
        reduced = exactly < cppo.NoTrustRegion()(case.double()).coefficient * (1 - 1e-3)
        assert reduced.sum() > 100 and share(found.resolved, case.mask) < 0.8
        assert found.passes <= 3  # all that a soft token needs at once: estimates would not help
        by_lower = SOFT(case.batch.with_divergence(case.lower)).coefficient
        assert not torch.allclose(by_lower.double(), exactly, rtol=1e-2)


# ----------------------------------------------------------------------------------------------- what exact may return


def case_of(lower: list[float], upper: list[float]) -> tuple[TokenBatch, Tensor, Tensor]:
    shape = (1, len(lower))
    batch = TokenBatch(torch.full(shape, -0.5), torch.full(shape, -0.7), torch.ones(1), torch.ones(shape))
    return batch, torch.tensor([lower]), torch.tensor([upper])


def test_values_outside_of_the_interval_by_rounding_are_clamped() -> None:
    """A decision that rests on the interval must not be overturned by rounding in the evaluation of another token."""
    batch, lower, upper = case_of([0.1, 0.1, 0.1], [0.3, 0.3, 0.1])
    off = 0.5 * TOLERANCE
    found = adaptive_for_rule(
        RULES["dppo"], batch, lower, upper, lambda i: torch.tensor([0.1 - off, 0.3 + off])[: len(i)]
    )
    assert found.resolved.tolist() == [[True, True, False]]
    torch.testing.assert_close(found.divergence, torch.tensor([[0.1, 0.3, 0.1]]), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    "value, words",
    [
        (torch.tensor([0.2, 0.5]), r"exact\(\) returned 0.5 .*position 1.*\[0\.\d+, 0\.3\d*\].*top K"),
        (torch.tensor([0.05, 0.2]), r"returned 0.05 .*position 0.*hidden states"),
        (torch.tensor([0.2, torch.nan]), "returned nan"),
        (torch.tensor([0.2]), r"\[1\] for 2 positions"),
        (torch.tensor([1, 0]), r"torch.int64 \[2\]"),
        ([0.2, 0.2], "returned list"),
    ],
)
def test_wrong_exact_values_are_refused(value: Any, words: str) -> None:
    batch, lower, upper = case_of([0.1, 0.1, 0.1], [0.3, 0.3, 0.1])
    with pytest.raises(ValueError, match=words):
        adaptive_for_rule(RULES["dppo"], batch, lower, upper, lambda index: value)


def test_rows_shifted_by_one_are_noticed() -> None:
    case = scored(11, count=20)
    shifted = case.truth.nan_to_num().roll(1).flatten().float()
    with pytest.raises(ValueError, match="shifted by one"):
        adaptive_for_rule(RULES["dppo"], case.batch, case.lower, case.upper, lambda index: shifted[index])


# -------------------------------------------------------------------------------------------------- what goes in


@pytest.mark.parametrize(
    "rule, words",
    [
        (cppo.CPPO(), "cppo asks for divergence='topk_tv'.*adaptive_tv"),
        (cppo.TRMMax(), "trm_max asks for divergence='topk_kl'.*total variation"),
        (cppo.MinPRO(), "minpro looks at no divergence"),
    ],
)
def test_rules_of_other_divergences_are_refused(rule: TrustRegion, words: str) -> None:
    case = scored(12, count=5)
    with pytest.raises(ValueError, match=words):
        run(rule, case)


def test_intervals_that_are_none_are_refused() -> None:
    batch, lower, upper = case_of([0.1, 0.1], [0.3, 0.3])
    exact: Any = None
    with pytest.raises(ValueError, match=r"above upper, or NaN, at 2 tokens"):
        adaptive_for_rule(RULES["dppo"], batch, upper, lower, exact)
    with pytest.raises(ValueError, match=r"or NaN, at 1 token"):
        adaptive_for_rule(RULES["dppo"], batch, torch.tensor([[0.1, torch.nan]]), upper, exact)
    with pytest.raises(ValueError, match=r"lower has shape \[1, 1\], but the tokens \[1, 2\]"):
        adaptive_for_rule(RULES["dppo"], batch, lower[:, :1], upper[:, :1], exact)
    with pytest.raises(ValueError, match=r"upper \[1, 1\]"):
        adaptive_for_rule(RULES["dppo"], batch, lower, upper[:, :1], exact)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4)])
def test_nothing_to_decide(shape: tuple[int, int]) -> None:
    """No rows, no columns, no loss tokens."""
    empty = torch.zeros(shape)
    batch = TokenBatch(empty, empty, torch.ones(shape[0]), empty)
    for rule in RULES.values():
        found = adaptive_for_rule(rule, batch, empty, empty + 1, Exact(scored(12, count=5)))
        assert found.passes == 0 and found.divergence.shape == shape
        assert share(found.resolved, batch.loss_mask) == 0


def test_no_top_k_at_all() -> None:
    """[0, 1] for every token: everything that matters is resolved, and the mask is right."""
    case = scored(13, count=50)
    blind = replace(case, lower=torch.zeros_like(case.lower), upper=torch.ones_like(case.upper))
    for name in ("cppo adaptive", "dppo", "trm_avg"):
        found, _ = run(RULES[name], blind)
        want, clear = clear_of_ties(RULES[name], case)
        assert torch.equal(dropped(RULES[name], case.batch, found.divergence)[clear], want[clear])


def test_top_k_of_the_whole_vocabulary_is_exact() -> None:
    """Intervals without width are taken at their word, also by soft gates."""
    case = scored(14, count=50)
    d = case.truth.float()
    for rule in (*RULES.values(), SOFT):
        found = adaptive_for_rule(rule, case.batch, d, d, Exact(case))
        assert found.passes == 0 and torch.equal(found.divergence[case.mask], d[case.mask])


def test_slack_for_log_probabilities_in_float16() -> None:
    """mu's log-probabilities rounded to 11 bits move the interval: with a bound of that as slack, the mask is right."""
    case = scored(15, count=300, peaked=0.6)
    generator = torch.Generator().manual_seed(0)
    off = 0.004 * (2 * torch.rand(case.lower.shape, generator=generator) - 1)
    lower, upper = (case.lower + off).clamp(0, 1), (case.upper + off).clamp(0, 1)
    assert (lower > case.truth + 1e-3)[case.mask].any() and (upper < case.truth - 1e-3)[case.mask].any()
    moved = replace(case, lower=lower, upper=upper)
    for name in ("cppo fixed", "dppo"):
        want, clear = clear_of_ties(RULES[name], case)
        for slack in (0.004, torch.full_like(lower, 0.004)):
            found, _ = run(RULES[name], moved, slack=slack)
            assert torch.equal(dropped(RULES[name], case.batch, found.divergence)[clear], want[clear])
        with pytest.raises(ValueError, match="top K"):
            run(RULES[name], moved)


# ------------------------------------------------------------------------------------------------------ rules of others


@dataclass(frozen=True)
class Median(TrustRegion):
    """Rejects a response whose median D is above `delta`; says nothing about thresholds."""

    delta: float = 0.01
    divergence: str = "adaptive_tv"
    name = "median"

    def judge(self, batch: TokenBatch) -> Verdict:
        d = self.token_divergence(batch)
        keep = batch.layout.quantile(d, batch.loss_mask, 0.5) <= self.delta
        ratio, _ = self.capped_ratio(batch.log_ratio(), batch.loss_mask)
        return Verdict(ratio * keep, torch.zeros_like(ratio, dtype=torch.uint8), d)


@dataclass(frozen=True)
class Restless(Median):
    """Its bracket never closes (a rule whose arithmetic does not repeat to the last bit)."""

    name = "restless"

    def bracket(self, batch: TokenBatch, lower: Tensor, upper: Tensor) -> tuple[Verdict, Verdict]:
        d = self.token_divergence(batch.with_divergence(lower))
        reason = torch.zeros_like(d, dtype=torch.uint8)
        ends = (Verdict(c, reason, d, torch.full_like(d, 0.1)) for c in (torch.ones_like(d), torch.zeros_like(d)))
        return tuple(ends)  # type: ignore[return-value]

    def judge(self, batch: TokenBatch) -> Verdict:
        return replace(super().judge(batch), threshold=torch.full_like(batch.rollout_logp, 0.1))


def test_a_rule_without_thresholds_resolves_the_open_responses() -> None:
    case = scored(16, count=200)
    rule = Median()
    found, exact = run(rule, case)
    want, clear = clear_of_ties(rule, case)
    assert torch.equal(dropped(rule, case.batch, found.divergence)[clear], want[clear])
    assert len(exact.calls) == 1 and 0 < share(found.resolved, case.mask) < 0.9
    whole = torch.where(case.mask, found.resolved | (case.lower == case.upper), True).all(1)
    untouched = ~found.resolved.any(1)
    assert (whole | untouched).all()


def test_it_always_ends() -> None:
    case = scored(17, count=10)
    found, exact = run(Restless(), case)
    assert found.resolved[case.mask & (case.lower < case.upper)].all() and len(exact.calls) <= PASSES + 1


# ------------------------------------------------------------------------------------------------------- put together


def test_from_hidden_states() -> None:
    """The whole chain: hidden states, two heads, top K, and the streaming exact TV as the callback."""
    g = torch.Generator().manual_seed(1)
    count, width, d, vocabulary, k = 20, 30, 16, 200, 8
    head = torch.randn(vocabulary, d, generator=g)
    drifted = head + 0.05 * torch.randn(vocabulary, d, generator=g)
    hidden = torch.randn(count * width, d, generator=g)
    log_mu, log_pi = ((hidden @ w.T).log_softmax(-1) for w in (head, drifted))
    ids = torch.multinomial(log_mu.exp(), 1, generator=g)
    top = log_mu.topk(k, -1).indices
    mu, pi = (x.gather(1, ids)[:, 0] for x in (log_mu, log_pi))
    lower, upper = topk_interval(log_pi.gather(1, top), log_mu.gather(1, top), pi, mu, (top == ids).any(1))
    shape = (count, width)
    batch = TokenBatch(
        pi.view(shape), mu.view(shape), torch.randn(count, generator=g), torch.ones(shape, dtype=torch.bool)
    )
    policy, rollout = Distributions(hidden, drifted), Distributions(hidden, head)
    truth = cppo.divergence.exact_tv(log_pi, log_mu).view(shape)
    case = Scored(batch, lower.view(shape), upper.view(shape), truth.double())
    rule = cppo.CPPO(delta=float(truth.quantile(0.8)), delta_b=float(truth.mean()), budget="fixed", **TV)
    found = adaptive_for_rule(
        rule, batch, case.lower, case.upper, lambda at: exact_divergence(policy.at(at), rollout.at(at))
    )
    want, clear = clear_of_ties(rule, case)
    got = dropped(rule, batch, found.divergence)
    assert torch.equal(got[clear], want[clear]) and want.any() and clear.float().mean() > 0.9
    assert 0 < share(found.resolved, batch.loss_mask) < 1
