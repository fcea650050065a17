"""What a divergence needs to know of the rollout policy mu, taken from TRL's own pass over the old log-probabilities.

It goes into TRL's rollout batch, one row per response, which TRL shuffles and splits along with its own tensors.

| divergence    | kept for every token, in bytes                              | and once a rollout batch       |
|---------------|-------------------------------------------------------------|--------------------------------|
| `topk_*`      | mu's K likeliest ids and log-probabilities: 8 K, 5 K, fewer |                                |
| `exact_*`     | mu's last hidden state and logsumexp: 2 d + 4 or 4 d + 4    | mu's lm_head, if it is trained |
| `adaptive_tv` | both                                                        | mu's lm_head, if it is trained |

d is the hidden size, 2 or 4 its bytes in the precision of the head; rows are padded to the longest response. Each costs
one product with the vocabulary, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cppo.engines.trl.head import Head, states_before
from cppo.errors import UserError
from cppo.scoring.store import RaggedTopK, pack_topk, unpack_topk

if TYPE_CHECKING:
    from cppo.engines.trl.sampler import Sampled

#: Keys of a rollout batch. Top K: int32 ids and float32 log-probabilities ``[B, T, K]``, or one entry that holds both:
#: uint8 ``[B, T, 5 K]`` (compact), a list with a `RaggedTopK` for each response (ragged).
IDS, LOGP, PACKED = "trust_topk_ids", "trust_topk_logp", "trust_topk"
#: ``[B, T, d]``, and float32 ``[B, T]``.
HIDDEN, LOGSUMEXP = "trust_hidden", "trust_logsumexp"


class Wanted(NamedTuple):
    """top_k : K; 0: none. store : how they are kept (`STORES`). states : whether hidden states and lm_head are kept."""

    top_k: int
    store: str
    states: bool


def pack(store: str, ids: Tensor, logp: Tensor) -> dict[str, Any]:
    """Entries of a rollout batch for mu's top K, ``[b, T, K]``; log-probabilities are -inf where there is no token."""
    if store == "float32":
        return {IDS: ids.to(torch.int32), LOGP: logp}
    if store == "compact":
        return {PACKED: pack_topk(ids, logp, check=False)}
    return {PACKED: RaggedTopK.pack(ids, logp, check=False).split(1)}


def unpack(inputs: dict[str, Any], index: Tensor) -> tuple[Tensor, Tensor]:
    """mu's top K at flat positions of a minibatch: int64 ids and float32 log-probabilities ``[n, K]``."""
    if IDS in inputs:
        return inputs[IDS].flatten(0, 1)[index].long(), inputs[LOGP].flatten(0, 1)[index]
    packed = inputs[PACKED]
    if isinstance(packed, Tensor):
        return unpack_topk(packed.flatten(0, 1)[index])
    ids, logp = RaggedTopK.cat(packed).unpack()
    return ids.flatten(0, 1)[index], logp.flatten(0, 1)[index]


def spread(values: Tensor, index: Tensor, shape: torch.Size, fill: float = 0.0) -> Tensor:
    """``[n, ...]`` at flat positions of ``[B, T]`` -> ``[B, T, ...]``, `fill` elsewhere."""
    out = values.new_full((shape.numel(), *values.shape[1:]), fill)
    out[index] = values
    return out.unflatten(0, shape)


def narrower(states: torch.dtype, head: torch.dtype) -> torch.dtype:
    """In which hidden states are kept: the head rounds them to its own dtype, so what is wider need not be kept."""
    return min(states, head, key=lambda kind: kind.itemsize)


@dataclass
class Recorded:
    """What a sampler has recorded of mu: entries of the rollout batch. head : none is kept."""

    kept: dict[str, Any]
    head: Head | None = None

    @classmethod
    def of(cls, sampled: Sampled, wanted: Wanted, head: Head | None, length: int) -> Recorded:
        """head : mu's lm_head with memory of its own, where it is trained. length : columns of TRL's batch."""
        kept: dict[str, Any] = {}
        if wanted.top_k:
            kept |= pack(wanted.store, *sampled.padded_top(length))
        if wanted.states:
            hidden, kept[LOGSUMEXP] = sampled.padded_states(length)
            kept[HIDDEN] = hidden.to(narrower(hidden.dtype, sampled.dtype))
        return cls(kept, head)

    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return _nbytes(self.kept)


def _nbytes(kept: dict[str, Any]) -> int:
    entries = [entry for value in kept.values() for entry in (value if isinstance(value, list) else [value])]
    return sum(entry.nbytes for entry in entries)


def heads(model: Any, states: bool, temperature: float, dtype: torch.dtype) -> tuple[Head, Head | None]:
    """mu's lm_head, and the same where it must be kept until the last update: with hidden states, if it is trained."""
    trained = states and model.get_output_embeddings().weight.requires_grad
    head = Head.of(model, temperature, dtype, copy=trained)
    return head, head if trained else None


def require_close(gap: float, dtype: torch.dtype) -> None:
    """Refuse a head that gives other log-probabilities than the model itself. dtype : of the head.

    Raises
    ------
    UserError : they differ by more than rounding.
    """
    allowed = 1e-3 if dtype == torch.float32 else 0.25
    if not gap <= allowed:
        raise UserError(
            f"log-probabilities from the captured hidden states differ from the model's own by up to {gap:.3g} "
            f"(allowed: {allowed}): this model's head or this TRL does more than scale and cap h W + b. Set "
            "divergence='binary_tv' in the rule."
        )


class RolloutPass:
    """Scores mu while TRL computes the old log-probabilities, one chunk of responses after the other.

    Parameters
    ----------
    temperature : of TRL's head. fp32 : whether that runs in float32 in any case (`cast_lm_head_to_fp32`).
    tokens, mask : ``[B, T]``, of all responses.

    Attributes
    ----------
    kept : entries of the rollout batch, as far as the chunks have come.
    head : mu's lm_head with memory of its own; None where the policy's will do: it is not trained, or not wanted.
    sampled_logp : float32 ``[B, T]``, log mu of the sampled token, to compare with TRL's.
    """

    def __init__(self, model: Any, wanted: Wanted, temperature: float, fp32: bool, tokens: Tensor, mask: Tensor):
        self.model, self.wanted, self.temperature, self.fp32 = model, wanted, temperature, fp32
        self.tokens, self.mask = tokens, mask.bool()
        self.rows = 0
        self.kept: dict[str, Any] = {}
        self.head: Head | None = None
        self._scorer: Head | None = None
        self.sampled_logp = torch.zeros(tokens.shape, device=tokens.device)

    @torch.no_grad()
    def receive(self, hidden: Tensor, dtype: torch.dtype) -> None:
        """Score one chunk: last hidden states ``[b, P + T, d]`` of the next b responses."""
        top_k, store, states = self.wanted
        if self._scorer is None:
            self._scorer, self.head = heads(self.model, states, self.temperature, torch.float32 if self.fp32 else dtype)
        head, length = self._scorer, self.tokens.shape[1]
        chunk = slice(self.rows, self.rows + hidden.shape[0])
        self.rows = chunk.stop
        tokens = self.tokens[chunk]
        index = self.mask[chunk].flatten().nonzero()[:, 0]
        scores = head.score(states_before(hidden, length, index), tokens.flatten()[index], top_k=top_k)
        self.sampled_logp[chunk] = spread(scores.logp.float(), index, tokens.shape)
        if top_k:
            assert scores.top_ids is not None and scores.top_logp is not None
            ids = spread(scores.top_ids, index, tokens.shape)
            logp = spread(scores.top_logp.float(), index, tokens.shape, -torch.inf)
            for key, part in pack(store, ids, logp).items():
                self._keep(chunk, key, part)
        if states:
            self._keep(chunk, LOGSUMEXP, spread(scores.logsumexp.float(), index, tokens.shape))
            self._keep(chunk, HIDDEN, hidden[:, -length - 1 : -1].to(narrower(hidden.dtype, head.dtype)))

    def _keep(self, chunk: slice, key: str, part: Any) -> None:
        if isinstance(part, list):
            self.kept.setdefault(key, []).extend(part)
            return
        if key not in self.kept:
            shape = (self.tokens.shape[0], *part.shape[1:])
            self.kept[key] = torch.zeros(shape, dtype=part.dtype, device=self.tokens.device)
        self.kept[key][chunk] = part

    def nbytes(self) -> int:
        """Bytes of what is kept, without the lm_head."""
        return _nbytes(self.kept)

    def check(self, old_logp: Tensor) -> None:
        """Compare with the log-probabilities that TRL computed from the same hidden states (this synchronises the
        device).

        Raises
        ------
        UserError : they differ by more than rounding: the hidden states are not those that TRL scored, or its head
            does something that `Head` does not.
        """
        if self._scorer is None or self.rows != self.tokens.shape[0]:
            raise UserError(
                f"the backbone's forward was seen for {self.rows} of {self.tokens.shape[0]} responses while TRL "
                "computed the old log-probabilities, so the rollout policy is not known beyond the sampled tokens. Set "
                "divergence='binary_tv' in the rule."
            )
        gap = torch.where(self.mask, self.sampled_logp - old_logp.float(), 0.0).abs().max().item()
        require_close(gap, self._scorer.dtype)
