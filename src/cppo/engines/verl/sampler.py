"""mu's top K straight from vLLM's sampler: a server that returns it with every sampled token.

verl asks vLLM for the sampled token's log-probability only (``logprobs=0``). This server asks for K, which costs vLLM a
top-K over a row that it has at hand; the values are those that the sampler used (``processed_logprobs``: after the
temperature), from the weights that sampled, so that asynchronous modes and resumed generations are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import verl.workers.rollout.vllm_rollout.vllm_async_server as server_module

from cppo.engines.verl.config import IDS, LOGP, SETTING

#: Whether this vLLM can keep log-probabilities in flat lists instead of a dictionary of objects a token (less than half
#: of the memory until a response ends); it reads the same.
FLAT = "flat_logprobs" in getattr(server_module.SamplingParams, "__struct_fields__", ())


def top_k_rows(logprobs: list[Any], k: int) -> tuple[np.ndarray, np.ndarray]:
    """vLLM's log-probabilities of one response as arrays: ids int32 and log mu float32, both ``[tokens, K]``.

    vLLM returns a dictionary a token: K entries, one more where the sampled token is not among them (it is told apart
    by its rank). Fewer than K entries (a small vocabulary) are filled up with id 0 at -inf.
    """
    ids = np.zeros((len(logprobs), k), dtype=np.int32)
    values = np.full((len(logprobs), k), -np.inf, dtype=np.float32)
    for row, entries in enumerate(logprobs):
        best = sorted(entries.items(), key=lambda entry: entry[1].rank)[:k]
        ids[row, : len(best)] = [token for token, _ in best]
        values[row, : len(best)] = [entry.logprob for _, entry in best]
    return ids, values


def install(k: int) -> None:
    """Make verl's server module of this process ask for K log-probabilities and hand them over; once."""
    if getattr(server_module, "_cppo_top_k", None) is not None:
        return
    parameters, extract = server_module.SamplingParams, server_module.extract_prompt_logprobs

    def sampling_parameters(**settings: Any) -> Any:
        if settings.get("logprobs") == 0:  # verl's "the sampled token's, please"
            settings["logprobs"] = k
            if FLAT:
                settings.setdefault("flat_logprobs", True)
        return parameters(**settings)

    def extract_both(output: Any, num_prompt_logprobs: int | None, result_dict: dict[str, Any]) -> None:
        extract(output=output, num_prompt_logprobs=num_prompt_logprobs, result_dict=result_dict)
        found = output.outputs[0].logprobs
        if found:
            result_dict[IDS], result_dict[LOGP] = top_k_rows(found, k)

    server_module.SamplingParams, server_module.extract_prompt_logprobs = sampling_parameters, extract_both
    server_module._cppo_top_k = k


class TopKvLLMHttpServer(server_module.vLLMHttpServer):
    """verl's vLLM server; K comes from the rollout configuration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        k = int((self.config.custom or {}).get(SETTING, 0))
        if k:
            install(k)


class TopKvLLMReplica(server_module.vLLMReplica):
    """verl's vLLM replica with that server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(TopKvLLMHttpServer)
