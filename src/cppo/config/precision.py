"""`precision=auto`: bfloat16 where it is fast, float32 elsewhere, and why.

Of forward and backward alone: weights, optimizer and everything that a rule sees stay float32.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import NamedTuple

from cppo.config.settings import Settings

#: Instructions that multiply bfloat16, by the names of `torch.cpu.get_capabilities` (x86: AMX, AVX-512; Arm).
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")
#: A product must be this many times as fast as in float32: with less, conversions eat what is gained.
SPEEDUP = 1.5


class Precision(NamedTuple):
    """The choice, and the reason as half a sentence."""

    bfloat16: bool
    why: str

    def __str__(self) -> str:
        return f"{'bfloat16' if self.bfloat16 else 'float32'} ({self.why})"


def choose(settings: Settings, gpu: bool) -> Precision:
    """The precision of a run. gpu : whether it trains on a GPU with bfloat16.

    Never bfloat16 by itself for `tiny`: rounding alone makes a divergence of 2e-3 to 1e-2 in TV, which is of the order
    of a small run's budget.
    """
    if settings.precision != "auto":
        return Precision(settings.precision == "bfloat16", f"precision={settings.precision}")
    if settings.model == "tiny":
        return Precision(False, "model=tiny")
    return Precision(True, "a GPU") if gpu else processor()


def autocast(settings: Settings, device: str) -> AbstractContextManager[object]:
    """A context in which a model computes as in the forward pass of training. device : "cpu", "cuda"."""
    import torch

    return torch.autocast(device, torch.bfloat16, enabled=choose(settings, gpu=device == "cuda").bfloat16)


@lru_cache(maxsize=1)
def processor() -> Precision:
    """Whether this processor multiplies bfloat16 fast: asked of torch, then timed on one product.

    A processor without such instructions computes bfloat16 up to 80 times slower than float32, hence no timing there.
    """
    import torch

    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    found = [name for name in INSTRUCTIONS if capabilities.get(name)]
    if not found:
        return Precision(False, "this processor has no bfloat16 instructions")
    ratio = _seconds(torch.float32) / _seconds(torch.bfloat16)
    return Precision(ratio >= SPEEDUP, f"{found[0]}: a product is {ratio:.1f} times as fast as in float32")


def _seconds(dtype: object, size: int = 512, tries: int = 7) -> float:
    """The fastest of some products of two square matrices; a busy machine slows single ones."""
    import torch

    a = torch.ones(size, size, dtype=dtype)  # type: ignore[call-overload]
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return best
