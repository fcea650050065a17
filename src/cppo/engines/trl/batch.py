"""What is added to TRL's rollout batch: the filter of groups with equal rewards, and the rewards themselves.

Groups with equal rewards leave TRL's loss and its denominators (DAPO's dynamic sampling, without resampling).

TRL 1.16 gives the responses of such a group advantage 0 but keeps them in the denominators. Here their `tool_mask`
becomes 0 (it enters the loss mask, not the attention) and the denominators follow: `dapo` counts the loss tokens of the
rollout batch again, `bnpo` counts those of a minibatch anyway, and for `grpo` and `dr_grpo`, which divide by the number
of responses, the others get the weight responses / kept responses, so that the mean over a rollout batch is the mean
over the kept ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cppo.engines.support import BASELINE, GROUP, REWARD, TOKENS

#: Key of the per-response weight that the hook multiplies with.
ROW_SCALE = "trust_row_scale"


def drop_zero_spread(
    output: dict[str, Any], group_size: int, loss_type: str, rank: int, gather: Callable[[Tensor], Tensor]
) -> float:
    """Change `output`, one process's scored rollout batch, in place; return the share of groups with equal rewards.

    Parameters
    ----------
    output : TRL's dictionary of a rollout batch: `advantages` ``[B]`` or ``[B, T]``, `completion_mask` ``[B, T]``, ...
    group_size : responses to one prompt; groups are contiguous over the processes in order and may span two of them.
    gather : concatenation over processes along the first axis.
    """
    advantages, mask = output["advantages"], output["completion_mask"]
    rows = advantages.shape[0]
    advantages = advantages.reshape(rows, -1)
    extremes = gather(torch.stack([advantages.amin(1), advantages.amax(1)], 1)).view(-1, group_size, 2)
    # Equal rewards have equal advantages, bit for bit; the slack is for groups with a response that could not be
    # scored.
    equal = extremes[..., 1].amax(1) - extremes[..., 0].amin(1) <= 1e-7
    groups, dropped_groups = len(equal), int(equal.sum())
    if dropped_groups == 0:
        return 0.0
    dropped = equal.repeat_interleave(group_size)[rank * rows : (rank + 1) * rows]
    tool_mask = output.get("tool_mask")
    tool_mask = torch.ones_like(mask) if tool_mask is None else tool_mask
    output["tool_mask"] = tool_mask * (~dropped)[:, None].to(tool_mask.dtype)
    output["num_items_in_batch"] = gather((mask * output["tool_mask"]).sum()).sum()
    if loss_type in ("grpo", "dr_grpo"):
        weight = groups / max(groups - dropped_groups, 1)
        output[ROW_SCALE] = torch.full((rows,), weight, dtype=torch.float32, device=mask.device)
    return dropped_groups / groups


def rows_with_loss(inputs: dict[str, Any], loss_type: str) -> dict[str, Any]:
    """A minibatch without the responses that have no loss token: their forward and backward would be for nothing.

    The loss stays what it is: `dapo` and `bnpo` count loss tokens; for `grpo` and `dr_grpo`, which divide by the number
    of responses, `ROW_SCALE` takes up the difference. Where no response has one, the first stays, so that there is a
    loss to differentiate on every process.

    Parameters
    ----------
    inputs : TRL's minibatch: tensors and lists with an entry for each response, and others, which are handed on.
    """
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    rows = mask.shape[0]
    kept = (mask != 0).any(1).nonzero()[:, 0]
    kept = kept if len(kept) else kept.new_zeros(1)
    if len(kept) == rows:
        return inputs
    numbers = kept.tolist()

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
            return value[kept]
        return [value[at] for at in numbers] if isinstance(value, list) and len(value) == rows else value

    out = {name: cut(value) for name, value in inputs.items()}
    if loss_type in ("grpo", "dr_grpo"):
        scale = out.get(ROW_SCALE, torch.ones(len(kept), device=mask.device))
        out[ROW_SCALE] = scale * (len(kept) / rows)
    return out


def attach_rewards(output: dict[str, Any], rewards: Tensor, weights: Tensor, group_size: int, rank: int) -> None:
    """Add `REWARD`, `BASELINE` (float32 ``[B]``, NaN without any score), `GROUP` (int64 ``[B]``) and `TOKENS` (bool
    ``[B, T]``) to one process's rollout batch.

    Rewards travel along, since advantages do not tell them: groups with equal rewards have advantage 0 whatever the
    reward is, and a gain estimated from the other groups alone would be of responses selected by their rewards.

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
