"""From coefficients to a loss: the one per-token loss of all rules, its aggregation, and the metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cppo.layout import Padded
from cppo.rules.base import Reason, Verdict, held_back
from cppo.tokens import TokenBatch

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]

#: Reduction over processes: (sums [k], maxima [m]) -> the same, over all processes.
Reduce = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def token_loss(batch: TokenBatch, coefficient: Tensor) -> Tensor:
    """Per-token loss to minimise, without reduction: l_t = -c_t A_t log pi(y_t).

    The gradient with respect to log pi(y_t) is -c_t A_t, through `policy_logp` only.

    Parameters
    ----------
    coefficient : c_t of a verdict (`Verdict.coefficient`), shape of the tokens, without gradient.

    Returns
    -------
    Shape of the tokens, float32 (float64 for float64 input), exactly 0 outside the mask and where c_t = 0.
    """
    active = coefficient != 0
    zero = coefficient.new_zeros(())
    # `where` before any arithmetic: a log-probability of -inf or NaN behind a zero coefficient must not reach the
    # product.
    logp = torch.where(active, batch.policy_logp.to(coefficient.dtype), zero)
    weight = torch.where(active, coefficient * batch.token_advantages().neg(), zero)
    return weight * logp


def aggregate(loss: Tensor, batch: TokenBatch, how: Aggregation, horizon: int | None = None) -> Tensor:
    """Reduce per-token losses to a scalar, for callers whose engine does not.

    All sequences must be here in full: a context-parallel shard or a data-parallel share holds only part of the sums,
    so gather first. Rejected tokens stay in every denominator. Sequences without any loss token (dropped zero-spread
    groups) are in none.

    Parameters
    ----------
    how : ``token-mean`` sum(l) / tokens; ``seq-mean-token-mean`` mean_i(sum_t l / T_i); ``seq-mean-token-sum``
        mean_i(sum_t l); ``seq-mean-token-sum-norm`` the previous divided by `horizon`, a constant number of tokens.

    Raises
    ------
    ValueError : an unknown `how`; a missing horizon.
    """
    layout = batch.layout
    mask = batch.loss_mask.to(loss.dtype)
    if how == "token-mean":
        return loss.sum() / mask.sum().clamp(min=1)
    count = layout.total(mask)
    # Each token holds its sequence's figures (padded: [B, 1]), so a sum over sequences is a sum over tokens of x / T_i.
    sequences = (mask / count.clamp(min=1)).sum().clamp(min=1)
    if how == "seq-mean-token-mean":
        return (loss * mask / count.clamp(min=1)).sum() / sequences
    if how not in ("seq-mean-token-sum", "seq-mean-token-sum-norm"):
        known = "token-mean, seq-mean-token-mean, seq-mean-token-sum, seq-mean-token-sum-norm"
        raise ValueError(f"aggregation is {how!r}, expected one of {known}.")
    total = loss.sum() / sequences
    if how == "seq-mean-token-sum":
        return total
    if horizon is None or horizon <= 0:
        raise ValueError(
            "seq-mean-token-sum-norm needs horizon, the constant number of tokens to divide by (max. response)."
        )
    return total / horizon


@torch.no_grad()
def metrics(
    batch: TokenBatch, verdict: Verdict, first_update: bool = False, reduce: Reduce | None = None
) -> dict[str, float]:
    """What the trust region did, as a flat dictionary of floats (one synchronisation of the device).

    All fractions are of the loss tokens. Keys, each with the prefix ``trust/``:

    * ``masked_fraction``: coefficient 0; ``kept_fraction``, ``towards_fraction``, ``token_limit_fraction``,
      ``prefix_budget_fraction``, ``sequence_limit_fraction``, ``ratio_clip_fraction``,
      ``clamped_fraction``: by `Reason`;
    * ``divergence_mean``, ``divergence_p90``, ``divergence_max`` (rules that have one; P90 over processes is averaged);
    * ``delta_b``: mean budget per token in use; ``budget_used``: mean of S_T/(delta + delta_b W_{T-1}) at the end of
      responses;
    * ``held_responses_fraction``: responses with a token held back; ``first_rejected_position``: mean 1-based position
      of the first such token, over responses that have one;
    * ``ratio_mean``, ``ratio_max``; ``capped_fraction`` (rules with a ratio cap);
    * ``first_update_divergence`` if `first_update`: before any step on a rollout batch pi = mu, so this should be
      near 0; what it shows is the mismatch between the sampler's and the trainer's log-probabilities.

    `reduce` sums and maximises over processes.
    """
    layout, mask = batch.layout, batch.loss_mask
    ones = mask.to(batch.dtype)
    reason = verdict.reason
    held = held_back(reason)
    ratio = batch.log_ratio().exp() * ones
    count = ones.sum()
    position = layout.exclusive_cumsum(ones) + 1
    far = position.new_full((), torch.inf)
    first = layout.squeeze(-layout.maximum(-torch.where(held, position, far)))
    sequence_count = layout.squeeze(layout.total(ones))
    if batch.cu_seqlens is not None:  # an empty sequence owns no token of a pack
        filled = batch.cu_seqlens.diff() > 0
        sequence_count = torch.where(filled, sequence_count, 0)
        first = torch.where(filled, first, far)
    has_tokens, has_first = sequence_count > 0, first.isfinite()

    sums = {"tokens": count, "masked": (mask & (verdict.coefficient == 0)).sum()}
    sums |= {code.name: (reason == int(code)).sum() for code in Reason if code != Reason.OUTSIDE}
    sums |= {"ratio": ratio.sum(), "sequences": has_tokens.sum()}
    sums |= {"first": torch.where(has_first, first, 0).sum(), "firsts": has_first.sum()}
    maxima = {"ratio": ratio.max() if ratio.numel() else ratio.sum()}
    if verdict.divergence is not None:
        flat = verdict.divergence.reshape(1, -1)
        sums["divergence"] = flat.sum()
        p90 = Padded().quantile(flat, mask.reshape(1, -1), 0.9) if flat.numel() else flat.sum()
        sums["p90"] = p90.sum() * count
        maxima["divergence"] = flat.max() if flat.numel() else flat.sum()
    for name in ("delta_b", "budget_used"):
        value = getattr(verdict, name)
        if value is not None:
            sums[name] = torch.where(has_tokens, value, 0).sum()
    if verdict.capped is not None:
        sums["capped"] = verdict.capped.sum()

    summed = torch.stack([value.to(torch.float64) for value in sums.values()])
    largest = torch.stack([value.to(torch.float64) for value in maxima.values()])
    if reduce is not None:
        summed, largest = reduce(summed, largest)
    values = torch.cat([summed, largest]).tolist()
    total = dict(zip(sums, values, strict=False))
    most = dict(zip(maxima, values[len(sums) :], strict=True))

    tokens, sequences = max(total["tokens"], 1.0), max(total["sequences"], 1.0)
    out = {"masked_fraction": total["masked"] / tokens}
    out |= {f"{code.key}_fraction": total[code.name] / tokens for code in Reason if code != Reason.OUTSIDE}
    out |= {"ratio_mean": total["ratio"] / tokens, "ratio_max": most["ratio"]}
    if "divergence" in total:
        mean = total["divergence"] / tokens
        out |= {"divergence_mean": mean, "divergence_p90": total["p90"] / tokens, "divergence_max": most["divergence"]}
        if first_update:
            out["first_update_divergence"] = mean
    for name in ("delta_b", "budget_used"):
        if name in total:
            out[name] = total[name] / sequences
    out["held_responses_fraction"] = total["firsts"] / sequences
    if total["firsts"]:
        out["first_rejected_position"] = total["first"] / total["firsts"]
    if "capped" in total:
        out["capped_fraction"] = total["capped"] / tokens
    return {f"trust/{name}": value for name, value in out.items()}
