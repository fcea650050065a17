"""verl loads this module (entry point group ``verl.plugins``, or ``VERL_USE_EXTERNAL_MODULES=cppo_verl_plugin``).

A module of its own, outside the package `cppo`: see `cppo.engines.verl`. verl swallows what an entry point raises, so
the trainers and losses check on their own that they are the ones that run; with ``VERL_USE_EXTERNAL_MODULES`` a failure
is an error.
"""

# What verl must still take and give; an ImportError here is loud under VERL_USE_EXTERNAL_MODULES.
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla
from verl.workers.utils.losses import ppo_loss

import cppo.engines.verl.loss
import cppo.engines.verl.trainer  # noqa: F401
from cppo.engines.support import check_version, require_parameters

check_version("verl", "0.9.1")
require_parameters(
    compute_policy_loss_vanilla,
    "old_log_prob",
    "log_prob",
    "advantages",
    "response_mask",
    "loss_agg_mode",
    "config",
    "rollout_is_weights",
    engine="verl",
)
require_parameters(ppo_loss, "config", "model_output", "data", "dp_group", engine="verl")
require_parameters(agg_loss, "loss_mat", "loss_mask", "loss_agg_mode", engine="verl")
