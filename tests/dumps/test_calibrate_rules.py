"""`cppo calibrate DUMP --rule R`: what is proposed holds back what `cppo inspect` then counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cppo
from cppo.cli.calibrate import calibrate
from cppo.dumps.calibrate import propose_rules, thresholds_asked
from cppo.dumps.dump import read_dump, write_dump
from cppo.dumps.inspect import inspect_dump
from cppo.errors import UserError
from cppo.thresholds import LIMITS
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


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    path = tmp_path / "dump.jsonl"
    write_dump(path, responses())
    return path


@pytest.mark.parametrize("update", ["last", "all"])
def test_inspect_counts_what_was_asked_for(dump: Path, update: str) -> None:
    wanted = {name: {} for name in LIMITS}
    report = propose_rules(read_dump(dump), wanted, 0.05, update)
    rules = [cppo.make_rule(name, **entry["thresholds"]) for name, entry in report["rules"].items()]
    shown = inspect_dump(read_dump(dump), rules, update)["rules"]
    tokens = report["loss_tokens"]
    for name, entry in report["rules"].items():
        reasons = shown[name]["reasons"]
        held = sum(reasons[reason] for reason in ("token_limit", "prefix_budget", "sequence_limit", "ratio_clip"))
        if update == "last":  # with several updates inspect pools the tokens, and the target is the mean of updates
            assert entry["share"] == pytest.approx(held, abs=1e-9)
        whole = 30 / tokens if name.startswith("trm") else 2 / tokens
        assert entry["share"] == pytest.approx(0.05, abs=2 * whole)
    assert list(report["rules"]["cispo"]["thresholds"]) == ["ratio_max"]
    assert set(report["rules"]["cppo"]["thresholds"]) == {"delta", "delta_b"}


def test_all_updates_need_tighter_limits_than_the_last(dump: Path) -> None:
    last, every = (propose_rules(read_dump(dump), {"dppo": {}}, 0.05, which) for which in ("last", "all"))
    assert every["rules"]["dppo"]["thresholds"]["delta"] < last["rules"]["dppo"]["thresholds"]["delta"]
    assert every["loss_tokens"] > last["loss_tokens"]


def test_what_is_given_stays(dump: Path) -> None:
    assert thresholds_asked("cppo", {"delta": 0.5, "w_min": 0.7}) == (["delta_b"], {"delta": 0.5, "w_min": 0.7})
    assert thresholds_asked("cispo", {"ratio_min": "auto"}) == (["ratio_min"], {})
    assert thresholds_asked("cppo", {"prefix_budget": False})[0] == ["delta"]
    found = propose_rules(read_dump(dump), {"cppo": {"delta": 0.5, "budget": "fixed"}}, 0.05)["rules"]["cppo"]
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
        ({"rule": ["cppo"], "settings": ["cppo.budget=auto"]}, "no threshold of cppo"),
        ({"rule": ["dppo"], "delta": 0.1}, "leave --rule out"),
        ({"settings": ["cppo.delta=0.1"]}, "--set needs --rule"),
        ({"rule": ["dppo"], "update": "3"}, "expected last or all"),
    ],
)
def test_mistakes_are_sentences(dump: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        calibrate(dump, **options)
    assert words in str(error.value)
    assert isinstance(error.value, UserError | ValueError)
