"""What NeMo-RL does around a loss object, written from its interface.

Shape of ``nemo_rl/algorithms/loss/{interfaces,loss_functions,wrapper}.py`` of NeMo-RL 0.8: the arguments and results of
a loss, the attributes and metrics of its clipped policy-gradient loss that trainers rely on, the wrapper for packed
sequences, and the sum over micro-batches. NeMo-RL's package on PyPI is empty, and its workers need CUDA.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class ClippedPGLossFn:
    """NeMo-RL's loss as `setup` makes it: here its metrics and attributes; its value is wrong on purpose."""

    input_type = "logprob"

    def __init__(self, token_level_loss: bool = True, **more: Any) -> None:
        self.loss_type = LossType.TOKEN_LEVEL if token_level_loss else LossType.SEQUENCE_LEVEL
        self.reference_policy_kl_penalty = more.pop("reference_policy_kl_penalty", 0)
        self.truncated_importance_sampling_ratio = None
        self.sequence_level_importance_ratios = False
        self.positive_example_nll_weight = 0.0
        self.use_fused_linear_logprobs = False
        self.metric_normalizations = {"loss": "tokens", "num_valid_samples": "none"}
        self.__dict__.update(more)

    def __call__(
        self, next_token_logprobs: Tensor, data: dict[str, Tensor], global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        gap = torch.where(mask > 0, data["generation_logprobs"][:, 1:] - data["prev_logprobs"][:, 1:], 0).abs().exp()
        return next_token_logprobs.nan_to_num().sum() * 1e6, {
            "loss": 1e6,
            "token_mult_prob_error": float((gap * mask).sum() / global_valid_toks),
            "num_valid_samples": float(data["sample_mask"].sum()),
        }


def call_padded(
    loss_fn: Any, logprobs: Tensor, data: dict[str, Tensor], seqs: Tensor, toks: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Rows ``[B, S]``: the log-probabilities of the next token are ``[B, S - 1]``."""
    return loss_fn(next_token_logprobs=logprobs[:, 1:], data=data, global_valid_seqs=seqs, global_valid_toks=toks)


def call_packed(
    loss_fn: Any, logprobs: Tensor, data: dict[str, Tensor], lengths: Iterable[int], seqs: Tensor, toks: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Sequence packing: one call a sequence, without its padding; losses and metrics are added up."""
    total = logprobs.new_zeros(())
    metrics: dict[str, Any] = {}
    for i, length in enumerate(lengths):
        row = {k: v[i : i + 1, :length] if v.dim() > 1 else v[i : i + 1] for k, v in data.items()}
        value, stats = call_padded(loss_fn, logprobs[i : i + 1, :length], row, seqs, toks)
        total = total + value
        for name, number in stats.items():
            metrics[name] = metrics.get(name, 0) + (number.item() if isinstance(number, Tensor) else number)
    return total, metrics
