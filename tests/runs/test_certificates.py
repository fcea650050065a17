"""certificates.jsonl: what is written equals the certificate of the responses seen, whatever the calls' layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cppo
import synthetic
from cppo.engines.trl.batch import BASELINE, GROUP, REWARD, TOKENS, attach_rewards
from cppo.runs.certificates import Responses, certificate_row
from cppo.runs.folder import RunFolder
from cppo.theory import certificate
from cppo.training.recorder import RunRecorder


def seen(
    rows: int = 12, seed: int = 0, holes: bool = True, **kwargs: Any
) -> tuple[cppo.TokenBatch, dict[str, torch.Tensor]]:
    """A minibatch with rewards, three responses per prompt."""
    batch, inputs = synthetic.minibatch(rows=rows, seed=seed, **kwargs)
    mask = batch.loss_mask.clone()
    if holes:
        mask[:, 4:6] = False
    inputs[TOKENS] = inputs[TOKENS] & mask
    return cppo.TokenBatch(batch.policy_logp, batch.rollout_logp, batch.advantages, mask), inputs


def record(folder: Path, kind: str | None = "binary_tv") -> RunRecorder:
    return RunRecorder(folder, synthetic.CharTokenizer(), every=0, updates=2, divergence=kind)


def test_row_equals_the_certificate_of_the_last_update(tmp_path: Path) -> None:
    judge, observer = synthetic.rule(), record(tmp_path)
    early, inputs = seen(seed=3)
    observer(early, judge(early), inputs, 0)
    batch, inputs = seen(seed=4)
    verdict = judge(batch)
    observer(batch, verdict, inputs, 1)
    observer.end_of_step(7)
    (row,) = RunFolder(tmp_path).certificates()
    R, baseline = inputs[REWARD].numpy(), inputs[BASELINE].numpy()
    assert verdict.divergence is not None
    log_ratio = (batch.policy_logp - batch.rollout_logp).numpy()
    expected = certificate(
        verdict.divergence.numpy(), log_ratio, batch.loss_mask.numpy(), R - baseline, xi=0.5, groups=inputs[GROUP]
    )
    for name, value in expected.figures().items():
        assert row[name] == pytest.approx(value, rel=1e-5), name
    assert (row["step"], row["update"], row["groups"], row["xi"]) == (7, 1, 4, 0.5)
    assert row["divergence"] == "binary_tv" and row["certified"] is False
    assert expected.positions is not None
    assert row["width"] == 1 and row["expected"] == pytest.approx(expected.positions.expected.tolist(), rel=1e-5)
    assert row["largest"] == pytest.approx(expected.positions.largest.tolist(), rel=1e-5)
    gain, bound = (pytest.approx(row[name]) for name in ("surrogate", "ratios"))
    assert observer.figures == {"trust/surrogate_gain": gain, "trust/residual_bound": bound}


def test_micro_batches_and_padding_change_nothing(tmp_path: Path) -> None:
    judge = synthetic.rule()
    batch, inputs = seen()
    whole, split = record(tmp_path / "whole"), record(tmp_path / "split")
    whole(batch, judge(batch), inputs, 0)
    for rows, pad in ((slice(0, 5), 3), (slice(5, 12), 0)):
        wide = [torch.nn.functional.pad(x[rows], (0, pad)) for x in (batch.policy_logp, batch.rollout_logp, batch.mask)]
        part = cppo.TokenBatch(wide[0], wide[1], batch.advantages[rows], wide[2])
        own = {name: value[rows] for name, value in inputs.items()}
        own[TOKENS] = torch.nn.functional.pad(own[TOKENS], (0, pad))
        split(part, judge(part), own, 0)
    for observer in (whole, split):
        observer.end_of_step(1)
    (a,), (b,) = RunFolder(tmp_path / "whole").certificates(), RunFolder(tmp_path / "split").certificates()
    assert a == b


def test_groups_without_spread_count_for_the_gain_alone(tmp_path: Path) -> None:
    """The zero-spread filter takes their loss tokens: L' and the ratios are over all responses, D_t over the others. A
    response that no reward function scored is left out of both.
    """
    judge = synthetic.rule()
    batch, inputs = seen(holes=False)
    mask = batch.loss_mask.clone()
    mask[3:6] = False
    inputs[REWARD] = inputs[REWARD].clone()
    inputs[REWARD][0] = math.nan
    filtered = cppo.TokenBatch(batch.policy_logp, batch.rollout_logp, batch.advantages, mask)
    verdict = judge(filtered)
    observer = record(tmp_path)
    observer(filtered, verdict, inputs, 0)
    observer.end_of_step(1)
    (row,) = RunFolder(tmp_path).certificates()
    R, log_ratio = inputs[REWARD] - inputs[BASELINE], batch.policy_logp - batch.rollout_logp
    assert verdict.divergence is not None
    for rows, names in (
        (torch.arange(1, 12), ("surrogate", "ratios", "improvement_low", "responses", "tokens")),
        (torch.tensor([1, 2, *range(6, 12)]), ("pathwise", "prop4_high", "product")),
    ):
        tokens = (batch.loss_mask if len(rows) == 11 else mask)[rows]
        D = verdict.divergence[rows] if len(rows) == 8 else None
        found = certificate(D, log_ratio[rows], tokens, R[rows], xi=0.5, groups=inputs[GROUP][rows])
        for name in names:
            assert row[name] == pytest.approx(found.figures()[name], rel=1e-5), name
    assert row["responses"] == 11 and row["scored_responses"] == 8


def test_kl_becomes_tv_by_pinsker_and_rewards_widen_xi() -> None:
    batch, inputs = seen()
    kl = torch.rand(batch.policy_logp.shape) * 0.1
    inputs[REWARD] = inputs[REWARD] * 4 - 1

    given = {
        name: inputs[key].numpy()
        for name, key in (("tokens", TOKENS), ("reward", REWARD), ("baseline", BASELINE), ("group", GROUP))
    }
    log_ratio = (batch.policy_logp - batch.rollout_logp).numpy()
    responses = Responses(log_ratio=log_ratio, mask=batch.loss_mask.numpy(), divergence=kl.numpy(), **given)
    row = certificate_row([responses], "exact_kl")
    assert row is not None and row["certified"] is True
    R = inputs[REWARD].numpy()
    assert row["xi"] == pytest.approx((max(1, R.max()) - min(0, R.min())) / 2)
    first = np.sqrt(kl.numpy() / 2)[:, 0]
    assert row["largest"][0] == pytest.approx(first.max(), rel=1e-5)


def test_a_rule_without_divergence_has_the_bound_from_ratios(tmp_path: Path) -> None:
    batch, inputs = seen()
    with_divergence, without = record(tmp_path / "with"), record(tmp_path / "without", None)
    with_divergence(batch, synthetic.rule()(batch), inputs, 0)
    without(batch, cppo.PPOClip()(batch), inputs, 0)
    for observer in (with_divergence, without):
        observer.end_of_step(1)
    (a,), (b,) = RunFolder(tmp_path / "with").certificates(), RunFolder(tmp_path / "without").certificates()
    assert b["divergence"] is None and not b["certified"]
    assert all(a[name] == b[name] for name in ("surrogate", "ratios", "improvement_low", "tokens", "horizon"))
    assert "pathwise" not in b and "expected" not in b


def test_no_certificate_without_rewards_or_finite_numbers(tmp_path: Path) -> None:
    judge = synthetic.rule()
    batch, inputs = seen()
    observer = record(tmp_path)
    observer(batch, judge(batch), {name: value for name, value in inputs.items() if not name.startswith("trust_")}, 0)
    observer.end_of_step(1)
    broken = batch.policy_logp.clone()
    broken[0, 0] = math.nan
    bad = cppo.TokenBatch(broken, batch.rollout_logp, batch.advantages, batch.loss_mask)
    observer(bad, judge(bad), inputs, 0)
    observer.end_of_step(2)
    assert RunFolder(tmp_path).certificates() == [] and observer.figures == {}


def test_resume_cuts_the_certificates(tmp_path: Path) -> None:
    judge, observer = synthetic.rule(), record(tmp_path)
    for step in (1, 2, 3):
        batch, inputs = seen(seed=step)
        observer(batch, judge(batch), inputs, 0)
        observer.end_of_step(step)
    before = RunFolder(tmp_path).certificates()
    observer.truncate_after(1)
    assert RunFolder(tmp_path).certificates() == before[:1]
    batch, inputs = seen(seed=2)
    observer(batch, judge(batch), inputs, 0)
    observer.end_of_step(2)
    assert RunFolder(tmp_path).certificates() == before[:2]


def test_rewards_baseline_and_group() -> None:
    """Two processes of six responses, three a prompt, two reward functions of which one may have no score."""
    rewards = torch.tensor([[i % 4, 10.0 * i] for i in range(12)])
    rewards[2, 1], rewards[5] = math.nan, math.nan
    weights = torch.tensor([1.0, 0.5])
    R = [1.0 * (i % 4) + (5.0 * i if i != 2 else 0.0) if i != 5 else math.nan for i in range(12)]
    for rank in (0, 1):
        output = {"completion_mask": torch.ones(6, 3)}
        attach_rewards(output, rewards, weights, 3, rank)
        for row in range(6):
            at = 6 * rank + row
            group = at // 3
            others = [R[j] for j in range(3 * group, 3 * group + 3) if j != at and not math.isnan(R[j])]
            assert int(output[GROUP][row]) == group
            if at != 5:
                assert float(output[REWARD][row]) == pytest.approx(R[at])
                assert float(output[BASELINE][row]) == pytest.approx(sum(others) / len(others))
            else:
                assert math.isnan(float(output[REWARD][row]))
