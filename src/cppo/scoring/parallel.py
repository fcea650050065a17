"""A vocabulary that is split over a tensor-parallel group: which part is here, and how the parts are joined.

    log pi(v) = (z_v - M)/T - log sum_u exp((z_u - M)/T),   M = max_u z_u,   z = logits, T = temperature

* Each rank reduces its own columns to a `LocalPart`, three things per token: its maximum, its sum of exponentials, and
  its logits at the wanted ids. `merge` joins them over the group by one all-reduce MAX (of the maxima) and one
  all-reduce SUM (of the rescaled sums and the shifted logits, packed in one tensor). Nobody ever holds the whole
  vocabulary.
* Shifting by M before dividing keeps the error relative to the result: logits of 1e4 cost no digit of log pi.
* Two scorers share the merge: `cppo.scoring.ids` reduces logits that an engine has, `cppo.scoring.score_tokens` makes
  its logits tile by tile from hidden states, and brings a sum for the entropy, which travels in the same all-reduce.
* Without gradient: these numbers decide (divergences, masks), they are never differentiated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
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
        rank, size = rank_and_size(group)
        vocab_size = size * columns if vocab_size is None else vocab_size
        if size * columns < vocab_size:
            raise ValueError(
                f"{size} rank(s) with {columns} columns each hold {size * columns} ids, but vocab_size is "
                f"{vocab_size}: pass the tensor-parallel group that the head is split over, and its local columns."
            )
        return cls(rank * columns, (rank + 1) * columns, vocab_size, group)

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
        size = rank_and_size(self.group)[1]
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
    size = 1 if shard is None else rank_and_size(shard.group)[1]
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
    size = 1 if shard is None else rank_and_size(shard.group)[1]
    if shard is None or size == 1 or not values.numel():
        return values, ids
    gathered = []
    for mine in (values.contiguous(), ids.contiguous()):
        pieces = [torch.empty_like(mine) for _ in range(size)]
        torch.distributed.all_gather(pieces, mine, group=shard.group)
        gathered.append(torch.cat(pieces, -1))
    best = gathered[0].topk(values.shape[-1], dim=-1)
    return best.values, gathered[1].gather(-1, best.indices)
