"""The contract with TRL: loss and gradients of a real minibatch equal an independent reference, for every rule.

If TRL moves, this file must fail; `test_mutations` patches TRL's source the way a refactor could, and shows that it
does.
"""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import cppo
from cppo.engines.support import EngineChangedError
from cppo.engines.trl import head as trl_head
from cppo.engines.trl.batch import BASELINE, GROUP, REWARD, TOKENS
from cppo.engines.trl.trainer import TrustRegionTrainer
from cppo.errors import UserError

from .trl_setup import (
    ALPHABET,
    NEED_DIVERGENCE,
    RULES,
    assert_contract,
    dataset,
    gradients,
    length_reward,
    log_softmax,
    make,
    mixed_reward,
    model,
    parameters,
    reference_coefficients,
    rollout_and_drift,
    trainer,
)

CASES = [(rule, None) for rule in RULES]
CASES += [(rule, kind) for rule in NEED_DIVERGENCE for kind in ("binary_tv", "topk_tv", "binary_kl", "topk_kl")]
CASES += [("cppo", "exact_tv"), ("cppo", "exact_kl"), ("cppo", "adaptive_tv"), ("dppo", "adaptive_tv")]
CASES += [("dppo", "exact_tv"), ("trm_avg", "exact_kl"), ("trm_max_avg", "adaptive_tv")]


@pytest.mark.parametrize(("rule", "kind"), CASES)
def test_loss_and_all_gradients_match_the_reference(rule: str, kind: str | None) -> None:
    altered = assert_contract(rule, kind)
    if rule == "none":
        assert altered == 0
    else:
        assert 0.02 < altered < 0.98  # both branches are exercised


def test_variants() -> None:
    assert 0.02 < assert_contract("cppo", "topk_tv_upper") < 0.98
    assert 0.02 < assert_contract("dppo", "topk_tv", variant="replace_last") < 0.98
    assert 0.02 < assert_contract("cppo", "topk_tv", changes={"budget": "fixed"}) < 0.98


@pytest.mark.parametrize("kind", ["topk_tv", "exact_tv"])
def test_temperature_enters_both_policies(kind: str) -> None:
    assert 0.02 < assert_contract("cppo", kind, temperature=0.7) < 0.98


@pytest.mark.parametrize("kind", ["topk_tv", "exact_tv"])
def test_untied_head(kind: str) -> None:
    assert 0.02 < assert_contract("cppo", kind, model=model(tied=False)) < 0.98


def test_gathered_rows_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large vocabularies: gathered rows of the head instead of a whole product, and many chunks."""
    monkeypatch.setattr(trl_head, "FULL_PRODUCT", 0)
    monkeypatch.setattr(trl_head, "CHUNK_ELEMENTS", 1000)
    assert 0.02 < assert_contract("cppo", "topk_tv") < 0.98


def test_top_k_beyond_the_vocabulary_is_the_exact_divergence() -> None:
    run = trainer(cppo.DPPO(), top_k=1000)
    inputs, mu = rollout_and_drift(run)
    seen = []
    run._trust_observer = lambda batch, verdict, inputs, update: seen.append(batch.divergence)
    run._compute_loss(run.model, inputs)
    with torch.no_grad():
        exact = 0.5 * (log_softmax(run.model, inputs).exp() - log_softmax(mu, inputs).exp()).abs().sum(-1)
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(seen[0][mask], exact[mask], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["binary_tv", "topk_tv", "topk_kl", "exact_tv", "exact_kl", "adaptive_tv"])
def test_on_policy_divergence_is_zero(kind: str) -> None:
    run = trainer(cppo.DPPO(divergence=kind))
    inputs, _ = rollout_and_drift(run, scale=0.0)
    run._compute_loss(run.model, inputs)
    assert run._metrics["train"]["trust/divergence_max"][-1] < 1e-6
    assert run._metrics["train"]["trust/first_update_divergence"][-1] < 1e-6


@pytest.mark.parametrize("kind", ["topk_tv", "exact_tv"])
def test_on_policy_divergence_in_bf16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under bf16 autocast the head rounds its logits; they are scored in the same precision, so nearly all cancels."""
    monkeypatch.setattr(trl_head, "FULL_PRODUCT", 0)
    noise = {}
    for fp32 in (False, True):
        run = trainer(cppo.DPPO(divergence=kind), bf16=True, cast_lm_head_to_fp32=fp32)
        inputs, _ = rollout_and_drift(run, scale=0.0)
        with run.compute_loss_context_manager():
            run._compute_loss(run.model, inputs)
        noise[fp32] = run._metrics["train"]["trust/divergence_mean"][-1]
        if kind == "exact_tv":
            assert inputs["trust_hidden"].dtype == torch.bfloat16 if not fp32 else torch.float32
    assert noise[False] < 1e-3 and noise[True] < 1e-3  # a CPU that rounds otherwise may leave more than this one (4e-5)


def test_rollout_policy_is_fixed_over_the_minibatches_and_iterations() -> None:
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    run = trainer(
        cppo.CPPO(),
        steps_per_generation=4,
        num_iterations=2,
        per_device_train_batch_size=8,
        max_steps=8,
        observer=lambda batch, verdict, inputs, update: seen.append(
            (update, batch.rollout_logp.clone(), inputs["old_per_token_logps"].clone())
        ),
    )
    mu = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    rollout = model()
    rollout.load_state_dict(mu)
    assert [update for update, _, _ in seen] == list(range(8))
    for index, inputs in enumerate(run._buffered_inputs):
        with torch.no_grad():
            want = log_softmax(rollout, inputs).gather(-1, inputs["completion_ids"][..., None])[..., 0]
        mask = inputs["completion_mask"].bool()
        for pass_ in (index, index + 4):  # both iterations
            torch.testing.assert_close(seen[pass_][1][mask], want[mask], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- denominators


def _filtered(loss_type: str, **kwargs: Any) -> tuple[Any, list[dict[str, Any]], Any]:
    rule = make("cppo", "binary_tv")
    run = trainer(rule, reward=mixed_reward, loss_type=loss_type, **kwargs)
    _, mu = rollout_and_drift(run)
    return run, run._buffered_inputs, mu


def _token_losses(run: Any, mu: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """-c A (with gradient) and mask of one minibatch, for the responses of groups with spread alone."""
    kept = inputs["tool_mask"][:, 0].bool()
    rows = {k: v[kept] for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.dim() > 0}
    rows.pop("tool_mask")
    pi = log_softmax(run.model, rows)
    with torch.no_grad():
        rollout = log_softmax(mu, rows)
    c = reference_coefficients("cppo", parameters("cppo", "binary_tv"), "binary_tv", pi, rollout, rows, "append")
    logp = pi.gather(-1, rows["completion_ids"][..., None])[..., 0].double()
    mask = rows["completion_mask"].double()
    return -c * rows["advantages"].double()[:, None] * torch.where(mask > 0, logp - logp.detach(), 0.0).exp(), mask


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_zero_spread_groups_leave_the_loss_and_the_denominators(loss_type: str) -> None:
    """Over the minibatches of a rollout batch, loss and gradient are those of the batch without these groups."""
    run, minibatches, mu = _filtered(loss_type)
    kept = torch.cat([inputs["tool_mask"][:, 0] for inputs in minibatches]).bool()
    assert 0.2 < kept.double().mean() < 0.8
    share = run._metrics["train"]["trust/zero_spread_fraction"][-1]
    assert share == pytest.approx(1 - kept.double().mean().item())
    got = sum(run._compute_loss(run.model, inputs) for inputs in minibatches) / len(minibatches)
    parts = [_token_losses(run, mu, inputs) for inputs in minibatches]
    length, rows = run.max_completion_length, int(kept.sum())
    want = {
        "grpo": lambda: sum((loss * m).sum(1).div(m.sum(1)).sum() for loss, m in parts) / rows,
        "dr_grpo": lambda: sum((loss * m).sum() for loss, m in parts) / (rows * length),
        "dapo": lambda: sum((loss * m).sum() for loss, m in parts) / sum(m.sum() for _, m in parts),
        "bnpo": lambda: sum((loss * m).sum() / m.sum() for loss, m in parts) / len(parts),
    }[loss_type]()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)
    mine, reference = gradients(run.model, got), gradients(run.model, want)
    largest = max(float(g.abs().max()) for g in reference.values())
    for name, gradient in reference.items():
        torch.testing.assert_close(mine[name], gradient, rtol=2e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("kind", ["topk_tv", "adaptive_tv"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_what_is_not_computed_changes_nothing(loss_type: str, kind: str) -> None:
    """Without an observer responses without loss tokens are cut out; loss, gradient and metrics are the same."""
    found = []
    for observer in (None, lambda *_: None):
        run = trainer(make("cppo", kind), reward=mixed_reward, loss_type=loss_type, observer=observer)
        rollout_and_drift(run)
        rows: list[int] = []
        handle = run.model.register_forward_pre_hook(
            lambda *a, rows=rows: rows.append(len(a[-1]["input_ids"])), with_kwargs=True
        )
        run._metrics["train"].clear()
        loss = sum(run._compute_loss(run.model, inputs) for inputs in run._buffered_inputs)
        handle.remove()
        stats = {name: values for name, values in run._metrics["train"].items() if name.startswith("trust/")}
        found.append((float(loss.detach()), gradients(run.model, loss), stats, rows))
    (loss, mine, stats, few), (whole, reference, all_stats, every) = found
    assert sum(few) < sum(every) and loss == pytest.approx(whole, rel=1e-4)
    largest = max(float(g.abs().max()) for g in reference.values())
    for name, gradient in reference.items():
        torch.testing.assert_close(mine[name], gradient, rtol=2e-3, atol=1e-5 * largest, msg=name)
    assert stats.keys() == all_stats.keys()
    for name, values in stats.items():
        assert values == pytest.approx(all_stats[name], rel=1e-4, abs=1e-6), name


def test_an_observer_sees_every_response_of_the_last_update() -> None:
    seen: list[tuple[int, int]] = []

    def observer(batch: Any, verdict: Any, inputs: Any, update: int) -> None:
        seen.append((update, len(inputs["completion_ids"])))

    observer.last_update_whole = True  # type: ignore[attr-defined]
    trainer(make("cppo", "binary_tv"), reward=mixed_reward, observer=observer).train()
    last = max(update for update, _ in seen)
    whole = max(rows for _, rows in seen)
    assert last > 0 and all(rows == whole for update, rows in seen if update == last)
    assert any(rows < whole for update, rows in seen if update < last)


def test_kl_term_has_the_same_denominator(tmp_path: Any) -> None:
    """beta > 0: the KL to the reference is averaged over the kept responses, too."""
    model().save_pretrained(tmp_path)
    policy = type(model()).from_pretrained(tmp_path)
    run, (inputs,), mu = _filtered(
        "dr_grpo", beta=0.3, model=policy, steps_per_generation=1, num_iterations=2, use_bias_correction_kl=False
    )
    got = run._compute_loss(run.model, inputs)
    loss, mask = _token_losses(run, mu, inputs)
    kept = inputs["tool_mask"][:, 0].bool()
    with torch.no_grad():
        tokens = inputs["completion_ids"][..., None]
        gap = inputs["ref_per_token_logps"] - log_softmax(run.model, inputs).gather(-1, tokens)[..., 0]
    kl = (gap.exp() - gap - 1)[kept].double()
    want = ((loss + 0.3 * kl) * mask).sum() / (int(kept.sum()) * run.max_completion_length)
    assert run.beta == 0.3
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)


def test_rewards_travel_along() -> None:
    """Through TRL's shuffling and splitting: each response has its own reward, its group's others' mean, its prompt."""
    run = trainer(make("cppo", "binary_tv"))
    assert run._trust_filtered
    rollout_and_drift(run)
    prompts: dict[int, set[str]] = {}
    rows = 0
    for inputs in run._buffered_inputs:
        texts = run.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
        assert inputs[REWARD].tolist() == length_reward(texts)
        assert inputs[TOKENS].equal(inputs["completion_mask"].bool())  # whatever the filter did to tool_mask
        # scale_rewards="none": A = R - mean of the group, of 4, which includes the response itself
        own = (inputs[REWARD] - inputs[BASELINE]) * 3 / 4
        torch.testing.assert_close(own, inputs["advantages"].reshape(own.shape), rtol=1e-5, atol=1e-6)
        for group, prompt in zip(inputs[GROUP].tolist(), inputs["prompt_ids"].tolist(), strict=True):
            prompts.setdefault(group, set()).add(str(prompt))
        rows += len(texts)
    assert len(prompts) == rows // 4 and all(len(found) == 1 for found in prompts.values())


def test_filter_can_be_switched_off() -> None:
    run, minibatches, _ = _filtered("dr_grpo", zero_spread_filter=False)
    assert all("tool_mask" not in inputs and "trust_row_scale" not in inputs for inputs in minibatches)
    assert "trust/zero_spread_fraction" not in run._metrics["train"]


def test_all_rewards_equal_is_said_and_survived() -> None:
    run = trainer(cppo.CPPO(), reward=lambda completions, **_: [1.0] * len(completions), max_steps=4)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.warns(UserWarning, match="same reward") as caught:
        run.train()
    assert sum("same reward" in str(w.message) for w in caught) == 1
    assert all(entry["trust/zero_spread_fraction"] == 1 for entry in run.state.log_history if "reward" in entry)
    for name, value in run.model.state_dict().items():
        assert torch.equal(before[name], value), name


# ------------------------------------------------------------------------------------------------ vLLM, extremes, modes


def _as_vllm(run: TrustRegionTrainer, inputs: dict[str, Any], mu_logp: torch.Tensor) -> dict[str, Any]:
    """What TRL's minibatch holds with vLLM: the sampler's own log-probabilities and the correction old -> mu."""
    run.use_vllm, run.vllm_importance_sampling_correction = True, True
    gap = torch.nan_to_num(inputs["old_per_token_logps"] - mu_logp, nan=0.0)
    return {**inputs, "sampling_per_token_logps": mu_logp, "importance_sampling_ratio": gap.exp().clamp(max=1e9)}


@pytest.mark.parametrize("rule", ["none", "dppo", "cppo", "cispo"])
def test_vllm_log_probabilities_are_the_anchor(rule: str) -> None:
    """Ratio and divergence are against the sampler, not the recomputed policy; unscored tokens take the latter."""
    run = trainer(make(rule, "binary_tv" if rule in NEED_DIVERGENCE else None))
    inputs, _ = rollout_and_drift(run)
    generator = torch.Generator().manual_seed(0)
    old = inputs["old_per_token_logps"]
    mu_logp = (old + 0.05 * torch.randn(old.shape, generator=generator)).clamp(max=0)
    unscored = torch.rand(old.shape, generator=generator) < 0.05
    mu_logp[unscored] = torch.nan
    seen: list[Any] = []
    run._trust_observer = lambda batch, verdict, inputs, update: seen.append((batch, verdict))
    loss = run._compute_loss(run.model, _as_vllm(run, inputs, mu_logp))
    batch, verdict = seen[0]
    assert torch.equal(batch.rollout_logp, torch.where(unscored, old, mu_logp))
    mask = inputs["completion_mask"]
    want = (
        -(verdict.coefficient * inputs["advantages"][:, None] * mask).sum() / mask.shape[0] / run.max_completion_length
    )
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-7)
    logp = log_softmax(run.model, inputs).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    direct = cppo.TokenBatch(logp, batch.rollout_logp, inputs["advantages"], mask)
    explicit = cppo.token_loss(direct, verdict.coefficient).sum() / mask.shape[0] / run.max_completion_length
    mine, reference = gradients(run.model, loss), gradients(run.model, explicit)
    for name, gradient in reference.items():
        torch.testing.assert_close(mine[name], gradient, rtol=2e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("gap", [95.0, -95.0, 40.0])
def test_extreme_ratios_stay_finite_and_exact(gap: float) -> None:
    """log pi - log mu = +-95 on one token: no NaN in loss or gradients, and the gradient is the coefficient's."""
    run = trainer(cppo.NoTrustRegion())
    inputs, _ = rollout_and_drift(run)
    inputs = {**inputs, "old_per_token_logps": inputs["old_per_token_logps"].clone()}
    with torch.no_grad():
        logp = log_softmax(run.model, inputs).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    inputs["old_per_token_logps"][0, 0] = logp[0, 0] - gap if gap > 0 else 0.0
    if gap < 0:
        with torch.no_grad():  # make the first token of the first response practically impossible under pi
            forward = run._get_per_token_logps_and_entropies
        run._get_per_token_logps_and_entropies = (
            lambda *a, **k: (  # type: ignore[method-assign]
                lambda out: (out[0] + gap * (torch.arange(out[0].numel()).view_as(out[0]) == 0), *out[1:])
            )(forward(*a, **k))
        )
    inputs["advantages"] = inputs["advantages"].abs() + 1
    seen: list[Any] = []
    run._trust_observer = lambda batch, verdict, inputs, update: seen.append(verdict.coefficient)
    loss = run._compute_loss(run.model, inputs)
    found = gradients(run.model, loss)
    assert loss.isfinite() and all(g.isfinite().all() for g in found.values())
    if gap > 0:
        want = (seen[0] * inputs["advantages"][:, None] * inputs["completion_mask"]).sum()
        torch.testing.assert_close(-loss * seen[0].shape[0] * run.max_completion_length, want, rtol=1e-4, atol=1e-6)


def test_evaluation_applies_no_rule() -> None:
    run = trainer(cppo.CPPO(), eval_dataset=dataset(8), per_device_eval_batch_size=8)
    found = run.evaluate()
    assert found["eval_loss"] == found["eval_loss"]
    assert not any("trust/" in key for key in found)
    assert not run._metrics["train"]


def test_tool_tokens_take_no_part() -> None:
    """A hole in the loss mask is neither judged nor counted as a position."""
    run = trainer(make("cppo", "binary_tv"))
    inputs, mu = rollout_and_drift(run)
    tool = torch.ones_like(inputs["completion_mask"])
    tool[:, 3:6] = 0
    inputs = {**inputs, "tool_mask": tool}
    seen: list[Any] = []
    run._trust_observer = lambda batch, verdict, inputs, update: seen.append(verdict)
    run._compute_loss(run.model, inputs)
    pi = log_softmax(run.model, inputs)
    with torch.no_grad():
        rollout = log_softmax(mu, inputs)
    want = reference_coefficients("cppo", parameters("cppo", "binary_tv"), "binary_tv", pi, rollout, inputs, "append")
    torch.testing.assert_close(seen[0].coefficient.double(), want, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- mutations

MUTATIONS = {
    "the mask is dropped": ("per_token_loss = per_token_loss * off_policy_mask", "pass"),
    "old := pi in the ratio": (
        "log_ratio = per_token_logps - old_per_token_logps",
        "log_ratio = per_token_logps - per_token_logps.detach()",
    ),
    "mu := pi in the hook": (
        'sampling_per_token_logps = inputs.get("sampling_per_token_logps", old_per_token_logps)',
        "sampling_per_token_logps = per_token_logps.detach()",
    ),
    "a new clip of the ratio": (
        "coef_2 = torch.clamp(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_high)",
        "coef_1 = torch.clamp(coef_1, max=1.05); coef_2 = coef_1",
    ),
    "a static call past the override": ("self.get_off_policy_mask(", "GRPOTrainer.get_off_policy_mask("),
    "the hook's mask counts padding": ("mask=mask,", "mask=torch.ones_like(mask),"),
    "another denominator": ("(per_token_loss.size(0) * self.max_completion_length)", "mask.sum()"),
    "the mask is reduced to sequences": (
        "per_token_loss = per_token_loss * off_policy_mask",
        "per_token_loss = per_token_loss * off_policy_mask.mean(1, keepdim=True)",
    ),
    "the hook is called twice": (
        "log_ratio = per_token_logps - old_per_token_logps",
        "self.get_off_policy_mask(advantages, per_token_logps, sampling_per_token_logps, mask, 1.0); "
        "log_ratio = per_token_logps - old_per_token_logps",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_of_trl_are_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.grpo_trainer as module

    old, new = MUTATIONS[mutation]
    source = textwrap.dedent(inspect.getsource(module.GRPOTrainer._compute_loss))
    assert old in source, f"TRL's _compute_loss no longer has {old!r}: look at the seam, then renew this mutation"
    namespace = dict(vars(module))
    exec(compile(source.replace(old, new), "mutated TRL", "exec"), namespace)
    monkeypatch.setattr(module.GRPOTrainer, "_compute_loss", namespace["_compute_loss"])
    with pytest.raises((AssertionError, RuntimeError, EngineChangedError)):
        assert_contract("cppo", "binary_tv")


def test_a_moved_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import GRPOTrainer

    monkeypatch.setattr(GRPOTrainer, "get_off_policy_mask", staticmethod(lambda advantages, logps, mask: 1))
    with pytest.raises(EngineChangedError, match=r"written for TRL 1\.16"):
        trainer(cppo.CPPO())


@pytest.mark.parametrize(
    "kind, sampler",
    [("topk_tv", "trl"), ("exact_kl", "trl"), ("adaptive_tv", "trl"), ("exact_kl", "own"), ("adaptive_tv", "own")],
)
def test_a_head_that_does_more_is_noticed(kind: str, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the model's log-probabilities are not those of the head as it is scored here, the first rollout says so."""
    run = trainer(cppo.DPPO(divergence=kind), sampler=sampler)
    monkeypatch.setattr(trl_head, "logit_changes", lambda model: (None, 2.0))
    with pytest.raises(UserError, match="differ from the model's own"):
        rollout_and_drift(run)


@pytest.mark.parametrize("sampler", ["trl", "own"])
def test_learnt_positions_do_not_count_the_padding(sampler: str) -> None:
    """GPT-2 under left padding: log mu and log pi are those of the response behind its bare prompt."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3}
    special = {"vocab_size": len(ALPHABET) + 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, **special, **dropout))
    run = trainer(make("cppo", "binary_tv"), model=policy, sampler=sampler)
    seen: list[torch.Tensor] = []
    run._trust_observer = lambda batch, verdict, inputs, update: seen.append(batch.policy_logp)
    inputs, mu = rollout_and_drift(run, scale=0.0)
    run._compute_loss(run.model, inputs)
    assert inputs["prompt_mask"].min() == 0  # some prompts are padded
    mu.eval()
    for row in range(len(inputs["prompt_ids"])):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
        response = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
        with torch.no_grad():
            logits = mu(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        want = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        for found in (inputs["old_per_token_logps"], seen[0]):
            torch.testing.assert_close(found[row, : len(response)], want, rtol=0, atol=1e-4)
