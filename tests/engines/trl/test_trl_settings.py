"""Every TRL setting that would silently disable or alter a rule is refused, with a sentence that says what to set."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from trl import GRPOConfig

import cppo
from cppo.engines.trl.settings import TopK, problems, updates_per_rollout
from cppo.engines.trl.trainer import TrustRegionTrainer, trust_region_config

from .trl_setup import OUTPUT, config, dataset, length_reward, model, tokenizer, trainer

BINARY = cppo.CPPO(divergence="binary_tv")

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dead rule": ({"gradient_accumulation_steps": 2}, "exactly one update.*steps_per_generation=M"),
    "dead rule, more accumulation": ({"gradient_accumulation_steps": 4}, "silently dead.*steps_per_generation=M"),
    "one update": ({"steps_per_generation": 1}, "can never act.*steps_per_generation=M"),
    "hook off": ({"off_policy_mask_threshold": None}, "off_policy_mask_threshold=1e"),
    "epsilon": ({"epsilon": 0.2}, "Set epsilon=1e"),
    "epsilon_high": ({"epsilon_high": 0.28}, "Set epsilon_high=1e"),
    "delta": ({"delta": 4.0}, "Set delta=1e30"),
    "no delta": ({"delta": None}, "Set delta=1e30"),
    "loss type": ({"loss_type": "cispo"}, "Set loss_type to one of grpo"),
    "sequence ratio": ({"importance_sampling_level": "sequence"}, "importance_sampling_level='token'"),
    "entropy quantile": ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=1.0"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel=False"),
    "temperature": ({"temperature": 0.0}, "temperature=1.0"),
    "top_p": ({"top_p": 0.95}, "Set top_p=1.0"),
    "top_k": ({"top_k": 20}, "Set top_k=0"),
    "min_p": ({"min_p": 0.05}, "Set min_p=None"),
    "repetition penalty": ({"repetition_penalty": 1.05}, "Set repetition_penalty=1.0"),
    "generation top_p": ({"generation_kwargs": {"top_p": 0.9}}, r"generation_kwargs\['top_p'\].*Remove it"),
    "generation typical_p": ({"generation_kwargs": {"typical_p": 0.9}}, "Remove it"),
    "generation epsilon": ({"generation_kwargs": {"epsilon_cutoff": 1e-3}}, "Remove it"),
    "generation eta": ({"generation_kwargs": {"eta_cutoff": 1e-3}}, "Remove it"),
    "generation n-grams": ({"generation_kwargs": {"no_repeat_ngram_size": 3}}, "Remove it"),
    "generation beams": ({"generation_kwargs": {"num_beams": 4}}, "Remove it"),
    "generation suppressed": ({"generation_kwargs": {"suppress_tokens": [5]}}, "Remove it"),
    "generation minimum": ({"generation_kwargs": {"min_new_tokens": 5}}, "Remove it"),
    "generation greedy": ({"generation_kwargs": {"do_sample": False}}, "Remove it"),
    "generation temperature": ({"generation_kwargs": {"temperature": 0.7}}, "Set temperature=0.7"),
    "save steps": ({"save_strategy": "steps", "save_steps": 3}, "Set save_steps=4"),
    "save share": ({"save_strategy": "steps", "save_steps": 0.1}, "share of the run"),
    "vllm correction": ({"use_vllm": True, "vllm_importance_sampling_correction": False}, "correction=True"),
    "vllm mode": ({"use_vllm": True, "vllm_importance_sampling_mode": "sequence_mask"}, "token_truncate"),
    "vllm cap": ({"use_vllm": True, "vllm_importance_sampling_clip_max": 3.0}, "clip_max=1e"),
    "vllm floor": ({"use_vllm": True, "vllm_importance_sampling_clip_min": 0.5}, "clip_min=None"),
    "vllm regex": ({"vllm_structured_outputs_regex": "[0-9]+"}, "Set it to None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    settings, sentence = REFUSED[name]
    args = config(**settings)
    with pytest.raises(ValueError, match=re.compile(sentence, re.DOTALL)):
        TrustRegionTrainer(None, length_reward, args, rule=BINARY)  # before a model is touched


def test_all_problems_come_in_one_error() -> None:
    args = config(epsilon=0.2, top_p=0.9, gradient_accumulation_steps=2, loss_type="sapo")
    with pytest.raises(ValueError) as error:
        TrustRegionTrainer(None, length_reward, args, rule=BINARY)
    for word in ("epsilon=0.2", "top_p=0.9", "gradient_accumulation_steps=2", "loss_type='sapo'"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("divergence", "sentence"),
    [
        ("topk_tv", "top-K is not known.*binary_tv.*recomputed"),
        ("exact_tv", "other probabilities are not known.*binary_tv.*recomputed"),
        ("adaptive_tv", "other probabilities are not known.*binary_tv.*recomputed"),
    ],
)
def test_vllm_tells_the_sampled_tokens_alone(divergence: str, sentence: str) -> None:
    rule = cppo.CPPO(divergence=divergence)
    with pytest.raises(ValueError, match=re.compile(sentence, re.DOTALL)):
        TrustRegionTrainer(None, length_reward, config(use_vllm=True), rule=rule)
    assert problems(config(use_vllm=True), rule, TopK(anchor="recomputed")) == []


@pytest.mark.parametrize(
    "wrong", [{"top_k": 0}, {"topk_anchor": "old"}, {"topk_variant": "last"}, {"topk_store": "float16"}]
)
def test_bad_parameters_of_the_trainer(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrustRegionTrainer(None, length_reward, config(), **wrong)
    if "topk_anchor" not in wrong:  # they say nothing to a divergence that has no top K
        rule = cppo.CPPO(divergence="exact_tv")
        values = {name.removeprefix("topk_").replace("top_k", "k"): value for name, value in wrong.items()}
        assert problems(config(), rule, TopK(**values)) == []


def test_stores_that_do_not_fit() -> None:
    """A KL is not robust against rounding; a ragged store counts in bytes."""
    for store in ("compact", "ragged"):
        (found,) = problems(config(), cppo.TRMAvg(divergence="topk_kl"), TopK(store=store))
        assert "topk_store='float32'" in found and "'topk_kl'" in found
        assert problems(config(), cppo.CPPO(divergence="adaptive_tv"), TopK(store=store)) == []
    (found,) = problems(config(), cppo.CPPO(), TopK(k=256, store="ragged"))
    assert "255" in found
    assert problems(config(), cppo.CPPO(), TopK(k=256, store="compact")) == []


def test_plain_trl_defaults_are_refused() -> None:
    with pytest.raises(ValueError, match="trust_region_config"):
        TrustRegionTrainer(None, length_reward)
    with pytest.raises(ValueError, match="off_policy_mask_threshold=None"):
        TrustRegionTrainer(None, length_reward, GRPOConfig(OUTPUT, bf16=False, use_cpu=True))
    with pytest.raises(ValueError, match="make_rule"):
        TrustRegionTrainer(None, length_reward, config(), rule="cppo")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_iterations": 4},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 8},
        {"beta": 0.1},
        {"scale_rewards": "batch"},
        {"mask_truncated_completions": True},
        {"save_strategy": "steps", "save_steps": 4},
        {"generation_kwargs": {"top_p": 1.0, "num_beams": 1, "stop_strings": "x"}},
        {"temperature": 0.7},
        {"use_vllm": True},
        {"use_vllm": True, "steps_per_generation": 1},  # the sampler's own log-probabilities: the rule can act
    ],
)
def test_accepted(settings: dict[str, Any]) -> None:
    assert problems(config(**settings), BINARY, TopK()) == []


def test_one_update_a_rollout_is_fine_without_a_rule() -> None:
    assert problems(config(steps_per_generation=1), cppo.NoTrustRegion(), TopK()) == []
    run = trainer(cppo.NoTrustRegion(), steps_per_generation=1, max_steps=1)
    run.train()
    assert run.state.log_history[0]["trust/ratio_max"] == pytest.approx(1)


def test_a_models_own_generation_config_is_checked() -> None:
    policy = model()
    policy.generation_config.typical_p = 0.9
    with pytest.raises(ValueError, match=r"generation_config\.typical_p = None"):
        trainer(BINARY, model=policy)
    policy.generation_config.typical_p, policy.generation_config.top_p = None, 0.8  # TRL overrides this one
    trainer(BINARY, model=policy)


def test_config_presets() -> None:
    args = trust_region_config(output_dir=OUTPUT, steps_per_generation=8, per_device_train_batch_size=8)
    assert args.save_steps == 504  # TRL's 500, moved to the end of a rollout batch
    assert updates_per_rollout(args) == 8
    assert (args.loss_type, args.beta, args.top_k, args.top_p) == ("dr_grpo", 0.0, 0, 1.0)
    assert args.bf16 is torch.accelerator.is_available()
    assert trust_region_config(output_dir=OUTPUT, loss_type="dapo", save_steps=7).save_steps == 7
    TrustRegionTrainer(model(), length_reward, args, train_dataset=dataset(), processing_class=tokenizer())
