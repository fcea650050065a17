"""verl's policy loss under a trust region, and the logits hook in which top-K divergences are computed.

The loss is l_t = -c_t A_t log pi(y_t) (`cppo.token_loss`), reduced by verl's own `agg_loss` with all response tokens in
the denominator. ``old_log_prob`` must be the rollout policy's (bypass mode).

Top-K: mu's top K travels with each sequence as verl's ``teacher_ids`` / ``teacher_logprobs`` ``[T, K + 1]``, row t - 1
belonging to the token at t. Column 0 is the sampled token with its log mu, the others mu's K likeliest. verl's engines
call the loss function once more with the logits of the forward (``distillation_use_topk``), in whatever layout they
have (packed, Ulysses or context-parallel slices, vocabulary split over tensor parallelism); D_t is computed there, one
number per token, and gathered by verl along with the log-probabilities. It costs no forward of its own.
"""

from __future__ import annotations

import contextvars
import math
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.utils.metric import AggregationType, Metric
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from cppo import divergence as divergences
from cppo.engines.support import TrustRegionLoss
from cppo.engines.verl.config import LOSSES, needs_top_k, rule_of
from cppo.errors import UserError
from cppo.scoring import VocabShard, score_ids
from cppo.tokens import TokenBatch

#: Key of D_t among a forward's outputs.
DIVERGENCE = "cppo_divergence"
#: Metric that tells our loss has run.
MARK = "actor/trust/masked_fraction"

HINT = (
    "Look at these: rollout.temperature=1, top_p=1, top_k=-1 (the sampler draws from the full softmax); "
    "rollout.calculate_log_probs=True; a model vocabulary larger than the tokenizer (verl hides the extra ids from "
    "vLLM but not from the trainer: cut the embedding or raise the limit); different precision or quantisation of "
    "sampler and trainer; router replay for mixtures of experts (rollout.enable_rollout_routing_replay=True)."
)

# What the trainer's loss function knows and verl's policy loss is not told: D_t, and that the anchor has been checked.
_divergence: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("cppo_divergence", default=None)
_checked: contextvars.ContextVar[bool] = contextvars.ContextVar("cppo_checked", default=False)
# One state a configuration object (one actor a process, in practice). The object is kept, so that its id stays taken.
_regions: dict[int, tuple[Any, TrustRegionLoss, dict[str, float]]] = {}


def _region(policy_loss: Any) -> tuple[Any, TrustRegionLoss, dict[str, float]]:
    """Rule and state of a ``policy_loss`` configuration of this process."""
    if id(policy_loss) not in _regions:
        rule = rule_of(policy_loss.get("loss_mode"), policy_loss.get("rule") or {})
        limit = policy_loss.get("max_on_policy_divergence", 0.03)
        _regions[id(policy_loss)] = (policy_loss, TrustRegionLoss(rule, "verl", limit, HINT), {})
    return _regions[id(policy_loss)]


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's policy loss: the loss of a micro-batch, reduced, and metrics ``actor/trust/...``.

    Parameters
    ----------
    old_log_prob, log_prob : log mu and log pi of the response tokens, ``[B, T]``, right-padded. advantages : ``[B,
    T]``. response_mask : loss tokens, ``[B, T]``. loss_agg_mode : see verl's ``agg_loss``. config : verl's actor
    configuration.
    rollout_is_weights : verl's importance weights; must be None.

    Raises
    ------
    UserError : the configuration is not that of a trust region, or the first micro-batch shows that pi and mu are not
        the same policy before the first step.
    """
    if config is None:
        raise UserError("verl called the policy loss without its actor configuration.")
    if rollout_is_weights is not None:
        raise UserError(
            "verl hands over importance weights (rollout_is_weights) on top of a trust region whose ratio is already "
            "against the rollout policy: a double correction. Set algorithm.rollout_correction.bypass_mode=True."
        )
    settings, region, kept = _region(config.policy_loss)
    found = _divergence.get()
    if found is None and needs_top_k(region.rule):
        raise UserError(
            f"the rule {region.rule.name} asks for divergence={region.rule.divergence!r}, but no top K came with the "
            "batch. Set trainer.v1.trainer_mode=cppo_sync (cppo_colocate_async, cppo_separate_async), or "
            "+actor_rollout_ref.actor.policy_loss.rule.divergence=binary_tv."
        )
    if settings.get("trainer_checks", True) and not _checked.get():
        raise UserError(
            "this loss runs under a trainer that has not checked the configuration (the anchor could be a recomputed "
            "policy, and nothing would tell). Set trainer.v1.trainer_mode=cppo_sync (cppo_colocate_async, "
            "cppo_separate_async). Where that trainer cannot be used, see to "
            "algorithm.rollout_correction.bypass_mode=True (V1) and set "
            "+actor_rollout_ref.actor.policy_loss.trainer_checks=False together with policy_loss._target_."
        )
    if region.first:
        _check_first(log_prob, old_log_prob, response_mask, found)
    judged = region(TokenBatch(log_prob, old_log_prob, advantages, response_mask.bool(), divergence=found))
    stats = judged.metrics
    if found is not None and math.isnan(stats["trust/divergence_mean"]):
        _check_rows(found, response_mask)
    # verl wants the same keys from every micro-batch of every process.
    stats.pop("trust/first_rejected_position", None)
    kept["drift"] = stats.get("trust/first_update_divergence", kept.get("drift", 0.0))
    stats["trust/first_update_divergence"] = kept["drift"]
    loss = agg_loss(
        loss_mat=judged.loss, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
    )
    return loss, {f"actor/{key}": value for key, value in stats.items()}


def _check_first(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, divergence: Tensor | None) -> None:
    """Refuse a first micro-batch that shows a recomputed anchor, or a top K of other tokens (this synchronises)."""
    mask = mask.bool()
    equal = log_prob.detach().float()[mask] == old_log_prob.float()[mask]
    if not _checked.get() and equal.numel() and bool(equal.all()):
        raise UserError(
            "log pi equals old_log_prob to the last bit at every token of the first micro-batch: old_log_prob has been "
            "recomputed by the trainer and is not the sampler's. Set algorithm.rollout_correction.bypass_mode=True and "
            "actor_rollout_ref.rollout.calculate_log_probs=True."
        )
    if divergence is not None:
        _check_rows(divergence, mask)


def _check_rows(divergence: Tensor, mask: Tensor) -> None:
    """Refuse NaN where the hook found another token than the one that was sampled (see `topk_divergence`)."""
    missing = int((divergence.isnan() & mask.bool()).sum())
    if missing:
        raise UserError(
            f"mu's top K is missing or belongs to another token at {missing} of {int(mask.sum())} loss tokens. The "
            "agent loop must keep the sampled token ids as they are (no re-tokenisation, no edited history); for a "
            "loop that cannot, set +actor_rollout_ref.actor.policy_loss.rule.divergence=binary_tv."
        )


for _name in LOSSES:
    register_policy_loss(_name)(policy_loss)


def trust_region_loss(
    config: Any,
    model_output: Any = None,
    data: Any = None,
    dp_group: Any = None,
    student_logits: Tensor | None = None,
    data_format: str = "thd",
) -> Any:
    """The actor's loss function under CPPO's trainers: verl's ``ppo_loss`` around `policy_loss`, and the logits hook.

    With `student_logits`: called by the engine with the logits of its forward, returns ``{DIVERGENCE: D}`` ``[1, T]``.
    Otherwise: loss and metrics of a micro-batch.

    Raises
    ------
    UserError : the anchor is not the rollout policy, or another loss ran than ours.
    """
    if student_logits is not None:
        return {DIVERGENCE: topk_divergence(config, data, student_logits, data_format)}
    region = _region(config.policy_loss)[1]
    if region.first:
        check_anchor(data)
    scored = None
    if DIVERGENCE in model_output:
        scored = no_padding_2_padding(model_output[DIVERGENCE], data)
    before, unchecked = _divergence.set(scored), _checked.set(True)
    try:
        loss, metrics = ppo_loss(config, model_output, data, dp_group)
    finally:
        _divergence.reset(before)
        _checked.reset(unchecked)
    if MARK not in metrics:
        raise UserError(
            f"verl ran another policy loss than the trust region {region.rule.name} "
            f"(loss_mode={config.policy_loss.get('loss_mode')!r}): see docs/verl.md."
        )
    for key in list(metrics):  # verl averages a policy loss's metrics; maxima stay maxima
        if key.startswith("actor/trust/") and key.endswith("_max"):
            metrics[key] = Metric(AggregationType.MAX, metrics[key].aggregate())
    return loss, metrics


def check_anchor(data: Any) -> None:
    """Refuse a micro-batch whose ``old_log_probs`` are not the sampler's (this synchronises the device).

    Raises
    ------
    UserError : the sampler's log-probabilities are missing, or others stand in their place.
    """
    if "rollout_log_probs" not in data:
        raise UserError("the batch holds no rollout_log_probs: set actor_rollout_ref.rollout.calculate_log_probs=True.")
    rollout, old, mask = (
        value.values() if value.is_nested else value
        for value in (data["rollout_log_probs"], data["old_log_probs"], data["response_mask"])
    )
    mask = mask.bool()
    differ = int((rollout.float()[mask] != old.float()[mask]).sum())
    if differ:
        raise UserError(
            f"old_log_probs differ from the sampler's at {differ} of {int(mask.sum())} loss tokens: the anchor is not "
            "the rollout policy. Set algorithm.rollout_correction.bypass_mode=True."
        )


@torch.no_grad()
def topk_divergence(config: Any, data: Any, logits: Tensor, data_format: str) -> Tensor:
    """D_t over mu's top K at every row of a forward, float32 ``[1, T]``.

    Rows without top K, or whose column 0 is not the token that follows, get NaN: outside the loss mask nobody looks,
    inside it the loss refuses.

    Parameters
    ----------
    logits : of the forward, already divided by the temperature, ``[1, T_local, V_local]``.
    data : the micro-batch with nested ``input_ids``, ``teacher_ids``, ``teacher_logprobs``.
    """
    rule = _region(config.policy_loss)[1].rule
    if not needs_top_k(rule):
        raise UserError(f"the rule {rule.name} does not use top-K divergences, but verl asked for one.")
    ids, mu, following, shard = _layout(config.strategy, data, data_format, logits)
    known = (ids[..., 0] >= 0) & (ids[..., 0] == following)
    pi = score_ids(logits, ids.clamp(min=0), shard=shard, check=False).logp
    score = getattr(divergences, str(rule.divergence))
    # Slots beyond mu's top K (a vocabulary smaller than K) have log mu = -inf; they are not a class.
    inside = ((ids[..., 1:] == ids[..., :1]) & (mu[..., 1:] > -torch.inf)).any(-1)
    top = torch.where(mu[..., 1:] > -torch.inf, pi[..., 1:], -torch.inf)
    found = score(top, mu[..., 1:], pi[..., 0], mu[..., 0], inside, config.policy_loss.get("topk_variant", "append"))
    return torch.where(known, found, torch.nan)


def _layout(
    strategy: str, data: Any, data_format: str, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, VocabShard | None]:
    """(ids, log mu, the token that follows) of the rows that this process holds, and its part of the vocabulary."""
    ids, mu, tokens = data["teacher_ids"], data["teacher_logprobs"], data["input_ids"]
    if strategy == "megatron":
        return _megatron_layout(ids, mu, tokens, data_format, logits)
    rows = [ids.values()[None], mu.values()[None], tokens.values().roll(-1)[None]]
    if get_ulysses_sequence_parallel_world_size() > 1:
        rows = [slice_input_tensor(row, dim=1) for row in rows]
    return rows[0], rows[1].float(), rows[2], None


def _megatron_layout(
    ids: Any, mu: Any, tokens: Any, data_format: str, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, VocabShard | None]:
    """The same for verl's Megatron engine: context-parallel rows, vocabulary split over tensor parallelism.

    Tested with verl's own layout functions and Megatron-Core's process groups on two CPU processes; a Megatron model
    and its engine have not been run.
    """
    from megatron.core import parallel_state
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine

    split = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
    following = torch.nested.nested_tensor_from_jagged(tokens.values().roll(-1), tokens.offsets())
    rows = [split(value, pre_process=True)[0] for value in (ids, mu, following)]
    shard = VocabShard.equal(logits.shape[-1], group=parallel_state.get_tensor_model_parallel_group())
    return rows[0], rows[1].float(), rows[2], shard
