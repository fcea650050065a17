"""SkyRL's own policy worker on a CPU, without Ray and without a language model.

The worker's methods are SkyRL's (`PolicyWorkerBase.forward_backward`, `_forward_backward_micro`), and so are the batch,
its advantages' scaling, the micro-batches and the reduction of metrics. In place of the model stands a table of
log-probabilities, in place of the FSDP strategy one whose backward is `loss.backward()`; CUDA's current device is the
CPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import torch
from skyrl.backends.skyrl_train.distributed.strategy import DistributedStrategy
from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch
from skyrl.backends.skyrl_train.utils.ppo_utils import (
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
)
from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase
from skyrl.train.dataset.preprocess import convert_prompts_responses_to_batch_tensors
from torch import Tensor, nn

from .contract import Sample

#: `seq_mean_token_sum_norm` divides by the rows and by this.
MAX_SEQ_LEN = 40


class Table(nn.Module):
    """A policy whose log-probabilities are given: row i for the sequence that ends in token i."""

    def __init__(self, logp: Tensor) -> None:
        super().__init__()
        self.logp = nn.Parameter(logp)

    def forward(
        self, sequences: Tensor, num_actions: int, *, attention_mask: Tensor, temperature: float, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert options["return_output"] and attention_mask.shape == sequences.shape and temperature == 1.0
        return self.logp[sequences[:, -1]][:, -num_actions:], {"entropy": torch.zeros(sequences.shape)}


class Strategy:
    """What the worker asks of its strategy."""

    world_size = 1
    all_reduce = DistributedStrategy.all_reduce

    def backward(self, loss: Tensor, model: nn.Module, optimizer: Any) -> None:
        loss.backward()


def worker(cfg: Any, model: nn.Module) -> PolicyWorkerBase:
    """A worker as a Ray actor is one: its copy of the loss was unpickled."""
    out = object.__new__(PolicyWorkerBase)
    out.cfg, out.model, out.optimizer, out.strategy = cfg.trainer, model, None, Strategy()
    out.scheduler = SimpleNamespace(get_last_lr=lambda: [1e-6])
    out.mesh_rank = SimpleNamespace(dp_size=1)
    out.device_mesh = SimpleNamespace(get_group=lambda name: None)
    registered = PolicyLossRegistry.get(cfg.trainer.algorithm.policy_loss_type)
    out.policy_loss_fn = cloudpickle.loads(cloudpickle.dumps(registered))
    return out


def batch(samples: Sequence[Sample], loss_reduction: str, rollout: bool = True) -> TrainingInputBatch:
    """SkyRL's batch of one optimizer step, advantages scaled. Sample i's response consists of tokens i."""
    lengths = [len(s.response) for s in samples]
    sequences, attention, response, _, loss_mask, logprobs, _ = convert_prompts_responses_to_batch_tensors(
        SimpleNamespace(pad_token_id=0),
        [[1] * s.prompt for s in samples],
        [[i] * length for i, length in enumerate(lengths)],
        [[0.0] * length for length in lengths],
        [s.response.mask.int().tolist() for s in samples],
        [s.response.rollout.tolist() for s in samples] if rollout else None,
    )
    advantages = torch.tensor([s.advantage for s in samples])[:, None] * response
    out = TrainingInputBatch(
        {
            "sequences": sequences,
            "attention_mask": attention,
            "response_mask": response,
            "loss_mask": loss_mask,
            "rollout_logprobs": logprobs,
            "action_log_probs": torch.full(response.shape, torch.nan),  # no rule may look at them
            "advantages": apply_loss_reduction_to_advantages_minibatch(
                advantages, loss_mask, loss_reduction, micro_batch_size=1, max_seq_len=MAX_SEQ_LEN
            ),
        }
    )
    out.metadata = {"response_length": response.shape[1]}
    return out


def denominators(samples: Sequence[Sample], loss_reduction: str) -> list[float]:
    """What SkyRL documents for each `loss_reduction`, from the samples alone."""
    tokens = [float(s.response.mask.sum()) for s in samples]
    if loss_reduction == "token_mean":
        return [sum(tokens)] * len(samples)
    if loss_reduction == "sequence_mean":
        return [len(samples) * max(t, 1.0) for t in tokens]
    return [float(len(samples) * MAX_SEQ_LEN)] * len(samples)  # seq_mean_token_sum_norm


def table(samples: Sequence[Sample], garbage: float = -7.5) -> Table:
    """The policy's log-probabilities, right-aligned as SkyRL's responses are."""
    logp = torch.full((len(samples), max(len(s.response) for s in samples)), garbage)
    for row, s in zip(logp, samples, strict=True):
        row[-len(s.response) :] = s.response.policy
    return Table(logp)


def rows(batch: TrainingInputBatch, indices: Sequence[int]) -> TrainingInputBatch:
    """Some rows of a batch, as SkyRL's token-based micro-batches take them."""
    index = torch.tensor(list(indices))
    out = TrainingInputBatch({k: None if v is None else v[index] for k, v in batch.items()})
    out.metadata = batch.metadata
    return out


def ask_the_registry(cfg: Any) -> None:
    """In a Ray worker: the loss of SkyRL's registry, for a response whose policy has not moved. Writes report.json."""
    loss = PolicyLossRegistry.get(cfg.trainer.algorithm.policy_loss_type)
    logp = torch.full((1, 2), -1.0)
    value, stats = loss(logp, None, torch.full((1, 2), -1.0), cfg.trainer.algorithm, torch.ones(1, 2), logp)
    rule = loss.prepare(cfg.trainer.algorithm).rule
    told = {"pid": os.getpid(), "rule": repr(rule), "loss": value.item(), "metrics": stats}
    (Path(cfg.trainer.log_path) / "report.json").write_text(json.dumps(told))
