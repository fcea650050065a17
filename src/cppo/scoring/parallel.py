"""Log-probabilities at given ids from logits whose vocabulary is split over a tensor-parallel group.

    log pi(v) = (z_v - M)/T - log sum_u exp((z_u - M)/T),   M = max_u z_u,   z = logits, T = temperature

* Each rank reduces its own columns to three things a token: its maximum, its sum of exponentials, and its logits at the
  wanted ids (`local_part`). `merge` joins them over the group by one all-reduce MAX (of the maxima) and one all-reduce
  SUM (of the rescaled sums and the shifted logits, packed in one tensor). Nobody ever holds the whole vocabulary.
* Shifting by M before dividing keeps the error relative to the result: logits of 1e4 cost no digit of log pi.
* Both halves are public, so that a scorer that never materialises logits (hidden states times tiles of the lm_head) can
  bring a `LocalPart` of its own and share the merge; it may bring a sum for the entropy, which travels in the same
  all-reduce (`cppo.scoring.score_tokens` does both).
* Without gradient: these numbers decide (divergences, masks), they are never differentiated.

Memory beyond inputs and outputs: one float32 tile of at most max(`CHUNK_ELEMENTS`, V_local) elements, and about 30
bytes for each id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Elements of the temporary float32 tile [tokens, V_local]: 2^24 are 64 MiB.
CHUNK_ELEMENTS = 2**24


def _rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """This process's place in `group`; (0, 1) where no process group was ever initialised."""
    if group is None and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    rank = torch.distributed.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not a member of the group of its VocabShard: pass its own group.")
    return rank, torch.distributed.get_world_size(group)


@dataclass(frozen=True)
class VocabShard:
    """Which columns of the vocabulary this process holds: ids start, start + 1, ..., stop - 1.

    Parameters
    ----------
    start, stop : global ids of the local columns. `stop` may lie beyond `vocab_size`: such columns are padding.
    vocab_size : V, the true size. Columns at and beyond it belong to no token, whatever they hold, and are left out of
        every sum. (Where sampler and trainer must agree, this is the number of ids that the sampler may draw.)
    group : process group over which the vocabulary is split. None: the default group, or one rank alone where none was
        initialised.
    """

    start: int
    stop: int
    vocab_size: int
    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}, expected at least 1.")
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"a vocabulary shard from {self.start} to {self.stop}: expected 0 <= start <= stop.")

    @classmethod
    def equal(cls, columns: int, vocab_size: int | None = None, group: ProcessGroup | None = None) -> VocabShard:
        """Megatron's layout: rank r holds ids [r * columns, (r + 1) * columns), the last ones padded beyond V.

        Parameters
        ----------
        columns : V_local, the same on every rank. vocab_size : V; None: no padding, V = ranks * columns.

        Raises
        ------
        ValueError : all ranks together hold fewer columns than `vocab_size`.
        """
        rank, size = _rank_and_size(group)
        vocab_size = size * columns if vocab_size is None else vocab_size
        if size * columns < vocab_size:
            raise ValueError(
                f"{size} rank(s) with {columns} columns each hold {size * columns} ids, but vocab_size is "
                f"{vocab_size}: pass the tensor-parallel group that the head is split over, and its local columns."
            )
        return cls(rank * columns, (rank + 1) * columns, vocab_size, group)

    @classmethod
    def chunked(cls, vocab_size: int, group: ProcessGroup | None = None) -> VocabShard:
        """The layout of `torch.chunk` and of DTensor's Shard: parts of ceil(V / ranks), the last ones shorter or
        empty.
        """
        rank, size = _rank_and_size(group)
        each = -(-vocab_size // size)
        return cls(min(rank * each, vocab_size), min((rank + 1) * each, vocab_size), vocab_size, group)

    @property
    def columns(self) -> int:
        """V_local, padding included."""
        return self.stop - self.start

    @property
    def valid(self) -> int:
        """How many of the local columns are ids of the vocabulary (they come first)."""
        return max(min(self.stop, self.vocab_size) - self.start, 0)

    def verify(self, ids: Tensor) -> VocabShard:
        """Compare notes with the group (one all-gather of six numbers; synchronises the device).

        Parameters
        ----------
        ids : ``[..., K]``, what this rank would pass to `score_ids`.

        Raises
        ------
        ValueError : the parts do not hold every id exactly once, vocabulary sizes differ, or the ranks do not ask for
            the same ids of equally many tokens. Every rank raises.
        """
        size = _rank_and_size(self.group)[1]
        # int64 arithmetic wraps around: a checksum that depends on the order, not a proof.
        order = torch.arange(1, ids.numel() + 1, device=ids.device)
        checksum = int((ids.reshape(-1).long() * order).sum())
        mine = [self.start, self.stop, self.vocab_size, math.prod(ids.shape[:-1]), ids.shape[-1], checksum]
        every = [mine]
        if size > 1:
            note = torch.tensor(mine, device=ids.device)
            notes = [torch.empty_like(note) for _ in range(size)]
            torch.distributed.all_gather(notes, note, group=self.group)
            every = [n.tolist() for n in notes]
        sizes = sorted({n[2] for n in every})
        if len(sizes) > 1:
            raise ValueError(f"the ranks of the group give different vocab_size: {sizes}.")
        parts = sorted((start, min(stop, sizes[0])) for start, stop, *_ in every if start < min(stop, sizes[0]))
        reached = 0
        for start, stop in parts:
            if start != reached:
                what = f"ids {reached} to {start - 1} are missing" if start > reached else f"id {start} is held twice"
                raise ValueError(f"the group's parts of the vocabulary are {parts}: {what} (vocab_size {sizes[0]}).")
            reached = stop
        if reached != sizes[0]:
            raise ValueError(
                f"the group's parts of the vocabulary are {parts}: they end at {reached}, but vocab_size is {sizes[0]}."
            )
        if any(n[3:] != mine[3:] for n in every):
            raise ValueError(
                "the ranks of the group ask for different ids (tokens, ids a token, checksum: "
                f"{[tuple(n[3:]) for n in every]}): every rank must pass the same tokens in the same order."
            )
        return self


class Scores(NamedTuple):
    """What `score_ids` returns; float32 (float64 for float64 logits), the same on every rank to the last bit.

    logp : log pi at the ids, ``[..., K]``. logsumexp : log sum_v exp(z_v / T), ``[...]``. entropy : -sum_v pi log pi,
    nats, ``[...]``; None where the parts have no sum for it.
    """

    logp: Tensor
    logsumexp: Tensor
    entropy: Tensor | None = None


class LocalPart(NamedTuple):
    """One rank's columns of N tokens, reduced. Logits are raw: not yet divided by the temperature.

    maximum : largest logit, ``[N]``; -inf where there is none. total : sum of exp((z - maximum)/T), ``[N]``; 0 where
    the maximum is -inf. logits : at the ids that lie here, ``[N, K]``, anything elsewhere. held : which ids lie here,
    bool ``[N, K]``. weighted : sum of exp((z - maximum)/T) (z - maximum)/T, ``[N]``, for the entropy. top_logits,
    top_ids : the largest logits here and their global ids ``[N, k]``, largest first; -inf where there are fewer.
    """

    maximum: Tensor
    total: Tensor
    logits: Tensor
    held: Tensor
    weighted: Tensor | None = None
    top_logits: Tensor | None = None
    top_ids: Tensor | None = None


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


@torch.no_grad()
def merge(part: LocalPart, shard: VocabShard | None = None, temperature: float | Tensor = 1.0) -> Scores:
    """Join the parts of all ranks: one all-reduce MAX of ``[N]`` and one all-reduce SUM of ``[N, K + 1]``.

    Every rank of the group calls this with the same tokens. Every id of a row without any finite logit, or with NaN or
    +inf in it, gets NaN, as in `log_softmax`. Ids that lie on no rank are not noticed here (`score_ids` does).

    Parameters
    ----------
    part : `LocalPart` of N tokens. shard : whose group to merge over; None: this part is the whole vocabulary.
    temperature : a number, or ``[N]``; the one that the part was made with.
    """
    size = 1 if shard is None else _rank_and_size(shard.group)[1]
    group = None if shard is None else shard.group
    exchange = size > 1 and part.maximum.numel() > 0
    highest = part.maximum.clone()
    if exchange:
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=group)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(highest.dtype)
    t = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    # Where an id is not held the summand is 0, so the sum over ranks is the one holder's value, unrounded.
    shifted = torch.where(part.held, (part.logits - highest[:, None]) / t, 0.0)
    # A part without any token (or fully masked) counts 0, whatever its maximum of -inf does in the difference.
    fall = torch.where(part.total > 0, (part.maximum - highest) / temperature, 0.0)
    summands = [(part.total * fall.exp())[:, None], shifted]
    if part.weighted is not None:
        summands.insert(1, (fall.exp() * (part.weighted + fall * part.total))[:, None])
    packed = torch.cat(summands, 1)
    if exchange:
        torch.distributed.all_reduce(packed, torch.distributed.ReduceOp.SUM, group=group)
    log_total = packed[:, :1].log()
    entropy = None if part.weighted is None else log_total[:, 0] - packed[:, 1] / packed[:, 0]
    first = len(summands) - 1
    return Scores(packed[:, first:] - log_total, highest / temperature + log_total[:, 0], entropy)


@torch.no_grad()
def merge_top(values: Tensor, ids: Tensor, shard: VocabShard | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of all ranks from each rank's own k largest: two all-gathers of ``[N, k]``, or none on one rank.

    Parameters
    ----------
    values : ``[..., k]``, places that a small part cannot fill at -inf. ids : global, int64 ``[..., k]``.
    """
    size = 1 if shard is None else _rank_and_size(shard.group)[1]
    if shard is None or size == 1 or not values.numel():
        return values, ids
    gathered = []
    for mine in (values.contiguous(), ids.contiguous()):
        pieces = [torch.empty_like(mine) for _ in range(size)]
        torch.distributed.all_gather(pieces, mine, group=shard.group)
        gathered.append(torch.cat(pieces, -1))
    best = gathered[0].topk(values.shape[-1], dim=-1)
    return best.values, gathered[1].gather(-1, best.indices)


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
                "(one a token)."
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
    temperature : T > 0, a number or one a token ``[...]`` (whose values are not checked).
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
