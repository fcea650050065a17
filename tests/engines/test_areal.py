"""AReaL: the contract with its real actor module, statistics tracker and configuration (loaded by stubs_areal.py)."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from cppo.engines import areal
from cppo.engines.support import RULE_VARIABLE, EngineChangedError, EngineVersionWarning
from cppo.errors import UserError

from . import contract
from .contract import Outcome, Sample
from .stubs import areal as stubs_areal

if "areal" not in sys.modules and find_spec("areal") is None:
    pytest.skip("AReaL is not installed: make setup-engines", allow_module_level=True)


@pytest.fixture(scope="module")
def actor() -> Any:
    """AReaL's actor module."""
    return stubs_areal.load()


@pytest.fixture(autouse=True)
def clean(actor: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """AReaL's own loss in place, empty statistics."""
    monkeypatch.setenv(RULE_VARIABLE, '{"name": "cppo"}')
    theirs = actor.grpo_loss_fn
    yield
    actor.grpo_loss_fn = theirs
    actor.stats_tracker.export_all()
    areal.__dict__.pop("FSDPPPOActor", None)
    areal.__dict__.pop("MegatronPPOActor", None)


def config(**more: Any) -> Any:
    """AReaL's configuration of an actor, with its defaults."""
    return import_module("areal.api.cli_args").PPOActorConfig(**more)


def packed(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """A micro-batch as AReaL's engines hand it over: 1-D, every value one position before its token."""
    out = {}
    for name, fill in (("policy", -6.0), ("logprobs", 0.0), ("advantages", 0.0), ("loss_mask", 0.0)):
        column = {"logprobs": "rollout", "advantages": "advantage", "loss_mask": "mask"}.get(name, name)
        rows = [torch.cat([torch.full((s.prompt,), fill), getattr(s.response, column).float()]) for s in samples]
        out[name] = torch.cat([row.roll(-1) for row in rows])
    out["cu_seqlens"] = torch.tensor([0, *(len(s) for s in samples)]).cumsum(0).to(torch.int32)
    out["prox_logp"] = torch.full_like(out["policy"], -2.0)  # recomputed by AReaL: no rule may read it
    return out


def update(config: Any, data: dict[str, Tensor], policy: Tensor, total: float) -> Tensor:
    """What `PPOActor._ppo_update` and `FSDPEngine` do with a micro-batch: the loss by name, weighted by its tokens."""
    actor = stubs_areal.load()
    loss_fn = functools.partial(
        actor.grpo_loss_fn,
        eps_clip=config.eps_clip,
        eps_clip_higher=config.eps_clip_higher,
        c_clip=config.c_clip,
        rejection_sampling=config.rejection_sampling,
        m2_threshold=config.m2_threshold,
        importance_sampling_level=config.importance_sampling_level,
        current_version=3,
        prox_logp_method=config.prox_logp_method,
        use_sapo_loss=config.use_sapo_loss,
        use_decoupled_loss=config.use_decoupled_loss,
    )
    weight = data["loss_mask"].count_nonzero()
    if weight == 0:  # AReaL does not call the loss then
        return policy.sum() * 0.0
    entropy, extremes = torch.zeros_like(policy), {"vocab_min_logits": policy.detach()}
    value = loss_fn(policy, entropy, data, **extremes, vocab_max_logits=policy.detach())
    return value * (weight / total)


class AReaL(contract.Engine):
    name = "AReaL"
    layouts = ("packed",)
    anchor_setting = "actor.recompute_logprob=false"
    not_applicable: ClassVar = {"shards": "Ulysses and context parallelism gather log-probabilities before the loss"}

    def run(
        self,
        samples: Sequence[Sample],
        rule: Any,
        *,
        layout: str,
        micro_batches: Sequence[Sequence[int]],
        max_on_policy_divergence: float | None = None,
    ) -> Outcome:
        actor = stubs_areal.load()
        actor.grpo_loss_fn = getattr(actor.grpo_loss_fn, "__wrapped__", actor.grpo_loss_fn)
        actor.stats_tracker.export_all()
        settings = {"name": rule.name, **rule.parameters(), "max_on_policy_divergence": max_on_policy_divergence}
        os.environ[RULE_VARIABLE] = json.dumps(settings)
        areal.install(config())
        total = float(sum(int(s.response.mask.sum()) for s in samples))
        gradients: dict[int, Tensor] = {}
        for indices in micro_batches:
            chosen = [samples[i] for i in indices]
            data = packed(chosen)
            policy = data.pop("policy").requires_grad_()
            update(config(), data, policy, total).backward()
            assert policy.grad is not None
            for i, s, row in zip(indices, chosen, policy.grad.split([len(s) for s in chosen]), strict=True):
                gradients[i] = row.roll(1)[s.prompt :]
        metrics = {k: v for k, v in actor.stats_tracker.export_all().items() if v is not None}
        return Outcome([gradients[i] for i in range(len(samples))], [total] * len(samples), metrics)

    def run_without_rollout(self, samples: Sequence[Sample], rule: Any) -> None:
        with pytest.raises(UserError, match=self.anchor_setting):
            areal.install(config(recompute_logprob=True))  # AReaL would overwrite them
        areal.install(config())
        data = packed(samples)
        del data["logprobs"]
        update(config(), data, data.pop("policy"), 1.0)


@contract.suite(AReaL())
def test_contract(check: Callable[[], None]) -> None:
    check()


class Engine:
    """AReaL's train engine reduced to its contract: packs a minibatch, has log-probabilities, steps."""

    def __init__(self, policy: Tensor) -> None:
        self.policy = policy  # [B, S], log pi of the token at its own position
        self.minibatches: list[list[int]] = []

    def train(self) -> None: ...

    def get_version(self) -> int:
        return 3

    def train_batch(self, batch: dict[str, Any], loss_fn: Any, loss_weight_fn: Any) -> dict[str, float]:
        """One optimizer step: one micro-batch."""
        which = batch["row"][:, 0].long()  # AReaL balances minibatches by length
        self.minibatches.append(which.tolist())
        rows = self.policy[which, : batch["loss_mask"].shape[1]].roll(-1, -1)
        data = import_module("areal.utils.data").pack_tensor_dict({**batch, "policy": rows})
        logprobs = data.pop("policy")
        assert loss_weight_fn(data) > 0
        loss_fn(logprobs, torch.zeros_like(logprobs), data).backward()
        return {"loss": 0.0}


def test_areals_own_actor(actor: Any) -> None:
    """`PPOActor.compute_advantages` and `ppo_update`, minibatches and all, with our loss looked up by its name."""
    samples = contract.clear_samples(["dppo"], 40, lengths=[9, 6, 12, 7], prompts=[2, 4, 1, 3], holes=0.0)
    for s in samples:  # holes inside only: AReaL pays the reward at a response's last token
        s.response.mask[2:4] = False
    width = max(len(s) for s in samples)
    names = {"policy": -6.0, "logprobs": 0.0, "loss_mask": 0.0, "attention_mask": 0.0}
    data = {name: torch.full((4, width), fill) for name, fill in names.items()}
    for i, s in enumerate(samples):
        data["policy"][i, s.prompt : len(s)] = s.response.policy
        data["logprobs"][i, s.prompt : len(s)] = s.response.rollout
        data["loss_mask"][i, s.prompt : len(s)] = s.response.mask.float()
        data["attention_mask"][i, : len(s)] = 1
    policy = data.pop("policy").requires_grad_()
    data["input_ids"] = torch.zeros(4, width, dtype=torch.long)
    data["attention_mask"], data["loss_mask"] = data["attention_mask"].bool(), data["loss_mask"].int()
    data["rewards"] = torch.tensor([s.advantage for s in samples])
    data["row"] = torch.arange(4.0)[:, None].expand(4, width).clone()
    os.environ[RULE_VARIABLE] = json.dumps({"name": "dppo", "delta": 0.1, "max_on_policy_divergence": 1.0})
    given = config(ppo_n_minibatches=2, kl_ctl=0.0, discount=1.0, gae_lambda=1.0, adv_norm=None, reward_norm=None)
    areal.install(given)
    engine = Engine(policy)
    theirs = actor.PPOActor(given, engine)
    theirs._ppo_update(theirs._compute_advantages(data))
    assert len(engine.minibatches) == 2 and sorted(i for m in engine.minibatches for i in m) == [0, 1, 2, 3]
    assert policy.grad is not None and (policy.grad != 0).sum() > 10
    for minibatch in engine.minibatches:
        total = sum(int(samples[i].response.mask.sum()) for i in minibatch)  # the engine here weights no further
        for i in minibatch:
            s, row = samples[i], policy.grad[i]
            assert (row[: s.prompt] == 0).all() and (row[len(s) :] == 0).all()
            contract.same([row[s.prompt : len(s)] * total], [contract.wanted(s, "dppo")], f"sample {i}")


def test_statistics() -> None:
    """Per token into AReaL's tracker, which averages over tokens of all processes."""
    samples = contract.standard(["dppo"])
    metrics = AReaL().go(samples, contract.make("dppo"), micro_batches=[[0, 1, 2], [3, 4, 5]]).metrics
    wants = [contract.wanted(s, "dppo")[s.response.mask] for s in samples]
    dropped = torch.cat([want == 0 for want in wants]).float().mean().item()
    assert metrics["trust_masked/avg"] == pytest.approx(dropped)
    assert metrics["n_valid_tokens"] == sum(len(want) for want in wants)
    assert metrics["n_tokens"] == sum(len(s) for s in samples)
    assert metrics["importance_weight/avg"] > 0 and "trust/divergence_mean" in metrics


def test_decoupled_loss_keeps_the_rollouts_log_probabilities() -> None:
    """With the decoupled loss AReaL recomputes into a place of its own: the anchor stays."""
    areal.install(config(recompute_logprob=True, use_decoupled_loss=True))


@pytest.mark.parametrize(
    "name, value",
    [("m2_threshold", 0.04), ("use_sapo_loss", True), ("importance_sampling_level", "sequence")],
)
def test_what_would_be_ignored_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"actor.{name} is {value!r}"):
        areal.install(config(**{name: value}))


def test_every_refused_setting_is_one_of_areals() -> None:
    made = config()
    assert all(getattr(made, name) == neutral for name, neutral in areal.NEUTRAL.items())
    with pytest.raises(UserError, match=r"actor\.rejection_sampling"):
        areal.install(config(rejection_sampling=import_module("areal.api.cli_args").RejectionSamplingConfig(upper=2.0)))


def test_a_pack_that_does_not_fit() -> None:
    areal.install(config())
    data = packed(contract.make_samples(3, [4, 6], [2, 1]))
    policy = data.pop("policy")
    for wrong in (None, data["cu_seqlens"][:-1]):
        with pytest.raises(UserError, match="does not fit"):
            update(config(), {**data, "cu_seqlens": wrong}, policy, 1.0)  # type: ignore[dict-item]
    with pytest.raises(UserError, match="teacher"):
        update(config(), {**data, "teacher_logp": policy}, policy, 1.0)


def test_use_points_the_trainer_and_its_workers_to_our_engines(actor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`areal.engine` with stand-ins for its engine classes, which need CUDA; the import path is what workers get."""
    made: list[Any] = []

    class FSDPPPOActor:
        def __init__(self, config: Any) -> None:
            made.append((config, actor.grpo_loss_fn))

    def not_installed(name: str) -> Any:
        raise ImportError(f"No module named 'megatron' ({name})")

    engine = ModuleType("areal.engine")
    engine.FSDPPPOActor, engine.__getattr__ = FSDPPPOActor, not_installed  # type: ignore[attr-defined, method-assign]
    monkeypatch.setitem(sys.modules, "areal.engine", engine)
    run = SimpleNamespace(actor=config())
    areal.use(run, rule="dppo", delta=0.2, max_on_policy_divergence=0.1)
    ours: Any = engine.FSDPPPOActor  # type: ignore[attr-defined]
    path, _, name = f"{ours.__module__}.{ours.__name__}".rpartition(".")
    assert (path, name) == ("cppo.engines.areal", "FSDPPPOActor")
    assert getattr(import_module(path), name) is ours and issubclass(ours, FSDPPPOActor)
    sent = [spec.env_vars[RULE_VARIABLE] for spec in run.actor.scheduling_spec]
    assert sent and all(json.loads(text) == json.loads(os.environ[RULE_VARIABLE]) for text in sent)
    ours(run.actor)
    ours(run.actor)  # the reference policy is an engine of the same class
    (_, first), (_, second) = made
    assert first is second and str(first.judge.rule).startswith("DPPO(delta=0.2, divergence='binary_tv'")
    assert first.judge.max_on_policy_divergence == 0.1


def test_wrong_settings_say_what_would_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="Did you mean 'delta'"):
        areal.use(SimpleNamespace(actor=config()), detla=0.1)
    with pytest.raises(UserError, match="divergence='binary_tv'"):
        areal.use(SimpleNamespace(actor=config()), divergence="topk_tv")
    monkeypatch.setenv(RULE_VARIABLE, "")
    with pytest.raises(UserError, match="CPPO_RULE"):
        areal.install(config())
    with pytest.raises(AttributeError, match="ArchonPPOActor"):
        _ = areal.ArchonPPOActor


def test_another_shape_of_the_engine(actor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "grpo_loss_fn", lambda logits, batch: None)
    monkeypatch.setattr(areal, "WRITTEN_FOR", "0.9.0")
    with (
        pytest.raises(EngineChangedError, match="logprobs"),
        pytest.warns(EngineVersionWarning, match=r"areal 0\.9\.0"),
    ):
        areal.install(config())
