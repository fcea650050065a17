"""Divergences over the whole head in TRL: heads that scale and cap, certified decisions, what is stored, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

import cppo
from cppo import divergence
from cppo.engines.trl import divergence as trl_divergence
from cppo.engines.trl import head as trl_head
from cppo.engines.trl.head import Head, logit_changes
from cppo.engines.trl.rollout import HIDDEN, LOGP, LOGSUMEXP, PACKED, RolloutPass
from cppo.scoring import logits as scoring_logits
from cppo.scoring.store import topk_error_bound

from .trl_setup import (
    NEED_DIVERGENCE,
    assert_contract,
    gradients,
    log_softmax,
    make,
    model,
    rollout_and_drift,
    trainer,
)


def judged(run: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """What the rule saw and said in one loss."""
    seen: list[Any] = []
    run._trust_observer = lambda batch, verdict, inputs, update: seen.append((batch, verdict))
    run._compute_loss(run.model, inputs)
    return seen[0]


def exact_tv(run: Any, mu: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """From full logits, float32 ``[B, T]``."""
    with torch.no_grad():
        return divergence.exact_tv(log_softmax(run.model, inputs).double(), log_softmax(mu, inputs).double()).float()


# -------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("architecture", "kind", "gathered"),
    [
        ("gemma2", "topk_tv", True),
        ("gemma2", "exact_kl", False),
        ("gemma2", "adaptive_tv", True),
        ("cohere", "topk_kl", False),
        ("cohere", "exact_tv", False),
        ("granite", "topk_tv", True),
        ("granite", "adaptive_tv", False),
    ],
)
def test_heads_that_scale_or_cap(architecture: str, kind: str, gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against dense logits of the model's own forward; at a temperature, since the order of the steps matters."""
    if gathered:
        monkeypatch.setattr(trl_head, "FULL_PRODUCT", 0)
    policy = model(architecture=architecture)
    assert logit_changes(policy) != (None, 1.0)
    altered = assert_contract("cppo", kind, model=policy, temperature=0.8, zero_spread_filter=False)
    assert 0.01 < altered < 0.99


def test_what_lies_behind_the_head() -> None:
    """Read as TRL's fused head reads it."""

    def found(architecture: str, **settings: Any) -> tuple[float | None, float]:
        policy = model()
        policy.config = AutoConfig.for_model(architecture, **settings)
        return logit_changes(policy)

    assert found("qwen3") == (None, 1.0)
    assert found("gemma2", final_logit_softcapping=30.0) == (30.0, 1.0)
    assert found("cohere", logit_scale=0.0625) == (None, 0.0625)
    assert found("falcon_h1", lm_head_multiplier=0.5) == (None, 0.5)
    assert found("granite", logits_scaling=8.0) == (None, 0.125)
    assert found("hyperclovax", logits_scaling=8.0) == (None, 8.0)
    assert found("cohere", logit_scale=0.5, logits_scaling=4.0) == (None, 0.5)


@pytest.mark.parametrize("value", [0.0, -1.0, "inv_sqrt_d_model", math.inf])
def test_other_changes_of_the_logits_are_refused(value: Any) -> None:
    policy = model()
    policy.config.logit_scale = value
    with pytest.raises(ValueError, match=r"logit_scale=.*binary_tv"):
        trainer(cppo.CPPO(divergence="exact_tv"), model=policy)
    if isinstance(value, float):
        trainer(cppo.CPPO(divergence="binary_tv"), model=policy)


@pytest.mark.parametrize("kind", ["topk_tv", "exact_tv"])
def test_a_head_with_a_bias(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is trained, too, so mu's is kept beside mu's weight."""
    monkeypatch.setattr(trl_head, "FULL_PRODUCT", 0)
    policy = model(tied=False)
    policy.lm_head = torch.nn.Linear(32, 38, bias=True)
    torch.nn.init.normal_(policy.lm_head.bias)
    run = trainer(make("dppo", kind), model=policy, top_k=37)  # one id short of the vocabulary: nothing is lost
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    inputs = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    with torch.no_grad():
        before = log_softmax(run.model, inputs)
        run.model.lm_head.bias.add_(0.3 * torch.randn(38, generator=torch.Generator().manual_seed(1)))
        after = log_softmax(run.model, inputs)
    batch, _ = judged(run, inputs)
    mask = batch.loss_mask
    torch.testing.assert_close(batch.divergence[mask], divergence.exact_tv(after, before)[mask], rtol=1e-4, atol=1e-6)
    assert batch.divergence[mask].mean() > 0.05


# ----------------------------------------------------------------------------------------------------------- decisions


def peaked(by: float = 4) -> Any:
    """A policy whose top 3 hold most of the mass, as those of language models do."""
    policy = model(tied=False)
    with torch.no_grad():
        policy.lm_head.weight.mul_(by)
    return policy


@pytest.mark.parametrize("store", ["float32", "compact", "ragged"])
@pytest.mark.parametrize("rule", NEED_DIVERGENCE)
def test_adaptive_decides_as_exact(rule: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rollouts and weights, K = 3 of 38 ids: every coefficient is that of the exact TV, at a part of its
    price.
    """
    run = trainer(make(rule, "adaptive_tv"), model=peaked(), top_k=3, topk_store=store)
    inputs, mu = rollout_and_drift(run, scale=0.03)
    asked: list[int] = []
    spy = trl_divergence.exact_divergence
    monkeypatch.setattr(
        trl_divergence, "exact_divergence", lambda p, m, **k: (asked.append(p.hidden.shape[0]), spy(p, m, **k))[1]
    )
    batch, verdict = judged(run, inputs)
    truth = exact_tv(run, mu, inputs)
    want = make(rule, "exact_tv")(batch.with_divergence(truth))
    assert torch.equal(verdict.coefficient, want.coefficient)
    mask = batch.loss_mask
    assert 0.1 < (want.coefficient[mask] == 0).double().mean() < 0.95
    fraction = run._metrics["train"]["trust/resolved_fraction"][-1]
    assert fraction == pytest.approx(sum(asked) / int(mask.sum()))
    assert 0 < fraction < 1
    assert (batch.divergence <= truth + 1e-5)[mask].all()


def test_a_soft_gate_resolves_more() -> None:
    shares = []
    for gate in (None, "sapo"):
        run = trainer(make("cppo", "adaptive_tv", gate=gate), model=peaked(), top_k=3)
        inputs, mu = rollout_and_drift(run, scale=0.03)
        batch, verdict = judged(run, inputs)
        want = make("cppo", "exact_tv", gate=gate)(batch.with_divergence(exact_tv(run, mu, inputs)))
        torch.testing.assert_close(verdict.coefficient, want.coefficient, rtol=1e-4, atol=1e-5)
        shares.append(run._metrics["train"]["trust/resolved_fraction"][-1])
    assert shares[0] < shares[1]


def test_a_rounded_top_k_is_allowed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = V in the compact store: TV_K is the exact TV but for the rounding, and a limit between the two decides."""
    run = trainer(make("dppo", "adaptive_tv", delta=1.0), model=peaked(), top_k=38, topk_store="compact")
    inputs, mu = rollout_and_drift(run, scale=0.03)
    truth = exact_tv(run, mu, inputs)
    batch, _ = judged(run, inputs)  # nothing is near this limit: D is TV_K
    away = batch.loss_mask & (batch.token_advantages() * batch.log_ratio() > 0)
    gap = ((batch.divergence - truth).abs() * away).flatten()
    assert gap.max() > 2e-5
    limit = (batch.divergence.flatten()[gap.argmax()] + truth.flatten()[gap.argmax()]) / 2
    run._trust.rule = make("dppo", "adaptive_tv", delta=limit.item())
    run._compute_loss(run.model, inputs)  # sets the hidden states
    batch, verdict = judged(run, inputs)
    want = make("dppo", "exact_tv", delta=limit.item())(batch.with_divergence(truth))
    assert torch.equal(verdict.coefficient, want.coefficient)


@pytest.mark.parametrize("top_k", [38, 1000])
def test_nothing_is_resolved_where_the_top_k_are_the_whole_vocabulary(
    top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("an exact evaluation")

    monkeypatch.setattr(trl_divergence, "exact_divergence", never)
    run = trainer(make("cppo", "adaptive_tv"), top_k=top_k)
    inputs, mu = rollout_and_drift(run)
    assert HIDDEN not in inputs and run._trust_divergence.rollout_head is None
    batch, _ = judged(run, inputs)
    assert run._metrics["train"]["trust/resolved_fraction"][-1] == 0
    mask = batch.loss_mask
    torch.testing.assert_close(batch.divergence[mask], exact_tv(run, mu, inputs)[mask], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["exact_tv", "adaptive_tv", "topk_tv"])
def test_a_policy_that_is_not_finite_fails_in_the_loss_and_nowhere_else(kind: str) -> None:
    """What guards against NaN gradients then sees them, instead of an error about intervals."""
    run = trainer(make("cppo", kind), top_k=3)
    inputs, _ = rollout_and_drift(run)
    with torch.no_grad():
        run.model.model.norm.weight[0] = torch.nan
    run._trust.first = False  # an earlier batch was fine
    assert run._compute_loss(run.model, inputs).isnan()


@pytest.mark.parametrize("bf16", [False, True])
def test_an_exact_value_beyond_its_interval(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 a sign that something is wired wrongly; in bf16 a logit that two computations rounded differently."""
    spy = trl_divergence.exact_divergence
    monkeypatch.setattr(trl_divergence, "exact_divergence", lambda *a, **k: spy(*a, **k) + 0.5)
    run = trainer(make("cppo", "adaptive_tv"), model=peaked(), top_k=3, bf16=bf16)
    inputs, _ = rollout_and_drift(run, scale=0.03)
    with run.compute_loss_context_manager():
        if bf16:
            run._compute_loss(run.model, inputs)
            assert 0 < run._metrics["train"]["trust/resolved_fraction"][-1] < 1
        else:
            with pytest.raises(ValueError, match="compare the hidden states"):
                run._compute_loss(run.model, inputs)


def test_vllm_divergences_are_between_the_trainers_own_distributions() -> None:
    """What the sampler reports for its tokens moves the ratio, not D."""
    for kind in ("topk_tv", "adaptive_tv"):
        run = trainer(make("cppo", kind), top_k=3, topk_anchor="recomputed")
        inputs, _ = rollout_and_drift(run)
        alone, _ = judged(run, inputs)
        reported = inputs["old_per_token_logps"] - 0.3
        run.use_vllm = run.vllm_importance_sampling_correction = True
        ratio = torch.full_like(reported, math.exp(0.3))
        batch, _ = judged(run, {**inputs, "sampling_per_token_logps": reported, "importance_sampling_ratio": ratio})
        assert torch.equal(batch.rollout_logp, reported)
        if kind == "topk_tv":
            assert torch.equal(batch.divergence, alone.divergence)
        else:  # other ratios, so other tokens are asked for
            assert ((batch.divergence - alone.divergence).abs() < 0.3).all()


# -------------------------------------------------------------------------------------------------------------- stores


def test_stores_of_the_top_k() -> None:
    """What each keeps, in bytes, and how far that moves D: within the bound of `cppo.scoring.store`."""
    found, stored = {}, {}
    for store in ("float32", "compact", "ragged"):
        run = trainer(make("dppo", "topk_tv"), model=peaked(6), top_k=12, topk_store=store)
        inputs, _ = rollout_and_drift(run)
        batch, _ = judged(run, inputs)
        found[store], stored[store] = batch.divergence, run._metrics["train"]["trust/divergence_bytes_per_token"][-1]
        if store == "float32":
            bound = topk_error_bound(inputs[LOGP])
            # of both minibatches: the entries before which less than 99.9% are covered; none for padding
            mass = torch.cat([minibatch[LOGP] for minibatch in run._buffered_inputs]).exp()
            entries = ((mass.cumsum(-1) - mass < 0.999) & (mass > 0)).sum(-1)
    mask = batch.loss_mask
    assert stored["float32"] == 8 * 12 and stored["compact"] == 5 * 12
    assert stored["ragged"] == pytest.approx(1 + 5 * entries.double().mean().item(), rel=1e-4)
    assert (entries == 0).any() and ((entries > 0) & (entries < 12)).any()  # padding, and slots that are left unused
    gap = (found["compact"] - found["float32"]).abs()[mask]
    assert gap.max() > 0 and (gap <= bound[mask] + 1e-6).all()
    gap = (found["ragged"] - found["float32"])[mask]
    assert (gap <= bound[mask] + 1e-6).all() and (gap >= -bound[mask] - 1e-3 - 1e-6).all()


@pytest.mark.parametrize("store", ["compact", "ragged"])
def test_stores_train(store: str) -> None:
    """Through TRL's shuffling and splitting, over two rollout batches."""
    run = trainer(
        make("cppo", "topk_tv"), per_device_train_batch_size=16, steps_per_generation=4, max_steps=8, logging_steps=1,
        topk_store=store,
    )  # fmt: skip
    run.train()
    logs = [entry for entry in run.state.log_history if "trust/masked_fraction" in entry]
    for first in (0, 4):
        assert logs[first]["trust/first_update_divergence"] < 1e-3 and logs[first]["trust/masked_fraction"] == 0
        assert logs[first + 3]["trust/divergence_mean"] > 3e-3
    rows = [inputs[PACKED] for inputs in run._buffered_inputs]
    assert all(len(row) == 16 for row in rows)
    assert isinstance(rows[0], list) == (store == "ragged")


@pytest.mark.parametrize("kind", ["exact_tv", "adaptive_tv"])
def test_bytes_of_the_exact_divergences(kind: str) -> None:
    run = trainer(make("cppo", kind), top_k=3)
    inputs, _ = rollout_and_drift(run)
    top_k = 8 * 3 if kind == "adaptive_tv" else 0
    assert run._metrics["train"]["trust/divergence_bytes_per_token"][-1] == 4 * 32 + 4 + top_k
    assert inputs[HIDDEN].shape == (*inputs["completion_ids"].shape, 32) and LOGSUMEXP in inputs


# ------------------------------------------------------------------------------------------------------- mu's lm_head


def test_the_head_of_the_rollout_policy_is_kept_for_all_its_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two iterations over two minibatches, with steps: one copy a rollout batch, of the weights that sampled, and never
    two at a time.
    """
    copies: list[Any] = []
    weights: list[torch.Tensor] = []
    run = trainer(
        make("cppo", "exact_tv"), steps_per_generation=2, num_iterations=2, max_steps=8,
        observer=lambda batch, verdict, inputs, update: copies.append(run._trust_divergence.rollout_head),
    )  # fmt: skip
    collect = run._generate_and_score_completions

    def generate(inputs: Any) -> Any:
        weights.append(run.model.lm_head.weight.detach().clone())
        return collect(inputs)

    run._generate_and_score_completions = generate  # type: ignore[method-assign]
    receive = RolloutPass.receive

    def alone(self: RolloutPass, *args: Any) -> None:
        assert run._trust_divergence.rollout_head is None
        receive(self, *args)

    monkeypatch.setattr(RolloutPass, "receive", alone)
    run.train()
    assert len(weights) == 2 and len(copies) == 8
    for batch in range(2):
        assert len({id(head) for head in copies[4 * batch : 4 * batch + 4]}) == 1
        assert torch.equal(copies[4 * batch].weight, weights[batch])
    assert not torch.equal(weights[0], weights[1])


def test_a_frozen_head_is_not_copied() -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    run = trainer(make("cppo", "exact_tv"), peft_config=lora, max_steps=2)
    run.train()
    assert run._trust_divergence.rollout_head is None
    assert run._metrics["train"] is not None and HIDDEN in run._buffered_inputs[0]


def test_a_sharded_head_is_gathered(tmp_path: Any) -> None:
    """FSDP2 keeps the head as a DTensor; its copy for mu does not follow the training."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        policy = model(tied=False)
        before = policy.lm_head.weight.detach().clone()
        fully_shard(policy, mesh=init_device_mesh("cpu", (1,)))
        copy = Head.of(policy, 1.0, torch.float32, copy=True)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(2)
        assert hasattr(policy.lm_head.weight, "full_tensor")
        assert torch.equal(copy.weight, before)
        assert torch.equal(Head.of(policy, 1.0, torch.float32).weight, 2 * before)
    finally:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------------------- memory


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes (views of what it was given do not count)."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        made = [x for x in made if x.untyped_storage().data_ptr() not in given]
        self.elements = max([self.elements, *(x.numel() for x in made)])
        return out


@pytest.mark.parametrize("kind", ["topk_tv", "exact_tv", "adaptive_tv"])
def test_no_logits_are_held(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens x vocabulary = 2.4 million: neither mu's pass nor the scoring in the loss makes a twentieth of that."""
    monkeypatch.setattr(scoring_logits, "CPU_TILE", (64, 512))
    monkeypatch.setattr(trl_head, "CHUNK_ELEMENTS", 20_000)
    seen: dict[str, int] = {}

    def watch(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with _Largest() as largest:
                result = method(*args, **kwargs)
            seen[name] = largest.elements
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(RolloutPass, "receive")
    watch(trl_divergence.HeadDivergence, "score")
    policy = model(vocabulary=3000)
    policy.config.pad_token_id = 0
    run = trainer(make("cppo", kind), model=policy, top_k=3, per_device_train_batch_size=32)
    inputs, _ = rollout_and_drift(run)
    judged(run, inputs)
    tokens = inputs["completion_ids"].numel()
    assert tokens * 3000 > 2_000_000
    assert set(seen) == {"receive", "score"}
    weight = 3000 * 32  # the head itself, which is copied in mu's pass
    assert 0 < seen["receive"] <= weight
    states = tokens * 32
    assert 0 < seen["score"] <= max(states, 64 * 512, 20_000)


def test_gradients_do_not_depend_on_what_is_stored() -> None:
    """exact_tv measured by the top K of the whole vocabulary: the same loss and gradients by another road."""
    runs = {}
    for kind, k in (("exact_tv", 3), ("topk_tv", 1000)):
        run = trainer(make("cppo", "exact_tv", divergence=kind), top_k=k)
        inputs, _ = rollout_and_drift(run)
        loss = run._compute_loss(run.model, inputs)
        runs[kind] = (loss.detach(), gradients(run.model, loss))
    torch.testing.assert_close(runs["exact_tv"][0], runs["topk_tv"][0])
    for name, gradient in runs["exact_tv"][1].items():
        torch.testing.assert_close(gradient, runs["topk_tv"][1][name], rtol=1e-3, atol=1e-6, msg=name)
