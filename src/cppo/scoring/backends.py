"""Which code scores the tokens: by name, or by what was measured.

* "torch": tiles in plain torch, any device (`torch_backend`). "triton": the same in kernels, for CUDA
  (`triton_backend`). "linear_cross_entropy": PyTorch's own chunked function, the sampled token's log-probability alone.
* "auto": the fastest that can do what is asked exactly (logits and results in float32), by `MEASURED`; where nothing
  was measured, "torch". On CUDA nothing was measured: "auto" is "torch" there.

Left out after measuring: Liger (0.8.5). On a CPU its functions multiply in the inputs' dtype, which gives bfloat16
logits, and in float32 they are slower than "torch" (`docs/divergences.md`, "Backends").
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from cppo.scoring import torch_backend
from cppo.scoring.logits import LogitMap
from cppo.scoring.parallel import VocabShard

BACKENDS = ("auto", "torch", "triton", "linear_cross_entropy")

#: Elements of the logits that `linear_cross_entropy` makes at a time (its own default, 8 rows at 151,936 columns, reads
#: W so often that it takes several times as long): 2^24 are 64 MiB of float32.
CHUNK_ELEMENTS = 2**24


class Fact(NamedTuple):
    """`backend` took `time` times as long as "torch" for the log-probability and its gradients, on `device`."""

    device: str
    dtype: torch.dtype
    backend: str
    time: float
    where: str


#: `benchmarks/scoring.py` prints the times; `linear_cross_entropy` with chunks as here. Not listed, because it is not
#: exact: with bfloat16 inputs it returns bfloat16 log-probabilities (off by up to 0.06).
MEASURED = (
    Fact("cpu", torch.float32, "linear_cross_entropy", 1.1, "two cores with AVX2, PyTorch 2.13, V = 32,768, d = 1,024"),
)


def choose(
    backend: str, hidden: Tensor, logits: LogitMap, bias: Tensor | None, shard: VocabShard | None, logp_only: bool
) -> str:
    """The name of the backend to use: `backend` itself, or for "auto" the fastest of `MEASURED` and "torch".

    Parameters
    ----------
    hidden, logits, bias, shard : as `score_tokens` got them. logp_only : whether nothing but the sampled token's
        log-probability is wanted.

    Raises
    ------
    ValueError : there is no such backend, or it cannot do what is asked here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}.")
    if backend != "auto":
        if problem := _problem(backend, hidden, logits, bias, shard, logp_only):
            raise ValueError(f"backend={backend!r} {problem}")
        return backend
    able = [("torch", 1.0)] + [
        (fact.backend, fact.time)
        for fact in MEASURED
        if (fact.device, fact.dtype) == (hidden.device.type, hidden.dtype)
        and not _problem(fact.backend, hidden, logits, bias, shard, logp_only)
    ]
    return min(able, key=lambda found: found[1])[0]


def module(name: str) -> ModuleType:
    """The module with `forward`, `backward` and `exact_partial` of "torch" or "triton"."""
    if name == "triton":
        from cppo.scoring import triton_backend

        return triton_backend
    return torch_backend


def linear_cross_entropy(
    hidden: Tensor, lm_head: Tensor, token_ids: Tensor, logits: LogitMap, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log pi(y) = -cross_entropy(h W^T s/T + b s/T, y) by PyTorch's chunked function, with gradient; and without one
    the logsumexp z_y/T - log pi(y), a dot product a token (NaN where a bias of -inf makes y impossible).

    Parameters
    ----------
    hidden : ``[..., d]``. lm_head : ``[V, d]``. token_ids : ``[...]``; NaN is returned for those outside [0, V).
    logits : without softcap.
    """
    factor = logits.logit_scale * logits.inverse_temperature(slice(None))
    rows = hidden.reshape(-1, hidden.shape[-1])
    if isinstance(factor, Tensor) or factor != 1:
        rows = rows * factor
        bias = None if bias is None else bias * factor
    ids = token_ids.reshape(-1).long()
    outside = (ids < 0) | (ids >= lm_head.shape[0])
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, CHUNK_ELEMENTS // lm_head.shape[0]))
    with torch.autocast(hidden.device.type, enabled=False):
        loss = torch.nn.functional.linear_cross_entropy(
            rows, lm_head, ids.masked_fill(outside, 0), linear_bias=bias, reduction="none", options=options
        )
        logp = -loss.masked_fill(outside, torch.nan)
        with torch.no_grad():
            sampled = ids.masked_fill(outside, 0)
            z = torch.linalg.vecdot(rows, lm_head[sampled])
            logsumexp = (z if bias is None else z + bias[sampled]) - logp
    return logp.reshape(token_ids.shape), logsumexp.reshape(token_ids.shape)


def _problem(
    backend: str, hidden: Tensor, logits: LogitMap, bias: Tensor | None, shard: VocabShard | None, logp_only: bool
) -> str | None:
    """Why `backend` cannot do this; None: it can. (What the kernels do not take, they say themselves.)"""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "needs the package triton: pip install 'cppo[scoring]' (Linux), or use backend='torch'."
        if hidden.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                f"needs CUDA, but hidden is on {hidden.device}: use backend='torch' (TRITON_INTERPRET=1 is for tests)."
            )
    if backend == "linear_cross_entropy":
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"needs PyTorch 2.13 or newer, and this is {torch.__version__}: use backend='torch'."
        if not logp_only:
            return (
                "gives the sampled token's log-probability alone, but candidates, the entropy or the top k are wanted, "
                "too: use backend='torch'."
            )
        if shard is not None:
            return "does not do split vocabularies (shard): use backend='torch'."
        if logits.softcap is not None:
            return "has no softcap: use backend='torch'."
        if hidden.dtype not in (torch.float32, torch.float64) or logits.dtype != hidden.dtype:
            return (
                f"returns log-probabilities in the dtype of its inputs ({hidden.dtype}) and forms logits in it: it is "
                "for float32 and float64 without another logits_dtype. Use backend='torch'."
            )
        if bias is not None and isinstance(logits.temperature, Tensor):
            return "does not do a bias together with one temperature a token: use backend='torch'."
    return None
