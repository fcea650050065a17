"""Options that bend the distribution from which responses are sampled, and the values at which they do nothing.

Names are those of transformers' `GenerationConfig`, vLLM's `SamplingParams` and TRL's `GRPOConfig`. In rollouts any of
them breaks every ratio: mu would be another distribution than the one that is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Neutral = Callable[[Any], bool]


def _one_of(*values: Any) -> Neutral:
    # Equality by value: 1 == 1.0 == True are the same setting here.
    return lambda value: value is None or any(value == neutral for neutral in values)


#: Generation options that change which token is sampled from what distribution, and the values at which they do
#: nothing.
SAMPLING: Mapping[str, Neutral] = {
    "do_sample": _one_of(True),
    "top_p": _one_of(1),
    "top_k": _one_of(0, -1),
    "min_p": _one_of(0),
    "top_h": _one_of(0),
    "typical_p": _one_of(1),
    "epsilon_cutoff": _one_of(0),
    "eta_cutoff": _one_of(0),
    "repetition_penalty": _one_of(1),
    "encoder_repetition_penalty": _one_of(1),
    "presence_penalty": _one_of(0),
    "frequency_penalty": _one_of(0),
    "no_repeat_ngram_size": _one_of(0),
    "encoder_no_repeat_ngram_size": _one_of(0),
    "num_beams": _one_of(1),
    "num_beam_groups": _one_of(1),
    "use_beam_search": _one_of(False),
    "penalty_alpha": _one_of(0),
    "diversity_penalty": _one_of(0),
    "guidance_scale": _one_of(1),
    "dola_layers": _one_of(),
    "bad_words_ids": _one_of([]),
    "bad_words": _one_of([]),
    "suppress_tokens": _one_of([]),
    "begin_suppress_tokens": _one_of([]),
    "allowed_token_ids": _one_of([]),
    "forced_bos_token_id": _one_of(),
    "forced_eos_token_id": _one_of(),
    "force_words_ids": _one_of([]),
    "constraints": _one_of([]),
    "sequence_bias": _one_of({}),
    "logit_bias": _one_of({}),
    "logits_processors": _one_of([]),
    "exponential_decay_length_penalty": _one_of(),
    "watermarking_config": _one_of(),
    "structured_outputs": _one_of(),
    "guided_decoding": _one_of(),
    # These forbid the end of the response for a while.
    "min_length": _one_of(0),
    "min_new_tokens": _one_of(0),
    "min_tokens": _one_of(0),
}
