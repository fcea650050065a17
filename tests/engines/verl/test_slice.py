"""verl's real FSDP2 engine and loss function in one process, without Ray: a training step under each kind of rule.

A tiny Qwen3 on the CPU (`cppo_cpu.platform`); packed (`use_remove_padding`) and padded forwards. The reference is the
same model in plain transformers: every divergence from whole softmax rows, the loss from the slow loops' coefficients,
the gradient by autograd, compared with the gradient that the engine hands to its optimizer.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

pytest.importorskip("verl.trainer", reason="verl is not installed here: make setup-verl")

import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
)
from verl.workers.engine import EngineRegistry

import cppo
from core import reference
from cppo.engines.verl import agent
from cppo.engines.verl import loss as verl_loss
from cppo.engines.verl.config import TrustRegionLossConfig

V, K = 99, 20
LENGTHS = [(3, 5), (4, 2), (2, 9), (5, 4)]  # prompt, response

# loss_mode of verl -> (rule, the same for the slow loops). Limits such that some tokens are held back and some kept.
RULES = {
    "cppo": (
        cppo.CPPO(delta=0.06, delta_b=0.01, budget="fixed"),
        {"delta": 0.06, "delta_b": 0.01, "budget": "fixed", "w_min": 0.8},
    ),
    "cppo_dppo": (cppo.DPPO(delta=0.05, divergence="topk_kl"), {"delta": 0.05}),
    "cppo_trm_avg": (cppo.TRMAvg(delta=0.06, divergence="topk_tv"), {"delta": 0.06}),
    "cppo_minpro": (cppo.MinPRO(), {}),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen3 with peaked enough outputs, and a tokenizer that nobody calls."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    vocabulary = {f"t{i}": i for i in range(V)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), pad_token="t0", eos_token="t1"
    ).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("cpu:gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def engine(model_folder: str, process_group: None) -> Any:
    """verl's FSDP2 engine, float32 on the CPU."""
    precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    made = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=model_folder,
            override_config={"attn_implementation": "sdpa"},
            enable_gradient_checkpointing=False,
            use_remove_padding=True,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", mixed_precision=precision, model_dtype="fp32", use_torch_compile=False, fsdp_size=1
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    made.initialize()
    return made


class Rollouts:
    """Sequences sampled from a disturbed copy of the model (mu), with everything that verl's batch would hold."""

    def __init__(self, folder: str, temperature: float) -> None:
        torch.manual_seed(1)
        self.temperature = temperature
        self.pi = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        mu = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.ids, self.log_mu, self.masks, self.rows = [], [], [], []
        with torch.no_grad():
            for parameter in mu.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
            for p, r in LENGTHS:
                sequence = torch.randint(V, (p,))
                for _ in range(r):
                    row = (mu(input_ids=sequence[None]).logits[0, -1] / temperature).softmax(-1)
                    sequence = torch.cat([sequence, torch.multinomial(row, 1)])
                log_mu = (mu(input_ids=sequence[None]).logits[0] / temperature).log_softmax(-1)
                top = log_mu[p - 1 : -1].topk(K)
                sampled = log_mu[p - 1 : -1].gather(-1, sequence[p:, None])[:, 0]
                attempt = agent.Attempt(
                    *(x.numpy() for x in (sequence[:p], sequence[p:], sampled, top.indices, top.values))
                )
                mask = torch.ones(r, dtype=torch.bool)
                if r > 6:
                    mask[2:4] = False  # tool output
                self.ids.append(sequence)
                self.log_mu.append(log_mu)
                self.masks.append(mask)
                self.rows.append(agent.lay_out(sequence.numpy(), [attempt], K))
        self.advantages = [1.0, -1.0, 0.7, -0.4]

    def batch(self, packed: bool, hook: bool) -> TensorDict:
        nested = lambda parts: torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)  # noqa: E731
        prompts, responses, old, advantages = [], [], [], []
        for x, (p, r), log_mu, a in zip(self.ids, LENGTHS, self.log_mu, self.advantages, strict=True):
            prompts.append(x[:p])
            responses.append(x[p:])
            old.append(log_mu[p - 1 : -1].gather(-1, x[p:, None])[:, 0])
            advantages.append(torch.full((r,), a))
        fields = {
            "input_ids": nested(self.ids),
            "position_ids": nested([torch.arange(len(x)) for x in self.ids]),
            "prompts": nested(prompts),
            "responses": nested(responses),
            "response_mask": nested([m.long() for m in self.masks]),
            "loss_mask": nested([m.long() for m in self.masks]),
            "old_log_probs": nested(old),
            "rollout_log_probs": nested(old),
            "advantages": nested(advantages),
            "teacher_ids": nested([ids for ids, _ in self.rows]),
            "teacher_logprobs": nested([logp for _, logp in self.rows]),
        }
        settings = {
            "use_remove_padding": packed,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": 2,
            "max_token_len_per_gpu": 4096,
            "temperature": self.temperature,
            "global_batch_size": len(LENGTHS),
            "distillation_use_topk": hook,
            "calculate_entropy": False,
            "use_fused_kernels": False,
        }
        return tu.get_tensordict(fields, settings)

    def expected(
        self, rule: cppo.TrustRegion, parameters: dict[str, Any]
    ) -> tuple[float, dict[str, Tensor], list[int]]:
        """(loss, gradients by parameter, dropped tokens), sequence by sequence from the definitions."""
        self.pi.zero_grad()
        tokens = sum(int(m.sum()) for m in self.masks)
        total, dropped = torch.zeros(()), []
        for x, (p, _), log_mu, mask, a in zip(self.ids, LENGTHS, self.log_mu, self.masks, self.advantages, strict=True):
            log_pi = (self.pi(input_ids=x[None]).logits[0, p - 1 : -1] / self.temperature).log_softmax(-1)
            y, log_mu = x[p:], log_mu[p - 1 : -1]
            policy, rollout = (z.gather(-1, y[:, None])[:, 0] for z in (log_pi, log_mu))
            D = None
            if rule.divergence is not None:
                D = [
                    reference.divergence(str(rule.divergence), m, q, int(t), K)
                    for m, q, t in zip(
                        log_mu.double().exp().tolist(), log_pi.detach().double().exp().tolist(), y, strict=True
                    )
                ]
            result = reference.rule(
                rule.name,
                policy.detach().double().tolist(),
                rollout.double().tolist(),
                [a] * len(y),
                mask.tolist(),
                D,
                **parameters,
            )
            assert result.margin > 1e-5
            c = torch.tensor(result.coefficient, dtype=torch.float32)
            total = total + (-c * a * policy * mask).sum() / tokens
            dropped += [int(m and value == 0) for m, value in zip(mask.tolist(), result.coefficient, strict=True)]
        total.backward()
        return float(total), {n: q.grad.clone() for n, q in self.pi.named_parameters()}, dropped


@pytest.fixture(scope="module")
def rollouts(model_folder: str) -> dict[float, Rollouts]:
    return {t: Rollouts(model_folder, t) for t in (1.0, 0.8)}


def actor(mode: str, rule: cppo.TrustRegion) -> FSDPActorConfig:
    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=2,
        fsdp_config=FSDPEngineConfig(strategy="fsdp2"),
        policy_loss=TrustRegionLossConfig(
            loss_mode=mode, rule=rule.parameters(), top_k=K, max_on_policy_divergence=10.0
        ),
    )


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("mode, temperature", [("cppo", 1.0), ("cppo", 0.8), ("cppo_dppo", 1.0), ("cppo_trm_avg", 1.0),
                                               ("cppo_minpro", 1.0)])  # fmt: skip
def test_a_training_step(
    engine: Any,
    rollouts: dict[float, Rollouts],
    mode: str,
    temperature: float,
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss, every gradient and the metrics of one update in two micro-batches."""
    rule, parameters = RULES[mode]
    data = rollouts[temperature]
    gradients: dict[str, Tensor] = {}

    def keep() -> float:  # in place of the optimizer's step: before clipping
        for name, parameter in engine.module.named_parameters():
            grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            gradients[name] = grad.clone()
        return 1.0

    monkeypatch.setattr(engine, "optimizer_step", keep)
    batch = data.batch(packed, hook=rule.divergence is not None)
    with engine.train_mode():
        out = engine.train_batch(batch, loss_function=partial(verl_loss.trust_region_loss, config=actor(mode, rule)))
    loss, want, dropped = data.expected(rule, parameters)
    got = torch.as_tensor(out["loss"], dtype=torch.float64).sum().item()
    assert got == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert set(gradients) == set(want)
    for name, grad in want.items():
        torch.testing.assert_close(gradients[name], grad, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    metrics = {key: value.aggregate() for key, value in out["metrics"].items() if key.startswith("actor/trust/")}
    # two micro-batches of two sequences: verl takes the mean of their fractions
    fractions = []
    for rows, columns in ((slice(0, 2), slice(0, 7)), (slice(2, 4), slice(7, 20))):
        fractions.append(sum(dropped[columns]) / sum(int(m.sum()) for m in data.masks[rows]))
    assert metrics["actor/trust/masked_fraction"] == pytest.approx(sum(fractions) / 2, abs=1e-6)
    if mode != "cppo_minpro":
        assert 0 < sum(dropped) < len(dropped)  # else this proves little
        assert metrics["actor/trust/divergence_max"] > metrics["actor/trust/divergence_mean"] > 1e-3


def test_two_micro_batches_look_at_the_anchor_once(
    engine: Any, rollouts: dict[float, Rollouts], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    look = verl_loss.check_anchor
    monkeypatch.setattr(verl_loss, "check_anchor", lambda data: (calls.append(1), look(data)))
    monkeypatch.setattr(engine, "optimizer_step", lambda: 1.0)
    config = actor("cppo", RULES["cppo"][0])
    for _ in range(2):
        with engine.train_mode():
            engine.train_batch(
                rollouts[1.0].batch(True, True), loss_function=partial(verl_loss.trust_region_loss, config=config)
            )
    assert calls == [1]
