"""Ordinary `trainer.train()` runs: every rule, LoRA, two gloo processes, accumulation, resume inside a batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import cppo
from cppo.engines.trl.trainer import TrustRegionTrainer
from forks import python

from .trl_setup import (
    NEED_DIVERGENCE,
    RULES,
    config,
    dataset,
    drift,
    gradients,
    length_reward,
    log_softmax,
    make,
    model,
    parameters,
    reference_coefficients,
    tokenizer,
    trainer,
)

RULE_KINDS = [(rule, None) for rule in RULES] + [(rule, "topk_tv") for rule in NEED_DIVERGENCE]
RULE_KINDS += [("cppo", "exact_tv"), ("cppo", "adaptive_tv"), ("trm_avg", "exact_kl")]


@pytest.mark.parametrize(("rule", "kind"), RULE_KINDS)
def test_train_with_every_rule(rule: str, kind: str | None) -> None:
    """Two rollout batches of four updates: nothing is held back on the first update of each, more on the later ones."""
    updates: list[int] = []
    run = trainer(
        make(rule, kind),
        per_device_train_batch_size=16,
        steps_per_generation=4,
        max_steps=8,
        logging_steps=1,
        observer=lambda batch, verdict, inputs, update: updates.append(update),
    )
    before = [p.clone() for p in run.model.parameters()]
    run.train()
    logs = [entry for entry in run.state.log_history if "trust/masked_fraction" in entry]
    assert updates == [0, 1, 2, 3, 0, 1, 2, 3] and len(logs) == 8
    held = [max(entry["trust/masked_fraction"], entry["trust/clamped_fraction"]) for entry in logs]
    for first in (0, 4):
        assert held[first] == 0
        assert logs[first]["trust/ratio_max"] == pytest.approx(1, abs=1e-3)
        if kind:
            assert logs[first]["trust/first_update_divergence"] < 1e-5
        if rule != "none":
            assert held[first + 3] > 0
    assert "trust/first_update_divergence" not in logs[1]
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert all(("trust/resolved_fraction" in entry) == (kind == "adaptive_tv") for entry in logs)
    stored = [entry.get("trust/divergence_bytes_per_token") for entry in logs]  # once a rollout batch
    assert (
        stored
        == [{None: None, "topk_tv": 32, "exact_tv": 132, "exact_kl": 132, "adaptive_tv": 164}[kind], *[None] * 3] * 2
    )


@pytest.mark.parametrize("kind", ["binary_tv", "topk_tv", "exact_tv"])
def test_lora(kind: str) -> None:
    """Adapters only are trained; loss and gradients equal the reference, mu being the adapted model of the rollout."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    run = trainer(make("cppo", kind), peft_config=lora)
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    inputs = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    with torch.no_grad():
        mu = log_softmax(run.model, inputs)
    drift(run.model, 0.5)
    loss = run._compute_loss(run.model, inputs)
    found = gradients(run.model, loss)
    assert found and all("lora" in name for name in found)
    pi = log_softmax(run.model, inputs)
    c = reference_coefficients("cppo", parameters("cppo", kind), kind, pi, mu, inputs, "append")
    mask = inputs["completion_mask"].bool()
    assert 0 < (c[mask] == 0).double().mean() < 1
    logp = pi.gather(-1, inputs["completion_ids"][..., None])[..., 0].double()
    terms = c * inputs["advantages"].double()[:, None] * torch.where(mask, logp - logp.detach(), 0.0).exp()
    wanted = -torch.where(mask, terms, 0.0).sum() / (mask.shape[0] * run.max_completion_length)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-7)
    want = gradients(run.model, wanted)
    largest = max(float(g.abs().max()) for g in want.values())
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-5 * largest, msg=name)


def test_lora_with_kl_trains() -> None:
    """beta > 0: the reference's forward (adapters off) must not be taken for mu's."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    run = trainer(make("cppo", "topk_tv"), peft_config=lora, beta=0.05, max_steps=4, logging_steps=1)
    run.train()
    logs = [entry for entry in run.state.log_history if "kl" in entry]
    assert logs[0]["trust/first_update_divergence"] < 1e-6
    assert logs[1]["trust/divergence_mean"] > 1e-4 and logs[1]["kl"] > 0


def test_gradient_accumulation() -> None:
    """Two minibatches an update: the update index follows the optimizer, and its first losses have divergence 0."""
    seen: list[tuple[int, float]] = []
    run = trainer(
        cppo.CPPO(),
        per_device_train_batch_size=8,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
        max_steps=4,
        observer=lambda batch, verdict, inputs, update: seen.append((update, float(verdict.divergence.max()))),
    )
    run.train()
    assert [update for update, _ in seen] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert all((divergence < 1e-6) == (update == 0) for update, divergence in seen)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_masked_truncated_completions(loss_type: str) -> None:
    """Responses that ran into the limit leave attention and loss as a whole: nothing becomes NaN."""
    run = trainer(
        make("cppo", "topk_tv"), loss_type=loss_type, mask_truncated_completions=True, max_steps=4, logging_steps=1
    )
    run.train()
    logs = [entry for entry in run.state.log_history if "trust/masked_fraction" in entry]
    assert len(logs) == 4 and all(entry["loss"] == entry["loss"] for entry in logs)
    assert logs[0]["trust/first_update_divergence"] < 1e-6 < logs[1]["trust/divergence_mean"]
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def _rollout_func(logp: float | None) -> Any:
    """Another engine's rollouts: fixed responses, all tokens scored with `logp`, the last one not scored."""

    def rollout(prompts: list[str], run: Any) -> dict[str, Any]:
        ids = [[2 + (i + j) % 30 for j in range(24)] for i in range(len(prompts))]
        scores = None if logp is None else [[logp] * 23 + [None] for _ in ids]
        return {"prompt_ids": [[5, 6, 7]] * len(prompts), "completion_ids": ids, "logprobs": scores}

    return rollout


def test_rollouts_of_another_engine() -> None:
    """mu is what the engine reports; without its scores, or for top-K, the run stops with a sentence."""
    seen: list[cppo.TokenBatch] = []
    run = trainer(
        make("dppo", "binary_tv"),
        rollout_func=_rollout_func(-3.0),
        max_steps=2,
        observer=lambda batch, verdict, inputs, update: seen.append(batch),
        reward=lambda completions, **_: [float(i % 3) for i in range(len(completions))],
    )
    run.train()
    assert (seen[0].rollout_logp[:, :-1] == -3.0).all() and not seen[0].rollout_logp.isnan().any()
    assert run.state.log_history[0]["trust/unscored_fraction"] == pytest.approx(1 / 24)
    with pytest.raises(ValueError, match="returned no log-probabilities"):
        trainer(make("dppo", "binary_tv"), rollout_func=_rollout_func(None)).train()
    for kind in ("topk_tv", "exact_tv"):
        with pytest.raises(ValueError, match="topk_anchor='recomputed'"):
            trainer(make("dppo", kind), rollout_func=_rollout_func(-3.0)).train()
        trainer(make("dppo", kind), rollout_func=_rollout_func(-3.0), topk_anchor="recomputed", max_steps=2).train()


def test_resume_in_the_middle_of_a_batch_is_said(tmp_path: Path) -> None:
    args: dict[str, Any] = {"steps_per_generation": 4, "per_device_train_batch_size": 8, "output_dir": str(tmp_path)}
    run = TrustRegionTrainer(
        model(), length_reward, config(max_steps=3, save_strategy="steps", save_steps=4, **args),
        rule=cppo.CPPO(), train_dataset=dataset(), processing_class=tokenizer(),
    )  # fmt: skip
    run.train()  # transformers saves at the end of a run, wherever that is
    again = trainer(cppo.CPPO(), max_steps=5, **args)
    with pytest.warns(UserWarning, match="middle of a rollout batch"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


KINDS = ("binary_tv", "topk_tv", "adaptive_tv")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo processes say of each kind of divergence."""
    out = tmp_path_factory.mktemp("two") / "out"
    root = Path(__file__).parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "src"), "CUDA_VISIBLE_DEVICES": ""}
    command = [python(), "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={_free_port()}", str(Path(__file__).with_name("trl_worker.py")), str(out), *KINDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(kind: str, two_processes: Path) -> None:
    """gloo: the same metrics and parameters on both ranks; gradients equal one process on the joint minibatch."""
    first, second = (json.loads(Path(f"{two_processes}.{kind}.{rank}.json").read_text()) for rank in (0, 1))
    assert first["processes"] == second["processes"] == 2 and first["rows"] == 18
    assert first["logs"] and first["logs"] == second["logs"]
    assert first["parameters"] == second["parameters"]
    assert any(0 < entry["trust/zero_spread_fraction"] < 1 for entry in first["logs"])
    assert max(entry["trust/masked_fraction"] for entry in first["logs"]) > 0
    for report in (first, second):
        assert report["finite"] and report["largest"] > 0
        assert report["gap"] < 1e-4
        assert report["masked"][0] == pytest.approx(report["masked"][1]) and report["masked"][0] > 0
        assert report["divergence"][0] == pytest.approx(report["divergence"][1], rel=1e-4)
