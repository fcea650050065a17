"""Trust regions in slime: `loss` as its custom loss (docs/engines.md).

::

    --loss-type custom_loss --custom-loss-function-path cppo.engines.slime.loss --custom-config-path cppo.yaml

with the rule in that YAML file, whose entries slime puts among its arguments::

    cppo: {name: cppo, delta: 0.15}

* slime packs sequences and cuts each into context-parallel zigzag pieces. A rule needs whole responses: three numbers a
  token are gathered (without gradient), judged, and the coefficients cut back into this process's pieces.
* The anchor is ``rollout_log_probs``; the log-probabilities that slime recomputes are not read
  (``--use-rollout-logprobs`` spares them).
* slime's reducer averages over a rollout's tokens, or over all (``--calculate-per-token-loss``). Rejected tokens stay
  in both denominators.

Left out: top-K divergences; the KL and entropy terms and the corrections of slime's own policy loss (refused).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cppo.engines.support import TrustRegionLoss, check_version, loss_from_settings, require_parameters, steady_metrics
from cppo.errors import UserError
from cppo.objective import token_loss
from cppo.tokens import TokenBatch

#: slime is installed from its repository; the interface of this version is what the adapter was written for.
WRITTEN_FOR = "0.4.0"
#: Arguments that only slime's own policy loss reads, or that truncate mu: the value with which they have no effect.
NEUTRAL = {"use_tis": False, "use_opsm": False, "entropy_coef": 0, "kl_loss_coef": 0} | {
    "rollout_top_p": 1,
    "rollout_top_k": -1,
}
#: Losses of this process by their settings. Not kept in slime's arguments: those go into Megatron's checkpoints.
LOSSES: dict[str, TrustRegionLoss] = {}


def loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's loss of a micro-batch: -c_t A_t log pi(y_t), reduced by slime's own reducer.

    Parameters
    ----------
    args : slime's arguments with ``args.cppo``: ``{name: ..., parameters ..., max_on_policy_divergence: 0.03}``.
    batch : lists over sequences: ``rollout_log_probs`` and ``advantages`` (this process's pieces), ``loss_masks``
        (whole responses), ``unconcat_tokens``, ``total_lengths``, ``response_lengths``.
    logits : ``[1, T, V]`` float32, this process's pieces.
    sum_of_sample_mean : slime's reducer over this process's tokens, concatenated.

    Returns
    -------
    The reduced loss, and metrics as sums in the reducer's unit (slime adds them up over processes and divides).

    Raises
    ------
    UserError : no rule among the arguments, one in `NEUTRAL` with an effect, no rollout log-probabilities, and what
        `TrustRegionLoss` raises.
    EngineChangedError : slime's functions take other parameters.
    """
    from slime.backends.megatron_utils import cp_utils  # type: ignore[import-not-found]
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy  # type: ignore[import-not-found]

    lengths = {"total_lengths": batch["total_lengths"], "response_lengths": batch["response_lengths"]}
    pairs = list(zip(*lengths.values(), strict=True))
    key = repr(getattr(args, "cppo", None))
    if key not in LOSSES:
        LOSSES[key] = _prepare(args, cp_utils, get_log_probs_and_entropy)
    if not batch.get("rollout_log_probs"):
        raise UserError(
            "slime: the batch has no rollout_log_probs, the log-probabilities of the policy that sampled. slime's own "
            "rollout returns them; a --custom-generate-function-path must set sample.rollout_log_probs."
        )
    given = {"args": args, "unconcat_tokens": batch["unconcat_tokens"], "with_entropy": False}
    _, out = get_log_probs_and_entropy(logits, **given, **lengths)
    policy = torch.cat(out["log_probs"])
    rollout, advantages = (torch.cat(batch[name]).to(policy) for name in ("rollout_log_probs", "advantages"))
    with torch.no_grad():
        sizes = [len(x) for x in out["log_probs"]]
        columns = torch.stack([policy.detach(), rollout, advantages], -1).split(sizes)
        whole = [cp_utils.all_gather_with_cp(x, *pair) for x, pair in zip(columns, pairs, strict=True)]
        edges = torch.tensor([0, *lengths["response_lengths"]], device=policy.device).cumsum(0)
        mask = torch.cat([m.to(policy.device) for m in batch["loss_masks"]])
        pi, mu, a = torch.cat(whole).unbind(-1)
        judged = LOSSES[key](TokenBatch(pi, mu, a, mask, cu_seqlens=edges))
        pieces = judged.verdict.coefficient.split(lengths["response_lengths"])
        mine = [cp_utils.slice_log_prob_with_cp(c, *pair) for c, pair in zip(pieces, pairs, strict=True)]
    coefficient = torch.cat(mine)
    here = TokenBatch(policy, rollout, advantages, coefficient != 0, cu_seqlens=edges.new_tensor([0, len(policy)]))
    value = sum_of_sample_mean(token_loss(here, coefficient))
    if not policy.numel():  # a context-parallel process without a response token must run backward all the same
        value = value + 0 * logits.sum()
    unit = sum_of_sample_mean(torch.ones_like(policy).detach())
    stats = {name: unit * number for name, number in steady_metrics(judged.metrics).items()}
    return value, {"loss": value.detach(), **stats}


def _prepare(args: Any, cp_utils: Any, get_log_probs_and_entropy: Any) -> TrustRegionLoss:
    """The rule of a run, once a process, and a look at slime's functions and arguments."""
    check_version("slime", WRITTEN_FOR)
    names = ("logits", "args", "unconcat_tokens", "total_lengths", "response_lengths", "with_entropy")
    require_parameters(get_log_probs_and_entropy, *names, engine="slime")
    for function in (cp_utils.all_gather_with_cp, cp_utils.slice_log_prob_with_cp):
        require_parameters(function, "total_length", "response_length", engine="slime")
    for name, neutral in NEUTRAL.items():
        if getattr(args, name, neutral) != neutral:
            raise UserError(
                f"slime: {name} is {getattr(args, name)!r}: under cppo.engines.slime.loss it does nothing or truncates "
                f"the rollout policy. Set --{name.replace('_', '-')} to {neutral!r}, or leave it out."
            )
    return loss_from_settings(getattr(args, "cppo", None), "slime", "the entry cppo of --custom-config-path")
