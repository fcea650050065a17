"""Divergences that need more than the sampled token, out of the forward passes that TRL makes anyway.

TRL 1.16 never materialises logits: its fused head turns hidden states into the sampled token's log-probability. So

* a forward hook on the backbone takes the final hidden states h of TRL's own forward, while one of our wrappers is
  active (`cppo.engines.trl.head`);
* mu is scored in the pass that computes the old log-probabilities (`cppo.engines.trl.rollout`);
* pi is scored from the hidden states of the loss's own forward, and its logsumexp is z_y/T - log pi(y), y the sampled
  token. `topk_*`: K + 1 dot products per token. `exact_*`: two products with the vocabulary, pi's and mu's, without
  gradient. `adaptive_tv`: the former for all tokens, the latter for those that the former leaves open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cppo import divergence
from cppo.engines.trl.head import Head, hidden_states, states_before
from cppo.engines.trl.rollout import (
    HIDDEN,
    IDS,
    LOGSUMEXP,
    PACKED,
    Recorded,
    RolloutPass,
    Wanted,
    heads,
    require_close,
    spread,
    unpack,
)
from cppo.errors import UserError
from cppo.scoring import exact_divergence
from cppo.scoring.adaptive import ROUNDING, adaptive_for_rule
from cppo.scoring.store import contains, topk_error_bound

if TYPE_CHECKING:
    from cppo.engines.trl.sampler import Sampled
    from cppo.engines.trl.settings import TopK
    from cppo.rules import TrustRegion
    from cppo.tokens import TokenBatch


class HeadDivergence:
    """D_t for one trainer: listens to TRL's forward passes, adds what is needed of mu to its rollout batches.

    Parameters
    ----------
    kind : topk_tv, topk_tv_upper, topk_kl, exact_tv, exact_kl or adaptive_tv. top_k : the trainer's arguments.
    temperature : of TRL's head. fp32 : whether that runs in float32 in any case (`cast_lm_head_to_fp32`).
    """

    def __init__(self, kind: str, top_k: TopK, temperature: float, fp32: bool) -> None:
        self.kind, self.top_k, self.temperature, self.fp32 = kind, top_k, temperature, fp32
        self.collecting = self.compared = False
        self.rollout: RolloutPass | Recorded | None = None
        self.rollout_head: Head | None = None
        self.hidden: Tensor | None = None
        self.dtype = torch.float32

    def _receive(self, hidden: Tensor, dtype: torch.dtype) -> None:
        self.hidden, self.dtype = hidden, torch.float32 if self.fp32 else dtype

    def wanted(self, model: Any) -> Wanted:
        """What of mu is kept for the updates."""
        exact, adaptive = self.kind.startswith("exact_"), self.kind == "adaptive_tv"
        if adaptive and self.top_k.store == "float32":  # K >= V: the top K are the whole distribution
            adaptive = self.top_k.k < model.get_output_embeddings().weight.shape[0]
        return Wanted(0 if exact else self.top_k.k, self.top_k.store, states=exact or adaptive)

    def listen(self, forward: Callable[[], Any], model: Any, tokens: Tensor, mask: Tensor, in_loss: bool) -> Any:
        """Run TRL's forward, `forward()`, and keep of it what is needed; its result comes back unchanged.

        In a loss: the hidden states. Else the first pass after `collecting` was set is mu's; a later one is the
        reference policy's (the same model with its adapters off) and is not looked at.
        """
        if in_loss:
            with hidden_states(model, self._receive):
                return forward()
        if not self.collecting:
            return forward()
        self.collecting, self.rollout_head = False, None  # freed before the next copy is made
        rollout = self.rollout = RolloutPass(model, self.wanted(model), self.temperature, self.fp32, tokens, mask)
        with hidden_states(model, rollout.receive):
            result = forward()
        if not self.compared:
            rollout.check(result[0])
            self.compared = True
        return result

    def take(self, sampled: Sampled, model: Any, tokens: Tensor) -> None:
        """mu as the sampler has recorded it, instead of a pass. tokens : ``[B, T]`` of TRL's batch."""
        self.collecting, self.rollout_head = False, None
        wanted = self.wanted(model)
        dtype = torch.float32 if self.fp32 else sampled.dtype
        head, kept = heads(model, wanted.states, self.temperature, dtype) if wanted.states else (None, None)
        self.rollout = Recorded.of(sampled, wanted, kept, tokens.shape[1])
        if head is not None and not self.compared:
            hidden, logsumexp = (torch.cat(rows or []) for rows in (sampled.hidden, sampled.logsumexp))
            logp = head.logits_at(hidden, torch.cat(sampled.tokens)[:, None])[:, 0] - logsumexp
            require_close((logp - torch.cat(sampled.logp)).abs().max().item(), head.dtype)
            self.compared = True

    def attach(self, output: dict[str, Any]) -> int:
        """Add what is kept of mu to a rollout batch; returns its bytes. mu's lm_head stays here until the next batch.

        Raises
        ------
        RuntimeError : TRL made no pass for the old log-probabilities.
        UserError : another engine sampled, whose distributions are not known.
        """
        rollout, self.rollout, self.collecting = self.rollout, None, False
        if rollout is None or "old_per_token_logps" not in output:
            raise RuntimeError("TRL did not compute the old log-probabilities, from whose forward mu's scores come.")
        if "sampling_per_token_logps" in output and self.top_k.anchor == "rollout":
            raise UserError(
                "the rollouts came from another engine (vLLM or rollout_func), which reports the sampled tokens alone. "
                "Set divergence='binary_tv' in the rule, or topk_anchor='recomputed'."
            )
        output.update(rollout.kept)
        self.rollout_head = rollout.head
        return rollout.nbytes()

    def score(
        self, rule: TrustRegion, batch: TokenBatch, model: Any, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """D_t of a minibatch from the hidden states of the forward that its loss has just made.

        Parameters
        ----------
        batch : its tokens ``[B, T]``, with TRL's log pi. inputs : TRL's minibatch.

        Returns
        -------
        D_t, float32 ``[B, T]``, 0 outside the mask. `adaptive_tv`: which tokens got their exact TV, bool ``[B, T]``;
        else None.
        """
        hidden, self.hidden = self.hidden, None
        if hidden is None or not (LOGSUMEXP in inputs or IDS in inputs or PACKED in inputs):
            raise RuntimeError("no hidden states were seen in the loss's forward, or the minibatch lost mu's scores.")
        # With FSDP2 this gathers: once a loss on every process, however many tokens each of them has to score.
        head = Head.of(model, self.temperature, self.dtype)
        loss = _Minibatch(head, self.rollout_head or head, hidden, batch, inputs)
        if self.kind.startswith("exact_"):
            loss.score(None)
            return loss.spread(loss.exact(loss.index, self.kind.removeprefix("exact_"))), None
        ids, rollout_topk = unpack(inputs, loss.index)
        policy_topk = loss.score(ids).masked_fill(rollout_topk == -torch.inf, -torch.inf)  # slots that are not used
        inside = contains(ids, rollout_topk, loss.tokens)
        classes = (policy_topk, rollout_topk, loss.logp, loss.old, inside, self.top_k.variant)
        if self.kind != "adaptive_tv":
            return loss.spread(getattr(divergence, self.kind)(*classes)), None
        lower, upper = map(loss.spread, divergence.topk_interval(*classes))
        # Without a finite pi there is nothing to decide: the loss is NaN, and who guards against that will speak.
        if HIDDEN not in inputs or not bool((loss.logp + loss.logsumexp[loss.index]).isfinite().all()):
            return lower, torch.zeros_like(batch.loss_mask)
        slack = None
        if self.top_k.store != "float32":
            slack = loss.spread(topk_error_bound(rollout_topk)) + ROUNDING
        rounds = head.dtype in (torch.bfloat16, torch.float16) or head.weight.device.type != "cpu"

        def exact(index: Tensor) -> Tensor:
            found = loss.exact(index, "tv")
            if rounds:
                # Two computations may round one logit to two neighbouring numbers (bf16; TF32 in one product but not in
                # the other). That is not a contradiction.
                beyond = 0.0 if slack is None else slack.flatten()[index]
                found = found.clamp(lower.flatten()[index] - beyond, upper.flatten()[index] + beyond)
            return found

        found = adaptive_for_rule(rule, batch, lower, upper, exact, slack=slack)
        return found.divergence, found.resolved


class _Minibatch:
    """The loss tokens of a minibatch, and what is known about them."""

    def __init__(self, head: Head, rollout_head: Head, hidden: Tensor, batch: TokenBatch, inputs: dict[str, Any]):
        self.head, self.rollout_head, self.hidden, self.inputs = head, rollout_head, hidden, inputs
        self.shape = batch.policy_logp.shape
        self.index = batch.loss_mask.flatten().nonzero()[:, 0]
        self.tokens = inputs["completion_ids"].flatten()[self.index]
        self.logp = batch.policy_logp.flatten()[self.index]
        # The log mu(y) of the distribution that was scored, which with vLLM is not the sampler's.
        self.old = inputs["old_per_token_logps"].float().flatten()[self.index]
        self.logsumexp = self.logp  # flat, of all positions, after `score`

    def spread(self, values: Tensor) -> Tensor:
        """``[n]`` at the loss tokens -> ``[B, T]``, 0 elsewhere."""
        return spread(values, self.index, self.shape)

    def score(self, ids: Tensor | None) -> Tensor:
        """log pi at ids ``[n, K]`` of the loss tokens; sets `logsumexp`."""
        states = states_before(self.hidden, self.shape[1], self.index)
        found, logsumexp = self.head.log_probabilities(states, self.tokens, self.logp, ids)
        self.logsumexp = self.spread(logsumexp).flatten()
        return found

    def exact(self, index: Tensor, kind: str) -> Tensor:
        """The divergence over the whole vocabulary at some flat positions, float32."""
        policy = self.head.distributions(states_before(self.hidden, self.shape[1], index), self.logsumexp[index])
        states, logsumexp = self.inputs[HIDDEN].flatten(0, 1)[index], self.inputs[LOGSUMEXP].flatten()[index]
        return exact_divergence(policy, self.rollout_head.distributions(states, logsumexp), kind=kind).float()
