"""NeMo-RL: the contract against the interface of its losses (stubs/nemo_rl.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import cppo
from cppo.engines import nemo_rl
from cppo.engines.nemo_rl import TrustRegionLossFn
from cppo.engines.support import EngineChangedError
from cppo.errors import UserError

from . import contract
from .contract import Outcome, Sample
from .stubs import nemo_rl as stubs_nemo_rl
from .stubs.nemo_rl import ClippedPGLossConfig, ClippedPGLossFn


def clipped(**more: Any) -> ClippedPGLossFn:
    """NeMo-RL's loss with the settings under which this one may stand in for it: its default has a KL term."""
    return ClippedPGLossFn(ClippedPGLossConfig(**{"reference_policy_kl_penalty": 0, **more}))


def rows(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """NeMo-RL's batch: rows ``[B, S]`` of prompt, response and padding; log pi of the token at its own position."""
    width = max(len(s) for s in samples) + 1
    out = {}
    columns = {"policy": "policy", "generation_logprobs": "rollout", "advantages": "advantage", "token_mask": "mask"}
    for name, column in columns.items():
        fill = {"policy": -5.0, "generation_logprobs": -0.5}.get(name, 0.0)
        row = torch.full((len(samples), width), fill)
        for line, s in zip(row, samples, strict=True):
            line[s.prompt : len(s)] = getattr(s.response, column).float()
        out[name] = row
    out["prev_logprobs"] = torch.full_like(out["policy"], -2.0)  # recomputed: only the wrapped loss reads it
    out["sample_mask"] = torch.ones(len(samples))
    return out


class NeMoRL(contract.Engine):
    name = "NeMo-RL"
    layouts = ("padded", "packed")
    anchor_setting = "policy.generation.backend=vllm"
    not_applicable: ClassVar = {"shards": "context parallelism gathers log-probabilities before the loss"}
    token_level: ClassVar[bool] = True

    def run(
        self,
        samples: Sequence[Sample],
        rule: Any,
        *,
        layout: str,
        micro_batches: Sequence[Sequence[int]],
        max_on_policy_divergence: float | None = None,
    ) -> Outcome:
        wrapped = clipped(token_level_loss=self.token_level)
        loss_fn = TrustRegionLossFn(wrapped, rule, max_on_policy_divergence=max_on_policy_divergence)
        counts = [int(s.response.mask.sum()) for s in samples]
        sizes = torch.tensor(float(len(samples))), torch.tensor(float(sum(counts)))
        gradients: dict[int, Tensor] = {}
        summed: dict[str, float] = {}
        for indices in micro_batches:
            chosen = [samples[i] for i in indices]
            data = rows(chosen)
            policy = data.pop("policy").requires_grad_()
            if layout == "padded":
                value, metrics = stubs_nemo_rl.call_padded(loss_fn, policy, data, *sizes)
            else:
                value, metrics = stubs_nemo_rl.call_packed(loss_fn, policy, data, map(len, chosen), *sizes)
            value.backward()
            assert policy.grad is not None
            for i, s, row in zip(indices, chosen, policy.grad, strict=True):
                gradients[i] = row[s.prompt : len(s)]
            for name, number in metrics.items():
                summed[name] = summed.get(name, 0.0) + number
        full = [float(sum(counts)) if self.token_level else float(len(samples) * c) for c in counts]
        return Outcome([gradients[i] for i in range(len(samples))], full, summed)

    def run_without_rollout(self, samples: Sequence[Sample], rule: Any) -> None:
        data = rows(samples)
        policy = data.pop("policy")
        del data["generation_logprobs"]
        one = torch.tensor(1.0)
        stubs_nemo_rl.call_padded(TrustRegionLossFn(clipped(), rule), policy, data, one, one)


class NeMoRLSequenceLevel(NeMoRL):
    """``loss_fn.token_level_loss=false``."""

    token_level = False


@contract.suite(NeMoRL())
def test_contract(check: Callable[[], None]) -> None:
    check()


@contract.suite(NeMoRLSequenceLevel())
def test_contract_sequence_level(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("engine", [NeMoRL(), NeMoRLSequenceLevel()], ids=["token", "sequence"])
def test_metrics_add_up_over_micro_batches(engine: NeMoRL) -> None:
    """The trainer adds up what losses report: means must come with the micro-batch's share."""
    samples = contract.make_samples(3, [12, 5, 30, 8], [2, 1, 5, 3])
    rule = contract.make("dppo")
    one, split = (engine.go(samples, rule, micro_batches=m).metrics for m in ([[0, 1, 2, 3]], [[0, 1], [2], [3]]))
    if engine.token_level:
        for name in ("trust/masked_fraction", "trust/divergence_mean", "trust/kept_fraction", "loss"):
            assert split[name] == pytest.approx(one[name], abs=1e-6)
    assert 0 < split["trust/masked_fraction"] < 1 and split["trust/kept_fraction"] <= 1
    assert one["num_valid_samples"] == split["num_valid_samples"] == 4
    assert one["token_mult_prob_error"] == pytest.approx(split["token_mult_prob_error"])
    assert one["loss"] != 1e6  # the wrapped loss's


def test_samples_that_the_trainer_leaves_out() -> None:
    """``sample_mask`` 0: no gradient, and nothing for the others."""
    samples = contract.standard(["dppo"])
    data = rows(samples)
    policy = data.pop("policy").requires_grad_()
    data["sample_mask"][1] = 0
    loss_fn = TrustRegionLossFn(clipped(), contract.make("dppo"), max_on_policy_divergence=None)
    one = torch.tensor(1.0)
    stubs_nemo_rl.call_padded(loss_fn, policy, data, one, one)[0].backward()
    assert policy.grad is not None and (policy.grad[1] == 0).all()
    for i in (0, 2, 3, 4, 5):
        s = samples[i]
        contract.same([policy.grad[i, s.prompt : len(s)]], [contract.wanted(s, "dppo")], "left out")


def test_the_first_update_is_remembered_across_pickling() -> None:
    """The trainer sends a copy of the loss to its workers at every step: later steps may be off-policy."""
    samples = contract.standard(["dppo"])
    one = torch.tensor(1.0)

    def update(loss_fn: Any, on_policy: bool) -> None:
        data = rows(samples)
        policy = data.pop("policy")
        policy = data["generation_logprobs"].clone() if on_policy else policy
        stubs_nemo_rl.call_padded(loss_fn, policy, data, one, one)

    driver = TrustRegionLossFn(clipped(), "cppo", delta=0.15)
    update(copy.deepcopy(driver), on_policy=True)
    update(copy.deepcopy(driver), on_policy=False)
    another = TrustRegionLossFn(clipped(), "cppo", delta=0.15)
    with pytest.raises(UserError, match="not the same policy"):
        update(another, on_policy=False)
    assert another.judge.rule == cppo.CPPO(delta=0.15, divergence="binary_tv")


def test_attributes_of_the_wrapped_loss() -> None:
    loss_fn = TrustRegionLossFn(clipped(token_level_loss=False))
    assert loss_fn.loss_type is stubs_nemo_rl.LossType.SEQUENCE_LEVEL and loss_fn.input_type == "logprob"
    assert loss_fn.metric_normalizations is loss_fn.wrapped.metric_normalizations
    assert not hasattr(loss_fn, "no_such_thing")


@pytest.mark.parametrize(
    "name, value",
    [
        ("reference_policy_kl_penalty", 0.01),
        ("truncated_importance_sampling_ratio", 2.0),
        ("sequence_level_importance_ratios", True),
        ("positive_example_nll_weight", 0.1),
    ],
)
def test_what_would_be_ignored_is_refused(name: str, value: Any) -> None:
    assert name in nemo_rl.NEUTRAL
    with pytest.raises(UserError, match=f"loss_fn.{name} is {value}"):
        TrustRegionLossFn(clipped(**{name: value}))


def test_nemo_rls_defaults() -> None:
    """Its KL penalty is on by default; in the reward it does no harm here."""
    with pytest.raises(UserError, match=r"reference_policy_kl_penalty is 0\.01"):
        TrustRegionLossFn(ClippedPGLossFn(ClippedPGLossConfig()))
    TrustRegionLossFn(ClippedPGLossFn(ClippedPGLossConfig(use_kl_in_reward=True)))


def test_truncated_sampling_is_refused() -> None:
    data = rows(contract.make_samples(3, [4], [2]))
    policy = data.pop("policy")
    data["curr_logprobs_keep_mask"] = torch.ones(1, policy.shape[1] - 1)
    one = torch.tensor(1.0)
    with pytest.raises(UserError, match=r"policy\.generation\.top_p=1\.0"):
        stubs_nemo_rl.call_padded(TrustRegionLossFn(clipped()), policy, data, one, one)


def test_wrong_settings_say_what_would_be_right() -> None:
    with pytest.raises(UserError, match="Did you mean 'delta'"):
        TrustRegionLossFn(clipped(), "cppo", detla=0.1)
    with pytest.raises(UserError, match="there is no rule 'cpo'"):
        TrustRegionLossFn(clipped(), "cpo")


def test_another_shape_of_the_engine() -> None:
    class LogitLoss:
        def __call__(self, next_token_logits: Tensor, data: Any, global_valid_seqs: Tensor) -> None: ...

    with pytest.raises(EngineChangedError, match="next_token_logprobs"):
        TrustRegionLossFn(LogitLoss())
