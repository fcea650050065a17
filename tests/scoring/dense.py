"""The naive reference of the scorer: whole logits in float64, autograd through log_softmax; and inputs for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Inputs of one call. `scale`: standard deviation of the logits."""

    name: str
    tokens: int = 13
    size: int = 6
    vocab: int = 301
    candidates: int = 5
    scale: float = 3.0
    dtype: torch.dtype = torch.float32
    temperature: float | str = 1.0  # "each": one per token
    bias: str | None = None  # "finite", or "masked": a third of the vocabulary at -inf
    softcap: float | None = None
    logit_scale: float = 1.0
    lead: tuple[int, ...] = field(default=())

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.vocab + self.tokens)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden ``[N, d]``, lm_head ``[V, d]``, sampled ids ``[N]``, candidates ``[N, K]``: with repetitions, the
        sampled token, the first and the last id, and ids on both sides of tile edges.
        """
        g = self.generator()
        hidden = torch.randn(self.tokens, self.size, generator=g, dtype=torch.float64)
        head = torch.randn(self.vocab, self.size, generator=g, dtype=torch.float64) * self.scale / self.size**0.5
        ids = torch.randint(self.vocab, (self.tokens,), generator=g)
        candidates = torch.randint(self.vocab, (self.tokens, self.candidates), generator=g)
        edges = torch.tensor([0, self.vocab - 1, 63, 64, 127, 128]) % self.vocab
        if self.candidates > 2 and self.tokens:
            candidates[:, 0], candidates[:, 1] = ids, candidates[:, 2]
            candidates[:, 2] = edges[torch.arange(self.tokens) % len(edges)]
        if self.tokens > 2:
            ids[1], ids[2] = 0, self.vocab - 1
        return hidden.to(self.dtype), head.to(self.dtype), ids, candidates

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `score_tokens` about the map to logits."""
        g = self.generator()
        temperature: float | Tensor = (
            torch.linspace(0.5, 2.0, self.tokens) if self.temperature == "each" else float(self.temperature)
        )
        bias = None
        if self.bias is not None:
            bias = torch.randn(self.vocab, generator=g, dtype=torch.float64).to(self.dtype)
            if self.bias == "masked":
                bias[torch.rand(self.vocab, generator=g) < 0.33] = -torch.inf
                bias[0] = 0.5
        return {
            "temperature": temperature,
            "bias": bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }


def logits(
    hidden: Tensor,
    head: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """z/T ``[N, V]``, float64."""
    z = hidden.double() @ head.double().T
    if bias is not None:
        z = z + bias.double()
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature)


def entropy(logp: Tensor) -> Tensor:
    """-sum p log p, tokens of probability 0 counting 0."""
    return -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)


HEADS = (
    Head("plain"),
    Head("tiles divide", tokens=16, vocab=256),
    Head("prime sizes", tokens=17, size=7, vocab=307),
    Head("float64", dtype=torch.float64),
    Head("temperature 0.7", temperature=0.7),
    Head("a temperature each", temperature="each"),
    Head("bias", bias="finite"),
    Head("masked by the bias", bias="masked"),
    Head("softcap", softcap=4.0, scale=6.0),
    Head("softcap, scale, bias, temperature", softcap=3.0, logit_scale=0.25, bias="finite", temperature=1.7, scale=9.0),
    Head("softcap and masked", softcap=5.0, bias="masked", dtype=torch.float64),
    Head("huge logits", scale=1e4),
    Head("huge logits, float64", scale=1e4, dtype=torch.float64, temperature=0.3),
    Head("flat", scale=0.0),
    Head("peaked", scale=30.0),
    Head("vocabulary smaller than a tile", vocab=11),
    Head("K + 1 = V", vocab=6, candidates=5),
    Head("one token of vocabulary", vocab=1, candidates=1),
    Head("one row", tokens=1),
    Head("no row", tokens=0),
    Head("one candidate", candidates=1),
)
