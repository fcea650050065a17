"""Trust regions in NeMo-RL: a loss object for `grpo_train`, around the one that `setup` makes (docs/engines.md).

::

    (policy, policy_generation, ..., loss_fn, logger, ...) = setup(config, tokenizer, dataset, val_dataset)
    loss_fn = cppo.engines.nemo_rl.TrustRegionLossFn(loss_fn, rule="cppo", delta=0.15)
    grpo_train(policy, policy_generation, dataloader, val_dataloader, tokenizer, loss_fn, ...)

* Rows are sequences, prompt included, ``[B, S]``; log-probabilities are of the next token, ``[B, S - 1]``. Sequence
  packing and context parallelism are undone before the loss.
* The anchor is ``generation_logprobs``; ``prev_logprobs``, which NeMo-RL recomputes, is read for its own metrics only.
* The wrapped loss still computes those metrics (the trainer relies on them); its value and gradient are dropped.
* NeMo-RL adds up losses that are divided by the tokens (or sequences) of the whole step: rejected tokens stay in.

Left out: top-K divergences; KL to a reference policy in the loss (refused; ``use_kl_in_reward`` works).
"""

from __future__ import annotations

import uuid
from typing import Any

import torch
from torch import Tensor

from cppo.engines.support import TrustRegionLoss, check_version, require_parameters, sampled_token_rule, steady_metrics
from cppo.errors import UserError
from cppo.rules import TrustRegion
from cppo.tokens import TokenBatch

#: NeMo-RL is installed from its repository; the loss interface of this version is what the adapter was written for.
WRITTEN_FOR = "0.8.0"
#: Settings of the wrapped loss that stand for a term or a correction of its own, with the value that switches it off.
NEUTRAL = {
    "reference_policy_kl_penalty": 0,
    "truncated_importance_sampling_ratio": None,
    "positive_example_nll_weight": 0.0,
    "sequence_level_importance_ratios": False,
}
#: Losses that this process has called. The trainer pickles the loss object into its workers at every step, so the
#: object itself does not remember the first update.
STARTED: dict[str, TrustRegionLoss] = {}


class TrustRegionLossFn:
    """NeMo-RL's `LossFunction` with -c_t A_t log pi(y_t).

    Parameters
    ----------
    wrapped : the loss from NeMo-RL's ``setup`` (`ClippedPGLossFn`).
    rule, parameters : a rule, or a rule by name and its parameters; divergences of the sampled token only.
    max_on_policy_divergence : limit of the mean divergence of the first micro-batch that a worker sees; None: off.

    Raises
    ------
    UserError : an unknown rule or parameter, a divergence that needs more, or a wrapped loss with a term of its own.
    EngineChangedError : NeMo-RL calls losses with other arguments.
    """

    def __init__(
        self,
        wrapped: Any,
        rule: TrustRegion | str = "cppo",
        *,
        max_on_policy_divergence: float | None = 0.03,
        **parameters: Any,
    ) -> None:
        check_version("nemo-rl", WRITTEN_FOR)
        names = ("next_token_logprobs", "data", "global_valid_seqs", "global_valid_toks")
        require_parameters(type(wrapped).__call__, *names, engine="NeMo-RL")
        for name, neutral in NEUTRAL.items():
            if (value := getattr(wrapped, name, neutral)) != neutral:
                raise UserError(
                    f"NeMo-RL: loss_fn.{name} is {value!r}: this loss would ignore it. Set it to {neutral!r}."
                )
        self.wrapped, self.key = wrapped, uuid.uuid4().hex
        made = sampled_token_rule(rule, "NeMo-RL", **parameters)
        self.judge = TrustRegionLoss(made, "NeMo-RL", max_on_policy_divergence)

    def __getattr__(self, name: str) -> Any:
        """loss_type, input_type, metric_normalizations ...: the wrapped loss's."""
        if name.startswith("__") or name == "wrapped":  # not yet there while unpickling
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss and metrics of a micro-batch: ``next_token_logprobs`` ``[B, S - 1]``; ``data`` with ``advantages``,
        ``generation_logprobs``, ``token_mask`` ``[B, S]`` and ``sample_mask`` ``[B]``.

        Raises
        ------
        UserError : no ``generation_logprobs``, truncated sampling, or a first micro-batch that is not on-policy.
        """
        if data.get("generation_logprobs") is None:
            raise UserError(
                "NeMo-RL: the batch has no generation_logprobs, the log-probabilities of the policy that sampled. "
                "Use a generation backend that returns them (policy.generation.backend=vllm)."
            )
        if data.get("curr_logprobs_keep_mask") is not None:
            raise UserError("NeMo-RL: sampling is truncated. Set policy.generation.top_p=1.0 and top_k=null.")
        sizes = {"global_valid_seqs": global_valid_seqs, "global_valid_toks": global_valid_toks}
        with torch.no_grad():
            _, stats = self.wrapped(next_token_logprobs.detach(), data=data, **sizes)
        rollout, advantages, tokens = (data[k][:, 1:] for k in ("generation_logprobs", "advantages", "token_mask"))
        mask = tokens * data["sample_mask"][:, None]
        judge = STARTED.setdefault(self.key, self.judge)
        judged = judge(TokenBatch(next_token_logprobs, rollout, advantages, mask))
        # As NeMo-RL's own: divided by the step's tokens or sequences; the trainer adds up losses and metrics.
        if self.wrapped.loss_type.value == "token_level":
            value, share = judged.loss.sum() / global_valid_toks, mask.sum() / global_valid_toks
        else:
            value = (judged.loss.sum(-1) / tokens.sum(-1).clamp(min=1)).sum() / global_valid_seqs
            share = data["sample_mask"].sum() / global_valid_seqs
        ours = {name: number * float(share) for name, number in steady_metrics(judged.metrics).items()}
        return value, {**stats, **ours, "loss": value.item()}
