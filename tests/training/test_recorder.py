"""What the recorder writes equals what the rule decided, whatever the layout of calls; resume gives the same bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

import cppo
import synthetic
from cppo import files
from cppo.files import read_jsonl
from cppo.runs.folder import RunFolder
from cppo.runs.positions import MAX_BUCKETS, by_position
from cppo.runs.records import judged
from cppo.runs.samples import pick_response
from cppo.training import recorder as recording
from cppo.training.recorder import RunRecorder


def recorder(folder: Path, **kwargs: int) -> RunRecorder:
    return RunRecorder(folder, synthetic.CharTokenizer(), **({"every": 1, "count": 3, "updates": 2} | kwargs))


def test_metrics_round_trip(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).metrics() == []
    row = {"step": 1, "update": 0, "kind": "train", "loss": float("nan"), "reward": torch.tensor(0.5), "x": math.inf}
    RunFolder(tmp_path).append_metrics(row, {"step": 1, "update": 0, "kind": "evaluation", "avg/mean": 0.25})
    assert RunFolder(tmp_path).metrics("train") == [row | {"loss": None, "reward": 0.5, "x": None}]
    assert len(RunFolder(tmp_path).metrics()) == 2
    with pytest.raises(ValueError, match="without 'kind'"):
        RunFolder(tmp_path).append_metrics({"step": 1, "update": 0})


def test_by_position_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    for longest, width in ((1, 1), (128, 1), (129, 2), (1000, 8)):
        positions = torch.randint(0, longest, (3000,), generator=generator)
        positions[0] = longest - 1
        scores = torch.rand(3000, generator=generator, dtype=torch.float64)
        held = (torch.rand(3000, generator=generator) < 0.1).double()
        scores[5] = float("nan")
        row = by_position(positions, scores, held)
        assert row["width"] == width and len(row["count"]) == -(-longest // width) <= MAX_BUCKETS
        for bucket in range(len(row["count"])):
            inside = (positions // width == bucket).tolist()
            values = [v for v, at in zip(scores.tolist(), inside, strict=True) if at]
            assert row["count"][bucket] == len(values)
            assert row["held_back"][bucket] == sum(h for h, at in zip(held.tolist(), inside, strict=True) if at)
            values = sorted((v for v in values if not math.isnan(v)), reverse=True)
            if values:
                top = values[: math.ceil(0.1 * len(values))]
                assert row["mean"][bucket] == pytest.approx(sum(values) / len(values))
                assert row["tail_mean"][bucket] == pytest.approx(sum(top) / len(top))
            else:
                assert row["mean"][bucket] is None


def test_judged_updates_are_those_in_which_a_rule_saw_a_token() -> None:
    batch, _ = synthetic.minibatch(seed=1)
    judge = synthetic.rule()
    nothing = cppo.TokenBatch(batch.policy_logp, batch.rollout_logp, batch.advantages, torch.zeros_like(batch.mask))
    rows = [
        {"kind": "train", "update": update, **cppo.metrics(of, judge(of))}
        for update, of in enumerate((batch, nothing, batch))
    ]
    rows += [{"kind": "evaluation", "avg/mean": 0.5}, {"kind": "train", "update": 3, "loss": 0.1}]
    assert rows[1]["trust/masked_fraction"] == 0
    assert [row["update"] for row in judged(rows)] == [0, 2]


def test_positions_are_of_the_last_update_and_count_loss_tokens(tmp_path: Path) -> None:
    judge, record = synthetic.rule(), recorder(tmp_path)
    early, inputs = synthetic.minibatch(seed=1)
    batch, inputs = synthetic.minibatch(seed=2)
    mask = batch.mask.clone()
    mask[:, 3:6] = False  # a tool's output
    batch = cppo.TokenBatch(batch.policy_logp, batch.rollout_logp, batch.advantages, mask)
    record(early, judge(early), inputs, 0)
    verdict = judge(batch)
    record(batch, verdict, inputs, 1)
    record.end_of_step(1)
    (row,) = read_jsonl(tmp_path / "positions.jsonl")
    assert row["step"] == 1 and row["update"] == 1 and row["width"] == 1
    assert sum(row["count"]) == row["tokens"][1] == int(mask.sum()) and row["tokens"][0] == int(early.mask.sum())
    fourth = verdict.divergence[:, 6].double()  # column 6 is position 4: three columns are no loss tokens
    assert row["mean"][3] == pytest.approx(float(fourth.mean()), rel=1e-6)
    assert row["tail_mean"][3] == pytest.approx(float(fourth.max()), rel=1e-6)
    for code in cppo.Reason:
        if code != cppo.Reason.OUTSIDE:
            assert row["reasons"][code.name.lower()][1] == int((verdict.reason == code).sum())
    stats = cppo.metrics(batch, verdict)
    assert sum(row["held_back"]) / row["tokens"][1] == pytest.approx(stats["trust/masked_fraction"])


def test_micro_batches_and_padding_change_nothing(tmp_path: Path) -> None:
    judge = synthetic.rule()
    batch, inputs = synthetic.minibatch(rows=8)
    whole, split = recorder(tmp_path / "whole"), recorder(tmp_path / "split")
    whole(batch, judge(batch), inputs, 1)
    for rows in (slice(0, 3), slice(3, 8)):
        pad = [torch.nn.functional.pad(x[rows], (0, 5)) for x in (batch.policy_logp, batch.rollout_logp, batch.mask)]
        part = cppo.TokenBatch(pad[0], pad[1], batch.advantages[rows, None], pad[2])
        padded = {
            k: torch.nn.functional.pad(v[rows], (0, 5 if "completion" in k or k == "trust_tokens" else 0))
            for k, v in inputs.items()
        }
        split(part, judge(part), padded, 1)
    for record in (whole, split):
        record.end_of_step(4)
    for name in ("positions.jsonl", "samples/step-000004.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "split" / name).read_text()


def test_samples_hold_what_the_rule_decided(tmp_path: Path) -> None:
    judge, record = synthetic.rule(), recorder(tmp_path, count=5)
    batch, inputs = synthetic.minibatch(rows=8, drift=0.12, seed=3)
    verdict = judge(batch)
    record(batch, verdict, inputs, 0)
    record.end_of_step(10)
    rows = RunFolder(tmp_path).samples()
    held = torch.isin(verdict.reason, torch.tensor([2, 3, 4, 5])).any(-1).tolist()
    assert 0 < sum(held) < 8, "the data must have both kinds of rows"
    expected = [i for i in range(8) if held[i]] + [i for i in range(8) if not held[i]]
    assert [row["row"] for row in rows] == expected[:5]
    tokenizer = synthetic.CharTokenizer()
    for row in rows:
        at, length = row["row"], int(batch.mask[row["row"]].sum())
        assert row["ids"] == inputs["completion_ids"][at, :length].tolist()
        assert row["response"] == "".join(row["tokens"]) == tokenizer.decode(row["ids"])
        assert row["prompt"] == tokenizer.decode(inputs["prompt_ids"][at, 1:].tolist())
        names = [cppo.Reason(code).name.lower() for code in verdict.reason[at, :length].tolist()]
        assert row["reason"] == names and row["mask"] == [1] * length
        log_ratio = (batch.policy_logp - batch.rollout_logp)[at, :length]
        assert row["log_ratio"] == pytest.approx(log_ratio.tolist(), rel=1e-5, abs=1e-9)
        assert row["ratio"] == pytest.approx(log_ratio.exp().tolist(), rel=1e-5)
        assert row["divergence"] == pytest.approx(verdict.divergence[at, :length].tolist(), rel=1e-5)
        assert row["threshold"] == pytest.approx(verdict.threshold[at, :length].tolist(), rel=1e-5)
        assert row["coefficient"] == pytest.approx(verdict.coefficient[at, :length].tolist(), rel=1e-5)
        assert row["advantage"] == pytest.approx(float(batch.advantages[at]), rel=1e-5)
        assert row["budget_used"] == pytest.approx(float(verdict.budget_used[at]), rel=1e-5)
    assert "NaN" not in RunFolder(tmp_path).samples_file(10).read_text()


@pytest.mark.parametrize("name", list(cppo.RULES))
def test_every_rule_and_holes(tmp_path: Path, name: str) -> None:
    batch, inputs = synthetic.minibatch(rows=4)
    scores = (batch.policy_logp.exp() - batch.rollout_logp.exp()).abs()
    mask = batch.mask.clone()
    mask[:, 2:4] = False
    mask[3] = False  # a group without spread: no loss token at all
    batch = cppo.TokenBatch(batch.policy_logp, batch.rollout_logp, batch.advantages, mask, divergence=scores)
    record = recorder(tmp_path, count=9)
    record(batch, cppo.make_rule(name)(batch), inputs, 0)
    record.end_of_step(1)
    rows = RunFolder(tmp_path).samples()
    assert len(rows) == 4 and len(read_jsonl(tmp_path / "positions.jsonl")) == 1
    for row in rows:
        assert row["reason"][2:4] == ["outside", "outside"] and row["log_ratio"][2] is None and row["mask"][2] == 0
        assert len(row["tokens"]) == int(inputs["completion_mask"][row["row"]].sum())
    assert next(row for row in rows if row["row"] == 3)["advantage"] is None


def test_sampling_interval(tmp_path: Path) -> None:
    record, judge = recorder(tmp_path, every=3), synthetic.rule()
    for step in range(1, 6):
        synthetic.observe_step(record, judge, step, 2)
        record.end_of_step(step, last=step == 5)
    record.end_of_step(6)  # nothing was observed: nothing to write
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-000003.jsonl", "step-000005.jsonl"]
    assert [row["step"] for row in read_jsonl(tmp_path / "positions.jsonl")] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="updates=0"):
        recorder(tmp_path, updates=0)


def test_resume_writes_the_same_bytes(tmp_path: Path) -> None:
    def run(folder: Path, first: int, last: int, record: RunRecorder) -> None:
        for step in range(first, last + 1):
            RunFolder(folder).append_metrics(*synthetic.observe_step(record, synthetic.rule(), step, 2))
            record.end_of_step(step)

    run(tmp_path / "a", 1, 6, recorder(tmp_path / "a", every=2))
    record = recorder(tmp_path / "b", every=2)
    run(tmp_path / "b", 1, 5, record)
    synthetic.observe_step(record, synthetic.rule(), 6, 1)  # killed in step 6; the last checkpoint is of step 3
    record = recorder(tmp_path / "b", every=2)
    record.truncate_after(3)
    files.truncate_after(tmp_path / "b" / "metrics.jsonl", 3)
    assert sorted(p.name for p in (tmp_path / "b" / "samples").iterdir()) == ["step-000002.jsonl"]
    run(tmp_path / "b", 4, 6, record)
    names = ["metrics.jsonl", "positions.jsonl", *(f"samples/step-00000{step}.jsonl" for step in (2, 4, 6))]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert json.loads((tmp_path / "a" / "positions.jsonl").read_text().splitlines()[0])["step"] == 1


def test_pieces_of_a_tokenizer_that_drops_leading_spaces(tmp_path: Path) -> None:
    class Words:
        words = ("the", "cat", "sat")

        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            return " ".join(self.words[i] for i in ids)

    assert recording._Pieces(Words()).split([0, 1, 2, 2]) == ["the", " cat", " sat", " sat"]


def test_pieces_of_characters_that_are_several_tokens_are_bytes() -> None:
    """Byte-level BPE and SentencePiece's bytes: what is no whole character is written as bytes, never as U+FFFD."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert recording._Pieces(fast).split(fast("a é\n")["input_ids"]) == ["a", " ", "\\xc3", "\\xa9", "\n"]

    class SentencePiece:
        def convert_ids_to_tokens(self, token: int) -> str:
            return ("<0xE2>", "x")[token]

        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            return "".join(("\ufffd", "x")[token] for token in ids)

    assert recording._Pieces(SentencePiece()).split([1, 0, 1]) == ["x", "\\xe2", "x"]


def test_a_response_with_loss_tokens_is_sampled_and_shown_before_one_without(tmp_path: Path) -> None:
    """Groups with equal rewards have no loss token: where nothing is held back, they must not be the ones shown."""
    batch, inputs = synthetic.minibatch(rows=8)
    mask = batch.mask.clone()
    mask[:6] = False
    batch = cppo.TokenBatch(batch.policy_logp, batch.policy_logp, batch.advantages, mask)
    record = recording.RunRecorder(tmp_path, synthetic.CharTokenizer(), every=1, count=3)
    record(batch, cppo.NoTrustRegion()(batch), inputs, 0)
    record.end_of_step(1)
    found = RunFolder(tmp_path).samples()
    assert [row["row"] for row in found] == [6, 7, 0]
    shown = pick_response(sorted(found, key=lambda row: len(row["tokens"])))
    assert shown is not None and any(shown["mask"])
