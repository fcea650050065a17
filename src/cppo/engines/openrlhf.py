"""Trust regions in OpenRLHF: a `PolicyLoss` in the place of OpenRLHF's, in its worker processes (docs/engines.md).

OpenRLHF has no hook for a loss, but Ray has one for worker processes, and the class is looked up by name in them::

    ray job submit --runtime-env-json '{"worker_process_setup_hook": "cppo.engines.openrlhf.install",
        "env_vars": {"CPPO_RULE": "{\\"name\\": \\"cppo\\", \\"delta\\": 0.15}"}}' -- python3 -m
        openrlhf.cli.train_ppo_ray --algo.advantage.is_correction_level token ...

* **Rollout log-probabilities exist only if ``is_correction_level`` is not "off"** (its default): that setting makes
  vLLM return them. OpenRLHF's own correction does not run: it is part of the loss that is replaced.
* Rows are whole responses ``[B, A]``, with ring attention and tensor parallelism, too. OpenRLHF's own `aggregate_loss`
  reduces, with its own denominators (all action tokens of an optimizer step, or mean over samples).
* OpenRLHF logs five figures of a loss; what they mean here: `TrustRegionPolicyLoss.forward`.

Left out: top-K divergences; eps_clip and dual_clip (parameters of the loss that is replaced).
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch
from torch import Tensor

from cppo.engines.support import check_version, loss_from_environment, require_parameters
from cppo.errors import UserError
from cppo.tokens import TokenBatch

WRITTEN_FOR = "0.11.2"
MODULE = "openrlhf.models.loss"
ANCHOR = (
    "OpenRLHF: there are no rollout log-probabilities. Set --algo.advantage.is_correction_level token: it makes vLLM "
    "return them. OpenRLHF's correction itself is not applied with this loss."
)


def install() -> None:
    """Ray's ``worker_process_setup_hook``: `PolicyLoss` is ours as soon as this process imports it.

    Importing it right away would load DeepSpeed into vLLM's workers, which OpenRLHF takes care to avoid.
    """
    if MODULE in sys.modules:
        replace(sys.modules[MODULE])
    elif not any(isinstance(finder, _Replace) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Replace())


class _Replace(MetaPathFinder):
    """Finds OpenRLHF's loss module where it is, and lets `replace` follow its execution."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == MODULE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_replace(module: Any) -> None:
            execute(module)
            replace(module)

        spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


def replace(module: Any) -> None:
    """Put a subclass in the place of ``module.PolicyLoss`` and wherever else it has been imported to by now."""
    theirs = module.PolicyLoss
    if theirs.__name__ == "TrustRegionPolicyLoss":
        return
    check_version("openrlhf", WRITTEN_FOR)
    names = ("log_probs", "advantages", "action_mask", "rollout_log_probs", "batch_num_tokens", "global_batch_size")
    require_parameters(theirs.forward, *names, "dp_size", "old_log_probs", engine="OpenRLHF")
    require_parameters(module.aggregate_loss, "loss", "loss_mask", "token_level_loss", engine="OpenRLHF")

    class TrustRegionPolicyLoss(theirs):  # type: ignore[misc, valid-type]
        """OpenRLHF's `PolicyLoss` with -c_t A_t log pi(y_t) of the rule in ``CPPO_RULE``."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.policy_loss_type != "ppo":
                raise UserError(f"OpenRLHF: --actor.policy_loss_type is {self.policy_loss_type!r}. Set it to ppo.")
            if self.is_correction_level == "off":
                raise UserError(ANCHOR)
            self.judge = loss_from_environment("OpenRLHF")

        def forward(
            self,
            log_probs: Tensor,
            old_log_probs: Tensor,
            advantages: Tensor,
            action_mask: Tensor,
            rollout_log_probs: Tensor | None = None,
            **sizes: Any,
        ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            """The loss, and the figures that OpenRLHF logs; shapes ``[B, A]``.

            ppo_clip_ratio: share of the tokens with coefficient 0. is_filter_ratio: share dropped by the prefix budget.
            vllm_kl: mean log mu - log pi. ppo_kl: mean log old - log pi (recomputed by OpenRLHF; no rule reads it).
            """
            if rollout_log_probs is None:
                raise UserError(ANCHOR)
            judged = self.judge(TokenBatch(log_probs, rollout_log_probs, advantages, action_mask))
            value = module.aggregate_loss(judged.loss, action_mask, token_level_loss=self.token_level_loss, **sizes)
            with torch.no_grad():
                inside = action_mask.bool()
                gaps = [torch.where(inside, x - log_probs, 0).sum() for x in (old_log_probs, rollout_log_probs)]
                ppo_kl, vllm_kl = (gap / inside.sum().clamp(min=1) for gap in gaps)
                names = ("trust/masked_fraction", "trust/prefix_budget_fraction")
                masked, budget = (value.new_tensor(judged.metrics[name]) for name in names)
            return value, masked, ppo_kl, vllm_kl, budget

    for place in (module, sys.modules.get("openrlhf.models")):
        if getattr(place, "PolicyLoss", None) is theirs:
            place.PolicyLoss = TrustRegionPolicyLoss  # type: ignore[union-attr]
