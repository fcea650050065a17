"""What lies between a hidden state and a log-probability, and the tiles in which it is computed.

    x = h W^T + b        the lm_head, [N, V]
    u = s x              s = logit_scale (Cohere's logit_scale, Falcon-H1's lm_head_multiplier, 1 / Granite's scaling)
    z = c tanh(u / c)    c = softcap (Gemma 2's final_logit_softcapping); z = u without one
    log pi = log_softmax(z / T)                                                              T = temperature

z are the *logits*. They are made a tile [rows, columns] at a time and never kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

#: Rows and columns of a tile of logits. CPU: 8 MiB of float32, about what stays in the cache of two cores; of several
#: shapes of this size the fastest, forward and backward (0.9 of the time of (512, 4096), two cores with AVX2).
#: Accelerators: 128 MiB, enough to fill one.
CPU_TILE, DEVICE_TILE = (1024, 2048), (4096, 8192)

LOGITS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LogitMap:
    """The map from x = h W^T + b to z, its derivative, and the precision of both.

    Parameters
    ----------
    temperature : T > 0, a number or one per row ``[N]``.
    bias : b, ``[V_local]``; -inf takes a token out of the vocabulary. softcap : c > 0. logit_scale : s.
    dtype : of the product h W^T, as `score_tokens(logits_dtype=...)`; everything after it is in `arithmetic`.
    """

    temperature: float | Tensor = 1.0
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    dtype: torch.dtype = torch.float32

    @property
    def arithmetic(self) -> torch.dtype:
        """float64 where the logits are, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def with_bias(self, bias: Tensor | None) -> LogitMap:
        return replace(self, bias=None if bias is None else bias.detach().to(self.arithmetic))

    def with_temperature(self, temperature: float | Tensor) -> LogitMap:
        return replace(self, temperature=temperature)

    def inverse_temperature(self, rows: slice) -> float | Tensor:
        """1/T, a number or ``[n, 1]``, to multiply a tile with."""
        if isinstance(self.temperature, Tensor):
            return self.temperature[rows, None].to(self.arithmetic).reciprocal()
        return 1.0 / self.temperature

    def prepare(self, matrix: Tensor) -> Tensor:
        """A part of h or W as the product wants it. CPUs multiply float32 faster than they emulate bf16."""
        product = self.dtype if matrix.device.type == "cpu" or self.dtype == torch.float64 else matrix.dtype
        return matrix.to(product)

    def tile(self, hidden: Tensor, head: Tensor, columns: slice, out: Tensor) -> Tensor:
        """z of some rows and columns into `out` ``[n, v]``, of dtype `arithmetic`; `hidden`, `head` are `prepare`d."""
        if hidden.dtype == out.dtype:
            torch.mm(hidden, head.t(), out=out)
        elif self.dtype == out.dtype and hidden.is_cuda:
            torch.mm(hidden, head.t(), out_dtype=out.dtype, out=out)
        else:
            out.copy_(torch.mm(hidden, head.t()))
        if self.bias is not None:
            out.add_(self.bias[columns])
        if self.logit_scale != 1:
            out.mul_(self.logit_scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def pull_back(self, gradient: Tensor, z: Tensor | None) -> Tensor:
        """d/dz to d/dx in place: dz/dx = s (1 - (z/c)^2)."""
        if self.softcap is not None:
            assert z is not None
            gradient.mul_(z.div(self.softcap).square_().neg_().add_(1.0))
        return gradient.mul_(self.logit_scale) if self.logit_scale != 1 else gradient


class Operands(NamedTuple):
    """One policy's part of an exact divergence: hidden ``[N, d]``, lm_head ``[V_local, d]``, its map to logits, and
    log sum_v exp(z_v/T) over the whole vocabulary ``[N]``.
    """

    hidden: Tensor
    lm_head: Tensor
    logits: LogitMap
    logsumexp: Tensor


def parts(count: int, size: int) -> Iterator[slice]:
    """0 ... count in equal slices of at most `size`; the last may be shorter."""
    if count:
        size = math.ceil(count / math.ceil(count / size))
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))


def tile_shape(device: torch.device, given: tuple[int, int] | None) -> tuple[int, int]:
    """(rows, columns) of a tile.

    Raises
    ------
    ValueError : not two positive numbers.
    """
    if given is None:
        return CPU_TILE if device.type == "cpu" else DEVICE_TILE
    if len(given) != 2 or any(not isinstance(size, int) or size < 1 for size in given):
        raise ValueError(f"tile is {given!r}, expected (rows, columns), both at least 1.")
    return given
