"""Compact stores of mu's top-K: 5 bytes per entry, a float16 log-probability and a 3-byte id.

* Dense: `pack_topk` and `unpack_topk`, uint8 ``[..., 5K]``, a plain tensor that an engine may shuffle, split and
  concatenate with its own; 100 bytes per token at K = 20.
* Ragged by mass: `RaggedTopK` keeps a token's fewest likeliest entries that cover 1 - epsilon of mu, at most K, and
  costs one byte per token and 5 bytes per kept entry.

An **unused slot** has log-probability -inf and comes back with id 0. Since id 0 is a token like any other, pi's
log-probability there must be set to -inf as well before a divergence is taken, and "inside" is not `ids == token`::

    ids, logp = unpack_topk(packed)
    policy = policy_logp_at(ids).masked_fill(logp == -torch.inf, -torch.inf)
    divergence.topk_tv(policy, logp, policy_logp, rollout_logp, contains(ids, logp, tokens))

**Errors of the total variation.** With l = log mu(k) in float32, l' what comes back, m = e^l, m' = e^l' and p = pi(k):

* Rounding: |l' - l| <= d = 2^-11 |l| + 2^-25 with either of l, l' in d, so |m' - m| <= e_k = m (e^d - 1); below
  -65504 there is not mass before or after. TV_K changes by at most e_k / 2 in class k, and "other" takes up the sum of
  these changes: by at most sum_k e_k, about 2^-11 sum_k m |l| (`topk_error_bound`). So does its upper end, half of
  (sum_k |p - m| + both rests). The sampled token's own class, where it is outside, is stored elsewhere: no error.
* Cutting: fewer classes are a coarser partition. With A (A') the sum of the positive parts of m - p (p - m) over the
  classes merged into "other" and over "other" itself, TV_K falls by min(A, A') <= min(rest of mu, rest of pi) <=
  epsilon, and its upper end rises by sum min(p, m) over the cut ids <= epsilon. No further allowance is needed: the
  interval [TV_K - sum e_k, TV_K_upper + sum e_k] over the kept entries holds the exact TV.
* KL(mu || pi) has no such bound: where nearly all mass is stored, the sum of the changes falls on an "other" of nearly
  none, whose log(m/p) is large. Of two equal policies of two tokens `topk_kl` makes up to 3e-3 nats (mean 4e-4).

Packing is vectorised and, dense, never synchronises an accelerator (see `check`); ragged sizes depend on the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Bytes of an entry: float16 log-probability, then the id, both little-endian.
ENTRY_BYTES = 5
#: Ids must be below this.
ID_LIMIT = 2**24
#: Finite log-probabilities below are raised to this, the lowest finite float16: -inf would make the slot unused.
LOWEST = -65504.0
#: What a log-softmax may exceed 0 by through rounding (as in `TokenBatch.check`); stored as 0.
ROUNDING = 1e-3


# -- entries -----------------------------------------------------------------------------------------------------------


def _require_values(ids: Tensor, logp: Tensor) -> None:
    """Look at the values of used slots (this synchronises an accelerator)."""
    used = logp != -torch.inf
    outside = ids[used & ((ids < 0) | (ids >= ID_LIMIT))]
    if outside.numel():
        raise ValueError(
            f"{outside.numel()} of {ids.numel()} ids are outside [0, 2^24), such as {outside[0].item()}: ids are "
            "stored in 3 bytes. Mark unused slots by a log-probability of -inf; their ids may be anything."
        )
    nan, positive = int(logp.isnan().sum()), int((logp > ROUNDING).sum())
    if nan or positive:
        raise ValueError(
            f"of {logp.numel()} log-probabilities {nan} are NaN and {positive} are above 0: expected log mu <= 0 at "
            "mu's top-K ids, and -inf in unused slots (not NaN, not probabilities, not logits)."
        )


def _clean(ids: Tensor, logp: Tensor, check: bool | None) -> tuple[Tensor, Tensor]:
    """Arguments of a `pack` as int64 and float32, id 0 in unused slots, nothing above 0 or finite below `LOWEST`."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids has dtype {ids.dtype}, expected integers (token ids).")
    if not logp.is_floating_point():
        raise ValueError(f"logp has dtype {logp.dtype}, expected floating point log-probabilities.")
    if ids.shape != logp.shape or ids.dim() < 1 or ids.shape[-1] < 1:
        raise ValueError(
            f"ids has shape {list(ids.shape)} and logp {list(logp.shape)}, expected the same shape [..., K] with K of "
            "at least 1."
        )
    if ids.device != logp.device:
        raise ValueError(f"ids is on {ids.device}, but logp is on {logp.device}.")
    ids, logp = ids.long(), logp.detach().float()
    if check or (check is None and ids.device.type == "cpu"):
        _require_values(ids, logp)
    unused = logp == -torch.inf
    return ids.masked_fill(unused, 0), logp.clamp(LOWEST, 0.0).masked_fill_(unused, -torch.inf)


def _encode(ids: Tensor, logp: Tensor) -> Tensor:
    """Clean ids and logp ``[...]`` -> uint8 ``[..., 5]``."""
    entries = torch.empty(*ids.shape, ENTRY_BYTES, dtype=torch.uint8, device=ids.device)
    # Shifts, not views as bytes: the same on big-endian machines, whatever the strides.
    bits, ids = logp.half().view(torch.int16).int(), ids.int()
    for byte, (value, shift) in enumerate(((bits, 0), (bits, 8), (ids, 0), (ids, 8), (ids, 16))):
        entries[..., byte] = (value >> shift) & 0xFF
    return entries


def _decode(entries: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 ``[..., 5]`` -> ids int64 ``[...]`` and logp float32 ``[...]``."""
    low, high, *rest = (entries[..., byte].int() for byte in range(ENTRY_BYTES))
    bits = (low | high << 8).to(torch.int16)  # modulo 2^16: the same bits
    ids = rest[0] | rest[1] << 8 | rest[2] << 16
    return ids.long(), bits.view(torch.float16).float()


def _require_packed(packed: Tensor) -> int:
    """K of a dense store."""
    width = packed.shape[-1] if packed.dim() else 0
    if packed.dtype != torch.uint8 or width < ENTRY_BYTES or width % ENTRY_BYTES:
        raise ValueError(
            f"a packed top-K of dtype {packed.dtype} and shape {list(packed.shape)}: expected uint8 [..., 5K], as "
            "pack_topk returns it."
        )
    return width // ENTRY_BYTES


# -- dense -------------------------------------------------------------------------------------------------------------


def pack_topk(ids: Tensor, logp: Tensor, *, check: bool | None = None) -> Tensor:
    """mu's top-K in 5 bytes an entry, in the order given.

    Parameters
    ----------
    ids : ``[..., K]`` integers in [0, 2^24); anything in unused slots.
    logp : log mu at the ids, ``[..., K]``, any float dtype; -inf marks an unused slot. Taken as float32, then rounded
        to float16 (error: see `topk_error_bound`). A finite one below -65504 becomes -65504, so that its slot stays
        used; one above 0 by rounding (at most 1e-3) becomes 0.
    check : whether to look at the values, which synchronises an accelerator; by default done for tensors on the CPU.
        Unchecked, an id is taken modulo 2^24, NaN stays NaN, and any positive log-probability becomes 0.

    Returns
    -------
    uint8 ``[..., 5K]``.

    Raises
    ------
    ValueError : shapes, dtypes or devices do not fit; an id is out of range, a log-probability is NaN or positive
        (see `check`).
    """
    return _encode(*_clean(ids, logp, check)).flatten(-2)


def unpack_topk(packed: Tensor) -> tuple[Tensor, Tensor]:
    """What `pack_topk` packed.

    Returns
    -------
    ids : int64 ``[..., K]``, 0 in unused slots. logp : float32 ``[..., K]``, -inf in unused slots, where pi's must be
        set to -inf, too (see the module).

    Raises
    ------
    ValueError : not uint8 ``[..., 5K]``.
    """
    return _decode(packed.unflatten(-1, (_require_packed(packed), ENTRY_BYTES)))


def contains(ids: Tensor, logp: Tensor, tokens: Tensor) -> Tensor:
    """Whether a token is in a used slot: the `inside` of `cppo.divergence.topk_tv`.

    Parameters
    ----------
    ids, logp : ``[..., K]``, as unpacked. tokens : integers ``[...]``, the sampled tokens.

    Returns
    -------
    bool ``[...]``.

    Raises
    ------
    ValueError : shapes do not fit.
    """
    if ids.shape != logp.shape or ids.shape[:-1] != tokens.shape or ids.dim() < 1:
        raise ValueError(
            f"ids has shape {list(ids.shape)}, logp {list(logp.shape)} and tokens {list(tokens.shape)}, expected "
            "[..., K], [..., K] and [...]."
        )
    return ((ids == tokens[..., None]) & (logp != -torch.inf)).any(-1)


def topk_error_bound(logp: Tensor) -> Tensor:
    """How far the store's rounding moves `topk_tv` and `topk_tv_upper` at most, a token: sum_k m_k (e^d_k - 1).

    m_k = e^l_k and d_k = 2^-11 |l_k| + 2^-25, over used slots; about 2^-11 times the entropy of the stored entries
    (nats): 5e-4 for one nat. Derivation: see the module. The float32 arithmetic of the divergence itself comes on top,
    with or without a store.

    Parameters
    ----------
    logp : l, ``[..., K]``: as unpacked, or before packing in float32 or float64; the bound holds with either.

    Returns
    -------
    float32 ``[...]`` (float64 for float64), probability units.
    """
    logp = logp.detach() if logp.dtype == torch.float64 else logp.detach().float()
    logp = logp.clamp(min=LOWEST)  # of no mass, like unused slots, and not infinity times 0
    return (logp.exp() * torch.expm1(2.0**-11 * logp.abs() + 2.0**-25)).sum(-1)


# -- ragged ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RaggedTopK:
    """A token's fewest likeliest entries that cover 1 - epsilon of mu, at most K; none where all slots are unused.

    1 byte per token and 5 bytes an entry. Where K entries cover less than 1 - epsilon, all K are kept. For batches that
    hold tensors and lists only: a list of rows by `split(1)`, joined by `cat` after shuffling.

    Attributes
    ----------
    counts : entries of each token, uint8 ``[...]``.
    entries : of all tokens, one after the other, likeliest first, uint8 ``[n, 5]``; n is the sum of `counts`.
    k : K, the width of what `unpack` returns.
    """

    counts: Tensor
    entries: Tensor
    k: int

    def __post_init__(self) -> None:
        if self.counts.dtype != torch.uint8 or self.entries.dtype != torch.uint8:
            raise ValueError(f"counts is {self.counts.dtype} and entries {self.entries.dtype}, expected uint8.")
        if self.entries.dim() != 2 or self.entries.shape[1] != ENTRY_BYTES:
            raise ValueError(f"entries has shape {list(self.entries.shape)}, expected [n, {ENTRY_BYTES}].")
        if not 1 <= self.k <= 255:
            raise ValueError(f"k is {self.k}, expected 1 to 255 (a token's number of entries is stored in one byte).")

    @classmethod
    def pack(
        cls, ids: Tensor, logp: Tensor, *, epsilon: float = 1e-3, k: int | None = None, check: bool | None = None
    ) -> RaggedTopK:
        """Keep entry j where the likelier ones hold less than 1 - epsilon of mu. Synchronises an accelerator.

        Parameters
        ----------
        ids, logp, check : as for `pack_topk`, in any order; sorted here, likeliest first.
        epsilon : mass of mu that may be cut, in [0, 1), as measured in float32; 0 cuts nothing.
        k : most entries per token, 1 to 255; None: all that are given.

        Raises
        ------
        ValueError : as `pack_topk`; epsilon or k is out of range.
        """
        if not 0 <= epsilon < 1:
            raise ValueError(f"epsilon is {epsilon!r}, expected in [0, 1) (the mass of mu that may be cut).")
        ids, logp = _clean(ids, logp, check)
        k = ids.shape[-1] if k is None else k
        logp, order = logp.sort(dim=-1, descending=True, stable=True)
        ids, logp = ids.gather(-1, order)[..., :k], logp[..., :k]
        keep = logp != -torch.inf
        if epsilon > 0:
            mass = logp.exp()
            keep &= mass.cumsum(-1) - mass < 1 - epsilon
        return cls(keep.sum(-1, dtype=torch.uint8), _encode(ids[keep], logp[keep]), k)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """ids int64 ``[..., K]`` and logp float32 ``[..., K]``, likeliest first; 0 and -inf in unused slots."""
        ids, logp = _decode(self.entries)
        used = torch.arange(self.k, device=self.counts.device) < self.counts[..., None]
        return (
            ids.new_zeros(used.shape).masked_scatter_(used, ids),
            logp.new_full(used.shape, -torch.inf).masked_scatter_(used, logp),
        )

    @property
    def shape(self) -> torch.Size:
        """The tokens."""
        return self.counts.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the store."""
        return self.counts.numel() + self.entries.numel()

    @property
    def bytes_per_token(self) -> float:
        """1 + 5 times the mean number of entries (0 without any token)."""
        return self.nbytes / max(self.counts.numel(), 1)

    def split(self, rows: int | Sequence[int]) -> list[RaggedTopK]:
        """Parts along the first dimension, of `rows` each or of the sizes given, as `torch.split`."""
        counts = self.counts.split(_sizes(rows))
        sizes = torch.stack([part.sum() for part in counts]).tolist()
        return [RaggedTopK(c, e, self.k) for c, e in zip(counts, self.entries.split(sizes), strict=True)]

    @classmethod
    def cat(cls, stores: Sequence[RaggedTopK]) -> RaggedTopK:
        """Join along the first dimension.

        Raises
        ------
        ValueError : none given, or K or further dimensions differ.
        """
        _require_alike(stores)
        counts, entries = [store.counts for store in stores], [store.entries for store in stores]
        return cls(torch.cat(counts), torch.cat(entries), stores[0].k)


def _sizes(rows: int | Sequence[int]) -> int | list[int]:
    return rows if isinstance(rows, int) else list(rows)


def _require_alike(stores: Sequence[RaggedTopK]) -> None:
    alike = {(store.k, *store.shape[1:]) for store in stores}
    if len(alike) != 1 or any(not store.shape for store in stores):
        raise ValueError(
            f"{len(stores)} top-K stores of (shape, K) {[(list(s.shape), s.k) for s in stores][:4]} ...: to join them "
            "along the first dimension, K and the further dimensions must be the same."
        )
