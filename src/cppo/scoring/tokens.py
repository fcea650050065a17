"""`score_tokens`: from final hidden states and the lm_head to everything that a trust region asks about the tokens.

    log pi(y_n) = z_y/T - logsumexp_v(z_v/T),   z as in `cppo.scoring.logits`

* The log-probability of the sampled token carries a gradient, by recomputing the logits in the backward pass; all else
  comes without one from the same pass over the vocabulary.
* Rows whose gradient is exactly 0 (tokens that a rule has dropped) are left out of the backward pass.
* With `shard` the lm_head is split over a tensor-parallel group: one all-reduce MAX, one all-reduce SUM (and two
  all-gathers for the top k), and in the backward pass one all-reduce SUM of the hidden states' gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cppo.scoring import backends
from cppo.scoring.logits import LOGITS_DTYPES, LogitMap, tile_shape
from cppo.scoring.parallel import VocabShard, merge, merge_top, rank_and_size


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What `score_tokens` returns; float32 (float64 for float64 logits), in the shape of the tokens ``[...]``.

    Attributes
    ----------
    logp : log pi(y), ``[...]``; the only tensor with a gradient.
    candidate_logp : log pi at the candidates, ``[..., K]``; None without candidates.
    logsumexp : log sum_v exp(z_v / T), ``[...]``.
    entropy : -sum_v pi log pi, nats, ``[...]``; None unless asked for.
    top_ids, top_logp : pi's own k likeliest tokens, likeliest first, int64 and float ``[..., k]``; None unless asked.
    backend : which one did it.
    """

    logp: Tensor
    candidate_logp: Tensor | None
    logsumexp: Tensor
    entropy: Tensor | None
    top_ids: Tensor | None
    top_logp: Tensor | None
    backend: str


class _Task(NamedTuple):
    """What the autograd function needs beyond its differentiable inputs."""

    token_ids: Tensor  # [N]
    candidates: Tensor | None  # [N, K]
    logits: LogitMap  # without bias, which is an input
    shard: VocabShard
    exchange: VocabShard | None
    entropy: bool
    top_k: int
    tile: tuple[int, int]
    backend: str


def score_tokens(
    hidden: Tensor,
    lm_head: Tensor,
    token_ids: Tensor,
    candidate_ids: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    want_top_k: int = 0,
    entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    shard: VocabShard | None = None,
    tile: tuple[int, int] | None = None,
    check: bool | None = None,
) -> TokenScores:
    """Score N = ... tokens without ever holding their logits.

    Memory beyond inputs, results and gradients: two tiles of logits, whatever N and V; in the backward pass also the
    gradients' accumulators in float32, ``[N, d]`` and a tile's columns of the lm_head.

    Parameters
    ----------
    hidden : final hidden states, the ones that predict the tokens, float ``[..., d]``.
    lm_head : its weight W, ``[V, d]``, of the same dtype; with `shard` this rank's rows of it.
    token_ids : the sampled tokens y, integers ``[...]``. candidate_ids : K further ids a token, integers ``[..., K]``,
        repetitions allowed (mu's top K, say).
    temperature : T > 0, a number or one per token ``[...]`` (whose values are not checked).
    bias, softcap, logit_scale : see `cppo.scoring.logits`; the bias ``[V]`` may want a gradient, too.
    want_top_k : how many of pi's own likeliest tokens to return. entropy : whether to return the entropy.
    logits_dtype : of the product h W^T. None: float32 (float64 for float64 inputs). bfloat16 and float16 are rounded to
        8 and 11 bits: at logits of about 20 a bfloat16 log-probability is off by up to 0.1, and a total variation that
        is 0 shows as 0.002 to 0.01. They save time on accelerators only.
    backend : "torch", "triton", "linear_cross_entropy" (PyTorch's own; no candidates, entropy or top k) or
        "auto": see `cppo.scoring.backends`.
    shard : which rows of W these are; None: all of them.
    tile : (tokens, vocabulary columns) held at a time; None: by device.
    check : whether ids outside [0, V) raise. That needs to look at the values, which synchronises an accelerator; so
        by default it is done where the ids lie on the CPU, and elsewhere such ids get NaN.

    Raises
    ------
    ValueError : shapes, dtypes or devices do not fit; ids are out of range, or of a type that cannot hold V ids.
    """
    here = check_inputs(hidden, lm_head, bias, shard)
    lead = hidden.shape[:-1]
    _check_ids("token_ids", token_ids, lead, hidden.device, here.vocab_size, check)
    if candidate_ids is not None:
        _check_ids("candidate_ids", candidate_ids, (*lead, -1), hidden.device, here.vocab_size, check)
    if not 0 <= want_top_k <= here.vocab_size:
        raise ValueError(f"want_top_k is {want_top_k}, expected 0 to {here.vocab_size} (the vocabulary).")
    logits = logit_map(hidden, temperature, softcap, logit_scale, logits_dtype)
    logp_only = candidate_ids is None and not want_top_k and not entropy
    chosen = backends.choose(backend, hidden, logits, bias, shard, logp_only)
    if chosen == "linear_cross_entropy":
        logp, logsumexp = backends.linear_cross_entropy(hidden, lm_head, token_ids, logits, bias)
        return TokenScores(logp, None, logsumexp, None, None, None, chosen)
    tokens = token_ids.numel()
    task = _Task(
        token_ids.reshape(tokens).long(),
        None if candidate_ids is None else candidate_ids.reshape(tokens, candidate_ids.shape[-1]).long(),
        logits,
        here,
        shard,
        entropy,
        want_top_k,
        tile_shape(hidden.device, tile),
        chosen,
    )
    found = _Score.apply(hidden.reshape(tokens, hidden.shape[-1]), lm_head, bias, task)
    shaped = (None if x is None else x.reshape(*lead, *x.shape[1:]) for x in found)
    return TokenScores(*shaped, chosen)  # type: ignore[call-arg, arg-type]


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lm_head: Tensor, bias: Tensor | None, task: _Task) -> Any:
        module, shard = backends.module(task.backend), task.shard
        logits = task.logits.with_bias(bias)
        ids = task.token_ids[:, None]
        if task.candidates is not None:
            ids = torch.cat([ids, task.candidates], 1)
        with torch.autocast(hidden.device.type, enabled=False):
            part = module.forward(
                hidden,
                lm_head,
                ids,
                logits,
                start=shard.start,
                valid=shard.valid,
                entropy=task.entropy,
                top_k=task.top_k,
                tile=task.tile,
            )
        scores = merge(part, task.exchange, task.logits.temperature)
        outside = (ids < 0) | (ids >= shard.vocab_size)
        logp = scores.logp.masked_fill(outside, math.nan)
        top_ids = top_logp = None
        if part.top_logits is not None and part.top_ids is not None:
            values, top_ids = merge_top(part.top_logits, part.top_ids, task.exchange)
            out = values <= torch.finfo(values.dtype).min  # tokens taken out of the vocabulary by a bias of -inf
            top_logp = values * logits.inverse_temperature(slice(None)) - scores.logsumexp[:, None]
            top_logp = top_logp.clamp(max=0.0).masked_fill(out, -math.inf)
        ctx.save_for_backward(hidden, lm_head, bias, scores.logsumexp)
        ctx.task = task
        sampled = logp[:, 0].contiguous()
        candidates = None if task.candidates is None else logp[:, 1:].contiguous()
        others = (candidates, scores.logsumexp, scores.entropy, top_ids, top_logp)
        ctx.mark_non_differentiable(*(x for x in others if x is not None))
        ctx.set_materialize_grads(False)
        return sampled, *others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> Any:
        hidden, lm_head, bias, logsumexp = ctx.saved_tensors
        task: _Task = ctx.task
        if gradient is None:
            return None, None, None, None
        module, logits = backends.module(task.backend), task.logits.with_bias(bias)
        gradient = gradient.to(logits.arithmetic)
        # A dropped token costs nothing. (This looks at values: one synchronisation on an accelerator.)
        rows = gradient.nonzero()[:, 0]
        every = rows.numel() == gradient.numel()
        pick = (lambda x: x) if every else (lambda x: x[rows])
        temperature = logits.temperature
        if isinstance(temperature, Tensor):
            logits = logits.with_temperature(pick(temperature))
        with torch.autocast(hidden.device.type, enabled=False):
            d_hidden, d_head, d_bias = module.backward(
                pick(hidden),
                lm_head,
                pick(task.token_ids),
                pick(logsumexp),
                pick(gradient),
                logits,
                start=task.shard.start,
                valid=task.shard.valid,
                need=tuple(ctx.needs_input_grad[:3]),
                tile=task.tile,
            )
        if d_hidden is not None:
            exchange = task.exchange
            if exchange is not None and rank_and_size(exchange.group)[1] > 1 and d_hidden.numel():
                # every rank has the gradient through its own columns; all have the same rows
                torch.distributed.all_reduce(d_hidden, group=exchange.group)
            if not every:
                d_hidden = torch.zeros(hidden.shape, dtype=d_hidden.dtype, device=hidden.device).index_copy_(
                    0, rows, d_hidden
                )
            d_hidden = d_hidden.to(hidden.dtype)
        return d_hidden, d_head, None if d_bias is None else d_bias.to(bias.dtype), None


def logit_map(
    hidden: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    logits_dtype: torch.dtype | None,
) -> LogitMap:
    """Check the numbers of the map from hidden states to logits (its bias comes later), and choose its precision."""
    if logits_dtype is None:
        logits_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if logits_dtype not in LOGITS_DTYPES:
        names = ", ".join(str(dtype) for dtype in LOGITS_DTYPES)
        raise ValueError(f"logits_dtype is {logits_dtype}, expected one of {names}, or None.")
    if isinstance(temperature, Tensor):
        if temperature.shape != hidden.shape[:-1] or temperature.device != hidden.device:
            raise ValueError(
                f"temperature has shape {list(temperature.shape)} on {temperature.device}, expected a number or "
                f"{list(hidden.shape[:-1])} on {hidden.device} (one per token)."
            )
        temperature = temperature.reshape(-1)
    else:
        require_positive("temperature", temperature)
    require_positive("logit_scale", logit_scale)
    if softcap is not None:
        require_positive("softcap", softcap)
    return LogitMap(temperature, None, softcap, float(logit_scale), logits_dtype)


def require_positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value!r}, expected a number above 0.")


def check_inputs(hidden: Tensor, lm_head: Tensor, bias: Tensor | None, shard: VocabShard | None) -> VocabShard:
    """Shapes, dtypes and devices; which columns of the vocabulary `lm_head` is."""
    for name, value in (("hidden", hidden), ("lm_head", lm_head), ("bias", bias)):
        if value is not None and hasattr(value, "full_tensor"):
            raise ValueError(
                f"{name} is a DTensor (sharded): pass {name}.full_tensor(), or the local part of a head that is split "
                f"over the vocabulary, {name}.to_local(), together with shard=VocabShard(start, stop, V, group)."
            )
    if not hidden.is_floating_point() or hidden.dim() < 2:
        raise ValueError(f"hidden has dtype {hidden.dtype} and shape {list(hidden.shape)}, expected floats [..., d].")
    if lm_head.dim() != 2 or lm_head.shape[1] != hidden.shape[-1] or lm_head.shape[0] < 1:
        turned = lm_head.dim() == 2 and lm_head.shape[0] == hidden.shape[-1]
        hint = " It looks transposed: pass lm_head.T." if turned else ""
        raise ValueError(
            f"lm_head has shape {list(lm_head.shape)}, expected [V, {hidden.shape[-1]}] (the weight of the output "
            f"layer) for hidden states of size {hidden.shape[-1]}.{hint}"
        )
    if lm_head.dtype != hidden.dtype:
        raise ValueError(f"lm_head has dtype {lm_head.dtype}, but hidden has {hidden.dtype}: cast one of them.")
    for name, value in (("lm_head", lm_head), ("bias", bias)):
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, but hidden is on {hidden.device}.")
    columns = lm_head.shape[0]
    if bias is not None and (bias.shape != (columns,) or not bias.is_floating_point()):
        raise ValueError(f"bias has dtype {bias.dtype} and shape {list(bias.shape)}, expected floats [{columns}].")
    if shard is None:
        return VocabShard(0, columns, columns)
    if shard.columns != columns:
        raise ValueError(
            f"lm_head has {columns} rows here, but the shard goes from id {shard.start} to {shard.stop} "
            f"({shard.columns} rows, padding included)."
        )
    return shard


def _check_ids(
    name: str, ids: Tensor, shape: tuple[int, ...], device: torch.device, vocabulary: int, check: bool | None
) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {ids.dtype}, expected integers (token ids).")
    largest = torch.iinfo(ids.dtype).max
    if largest < vocabulary - 1:
        raise ValueError(
            f"{name} has dtype {ids.dtype}, which ends at {largest}, but the vocabulary goes up to {vocabulary - 1}: "
            "larger ids have overflowed. Keep ids as int32 or int64."
        )
    wanted = tuple(shape)
    fits = ids.dim() == len(wanted) and all(w in (-1, s) for w, s in zip(wanted, ids.shape, strict=True))
    if not fits:
        expected = "[" + ", ".join("K" if w == -1 else str(w) for w in wanted) + "]"
        raise ValueError(f"{name} has shape {list(ids.shape)}, expected {expected} for these hidden states.")
    if ids.device != device:
        raise ValueError(f"{name} is on {ids.device}, but hidden is on {device}.")
    if check or (check is None and device.type == "cpu"):
        outside = ids[(ids < 0) | (ids >= vocabulary)]
        if outside.numel():
            raise ValueError(
                f"{outside.numel()} of {ids.numel()} {name} are outside [0, {vocabulary}), such as "
                f"{outside[0].item()}. Give unused places any id of the vocabulary (0) and leave them out afterwards."
            )
