"""Every figure of the golden files and of section 5 of the rules' specification that this package can express."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cppo
from cppo import Reason, divergence
from cppo.advantages import group_advantages, zero_spread
from cppo.tokens import layout

from . import reference

DATA = Path(__file__).parents[1] / "data"
RULES = json.loads((DATA / "rules.json").read_text())["values"]
PUBLISHED = json.loads((DATA / "cppo_binary_tv_adaptive.json").read_text())["cases"]

MU, PI = [0.5, 0.4, 0.3, 0.2], [0.62, 0.31, 0.46, 0.26]
E1_TV = [0.12, 0.09, 0.16, 0.06]
TOLERANCE = 6e-7  # the figures are printed with six decimals

TESTED: set[str] = set()
RAN: set[str] = set()


@pytest.fixture(autouse=True)
def noted(request: pytest.FixtureRequest) -> None:
    RAN.add(request.node.nodeid)


def golden(key: str) -> Any:
    TESTED.add(key)
    return RULES[key]


def e1(advantage: float, mu: list[float] = MU, pi: list[float] = PI, **more: Any) -> Any:
    """One response, float64, [1, T]."""
    more.setdefault("mask", torch.ones(1, len(mu), dtype=torch.bool))
    policy = torch.tensor([pi], dtype=torch.float64).log().requires_grad_()
    rollout = torch.tensor([mu], dtype=torch.float64).log()
    return cppo.TokenBatch(policy, rollout, torch.tensor([advantage], dtype=torch.float64), **more)


def close(got: Tensor, want: Any, tolerance: float = TOLERANCE) -> None:
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.detach().double().reshape(want.shape), want, rtol=0, atol=tolerance)


def losses(batch: Any, rule: Any) -> tuple[Tensor, Tensor]:
    loss = cppo.token_loss(batch, rule(batch).coefficient)
    return loss, torch.autograd.grad(loss.sum(), batch.policy_logp)[0]


# -------------------------------------------------------------------------------------------- 5.1: losses and gradients

DETACHED: dict[str, Any] = {
    "cispo [0,1.2]": cppo.CISPO(),
    "cispo [0,3]": cppo.CISPO(ratio_max=3.0),
    "minpro-soft .2/.28": cppo.MinPRO(),
    "dppo-tv .15": cppo.DPPO(divergence="binary_tv"),
    "dppo-kl .05": cppo.DPPO(delta=0.05, divergence="binary_kl"),
    "dppo-tv .15 cap1.25": cppo.DPPO(divergence="binary_tv", ratio_cap=1.25),
    "nfpo N=1": cppo.NoTrustRegion(),  # the plain importance-weighted policy gradient
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", DETACHED)
def test_detached_rules(name: str, sign: int) -> None:
    want = golden(f"E1|{name}|A={sign:+d}")
    loss, grad = losses(e1(sign), DETACHED[name])
    close(loss, want["loss"])
    close(grad, want["grad"])


RATIO: dict[str, Any] = {
    "ppo-sym .2": cppo.PPOClip(eps_high=0.2),
    "clip-higher .2/.28": cppo.PPOClip(),
}


def clipped_surrogate(batch: Any, rule: Any, want: dict[str, list[float]]) -> None:
    """The gradient everywhere; a clipped token's loss is 0."""
    loss, grad = losses(batch, rule)
    close(grad, want["grad"])
    active = torch.tensor([want["grad"]]) != 0
    assert (loss[~active] == 0).all()
    assert torch.equal(rule(batch).reason == Reason.RATIO_CLIP, ~active)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", RATIO)
def test_ppo_clip(name: str, sign: int) -> None:
    clipped_surrogate(e1(sign), RATIO[name], golden(f"E1|{name}|A={sign:+d}"))


@pytest.mark.parametrize("sign", [1, -1])
def test_dual_clip(sign: int) -> None:
    batch = e1(sign, [0.1, 0.2, 0.3, 0.4], [0.45, 0.1, 0.33, 0.4])
    clipped_surrogate(batch, cppo.PPOClip(dual_clip=3.0), golden(f"E3 dual-clip c=3 .2/.28 A={sign:+d}"))
    clipped_surrogate(batch, cppo.PPOClip(), golden(f"E3 plain .2/.28 A={sign:+d}"))


@pytest.mark.parametrize("sign", [1, -1])
def test_plain_policy_gradient(sign: int) -> None:
    """REINFORCE is the loss with c = 1: CISPO clamped to [1, 1] up to rounding of the bounds."""
    want = golden(f"E1|reinforce/gpg (no ratio)|A={sign:+d}")
    loss, grad = losses(e1(sign), cppo.CISPO(ratio_min=1 - 1e-9, ratio_max=1.0))
    close(loss, want["loss"])
    close(grad, want["grad"])


def test_truncated_importance_weights() -> None:
    """TIS with C = 2 is the ratio cap alone."""
    rule = cppo.DPPO(delta=10.0, divergence="binary_tv", ratio_cap=2.0)
    ratio = [0.4, 1, 5.5, 2.5]
    verdict = rule(e1(1.0, [0.1] * 4, [0.1 * k for k in ratio]))
    close(verdict.coefficient, golden("tis C2"))
    assert verdict.capped is not None and verdict.capped.tolist() == [[False, False, True, True]]


# ------------------------------------------------------------------------------------------------ 5.2: sequence figures


def test_ratios_and_estimators() -> None:
    batch = e1(1.0)
    log_ratio = batch.log_ratio()
    ratio = log_ratio.exp()
    close(log_ratio, golden("E1 logrho"))
    close(ratio, golden("E1 rho"))
    close(divergence.binary_tv(batch.policy_logp, batch.rollout_logp), golden("E1 tv"))
    close(divergence.binary_kl(batch.policy_logp, batch.rollout_logp), golden("E1 binkl"))
    k1, k2, k3 = -log_ratio, log_ratio.square() / 2, ratio - 1 - log_ratio
    for key, value in (("E1 k1(-log rho)", k1), ("E1 k2", k2), ("E1 k3", k3)):
        close(value, golden(key))
    summary = torch.stack([k1.mean(), k2.mean(), k3.mean(), k2.max(), k3.max()])
    close(summary, golden("E1 mean k1/k2/k3, max k2, max k3"))
    close(torch.stack([log_ratio.sum().exp(), log_ratio.mean().exp()]), golden("E1 W=prod, geo"))
    close((ratio - 1).abs().mean(), golden("E1 mean|rho-1|"))
    other = torch.tensor([0.4, 1, 5.5, 2.5], dtype=torch.float64).log()
    close(torch.stack([other.sum().exp(), other.mean().exp()]), golden("seq prod, geo"))


def trm(rule: Any, ratio_or_pi: list[float], mu: list[float], estimator: str) -> bool:
    """Whether a response is kept when its divergence is the sample estimator k2 or k3."""
    batch = e1(1.0, mu, ratio_or_pi)
    x = batch.log_ratio()
    d = x.square() / 2 if estimator == "k2" else x.exp() - 1 - x
    verdict = rule(batch.with_divergence(d))
    kept = bool((verdict.coefficient > 0).all())
    assert kept == bool((verdict.reason == Reason.KEPT).all())
    assert kept or bool(((verdict.coefficient == 0) & (verdict.reason == Reason.SEQUENCE_LIMIT)).all())
    return kept


def test_trm_lines() -> None:
    """5.2: E1 fails Max(.05), passes Max(.1) on k2, fails Avg; a single burst; a small drift."""
    burst_mu, burst_pi = [0.4] * 100, [0.6] + [0.4] * 99
    drift = ([0.51, 0.39, 0.305, 0.198], MU)
    assert not trm(cppo.TRMMax(), PI, MU, "k2")
    assert trm(cppo.TRMMax(delta=0.1), PI, MU, "k2")
    assert not trm(cppo.TRMAvg(), PI, MU, "k3")
    assert not trm(cppo.TRMAvg(delta=0.002), PI, MU, "k3")
    assert not trm(cppo.TRMMaxAvg(), PI, MU, "k2")
    assert not trm(cppo.TRMMax(), burst_pi, burst_mu, "k2")
    assert trm(cppo.TRMMax(delta=0.1), burst_pi, burst_mu, "k2")
    assert trm(cppo.TRMAvg(), burst_pi, burst_mu, "k3")
    assert trm(cppo.TRMMax(), *drift, "k2") and trm(cppo.TRMAvg(), *drift, "k3")
    assert trm(cppo.TRMMaxAvg(), *drift, "k2")


# ----------------------------------------------------------------------------------------------------------- 5.3: top-K


def test_top_k() -> None:
    mu = torch.tensor([0.50, 0.25, 0.12, 0.08, 0.05], dtype=torch.float64).log()
    pi = torch.tensor([0.45, 0.33, 0.04, 0.12, 0.06], dtype=torch.float64).log()

    def top(sampled: int, inside: bool, variant: str = "append") -> Tensor:
        arguments = (pi[None, :2], mu[None, :2], pi[None, sampled], mu[None, sampled], torch.tensor([inside]))
        return torch.cat([f(*arguments, variant=variant) for f in (divergence.topk_tv, divergence.topk_kl)])  # type: ignore[arg-type]

    def binary(sampled: int) -> Tensor:
        return torch.stack([f(pi[sampled], mu[sampled]) for f in (divergence.binary_tv, divergence.binary_kl)])

    close(torch.stack([divergence.exact_tv(pi, mu), divergence.exact_kl(pi, mu)]), golden("topk exact [TV,KL]"))
    close(divergence.exact_kl(mu, pi), golden("reverse KL exact"))
    close(top(3, False), golden("topk K2 sampled3 append"))
    close(top(3, False, "replace_last"), golden("topk K2 sampled3 replace-last"))
    # A sampled token flagged as inside adds no class: the partition without it.
    close(top(3, True), golden("topk K2 sampled3 ignore sampled"))
    for variant in ("append", "replace_last"):
        close(top(1, True, variant), golden("topk K2 sampled1 (inside)"))
    for sampled in (3, 1, 0):
        close(binary(sampled), golden(f"binary sampled{sampled}"))
    upper = divergence.topk_tv_upper(pi[None, :2], mu[None, :2], pi[None, 3], mu[None, 3], torch.tensor([False]))
    close(upper, [0.12 + min(0.04 + 0.06, 0.12 + 0.05)])


# -------------------------------------------------------------------------------------- 5.4: advantages and aggregation


@pytest.mark.parametrize("rewards", ["[1,0,0,1]", "[1,0,0,0]", "[1,1,1,1]"])
def test_advantages(rewards: str) -> None:
    want = golden(f"adv {rewards}")
    r = torch.tensor(json.loads(rewards), dtype=torch.float64)
    close(group_advantages(r, 4, "zscore"), want["grpo unbiased"])
    close(group_advantages(r, 4, "zscore_population"), want["grpo population"])
    close(group_advantages(r, 4, "centred"), want["dr.grpo/dppo"])
    # RLOO is the centred advantage times n / (n - 1).
    close(group_advantages(r, 4, "centred") * 4 / 3, want["rloo"])
    spread = zero_spread(r, 4)
    assert spread.tolist() == [rewards == "[1,1,1,1]"] * 4
    assert "gpg alpha=n/nonzero-reward" in want  # verl's GPG scales by non-zero rewards: out of scope


def test_aggregation() -> None:
    """Rows [-1.24, -.775, 0, 0 | pad] and [2, .5 | pad]; rejected tokens stay in the denominators."""
    loss = torch.tensor([[-1.24, -0.775, 0, 0, 0], [2, 0.5, 0, 0, 0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    zeros = torch.zeros(2, 5, dtype=torch.float64)
    padded = cppo.TokenBatch(zeros, zeros, zeros[:, 0], mask)
    inside = mask.bool()
    packed = cppo.TokenBatch(
        zeros[inside], zeros[inside], zeros[:, 0], mask[inside], cu_seqlens=torch.tensor([0, 4, 6], dtype=torch.int32)
    )
    for batch, values in ((padded, loss), (packed, loss[inside])):
        close(cppo.aggregate(values, batch, "token-mean"), golden("agg token-mean"))
        close(cppo.aggregate(values, batch, "seq-mean-token-mean"), golden("agg seq-mean-token-mean"))
        close(cppo.aggregate(values, batch, "seq-mean-token-sum"), golden("agg seq-mean-token-sum"))
        norm = cppo.aggregate(values, batch, "seq-mean-token-sum-norm", horizon=8)
        close(norm, golden("agg seq-mean-token-sum-norm H=8 (verl)"))
        close(norm, golden("agg trl dr_grpo B=2 max_len=8"))


def test_aggregates_of_cppo() -> None:
    """5.6: E1 A=+1 detached: token-mean .375108, seq-mean-token-sum-norm with H = 8 .187554."""
    batch = e1(1.0)
    rule = cppo.CPPO(delta_b=0.015, budget="fixed", divergence="binary_tv")
    loss = cppo.token_loss(batch, rule(batch).coefficient)
    close(cppo.aggregate(loss, batch, "token-mean"), 0.375108)
    close(cppo.aggregate(loss, batch, "seq-mean-token-sum-norm", horizon=8), 0.187554)


# -------------------------------------------------------------------------------------------------------- 5.5: numerics


def test_log_ratio_of_95() -> None:
    """exp(95) * 0 is NaN in float32 and `where` does not repair the gradient; here both are finite."""
    for mask in ([[1, 0]], [[1, 1]]):
        policy = torch.tensor([[-1.0, -0.5]], requires_grad=True)
        batch = cppo.TokenBatch(policy, torch.tensor([[-1.0, -95.5]]), torch.ones(1), torch.tensor(mask))
        for rule in (cppo.DPPO(divergence="binary_tv"), cppo.CPPO(divergence="binary_tv"), cppo.NoTrustRegion()):
            loss, grad = losses(batch, rule)
            assert loss.isfinite().all() and grad.isfinite().all()
            if mask == [[1, 0]]:
                assert loss[0, 1] == 0 and grad[0, 1] == 0


def test_a_log_ratio_of_minus_25_keeps_its_gradient() -> None:
    """A clamp from below at -20 would kill or inflate it; it is e^-25."""
    policy = torch.tensor([[-26.0]], dtype=torch.float64, requires_grad=True)
    batch = cppo.TokenBatch(policy, torch.tensor([[-1.0]], dtype=torch.float64), torch.ones(1), torch.ones(1, 1))
    _, grad = losses(batch, cppo.NoTrustRegion())
    assert grad.item() == pytest.approx(-math.exp(-25), rel=1e-9)


def test_half_precision_log_probabilities() -> None:
    """bf16 log-probabilities move probabilities by up to 2e-3: small against delta, and all arithmetic is float32."""
    for probability, error in ((0.9, 3e-4), (0.5, 2e-3), (0.1, 2e-3)):
        exact = torch.tensor([[probability]]).log()
        d = divergence.binary_tv(exact.bfloat16(), exact)
        assert d.dtype == torch.float32 and d.item() < error


# ------------------------------------------------------------------------------------------------ 5.6: CPPO mask tables


def given_divergence(d: list[float], mask: list[int] | None = None) -> Any:
    """A response with divergences d whose tokens all move away (A = 1, rho = 1.1)."""
    n = len(d)
    inside = torch.tensor([mask or [1] * n])
    return e1(1.0, [0.5] * n, [0.55] * n, mask=inside, divergence=torch.tensor([d], dtype=torch.float64))


EXHAUSTION, REFILL = [0.3, 0.3, 0.3, 0.05], [0.14, 0.02, 0, 0, 0, 0, 0.02, 0.08]
INTERIOR, TOOL = [0.10, 0.05, 0.40, 0.05, 0.06], [1, 1, 0, 1, 1]
QUANTILE = [0.03, 0.01, 0.025, 0.005]
FIXED, ADAPTIVE = {"budget": "fixed"}, {"budget": "adaptive", "delta_b": 0.02}
TABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "E1 A+1 d.15 db.015 fixed": (e1(1.0), {**FIXED, "delta_b": 0.015}),
    "E1 A-1 d.15 db.015 fixed": (e1(-1.0), {**FIXED, "delta_b": 0.015}),
    "E1 A+1 d.15 db.20 fixed": (e1(1.0), {**FIXED, "delta_b": 0.2}),
    "E1 A+1 d.15 dbmin.02 adaptive": (e1(1.0), ADAPTIVE),
    "E1 A0": (e1(0.0), {**FIXED, "delta_b": 0.015}),
    "E1 A+1 soft": (e1(1.0), {**FIXED, "delta_b": 0.015, "gate": "reciprocal"}),
    "exhaustion w=1": (given_divergence(EXHAUSTION), {**FIXED, "delta": 0.5, "delta_b": 0.001, "w_min": 1.0}),
    "refill T=8 d.15 db.02 w=1": (given_divergence(REFILL), {**FIXED, "delta_b": 0.02, "w_min": 1.0}),
    "weights own T4": (given_divergence([0.18] * 4), {**FIXED, "delta_b": 0.2}),
    "T=1 own": (given_divergence([0.16]), {**FIXED, "delta_b": 0.02}),
    "interior zero valid-only": (given_divergence(INTERIOR, TOOL), {**FIXED, "delta_b": 0.05}),
    # With the tool token as a loss token, the rule is what a mask that ignores holes would compute.
    "interior zero counted": (given_divergence(INTERIOR), {**FIXED, "delta_b": 0.05}),
    "interior zero valid-only adaptive .02": (given_divergence(INTERIOR, TOOL), ADAPTIVE),
    "interior zero counted adaptive .02": (given_divergence(INTERIOR), ADAPTIVE),
    "adaptive inside": (given_divergence(QUANTILE), ADAPTIVE),
    "adaptive low clamp": (given_divergence([x / 10 for x in QUANTILE]), ADAPTIVE),
    "adaptive 5x ceiling on E1": (e1(1.0), {**ADAPTIVE, "budget_max": 5.0}),
}


ROWS = [(name, False) for name in TABLE] + [(name, True) for name in TABLE if TABLE[name][1].get("w_min") == 1.0]


@pytest.mark.parametrize("name, weights_off", ROWS)
def test_cppo_tables(name: str, weights_off: bool) -> None:
    want = golden(f"CPPO {name}")
    batch, parameters = TABLE[name]
    if weights_off:  # w_min = 1 and no weights are one rule
        parameters = {**parameters, "weights": "none", "w_min": 0.8}
    # E1's two deciding figures are printed limits: D of E1 is the binary TV; the rest carry their own.
    parameters = {"divergence": "binary_tv", **parameters}
    verdict = cppo.CPPO(**parameters)(batch)
    inside = batch.loss_mask[0]
    keep = torch.tensor([math.nan if m is None else m for m in want["M"]], dtype=torch.float64)[inside]
    close((verdict.coefficient / batch.log_ratio().exp())[0][inside], keep)
    assert (verdict.coefficient[0][~inside] == 0).all()
    assert verdict.delta_b is not None and verdict.divergence is not None and verdict.threshold is not None
    close(verdict.delta_b, [want["db"]])
    close(layout().quantile(verdict.divergence, batch.loss_mask, 0.9), [[want["P90"]]])
    rows = [row for row in want.get("rows", []) if row is not None]
    if not rows:
        return
    threshold = verdict.threshold.expand_as(batch.mask)[0][inside]
    close(threshold, [row["c"] / row["w"] for row in rows], 2e-6)
    assert verdict.budget_used is not None
    close(verdict.budget_used, [rows[-1]["S"] / rows[-1]["budget"]], 1e-5)
    for reason, row in zip(verdict.reason[0][inside].tolist(), rows, strict=True):
        if row["wD"] <= row["c"]:
            assert reason == Reason.KEPT
        elif row["toward"]:
            assert reason == Reason.TOWARDS
        elif parameters.get("gate") is None:
            assert reason == (Reason.TOKEN_LIMIT if row["wD"] > parameters.get("delta", 0.15) else Reason.PREFIX_BUDGET)
        else:
            assert reason in (Reason.TOKEN_LIMIT, Reason.PREFIX_BUDGET)
    # The slow reference passes through the same figures, all of them.
    slow = reference.rule(
        "cppo",
        batch.policy_logp[0].tolist(),
        batch.rollout_logp[0].tolist(),
        batch.advantages.expand(len(inside)).tolist(),
        inside.tolist(),
        verdict.divergence[0].tolist(),
        delta=parameters.get("delta", 0.15),
        delta_b=parameters["delta_b"],
        budget=parameters["budget"],
        w_min=parameters.get("w_min", 0.8),
        weights=parameters.get("weights", "linear"),
        budget_max=parameters.get("budget_max", 2.0),
        gate=reference.reciprocal if parameters.get("gate") else None,
    )
    for key, values in (("w", slow.weights), ("S", slow.spent), ("budget", slow.allowed), ("c", slow.limit)):
        close(torch.tensor(values, dtype=torch.float64)[inside], [row[key] for row in rows], 2e-6)
    close(torch.tensor(slow.exceed, dtype=torch.float64)[inside], [row["x"] for row in rows], 2e-6)


def test_quantile_figures() -> None:
    d = torch.tensor([QUANTILE], dtype=torch.float64)
    close(layout().quantile(d, torch.ones_like(d).bool(), 0.9), [[golden("quantile linear")]])
    # Four columns of padding change nothing.
    padded = torch.nn.functional.pad(d, (2, 2))
    mask = torch.nn.functional.pad(torch.ones_like(d), (2, 2)).bool()
    close(layout().quantile(padded, mask, 0.9), [[0.0285]])


@pytest.mark.parametrize("sign", [1, -1])
def test_cppo_losses(sign: int) -> None:
    rule = cppo.CPPO(delta_b=0.015, budget="fixed", divergence="binary_tv")
    want = golden(f"CPPO loss detached E1 A{sign:+d}")
    loss, grad = losses(e1(sign), rule)
    close(loss, want["loss"])
    close(grad, want["grad"])
    want = golden(f"CPPO loss detached cap1.22 E1 A{sign:+d}")
    capped = cppo.CPPO(delta_b=0.015, budget="fixed", divergence="binary_tv", ratio_cap=1.22)
    loss, grad = losses(e1(sign), capped)
    close(loss, want["loss"])
    close(grad, want["grad"])


def test_discriminating_power() -> None:
    """E1 A=+1: DPPO (1,1,0,1), CPPO delta_b .015 (1,1,0,0), CPPO delta_b .2 (1,1,1,1)."""
    rules = [
        cppo.DPPO(divergence="binary_tv"),
        cppo.CPPO(delta_b=0.015, budget="fixed", divergence="binary_tv"),
        cppo.CPPO(delta_b=0.2, budget="fixed", divergence="binary_tv"),
    ]
    keep = [(rule(e1(1.0)).coefficient > 0).int().tolist()[0] for rule in rules]
    assert keep == [[1, 1, 0, 1], [1, 1, 0, 0], [1, 1, 1, 1]]


# -------------------------------------------------------------------------------- the authors' published implementation


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"seed {case['seed']}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_mask(case: dict[str, Any], dtype: torch.dtype) -> None:
    """Binary TV with the adaptive budget, packed as published and padded."""
    lengths = case["lengths"]
    rule = cppo.CPPO(
        delta=case["delta"], w_min=case["w_min"], delta_b=case["delta_b_min"], budget="adaptive", divergence="binary_tv"
    )
    policy, rollout, advantages = (
        torch.tensor(case[k], dtype=dtype) for k in ("policy_logp", "rollout_logp", "advantages")
    )
    cu = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    packed = rule(cppo.TokenBatch(policy, rollout, advantages, torch.ones(len(policy)), cu_seqlens=cu))
    assert (packed.coefficient > 0).int().tolist() == case["keep"]
    p, m, a, mask = (
        torch.nn.utils.rnn.pad_sequence(v.split(lengths), batch_first=True)
        for v in (policy, rollout, advantages, torch.ones(len(policy)))
    )
    verdict = rule(cppo.TokenBatch(p, m, a, mask))
    keep = torch.cat([row[:n] for row, n in zip(verdict.coefficient, lengths, strict=True)])
    assert (keep > 0).int().tolist() == case["keep"]
    torch.testing.assert_close(verdict.delta_b, packed.delta_b)


def test_every_key_is_tested(request: pytest.FixtureRequest) -> None:
    """Nothing in the golden file is overlooked. Runs last in this file; without the others it has nothing to count."""
    if {item.nodeid for item in request.session.items if item.path == Path(__file__)} != RAN:
        pytest.skip("not all tests of this file ran in this process")
    assert set(RULES) == TESTED
