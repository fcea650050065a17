"""The total variation where it decides: by the certified top-K interval, and exactly for the few tokens left open.

    TV_K <= TV <= TV_K + min(rest of pi, rest of mu)              `cppo.divergence.topk_interval`

The exact TV of a token costs two vocabulary-wide products with the lm_head, the interval next to nothing. A hard limit
only asks on which side of it a token lies, so a token whose interval does not contain the limit is decided already.

* `adaptive_for_rule`: any rule, also those whose limit for one token depends on others (CPPO's prefix and its adaptive
  budget, TRM's mean). Resolves in passes, each an exact evaluation of a few tokens, until nothing is left open.
* The cheap alternative is `divergence="topk_tv_upper"`: the upper end in place of D_t needs no exact evaluation at all.
  It is certified stricter: no token is kept that the exact TV would drop. With CPPO's adaptive budget, which grows with
  D, that holds against the exact TV under the same budget.

Soft gates let the coefficient vary with D_t itself, so for them every token beyond its limit is resolved together with
all that its prefix sum needs: right, but near the price of the exact TV. Left out: KL, for which there is no upper end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cppo.layout import Layout
    from cppo.rules.base import TrustRegion, Verdict
    from cppo.tokens import TokenBatch

#: int64 flat positions ``[M]`` (ascending) -> exact TV there ``[M]``.
Exact = Callable[[Tensor], Tensor]

#: Float32 error of a D_t that is summed from probabilities (measured: 3e-7 at most).
ROUNDING = 1e-6

#: How far an exact value may lie outside of its interval before it is refused, in units of D.
TOLERANCE = 1e-3

#: Planned passes; in pass p what a token's limit is uncertain by is not reduced below `KEEP`^p. The last resolves all.
PASSES, KEEP = 4, 0.25

#: Widths of intervals that the plan tells apart: tokens are resolved by octaves, widest first.
LEVELS = (*(2.0**-k for k in range(1, 21)), 0.0)


@dataclass(frozen=True, eq=False)
class AdaptiveDivergence:
    """D_t that decides as the exact TV does.

    Attributes
    ----------
    divergence : the exact TV where `resolved`, else the lower end TV_K of the interval; shape of the tokens. Averages
        of it are therefore too small, by at most the mean width of the intervals.
    resolved : where the exact TV was evaluated; bool, shape of the tokens.
    passes : how often `exact` was called.
    """

    divergence: Tensor
    resolved: Tensor
    passes: int


@torch.no_grad()
def adaptive_for_rule(
    rule: TrustRegion,
    batch: TokenBatch,
    lower: Tensor,
    upper: Tensor,
    exact: Exact,
    *,
    slack: float | Tensor | None = None,
) -> AdaptiveDivergence:
    """D_t under which `rule` gives every loss token the coefficient that the exact TV gives it.

    Why: `TrustRegion.bracket` bounds the coefficients of all D with low <= D <= high, and the exact TV is such a D. A
    token whose two bounds are equal has that coefficient under the exact TV, and under any other D between the ends.
    Tokens are resolved (their low = high = exact) until the bounds of every loss token are equal; intervals only
    shrink, so what is decided stays decided. The returned D lies between the ends as well. With CPPO's adaptive budget,
    too: its bracket takes the budget from the opposite end, and the budget of any D between the ends lies between
    theirs. Nothing is said about reasons, thresholds and means: those are of the returned D.

    Up to rounding, that is: D_t that is within about 1e-6 of a limit of its own, and sums over T tokens within about
    T * 1e-6 of theirs (1e-4 at T = 8,000, measured), may fall either way, as they may between two ways to compute the
    exact TV.

    What is resolved (a plan that costs more or less, whose errors the next bracket finds): an undecided token itself
    where its own interval is wider than the range of its threshold. Else the tokens up to it with the widest intervals,
    as many as it takes for the rest to be small against its estimated distance from the threshold. In pass p no fewer
    than a share of 4^-p of the uncertainty is left, since early estimates are poor. And those that may be at the
    quantile that sets a budget. After `PASSES` such passes all tokens of the responses that are still open, which
    decides them; rules whose verdict has no threshold go there at once.

    Parameters
    ----------
    rule : its `divergence` must be "adaptive_tv".
    batch : without divergence (one that it carries is not looked at). Padded, packed, or a context-parallel shard; then
        every process of the group must call, with its own part of the tokens.
    lower, upper : ends of the interval, shape of the tokens; outside the mask anything.
    exact : gets flat positions (int64 ``[M]``, ascending) into the tokens of this process and returns their exact TV
        ``[M]``; called only where M > 0, and never twice for a token. Values are clamped to the interval, so that a
        decision that rests on the interval cannot be overturned by rounding.
    slack : by how much the exact TV may lie outside of [lower, upper] because of how these were computed, a number or
        one per token. None: float32 rounding, `ROUNDING`, but at most a hundredth of the interval: 1e-6 per token of
        a long prefix would add up to more than the rounding of its sum, and an interval as narrow as that says as much
        as the exact evaluation, which rounds alike. Give a bound where mu's log-probabilities were kept in fewer bits.

    Raises
    ------
    ValueError : the rule asks for another divergence; shapes do not fit; lower > upper or NaN at a loss token; `exact`
        returns something else than finite values within `TOLERANCE` of the interval.
    """
    if rule.divergence != "adaptive_tv":
        wrong = "looks at no divergence" if rule.divergence is None else f"asks for divergence={rule.divergence!r}"
        raise ValueError(
            f"the rule {rule.name} {wrong}, but lower and upper enclose a total variation that is to be resolved where "
            "needed: that is divergence='adaptive_tv'. Set it in the rule, or call the rule without this function."
        )
    if lower.shape != batch.policy_logp.shape:
        raise ValueError(f"lower has shape {list(lower.shape)}, but the tokens {list(batch.policy_logp.shape)}.")
    ends = _Ends.of(lower, upper, batch.loss_mask, batch.dtype, slack)
    passes = 0
    for step in range(1, PASSES + 2):
        permissive, strict = rule.bracket(batch, ends.low, ends.high)
        undecided = (permissive.coefficient != strict.coefficient) & batch.loss_mask
        if not _anywhere(undecided, batch):
            break
        if step > PASSES or permissive.threshold is None or strict.threshold is None:
            passes += ends.resolve(_responses(undecided, batch), exact)
            break  # nothing is left open; sums of an accelerator need not repeat to the last bit, so do not ask
        chosen = _plan(rule, batch, ends, permissive, strict, undecided, KEEP**step)
        passes += ends.resolve(chosen, exact)
    return AdaptiveDivergence(ends.known, ends.resolved, passes)


@dataclass
class _Ends:
    """What is known about D_t so far; tensors of the tokens' shape, contiguous, 0 outside the mask, changed in place.

    known : best estimate: exact where resolved, else TV_K. low, high : where the exact TV lies; equal where resolved.
    """

    known: Tensor
    low: Tensor
    high: Tensor
    resolved: Tensor
    #: sums over resolved tokens of (exact - low) and of (high - low): where in its interval the exact TV tends to lie
    above: Tensor
    width: Tensor

    @classmethod
    def of(cls, lower: Tensor, upper: Tensor, mask: Tensor, dtype: torch.dtype, slack: float | Tensor | None) -> _Ends:
        if lower.shape != upper.shape or lower.shape != mask.shape:
            raise ValueError(
                f"lower has shape {list(lower.shape)}, upper {list(upper.shape)} and the mask {list(mask.shape)}: "
                "expected the same, one interval a token."
            )
        zero = lower.new_zeros((), dtype=dtype)
        low, high = (torch.where(mask, end.detach().to(dtype), zero).contiguous() for end in (lower, upper))
        wrong = int((~(low <= high)).sum())
        if wrong:
            raise ValueError(
                f"lower is above upper, or NaN, at {wrong} tokens: expected the ends of an interval that holds the TV "
                "(cppo.divergence.topk_interval gives both)."
            )
        if slack is None:
            slack = (0.01 * (high - low)).clamp_(max=ROUNDING)
        known = low.clone()
        low = torch.where(mask, low - slack, zero).clamp_(min=0)
        high = torch.where(mask, high + slack, zero).clamp_(max=1)
        return cls(known, low, high, torch.zeros_like(mask), known.new_zeros(()), known.new_zeros(()))

    def resolve(self, chosen: Tensor, exact: Exact) -> int:
        """Evaluate the chosen tokens, but those already known exactly; how often `exact` was called (0 or 1)."""
        index = (chosen & (self.low < self.high)).reshape(-1).nonzero()[:, 0]
        if not index.numel():
            return 0
        value = exact(index)
        if not isinstance(value, Tensor) or value.shape != index.shape or not value.is_floating_point():
            what = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"exact() returned {what} for {index.numel()} positions, expected floats [M], one each.")
        value = value.detach().to(self.known)
        low, high = self.low.view(-1)[index], self.high.view(-1)[index]
        inside = (value >= low - TOLERANCE) & (value <= high + TOLERANCE)  # false for NaN
        if not bool(inside.all()):
            at = int((~inside).nonzero()[0])
            raise ValueError(
                f"exact() returned {value[at].item():.6g} for the token at flat position {int(index[at])}, whose TV is "
                f"in [{low[at].item():.6g}, {high[at].item():.6g}] by the top K (outside at {int((~inside).sum())} of "
                f"{index.numel()} tokens). The policies that were scored exactly are not those of the top K: compare "
                "the hidden states (rows shifted by one?), the lm_heads, the temperature, and whether padded ids of "
                "the vocabulary are in both or in neither."
            )
        value = torch.minimum(torch.maximum(value, low), high)
        self.above += (value - low).sum()
        self.width += (high - low).sum()
        for tensor in (self.known, self.low, self.high):
            tensor.view(-1)[index] = value
        self.resolved.view(-1)[index] = True
        return 1


def _plan(
    rule: TrustRegion,
    batch: TokenBatch,
    ends: _Ends,
    permissive: Verdict,
    strict: Verdict,
    undecided: Tensor,
    keep: float,
) -> Tensor:
    """Which tokens to resolve next, bool; the comments use CPPO's words, but nothing here knows the rule."""
    assert permissive.threshold is not None and strict.threshold is not None
    layout, width = batch.layout, ends.high - ends.low
    most, least = permissive.threshold.expand_as(width), strict.threshold.expand_as(width)
    undecided = undecided & (ends.high > least)  # TRM: tokens below the limit do not reject their response
    itself = undecided & (width >= most - least)
    others = undecided & ~itself

    # Where the exact TV probably is, and how far from the threshold that puts the token.
    share = torch.where(ends.width > 0, ends.above / ends.width, 0.1).clamp(0.001, 0.999)
    guess = ends.low + share * width
    threshold = rule(batch.with_divergence(guess)).threshold
    assert threshold is not None
    # What is left open can move S_t up by (1 - share) of it, or down by share of it; 0.8 since these are estimates.
    enough = 0.8 * (guess - threshold).abs() / torch.where(guess > threshold, share, 1 - share)
    enough = torch.maximum(enough, keep * _inclusive(layout, width))
    enough = enough.masked_fill(ends.low > most, 0.0)  # beyond every limit and still undecided: a soft gate

    chosen = itself
    position = layout.positions(batch.loss_mask, batch.dtype) + 1
    for level, next_level in zip((torch.inf, *LEVELS), LEVELS, strict=False):
        # With all wider than `level` resolved: which tokens need more, and where is the last of them?
        more = others & (_inclusive(layout, torch.where(width <= level, width, 0)) > enough)
        if not _anywhere(more, batch):
            break
        last = layout.maximum(torch.where(more, position, 0))
        chosen = chosen | ((width <= level) & (width > next_level) & (position <= last))
    pivotal = rule.pivotal(batch, ends.low, ends.high)
    if pivotal is not None:
        chosen = chosen | (pivotal & _responses(others, batch))
    return chosen


def _inclusive(layout: Layout, x: Tensor) -> Tensor:
    """sum_{j<=t} x_j of the response."""
    return layout.exclusive_cumsum(x) + x


def _responses(tokens: Tensor, batch: TokenBatch) -> Tensor:
    """All tokens of the responses that hold any of `tokens`."""
    return batch.layout.maximum(tokens.to(batch.dtype)).expand_as(tokens) > 0


def _anywhere(tokens: Tensor, batch: TokenBatch) -> bool:
    """Whether any of `tokens` is set, on any process that holds a part of these responses: all must go on together."""
    found = tokens.any()
    if batch.shard is not None:
        found = found.to(torch.int32)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=batch.shard.group)
    return bool(found)
