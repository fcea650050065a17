"""TRL's lm_head, applied to a few ids a token, and the hidden states of TRL's own forward passes.

Logits are computed in the precision of TRL's head, because only then z_y - log pi(y) is TRL's logsumexp: float32 unless
the model or autocast is bf16; `GRPOConfig.cast_lm_head_to_fp32=True` makes them float32 in any case. Everything here is
without gradient. Left out: DeepSpeed ZeRO-3 and FSDP1, whose head has no full weight outside of its own forward
(refused).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Elements of a temporary [chunk, V] or [chunk, K + 1, d]: 2^25 float32 numbers are 128 MiB.
CHUNK_ELEMENTS = 2**25

#: A product with the whole vocabulary is cheaper than gathered rows below this multiple of K + 1 (rows are read at
#: random).
FULL_PRODUCT = 16

#: Attributes of a configuration by which models change their logits after the head (TRL 1.16, `add_fused_lm_head`).
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself (already unwrapped from DDP and the like)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def require_plain_head(model: Any) -> None:
    """Top-K needs logits = h W^T + b; models that rescale or cap them afterwards are refused.

    Raises
    ------
    ValueError : the model's configuration changes its logits after the head.
    """
    config = model.config.get_text_config()
    for name in _LOGIT_CHANGES:
        value = getattr(config, name, None)
        if value is not None and value != 1:
            raise ValueError(
                f"{type(model).__name__} has {name}={value} in its configuration: it changes the logits after the "
                "head, which the top-K divergences of the TRL engine do not follow. Set divergence='binary_tv' (or "
                "'binary_kl') in the rule."
            )


@contextmanager
def hidden_states(model: Any, receive: Callable[[Tensor, torch.dtype], None]) -> Iterator[None]:
    """Call `receive(last_hidden_state [B, P + T, d], autocast dtype or its own)` on each forward of the backbone."""
    backbone = model.base_model
    if backbone is model:
        raise ValueError(
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


@dataclass(frozen=True)
class Head:
    """The lm_head as TRL applies it: z = (h W^T + b) / temperature, the product in `dtype`, the rest in float32."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    temperature: float
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any, temperature: float, dtype: torch.dtype) -> Head:
        """The head of a causal LM, gathered where FSDP2 has sharded it."""
        head = model.get_output_embeddings()
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        if hasattr(weight, "full_tensor"):
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        if weight.dim() != 2 or weight.numel() == 0:
            raise ValueError(
                f"the lm_head's weight has shape {list(weight.shape)} here: DeepSpeed ZeRO-3 and FSDP1 keep it in "
                "pieces, which top-K divergences do not support. Use DDP, ZeRO-2 or FSDP2, or set "
                "divergence='binary_tv' in the rule."
            )
        return cls(weight.to(dtype), None if bias is None else bias.to(dtype), temperature, dtype)

    def all_logits(self, hidden: Tensor) -> Tensor:
        """``[n, d]`` -> float32 ``[n, V]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = nn.functional.linear(hidden.to(self.dtype), self.weight, self.bias)
        return logits.float() / self.temperature

    def logits_at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """``[n, d]`` and ids ``[n, J]`` -> float32 ``[n, J]``, by gathered rows or a whole product: the cheaper."""
        if self.weight.shape[0] <= FULL_PRODUCT * ids.shape[1]:
            return self.all_logits(hidden).gather(-1, ids)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = torch.bmm(self.weight[ids], hidden.to(self.dtype)[:, :, None])[:, :, 0]
        if self.bias is not None:
            logits = logits + self.bias[ids]
        return logits.float() / self.temperature

    def chunk(self, width: int) -> int:
        """Tokens at a time for `width` ids each."""
        vocabulary, size = self.weight.shape
        each = vocabulary if vocabulary <= FULL_PRODUCT * width else width * size
        return max(1, CHUNK_ELEMENTS // each)


@torch.no_grad()
def policy_topk_logp(head: Head, hidden: Tensor, ids: Tensor, tokens: Tensor, logp: Tensor) -> Tensor:
    """log pi at mu's ids from the hidden states of the loss's own forward.

    Parameters
    ----------
    hidden : last hidden states ``[B, P + T, d]`` of prompts and responses.
    ids : mu's top-K ids, int ``[B, T, K]``. tokens : sampled tokens ``[B, T]``. logp : TRL's log pi of them, ``[B,
        T]``.

    Returns
    -------
    float32 ``[B, T, K]``: z_k - (z_y - log pi(y)), at most 0. Arbitrary outside the mask.
    """
    length, k = tokens.shape[1], ids.shape[-1]
    states = hidden[:, -length - 1 : -1].to(head.weight.device).reshape(-1, hidden.shape[-1])
    wanted = torch.cat([ids, tokens[..., None].to(ids.dtype)], -1).reshape(-1, k + 1)
    size = head.chunk(k + 1)
    parts = [
        head.logits_at(states[start : start + size], wanted[start : start + size].long())
        for start in range(0, wanted.shape[0], size)
    ]
    logits = torch.cat(parts).view(*tokens.shape, k + 1).to(logp.device)
    return (logits[..., :-1] - logits[..., -1:] + logp.detach().float()[..., None]).clamp(max=0.0)
