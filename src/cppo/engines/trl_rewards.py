"""The rewards of a TRL rollout batch, beside its advantages: what a certificate needs (`cppo.theory.certificate`).

TRL turns rewards into advantages and keeps nothing else of them. Three numbers a response travel along here: its reward
R, the mean reward of the other responses to its prompt (a baseline that does not depend on the response), its prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

REWARD, BASELINE, GROUP = "trust_reward", "trust_baseline", "trust_group"


def attach_rewards(output: dict[str, Any], rewards: Tensor, weights: Tensor, group_size: int, rank: int) -> None:
    """Add `REWARD`, `BASELINE` (float32 ``[B]``, NaN without any score) and `GROUP` (int64 ``[B]``) to one process's
    rollout batch.

    Parameters
    ----------
    rewards : of all processes, ``[N, F]``, a column a reward function, NaN where it gave none. weights : ``[F]``.
    group_size : responses to one prompt; groups are contiguous over the processes in order.
    """
    R = torch.where(rewards.isnan().all(1), torch.nan, (rewards * weights).nansum(1)).float().view(-1, group_size)
    known = (~R.isnan()).sum(1, keepdim=True)
    others = (R.nansum(1, keepdim=True) - R) / (known - 1).clamp(min=1)
    groups = torch.arange(R.shape[0], device=R.device)[:, None].expand_as(R)
    rows = output["completion_mask"].shape[0]
    mine = slice(rank * rows, (rank + 1) * rows)
    for name, values in ((REWARD, R), (BASELINE, others), (GROUP, groups)):
        output[name] = values.reshape(-1)[mine].clone()
