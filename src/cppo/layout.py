"""Operations along a response: sums, prefix sums, minima, maxima and quantiles over its loss tokens.

* One `Layout` hides how sequences lie in memory, so that a rule is written once:
  padded ``[B, T]``, packed ``[N]`` with boundaries, or a context-parallel shard ``[B, T_local]``.
* "Per sequence" results come back in a shape that broadcasts against tokens: ``[B, 1]`` (padded) or ``[N]`` (packed,
  every token holds its sequence's value). `Layout.squeeze` turns them into ``[B]`` / ``[S]``.
* Nothing here branches on the value of a tensor or synchronises a device; all of it traces under torch.compile.
* Left out on purpose: gradients. Prefix arithmetic decides, it is never differentiated.

Positions count loss tokens (mask == 1) of the response, never columns: padding, a prompt in front and tool output in
between change nothing (spec: CPPO section 4; decision 6 of the ambiguity table).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


class Layout(Protocol):
    """What a rule may ask about a batch of sequences. All tensors have the shape of the tokens unless said
    otherwise.
    """

    def positions(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """t - 1: how many loss tokens come before this one in its sequence (exact in float32 up to 2^24)."""
        ...

    def exclusive_cumsum(self, x: Tensor) -> Tensor:
        """sum_{j<t} x_j, restarted at every sequence."""
        ...

    def exclusive_cummin(self, x: Tensor, initial: float) -> Tensor:
        """min(initial, min_{j<t} x_j), restarted at every sequence; `initial` where there is no earlier token."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """sum_t x_t of the sequence, broadcastable against tokens."""
        ...

    def maximum(self, x: Tensor) -> Tensor:
        """max_t x_t of the sequence, broadcastable against tokens."""
        ...

    def quantile(self, x: Tensor, mask: Tensor, q: float) -> Tensor:
        """Linearly interpolated q-quantile of the x_t with mask_t, broadcastable against tokens; 0 without any
        token.
        """
        ...

    def rank(self, key: Tensor, mask: Tensor) -> Tensor:
        """0-based rank of `key` (values in [0, 1)) among the masked-in tokens of its sequence; arbitrary outside."""
        ...

    def squeeze(self, x: Tensor) -> Tensor:
        """A broadcastable per-sequence value as ``[B]`` (padded) or ``[S]`` (packed)."""
        ...


def quantile_position(count: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """Rank below the q-quantile of ``count`` sorted values, and the weight of the value above it: q(n-1) = rank +
    weight.

    Computed in float64, so that the rank does not flip by rounding for long responses.
    """
    position = q * (count.double() - 1).clamp(min=0)
    below = position.floor()
    return below.long(), position - below


@dataclass(frozen=True)
class Padded:
    """Tokens ``[B, T]``, one sequence a row."""

    def positions(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return mask.cumsum(-1, dtype=dtype).add_(mask, alpha=-1)

    def exclusive_cumsum(self, x: Tensor) -> Tensor:
        return x.cumsum(-1).sub_(x)

    def exclusive_cummin(self, x: Tensor, initial: float) -> Tensor:
        first = torch.full_like(x[..., :1], initial)
        return torch.cat([first, x[..., :-1]], -1).cummin(-1).values

    def total(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    def maximum(self, x: Tensor) -> Tensor:
        return x.amax(-1, keepdim=True) if x.shape[-1] else x.sum(-1, keepdim=True)

    def quantile(self, x: Tensor, mask: Tensor, q: float) -> Tensor:
        # Only the values from the quantile upwards are needed (a tenth of the row for P90), so a partial sort from the
        # top does; from the bottom where q is small. Unlike torch.quantile it has no limit of 2^24 elements.
        width = x.shape[-1]
        if width == 0:
            return x.sum(-1, keepdim=True)
        count = mask.sum(-1, keepdim=True)
        below, weight = quantile_position(count, q)
        from_top = q >= 0.5
        need = min(width, math.ceil((1 - q if from_top else q) * (width - 1)) + 2)
        fill = -math.inf if from_top else math.inf
        ordered = torch.where(mask, x, x.new_full((), fill)).topk(need, -1, largest=from_top).values
        last = (count - 1).clamp(min=0)
        above = torch.minimum(below + 1, last)
        if from_top:
            below, above = last - below, last - above
        low = ordered.gather(-1, below.clamp(max=need - 1))
        high = ordered.gather(-1, above.clamp(max=need - 1))
        value = torch.lerp(low, high, weight.to(x.dtype))
        return torch.where(count > 0, value, torch.zeros_like(value))

    def rank(self, key: Tensor, mask: Tensor) -> Tensor:
        # Masked-out keys sort behind all others, so ranks of loss tokens count loss tokens only.
        order = torch.where(mask, key, key.new_full((), 2.0)).argsort(dim=-1, stable=True)
        return torch.empty_like(order).scatter_(
            -1, order, torch.arange(key.shape[-1], device=key.device).expand_as(order)
        )

    def squeeze(self, x: Tensor) -> Tensor:
        return x[..., 0] if x.shape[-1] else x.sum(-1)


@dataclass(frozen=True)
class Packed:
    """Tokens ``[N]``; sequence s owns ``cu_seqlens[s] : cu_seqlens[s + 1]``. Sums run in float64.

    One global cumulative sum serves all sequences; its value at a boundary is subtracted. In float32 that difference
    would lose the budget of late sequences to rounding (1e7 tokens before them), hence float64.
    """

    cu_seqlens: Tensor

    def segment(self, length: int) -> Tensor:
        """Index of the sequence of each of the N tokens, int64 ``[N]``."""
        positions = torch.arange(length, device=self.cu_seqlens.device, dtype=self.cu_seqlens.dtype)
        found = torch.searchsorted(self.cu_seqlens[1:].contiguous(), positions, right=True)
        return found.clamp(max=self.cu_seqlens.shape[0] - 2)

    def _running(self, x: Tensor) -> Tensor:
        """c[i] = sum of the first i tokens of the whole pack, float64 ``[N + 1]``."""
        return torch.cat([x.new_zeros(1, dtype=torch.float64), x.double().cumsum(0)])

    def positions(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return self.exclusive_cumsum(mask.to(dtype))

    def exclusive_cumsum(self, x: Tensor) -> Tensor:
        running = self._running(x)
        start = self.cu_seqlens.long()[self.segment(x.shape[0])]
        return (running[:-1] - running[start]).to(x.dtype)

    def exclusive_cummin(self, x: Tensor, initial: float) -> Tensor:
        # Segmented scan by doubling: after step k, m[i] covers the 2^k tokens up to i of the same sequence.
        length = x.shape[0]
        segment = self.segment(length)
        index = torch.arange(length, device=x.device)
        start = self.cu_seqlens.long()[segment]
        m = x
        reach = 1
        while reach < length:
            earlier = torch.cat([m.new_full((reach,), math.inf), m[:-reach]])
            m = torch.where(index - reach >= start, torch.minimum(m, earlier), m)
            reach *= 2
        previous = torch.cat([m.new_full((1,), initial), m[:-1]])
        return torch.where(index > start, previous, m.new_full((), initial)).clamp(max=initial)

    def _per_sequence(self, x: Tensor) -> Tensor:
        running = self._running(x)
        edges = running[self.cu_seqlens.long()]
        return (edges[1:] - edges[:-1]).to(x.dtype)

    def total(self, x: Tensor) -> Tensor:
        return self._per_sequence(x)[self.segment(x.shape[0])]

    def maximum(self, x: Tensor) -> Tensor:
        segment = self.segment(x.shape[0])
        out = x.new_full((self.cu_seqlens.shape[0] - 1,), -math.inf)
        return out.scatter_reduce(0, segment, x, "amax")[segment]

    def quantile(self, x: Tensor, mask: Tensor, q: float) -> Tensor:
        if x.shape[0] == 0:
            return x
        segment = self.segment(x.shape[0])
        ordered = self._sorted(x, mask, segment)[0]
        count = self._per_sequence(mask.to(torch.float64))
        below, weight = quantile_position(count, q)
        start = self.cu_seqlens.long()[:-1]
        last = (count.long() - 1).clamp(min=0)
        end = x.shape[0] - 1
        low = ordered[(start + below).clamp(max=end)]
        high = ordered[(start + torch.minimum(below + 1, last)).clamp(max=end)]
        value = torch.lerp(low, high, weight.to(x.dtype))
        return torch.where(count > 0, value, torch.zeros_like(value))[segment]

    def _sorted(self, x: Tensor, mask: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
        """Values sorted within each sequence (masked-out ones last), and the permutation that does it."""
        filled = torch.where(mask, x, x.new_full((), math.inf))
        by_value = filled.argsort(dim=0, stable=True)
        order = by_value[segment[by_value].argsort(dim=0, stable=True)]
        return filled[order], order

    def rank(self, key: Tensor, mask: Tensor) -> Tensor:
        segment = self.segment(key.shape[0])
        order = self._sorted(key, mask, segment)[1]
        position = torch.arange(key.shape[0], device=key.device)
        rank = torch.empty_like(order).scatter_(0, order, position)
        return rank - self.cu_seqlens.long()[segment]

    def squeeze(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_zeros(self.cu_seqlens.shape[0] - 1)
        # Empty sequences own no token: clamp, and let the caller's count say so.
        return x[self.cu_seqlens.long()[:-1].clamp(max=max(x.shape[0] - 1, 0))]
