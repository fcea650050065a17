"""Figures by position in a response, in few enough buckets for a file and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cppo.files import rounded

MAX_BUCKETS = 128
TAIL_SHARE = 0.1


def bucket_width(longest: int) -> int:
    """The smallest power of two with which `MAX_BUCKETS` buckets hold `longest` positions."""
    width = 1
    while longest > MAX_BUCKETS * width:
        width *= 2
    return width


def by_position(positions: Tensor, divergence: Tensor | None, held: Tensor) -> dict[str, Any]:
    """Means by position, in at most 128 buckets whose width is the smallest power of two that suffices.

    positions [n] int, 0-based among the loss tokens of a response; divergence [n] or None; held [n] 0/1.  Gives "width"
    (positions a bucket: bucket i holds positions i*width+1 ... (i+1)*width, 1-based) and a list a bucket: "count"
    (tokens), "held_back" (tokens), and, with a divergence, "sum", "mean" and "tail_mean", the mean of the largest
    ceil(count / 10) values.  NaN values are left out of the three. Empty buckets hold null.
    """
    longest = int(positions.max()) + 1 if positions.numel() else 0
    width = bucket_width(longest)
    buckets = -(-longest // width)
    index = positions // width
    result: dict[str, Any] = {
        "width": width,
        "count": torch.bincount(index, minlength=buckets).tolist(),
        "held_back": [int(n) for n in torch.bincount(index, weights=held, minlength=buckets).tolist()],
    }
    if divergence is not None:
        usable = divergence.isfinite()
        order = divergence[usable].argsort(descending=True, stable=True)
        by_bucket = index[usable][order].argsort(stable=True)  # grouped by bucket, largest first inside each
        values = divergence[usable][order][by_bucket]
        counts: Sequence[int] = torch.bincount(index[usable], minlength=buckets).tolist()
        parts = values.split(list(counts))
        result["sum"] = [rounded(float(part.sum()), 9) for part in parts]
        result["mean"] = [rounded(float(part.mean()), 9) if len(part) else None for part in parts]
        result["tail_mean"] = [
            rounded(float(part[: math.ceil(TAIL_SHARE * len(part))].mean()), 9) if len(part) else None for part in parts
        ]
    return result
