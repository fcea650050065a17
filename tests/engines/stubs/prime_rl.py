"""prime-rl's loss module as far as a custom loss sees it: signatures as in facts.json, one component (rl) of three.

`compute_loss` calls the loss once a sample and divides the sum by the step's scale; metrics are stacked (scalars) or
joined. prime-rl is not on PyPI, and its trainer needs CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass
class LossInputs:
    """One sample, prompt included: float ``[T]``, mask bool ``[T]``."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    """What the loss of a sample returns: a scalar, and scalar or vector metrics."""

    loss: Tensor
    metrics: dict[str, Tensor]


def setup_rl_loss_fn(loss_config: Any) -> Callable[[LossInputs], LossOutputs]:
    """``[trainer.loss] type = "custom"``: the function at ``import_path`` with ``kwargs``."""
    module, name = loss_config.import_path.rsplit(".", 1)
    function = getattr(import_module(module), name)
    return lambda inputs: function(inputs, **loss_config.kwargs)


def compute_loss(
    trainer_logprobs: list[Tensor],
    inference_logprobs: list[Tensor],
    ref_logprobs: list[Tensor] | None,
    advantages: list[Tensor],
    loss_mask: list[Tensor],
    rl_weights: list[Tensor] | None,
    ce_weights: None,
    ref_kl_weights: None,
    rl_loss_fn: Callable[[LossInputs], LossOutputs],
    rl_scale: float,
    ce_scale: int,
    ref_kl_scale: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch. A weight scales its token's loss; 0 removes it from the component's mask."""
    total = trainer_logprobs[0].sum() * 0.0
    collected: dict[str, list[Tensor]] = {}
    weights = rl_weights or [None] * len(trainer_logprobs)
    columns = trainer_logprobs, inference_logprobs, advantages, loss_mask, weights
    for policy, rollout, advantage, mask, weight in zip(*columns, strict=True):
        member = mask if weight is None else mask & (weight != 0)
        out = rl_loss_fn(LossInputs(policy, rollout, None, advantage, member, weight))
        total = total + out.loss
        for key, value in out.metrics.items():
            collected.setdefault(key, []).append(value)
    return total / rl_scale, {k: torch.stack(v) if v[0].dim() == 0 else torch.cat(v) for k, v in collected.items()}


def install(monkeypatch: Any) -> None:
    """Put the module where prime-rl has it."""
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "prime_rl.trainer.rl.loss", sys.modules[__name__])
