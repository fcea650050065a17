"""The token view's data: equal to the rules themselves, and within its budget."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import cppo
from cppo import Reason
from cppo.dumps.dump import read_dump
from cppo.dumps.inspect import judge
from cppo.dumps.scores import Scores
from cppo.files import read_jsonl
from cppo.report.figures import draw_threshold
from cppo.report.judges import Judge, judge_tokens, judges_of, recorded
from cppo.report.source import open_source
from cppo.report.tokens import _candidates, spread, token_data

from .made import EVIL, STEPS, plan_of, write_run


def encoded(*arguments):
    return [candidate.data() for candidate in _candidates(*arguments)]


@pytest.fixture(scope="module")
def dump(study):
    return read_dump(study / "runs" / "cppo-seed0" / "samples" / f"step-{STEPS:06d}.jsonl")


def test_every_rule_is_there_and_the_studys_first(study):
    judges = judges_of(open_source(study))
    assert [one.variant for one in judges[:2]] == ["dppo", "cppo"]
    assert {one.rule.name for one in judges} == set(cppo.RULES) - {"none"}
    alone = judges_of(open_source(study / "runs" / "cppo-seed0"))
    dppo = next(one.rule for one in alone if one.label == "dppo")
    assert (dppo.delta, dppo.divergence) == (0.15, "binary_tv"), "the run's own limit, as in cppo compare"


@pytest.mark.parametrize("name", sorted(set(cppo.RULES) - {"none"}))
def test_judged_as_inspect_does(dump, name):
    rule, scores = cppo.make_rule(name), Scores(dump)
    mine = judge_tokens(rule, dump, scores)
    theirs = judge(rule, dump, scores.asked_for(rule)[1])
    assert (mine.reason[dump.mask] == theirs.reason).all()
    assert ((mine.coefficient == 0)[dump.mask] == theirs.dropped).all()


def test_what_is_left_of_the_budget(dump):
    """delta + delta_b W_{t-1} - S_{t-1}, token by token; and c_t = min(delta, left) = w_t threshold_t (Eq. 8)."""
    rule = cppo.CPPO(delta=0.15, delta_b=0.02, divergence="binary_tv")
    found = judge_tokens(rule, dump, Scores(dump))
    D = np.abs(np.exp(dump.policy_logp) - np.exp(dump.rollout_logp))
    for row in range(len(dump.lengths)):
        tokens = [t for t in range(dump.cu_seqlens[row], dump.cu_seqlens[row + 1]) if dump.mask[t]]
        T, S, W = len(tokens), 0.0, 0.0
        for place, t in enumerate(tokens):
            w = 1 - (1 - rule.w_min) * place / max(T - 1, 1)
            left = rule.delta + float(found.delta_b[row]) * W - S
            assert found.weight[t] == pytest.approx(w, rel=1e-5)
            assert found.left[t] == pytest.approx(left, rel=1e-3, abs=1e-5)
            assert w * found.threshold[t] == pytest.approx(min(rule.delta, left), rel=1e-3, abs=1e-5)
            S, W = S + w * float(D[t]), W + w


def test_what_was_recorded_counts(study, dump):
    file = study / "runs" / "cppo-seed0" / "samples" / f"step-{STEPS:06d}.jsonl"
    rows = read_jsonl(file)
    rows[0]["reason"][0] = "prefix_budget" if rows[0]["reason"][0] == "kept" else "kept"
    rule = open_source(study / "runs" / "cppo-seed0").runs[0].rule
    judged = judge_tokens(rule, dump, Scores(dump))
    found = recorded(judged, rows)
    names = [reason for row in rows for reason in row["reason"]]
    assert [Reason(code).name.lower() for code in found.reason] == names
    assert (found.reason != judged.reason).sum() == 1, "the file says the same as the rule but for that token"
    np.testing.assert_allclose(found.threshold[dump.mask], judged.threshold[dump.mask], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["cppo", "dppo", "ppo_clip", "cispo", "minpro", "trm_max"])
def test_the_page_can_tell_every_coefficient(dump, name):
    """As templates/tokens.js does: c where given, else 0 for held-back tokens, else the ratio."""
    rule = cppo.make_rule(name) if name != "cppo" else cppo.CPPO(divergence="binary_tv")
    verdict = rule(dump.packed(Scores(dump).asked_for(rule)[1]))
    held = (Reason.TOKEN_LIMIT, Reason.PREFIX_BUDGET, Reason.SEQUENCE_LIMIT, Reason.RATIO_CLIP, Reason.CLAMPED)
    for row, response in enumerate(encoded(dump, [Judge(name, rule)], "run")):
        given = response["verdicts"][0]
        start = int(dump.cu_seqlens[row])
        for t, code in enumerate(given["r"]):
            if not dump.mask[start + t]:
                assert int(code) == Reason.OUTSIDE
                continue
            c = 0.0 if int(code) in held else float(np.exp(response["log"][t]))
            c = given.get("c", {}).get(str(t), c)
            assert c == pytest.approx(float(verdict.coefficient[start + t]), rel=2e-3, abs=2e-3)


def test_a_response_is_text_and_numbers(study):
    found = token_data(open_source(study), 3_000_000)
    assert found.runs == ["dppo-seed0", "cppo-seed0", "dppo-seed1", "cppo-seed1"]
    assert len(found.responses) == 4 * 2 * 3, "runs, sampled steps, responses per step"
    for response in found.responses:
        T = len(response["tokens"])
        assert T == response["length"] == len(response["log"]) == len(response["mu"])
        assert all(len(verdict["r"]) == T for verdict in response["verdicts"])
        assert found.judges[response["own"]].variant == response["variant"]
    assert any(EVIL in token for response in found.responses for token in response["tokens"])


def test_more_variants_than_strips(study, monkeypatch):
    monkeypatch.setattr("cppo.report.judges.MOST", 1)
    found = token_data(open_source(study), 3_000_000)
    assert [one.label for one in found.judges] == ["dppo"]
    for response in found.responses:
        rules = [one.label for one in found.judges] + ([response["extra"]["label"]] if "extra" in response else [])
        assert rules[response["own"]] == response["variant"] and len(response["verdicts"]) == len(rules)
    assert draw_threshold(found.as_json()).axes[0].get_title(loc="left").startswith("cppo:")


def test_the_budget_is_kept_and_shared(study):
    whole = token_data(open_source(study), 3_000_000)
    sizes = [len(json.dumps(response, separators=(",", ":"))) for response in whole.responses]
    budget = 6 * max(sizes)
    found = token_data(open_source(study), budget)
    assert sum(len(json.dumps(r, separators=(",", ":"))) for r in found.responses) <= budget
    assert {response["run"] for response in found.responses} == set(whole.runs), "each run has one before any has two"
    assert {r["run"] for r in found.responses if r["step"] == STEPS} == set(whole.runs), "the last step first"
    assert "were left out" in found.notes[-1]


def test_a_long_response_is_cut_but_judged_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("cppo.report.tokens.LONGEST", 50)
    config = plan_of(tmp_path / "plan", ("cppo",), 1).trained[0].config
    folder = write_run(tmp_path / "run", config, length=120)
    found = token_data(open_source(folder), 3_000_000)
    dump = read_dump(folder / "samples" / f"step-{STEPS:06d}.jsonl")
    last = [response for response in found.responses if response["step"] == STEPS]
    for row, response in enumerate(last):
        assert response["length"] == dump.lengths[row] > 50 == len(response["tokens"])
        weights = response["verdicts"][response["own"]]["w"]
        T = int(dump.loss_tokens[row])
        assert weights[49] == pytest.approx(1 - 0.2 * 49 / (T - 1), rel=1e-3), "w_t runs over the whole response"


def test_relative_log_prob_error(study):
    found = token_data(open_source(study / "runs" / "dppo-seed1"), 3_000_000)
    (line,) = found.relative.lines
    for step, value in zip(line.x, line.y, strict=True):
        rows = read_jsonl(study / "runs" / "dppo-seed1" / "samples" / f"step-{step:06d}.jsonl")
        pairs = [
            (p, m) for r in rows for p, m in zip(r["policy_logp"], r["rollout_logp"], strict=True) if m is not None
        ]
        assert value == pytest.approx(sum(abs(p - m) for p, m in pairs) / sum(abs(m) for _, m in pairs), rel=1e-4)


def test_samples_without_loss_tokens(tmp_path, study):
    folder = tmp_path / "run"
    shutil.copytree(study / "runs" / "cppo-seed0", folder)
    for file in (folder / "samples").iterdir():
        rows = [row | {"mask": [0] * len(row["mask"])} for row in read_jsonl(file)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = token_data(open_source(folder), 3_000_000)
    assert found.responses == [] and "has a loss token" in found.notes[0]


def test_damaged_samples_are_a_note(tmp_path, study):
    folder = tmp_path / "run"
    shutil.copytree(study / "runs" / "cppo-seed0", folder)
    file = folder / "samples" / f"step-{STEPS:06d}.jsonl"
    rows = read_jsonl(file)
    rows[0]["policy_logp"][0] = 3.0
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = token_data(open_source(folder), 3_000_000)
    assert any("positive" in note for note in found.notes) and found.responses, "the other step is shown"


def test_spread():
    files = list(range(10))
    assert spread(files, 20) == files and spread(files, 4) == [0, 3, 6, 9]


def test_masked_out_tokens_have_no_numbers(dump):
    mask = dump.mask.copy()
    mask[2] = False
    (first, *_) = encoded(replace(dump, mask=mask), [Judge("cppo", cppo.CPPO(divergence="binary_tv"))], "run")
    assert (
        first["mask"][2] == "0" and first["log"][2] is None and first["verdicts"][0]["r"][2] == str(int(Reason.OUTSIDE))
    )
    assert torch.isfinite(torch.tensor([x for x in first["log"] if x is not None])).all()
