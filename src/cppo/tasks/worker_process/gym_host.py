"""reasoning_gym, hosted: the generators and their scorers run here, and nowhere else.

An entry is a function of (generator, configuration, seed, index), so a request names it and need not carry it: entries
hold dates, sets and symbols that JSON cannot. In this process PYTHONHASHSEED is 0, because some generators iterate
over sets of strings (ransom_note and isomorphic_strings in 0.1.25) and would give other problems in every run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

# Problems come in blocks, each a data set of its own: generators such as gsm_symbolic prepare all `size` problems when
# they are made, and most seed problem i with seed + i, so that data sets with neighbouring seeds are nearly equal.
_BLOCK = 256


def handle(request: dict[str, Any]) -> Any:
    """request: {"do": "names" | "options" | "entry" | "score", ...}; the other fields are those of the function."""
    actions: dict[str, Callable[..., Any]] = {"names": _names, "options": _options, "entry": _entry, "score": _score}
    return actions[request.pop("do")](**request)


def _names() -> list[str]:
    return sorted(DATASETS)


def _options(generator: str) -> list[str]:
    return [field.name for field in dataclasses.fields(DATASETS[generator][1]) if field.name not in ("seed", "size")]


def _entry(generator: str, config: dict[str, Any], seed: int, index: int) -> dict[str, str | None]:
    entry = _raw_entry(generator, json.dumps(config, sort_keys=True), seed, index)
    answer = entry["answer"]
    return {"question": entry["question"], "answer": None if answer is None else str(answer)}


def _score(generator: str, config: dict[str, Any], seed: int, index: int, answer: str) -> float:
    key = json.dumps(config, sort_keys=True)
    dataset = _dataset(generator, key, seed, index // _BLOCK)
    return float(dataset.score_answer(answer, _raw_entry(generator, key, seed, index)))


@lru_cache(maxsize=4096)
def _raw_entry(generator: str, config: str, seed: int, index: int) -> dict[str, Any]:
    return _dataset(generator, config, seed, index // _BLOCK)[index % _BLOCK]


@lru_cache(maxsize=32)
def _dataset(generator: str, config: str, seed: int, block: int) -> Any:
    digest = hashlib.blake2b(f"{seed}/{block}".encode(), digest_size=4).digest()
    block_seed = int.from_bytes(digest, "big") >> 2  # 30 bits: some generators want seed + index within 32
    return reasoning_gym.create_dataset(generator, size=_BLOCK, seed=block_seed, **json.loads(config))
