"""prime-rl: the contract against the interface of its loss module (stubs/prime_rl.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import cppo
from cppo.engines import prime_rl
from cppo.engines.support import EngineChangedError
from cppo.errors import UserError

from . import contract
from .contract import Outcome, Sample
from .stubs import prime_rl as stubs_prime_rl
from .stubs.prime_rl import LossInputs

PATH = "cppo.engines.prime_rl.loss"


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """prime-rl's module in place, and no loss of an earlier test."""
    stubs_prime_rl.install(monkeypatch)
    prime_rl._prepare.cache_clear()
    yield
    prime_rl._prepare.cache_clear()


def inputs(sample: Sample, **more: Any) -> LossInputs:
    """prime-rl's view: 1-D over prompt and response, fillers in the prompt, a gradient at trainer_logprobs."""
    filler = torch.full((sample.prompt,), -11.0)
    r = sample.response
    return LossInputs(
        trainer_logprobs=torch.cat([filler, r.policy]).requires_grad_(),
        inference_logprobs=torch.cat([torch.zeros(sample.prompt), r.rollout]),
        ref_logprobs=None,
        advantages=torch.cat([torch.zeros(sample.prompt), r.advantage]),
        loss_mask=torch.cat([torch.zeros(sample.prompt).bool(), r.mask]),
        **more,
    )


def compute(
    rows: Sequence[LossInputs], rule: Any, limit: float | None, scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """prime-rl's loss of a micro-batch."""
    loss = stubs_prime_rl.setup_rl_loss_fn(SimpleNamespace(import_path=PATH, kwargs=kwargs(rule, limit)))
    names = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask", "loss_weights")
    policy, rollout, advantages, mask, weights = ([getattr(row, name) for row in rows] for name in names)
    weights = None if weights[0] is None else weights
    return stubs_prime_rl.compute_loss(policy, rollout, None, advantages, mask, weights, None, None, loss, scale, 1, 1)


def kwargs(rule: Any, limit: float | None) -> dict[str, Any]:
    """The kwargs of ``[trainer.loss]``: TOML values only, so None is left out."""
    given = {k: v for k, v in rule.parameters().items() if v is not None}
    return {"rule": rule.name, "max_on_policy_divergence": 1.0 if limit is None else limit, **given}


class PrimeRL(contract.Engine):
    name = "prime-rl"
    layouts = ("packed",)
    anchor_setting = "inference_logprobs"
    not_applicable: ClassVar = {"shards": "context parallelism gathers log-probabilities before the loss"}

    def run(
        self,
        samples: Sequence[Sample],
        rule: Any,
        *,
        layout: str,
        micro_batches: Sequence[Sequence[int]],
        max_on_policy_divergence: float | None = None,
    ) -> Outcome:
        prime_rl._prepare.cache_clear()
        scale = float(sum(int(s.response.mask.sum()) for s in samples))  # over the whole step and all processes
        gradients: dict[int, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for indices in micro_batches:
            rows = [inputs(samples[i]) for i in indices]
            value, metrics = compute(rows, rule, max_on_policy_divergence, scale)
            value.backward()
            for i, row in zip(indices, rows, strict=True):
                assert row.trainer_logprobs.grad is not None
                gradients[i] = row.trainer_logprobs.grad[samples[i].prompt :]
        return Outcome([gradients[i] for i in range(len(samples))], [scale] * len(samples), metrics)

    def run_without_rollout(self, samples: Sequence[Sample], rule: Any) -> None:
        sample = inputs(samples[0])
        sample.inference_logprobs = None  # type: ignore[assignment]
        prime_rl.loss(sample, **kwargs(rule, None))


@contract.suite(PrimeRL())
def test_contract(check: Callable[[], None]) -> None:
    check()


def test_weights_of_the_rl_component() -> None:
    """Weights scale the loss, a weight of 0 removes the token from mask and positions: prime-rl's meaning of them."""
    sample = contract.make_samples(3, [12], [2], holes=0.0)[0]
    weights = torch.cat([torch.zeros(2), torch.full((12,), 0.5)])
    weights[5] = 0
    weighted = inputs(sample, loss_weights=weights)
    rule = cppo.CPPO(divergence="binary_tv")
    compute([weighted], rule, None, 1.0)[0].backward()
    removed = inputs(sample)
    removed.loss_mask[5] = False
    compute([removed], rule, None, 1.0)[0].backward()
    assert removed.trainer_logprobs.grad is not None and removed.trainer_logprobs.grad.abs().sum() > 0
    torch.testing.assert_close(weighted.trainer_logprobs.grad, 0.5 * removed.trainer_logprobs.grad)


def test_metrics_are_scalars_with_the_same_keys_in_every_sample() -> None:
    """prime-rl stacks them over samples and averages."""
    samples = contract.make_samples(3, [12, 2, 30], [2, 1, 5])
    empty = inputs(samples[0])
    empty.loss_mask[:] = False
    seen = [prime_rl.loss(row, max_on_policy_divergence=1.0).metrics for row in [*map(inputs, samples), empty]]
    assert all(metrics.keys() == seen[0].keys() for metrics in seen)
    assert all(value.dim() == 0 for metrics in seen for value in metrics.values())
    assert {"trust/masked_fraction", "trust/divergence_mean", "trust/budget_used"} <= seen[0].keys()


def test_samples_in_one_call_are_refused() -> None:
    """A version that concatenates the samples of a micro-batch hides where responses begin."""
    a, b = (inputs(s) for s in contract.make_samples(3, [12, 9], [2, 3]))
    names = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")
    both = LossInputs(ref_logprobs=None, **{n: torch.cat([getattr(a, n), getattr(b, n)]) for n in names})
    with pytest.raises(UserError, match="different advantages") as error:
        prime_rl.loss(both, max_on_policy_divergence=1.0)
    assert "token_advantages = true" in str(error.value)
    prime_rl.loss(both, max_on_policy_divergence=1.0, token_advantages=True)


def test_wrong_settings_say_what_would_be_right() -> None:
    sample = inputs(contract.make_samples(3, [4], [2])[0])
    with pytest.raises(UserError, match="Did you mean 'delta'"):
        prime_rl.loss(sample, rule="cppo", detla=0.1)
    with pytest.raises(UserError, match="there is no rule 'cpo'"):
        prime_rl.loss(sample, rule="cpo")


def test_another_shape_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Renamed:
        def __init__(self, logprobs: Tensor, old_logprobs: Tensor) -> None: ...

    monkeypatch.setattr(stubs_prime_rl, "LossInputs", Renamed)
    with pytest.raises(EngineChangedError, match="trainer_logprobs") as error:
        prime_rl.loss(None)
    assert "docs/engines.md" in str(error.value)
