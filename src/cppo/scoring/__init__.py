"""Scoring tokens: log-probabilities of chosen ids out of logits. Needs torch alone; nothing else of the package.

`parallel` merges what tensor-parallel ranks know about their columns of the vocabulary.
"""

from cppo.scoring.parallel import LocalPart, Scores, VocabShard, local_part, merge, score_ids, top_ids

__all__ = ["LocalPart", "Scores", "VocabShard", "local_part", "merge", "score_ids", "top_ids"]
