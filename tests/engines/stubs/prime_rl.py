"""The interface of prime-rl's loss module, written from its documentation.

Shape of ``src/prime_rl/trainer/rl/loss.py`` and ``docs/algorithms.md`` ("Custom loss") of prime-rl 0.7: the dataclasses
that a custom loss gets and returns, the loop over the samples of a micro-batch, and the reduction. prime-rl is not on
PyPI, and its trainer needs CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
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


def load(import_path: str, kwargs: dict[str, Any]) -> Callable[[LossInputs], LossOutputs]:
    """``[trainer.loss] type = "custom"``: the function at `import_path` with `kwargs`."""
    module, name = import_path.rsplit(".", 1)
    function = getattr(import_module(module), name)
    return lambda inputs: function(inputs, **kwargs)


def compute_loss(
    samples: Sequence[LossInputs], loss_fn: Callable[[LossInputs], LossOutputs], rl_scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch: the sum over samples, divided by the step's scale; metrics stacked (scalars) or joined."""
    total = samples[0].trainer_logprobs.sum() * 0.0
    collected: dict[str, list[Tensor]] = {}
    for inputs in samples:
        if inputs.loss_weights is not None:
            member = inputs.loss_mask & (inputs.loss_weights != 0)
            inputs = LossInputs(**{**vars(inputs), "loss_mask": member})
            if not bool(member.any()):
                continue
        out = loss_fn(inputs)
        total = total + out.loss
        for key, value in out.metrics.items():
            collected.setdefault(key, []).append(value)
    return total / rl_scale, {k: torch.stack(v) if v[0].dim() == 0 else torch.cat(v) for k, v in collected.items()}


def install(monkeypatch: Any) -> None:
    """Put the module where prime-rl has it."""
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "prime_rl.trainer.rl.loss", sys.modules[__name__])
