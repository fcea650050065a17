"""Trust regions in TRL's GRPO trainer: change two lines of a TRL script (docs/trl.md).

* `trust_region_config`: a `GRPOConfig` in which the rule alone decides. `TrustRegionTrainer`: a `GRPOTrainer` with a
  rule.
* The seam is TRL's public `get_off_policy_mask`: called once a loss, its result m multiplies the per-token loss -rho A.
  We return m = c / rho with TRL's own rho, so that the loss is -c A in value and -c A grad log pi in gradient, whatever
  the rule.
* `cppo.engines.support.TrustRegionLoss` judges, looks at the first update and counts, as in every other adapter.
* Five more methods are wrapped: they call TRL's own and add tensors (what a divergence needs of mu, the zero-spread
  filter, hidden states, rewards), or sample in its place (`sampler`).
* Every setting that would silently disable or alter the rule is refused (`settings`); a TRL that moved is an error.

Left out: AsyncGRPO (it has a loss of its own), context parallelism (TRL's GRPO has none). In
evaluation the policy is the one that samples: no rule is applied and TRL's own loss is reported.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import trl
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from cppo.divergence import Variant
from cppo.engines.support import EngineChangedError, TrustRegionLoss
from cppo.engines.trl.batch import ROW_SCALE, attach_rewards, drop_zero_spread, rows_with_loss
from cppo.engines.trl.divergence import HeadDivergence
from cppo.engines.trl.head import causal_lm, counted_positions, logit_changes
from cppo.engines.trl.rollout import Wanted
from cppo.engines.trl.sampler import Sampled, Sampler, sample
from cppo.engines.trl.settings import (
    TopK,
    generation_problems,
    needs_head,
    problems,
    trust_region_config,
    updates_per_rollout,
)
from cppo.errors import UserError
from cppo.rules import CPPO, TrustRegion, Verdict
from cppo.tokens import TokenBatch

__all__ = ["TrustRegionTrainer", "trust_region_config"]

#: TRL versions that this adapter was written for and is tested with.
WRITTEN_FOR = "1.16"

#: TRL gets old log-probabilities of at least this, so that its own ratio stays below e^20: exp cannot overflow (inf
#: times a zero mask is NaN, in the gradient even behind a clamp) and `epsilon`, `delta` never cut. Exact all the same:
#: m = c / rho follows.
OLD_LOGP_MIN = -20.0

HINT = (
    "Look at temperature and sampling options (top_p, top_k and the model's generation_config: off), at precision "
    "(with vLLM: its dtype and quantisation), and at whether the weights reached the sampler."
)

ALL_EQUAL = (
    "all responses to each prompt of a rollout batch have the same reward: nothing can be learnt from it, its loss is "
    "0 and training goes on. If this stays so, the task is too hard or too easy, or the reward function is constant."
)

#: observer(batch, verdict, TRL's minibatch, update inside the rollout batch, 0-based)
Observer = Callable[[TokenBatch, Verdict, dict[str, Any], int], None]


@dataclass
class _LossPass:
    """What the hook needs to know about the loss in progress."""

    inputs: dict[str, Any]
    old_logp: Tensor | None  # as TRL gets them
    calls: int = 0


class TrustRegionTrainer(GRPOTrainer):
    """`GRPOTrainer` under a trust region.

    Parameters
    ----------
    model, reward_funcs, and all other keyword arguments : as in `GRPOTrainer`; `args` from `trust_region_config`.
    rule : any of `cppo.RULES`; default `cppo.CPPO()`.
    top_k, topk_variant : for rules with a top-K or adaptive divergence: K, and the classes
        (`cppo.divergence.topk_tv`).
    topk_anchor : "rollout": mu is the policy that sampled. "recomputed": with vLLM, which reports the sampled tokens
        alone, take the trainer's distributions of the same weights; ratios stay against vLLM.
    topk_store : how mu's top-K is kept until the last update: "float32", 8 K bytes per token; "compact", 5 K, TV off by
        at most 0.0015 (K = 20); "ragged", 1 + 5 for each entry that is needed to cover 99.9% of mu, TV off by up to
        0.001 more (`cppo.scoring.store`). `adaptive_tv` allows for that and decides as the exact TV all the same.
    zero_spread_filter : take groups with equal rewards out of the loss and out of its denominators.
    observer : called once a loss in training, without gradient: observer(batch, verdict, inputs, update). With an
        attribute `last_update_whole` that is True it is shown responses without loss tokens (left out by the filter) in
        the last update of a rollout batch only; on one process the others are computed without them, which is faster.
    max_on_policy_divergence : the largest mean D_t of the first update, before any optimizer step, where pi = mu and
        D_t is the mismatch between sampler and trainer; beyond it the run stops. None: do not look.
    sampler : "trl": its generation. "own" (`cppo.engines.trl.sampler`): with the model in memory, recording mu from the
        logits that were sampled from, so that no pass computes old log-probabilities. Or a `Sampler` of yours, whose
        record is mu (not with exact divergences). Neither goes with TRL's vLLM, tools, images or a sharded model.

    Raises
    ------
    UserError : settings that would disable or alter the rule, all in one message. EngineChangedError : TRL has moved.
    """

    beta: float  # TRL's

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *,
        rule: TrustRegion | None = None,
        top_k: int = 20,
        topk_variant: Variant = "append",
        topk_anchor: str = "rollout",
        topk_store: str = "float32",
        zero_spread_filter: bool = True,
        observer: Observer | None = None,
        max_on_policy_divergence: float | None = TrustRegionLoss.max_on_policy_divergence,
        sampler: str | Sampler = "trl",
        **kwargs: Any,
    ) -> None:
        rule = CPPO() if rule is None else rule
        if not isinstance(rule, TrustRegion):
            raise UserError(f"rule is {rule!r}, expected a rule such as cppo.CPPO(), or cppo.make_rule('cppo').")
        if args is None:
            raise UserError("args is None, and TRL's defaults clip the ratio. Set args=trust_region_config(...).")
        _check_seam()
        options = TopK(top_k, topk_variant, topk_anchor, topk_store)
        _refuse(problems(args, rule, options))
        _refuse(_sampler_problems(sampler, args, kwargs, rule.divergence))
        super().__init__(model, reward_funcs, args, **kwargs)
        if clash := [name for name in {*vars(self), *dir(GRPOTrainer)} if name.startswith("_trust_")]:
            raise _moved(f"it has attributes {clash} of its own")
        policy = self._trust_policy()
        _refuse(generation_problems(policy.generation_config, args))
        self._trust = TrustRegionLoss(rule, "TRL", max_on_policy_divergence, HINT)
        self._trust_observer, self._trust_filtered = observer, zero_spread_filter
        self._trust_divergence: HeadDivergence | None = None
        if needs_head(rule.divergence):
            logit_changes(policy)  # raises where they cannot be followed
            fp32 = args.cast_lm_head_to_fp32
            self._trust_divergence = HeadDivergence(str(rule.divergence), options, self.temperature, fp32)
        self._trust_loss: _LossPass | None = None
        self._trust_sampler = sampler
        self._trust_sampled: Sampled | None = None
        self._trust_warned = False
        self._trust_generated_at = 0
        self._trust_rewards: Tensor | None = None

    def set_rule(self, rule: TrustRegion) -> None:
        """Go on with other parameters of the rule, from the next loss on; call it on every process.

        Raises
        ------
        UserError : the rule needs another divergence, for which nothing has been prepared.
        """
        if rule.divergence != self._trust.rule.divergence:
            raise UserError(
                f"the rule needs {rule.divergence!r}, and the trainer measures {self._trust.rule.divergence!r}."
            )
        self._trust.rule = rule

    # -- the seam -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_off_policy_mask(
        self,
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """m ``[B, T]`` float32, by which TRL multiplies its per-token loss: c_t / rho_t; 0 where rho_t underflows."""
        loss = self._trust_loss
        if loss is None:
            raise _moved("get_off_policy_mask was called outside of _compute_loss")
        loss.calls += 1
        if not self.model.training:
            return torch.ones_like(per_token_logps)
        logp = per_token_logps.detach().float()
        batch = TokenBatch(logp, sampling_per_token_logps.float(), advantages.float(), mask)
        if self._trust_divergence is not None:
            found, resolved = self._trust_divergence.score(self._trust.rule, batch, self._trust_policy(), loss.inputs)
            batch = batch.with_divergence(found)
            if resolved is not None:
                self._trust_log_share("trust/resolved_fraction", resolved.sum(), batch.loss_mask.sum())
        update = self._trust_update()
        verdict, stats = self._trust.judge(batch, on_policy=update == 0, reduce=self._trust_reduce)
        for name, value in stats.items():
            self._metrics["train"][name].append(value)
        if self._trust_observer is not None:
            self._trust_observer(batch, verdict, loss.inputs, update)
        ratio = torch.ones_like(logp)
        if loss.old_logp is not None:
            ratio = (logp - loss.old_logp).exp().clamp(max=self.args.delta)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            ratio = ratio * loss.inputs["importance_sampling_ratio"]
        found = ratio > 1e-30
        m = torch.where(found, verdict.coefficient / torch.where(found, ratio, 1.0), 0.0)
        scale = loss.inputs.get(ROW_SCALE)
        return m if scale is None else m * scale[:, None]

    def _trust_policy(self) -> Any:
        """The transformers model that is trained, out of DDP, FSDP and PEFT."""
        return causal_lm(self.accelerator.unwrap_model(self.model))

    def _trust_reduce(self, sums: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
        if self.accelerator.num_processes == 1:
            return sums, maxima
        rows = self.accelerator.gather(torch.cat([sums, maxima])[None])
        return rows[:, : len(sums)].sum(0), rows[:, len(sums) :].amax(0)

    def _trust_log_share(self, name: str, part: Tensor | int, whole: Tensor | int) -> None:
        """Log part / whole, both summed over processes."""
        counts = torch.stack([torch.as_tensor(x, device=self.accelerator.device).double() for x in (part, whole)])
        total = self.accelerator.reduce(counts, reduction="sum").tolist()
        self._metrics["train"][name].append(total[0] / max(total[1], 1))

    # -- wrappers: TRL's own, plus something --------------------------------------------------------------------

    def _trust_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The minibatch without responses that have no loss token, where nobody looks at them.

        Observers may: those with `last_update_whole` only in the last update of a rollout batch. An auxiliary loss (of
        a mixture of experts) is of all responses, images have no row for each of them, and several processes must have
        equally many, since TRL gathers figures of each.
        """
        one = self.accelerator.num_processes == 1
        if not one or not self.model.training or self.aux_loss_enabled or any("pixel" in name for name in inputs):
            return inputs
        last = self._trust_update() == updates_per_rollout(self.args) - 1
        if self._trust_observer is None or (getattr(self._trust_observer, "last_update_whole", False) and not last):
            return rows_with_loss(inputs, self.loss_type)
        return inputs

    def _trust_update(self) -> int:
        """Which update of the rollout batch this loss is of, from 0."""
        accumulation = self.args.gradient_accumulation_steps
        return int(self._step // accumulation - self._trust_generated_at // accumulation)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        inputs = self._trust_rows(inputs)
        given, old = dict(inputs), inputs.get("old_per_token_logps")
        if old is not None and self.model.training:
            mu = inputs.get("sampling_per_token_logps", old)
            given["sampling_per_token_logps"] = torch.where(mu.isnan(), old, mu)  # vLLM: NaN = token without a score
            given["old_per_token_logps"] = old = old.clamp(min=OLD_LOGP_MIN)
        loss = self._trust_loss = _LossPass(inputs, old)
        beta = self.beta
        if beta and ROW_SCALE in inputs:  # the KL term has the same denominator, but the hook does not reach it
            self.beta = beta * inputs[ROW_SCALE].max().item()
        try:
            result = super()._compute_loss(model, given)
        finally:
            self._trust_loss, self.beta = None, beta
        if loss.calls != 1:
            raise _moved(f"get_off_policy_mask was called {loss.calls} times in one loss instead of once")
        return result

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        def forward() -> Any:
            method = super(TrustRegionTrainer, self)._get_per_token_logps_and_entropies
            with counted_positions(model, self._trust_policy()):
                return method(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

        in_loss = self._trust_loss is not None
        ours = model is self.model and self.model.training and not in_loss
        if ours and (sampled := self._trust_sampled) is not None:
            # The pass that would compute what the sampler has recorded.
            self._trust_sampled = None
            if self._trust_divergence is not None:
                self._trust_divergence.take(sampled, self._trust_policy(), input_ids[:, -logits_to_keep:])
            return sampled.padded_logp(logits_to_keep), None, None
        if self._trust_divergence is None or not self.model.training or not (in_loss or ours):
            return forward()
        tokens, mask = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:]
        return self._trust_divergence.listen(forward, self._trust_policy(), tokens, mask, in_loss)

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        if self._trust_sampler == "trl" or not self.model.training:
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        if images is not None:
            raise UserError("this sampler takes texts alone, and these prompts hold images. Set sampler='trl'.")
        wanted = Wanted(0, "", False)
        if self._trust_divergence is not None:
            wanted = self._trust_divergence.wanted(self._trust_policy())
        # With bf16 each forward would round all weights anew; one context around all of them keeps the rounded copy.
        with self.accelerator.autocast():
            draw = self._trust_sampler
            if isinstance(draw, str):
                policy = self.accelerator.unwrap_model(self.model)
                draw = partial(sample, policy, pad=self._tokenizer.pad_token_id, states=wanted.states)
            sampled = draw(
                prompt_ids,
                max_new_tokens=self.max_completion_length,
                temperature=self.temperature,
                ends=self.eos_token_ids,
                top_k=wanted.top_k,
            )
        # TRL makes a pass for old log-probabilities where a batch gets several updates; it takes what was recorded.
        # Where TRL makes none, no other pass may take it.
        if self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations):
            self._trust_sampled = sampled
        return [tokens.tolist() for tokens in sampled.tokens], None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._trust_rewards = super()._calculate_rewards(*args, **kwargs)
        return self._trust_rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        began = time.perf_counter()
        output = self._trust_rollout(inputs)
        self._metrics["train"]["rollout_time"].append(time.perf_counter() - began)  # a part of TRL's step_time
        return output

    def _trust_rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout batch in training, with what the rule needs of mu and without groups of equal rewards."""
        self._trust_generated_at = self._step
        per_batch = self.args.steps_per_generation * self.num_iterations
        if self._step == 0 and self.state.global_step * self.args.gradient_accumulation_steps % per_batch:
            warnings.warn(
                f"training resumes at update {self.state.global_step}, in the middle of a rollout batch: the rest of "
                "that batch is lost and the run differs from the uninterrupted one. Save on rollout boundaries.",
                stacklevel=2,
            )
        if self._trust_divergence is not None:
            self._trust_divergence.collecting = True
        output = super()._generate_and_score_completions(inputs)
        if self._trust_divergence is not None:
            stored = self._trust_divergence.attach(output)
            self._trust_log_share("trust/divergence_bytes_per_token", stored, output["completion_ids"].numel())
        if self.rollout_func is not None and "sampling_per_token_logps" not in output:
            raise UserError(
                "TRL: rollout_func returned no log-probabilities (logprobs=None), so the rollout policy is not known. "
                "Return logprobs of the sampled tokens, from the engine that sampled them."
            )
        if "sampling_per_token_logps" in output:
            loss_tokens = (output["completion_mask"] * output.get("tool_mask", 1)) != 0
            missing = output["sampling_per_token_logps"].isnan() & loss_tokens
            self._trust_log_share("trust/unscored_fraction", missing.sum(), loss_tokens.sum())
        rank, gather = self.accelerator.process_index, self.accelerator.gather
        rewards, self._trust_rewards = self._trust_rewards, None
        if rewards is None:
            raise _moved("_calculate_rewards was not called for a rollout batch")
        attach_rewards(output, rewards, self.reward_weights.to(rewards.device), self.num_generations, rank)
        if self._trust_filtered:
            share = drop_zero_spread(output, self.num_generations, self.loss_type, rank, gather)
            self._metrics["train"]["trust/zero_spread_fraction"].append(share)
            if share == 1 and not self._trust_warned:
                self._trust_warned = True
                warnings.warn(ALL_EQUAL, stacklevel=2)
        return output


def _refuse(found: list[str]) -> None:
    if found:
        head = "these settings" if len(found) > 1 else "this setting"
        body = "\n".join(f"  - {sentence}" for sentence in found)
        raise UserError(
            f"{head} would silently disable or alter the trust region (trust_region_config(...) has the right "
            f"ones):\n{body}"
        )


def _sampler_problems(
    sampler: str | Sampler, args: GRPOConfig, kwargs: dict[str, Any], divergence: str | None
) -> list[str]:
    if sampler == "trl":
        return []
    if sampler != "own" and not callable(sampler):
        return [f"sampler={sampler!r}, expected 'trl', 'own' or a function (cppo.engines.trl.sampler.Sampler)."]
    if sampler != "own" and divergence is not None and divergence.startswith(("exact_", "adaptive_")):
        return [
            f"a sampler of yours records mu's top K, and divergence={divergence!r} needs all of mu. Set a top-K or "
            "binary divergence in the rule, or sampler='own'."
        ]
    why = {
        "use_vllm=True": args.use_vllm,
        "rollout_func": kwargs.get("rollout_func") is not None,
        "tools": bool(kwargs.get("tools")),
        "FSDP": bool(args.fsdp),
        "DeepSpeed": bool(args.deepspeed),
    }
    found = [name for name, given in why.items() if given]
    return [f"sampler={sampler!r} does not go with {name}. Set sampler='trl'." for name in found]


def _moved(what: str) -> EngineChangedError:
    return EngineChangedError(
        f"TRL {trl.__version__} does not work the way this adapter expects (written for TRL {WRITTEN_FOR}.x): {what}. "
        f"Install 'trl=={WRITTEN_FOR}.*', or a CPPO that knows this TRL."
    )


def _check_seam() -> None:
    """The hook must exist with the parameters that we override it with."""
    hook = getattr(GRPOTrainer, "get_off_policy_mask", None)
    wanted = list(inspect.signature(TrustRegionTrainer.get_off_policy_mask).parameters)[1:]
    if hook is None or list(inspect.signature(hook).parameters) != wanted:
        raise _moved(f"GRPOTrainer.get_off_policy_mask is gone or has other parameters than {', '.join(wanted)}")
