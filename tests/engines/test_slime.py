"""slime: the contract against its loss layer (stubs/slime.py), context parallelism in real processes included."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from cppo.engines import slime
from cppo.engines.support import EngineChangedError
from cppo.errors import UserError

from . import contract
from .contract import Outcome, Sample
from .contract_processes import in_processes
from .stubs import slime as stubs_slime


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """slime's modules in place, and no loss of an earlier test."""
    names: dict[str, Any] = {}
    stubs_slime.install(names)
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    slime.LOSSES.clear()
    yield
    slime.LOSSES.clear()


def settings(rule: Any, limit: float | None) -> dict[str, Any]:
    """The entry ``cppo`` of the YAML file."""
    return {"name": rule.name, **rule.parameters(), "max_on_policy_divergence": limit}


def micro_batch(samples: Sequence[Sample]) -> tuple[dict[str, Any], Tensor]:
    """This process's batch, and its logits ``[1, T, 1]`` with a gradient; fillers wherever no response token stands."""
    columns = [
        {"prompt": s.prompt, **{k: getattr(s.response, k) for k in ("rollout", "advantage", "mask")}} for s in samples
    ]
    parts = []
    for s in samples:
        tokens, places = stubs_slime.held(len(s), len(s.response))
        part = torch.full((stubs_slime.local_length(len(s)),), -9.0)
        part[places] = s.response.policy[tokens]
        parts.append(part)
    return stubs_slime.batch_of(columns), torch.cat(parts)[None, :, None].requires_grad_()


def step(args: Any, samples: Sequence[Sample], micro_batches: Sequence[Sequence[int]]) -> Outcome:
    """One optimizer step of this process: its gradients at response tokens, zeros where it holds none."""
    count = float(sum(int(s.response.mask.sum()) for s in samples))
    size = count if args.calculate_per_token_loss else float(len(samples))
    gradients: dict[int, Tensor] = {}
    metrics: dict[str, Any] = {}
    for indices in micro_batches:
        chosen = [samples[i] for i in indices]
        batch, logits = micro_batch(chosen)
        value, metrics = stubs_slime.share(args, batch, size, logits)
        value.backward()
        assert logits.grad is not None
        parts = logits.grad[0, :, 0].split([stubs_slime.local_length(len(s)) for s in chosen])
        for i, s, part in zip(indices, chosen, parts, strict=True):
            tokens, places = stubs_slime.held(len(s), len(s.response))
            gradients[i] = torch.zeros(len(s.response))
            gradients[i][tokens] = part[places]
            part[places] = 0
            assert (part == 0).all()  # nothing but response tokens gets a gradient
    denominators = [size if args.calculate_per_token_loss else size * int(s.response.mask.sum()) for s in samples]
    return Outcome([gradients[i] for i in range(len(samples))], denominators, metrics)


class Slime(contract.Engine):
    name = "slime"
    layouts = ("packed",)
    shards = (2, 3)
    anchor_setting = "rollout_log_probs"
    per_token: ClassVar[bool] = False

    def run(
        self,
        samples: Sequence[Sample],
        rule: Any,
        *,
        layout: str,
        micro_batches: Sequence[Sequence[int]],
        max_on_policy_divergence: float | None = None,
    ) -> Outcome:
        slime.LOSSES.clear()
        args = stubs_slime.arguments(settings(rule, max_on_policy_divergence), self.per_token)
        return step(args, samples, micro_batches)

    def run_shards(self, samples: Sequence[Sample], cases: Sequence[str], shards: int) -> list[Outcome]:
        return in_processes(run_shard_per_token if self.per_token else run_shard, samples, cases, shards)

    def run_without_rollout(self, samples: Sequence[Sample], rule: Any) -> None:
        batch, logits = micro_batch(samples)
        for missing in ({}, {"rollout_log_probs": []}):
            args = stubs_slime.arguments(settings(rule, None))
            del batch["rollout_log_probs"]
            batch |= missing
            stubs_slime.share(args, batch, 1.0, logits)


class SlimePerToken(Slime):
    """``--calculate-per-token-loss``."""

    shards = (2,)
    per_token = True


def run_shard(samples: list[Sample], cases: list[str], per_token: bool = False) -> list[Outcome]:
    stubs_slime.install(sys.modules)  # type: ignore[arg-type]
    return [
        step(stubs_slime.arguments(settings(contract.make(case), None), per_token), samples, [range(len(samples))])
        for case in cases
    ]


def run_shard_per_token(samples: list[Sample], cases: list[str]) -> list[Outcome]:
    return run_shard(samples, cases, per_token=True)


@contract.suite(Slime())
def test_contract(check: Callable[[], None]) -> None:
    check()


@contract.suite(SlimePerToken())
def test_contract_per_token(check: Callable[[], None]) -> None:
    check()


def test_metrics_are_sums_in_the_reducers_unit() -> None:
    """slime adds them up over micro-batches and processes and divides by samples (or tokens): a mean must come out."""
    samples = contract.make_samples(3, [12, 5, 30, 8], [2, 1, 5, 3])
    rule = contract.make("dppo")
    for per_token in (False, True):
        summed: dict[str, float] = {}
        for indices in ([0, 1], [2], [3]):
            slime.LOSSES.clear()
            args = stubs_slime.arguments(settings(rule, None), per_token)
            batch, logits = micro_batch([samples[i] for i in indices])
            for name, value in stubs_slime.share(args, batch, 1.0, logits)[1].items():
                summed[name] = summed.get(name, 0.0) + value
        masked = torch.cat([_coefficients(rule, s) == 0 for s in samples])
        unit = float(len(masked)) if per_token else float(len(samples))
        got = summed["trust/masked_fraction"] / unit
        if per_token:
            assert got == pytest.approx(masked.float().mean().item(), abs=1e-6)
        else:  # a mean over micro-batches, weighted by their samples
            assert 0 < got < 1
        assert summed["trust/kept_fraction"] / unit <= 1


def _coefficients(rule: Any, sample: Sample) -> Tensor:
    c = torch.tensor(sample.response.reference("dppo").coefficient)
    return c[sample.response.mask]


def test_a_process_without_response_tokens_runs_backward() -> None:
    """Context parallelism may leave a process nothing; its collectives must still be entered."""
    samples = contract.make_samples(3, [4], [2])
    batch, logits = micro_batch(samples)
    for key in ("advantages", "rollout_log_probs"):
        batch[key] = [x[:0] for x in batch[key]]
    batch |= {"response_lengths": [0], "total_lengths": [6], "loss_masks": [batch["loss_masks"][0][:0]]}
    value, _ = stubs_slime.share(stubs_slime.arguments({"name": "cppo"}), batch, 1.0, logits)
    assert value.item() == 0
    value.backward()
    assert logits.grad is not None and (logits.grad == 0).all()


@pytest.mark.parametrize(
    "name, value", [("use_tis", True), ("use_opsm", True), ("entropy_coef", 0.01), ("kl_loss_coef", 0.1)]
)
def test_what_would_be_ignored_is_refused(name: str, value: Any) -> None:
    args = stubs_slime.arguments({"name": "cppo"})
    setattr(args, name, value)
    with pytest.raises(UserError, match=name.replace("_", "-")):
        stubs_slime.share(args, *_any())


def test_truncated_sampling_is_refused() -> None:
    args = stubs_slime.arguments({"name": "cppo"})
    args.rollout_top_p = 0.9
    with pytest.raises(UserError, match="--rollout-top-p to 1"):
        stubs_slime.share(args, *_any())


@pytest.mark.parametrize(
    "given, message",
    [
        (None, "--custom-config-path"),
        ({"delta": 0.1}, "expected a rule with its parameters"),
        ({"name": "cppo", "detla": 0.1}, "Did you mean 'delta'"),
        ({"name": "cppo", "divergence": "topk_tv"}, "divergence='binary_tv'"),
    ],
)
def test_wrong_settings_say_what_would_be_right(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stubs_slime.share(stubs_slime.arguments(given), *_any())


def _any() -> tuple[dict[str, Any], float, Tensor]:
    batch, logits = micro_batch(contract.make_samples(3, [4], [2]))
    return batch, 1.0, logits


def test_another_shape_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(logits: Tensor, *, args: Any, tokens: Any) -> None: ...

    monkeypatch.setattr(stubs_slime, "get_log_probs_and_entropy", renamed)
    with pytest.raises(EngineChangedError, match="unconcat_tokens"):
        stubs_slime.share(stubs_slime.arguments({"name": "cppo"}), *_any())
