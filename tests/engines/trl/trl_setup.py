"""What the TRL contract tests share: a small real model, a rollout with perturbed weights, and the reference.

The reference knows nothing of `cppo` or of TRL's loss: ordinary forwards with full logits, then loops over tokens in
float64.
"""

from __future__ import annotations

import atexit
import math
import os
import random
import shutil
import tempfile
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import cppo
from cppo.engines.trl.trainer import TrustRegionTrainer, trust_region_config

#: transformers creates this folder; nothing is saved in it.
OUTPUT = tempfile.mkdtemp(prefix="cppo-trl-")
atexit.register(shutil.rmtree, OUTPUT, ignore_errors=True)

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
TOP_K = 4

#: Rules of the ratio, tight enough that both branches occur on a perturbed model.
RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "ppo_clip": {"eps_low": 0.1, "eps_high": 0.1},
    "cispo": {"ratio_min": 0.9, "ratio_max": 1.1},
    "minpro": {"eps_low": 0.1, "eps_high": 0.1},
}
#: About the medians over the tokens of the perturbed model, of the maxima and of the means of its responses.
SCALES = {
    "binary_tv": (0.0046, 0.025, 0.0063),
    "topk_tv": (0.030, 0.0635, 0.034),
    "topk_tv_upper": (0.2, 0.4, 0.2),
    "binary_kl": (0.00037, 0.0048, 0.0010),
    "topk_kl": (0.0052, 0.0215, 0.0076),
    "exact_tv": (0.065, 0.1314, 0.0885),
    "adaptive_tv": (0.065, 0.1314, 0.0885),
    "exact_kl": (0.017, 0.0548, 0.0256),
}
NEED_DIVERGENCE = ("dppo", "trm_max", "trm_avg", "trm_max_avg", "cppo")


def parameters(rule: str, kind: str | None = None) -> dict[str, Any]:
    """Parameters of a rule at which it drops some tokens and keeps others."""
    if kind is None:
        return RULES[rule]
    token, largest, mean = SCALES[kind]
    return {
        "dppo": {"delta": 1.3 * token},
        "trm_max": {"delta": largest},
        "trm_avg": {"delta": mean},
        "trm_max_avg": {"delta": 1.2 * largest, "delta_avg": 1.1 * mean},
        "cppo": {"delta": 1.5 * token, "delta_b": 0.6 * mean, "budget": "adaptive", "w_min": 0.6},
    }[rule]


def make(rule: str, kind: str | None = None, **changes: Any) -> cppo.TrustRegion:
    """The rule with `parameters`."""
    return cppo.make_rule(rule, **{**parameters(rule, kind), **({"divergence": kind} if kind else {}), **changes})


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(ALPHABET)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left")


#: What some architectures do to their logits after the head, and what they need beside the common sizes.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "cohere": {"logit_scale": 1.5},
    "granite": {"logits_scaling": 0.6},
}


def model(
    tied: bool = True, seed: int = 0, architecture: str = "qwen3", vocabulary: int = len(ALPHABET) + 2
) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.1,
        **ARCHITECTURES[architecture],
    )
    return AutoModelForCausalLM.from_config(config)


def dataset(rows: int = 64) -> Dataset:
    generator = random.Random(0)
    prompts = ["".join(generator.choices(ALPHABET, k=generator.randint(3, 9))) for _ in range(rows)]
    return Dataset.from_list([{"prompt": prompt} for prompt in prompts])


def length_reward(completions: list[str], **_: Any) -> list[float]:
    """Spread in practically every group."""
    return [float(len(c) % 5) for c in completions]


def mixed_reward(completions: list[str], prompts: list[str], **_: Any) -> list[float]:
    """No spread for prompts that begin with a digit or a vowel."""
    return [
        0.1 if prompt[0] in "0123456789aeiou" else float(len(c) % 5)
        for c, prompt in zip(completions, prompts, strict=True)
    ]


def config(**kwargs: Any) -> Any:
    base: dict[str, Any] = {
        "output_dir": OUTPUT,
        "per_device_train_batch_size": 32,
        "steps_per_generation": 2,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "scale_rewards": "none",
        "seed": 7,
    }
    return trust_region_config(**{**base, **kwargs})


def trainer(rule: cppo.TrustRegion | None = None, reward: Any = length_reward, **kwargs: Any) -> TrustRegionTrainer:
    """A trainer on the small model. Keyword arguments of the trainer are taken out, the rest goes to the config."""
    names = (
        "top_k",
        "topk_variant",
        "topk_anchor",
        "topk_store",
        "zero_spread_filter",
        "observer",
        "peft_config",
        "eval_dataset",
        "rollout_func",
        "max_on_policy_divergence",
        "sampler",
    )
    own = {name: kwargs.pop(name) for name in names if name in kwargs}
    policy = kwargs.pop("model", None) or model()
    own.setdefault("top_k", TOP_K)
    own.setdefault("max_on_policy_divergence", None)  # most tests perturb the weights before the first loss
    return TrustRegionTrainer(
        policy, reward, config(**kwargs), rule=rule, train_dataset=dataset(), processing_class=tokenizer(), **own
    )


def rollout_and_drift(run: TrustRegionTrainer, scale: float = 0.12) -> tuple[dict[str, Any], PreTrainedModel]:
    """A real rollout of mu, then perturbed weights; the first minibatch and a copy of mu."""
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    inputs = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    inner = run.accelerator.unwrap_model(run.model)
    # not deepcopy: the forward that TRL patched in would stay bound to the original
    mu = AutoModelForCausalLM.from_config(inner.config)
    mu.load_state_dict(inner.state_dict())
    drift(run.model, scale)
    return inputs, mu


def drift(policy: torch.nn.Module, scale: float, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                spread = parameter.std() if parameter.std() > 0 else torch.tensor(0.02)
                parameter.add_(scale * spread * torch.randn(parameter.shape, generator=generator))


def log_softmax(policy: torch.nn.Module, inputs: dict[str, Any], temperature: float = 1.0) -> Tensor:
    """Full log-probabilities ``[B, T, V]`` by the ordinary forward."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].shape[1]
    logits = policy(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1)


# ------------------------------------------------------------------------------------------------------- the reference


def reference_divergence(kind: str, p: list[float], m: list[float], y: int, variant: str = "append") -> float:
    """D between two full distributions at one state, by explicit classes."""
    top = sorted(range(len(m)), key=lambda v: -m[v])[:TOP_K]
    if kind.startswith(("exact", "adaptive")):
        classes = [[v] for v in range(len(m))]
    elif kind.startswith("binary"):
        classes = [[y]]
    elif variant == "append" or y in top:
        classes = [[v] for v in top] + ([[y]] if y not in top else [])
    else:
        classes = [[v] for v in top[:-1]] + [[y]]
    named = {v for group in classes for v in group}
    if len(named) < len(m):
        classes.append([v for v in range(len(m)) if v not in named])
    pairs = [(sum(p[v] for v in group), sum(m[v] for v in group)) for group in classes]
    if kind.endswith("_kl"):
        return sum(b * math.log(b / a) for a, b in pairs if b > 0)
    distance = 0.5 * sum(abs(a - b) for a, b in pairs)
    return distance + min(pairs[-1]) if kind.endswith("_upper") else distance


def reference_row(rule: str, k: dict[str, Any], r: list[float], d: list[float], a: float) -> list[float]:
    """Coefficients of one response from ratios, divergences and its advantage, as the papers' recursions."""
    n = len(r)
    if rule == "none":
        return r
    if rule == "ppo_clip":
        return [0.0 if (a > 0 and x > 1 + k["eps_high"]) or (a < 0 and x < 1 - k["eps_low"]) else x for x in r]
    if rule == "cispo":
        return [min(max(x, k["ratio_min"]), k["ratio_max"]) for x in r]
    if rule == "minpro":
        out = []
        for t in range(n):
            weight = r[t] * (min(r[:t]) if t else 1.0)
            out.append(min(max(weight, 1 - k["eps_low"]), 1 + k["eps_high"]))
        return out
    if rule == "dppo":
        return [0.0 if a * (x - 1) > 0 and y > k["delta"] else x for x, y in zip(r, d, strict=True)]
    if rule == "trm_max":
        return r if max(d) <= k["delta"] else [0.0] * n
    if rule == "trm_avg":
        return r if sum(d) / n <= k["delta"] else [0.0] * n
    if rule == "trm_max_avg":
        return r if max(d) <= k["delta"] and sum(d) / n <= k["delta_avg"] else [0.0] * n
    assert rule == "cppo"
    budget = k["delta_b"]
    if k["budget"] == "adaptive":
        ordered, at = sorted(d), 0.9 * (n - 1)
        low = int(at)
        p90 = ordered[low] + (at - low) * (ordered[min(low + 1, n - 1)] - ordered[low])
        budget = min(2 * budget, max(budget, p90))
    out, spent, weights = [], 0.0, 0.0
    for t in range(n):
        w = 1.0 if n == 1 else 1 - (1 - k["w_min"]) * t / (n - 1)
        limit = min(k["delta"], k["delta"] + budget * weights - spent)
        out.append(0.0 if a * (r[t] - 1) > 0 and w * d[t] > limit else r[t])
        spent, weights = spent + w * d[t], weights + w
    return out


def reference_coefficients(
    rule: str, limits: dict[str, Any], kind: str | None, pi: Tensor, mu: Tensor, inputs: dict[str, Any], variant: str
) -> Tensor:
    """c ``[B, T]`` in float64 by loops over responses and tokens."""
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    p, m = pi.detach().double().exp().tolist(), mu.double().exp().tolist()
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for row, y in enumerate(inputs["completion_ids"].tolist()):
        columns = [t for t in range(len(y)) if mask[row, t]]
        if not columns:
            continue
        ratios = [p[row][t][y[t]] / m[row][t][y[t]] for t in columns]
        scores = [reference_divergence(kind, p[row][t], m[row][t], y[t], variant) if kind else 0.0 for t in columns]
        found = reference_row(rule, limits, ratios, scores, float(inputs["advantages"][row]))
        for t, value in zip(columns, found, strict=True):
            out[row, t] = value
    return out


def gradients(policy: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_contract(
    rule: str,
    kind: str | None = None,
    variant: str = "append",
    temperature: float = 1.0,
    changes: dict[str, Any] | None = None,
    **kwargs: Any,
) -> float:
    """Loss and all gradients of one minibatch against the reference; the share of tokens that the rule altered."""
    changes = changes or {}
    limits = {**parameters(rule, kind), **changes}
    run = trainer(make(rule, kind, **changes), topk_variant=variant, temperature=temperature, **kwargs)
    inputs, mu = rollout_and_drift(run)
    assert inputs["completion_ids"].shape[0] >= 32 and inputs["completion_ids"].shape[1] >= 24
    loss = run._compute_loss(run.model, inputs)
    got = gradients(run.model, loss)
    pi = log_softmax(run.model, inputs, temperature)
    with torch.no_grad():
        rollout = log_softmax(mu, inputs, temperature)
    c = reference_coefficients(rule, limits, kind, pi, rollout, inputs, variant)
    mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
    tokens = inputs["completion_ids"][..., None]
    logp, old = pi.gather(-1, tokens)[..., 0], rollout.gather(-1, tokens)[..., 0]
    surrogate = (
        c
        * inputs["advantages"].double()[:, None]
        * torch.where(mask, logp.double() - logp.detach().double(), 0.0).exp()
    )
    wanted = -(torch.where(mask, surrogate, 0.0).sum() / (mask.shape[0] * run.max_completion_length))
    want = gradients(run.model, wanted)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-7)
    assert got.keys() == want.keys()
    largest = max(g.abs().max() for g in want.values())
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=2e-3, atol=1e-5 * float(largest), msg=name)
    ratio = (logp.detach() - old).double().exp()
    return float(((c - ratio).abs() > 1e-6)[mask].double().mean())
