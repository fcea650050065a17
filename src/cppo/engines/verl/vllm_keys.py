"""Names under which a rollout server hands over its top K, for servers and for those that read them."""

#: Extra fields of a server's answer: arrays or lists ``[tokens, K]``, mu's likeliest ids first, and their log mu.
IDS, LOGP = "mu_topk_ids", "mu_topk_logprobs"
#: Key of K in ``actor_rollout_ref.rollout.custom``, from which a server learns how many are wanted.
SETTING = "cppo_top_k"
