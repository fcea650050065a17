"""Trust regions for Tinker's `forward_backward_custom`, top-K divergences included (docs/engines.md).

* `make_datum`: a `Datum` from a prompt and sampled tokens, and a `Rollout`, what the loss must know of it.
* `PolicyLoss` judges rollouts: ``client.forward_backward_custom(data, policy_loss(rollouts))``.
* Top-K: targets ``[L, 1 + K]`` hold the sampled token and mu's K likeliest ids. pi's log-probabilities at all of them
  come back from the same forward pass and give the divergence; the loss is that of column 0.

A server that takes targets ``[L]`` only (SkyRL's) needs a binary divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tinker import TrainingClient, types  # type: ignore[import-not-found]
from torch import Tensor

from cppo import divergence
from cppo.divergence import BINARY
from cppo.engines.support import TrustRegionLoss, check_version, require_parameters
from cppo.errors import UserError
from cppo.rules import TrustRegion
from cppo.tokens import TokenBatch


@dataclass(frozen=True)
class Rollout:
    """Of L targets: log mu, A, whether trained on, each ``[L]``; log mu at the ids in columns 1 to K, ``[L, K]``."""

    logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    topk_logprobs: Tensor | None = None


def make_datum(
    prompt: Sequence[int],
    tokens: Sequence[int],
    logprobs: Sequence[float] | None,
    advantage: float,
    mask: Sequence[bool] | None = None,
    topk_ids: Any = None,
    topk_logprobs: Any = None,
) -> tuple[types.Datum, Rollout]:
    """A datum whose targets are the prompt and T sampled tokens, shifted by one, and its rollout.

    `logprobs` ``[T]`` as in `SampledSequence`; `mask` ``[T]``, default: all; `topk_ids`, `topk_logprobs` ``[T, K]``:
    mu's likeliest ids before each token. UserError: no log-probabilities, or lengths that differ.
    """
    if logprobs is None:
        raise UserError("Tinker: logprobs is None. Give the SampledSequence.logprobs of the client that sampled.")
    mask = [True] * len(tokens) if mask is None else mask

    def aligned(name: str, values: Any, dtype: torch.dtype) -> Tensor:
        """[T, ...] with zeros in front, for the targets inside the prompt."""
        if len(values) != len(tokens):
            raise UserError(f"Tinker: {name} has {len(values)} entries, but there are {len(tokens)} sampled tokens.")
        end = torch.as_tensor(values, dtype=dtype)
        return torch.cat([end.new_zeros(len(prompt) - 1, *end.shape[1:]), end])

    targets = torch.tensor([*prompt, *tokens][1:])
    if topk_ids is not None:
        targets = torch.cat([targets[:, None], aligned("topk_ids", topk_ids, torch.long)], 1)
    # TensorData by hand: the SDK (0.22) may make a bare [L, 1 + K] tensor sparse, and then its forward pass fails.
    inputs = {"target_tokens": types.TensorData.from_torch(targets)}
    logp, kept = aligned("logprobs", logprobs, torch.float32), aligned("mask", mask, torch.bool)
    top = None if topk_logprobs is None else aligned("topk_logprobs", topk_logprobs, torch.float32)
    datum = types.Datum(types.ModelInput.from_ints([*prompt, *tokens][:-1]), inputs)
    return datum, Rollout(logp, torch.full_like(logp, advantage), kept, top)


class PolicyLoss:
    """A rule as a custom loss; one object per run. `max_on_policy_divergence`: see `TrustRegionLoss`."""

    def __init__(self, rule: TrustRegion, max_on_policy_divergence: float | None = 0.03) -> None:
        check_version("tinker", "0.22.0")
        require_parameters(TrainingClient.forward_backward_custom, "data", "loss_fn", engine="Tinker")
        self.judge = TrustRegionLoss(rule, "Tinker", max_on_policy_divergence)

    def __call__(self, rollouts: Sequence[Rollout], denominator: float | None = None) -> Callable[..., Any]:
        """-sum_t c_t A_t log pi(y_t) / `denominator` (default: all loss tokens of `rollouts`) for their data."""

        def loss(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
            targets = [datum.loss_fn_inputs["target_tokens"].to_torch() for datum in data]
            sizes = [len(t) for t in targets]
            if sizes != [len(r.logprobs) for r in rollouts]:
                raise UserError("Tinker: data and rollouts differ in number or length. Give both in the same order.")
            if [t.numel() for t in targets] != [x.numel() for x in logprobs]:
                raise UserError(
                    "Tinker: the server takes targets [L] only. Leave topk_ids out: divergence='binary_tv'."
                )
            ids = torch.cat([t.reshape(len(t), -1) for t in targets])
            policy = torch.cat([x.reshape(n, -1) for x, n in zip(logprobs, sizes, strict=True)])
            columns = zip(*((r.logprobs, r.advantages, r.mask) for r in rollouts), strict=True)
            logp, advantages, mask = map(torch.cat, columns)
            batch = TokenBatch(policy[:, 0], logp, advantages, mask, torch.tensor([0, *sizes]).cumsum(0))
            if (kind := self.judge.rule.divergence) is not None and kind not in BINARY:
                top = [r.topk_logprobs for r in rollouts if r.topk_logprobs is not None]
                batch = batch.with_divergence(_topk_divergence(kind, ids, policy.detach(), logp, top))
            judged = self.judge(batch)
            return judged.loss.sum() / (denominator or max(1.0, float(mask.sum()))), judged.metrics

        return loss


def _topk_divergence(kind: str, ids: Tensor, policy: Tensor, logp: Tensor, topk_logp: list[Tensor]) -> Tensor:
    """D_t ``[N]`` from targets ``[N, 1 + K]``, log pi of them, and log mu of column 0 and of the others."""
    top = torch.cat(topk_logp or [policy[:0]])
    if not kind.startswith("topk_") or top.shape != policy[:, 1:].shape:
        raise UserError(
            f"Tinker: divergence={kind!r} needs topk_ids and topk_logprobs of every datum (make_datum), for topk_tv, "
            "topk_kl or topk_tv_upper. Without them set divergence='binary_tv' or divergence='binary_kl'."
        )
    used = top > -9e4  # the API fills unused slots with id 0 and -99999
    in_policy, in_rollout = (torch.where(used, x, -torch.inf) for x in (policy[:, 1:], top))
    inside = (used & (ids[:, 1:] == ids[:, :1])).any(1)
    return getattr(divergence, kind)(in_policy, in_rollout, policy[:, 0], logp, inside)
