"""TRL behind the shared wall: the contract of every adapter, on the real trainer's own loss and reduction.

The policy's log-probabilities are leaves in place of the model's forward, which `test_trl.py` compares with an
independent reference; everything between them and the loss is TRL's and the adapter's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOTrainer

import cppo
from cppo.engines.support import TrustRegionLoss
from cppo.engines.trl.trainer import HINT, TrustRegionTrainer
from cppo.errors import UserError

from .. import contract
from ..contract import Outcome, Sample
from .trl_setup import make, rollout_and_drift, trainer

#: Columns of prompt and completion that are not there.
PAD = 0


def left(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths, padded on the left with zeros."""
    return pad_sequence([row.flip(0) for row in rows], batch_first=True).flip(1)


def minibatch(samples: Sequence[Sample], tokens: int) -> dict[str, Any]:
    """TRL's view of some samples. tokens : loss tokens of the whole step, times the minibatches of a rollout batch."""
    responses = [sample.response for sample in samples]

    def padded(rows: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(rows), batch_first=True, padding_value=PAD)

    completion = padded([torch.full((len(r),), 5) for r in responses])
    return {
        "prompt_ids": left([torch.full((sample.prompt,), 7) for sample in samples]),
        "prompt_mask": left([torch.ones(sample.prompt, dtype=torch.long) for sample in samples]),
        "completion_ids": completion,
        "completion_mask": (completion != PAD).long(),
        "tool_mask": padded([r.mask.long() for r in responses]),  # holes: what a tool wrote
        "advantages": torch.tensor([sample.advantage for sample in samples]),
        "old_per_token_logps": padded([r.rollout for r in responses]),
        "num_items_in_batch": torch.tensor(float(tokens)),
    }


class TRL(contract.Engine):
    name = "TRL"
    anchor_setting = "logprobs"
    not_applicable: ClassVar = {
        "shards": "TRL's GRPO has no context parallelism",
        "garbage": "TRL computes pi and mu of every column itself and multiplies what is masked by 0",
        "topk": "TRL has them (test_trl_divergence.py)",
    }
    #: One trainer for all checks; each run gets fresh state of the adapter.
    trainer: ClassVar[TrustRegionTrainer]

    def run(
        self,
        samples: Sequence[Sample],
        rule: Any,
        *,
        layout: str,
        micro_batches: Sequence[Sequence[int]],
        max_on_policy_divergence: float | None = None,
    ) -> Outcome:
        run = self.trainer
        run._trust = TrustRegionLoss(rule, "TRL", max_on_policy_divergence, HINT)
        run._metrics["train"].clear()
        tokens = max(1, sum(int(s.response.mask.sum()) for s in samples))
        gradients: dict[int, Tensor] = {}
        for indices in micro_batches:
            chosen = [samples[i] for i in indices]
            leaf = pad_sequence([s.response.policy for s in chosen], batch_first=True).requires_grad_()
            run.leaf = leaf  # type: ignore[attr-defined]
            run._compute_loss(run.model, minibatch(chosen, tokens * run.args.steps_per_generation)).backward()
            assert leaf.grad is not None
            gradients |= {i: row[: len(samples[i].response)] for i, row in zip(indices, leaf.grad, strict=True)}
        metrics = {name: values[-1] for name, values in run._metrics["train"].items() if name.startswith("trust/")}
        return Outcome([gradients[i] for i in range(len(samples))], [float(tokens)] * len(samples), metrics)

    def run_without_rollout(self, samples: Sequence[Sample], rule: Any) -> None:
        def rollout(prompts: list[str], _: Any) -> dict[str, Any]:
            return {"prompt_ids": [[7]] * len(prompts), "completion_ids": [[5, 1]] * len(prompts), "logprobs": None}

        run = trainer(rule, rollout_func=rollout)
        run.model.train()
        run._prepare_inputs(next(iter(run.get_train_dataloader())))


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    """A real trainer whose policy's log-probabilities are those of the samples."""
    # An observer may look at every response: those without loss tokens stay in the minibatch.
    TRL.trainer = trainer(cppo.NoTrustRegion(), loss_type="dapo", observer=lambda *_: None)
    TRL.trainer.model.train()
    TRL.trainer.current_gradient_accumulation_steps = 1

    real = GRPOTrainer._get_per_token_logps_and_entropies

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        if not hasattr(self, "leaf"):  # the trainer of `run_without_rollout`
            return real(self, *arguments, **options)
        return self.leaf, torch.zeros_like(self.leaf), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", forward)
        yield


@contract.suite(TRL())
def test_contract(check: Callable[[], None]) -> None:
    check()


def test_the_first_update_says_what_to_look_at() -> None:
    samples = contract.standard(["dppo"])
    with pytest.raises(UserError, match=r"TRL: at the first update.*generation_config.*max_on_policy_divergence"):
        TRL().go(samples, contract.make("cppo adaptive"), max_on_policy_divergence=0.03)


@pytest.mark.parametrize("kind", ["topk_tv", "exact_tv"])
def test_another_policy_than_the_sampler_stops_a_real_first_update(kind: str) -> None:
    """Weights that changed between rollout and first loss; mu's scores come from TRL's passes."""
    run = trainer(make("dppo", kind), max_on_policy_divergence=0.03)
    inputs, _ = rollout_and_drift(run, scale=1.0)
    with pytest.raises(UserError, match="not the same policy"):
        run._compute_loss(run.model, inputs)
    run = trainer(make("dppo", kind), max_on_policy_divergence=0.03)
    inputs, _ = rollout_and_drift(run, scale=0.0)
    run._compute_loss(run.model, inputs)
