"""Scoring tokens at language-model scale: log-probabilities and divergences from hidden states and the lm_head, without
ever holding the logits. Needs torch alone.

* `score_tokens`: log-probabilities (with gradient), candidates, entropy, top k. `exact_divergence`: TV and KL over the
  whole vocabulary. Both take a lm_head that is split over a tensor-parallel group (`VocabShard`).
* `adaptive_for_rule`: decides as the exact TV does, computing it for few tokens.
* `pack_topk`, `RaggedTopK`: mu's top K in at most 5 bytes per entry.
* `score_ids`, `top_ids`: the same for engines that have logits.
"""

from cppo.scoring.adaptive import AdaptiveDivergence, adaptive_for_rule
from cppo.scoring.exact import Distributions, exact_divergence
from cppo.scoring.ids import local_part, score_ids, top_ids
from cppo.scoring.parallel import LocalPart, Scores, VocabShard, merge
from cppo.scoring.store import RaggedTopK, contains, pack_topk, topk_error_bound, unpack_topk
from cppo.scoring.tokens import TokenScores, score_tokens

__all__ = [
    "AdaptiveDivergence",
    "Distributions",
    "LocalPart",
    "RaggedTopK",
    "Scores",
    "TokenScores",
    "VocabShard",
    "adaptive_for_rule",
    "contains",
    "exact_divergence",
    "local_part",
    "merge",
    "pack_topk",
    "score_ids",
    "score_tokens",
    "top_ids",
    "topk_error_bound",
    "unpack_topk",
]
