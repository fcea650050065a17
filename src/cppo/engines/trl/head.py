"""TRL's lm_head as `cppo.scoring` takes it, and the hidden states of TRL's own forward passes.

Logits are computed in the precision of TRL's head, because only then z_y/T - log pi(y) is TRL's logsumexp: float32
unless the model or autocast is bf16; `GRPOConfig.cast_lm_head_to_fp32=True` makes them float32 in any case. Everything
here is without gradient. Left out: DeepSpeed ZeRO-3 and FSDP1, whose head has no full weight outside of its own forward
(refused).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cppo.errors import UserError
from cppo.scoring import Distributions, TokenScores, score_tokens

#: Elements of a temporary [chunk, J, d] of gathered rows: 2^25 float32 numbers are 128 MiB.
CHUNK_ELEMENTS = 2**25

#: A product with the whole vocabulary is cheaper than gathered rows below this multiple of the ids a token (rows are
#: read at random).
FULL_PRODUCT = 16

#: Names under which configurations keep the factor of the logits; TRL 1.16 (`add_fused_lm_head`) takes the first found.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself (already unwrapped from DDP and the like)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logit_changes(model: Any) -> tuple[float | None, float]:
    """What lies between h W^T + b and the logits, read from the configuration as TRL's fused head does: (softcap,
    scale) of z = softcap tanh(scale x / softcap).

    Softcap: Gemma 2 and later. Scale: `logit_scale` (Cohere), `output_multiplier`, `lm_head_multiplier` (Falcon-H1), or
    1 / `logits_scaling` (Granite, MiniCPM3), by which HyperCLOVA X multiplies.

    Raises
    ------
    UserError : a value that is not a number above 0.
    """
    config = model.config.get_text_config()
    values: dict[str, float] = {}
    for name in ("final_logit_softcapping", *_SCALES):
        value = getattr(config, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(
                f"{type(model).__name__} has {name}={value!r} in its configuration, expected a number above 0: the "
                "divergences that look at the whole head would score other logits than TRL does. Set "
                "divergence='binary_tv' (or 'binary_kl') in the rule."
            )
        values[name] = float(value)
    found = next((name for name in _SCALES if name in values), None)
    scale = 1.0 if found is None else values[found]
    divides = found == "logits_scaling" and config.model_type != "hyperclovax"
    return values.get("final_logit_softcapping"), 1 / scale if divides else scale


@contextmanager
def hidden_states(model: Any, receive: Callable[[Tensor, torch.dtype], None]) -> Iterator[None]:
    """Call `receive(last_hidden_state [B, P + T, d], autocast dtype or its own)` on each forward of the backbone."""
    backbone = model.base_model
    if backbone is model:
        raise UserError(
            f"{type(model).__name__} names no backbone (base_model_prefix), so its hidden states cannot be read. Set "
            "divergence='binary_tv' (or 'binary_kl') in the rule."
        )

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        device = hidden.device.type
        receive(
            hidden.detach(), torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        )

    handle = backbone.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def counted_positions(model: Any, policy: Any) -> Iterator[None]:
    """Give the model the positions that its tokens had in generation, where it has learnt ones.

    TRL 1.16 pads prompts on the left and hands over no `position_ids`. Rotary positions are relative, so nothing is
    amiss; a model of learnt positions (GPT-2) counts the padding, too, and its log-probabilities are not those of the
    policy that sampled (findings/trl_learnt_positions.sh).

    Parameters
    ----------
    model : as TRL calls it. policy : the transformers model inside.
    """
    rotary = getattr(policy.config.get_text_config(), "rope_parameters", None) is not None
    if rotary or "position_ids" not in inspect.signature(policy.forward).parameters:
        yield
        return

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is None or mask.dim() != 2 or kwargs.get("position_ids") is not None:
            return args, kwargs
        return args, {**kwargs, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def states_before(hidden: Tensor, tokens: int, index: Tensor) -> Tensor:
    """The states that predict some of the last `tokens` = T tokens of each row: those at the positions before them.

    Parameters
    ----------
    hidden : ``[B, P + T, d]``. index : flat positions in ``[B, T]``, int64 ``[n]``.
    """
    return hidden[index // tokens, index % tokens + (hidden.shape[1] - tokens - 1)]


@dataclass(frozen=True, eq=False)
class Head:
    """The lm_head as TRL applies it, for states ``[n, d]``: z/T as in `cppo.scoring.logits`, h W^T in `dtype`."""

    weight: Tensor  # [V, d], of `dtype`
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any, temperature: float, dtype: torch.dtype, copy: bool = False) -> Head:
        """The head of a causal LM, gathered where FSDP2 has sharded it (then every process must come here).

        `copy`: with memory of its own, which training does not change.
        """
        head = model.get_output_embeddings()
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        if hasattr(weight, "full_tensor"):
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        if weight.dim() != 2 or weight.numel() == 0:
            raise UserError(
                f"the lm_head's weight has shape {list(weight.shape)} here: DeepSpeed ZeRO-3 and FSDP1 keep it in "
                "pieces, of which nothing but the sampled token's log-probability can be had. Use DDP, ZeRO-2 or "
                "FSDP2, or set divergence='binary_tv' in the rule."
            )
        bias = None if bias is None else bias.to(dtype, copy=copy)
        return cls(weight.to(dtype, copy=copy), bias, temperature, *logit_changes(model), dtype)

    def score(self, states: Tensor, tokens: Tensor, candidates: Tensor | None = None, top_k: int = 0) -> TokenScores:
        """`score_tokens` with this head."""
        return score_tokens(
            states.to(self.dtype),
            self.weight,
            tokens,
            candidates,
            temperature=self.temperature,
            bias=self.bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            want_top_k=min(top_k, self.weight.shape[0]),
            logits_dtype=self.dtype,
        )

    def distributions(self, states: Tensor, logsumexp: Tensor) -> Distributions:
        """All next-token probabilities at some states, as `cppo.scoring.exact_divergence` takes them."""
        return Distributions(
            states.to(self.dtype),
            self.weight,
            logsumexp,
            self.temperature,
            self.bias,
            self.softcap,
            self.logit_scale,
            self.dtype,
        )

    def logits_at(self, states: Tensor, ids: Tensor) -> Tensor:
        """z/T at ids ``[n, J]`` by gathered rows of W: J dot products per token; float32 ``[n, J]``."""
        states = states.to(self.dtype)
        size = max(1, CHUNK_ELEMENTS // max(1, ids.shape[1] * self.weight.shape[1]))
        with torch.autocast(states.device.type, enabled=False):
            parts = [
                torch.bmm(self.weight[some], h[:, :, None])[:, :, 0].float()
                for h, some in zip(states.split(size), ids.split(size), strict=True)
            ]
        z = torch.cat(parts)
        if self.bias is not None:
            z += self.bias[ids]
        z *= self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature

    def log_probabilities(
        self, states: Tensor, tokens: Tensor, logp: Tensor, ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """log pi at further ids, and the logsumexp, where TRL has computed the sampled token's log pi(y) already.

            logsumexp = z_y/T - log pi(y),      log pi(k) = z_k/T - logsumexp

        K + 1 dot products per token; a whole product instead where the vocabulary is small.

        Parameters
        ----------
        tokens : y, ``[n]``. logp : log pi(y), float32 ``[n]``. ids : ``[n, K]``; None: K = 0.

        Returns
        -------
        float32 ``[n, K]`` and ``[n]``.
        """
        wanted = tokens[:, None] if ids is None else torch.cat([ids, tokens[:, None]], 1)
        if ids is not None and self.weight.shape[0] <= FULL_PRODUCT * wanted.shape[1]:
            scores = self.score(states, tokens, ids)
            assert scores.candidate_logp is not None
            return scores.candidate_logp.float(), scores.logsumexp.float()
        z = self.logits_at(states, wanted)
        logsumexp = z[:, -1] - logp
        return (z[:, :-1] - logsumexp[:, None]).clamp(max=0.0), logsumexp
