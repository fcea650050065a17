"""Context parallelism: the operations of `cppo.layout` on a slice ``[B, T_local]`` of padded rows ``[B, T]``.

No adapter needs it (each gathers whole responses first); it is for training loops of your own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cppo.layout import Padded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Shard:
    """Which part of the sequence axis this process holds under context parallelism.

    Parameters
    ----------
    group : process group over which the sequence axis is split (None: the default group).
    chunks : global indices of this process's chunks, in the order in which they lie in the local tensor. All chunks
        have the same length. Contiguous: rank r of R holds ``(r,)``; zigzag (causal load balance): ``(r, 2R-1-r)``.
    """

    group: ProcessGroup | None
    chunks: tuple[int, ...]

    @classmethod
    def zigzag(cls, group: ProcessGroup | None = None) -> Shard:
        """The layout of Megatron, Transformer Engine and ring attention: rank r of R holds chunks r and 2R-1-r."""
        rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        return cls(group, (rank, 2 * size - 1 - rank))

    @classmethod
    def contiguous(cls, group: ProcessGroup | None = None) -> Shard:
        """Rank r holds the r-th of R equal parts."""
        return cls(group, (torch.distributed.get_rank(group),))


@dataclass(frozen=True)
class Sharded:
    """Tokens ``[B, T_local]``: a context-parallel slice of ``[B, T]``.

    Sums, minima and maxima exchange one number a chunk and a row (all-gather of ``[B, C]``); a quantile and a rank need
    the values themselves and gather ``[B, T]``. Every process of the group must call the same operations in the same
    order.
    """

    shard: Shard

    def _gather(self, x: Tensor) -> Tensor:
        """``[B, C, ...]`` of this process -> ``[B, C * R, ...]`` of all, chunks in global order."""
        group = self.shard.group
        size = torch.distributed.get_world_size(group)
        order = torch.tensor(self.shard.chunks, device=x.device)
        orders = [torch.empty_like(order) for _ in range(size)]
        torch.distributed.all_gather(orders, order, group=group)
        parts = [torch.empty_like(x) for _ in range(size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, 1)[:, torch.cat(orders).argsort()]

    def _chunked(self, x: Tensor) -> Tensor:
        """``[B, T_local]`` -> ``[B, C, L]``."""
        return x.reshape(x.shape[0], len(self.shard.chunks), -1)

    def _mine(self, x: Tensor) -> Tensor:
        return x[:, list(self.shard.chunks)]

    def positions(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return self.exclusive_cumsum(mask.to(dtype))

    def exclusive_cumsum(self, x: Tensor) -> Tensor:
        chunks = self._chunked(x.double())
        totals = self._gather(chunks.sum(-1))
        before = self._mine(totals.cumsum(-1) - totals)
        return (chunks.cumsum(-1) - chunks + before[..., None]).reshape(x.shape).to(x.dtype)

    def exclusive_cummin(self, x: Tensor, initial: float) -> Tensor:
        chunks = self._chunked(x)
        lows = self._gather(chunks.amin(-1))
        before = self._mine(Padded().exclusive_cummin(lows, initial))
        inside = Padded().exclusive_cummin(chunks, math.inf)
        return torch.minimum(inside, before[..., None]).reshape(x.shape)

    def total(self, x: Tensor) -> Tensor:
        return self._gather(self._chunked(x.double()).sum(-1)).sum(-1, keepdim=True).to(x.dtype)

    def maximum(self, x: Tensor) -> Tensor:
        return self._gather(self._chunked(x).amax(-1)).amax(-1, keepdim=True)

    def _whole(self, x: Tensor) -> Tensor:
        """The whole rows ``[B, T]`` in global order."""
        return self._gather(self._chunked(x)).reshape(x.shape[0], -1)

    def quantile(self, x: Tensor, mask: Tensor, q: float) -> Tensor:
        return Padded().quantile(self._whole(x), self._whole(mask), q)

    def rank(self, key: Tensor, mask: Tensor) -> Tensor:
        rank = Padded().rank(self._whole(key), self._whole(mask))
        count = rank.shape[1] // self._chunked(key).shape[-1]
        return self._mine(rank.reshape(rank.shape[0], count, -1)).reshape(key.shape)

    def squeeze(self, x: Tensor) -> Tensor:
        return x[..., 0]
