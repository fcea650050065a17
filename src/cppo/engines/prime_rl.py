"""Trust regions in prime-rl: `loss` as its custom loss, every rule by name (docs/engines.md).

::

    [trainer.loss]
    type = "custom"
    import_path = "cppo.engines.prime_rl.loss"
    kwargs = { rule = "cppo", delta = 0.15 }

* prime-rl calls the loss once a sample with 1-D tensors over prompt and response, sums what comes back, and divides by
  the number (or the weights) of all loss tokens of the step: rejected tokens stay in that denominator.
* ``inference_logprobs`` are the rollout policy's; prime-rl has no other anchor.
* A sample is judged as a whole, so packing, micro-batches and data parallelism change nothing.

Left out: top-K divergences (only the sampled token's log-probabilities arrive), prime-rl's own KL term to the rollout
policy (``kl_tau`` belongs to its built-in losses).
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from cppo.engines.support import TrustRegionLoss, check_version, require_parameters, sampled_token_rule, steady_metrics
from cppo.errors import UserError
from cppo.tokens import TokenBatch

#: prime-rl is installed from its repository; the loss interface of this version is what the adapter was written for.
WRITTEN_FOR = "0.7.0"
FIELDS = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")


def loss(
    inputs: Any,
    *,
    rule: str = "cppo",
    max_on_policy_divergence: float = 0.03,
    token_advantages: bool = False,
    **parameters: Any,
) -> Any:
    """Loss of one sample: sum over its loss tokens of -c_t A_t log pi(y_t).

    Parameters
    ----------
    inputs : prime-rl's ``LossInputs``: ``trainer_logprobs``, ``inference_logprobs``, ``advantages`` (float ``[T]``),
        ``loss_mask`` (bool ``[T]``), and from 0.7 on ``loss_weights`` (``[T]`` or None).
    rule, parameters : a rule by name and its parameters (``delta = 0.15``); divergences of the sampled token only.
    max_on_policy_divergence : limit of the mean divergence of the first sample of a run; 1 accepts everything.
    token_advantages : accept advantages that differ between the loss tokens of one call. Off, because that is also how
        a call looks that holds several samples at once, where prefix sums would run from one into the next.

    Returns
    -------
    prime-rl's ``LossOutputs``: the sum, and ``trust/...`` metrics as scalar tensors (prime-rl averages over samples).

    Raises
    ------
    UserError : an unknown rule or parameter, a divergence that needs more, no rollout log-probabilities, several
        advantages in one call, or a first sample that is not on-policy.
    EngineChangedError : prime-rl's ``LossInputs`` has another shape.
    """
    judge, outputs = _prepare(rule, max_on_policy_divergence, tuple(sorted(parameters.items())))
    if inputs.inference_logprobs is None:
        raise UserError(
            "prime-rl: the sample has no inference_logprobs, the log-probabilities of the policy that sampled it. "
            "Train on rollouts of prime-rl's own inference server (algorithms that sample with the policy), which "
            "returns them."
        )
    given = inputs.advantages.detach()[inputs.loss_mask]
    if not token_advantages and given.numel() and bool(given.min() != given.max()):
        raise UserError(
            "prime-rl: one call of the loss holds loss tokens with different advantages. Either this version "
            "concatenates samples before it calls the loss (then rules cannot tell where a response begins: use "
            f"prime-rl {WRITTEN_FOR}), or advantages are per token: then set token_advantages = true in kwargs."
        )
    rows = (getattr(inputs, name)[None] for name in FIELDS)  # [1, T]: positions count loss tokens, the prompt does not
    judged = judge(TokenBatch(*rows))
    value = judged.loss[0]
    weights = getattr(inputs, "loss_weights", None)
    if weights is not None:  # prime-rl's weight of each token in the rl component; the denominator is their sum
        value = value * torch.where(inputs.loss_mask, weights, 0)
    stats = {key: torch.tensor(number, device=value.device) for key, number in steady_metrics(judged.metrics).items()}
    return outputs(loss=value.sum(), metrics=stats)


@functools.cache
def _prepare(rule: str, limit: float, parameters: tuple[tuple[str, Any], ...]) -> tuple[TrustRegionLoss, Any]:
    """The rule and prime-rl's output type, once a process: prime-rl hands over the same kwargs in every call."""
    from prime_rl.trainer.rl.loss import LossInputs, LossOutputs  # type: ignore[import-not-found]

    check_version("prime-rl", WRITTEN_FOR)
    require_parameters(LossInputs, *FIELDS, engine="prime-rl")
    require_parameters(LossOutputs, "loss", "metrics", engine="prime-rl")
    made = sampled_token_rule({"name": rule, **dict(parameters)}, "prime-rl")
    return TrustRegionLoss(made, "prime-rl", max_on_policy_divergence=limit), LossOutputs
