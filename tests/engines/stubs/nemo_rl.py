"""NeMo-RL around a loss object: signatures, defaults and enums as in facts.json.

The clipped policy-gradient loss has the attributes and metrics that trainers rely on; its value is wrong on purpose.
The wrapper for packed sequences calls the loss once a sequence and adds up. NeMo-RL's package on PyPI is empty, and its
workers need CUDA.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import field, make_dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .facts import fields


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    SEQUENCES = "sequences"
    NONE = "none"


#: All fields of NeMo-RL's, with its defaults.
ClippedPGLossConfig: Any = make_dataclass(
    "ClippedPGLossConfig",
    [(name, Any, field(default=default)) for name, default in fields("nemo-rl", "ClippedPGLossConfig").items()],
    kw_only=True,
)


class ClippedPGLossFn:
    """NeMo-RL's loss as `setup` makes it: here its metrics and attributes; its value is wrong on purpose."""

    input_type = "logprob"

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        self.__dict__.update({name: value for name, value in vars(cfg).items() if name != "token_level_loss"})
        self.loss_type = LossType.TOKEN_LEVEL if cfg.token_level_loss else LossType.SEQUENCE_LEVEL
        if cfg.use_kl_in_reward:
            self.reference_policy_kl_penalty = 0
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.metric_normalizations = {"loss": MetricNormalizer.TOKENS, "num_valid_samples": MetricNormalizer.NONE}

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


class SequencePackingLossWrapper:
    """One call a sequence, without its padding; losses and metrics are added up."""

    def __init__(
        self,
        loss_fn: Any,
        prepare_fn: Callable[..., Any],
        cu_seqlens_q: tuple[int, ...],
        cu_seqlens_q_padded: tuple[int, ...] | None = None,
        vocab_parallel_rank: int | None = None,
        vocab_parallel_group: Any = None,
        context_parallel_group: Any = None,
    ) -> None:
        self.loss_fn, self.prepare_fn, self.edges = loss_fn, prepare_fn, cu_seqlens_q

    def __call__(
        self, next_token_logits: Tensor, data: dict[str, Tensor], global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        total: Any = 0
        metrics: dict[str, Any] = {}
        for i, (start, end) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
            row = {k: v[i : i + 1] for k, v in data.items()}
            row = {k: v[:, : end - start] if v.dim() > 1 else v for k, v in row.items()}
            given, row = self.prepare_fn(logits=next_token_logits[:, start:end], data=row, loss_fn=self.loss_fn)
            sizes = {"global_valid_seqs": global_valid_seqs, "global_valid_toks": global_valid_toks}
            value, stats = self.loss_fn(data=row, **sizes, **given)
            total += value
            for name, number in stats.items():
                metrics[name] = metrics.get(name, 0) + (number.item() if isinstance(number, Tensor) else number)
        return total, metrics


def call_padded(
    loss_fn: Any, logprobs: Tensor, data: dict[str, Tensor], seqs: Tensor, toks: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Rows ``[B, S]``: the log-probabilities of the next token are ``[B, S - 1]``."""
    return loss_fn(next_token_logprobs=logprobs[:, 1:], data=data, global_valid_seqs=seqs, global_valid_toks=toks)


def call_packed(
    loss_fn: Any, logprobs: Tensor, data: dict[str, Tensor], lengths: Iterable[int], seqs: Tensor, toks: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Rows ``[B, S]`` as one packed row; "logits" are the log-probabilities themselves."""

    def prepare(logits: Tensor, data: dict[str, Tensor], loss_fn: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"next_token_logprobs": logits[:, 1:]}, data

    sizes = list(lengths)
    packed = torch.cat([row[:length] for row, length in zip(logprobs, sizes, strict=True)])[None]
    return SequencePackingLossWrapper(loss_fn, prepare, (0, *accumulate(sizes)))(packed, data, seqs, toks)
