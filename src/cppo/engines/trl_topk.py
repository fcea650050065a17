"""Top-K divergences out of the forward passes that TRL makes anyway.

TRL 1.16 never materialises logits: its fused head turns hidden states into the sampled token's log-probability. So

* a forward hook on the backbone takes the final hidden states h of TRL's own forward, while one of our wrappers is
  active (`cppo.engines.trl_head`);
* mu's K likeliest ids and their log-probabilities come from the pass that computes the old log-probabilities
  (`RolloutTopK`), chunk by chunk of the vocabulary product;
* pi at mu's ids comes from the loss's own forward: log pi(k) = z_k - logsumexp with z = h W[k] / temperature and
  logsumexp = z_y - log pi(y), y the sampled token. That is K + 1 dot products a token and no further forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cppo import divergence
from cppo.engines.trl_head import CHUNK_ELEMENTS, Head, hidden_states, policy_topk_logp

IDS, LOGP = "trust_topk_ids", "trust_topk_logp"


class RolloutTopK:
    """Collects mu's top-K while TRL computes the old log-probabilities, one chunk of rows after the other.

    Attributes
    ----------
    ids : int32 ``[B, T, K]``, mu's K = min(k, V) likeliest tokens, likeliest first; 0 outside the mask.
    logp : float32 ``[B, T, K]``, their log mu; -inf outside the mask.
    sampled_logp : float32 ``[B, T]``, log mu of the sampled token, to compare with TRL's.
    """

    def __init__(self, model: Any, k: int, temperature: float, fp32: bool, tokens: Tensor, mask: Tensor) -> None:
        self.model, self.k, self.temperature, self.fp32 = model, k, temperature, fp32
        self.tokens, self.mask = tokens, mask.bool()
        self.row = 0
        self.head: Head | None = None
        self.ids = self.logp = self.sampled_logp = tokens.new_empty(0)

    @torch.no_grad()
    def receive(self, hidden: Tensor, dtype: torch.dtype) -> None:
        """Score one chunk of rows: last hidden states ``[b, P + T, d]``."""
        if self.head is None:
            self.head = Head.of(self.model, self.temperature, torch.float32 if self.fp32 else dtype)
            k, shape = min(self.k, self.head.weight.shape[0]), self.tokens.shape
            self.ids = torch.zeros(*shape, k, dtype=torch.int32, device=self.tokens.device)
            self.logp = torch.full((*shape, k), -torch.inf, dtype=torch.float32, device=self.tokens.device)
            self.sampled_logp = torch.zeros(shape, dtype=torch.float32, device=self.tokens.device)
        length = self.tokens.shape[1]
        rows = slice(self.row, self.row + hidden.shape[0])
        self.row = rows.stop
        # The state before token t is the output at the position before it.
        states = hidden[:, -length - 1 : -1].to(self.head.weight.device)
        where = self.mask[rows].nonzero()
        for part in where.split(max(1, CHUNK_ELEMENTS // self.head.weight.shape[0])):
            row, column = part.unbind(1)
            logits = self.head.all_logits(states[row, column])
            total = logits.logsumexp(-1, keepdim=True)
            top = logits.topk(self.ids.shape[-1], dim=-1)
            at = (row + rows.start, column)
            self.ids[at] = top.indices.to(torch.int32)
            self.logp[at] = top.values - total
            self.sampled_logp[at] = (logits.gather(-1, self.tokens[at][:, None]) - total)[:, 0]

    def check(self, old_logp: Tensor) -> None:
        """Compare with the log-probabilities that TRL computed from the same hidden states (this synchronises the
        device).

        Raises
        ------
        RuntimeError : they differ by more than rounding: the hidden states are not those that TRL scored, or its head
            does something that `Head` does not.
        """
        if self.head is None or self.row != self.tokens.shape[0]:
            raise RuntimeError(
                f"the backbone's forward was seen for {self.row} of {self.tokens.shape[0]} responses while TRL "
                "computed the old log-probabilities, so mu's top-K is not known. Set divergence='binary_tv' in the "
                "rule."
            )
        gap = torch.where(self.mask, self.sampled_logp - old_logp.float(), 0.0).abs().max().item()
        allowed = 1e-3 if self.head.dtype == torch.float32 else 0.25
        if not gap <= allowed:
            raise RuntimeError(
                f"log-probabilities from the captured hidden states differ from TRL's by up to {gap:.3g} (allowed: "
                f"{allowed}): this model's head or this TRL does more than softmax(h W / temperature). Set "
                "divergence='binary_tv' in the rule."
            )


class TopKDivergence:
    """D_t over mu's top-K for one trainer: listens to TRL's forward passes, adds mu's top-K to its rollout batches.

    Parameters
    ----------
    kind, variant : which function of `cppo.divergence`, and its classes. k : K. temperature : of TRL's head.
    anchor : "rollout" or "recomputed" (see `cppo.engines.trl.TrustRegionTrainer`).
    fp32 : whether TRL's head runs in float32 in any case (`cast_lm_head_to_fp32`).
    """

    def __init__(self, kind: str, k: int, variant: str, anchor: str, temperature: float, fp32: bool) -> None:
        self.kind, self.k, self.variant, self.anchor = kind, k, variant, anchor
        self.temperature, self.fp32 = temperature, fp32
        self.collecting = self.compared = False
        self.rollout: RolloutTopK | None = None
        self.hidden: Tensor | None = None
        self.dtype = torch.float32

    def _keep(self, hidden: Tensor, dtype: torch.dtype) -> None:
        self.hidden, self.dtype = hidden, torch.float32 if self.fp32 else dtype

    def listen(self, forward: Callable[[], Any], model: Any, tokens: Tensor, mask: Tensor, in_loss: bool) -> Any:
        """Run TRL's forward, `forward()`, and keep of it what is needed; its result comes back unchanged.

        In a loss: the hidden states. Else the first pass after `collecting` was set is mu's; a later one is the
        reference policy's (the same model with its adapters off) and is not looked at.
        """
        if in_loss:
            with hidden_states(model, self._keep):
                return forward()
        if not self.collecting:
            return forward()
        self.collecting = False
        self.rollout = RolloutTopK(model, self.k, self.temperature, self.fp32, tokens, mask)
        with hidden_states(model, self.rollout.receive):
            result = forward()
        if not self.compared:
            self.rollout.check(result[0])
            self.compared = True
        return result

    def attach(self, output: dict[str, Any]) -> None:
        """Add mu's top-K to a rollout batch: TRL shuffles and splits these tensors along with its own.

        Raises
        ------
        RuntimeError : TRL made no pass for the old log-probabilities.
        ValueError : another engine sampled, whose top-K is not known.
        """
        capture, self.rollout, self.collecting = self.rollout, None, False
        if capture is None or "old_per_token_logps" not in output:
            raise RuntimeError("TRL did not compute the old log-probabilities, from whose forward mu's top-K comes.")
        if "sampling_per_token_logps" in output and self.anchor == "rollout":
            raise ValueError(
                "the rollouts came from another engine (vLLM or rollout_func), whose top-K is not known. Set "
                "divergence='binary_tv' in the rule, or topk_anchor='recomputed'."
            )
        output[IDS], output[LOGP] = capture.ids, capture.logp

    def score(self, model: Any, inputs: dict[str, Any], logp: Tensor) -> Tensor:
        """D_t ``[B, T]`` of a minibatch from the hidden states of the forward that its loss has just made.

        Parameters
        ----------
        inputs : TRL's minibatch. logp : log pi of the sampled tokens, float32 ``[B, T]``.
        """
        hidden, self.hidden = self.hidden, None
        if hidden is None or IDS not in inputs:
            raise RuntimeError("no hidden states were seen in the loss's forward, or the minibatch lost mu's top-K.")
        tokens, ids = inputs["completion_ids"], inputs[IDS]
        head = Head.of(model, self.temperature, self.dtype)
        policy = policy_topk_logp(head, hidden, ids, tokens, logp)
        inside = (ids == tokens[..., None]).any(-1)
        # The log mu(y) of the distribution whose top-K was taken, which with vLLM is not the sampler's.
        old = inputs["old_per_token_logps"].float()
        return getattr(divergence, self.kind)(policy, inputs[LOGP], logp, old, inside, self.variant)
