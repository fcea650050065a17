"""The trainer with a sampler of our own: mu is what was sampled from, and the loss that of the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from cppo.engines.trl.sampler import Sampled, sample
from cppo.errors import UserError

from .trl_setup import (
    TOP_K,
    drift,
    gradients,
    log_softmax,
    make,
    model,
    parameters,
    reference_coefficients,
    rollout_and_drift,
    trainer,
)


@pytest.mark.parametrize(
    "rule, kind",
    [
        ("ppo_clip", None),
        ("cppo", "binary_tv"),
        ("cppo", "topk_tv"),
        ("dppo", "topk_kl"),
        ("cppo", "exact_tv"),
        ("dppo", "exact_kl"),
        ("cppo", "adaptive_tv"),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradients_are_the_references(rule: str, kind: str | None, temperature: float) -> None:
    run = trainer(make(rule, kind), sampler="own", temperature=temperature)
    inputs, mu = rollout_and_drift(run)
    with torch.no_grad():
        rollout = log_softmax(mu, inputs, temperature)
    mask = inputs["completion_mask"].bool()
    old = rollout.gather(-1, inputs["completion_ids"][..., None])[..., 0]
    torch.testing.assert_close(inputs["old_per_token_logps"][mask], old[mask], rtol=0, atol=2e-5)
    loss = run._compute_loss(run.model, inputs)
    got = gradients(run.model, loss)
    pi = log_softmax(run.model, inputs, temperature)
    c = reference_coefficients(rule, parameters(rule, kind), kind, pi, rollout, inputs, "append")
    logp = pi.gather(-1, inputs["completion_ids"][..., None])[..., 0]
    kept = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
    surrogate = c.detach() * inputs["advantages"].double()[:, None] * torch.where(kept, logp.double(), 0.0)
    scale = (
        inputs["trust_row_scale"][0] if "trust_row_scale" in inputs else 1.0
    )  # a group with equal rewards is left out
    wanted = gradients(run.model, -(scale * surrogate.sum() / (mask.shape[0] * run.max_completion_length)))
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=2e-3, atol=1e-5 * largest, msg=name)


def passes(run: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Forward passes for log-probabilities that TRL makes in a rollout."""
    calls: list[int] = []
    real = GRPOTrainer._get_per_token_logps_and_entropies

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return real(self, *arguments, **options)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
    rollout_and_drift(run, scale=0.0)
    return len(calls)


@pytest.mark.parametrize("kind", ["topk_tv", "binary_tv", "exact_tv", "adaptive_tv"])
def test_no_pass_recomputes_what_was_recorded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes(trainer(make("dppo", kind), sampler="own"), monkeypatch) == 0


def test_a_whole_run_learns_as_usual_and_starts_on_policy() -> None:
    run = trainer(make("cppo", "topk_tv"), sampler="own", max_on_policy_divergence=1e-4, logging_steps=1)
    run.train()
    first = [
        row["trust/first_update_divergence"] for row in run.state.log_history if "trust/first_update_divergence" in row
    ]
    assert len(first) == 2 and all(value < 1e-5 for value in first)  # rounding: two ways to compute the same logits
    assert run.state.global_step == 4


def test_the_weights_that_sample_are_the_newest() -> None:
    """A second rollout is of the drifted policy and not of a copy made before."""
    run = trainer(make("cppo", "topk_tv"), sampler="own")
    rollout_and_drift(run, scale=0.5)
    drift(run.model, 0.5, seed=9)
    run._buffered_inputs = None
    run._step = run.args.steps_per_generation
    inputs = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    with torch.no_grad():
        logp = log_softmax(run.model, inputs).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["old_per_token_logps"][mask], logp[mask], rtol=0, atol=2e-5)
    assert inputs["trust_topk_ids"].shape[-1] == TOP_K


def test_where_a_batch_gets_one_update_no_later_pass_takes_what_was_recorded() -> None:
    """TRL makes no pass for old log-probabilities there; the next pass of the policy is about other tokens."""
    run = trainer(make("none"), sampler="own", steps_per_generation=1, per_device_train_batch_size=8)
    inputs, _ = rollout_and_drift(run)
    assert "old_per_token_logps" not in inputs
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        got = run._get_per_token_logps_and_entropies(run.model, ids, attention, inputs["completion_ids"].shape[1])[0]
        logp = log_softmax(run.model, inputs).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(got[mask], logp[mask], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"sampler": "mine"}, "expected 'trl', 'own' or a function"),
        ({"rollout_func": lambda *_: {}, "sampler": "own"}, "rollout_func"),
    ],
)
def test_what_it_cannot_do_is_a_sentence(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        trainer(make("cppo", "topk_tv"), **settings)


def test_in_bfloat16_the_anchor_is_what_was_sampled_from() -> None:
    """Rollouts are computed as the updates are: weights rounded once a batch, log-probabilities float32."""
    run = trainer(make("cppo", "topk_tv"), sampler="own", bf16=True)
    rounded: list[torch.dtype] = []
    policy = run.accelerator.unwrap_model(run.model)
    hook = policy.lm_head.register_forward_hook(lambda module, inputs, output: rounded.append(output.dtype))
    inputs, mu = rollout_and_drift(run, scale=0.0)
    hook.remove()
    assert set(rounded) == {torch.bfloat16} and inputs["old_per_token_logps"].dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logp = log_softmax(mu, inputs).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    mask = inputs["completion_mask"].bool()
    gap = (inputs["old_per_token_logps"] - logp)[mask].abs()
    assert 0 < float(gap.max()) < 0.05  # another order of sums, rounded


def test_the_record_of_a_sampler_of_ones_own_is_mu() -> None:
    """Another engine with other weights: ratios and top K are of what it says it sampled from."""
    other = model()
    drift(other, 0.3, seed=11)

    def engine(prompts: Any, *, top_k: int, **options: Any) -> Sampled:
        return sample(other, prompts, pad=0, top_k=top_k, **options)

    run = trainer(make("cppo", "topk_tv"), sampler=engine)
    inputs, policy = rollout_and_drift(run, scale=0.0)
    mask = inputs["completion_mask"].bool()
    with torch.no_grad():
        theirs, ours = (
            log_softmax(of, inputs).gather(-1, inputs["completion_ids"][..., None])[..., 0] for of in (other, policy)
        )
    torch.testing.assert_close(inputs["old_per_token_logps"][mask], theirs[mask], rtol=0, atol=2e-5)
    assert float((theirs - ours)[mask].abs().mean()) > 0.1
    with pytest.raises(UserError, match="needs all of mu"):
        trainer(make("cppo", "exact_tv"), sampler=engine)
