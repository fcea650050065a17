"""verl's policy loss with our rules, on tensors: the contract, the anchor, top-K rows, the first update. Seconds."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

pytest.importorskip("verl.trainer", reason="verl is not installed here: make setup-verl")

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, PolicyLossConfig

import cppo
from cppo import divergence as divergences
from cppo.engines.verl import agent, checks
from cppo.engines.verl import config as vllm_keys
from cppo.engines.verl import loss as verl_loss
from cppo.engines.verl.config import LOSSES, TARGET, TrustRegionLossConfig, rule_of
from cppo.errors import UserError
from cppo.rules import RULES, TrustRegion
from engines import contract
from engines.contract import Outcome, Sample


def actor(rule: TrustRegion, limit: float | None = 0.03, **settings: Any) -> FSDPActorConfig:
    """verl's own actor configuration with a trust region."""
    mode = "cppo" if rule.name == "cppo" else f"cppo_{rule.name}"
    policy_loss = TrustRegionLossConfig(
        loss_mode=mode, rule=rule.parameters(), max_on_policy_divergence=1e9 if limit is None else limit, **settings
    )
    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        fsdp_config=FSDPEngineConfig(strategy="fsdp2"),
        policy_loss=policy_loss,
    )


def nested(parts: Sequence[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)


def micro_batch(samples: Sequence[Sample], tokens: float, sequences: int, old: str = "rollout") -> Any:
    """What verl's engine hands to the loss function: nested tensors of whole sequences and of responses."""
    responses = [s.response for s in samples]
    rollout = nested([r.rollout for r in responses])
    fields = {
        "input_ids": nested([torch.zeros(len(s), dtype=torch.int64) for s in samples]),
        "prompts": nested([torch.zeros(s.prompt, dtype=torch.int64) for s in samples]),
        "responses": nested([torch.zeros(len(r), dtype=torch.int64) for r in responses]),
        "response_mask": nested([r.mask.long() for r in responses]),
        "loss_mask": nested([r.mask.long() for r in responses]),
        "advantages": nested([torch.full((len(r),), s.advantage) for s, r in zip(samples, responses, strict=True)]),
        "old_log_probs": rollout if old == "rollout" else nested([r.policy for r in responses]),
    }
    if old != "missing":
        fields["rollout_log_probs"] = rollout
    return tu.get_tensordict(fields, {"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": sequences})


def outputs(samples: Sequence[Sample]) -> tuple[Tensor, dict[str, Any]]:
    """(leaf [all tokens], verl's model outputs): row t - 1 of a sequence holds log pi of the token at t."""
    leaf = torch.full((sum(len(s) for s in samples),), -7.5)
    start = 0
    for s in samples:
        leaf[start + s.prompt - 1 : start + len(s) - 1] = s.response.policy
        start += len(s)
    leaf.requires_grad_()
    offsets = torch.tensor([0, *(len(s) for s in samples)]).cumsum(0)
    return leaf, {"log_probs": torch.nested.nested_tensor_from_jagged(leaf, offsets)}


class Verl(contract.Engine):
    """verl's real `ppo_loss` around our policy loss."""

    name = "verl"
    layouts = ("nested",)
    anchor_setting = "actor_rollout_ref.rollout.calculate_log_probs=True"
    not_applicable: ClassVar[dict[str, str]] = {
        "shards": "verl gathers log-probabilities and divergences before the loss (Ulysses, context parallelism)",
        "topk": "verl has top-K divergences; without them: test_top_k_without_its_trainer",
    }

    def run(
        self,
        samples: Sequence[Sample],
        rule: Any,
        *,
        layout: str,
        micro_batches: Sequence[Sequence[int]],
        max_on_policy_divergence: float | None = None,
    ) -> Outcome:
        config = actor(rule, max_on_policy_divergence)
        tokens = float(sum(int(s.response.mask.sum()) for s in samples))
        gradients: dict[int, Tensor] = {}
        reported: dict[str, Any] = {}
        for indices in micro_batches:
            chosen = [samples[i] for i in indices]
            leaf, output = outputs(chosen)
            loss, metrics = verl_loss.trust_region_loss(config, output, micro_batch(chosen, tokens, len(samples)))
            (grad,) = torch.autograd.grad(loss, leaf)
            for i, s, part in zip(indices, chosen, grad.split([len(s) for s in chosen]), strict=True):
                gradients[i] = part[s.prompt - 1 : len(s) - 1]
            reported |= {key: value.aggregate() for key, value in metrics.items()}
        order = range(len(samples))
        return Outcome([gradients[i] for i in order], [tokens] * len(samples), reported)

    def run_without_rollout(self, samples: Sequence[Sample], rule: Any) -> None:
        output = outputs(samples)[1]
        verl_loss.trust_region_loss(actor(rule), output, micro_batch(samples, 1.0, 1, old="missing"))


# A policy loss needs a prompt token in front of a response (verl's own condition).
ENGINE = Verl()


@contract.suite(ENGINE)
def test_contract(check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = contract.make_samples
    monkeypatch.setattr(
        contract, "make_samples", lambda *a, **k: [Sample(s.response, max(1, s.prompt)) for s in plain(*a, **k)]
    )
    check()


def test_every_rule_is_registered_under_a_name_of_its_own() -> None:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    assert set(LOSSES.values()) == set(RULES)
    theirs = [name for name, loss in POLICY_LOSS_REGISTRY.items() if loss is not verl_loss.policy_loss]
    assert "dppo_tv" in theirs and "vanilla" in theirs and not any(name.startswith("cppo") for name in theirs)
    assert all(POLICY_LOSS_REGISTRY[name] is verl_loss.policy_loss for name in LOSSES)
    assert set(checks.TRAINERS) <= set(TRAINER_REGISTRY)


def test_micro_batches_of_every_process_report_the_same_keys() -> None:
    """verl reduces metrics over processes key by key and refuses unequal numbers of values."""
    samples = contract.standard(["dppo"])
    calm = [Sample(contract.replace(s.response, policy=s.response.rollout.clone()), s.prompt) for s in samples]
    for name in RULES:
        parameters = {"divergence": "binary_tv"} if RULES[name].divergence is not None else {}
        keys = []
        for group in (samples, calm):
            config = actor(cppo.make_rule(name, **parameters), None)
            for chosen in (group[:2], group[2:]):
                output = outputs(chosen)[1]
                metrics = verl_loss.trust_region_loss(config, output, micro_batch(chosen, 10.0, 2))[1]
                keys.append({key for key, value in metrics.items() if len(value.values) == 1})
        assert all(k == keys[0] for k in keys), name
        assert "actor/trust/masked_fraction" in keys[0]


# -- the anchor and the trainer ---------------------------------------------------------------------------------------


def test_a_recomputed_anchor_is_refused() -> None:
    samples = contract.standard(["dppo"])
    with pytest.raises(UserError, match=r"differ from the sampler's.*bypass_mode=True"):
        verl_loss.trust_region_loss(
            actor(contract.make("dppo")), outputs(samples)[1], micro_batch(samples, 1.0, 1, old="recomputed")
        )


def stock(config: Any, samples: Sequence[Sample], recomputed: bool = False) -> Any:
    """The registered loss as verl's own trainers call it."""
    from verl.workers.utils.losses import ppo_loss

    return ppo_loss(config, outputs(samples)[1], micro_batch(samples, 1.0, 1, old="own" if recomputed else "rollout"))


def test_other_trainers_only_when_asked_for() -> None:
    samples = contract.standard(["dppo"])
    near = [
        Sample(contract.replace(s.response, policy=s.response.rollout + 1e-4 * torch.randn(len(s.response))), s.prompt)
        for s in samples
    ]
    with pytest.raises(UserError, match=r"trainer_mode=cppo_sync.*trainer_checks=False"):
        stock(actor(contract.make("dppo")), near)
    loss, metrics = stock(actor(contract.make("dppo"), trainer_checks=False), near)
    assert loss.isfinite() and 0 < metrics["actor/trust/first_update_divergence"].aggregate() < 1e-3
    with pytest.raises(UserError, match=r"to the last bit.*bypass_mode=True"):
        stock(actor(contract.make("dppo"), trainer_checks=False), samples, recomputed=True)


def test_top_k_without_its_trainer() -> None:
    with pytest.raises(UserError, match=r"no top K came with the batch.*cppo_sync"):
        stock(actor(cppo.CPPO(), trainer_checks=False), contract.standard(["dppo"]))


def test_importance_weights_are_refused() -> None:
    samples = contract.standard(["dppo"])
    x = torch.zeros(1, 3)
    with pytest.raises(UserError, match="double correction"):
        verl_loss.policy_loss(x, x, x, x + 1, config=actor(contract.make("dppo")), rollout_is_weights=x)
    assert samples


def test_another_loss_is_noticed() -> None:
    config = actor(contract.make("dppo"))
    samples = contract.standard(["dppo"])
    verl_loss._region(config.policy_loss)
    object.__setattr__(config.policy_loss, "loss_mode", "vanilla")
    with pytest.raises(UserError, match="another policy loss"):
        verl_loss.trust_region_loss(config, outputs(samples)[1], micro_batch(samples, 1.0, 1))


@pytest.mark.parametrize(
    "mode, rule, words",
    [
        ("cppo", {"delat": 0.1}, "did you mean 'delta'"),
        ("cppo", {"delta": -1.0}, "expected a number above 0"),
        ("cppo_dpo", {}, "cppo_dppo"),
        ("bypass_mode", {}, "use_v1=True"),
        ("vanilla", {}, "expected one of"),
        ("cppo", "0.15", "rule.delta=0.15"),
    ],
)
def test_configuration_speaks(mode: str, rule: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        TrustRegionLossConfig(loss_mode=mode, rule=rule)
    assert words.lower() in str(error.value).lower()


def test_parameters_arrive_from_hydra() -> None:
    from verl.utils.config import omega_conf_to_dataclass

    node = OmegaConf.create({"_target_": TARGET, "loss_mode": "cppo", "rule": {"delta": 0.2, "gate": None}, "top_k": 8})
    made = omega_conf_to_dataclass(node)
    assert made.trust_region() == cppo.CPPO(delta=0.2) and made.uses_top_k and made.top_k == 8
    assert isinstance(made, PolicyLossConfig)
    assert rule_of("cppo_trm_avg", {}) == cppo.TRMAvg()


# -- top-K ------------------------------------------------------------------------------------------------------------


def distributions(seed: int, n: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logits of pi, log mu, sampled ids) of n states."""
    g = torch.Generator().manual_seed(seed)
    mu = (2 * torch.randn(n, vocabulary, generator=g)).log_softmax(-1)
    pi = mu + 0.3 * torch.randn(n, vocabulary, generator=g)
    return pi, mu, torch.multinomial(mu.exp(), 1, generator=g)[:, 0]


@pytest.mark.parametrize("kind", ["topk_tv", "topk_kl", "topk_tv_upper"])
@pytest.mark.parametrize("variant", ["append", "replace_last"])
@pytest.mark.parametrize("vocabulary, k", [(40, 5), (7, 20)])
def test_the_hook_equals_the_definition(kind: str, variant: str, vocabulary: int, k: int) -> None:
    """D from the hook against D from whole rows, token by token; rows without top K are NaN."""
    lengths, prompts = [9, 4, 12], [2, 1, 5]
    config = actor(cppo.DPPO(divergence=kind), top_k=k, topk_variant=variant)
    logits, ids, mu_rows, tokens, want = [], [], [], [], []
    for i, (n, p) in enumerate(zip(lengths, prompts, strict=True)):
        pi, mu, sampled = distributions(i, n, vocabulary)
        sequence = torch.cat([torch.randint(vocabulary, (1,)), sampled])  # token t is drawn from row t - 1
        attempt = agent.Attempt(
            sequence[:p].numpy(),
            sequence[p:].numpy(),
            mu[p - 1 :].gather(-1, sequence[p:, None])[:, 0].numpy(),
            mu[p - 1 :].topk(min(k, vocabulary)).indices.numpy(),
            mu[p - 1 :].topk(min(k, vocabulary)).values.numpy(),
        )
        row_ids, row_mu = agent.lay_out(sequence.numpy(), [attempt], k)
        assert row_ids.shape == (n + 1, k + 1) and row_ids.dtype == torch.int32
        logits.append(torch.cat([pi, torch.zeros(1, vocabulary)]))
        ids.append(row_ids)
        mu_rows.append(row_mu)
        tokens.append(sequence)
        expected = torch.full((n + 1,), torch.nan, dtype=torch.float64)
        log_pi = pi.double().log_softmax(-1)
        for t in range(p - 1, n):
            top = mu[t].topk(min(k, vocabulary)).indices
            y = sequence[t + 1]
            expected[t] = getattr(divergences, kind)(
                log_pi[t, top], mu[t, top].double(), log_pi[t, y], mu[t, y].double(), (top == y).any(), variant
            )
        want.append(expected)
    data = {"teacher_ids": nested(ids), "teacher_logprobs": nested(mu_rows), "input_ids": nested(tokens)}
    got = verl_loss.trust_region_loss(config, data=data, student_logits=torch.cat(logits)[None])[verl_loss.DIVERGENCE]
    assert got.shape == (1, sum(lengths) + len(lengths)) and got.dtype == torch.float32
    torch.testing.assert_close(got[0].double(), torch.cat(want), rtol=1e-5, atol=2e-6, equal_nan=True)


def _slice_of(rank: int, port: int, results: Any) -> None:
    """One of two Ulysses ranks: its part of the rows, as verl's engine calls the hook."""
    from verl.utils import ulysses

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ulysses.set_ulysses_sequence_parallel_group(torch.distributed.group.WORLD)
    config, data, logits = packed_rows()
    mine = ulysses.slice_input_tensor(logits, dim=1)
    found = verl_loss.trust_region_loss(config, data=data, student_logits=mine)[verl_loss.DIVERGENCE]
    results.put((rank, found[0].numpy()))
    torch.distributed.destroy_process_group()


def packed_rows() -> tuple[Any, dict[str, Tensor], Tensor]:
    """Three sequences of 9, 4 and 12 tokens (an odd number of rows in all), drawn one after the other."""
    logits, ids, mu_rows, tokens = [], [], [], []
    for i, n in enumerate((8, 3, 11)):
        pi, mu, sampled = distributions(i, n, 40)
        sequence = torch.cat([torch.tensor([3]), sampled])
        own = mu.gather(-1, sampled[:, None])[:, 0]
        top = mu.topk(5)
        attempt = agent.Attempt(*(x.numpy() for x in (sequence[:1], sampled, own, top.indices, top.values)))
        for part, value in zip((ids, mu_rows), agent.lay_out(sequence.numpy(), [attempt], 5), strict=True):
            part.append(value)
        logits.append(torch.cat([pi, torch.zeros(1, 40)]))
        tokens.append(sequence)
    data = {"teacher_ids": nested(ids), "teacher_logprobs": nested(mu_rows), "input_ids": nested(tokens)}
    return actor(cppo.DPPO(), top_k=5), data, torch.cat(logits)[None]


def test_ulysses_ranks_see_the_same_divergences() -> None:
    """Two sequence-parallel processes, each with half of the rows of a pack (and verl's padding at its end)."""
    config, data, logits = packed_rows()
    whole = verl_loss.trust_region_loss(config, data=data, student_logits=logits)[verl_loss.DIVERGENCE][0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_slice_of, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    parts = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    both = torch.from_numpy(np.concatenate([parts[0], parts[1]]))[: whole.shape[0]]
    torch.testing.assert_close(both, whole, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert (whole.nan_to_num() > 0.01).sum() > 10


def test_shifted_rows_are_refused() -> None:
    """Rows of another token give NaN, and the loss says so instead of judging by them."""
    samples = contract.standard(["dppo"])[:2]
    config = actor(cppo.DPPO())
    _, output = outputs(samples)
    rows = torch.full((sum(len(s) for s in samples),), 0.01)
    offsets = torch.tensor([0, *(len(s) for s in samples)]).cumsum(0)
    calm = [Sample(contract.replace(s.response, policy=s.response.rollout.clone()), s.prompt) for s in samples]
    for missing in (False, True):
        if missing:
            rows[samples[0].prompt + int(samples[0].response.mask.nonzero()[0]) - 1] = torch.nan
        output = outputs(calm)[1]
        output[verl_loss.DIVERGENCE] = torch.nested.nested_tensor_from_jagged(rows, offsets)
        if missing:
            with pytest.raises(UserError, match=r"another token at 1 of"):
                verl_loss.trust_region_loss(config, output, micro_batch(calm, 10.0, 2))
        else:
            assert verl_loss.trust_region_loss(config, output, micro_batch(calm, 10.0, 2))[0].isfinite()


def attempt_of(sequence: np.ndarray, start: int, stop: int, k: int = 3) -> agent.Attempt:
    """An attempt whose rows can be told apart: the top K of token t is t, t + 1, ... with log mu -t."""
    t = np.arange(start, stop)
    return agent.Attempt(
        sequence[:start],
        sequence[start:stop],
        -t.astype(np.float32),
        t[:, None] + np.arange(k)[None],
        -t[:, None].astype(np.float32) - np.arange(k, dtype=np.float32)[None],
    )


def test_rows_of_turns_and_resumed_generations_stay_aligned() -> None:
    """Two turns with tool output between, the second one interrupted twice (once before its first token)."""
    sequence = np.arange(100, 130)
    attempts = [attempt_of(sequence, 5, 12), attempt_of(sequence, 17, 20), attempt_of(sequence, 20, 26)]
    ids, logp = agent.lay_out(sequence, attempts, k=3)
    for t in range(1, 30):
        drawn = 5 <= t < 12 or 17 <= t < 26
        assert ids[t - 1, 0] == (sequence[t] if drawn else -1)
        if drawn:
            assert ids[t - 1, 1:].tolist() == [t, t + 1, t + 2] and logp[t - 1, 0] == -t
    # cut off at the response limit: what lies beyond is left out
    short = agent.lay_out(sequence[:23], attempts, k=3)[0]
    assert torch.equal(short[:22], ids[:22]) and short.shape == (23, 4)


def test_an_edited_history_leaves_rows_empty() -> None:
    sequence = np.arange(100, 130)
    edited = sequence.copy()
    edited[3] = 7  # the loop changed the prompt after the first turn
    ids, _ = agent.lay_out(edited, [attempt_of(sequence, 5, 12)], k=3)
    assert (ids[:, 0] == -1).all()
    retokenised = sequence.copy()
    retokenised[8] = 7
    ids, _ = agent.lay_out(retokenised, [attempt_of(sequence, 5, 12), attempt_of(retokenised, 12, 20)], k=3)
    assert (ids[4:11, 0] == -1).all() and (ids[11:19, 0] >= 0).all()


def test_rows_of_vllm() -> None:
    """vLLM's dictionaries: K + 1 entries where the sampled token is not among the K, fewer for a small vocabulary."""
    pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
    from cppo.engines.verl.sampler import top_k_rows

    entry = SimpleNamespace
    rows = [
        {9: entry(rank=40, logprob=-6.0), 4: entry(rank=1, logprob=-0.1), 2: entry(rank=2, logprob=-3.0)},
        {1: entry(rank=1, logprob=-0.5)},
    ]
    ids, logp = top_k_rows(rows, 2)
    assert ids.tolist() == [[4, 2], [1, 0]] and logp[0].tolist() == pytest.approx([-0.1, -3.0])
    assert logp[1, 1] == -np.inf and vllm_keys.IDS != vllm_keys.LOGP


# -- the configuration as a whole -------------------------------------------------------------------------------------


def composed(*overrides: str) -> Any:
    """verl's own configuration, composed by hydra as its program does."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


GOOD = [
    "trainer.v1.trainer_mode=cppo_sync",
    f"actor_rollout_ref.actor.policy_loss._target_={TARGET}",
    "actor_rollout_ref.actor.policy_loss.loss_mode=cppo",
    "algorithm.rollout_correction.bypass_mode=True",
    "actor_rollout_ref.rollout.calculate_log_probs=True",
    "actor_rollout_ref.rollout.name=vllm",
    "data.train_batch_size=64",
    "actor_rollout_ref.actor.ppo_mini_batch_size=32",
]
BINARY = "+actor_rollout_ref.actor.policy_loss.rule.divergence=binary_tv"


def test_five_lines_are_enough() -> None:
    assert checks.check_config(composed(*GOOD)) == cppo.CPPO()
    assert checks.check_config(composed(*GOOD, BINARY, "trainer.v1.trainer_mode=sync")).divergence == "binary_tv"
    mode = "trainer.v1.trainer_mode=cppo_separate_async"
    assert checks.check_config(composed(*GOOD, mode, "data.train_batch_size=32")) == cppo.CPPO()


@pytest.mark.parametrize(
    "override, words",
    [
        ("trainer.use_v1=False", "Set trainer.use_v1=True"),
        ("algorithm.rollout_correction.bypass_mode=False", "bypass_mode=True"),
        ("actor_rollout_ref.rollout.calculate_log_probs=False", "calculate_log_probs=True"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=vanilla", "expected one of cppo"),
        ("actor_rollout_ref.actor.policy_loss._target_=verl.workers.config.PolicyLossConfig", f"_target_={TARGET}"),
        ("actor_rollout_ref.rollout.top_p=0.95", "rollout.top_p=1"),
        ("actor_rollout_ref.rollout.top_k=50", "rollout.top_k=-1"),
        ("actor_rollout_ref.rollout.temperature=0", "above 0"),
        ("actor_rollout_ref.model.use_fused_kernels=True", "use_fused_kernels=False"),
        ("distillation.enabled=True", "distillation.enabled=False"),
        ("actor_rollout_ref.actor.pad_to_length=True", "pad_to_length=False"),
        ("trainer.v1.trainer_mode=sync", "trainer_mode=cppo_sync"),
        ("trainer.v1.trainer_mode=colocate_async", "trainer_mode=cppo_colocate_async"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size=64", "ppo_mini_batch_size to a part"),
        ("+actor_rollout_ref.actor.policy_loss.rule.divergence=exact_tv", "divergence=topk_tv"),
        ("+actor_rollout_ref.actor.policy_loss.rule.delat=0.1", "Did you mean 'delta'"),
        ("+actor_rollout_ref.rollout.agent.agent_loop_manager_class=a.B", "Leave it unset"),
    ],
)
def test_refused(override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        checks.check_config(composed(*GOOD, override))
    assert words in str(error.value)


def test_refusals_come_together() -> None:
    with pytest.raises(UserError) as error:
        checks.check_config(composed(*GOOD[:3], "trainer.use_v1=False", "actor_rollout_ref.rollout.top_p=0.9"))
    assert str(error.value).count("\n  - ") == 3  # with the missing bypass_mode


def test_temperature_needs_the_samplers_own_probabilities() -> None:
    hot = "actor_rollout_ref.rollout.temperature=0.7"
    assert checks.check_config(composed(*GOOD, hot))
    with pytest.raises(UserError, match="logprobs_mode=processed_logprobs"):
        checks.check_config(composed(*GOOD, hot, "actor_rollout_ref.rollout.logprobs_mode=raw_logprobs"))
    with pytest.raises(UserError, match="re-scored at temperature 1"):
        checks.check_config(composed(*GOOD, hot, "actor_rollout_ref.rollout.name=sglang"))
