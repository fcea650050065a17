"""`TokenBatch`: what a rule may know about the tokens of a batch, in whatever layout the engine has them.

* Padded ``[B, T]`` (one response a row), packed ``[N]`` with ``cu_seqlens``, or a context-parallel slice of padded
  rows.
* The constructor checks what costs no device synchronisation: shapes, dtypes, devices. `TokenBatch.check` looks at the
  values; engines call it on the first update of a run.
* What the mask leaves out may hold anything, NaN and infinities included, and changes nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cppo.layout import Layout, Packed, Padded
from cppo.layout_sharded import Shard, Sharded

#: The log-ratio is bounded from above here before it is exponentiated: e^20 = 4.9e8 keeps float32 finite (the bound
#: that verl, Stable-RL and UniRL use). There is no lower bound: e^-95 is just a small number.
LOG_RATIO_MAX = 20.0


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Tokens of a batch of responses.

    Parameters
    ----------
    policy_logp : log pi(y_t | s_t), any float dtype, ``[B, T]`` or packed ``[N]``. The only tensor that gets a
        gradient.
    rollout_logp : log mu(y_t | s_t) of the policy that sampled, same shape. Where an engine recomputes
        log-probabilities ("old"), these are not the rollout's: see `docs/rules.md`.
    advantages : A, ``[B]``, ``[B, 1]`` or ``[B, T]``; packed ``[S]`` or ``[N]``.
    mask : which tokens are trained on, bool or 0/1; holes (tool output) allowed.
    cu_seqlens : packed layout: boundaries of the S sequences, int ``[S + 1]``, from 0 to N.
    divergence : D_t between mu and pi at s_t where the caller has it (see `cppo.divergence`), same shape as the
        tokens. A rule takes it at its word.
    shard : context parallelism: which chunks of the rows this process holds.

    Raises
    ------
    ValueError : a shape, dtype or device does not fit; rollout log-probabilities are missing. The message names the
        argument.
    """

    policy_logp: Tensor
    rollout_logp: Tensor
    advantages: Tensor
    mask: Tensor
    cu_seqlens: Tensor | None = None
    divergence: Tensor | None = None
    shard: Shard | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)

    # -- views that rules work with: float32 or better, without gradient, clean outside the mask ---------------------

    @property
    def layout(self) -> Layout:
        """Sums, prefix sums, quantiles ... along the responses of this batch."""
        return layout(self.cu_seqlens, self.shard)

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the rules: float32, or float64 where the policy's log-probabilities have it."""
        return torch.float64 if self.policy_logp.dtype == torch.float64 else torch.float32

    @property
    def loss_mask(self) -> Tensor:
        """The mask as bool."""
        return self.mask if self.mask.dtype == torch.bool else self.mask != 0

    def clean(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """``x`` without gradient, in `dtype`, with ``fill`` outside the mask. By `where`, so that NaN cannot leak."""
        x = x.detach().to(self.dtype)
        return torch.where(self.loss_mask, x, x.new_full((), fill))

    def token_advantages(self) -> Tensor:
        """A_t in a shape that broadcasts against tokens, in `dtype`."""
        advantages = self.advantages.detach().to(self.dtype)
        if self.cu_seqlens is None:
            return advantages[:, None] if advantages.dim() == 1 else advantages
        if advantages.shape[0] == self.policy_logp.shape[0]:
            return advantages
        return advantages[Packed(self.cu_seqlens).segment(self.policy_logp.shape[0])]

    def log_ratio(self) -> Tensor:
        """log rho_t = log pi(y_t) - log mu(y_t), at most `LOG_RATIO_MAX`, 0 outside the mask."""
        # `clean` makes a new tensor, so the arithmetic may run in place: these batches are bound by memory.
        return self.clean(self.policy_logp).sub_(self.clean(self.rollout_logp)).clamp_(max=LOG_RATIO_MAX)

    def with_divergence(self, divergence: Tensor) -> TokenBatch:
        """The same batch with D_t."""
        return replace(self, divergence=divergence)

    def check(self) -> TokenBatch:
        """Look at the values (this synchronises the device) and return the batch.

        Raises
        ------
        ValueError : under the mask a log-probability is NaN, positive or +inf, the rollout's is -inf (it cannot have
            sampled that token), an advantage is not finite, a divergence is negative or NaN; a mask holds other
            values than 0 and 1; boundaries do not start at 0, end at N and never decrease.
        """
        _check_values(self)
        return self


def layout(cu_seqlens: Tensor | None = None, shard: Shard | None = None) -> Layout:
    """The layout of a batch: packed with ``cu_seqlens``, a context-parallel slice with ``shard``, else padded."""
    if cu_seqlens is not None:
        return Packed(cu_seqlens)
    return Padded() if shard is None else Sharded(shard)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_shapes(batch: TokenBatch) -> None:
    """What costs no device synchronisation: shapes, dtypes, devices."""
    if batch.rollout_logp is None:
        raise ValueError(
            "rollout_logp is None: a trust region is measured against the policy that sampled the tokens. "
            "Make the engine return the sampler's log-probabilities (in verl: rollout.calculate_log_probs=True)."
        )
    for name in ("policy_logp", "rollout_logp", "advantages", "mask", "cu_seqlens", "divergence"):
        value = getattr(batch, name)
        if not isinstance(value, Tensor) and not (value is None and name in ("cu_seqlens", "divergence")):
            raise ValueError(f"{name} is a {type(value).__name__}, expected a torch.Tensor.")
    shape = batch.policy_logp.shape
    packed = batch.cu_seqlens is not None
    if batch.policy_logp.dim() != (1 if packed else 2):
        wanted = "[N] (cu_seqlens is given: packed)" if packed else "[B, T], or [N] together with cu_seqlens"
        raise ValueError(f"policy_logp has shape {list(shape)}, expected {wanted}.")
    for name in ("rollout_logp", "mask", "divergence"):
        value = getattr(batch, name)
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, but policy_logp has {list(shape)}.")
    for name in ("policy_logp", "rollout_logp", "advantages", "divergence"):
        value = getattr(batch, name)
        if value is not None and not value.is_floating_point():
            raise ValueError(f"{name} has dtype {value.dtype}, expected a floating point tensor.")
    if batch.mask.is_complex():
        raise ValueError(f"mask has dtype {batch.mask.dtype}, expected bool or 0/1.")
    for name in ("rollout_logp", "advantages", "mask", "cu_seqlens", "divergence"):
        value = getattr(batch, name)
        if value is not None and value.device != batch.policy_logp.device:
            raise ValueError(f"{name} is on {value.device}, but policy_logp is on {batch.policy_logp.device}.")
    if packed:
        _check_packed(batch)
    else:
        rows = shape[0]
        if batch.advantages.shape not in ((rows,), (rows, 1), shape):
            raise ValueError(
                f"advantages has shape {list(batch.advantages.shape)}, expected [{rows}], [{rows}, 1] or {list(shape)}."
            )
        if batch.shard is not None and shape[1] % len(batch.shard.chunks):
            raise ValueError(
                f"policy_logp has {shape[1]} columns, which do not split into {len(batch.shard.chunks)} equal chunks "
                "(shard.chunks). Pad the sequence axis to a multiple before it is sharded."
            )


def _check_packed(batch: TokenBatch) -> None:
    assert batch.cu_seqlens is not None
    if batch.shard is not None:
        raise ValueError(
            "shard is given together with cu_seqlens: context-parallel shards are supported for padded rows [B, "
            "T_local]. Gather packed shards along the sequence first."
        )
    if batch.cu_seqlens.is_floating_point() or batch.cu_seqlens.dtype == torch.bool or batch.cu_seqlens.dim() != 1:
        raise ValueError(
            f"cu_seqlens has dtype {batch.cu_seqlens.dtype} and shape {list(batch.cu_seqlens.shape)}, "
            "expected integers [S + 1]."
        )
    sequences = batch.cu_seqlens.shape[0] - 1
    if sequences < 1:
        raise ValueError(
            "cu_seqlens holds no sequence: it needs S + 1 >= 2 boundaries, from 0 to the number of tokens."
        )
    tokens = batch.policy_logp.shape[0]
    if batch.advantages.shape not in ((sequences,), (tokens,)):
        raise ValueError(
            f"advantages has shape {list(batch.advantages.shape)}, expected [{sequences}] (one per sequence) "
            f"or [{tokens}]."
        )


def _check_values(batch: TokenBatch) -> None:
    """`TokenBatch.check`: this synchronises the device."""
    if batch.cu_seqlens is not None:
        edges = batch.cu_seqlens.tolist()
        if edges[0] != 0 or edges[-1] != batch.policy_logp.shape[0]:
            raise ValueError(
                f"cu_seqlens runs from {edges[0]} to {edges[-1]}, expected from 0 to "
                f"{batch.policy_logp.shape[0]} (the tokens)."
            )
        if any(b < a for a, b in itertools.pairwise(edges)):
            raise ValueError("cu_seqlens decreases somewhere: boundaries must be sorted.")
    if batch.mask.dtype != torch.bool and bool(((batch.mask != 0) & (batch.mask != 1)).any()):
        raise ValueError("mask holds values other than 0 and 1. Weights belong into the advantages, not into the mask.")
    inside = batch.loss_mask
    for name, what in (("policy_logp", "log pi"), ("rollout_logp", "log mu")):
        value = getattr(batch, name).detach()[inside]
        nan, positive = int(value.isnan().sum()), int((value > 1e-3).sum())
        if nan:
            raise ValueError(
                f"{name} is NaN at {nan} of {value.numel()} loss tokens: {what} of every trained token is needed. "
                "Mask tokens that the engine could not score."
            )
        if positive:
            raise ValueError(
                f"{name} is positive at {positive} of {value.numel()} loss tokens (maximum {value.max().item():.4g}): "
                "expected log-probabilities, got probabilities, logits or their negative?"
            )
    if bool((batch.rollout_logp.detach()[inside] == -torch.inf).any()):
        raise ValueError(
            "rollout_logp is -inf at a loss token: the rollout policy cannot have sampled it. "
            "Are these log-probabilities of the sampled tokens, and from the policy that sampled them?"
        )
    if not bool(batch.token_advantages().expand_as(inside)[inside].isfinite().all()):
        raise ValueError("advantages holds NaN or infinity at a loss token: look at the rewards.")
    if batch.divergence is not None:
        value = batch.divergence.detach()[inside]
        if not bool(value.isfinite().all()) or bool((value < 0).any()):
            raise ValueError(
                "divergence is negative, NaN or infinite at a loss token: D_t must be a divergence, not an "
                "estimate of one."
            )
