"""Log-probabilities at given ids, and the likeliest ids, from logits that an engine has; the vocabulary may be split.

Memory beyond inputs and outputs: one float32 tile of at most max(`CHUNK_ELEMENTS`, V_local) elements, and about 30
bytes for each id. The joining over a group: `cppo.scoring.parallel`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cppo.scoring.parallel import LocalPart, Scores, VocabShard, merge, merge_top

#: Elements of the temporary float32 tile [tokens, V_local]: 2^24 are 64 MiB.
CHUNK_ELEMENTS = 2**24


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def local_part(logits: Tensor, ids: Tensor, shard: VocabShard, temperature: float | Tensor = 1.0) -> LocalPart:
    """Reduce this rank's logits to a `LocalPart` of N = ... tokens; no communication.

    Parameters
    ----------
    logits : ``[..., V_local]``, any float dtype. ids : global, ``[..., K]`` integers. temperature : a number, or
        ``[...]``.
    """
    tokens = math.prod(logits.shape[:-1])
    try:
        flat = logits.view(tokens, logits.shape[-1])
    except RuntimeError:  # strides that cannot be flattened in place: a part for each outer index instead of a copy
        parts = [
            local_part(logits[i], ids[i], shard, temperature[i] if isinstance(temperature, Tensor) else temperature)
            for i in range(logits.shape[0])
        ]
        return LocalPart(
            torch.cat([part.maximum for part in parts]),
            torch.cat([part.total for part in parts]),
            torch.cat([part.logits for part in parts]),
            torch.cat([part.held for part in parts]),
        )
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1)
    dtype, valid = _arithmetic(logits.dtype), shard.valid
    local = ids.reshape(tokens, ids.shape[-1]).long() - shard.start
    held = (local >= 0) & (local < valid)
    maximum = flat.new_full((tokens,), -math.inf, dtype=dtype)
    total = flat.new_zeros(tokens, dtype=dtype)
    at_ids = flat.new_zeros(local.shape, dtype=dtype)
    if valid == 0 or tokens == 0:
        return LocalPart(maximum, total, at_ids, held)
    local.clamp_(0, valid - 1)
    each = max(1, min(tokens, CHUNK_ELEMENTS // valid))
    tile = flat.new_empty((each, valid), dtype=dtype)
    for first in range(0, tokens, each):
        rows = slice(first, min(first + each, tokens))
        z = tile[: rows.stop - first].copy_(flat[rows, :valid])
        at_ids[rows] = z.gather(1, local[rows])
        highest = z.amax(-1)
        maximum[rows] = highest
        # A row that is masked out here (all -inf) must become 0, not NaN: another rank may hold its tokens.
        z.sub_(torch.where(highest == -math.inf, 0.0, highest)[:, None])
        if isinstance(temperature, Tensor):
            z.div_(temperature[rows, None])
        elif temperature != 1:
            z.div_(temperature)
        total[rows] = z.exp_().sum(-1)
    return LocalPart(maximum, total, at_ids, held)


def _columns(logits: Tensor, shard: VocabShard | None, vocab_size: int | None) -> VocabShard:
    """Which columns `logits` are; without `shard` all of them."""
    if not logits.is_floating_point() or logits.dim() < 1:
        raise ValueError(f"logits has dtype {logits.dtype} and shape {list(logits.shape)}, expected floats [..., V].")
    columns = logits.shape[-1]
    if shard is None:
        vocab_size = columns if vocab_size is None else vocab_size
        if columns < vocab_size:
            raise ValueError(
                f"logits has {columns} columns, but vocab_size is {vocab_size}: if the vocabulary is split over a "
                "group, say so with shard=VocabShard.equal(columns, vocab_size, group)."
            )
        return VocabShard(0, columns, vocab_size)
    if vocab_size is not None and vocab_size != shard.vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}, but the shard's is {shard.vocab_size}: give it once.")
    if columns != shard.columns:
        raise ValueError(
            f"logits has {columns} columns here, but the shard goes from id {shard.start} to {shard.stop} "
            f"({shard.columns} columns, padding included)."
        )
    return shard


def _check_arguments(logits: Tensor, ids: Tensor, temperature: float | Tensor) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids has dtype {ids.dtype}, expected integers (global token ids).")
    if ids.dim() != logits.dim() or ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"ids has shape {list(ids.shape)}, expected {list(logits.shape[:-1])} + [K] for logits of shape "
            f"{list(logits.shape)}: K ids for each token."
        )
    if ids.device != logits.device:
        raise ValueError(f"ids is on {ids.device}, but logits is on {logits.device}.")
    if isinstance(temperature, Tensor):
        if temperature.shape != logits.shape[:-1]:
            raise ValueError(
                f"temperature has shape {list(temperature.shape)}, expected a number or {list(logits.shape[:-1])} "
                "(one per token)."
            )
    elif not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature!r}, expected a number above 0.")


@torch.no_grad()
def score_ids(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    shard: VocabShard | None = None,
    vocab_size: int | None = None,
    check: bool | None = None,
) -> Scores:
    """log pi at K ids a token and logsumexp, over the whole vocabulary, on every rank; without gradient.

    Exactly two collectives (none without `shard` or on one rank): see `merge`. Every rank of the group must make the
    same call, with its own columns of the same tokens.

    Parameters
    ----------
    logits : ``[..., V_local]``, any float dtype; not changed. Arithmetic is float32 (float64 for float64).
    ids : global ids, ``[..., K]`` integers in [0, V), the same on every rank; any K, repetitions allowed (mu's top K
        and the sampled token, say).
    temperature : T > 0, a number or one per token ``[...]`` (whose values are not checked).
    shard : which columns these are. None: all of them are here, whatever process groups exist.
    vocab_size : without `shard`: V, where further columns are padding. With `shard` it is the shard's.
    check : whether ids outside [0, V) raise. That needs to look at the values, which synchronises an accelerator; so
        by default it is done where the ids lie on the CPU, and elsewhere such ids get NaN. True also compares shards
        and ids over the group (`VocabShard.verify`: a third collective), for a first call.

    Returns
    -------
    `Scores`: logp ``[..., K]`` and logsumexp ``[...]``.

    Raises
    ------
    ValueError : shapes, dtypes or devices do not fit; the shard is not these columns; the temperature is not positive;
        an id is out of range (see `check`); ranks disagree (``check=True``).
    """
    here = _columns(logits, shard, vocab_size)
    _check_arguments(logits, ids, temperature)
    if check and shard is not None:
        shard.verify(ids)
    inside = (ids >= 0) & (ids < here.vocab_size)
    if check or (check is None and ids.device.type == "cpu"):
        outside = ids[~inside]
        if outside.numel():
            raise ValueError(
                f"{outside.numel()} of {ids.numel()} ids are outside [0, {here.vocab_size}), such as "
                f"{outside[0].item()}. Give unused places any id of the vocabulary (0) and leave them out afterwards."
            )
    if isinstance(temperature, Tensor):
        temperature = temperature.to(_arithmetic(logits.dtype))
    part = local_part(logits, ids, here, temperature)
    flat = temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature
    merged = merge(part, shard, flat)
    logp = torch.where(inside, merged.logp.reshape(ids.shape), math.nan)
    return Scores(logp, merged.logsumexp.reshape(logits.shape[:-1]))


@torch.no_grad()
def top_ids(logits: Tensor, k: int, *, shard: VocabShard | None = None, vocab_size: int | None = None) -> Tensor:
    """Ids of the K likeliest tokens of the whole vocabulary, likeliest first: int64 ``[..., K]``, the same on every
    rank.

    Each rank's own top K are the candidates: two all-gathers of ``[N, K]`` (values, ids). The temperature does not
    matter. Which of several equal logits is taken is not specified. Their log-probabilities: `score_ids`.

    Raises
    ------
    ValueError : k is not in [1, V], or the shard is not these columns.
    """
    here = _columns(logits, shard, vocab_size)
    if not 1 <= k <= here.vocab_size:
        raise ValueError(f"k is {k}, expected 1 to {here.vocab_size} (the vocabulary).")
    dtype, lead, few = _arithmetic(logits.dtype), logits.shape[:-1], min(k, here.valid)
    # Places that a small part cannot fill are worse than any token, even one whose logit is -inf.
    values = logits.new_full((*lead, k), -math.inf, dtype=dtype)
    ids = logits.new_zeros((*lead, k), dtype=torch.int64)
    if few:
        best = logits[..., : here.valid].topk(few, dim=-1)
        values[..., :few] = best.values.to(dtype).clamp(min=torch.finfo(dtype).min)
        ids[..., :few] = best.indices + here.start
    return merge_top(values, ids, shard)[1]
