"""The solver of thresholds: against trying all thresholds, and counting tokens one by one, for every rule."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cppo
from cppo.config.load import ConfigError, load_config
from cppo.errors import UserError
from cppo.launch.verl import plan
from cppo.thresholds import Sample, Unreachable, check_automatic, solve

LIMITS = {name: rule.limits for name, rule in cppo.RULES.items() if rule.limits}

#: Where each threshold can lie in the batches below, from the tightest; 100 steps.
GRIDS = {"eps_low": (1e-6, 0.9999), "ratio_min": (1e-6, 1.0)}


def batch(rows: int, length: int, seed: int, drift: float = 0.4) -> cppo.TokenBatch:
    """Padded responses of different lengths whose divergence grows along them; NaN in the padding."""
    g = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(rows, length, generator=g) * 2.5 - 0.02
    growth = torch.linspace(0.3, 1.5, length)
    policy = (rollout + drift * growth * torch.randn(rows, length, generator=g)).clamp(max=-1e-3)
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (rows, 1), generator=g)
    policy = torch.where(mask, policy, float("nan"))
    found = cppo.TokenBatch(policy, rollout, torch.randn(rows, generator=g), mask)
    clean = found.clean(policy), found.clean(rollout)
    return found.with_divergence(cppo.divergence.binary_tv(*clean))


def share(rule: cppo.TrustRegion, b: cppo.TokenBatch, update: list[int]) -> float:
    """The mean over updates of the share of loss tokens that count, a token at a time."""
    verdict = rule(b)
    clamps = rule.name in ("cispo", "minpro") or getattr(rule, "gate", None) is not None
    parts: dict[int, list[bool]] = {}
    reasons, coefficients, mask = verdict.reason.tolist(), verdict.coefficient.tolist(), b.loss_mask.tolist()
    for row, seen in enumerate(update):
        for t in range(len(mask[row])):
            if mask[row][t]:
                reason = cppo.Reason(reasons[row][t]).name
                changed = reason in ("TOKEN_LIMIT", "PREFIX_BUDGET", "SEQUENCE_LIMIT", "RATIO_CLIP", "CLAMPED")
                parts.setdefault(seen, []).append(changed if clamps else coefficients[row][t] == 0)
    return sum(sum(part) / len(part) for part in parts.values()) / len(parts)


def brute_force(rule: cppo.TrustRegion, name: str, b: cppo.TokenBatch, update: list[int]) -> list[float]:
    """The shares of a fine grid of values of one threshold."""
    low, high = GRIDS.get(name, (1e-6, 1e3))
    xs = [low * (high / low) ** (i / 100) for i in range(101)]
    values = {"ratio_max": [1 + x for x in xs], "ratio_min": [1 - x for x in xs]}.get(name, xs)
    return [share(dataclasses.replace(rule, **{name: value}), b, update) for value in values]


SINGLE = [
    *((rule, name) for rule, names in LIMITS.items() for name in names if len(names) == 1),
    ("cppo", "delta"),
    ("cppo", "delta_b"),
    ("trm_max_avg", "delta"),
    ("trm_max_avg", "delta_avg"),
    ("ppo_clip", "eps_high"),
    ("ppo_clip", "eps_low"),
    ("minpro", "eps_high"),
    ("minpro", "eps_low"),
    ("cispo", "ratio_max"),
    ("cispo", "ratio_min"),
]
#: The other threshold where only one is solved for: so loose that the target can be reached.
OTHERS = {
    ("cppo", "delta"): {"delta_b": 0.05},
    ("cppo", "delta_b"): {"delta": 0.5},
    ("trm_max_avg", "delta"): {"delta_avg": 10.0},
    ("trm_max_avg", "delta_avg"): {"delta": 10.0},
    ("ppo_clip", "eps_high"): {"eps_low": 0.99},
    ("ppo_clip", "eps_low"): {"eps_high": 50.0},
    ("minpro", "eps_high"): {"eps_low": 0.999},
    ("minpro", "eps_low"): {"eps_high": 1e4},
    ("cispo", "ratio_min"): {"ratio_max": 50.0},
}


@pytest.mark.parametrize("rule,name", SINGLE)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10_000), target=st.sampled_from([0.02, 0.1, 0.25]))
def test_one_threshold_against_brute_force(rule: str, name: str, seed: int, target: float) -> None:
    b = batch(10, 8, seed)
    update = [row % 3 for row in range(10)]
    judge = cppo.make_rule(rule, **OTHERS.get((rule, name), {}))
    shares = brute_force(judge, name, b, update)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(shares)), "a looser threshold holds back more"
    sample = Sample.of(b, torch.tensor(update)[:, None])
    try:
        found = solve(judge, [name], sample, target)
    except Unreachable:
        assert shares[0] < target or shares[-1] >= target
        return
    assert list(found.thresholds) == [name]
    assert found.share == pytest.approx(share(dataclasses.replace(judge, **found.thresholds), b, update), abs=1e-12)
    reachable = [value for value in shares if value > shares[-1]]
    assert found.share > shares[-1]
    # no value of the grid comes nearer; what lies between two of its values may, and is the solver's to find
    assert abs(found.share - target) <= min(abs(value - target) for value in reachable) + 1e-12


@pytest.mark.parametrize("rule", [rule for rule, names in LIMITS.items() if len(names) == 2])
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_two_thresholds_share_the_target(rule: str, seed: int) -> None:
    b = batch(150, 16, seed)
    names = list(LIMITS[rule])
    found = solve(cppo.make_rule(rule), names, Sample.of(b), 0.1)
    made = cppo.make_rule(rule, **found.thresholds)
    whole = share(made, b, [0] * 150)
    response = 16 / int(b.loss_mask.sum()) if rule.startswith("trm") else 1 / int(b.loss_mask.sum())
    assert found.share == pytest.approx(whole, abs=1e-12) and whole == pytest.approx(0.1, abs=2 * response)
    # the first alone takes half of it: the second switched off
    off = LIMITS[rule][names[1]].value(LIMITS[rule][names[1]].loosest)
    alone = share(dataclasses.replace(made, **{names[1]: off}), b, [0] * 150)
    assert alone == pytest.approx(0.05, abs=2 * response)


def test_what_is_counted_is_what_the_metrics_of_a_run_say() -> None:
    b = batch(60, 20, 5)
    for rule in (r for r in LIMITS if r not in ("cispo", "minpro")):
        judge = cppo.make_rule(rule)
        masked = cppo.metrics(b, judge(b))["trust/masked_fraction"]
        assert Sample.of(b).share(judge) == pytest.approx(masked, abs=1e-12), rule
    for rule in ("cispo", "minpro"):
        judge = cppo.make_rule(rule)
        clamped = cppo.metrics(b, judge(b))["trust/clamped_fraction"]
        assert Sample.of(b).share(judge) == pytest.approx(clamped, abs=1e-12) and clamped > 0
    soft = cppo.CPPO(gate="reciprocal")
    reasons = cppo.metrics(b, soft(b))
    faded = reasons["trust/token_limit_fraction"] + reasons["trust/prefix_budget_fraction"]
    assert Sample.of(b).share(soft) == pytest.approx(faded, abs=1e-12) and faded > 0


def test_a_threshold_lies_in_the_middle_of_what_it_separates() -> None:
    """Three tokens away from mu with D = 0.1, 0.2, 0.4: for a third the limit is the geometric mean of 0.2 and 0.4."""
    logp = torch.full((1, 3), -1.0)
    b = cppo.TokenBatch(logp + 0.1, logp, torch.ones(1), torch.ones(1, 3), divergence=torch.tensor([[0.1, 0.2, 0.4]]))
    found = solve(cppo.DPPO(), ["delta"], Sample.of(b), 1 / 3)
    assert found.thresholds["delta"] == pytest.approx(math.sqrt(0.2 * 0.4), rel=2e-3) and found.share == pytest.approx(
        1 / 3
    )
    # less than half a token is still one token: a threshold that does nothing is none
    assert solve(cppo.DPPO(), ["delta"], Sample.of(b), 0.01).share == pytest.approx(1 / 3)


def test_responses_too_short_for_a_budget_scale_the_defaults() -> None:
    b = batch(400, 1, 0)
    found = solve(cppo.CPPO(), ["delta", "delta_b"], Sample.of(b), 0.1)
    assert found.share == pytest.approx(0.1, abs=0.002)
    assert found.thresholds["delta_b"] / found.thresholds["delta"] == pytest.approx(0.02 / 0.15, rel=1e-4)


def test_padding_and_layout_change_nothing() -> None:
    b = batch(50, 20, 3)
    lengths = b.loss_mask.sum(1)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    assert b.divergence is not None
    flat = [x[b.loss_mask] for x in (b.policy_logp, b.rollout_logp, b.divergence)]
    ones = torch.ones(int(ends[-1]), dtype=torch.bool)
    packed = cppo.TokenBatch(flat[0], flat[1], b.advantages, ones, ends, flat[2])
    for rule, names in LIMITS.items():
        one = solve(cppo.make_rule(rule), list(names), Sample.of(b), 0.05)
        other = solve(cppo.make_rule(rule), list(names), Sample.of(packed), 0.05)
        for name in names:
            assert one.thresholds[name] == pytest.approx(other.thresholds[name], rel=1e-3), rule


def test_sentences() -> None:
    b = batch(20, 10, 0)
    with pytest.raises(Unreachable, match="even without this limit"):
        solve(cppo.CPPO(delta=1e-4), ["delta_b"], Sample.of(b), 0.01)
    with pytest.raises(Unreachable, match="the tightest limit holds back"):
        solve(cppo.DPPO(), ["delta"], Sample.of(b), 0.9)
    with pytest.raises(UserError, match="between 0 and 1"):
        solve(cppo.DPPO(), ["delta"], Sample.of(b), 1.5)
    with pytest.raises(UserError, match="no loss token"):
        Sample.of(dataclasses.replace(b, mask=torch.zeros_like(b.mask)))
    still = dataclasses.replace(b, policy_logp=b.rollout_logp)
    assert not Sample.of(still).moved and Sample.of(b).moved


# -- settings ----------------------------------------------------------------------------------------------------------


def test_auto_in_a_recipe(tmp_path) -> None:
    config = load_config(None, ["delta=auto", "delta_b=auto", "calibration.target=0.02"])
    assert config.rule.automatic == ["delta", "delta_b"] and config.calibration.steps == 4
    # until then the rule's defaults, not the recipe's
    assert config.rule.make() == cppo.CPPO(delta=0.15, delta_b=0.02, budget="fixed")
    assert config.rule.make({"delta": 0.3, "delta_b": 0.1}) == cppo.CPPO(delta=0.3, delta_b=0.1, budget="fixed")
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    with pytest.raises(UserError, match=r"rule.delta and rule.delta_b is auto.*calibration.json"):
        config.make_rule()


def test_every_rule_takes_auto_for_its_thresholds() -> None:
    assert set(LIMITS) == set(cppo.RULES) - {"none"}
    for rule, names in LIMITS.items():
        given = [f"rule.{name}=auto" for name in names]
        assert load_config(None, [f"rule={rule}", *given]).rule.automatic == list(names)
        assert check_automatic(rule, dict.fromkeys(names, "auto")) == list(names)


@pytest.mark.parametrize(
    "settings,words",
    [
        (["rule.budget=auto"], "rule.budget is auto, but it is not a threshold of cppo: delta and delta_b can"),
        (["rule=ppo_clip", "rule.dual_clip=auto"], "not a threshold of ppo_clip"),
        (["rule=none", "rule.delta=auto"], "rule 'none' has no parameter 'delta'"),
        (["rule.deltaa=auto"], "Did you mean 'delta'"),
        (["delta_b=auto", "prefix_budget=false"], "switches the budget off"),
        (["delta=auto", "calibration.target=0"], "calibration.target is 0, expected a number above 0 and below 1"),
        (["delta=auto", "steps=4"], "Set steps=5 or more"),
        (
            ["delta=auto", "optimizer.lr_scheduler=linear", "optimizer.warmup_steps=20"],
            "too tight. Set calibration.steps=5",
        ),
    ],
)
def test_mistakes_are_sentences(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, settings)
    assert words in str(error.value)


def test_verl_is_refused_what_only_a_run_can_find() -> None:
    with pytest.raises(UserError, match=r"rule.delta is auto.*cppo calibrate DUMP --rule dppo"):
        plan("qwen3-1.7b-base", ["rule=dppo", "delta=auto"])
