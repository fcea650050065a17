"""The rewards of a TRL rollout batch, beside its advantages: what a certificate needs (`cppo.theory.certificate`).

TRL turns rewards into advantages and keeps nothing else of them. What travels along here: each response's reward R, the
mean reward of the other responses to its prompt (a baseline that does not depend on the response), its prompt, and its
tokens as they are before the zero-spread filter takes them out of the loss. Without those, a gain would be estimated
from the groups with spread alone, which were selected by their rewards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

REWARD, BASELINE, GROUP, TOKENS = "trust_reward", "trust_baseline", "trust_group", "trust_tokens"


def attach_rewards(output: dict[str, Any], rewards: Tensor, weights: Tensor, group_size: int, rank: int) -> None:
    """Add `REWARD`, `BASELINE` (float32 ``[B]``, NaN without any score), `GROUP` (int64 ``[B]``) and `TOKENS` (bool
    ``[B, T]``) to one process's rollout batch.

    Parameters
    ----------
    rewards : of all processes, ``[N, F]``, a column a reward function, NaN where it gave none. weights : ``[F]``.
    group_size : responses to one prompt; groups are contiguous over the processes in order.
    """
    R = torch.where(rewards.isnan().all(1), torch.nan, (rewards * weights).nansum(1)).float().view(-1, group_size)
    known = (~R.isnan()).sum(1, keepdim=True)
    others = (R.nansum(1, keepdim=True) - R) / (known - 1).clamp(min=1)
    groups = torch.arange(R.shape[0], device=R.device)[:, None].expand_as(R)
    tokens = output["completion_mask"] != 0
    output[TOKENS] = tokens & (output["tool_mask"] != 0) if "tool_mask" in output else tokens
    rows = tokens.shape[0]
    mine = slice(rank * rows, (rank + 1) * rows)
    for name, values in ((REWARD, R), (BASELINE, others), (GROUP, groups)):
        output[name] = values.reshape(-1)[mine].clone()
