"""Whole runs, small: what a run leaves behind, and what happens when something goes wrong in the middle of one."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import ARITHMETIC, BATCH, LETTERS, TINY, lines, loads_and_generates, rows, same, train, untimed, weights

from cppo import RULES
from cppo.config.load import load_config
from cppo.training import run as run_module
from cppo.training.callbacks import NonFiniteError

# -- what a run leaves behind ----------------------------------------------------------------------------------------


def test_run_folder(whole):
    steps = ["step-000001", "step-000002"]
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == steps
    assert len(list((whole / "best").iterdir())) == 1
    assert sorted(path.stem for path in (whole / "samples").iterdir()) == steps
    assert load_config(whole / "config.yaml").steps == 2
    assert {"python", "cppo", "torch", "trl", "transformers"} <= json.loads(
        (whole / "versions.json").read_text()
    ).keys()
    positions = lines(whole / "positions.jsonl")
    assert [row["step"] for row in positions] == [1, 2]
    sample = lines(whole / "samples" / "step-000002.jsonl")[0]
    assert len(sample["tokens"]) == len(sample["reason"]) == len(sample["ids"])
    plots = list((whole / "plots").iterdir())
    assert {path.stem for path in plots} >= {"reward", "avg", "masked", "divergence"}
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in plots)
    assert not list(whole.rglob(".*")), "leftovers of a save"


def test_metrics_schema(whole):
    every = rows(whole)
    assert all(isinstance(row["step"], int) and isinstance(row["update"], int) for row in every)
    assert all(isinstance(value, int | float | str | None) for row in every for value in row.values())
    assert [row["update"] for row in every if row["kind"] == "warmup" and "loss" in row] == list(range(1, 21))
    updates = rows(whole, "train")
    assert [(row["step"], row["update"]) for row in updates] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    for row in updates:
        assert {"loss", "grad_norm", "learning_rate", "trust/masked_fraction", "trust/divergence_mean"} <= row.keys()
        assert "skipped_nonfinite" not in row
    clock = {"step_time", "train_runtime"}
    assert not clock & {name for row in every for name in row}, "wall-clock figures belong under time/"
    evaluations = rows(whole, "evaluation")
    assert [(row["step"], row["samples"]) for row in evaluations] == [(0, 2), (1, 2), (2, 2)]
    assert all(0 <= row["avg/chain-12"] == row["avg/mean"] <= row["pass/mean"] <= 1 for row in evaluations)


def test_summary_gives_the_accuracy(whole):
    text = (whole / "summary.md").read_text()
    after = rows(whole, "evaluation")[-1]
    assert "Avg@2" in text and "chain-12" in text and f"{after['avg/chain-12']:.3f}" in text
    assert "Best validation score" in text and "cppo train --resume" in text


def test_policies_load_and_generate(whole):
    for folder in (*(whole / "checkpoints").iterdir(), *(whole / "best").iterdir(), whole / "warmup" / "model"):
        loads_and_generates(folder)


def test_evaluate_a_checkpoint_gives_the_logged_figures(whole, invoke, tmp_path):
    done = invoke("evaluate", whole / "checkpoints" / "step-000002", "--json", tmp_path / "figures.json")
    assert done.exit_code == 0, done.output
    assert "chain-12" in done.stdout and "Avg@2" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    logged = rows(whole, "evaluation")[-1]
    assert {name: figures[name] for name in figures if "/" in name} == {
        name: logged[name] for name in logged if name.startswith(("avg/", "pass/"))
    }


def test_resume_of_a_finished_run_changes_nothing(whole, invoke):
    before = (whole / "metrics.jsonl").read_bytes()
    done = invoke("train", "--resume", whole)
    assert done.exit_code == 0 and "Best validation score" in done.stdout
    assert (whole / "metrics.jsonl").read_bytes() == before


# -- rules, tasks, models --------------------------------------------------------------------------------------------

CASES = [
    [f"rule={name}", *(["rule.divergence=binary_tv"] if binary else [])]
    for name, rule in RULES.items()
    for binary in ([False, True] if getattr(rule, "divergence", None) else [False])
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(part.partition("=")[2] for part in case))
def test_every_rule_trains(case, policy, tmp_path, no_plots):
    train(f"model={policy}", *case, *LETTERS, "steps=1", "evaluation.samples=1", f"output_dir={tmp_path / 'run'}")
    updates = rows(tmp_path / "run", "train")
    assert [row["update"] for row in updates] == [1, 2]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["trust/masked_fraction"]) for row in updates)
    assert updates[0]["trust/masked_fraction"] < 0.05, "on the first update the policy is the rollout policy"
    assert not same(weights(policy), weights(tmp_path / "run" / "checkpoints" / "step-000001"))
    assert case[0].removeprefix("rule=") in (tmp_path / "run" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        (["divergence=exact_tv"], 4 * 32 + 4),
        (["divergence=adaptive_tv", "top_k=3"], 4 * 32 + 4 + 8 * 3),
        (["divergence=adaptive_tv", "top_k=3", "topk_store=compact"], 4 * 32 + 4 + 5 * 3),
        (["divergence=topk_tv", "top_k=3", "topk_store=compact"], 5 * 3),
    ],
)
def test_divergences_of_the_whole_head_train(settings, stored, policy, tmp_path, no_plots):
    run = tmp_path / "run"
    train(f"model={policy}", *settings, *LETTERS, "steps=2", "evaluation.samples=1", f"output_dir={run}")
    updates = rows(run, "train")
    assert len(updates) == 4 and all(row["trust/divergence_max"] > 0 for row in updates[1::2])
    # on the first update the policy is the rollout policy; float16 log-probabilities are off by less than 1e-3
    assert all(row["trust/first_update_divergence"] < 1e-3 for row in updates[::2])
    assert [row.get("trust/divergence_bytes_per_token") for row in updates] == [stored, None] * 2
    assert all(("trust/resolved_fraction" in row) == ("divergence=adaptive_tv" in settings) for row in updates)
    assert f"| {stored} |" in (run / "summary.md").read_text()


def test_the_nine_rules_are_covered():
    assert len(RULES) == 9 and {case[0].removeprefix("rule=") for case in CASES} == set(RULES)


def test_reasoning_gym(tmp_path, no_plots):
    pytest.importorskip("reasoning_gym")
    settings = ["rollout.max_new_tokens=8", "steps=1", f"output_dir={tmp_path / 'run'}"]
    train("task=reasoning_gym:chain_sum", *TINY, *BATCH, *settings)
    assert [row["step"] for row in rows(tmp_path / "run", "evaluation")] == [0, 1]


def test_a_mixture_of_experts_from_scratch(tmp_path, no_plots):
    train(*ARITHMETIC, "tiny.experts=4", "steps=1", f"output_dir={tmp_path / 'run'}")
    config = json.loads((tmp_path / "run" / "warmup" / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"] and config["moe_intermediate_size"] == 64
    # rollout and training take the same experts: before the first update the two policies are one
    assert rows(tmp_path / "run", "train")[0]["trust/divergence_mean"] < 1e-6


def test_own_task_from_scratch_with_few_problems(tmp_path, no_plots):
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    train(*LETTERS, *TINY, "task.problems=5", "steps=3", "keep_checkpoints=3", f"output_dir={run}")
    assert len(rows(run, "train")) == 6, "five problems are used again for the second batch"
    # the second pass over the problems is in the same order after a resume
    shutil.copytree(run, resumed, ignore=shutil.ignore_patterns("step-000003", "best"))
    run_module.train(load_config(run / "config.yaml"), resume=resumed)
    assert untimed(resumed) == untimed(run)
    assert same(*(weights(folder / "checkpoints" / "step-000003") for folder in (run, resumed)))


def test_a_model_of_ones_own_is_not_warmed_up_and_tensorboard_gets_the_metrics(policy, tmp_path):
    folder = tmp_path / "run"
    train(f"model={policy}", *LETTERS, "steps=1", "report_to=tensorboard", f"output_dir={folder}")
    assert not rows(folder, "warmup") and not (folder / "warmup").exists()
    events = list((folder / "tensorboard").rglob("events.out.tfevents.*"))
    assert events and b"trust/masked_fraction" in b"".join(path.read_bytes() for path in events)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_lora(policy, tmp_path, invoke):
    folder = tmp_path / "run"
    train(f"model={policy}", *LETTERS, "steps=1", "peft={r: 4}", f"output_dir={folder}")
    assert (folder / "checkpoints" / "step-000001" / "adapter_model.safetensors").exists()
    done = invoke("evaluate", folder / "checkpoints" / "step-000001", "--json", tmp_path / "figures.json")
    assert done.exit_code == 0, done.output
    logged = rows(folder, "evaluation")[-1]["avg/mean"]
    assert json.loads((tmp_path / "figures.json").read_text())["avg/mean"] == pytest.approx(logged)


# -- NaN and all-equal rewards ---------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """poison(wanted) makes the gradient of updates for which wanted(update) holds NaN; returns what the trainer was
    like at the start of each update: weights and optimizer state.
    """

    def arrange(wanted) -> list[tuple[dict[str, torch.Tensor], list[torch.Tensor]]]:
        seen: list[tuple[dict[str, torch.Tensor], list[torch.Tensor]]] = []
        original = run_module.TrustRegionTrainer.training_step

        def training_step(self, *args, **kwargs):
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
            moments = [v.clone() for entry in self.optimizer.state.values() for v in entry.values()]
            seen.append((state, moments))
            loss = original(self, *args, **kwargs)
            if wanted(len(seen)):
                next(self.model.parameters()).grad[0, 0] = math.nan
            return loss

        monkeypatch.setattr(run_module.TrustRegionTrainer, "training_step", training_step)
        return seen

    return arrange


def test_updates_with_nan_are_skipped_and_counted(poison, policy, tmp_path):
    seen = poison(lambda update: update in (2, 3))
    train(f"model={policy}", *LETTERS, "steps=3", f"output_dir={tmp_path / 'run'}")
    assert [row.get("skipped_nonfinite", 0) for row in rows(tmp_path / "run", "train")] == [0, 1, 1, 0, 0, 0]
    for update in range(1, 6):
        (before, moments), (after, moments_after) = seen[update - 1], seen[update]
        untouched = same(before, after)
        assert untouched == (update in (2, 3)), update
        if update in (2, 3):
            assert len(moments) == len(moments_after) and all(map(torch.equal, moments, moments_after))
    assert "2 of 6" in (tmp_path / "run" / "summary.md").read_text()


def test_ten_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(poison, policy, tmp_path, invoke):
    seen = poison(lambda update: update > 4)
    settings = [f"model={policy}", *LETTERS, "steps=9", "save_every=1", f"output_dir={tmp_path / 'run'}"]
    done = invoke("train", *settings)
    assert done.exit_code == 1 and "Traceback" not in done.stderr
    good = tmp_path / "run" / "checkpoints" / "step-000006"
    assert done.stderr.startswith("Error: 10 updates in a row") and f"last good checkpoint is {good};" in done.stderr
    assert same(weights(good), seen[4][0]), "as after the last finite update"
    loads_and_generates(good)
    # still NaN after a resume: the updates before the checkpoint count
    before = len(seen)
    with pytest.raises(NonFiniteError, match="10 updates in a row"):
        run_module.train(load_config(tmp_path / "run" / "config.yaml"), resume=tmp_path / "run")
    assert len(seen) - before == 2


def test_a_warm_up_that_diverges_stops_too(monkeypatch, tmp_path, invoke):
    from transformers import Trainer

    original = Trainer.training_step

    def training_step(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        next(self.model.parameters()).grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    done = invoke("train", *ARITHMETIC, "steps=1", f"output_dir={tmp_path / 'run'}")
    assert done.exit_code == 1 and "10 updates in a row" in done.stderr and "warmup.learning_rate" in done.stderr


def test_equal_rewards_are_said_and_the_run_goes_on(policy, tmp_path, invoke):
    settings = ["task.equal=true", "steps=2", f"output_dir={tmp_path / 'run'}"]
    done = invoke("train", f"model={policy}", *LETTERS, *settings)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("all responses to each prompt of a rollout batch have the same reward") == 1
    shares = [row["trust/zero_spread_fraction"] for row in rows(tmp_path / "run", "train")[::2]]
    assert shares == [1.0, 1.0]


# -- what the user gave is wrong -------------------------------------------------------------------------------------


def refused(done: Any, *parts: str) -> None:
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("Error: ") and "Traceback" not in done.output
    for part in parts:
        assert part in done.stderr, done.stderr


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_the_folder_of_another_run_is_refused_untouched(whole, invoke):
    before = contents(whole)
    refused(invoke("train", *ARITHMETIC, f"output_dir={whole}"), "holds another run", f"cppo train --resume {whole}")
    assert contents(whole) == before


def test_resume_of_no_run(whole, invoke, tmp_path):
    refused(invoke("train", "--resume", tmp_path), "there is no run", "config.yaml is missing")
    refused(invoke("train", "--resume", tmp_path / "nothing"), "there is no run")
    refused(invoke("train", "--resume", whole, "steps=9"), "takes no others")


def test_output_folder_that_is_a_file(invoke, tmp_path):
    (tmp_path / "taken").write_text("mine")
    refused(invoke("train", *ARITHMETIC, "output_dir=taken"), "output_dir=taken is a file")
    refused(invoke("train", *ARITHMETIC, "output_dir=taken/run"), "output_dir=taken/run cannot be made")
    assert (tmp_path / "taken").read_text() == "mine"


def test_model_folder_without_tokenizer(policy, invoke, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(policy, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    done = invoke("train", f"model={bare}", *LETTERS, "steps=1", "output_dir=run")
    refused(done, f"model={bare}", "no tokenizer")
    assert not (tmp_path / "run").exists(), "the corrected command may have the same folder"
    refused(invoke("evaluate", bare), "no tokenizer")


def test_unknown_tracker(policy, invoke, tmp_path):
    refused(invoke("train", f"model={policy}", *LETTERS, "report_to=tensorbord"), "report_to", "tensorboard")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "text,parts",
    [
        ("", ["train.jsonl holds no problem"]),
        ('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+\n', ["train.jsonl, line 2 is not JSON"]),
        ('{"prompt": "1+1", "answer": "2"}\n[1, 2]\n', ["train.jsonl, line 2 holds a list"]),
        ('{"prompt": "1+1"}\n', ["train.jsonl, line 1 has no answer", "its columns are prompt"]),
    ],
    ids=["empty", "malformed", "no object", "no answers"],
)
def test_bad_data_file(text, parts, policy, invoke, tmp_path):
    pytest.importorskip("math_verify")
    (tmp_path / "train.jsonl").write_text(text)
    (tmp_path / "test.jsonl").write_text('{"prompt": "2+2", "answer": "4"}\n')
    data = ["task=math", "task.train=train.jsonl", "task.validation=test.jsonl"]
    refused(invoke("train", f"model={policy}", *data, *BATCH, "output_dir=run"), *parts)
    assert not (tmp_path / "run").exists()
