"""Advantages from the rewards of a group of responses to one prompt, and the filter of groups without any spread."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["zscore", "zscore_population", "centred"]


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    if rewards.dim() != 1 or group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"rewards has shape {list(rewards.shape)} and group_size is {group_size}: expected a flat tensor [P * n], "
            "the n responses of a prompt next to each other."
        )
    return rewards.detach().to(torch.float64 if rewards.dtype == torch.float64 else torch.float32).view(-1, group_size)


def group_advantages(rewards: Tensor, group_size: int, kind: Kind = "zscore", eps: float = 1e-6) -> Tensor:
    """Group-relative advantages ``[P * n]`` from rewards ``[P * n]``, the n responses of a prompt next to each other.

    ``zscore``: (R - mean) / (std + eps) with the unbiased std (GRPO as in verl; TRL's eps is 1e-4).
    ``zscore_population``: std over n. ``centred``: R - mean (Dr.GRPO, DPPO). A group of one response has no baseline:
    its advantage is its reward divided by 1 + eps, as in verl, for the z-scores, and 0 centred.

    Raises
    ------
    ValueError : shape and group size do not fit; an unknown kind.
    """
    groups = _groups(rewards, group_size)
    if kind not in ("zscore", "zscore_population", "centred"):
        raise ValueError(f"advantage kind is {kind!r}, expected zscore, zscore_population or centred.")
    if group_size == 1 and kind != "centred":
        return groups.flatten() / (1 + eps)
    equal = groups.amax(-1, keepdim=True) == groups.amin(-1, keepdim=True)
    centred = torch.where(equal, 0.0, groups - groups.mean(-1, keepdim=True))
    if kind == "centred":
        return centred.flatten()
    std = groups.std(-1, keepdim=True, correction=1 if kind == "zscore" else 0)
    return (centred / (std + eps)).flatten()


def zero_spread(rewards: Tensor, group_size: int) -> Tensor:
    """Which responses belong to a group whose rewards are all equal, bool ``[P * n]``.

    Such groups teach nothing. Set the loss mask of these responses to 0: they then leave the loss and, in
    `cppo.objective.aggregate`, every denominator (the "dynamic sampling" of DAPO without resampling).
    """
    groups = _groups(rewards, group_size)
    equal = groups.amax(-1) == groups.amin(-1)
    return equal.repeat_interleave(group_size)
