"""`cppo calibrate`: what is proposed holds back what `cppo inspect` counts, and what counting one by one gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cppo
from cppo import divergence
from cppo.cli.calibrate import calibrate
from cppo.dumps.calibrate import calibrate_dump, thresholds_asked, translate
from cppo.dumps.dump import read_dump, write_dump
from cppo.dumps.inspect import inspect_dump
from cppo.errors import UserError
from cppo.thresholds import Sample
from said import said


def responses(count: int = 120, updates: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a dump: at the later update pi has moved further."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(random.integers(5, 30))
        update = number % updates
        rollout = -random.random(length) * 2.5 - 0.02
        moved = 0.25 * (1 + update) * np.linspace(0.3, 1.5, length) * random.standard_normal(length)
        policy = np.minimum(rollout + moved, -1e-3)
        advantage = float(random.standard_normal())
        row = {"rollout_logp": rollout.tolist(), "policy_logp": policy.tolist(), "advantage": advantage}
        rows.append(row | {"step": 1, "update": update})
    return rows


def batch(rows: int = 64, length: int = 80, drift: float = 0.4, seed: int = 0) -> cppo.TokenBatch:
    """Padded responses whose divergence from mu grows along them; NaN in the padding."""
    g = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(rows, length, generator=g) * 2.5 - 0.02
    growth = torch.linspace(0.2, 1.5, length)
    policy = (rollout + drift * growth * torch.randn(rows, length, generator=g)).clamp(max=-1e-3)
    mask = torch.arange(length)[None] < torch.randint(length // 3, length + 1, (rows, 1), generator=g)
    policy = torch.where(mask, policy, float("nan"))
    found = cppo.TokenBatch(policy, rollout, torch.randn(rows, generator=g), mask)
    return found.with_divergence(divergences_of(found)["binary_tv"])


def divergences_of(b: cppo.TokenBatch) -> dict[str, torch.Tensor]:
    logp = b.clean(b.policy_logp), b.clean(b.rollout_logp)
    return {"binary_tv": divergence.binary_tv(*logp), "binary_kl": divergence.binary_kl(*logp)}


def samples_of(b: cppo.TokenBatch) -> dict[str, Sample]:
    return {name: Sample.of(b.with_divergence(D)) for name, D in divergences_of(b).items()}


def dropped_by_dppo(b: cppo.TokenBatch, D: torch.Tensor, delta: float) -> float:
    """A token at a time."""
    count = total = 0
    for row in range(b.policy_logp.shape[0]):
        for t in range(b.policy_logp.shape[1]):
            if b.loss_mask[row, t]:
                total += 1
                change = float(b.policy_logp[row, t] - b.rollout_logp[row, t])
                count += float(b.advantages[row]) * change > 0 and float(D[row, t]) > delta
    return count / total


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    path = tmp_path / "dump.jsonl"
    write_dump(path, responses())
    return path


@pytest.mark.parametrize("update", ["last", "all"])
def test_inspect_counts_what_was_asked_for(dump: Path, update: str) -> None:
    wanted = {name: {} for name, rule in cppo.RULES.items() if rule.limits}
    report = calibrate_dump(read_dump(dump), wanted, 0.05, update)
    rules = [cppo.make_rule(name, **entry["thresholds"]) for name, entry in report["rules"].items()]
    shown = inspect_dump(read_dump(dump), rules, update)["rules"]
    tokens = report["loss_tokens"]
    for name, entry in report["rules"].items():
        reasons = shown[name]["reasons"]
        held = sum(
            reasons[reason] for reason in ("token_limit", "prefix_budget", "sequence_limit", "ratio_clip", "clamped")
        )
        if update == "last":  # with several updates inspect pools the tokens, and the target is the mean of updates
            assert entry["share"] == pytest.approx(held, abs=1e-9)
        whole = 30 / tokens if name.startswith("trm") else 2 / tokens
        assert entry["share"] == pytest.approx(0.05, abs=2 * whole)
    assert list(report["rules"]["cispo"]["thresholds"]) == ["ratio_max"]
    assert set(report["rules"]["cppo"]["thresholds"]) == {"delta", "delta_b"}


def test_all_updates_need_tighter_limits_than_the_last(dump: Path) -> None:
    last, every = (calibrate_dump(read_dump(dump), {"dppo": {}}, 0.05, which) for which in ("last", "all"))
    assert every["rules"]["dppo"]["thresholds"]["delta"] < last["rules"]["dppo"]["thresholds"]["delta"]
    assert every["loss_tokens"] > last["loss_tokens"]


def test_what_is_given_stays(dump: Path) -> None:
    assert thresholds_asked("cppo", {"delta": 0.5, "w_min": 0.7}) == (["delta_b"], {"delta": 0.5, "w_min": 0.7})
    assert thresholds_asked("cispo", {"ratio_min": "auto"}) == (["ratio_min"], {})
    assert thresholds_asked("cppo", {"prefix_budget": False})[0] == ["delta"]
    found = calibrate_dump(read_dump(dump), {"cppo": {"delta": 0.5, "budget": "fixed"}}, 0.05)["rules"]["cppo"]
    assert list(found["thresholds"]) == ["delta_b"] and found["share"] == pytest.approx(0.05, abs=0.003)


def test_the_command(dump: Path) -> None:
    text = said(calibrate, dump, 0.05, rule=["dppo", "cispo", "trm_max"])
    assert "ratio_max=" in text and "clamped" in text and "seen at the last update of each step" in text
    text = said(calibrate, dump, 0.05, as_json=True, rule=["cppo"], settings=["cppo.delta=0.5"], update="all")
    report = json.loads(text)
    assert report["rules"]["cppo"]["given"] == {"w_min": 0.8, "budget": "adaptive", "delta": 0.5}
    # one rule that cannot is a note beside the others; alone it is an error
    assert "the tightest limit holds back" in said(calibrate, dump, 0.9, rule=["dppo", "trm_max"])


@pytest.mark.parametrize(
    "options,words",
    [
        ({"rule": ["dppo"], "target": 0.9}, "the tightest limit holds back"),
        ({"rule": ["none"]}, "rule none has no threshold"),
        ({"rule": ["dpo"]}, "there is no rule 'dpo'"),
        ({"rule": ["dppo"], "settings": ["dppo.delta=0.1"]}, "no threshold left: delta are given"),
        ({"rule": ["cppo"], "settings": ["cppo.budget=auto"]}, "not a threshold of cppo"),
        ({"rule": ["dppo"], "delta": 0.1}, "leave --rule out"),
        ({"delta": 5.0}, "no token moves away from the rollout policy with binary_tv > 5"),
        ({"settings": ["trm_max.delta=0.1"]}, "the rule trm_max is not shown"),
        ({"rule": ["dppo"], "update": "3"}, "expected last or all"),
    ],
)
def test_mistakes_are_sentences(dump: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        calibrate(dump, **options)
    assert words in str(error.value)
    assert isinstance(error.value, UserError | ValueError)


# ------------------------------------------------------------------------------------------ CPPO, DPPO and other limits


def translated(rows: list[dict[str, Any]], path: Path, target: float, **cppo_settings: Any) -> dict[str, Any]:
    write_dump(path, rows)
    return calibrate_dump(read_dump(path), {"cppo": cppo_settings, "dppo": {}}, target, translated=True)


@pytest.mark.parametrize("target", [0.01, 0.05])
@pytest.mark.parametrize("budget", ["fixed", "adaptive"])
def test_half_of_the_target_by_the_token_limit_and_the_rest_by_the_budget(
    tmp_path: Path, target: float, budget: str
) -> None:
    found = translated(responses(400, updates=1), tmp_path / "d.jsonl", target, budget=budget)
    entry = found["rules"]["cppo"]
    whole = 1 / found["loss_tokens"]
    assert entry["reasons"]["token_limit"] == pytest.approx(target / 2, abs=whole)
    assert entry["share"] == pytest.approx(target, abs=2 * whole)
    assert sum(entry["reasons"].values()) == pytest.approx(entry["share"], abs=1e-12)
    assert found["rules"]["dppo"]["share"] == pytest.approx(target, abs=whole)
    assert found["translation"]["delta"] == entry["thresholds"]["delta"]


def test_pinned_numbers(tmp_path: Path) -> None:
    """What a second solver, quantiles and a bisection of its own, gave on the same tokens."""
    found = translated(responses(400, updates=1), tmp_path / "d.jsonl", 0.05)
    rules, translation = found["rules"], found["translation"]
    assert rules["cppo"]["thresholds"] == pytest.approx({"delta": 0.18471, "delta_b": 0.03052}, rel=5e-4)
    assert rules["dppo"]["thresholds"] == pytest.approx({"delta": 0.15498}, rel=5e-4)
    assert translation["limits"] == pytest.approx({"binary_kl": 0.1279, "binary_tv": 0.18471}, rel=0.02)
    assert translation["clip"] == pytest.approx({"eps_low": 0.3773, "eps_high": 0.5141}, rel=0.005)


def test_a_budget_that_cannot_bind_is_said(tmp_path: Path) -> None:
    """Responses of one token have no prefix: delta takes the whole target."""
    random = np.random.default_rng(0)
    rows = [
        {"rollout_logp": [-1.0], "policy_logp": [-1 + 0.3 * z], "advantage": float(random.standard_normal())}
        for z in random.standard_normal(400)
    ]
    entry = translated(rows, tmp_path / "d.jsonl", 0.1)["rules"]["cppo"]
    assert list(entry["reasons"]) == ["token_limit"] and entry["share"] == pytest.approx(0.1, abs=0.003)
    assert "the prefix budget holds nothing back" in said(calibrate, tmp_path / "d.jsonl", 0.1)


def test_translated_limits_drop_the_same_share() -> None:
    b = batch(seed=3)
    kinds = divergences_of(b)
    found = translate(samples_of(b), "binary_tv", 0.12)
    share = dropped_by_dppo(b, kinds["binary_tv"], 0.12)
    assert found["limits"]["binary_tv"] == 0.12
    assert dropped_by_dppo(b, kinds["binary_kl"], found["limits"]["binary_kl"]) == pytest.approx(share, abs=1e-12)
    verdict = cppo.PPOClip(**found["clip"])(b)
    clipped = int((verdict.reason == cppo.Reason.RATIO_CLIP).sum()) / int(b.loss_mask.sum())
    assert clipped == pytest.approx(share, abs=1.5 / int(b.loss_mask.sum()))


def test_one_side_of_the_ratio_without_a_dropped_token_has_no_clip_range() -> None:
    b = batch(seed=3)
    b = cppo.TokenBatch(b.policy_logp, b.rollout_logp, b.advantages.abs(), b.loss_mask)
    clip = translate(samples_of(b), "binary_tv", 0.12)["clip"]
    assert clip["eps_low"] is None and clip["eps_high"] > 0


def test_the_reference_must_be_there() -> None:
    with pytest.raises(UserError, match="the reference is 'exact_tv', and there are binary_tv, binary_kl"):
        translate(samples_of(batch(rows=4, length=9)), "exact_tv", 0.1)
