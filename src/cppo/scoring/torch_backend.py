"""Scoring by tiles in plain torch: any device; the reference of the other backends.

The outer loop runs over the vocabulary, so that every part of W is read and converted once; the inner over rows. What
survives a tile is a few numbers per row. Memory beyond inputs and results: two or three tiles, and the float32
accumulators of the gradients (``[N, d]`` and one part of W's).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cppo.divergence import KL_FLOOR
from cppo.scoring.logits import LogitMap, Operands, parts
from cppo.scoring.parallel import LocalPart

#: Columns of a block, of which the maximum is taken on the way to the top k.
BLOCK = 32


def forward(
    hidden: Tensor,
    lm_head: Tensor,
    ids: Tensor,
    logits: LogitMap,
    *,
    start: int,
    valid: int,
    entropy: bool,
    top_k: int,
    tile: tuple[int, int],
) -> LocalPart:
    """Reduce the logits of N tokens over this process's columns.

    Parameters
    ----------
    hidden : ``[N, d]``. lm_head : ``[V_local, d]``. ids : global, int64 ``[N, J]``.
    start : id of the first column. valid : how many columns are ids of the vocabulary; those after them are padding.
    entropy : whether to sum what the entropy needs. top_k : how many of the largest logits to return; 0: none.
    """
    tokens, dtype, device = hidden.shape[0], logits.arithmetic, hidden.device
    maximum = torch.full((tokens,), -math.inf, dtype=dtype, device=device)
    total = torch.zeros(tokens, dtype=dtype, device=device)
    weighted = torch.zeros(tokens, dtype=dtype, device=device) if entropy else None
    local = ids - start
    held = (local >= 0) & (local < valid)
    at_ids = torch.zeros(ids.shape, dtype=dtype, device=device)
    best = torch.full((tokens, top_k), -math.inf, dtype=dtype, device=device)
    best_ids = torch.zeros((tokens, top_k), dtype=torch.int64, device=device)
    buffers = [torch.empty(_elements(tokens, valid, tile), dtype=dtype, device=device) for _ in range(1 + entropy)]
    for columns in parts(valid, tile[1]):
        width = columns.stop - columns.start
        head = logits.prepare(lm_head[columns])
        for rows in parts(tokens, tile[0]):
            n = rows.stop - rows.start
            z = logits.tile(logits.prepare(hidden[rows]), head, columns, buffers[0][: n * width].view(n, width))
            if ids.shape[1]:
                inside = local[rows] - columns.start
                here = (inside >= 0) & (inside < width)
                at_ids[rows] = torch.where(here, z.gather(1, inside.clamp(0, width - 1)), at_ids[rows])
            if top_k:
                blocks = _block_maxima(z)
                highest = torch.maximum(maximum[rows], blocks.amax(-1))
                _fold_top(z, blocks, best[rows], best_ids[rows], columns.start + start)
            else:
                highest = torch.maximum(maximum[rows], z.amax(-1))
            # z becomes (z - max)/T, at most 0. A row that is -inf so far must give 0, not NaN.
            z.sub_(torch.where(highest == -math.inf, 0.0, highest)[:, None])
            inverse = logits.inverse_temperature(rows)
            if isinstance(inverse, Tensor) or inverse != 1:
                z.mul_(inverse)
            fall = torch.where(total[rows] > 0, (maximum[rows] - highest) * _column(inverse), 0.0)
            if weighted is None:
                e = z.exp_()
            else:
                e = torch.exp(z, out=buffers[1][: n * width].view(n, width))
                if logits.bias is not None:  # 0 * -inf where the bias takes a token out
                    z.clamp_(min=torch.finfo(dtype).min)
                weighted[rows] = fall.exp() * (weighted[rows] + fall * total[rows]) + torch.linalg.vecdot(e, z)
            total[rows] = fall.exp() * total[rows] + e.sum(-1)
            maximum[rows] = highest
    return LocalPart(maximum, total, at_ids, held, weighted, best if top_k else None, best_ids if top_k else None)


def backward(
    hidden: Tensor,
    lm_head: Tensor,
    ids: Tensor,
    logsumexp: Tensor,
    gradient: Tensor,
    logits: LogitMap,
    *,
    start: int,
    valid: int,
    need: tuple[bool, bool, bool],
    tile: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of sum_n g_n log pi(y_n) by recomputing the logits.

        d/dz_v = g (1[v = y] - exp(z_v/T - logsumexp)) / T

    Parameters
    ----------
    ids : the sampled tokens y, global, int64 ``[N]``. logsumexp : over the whole vocabulary, of z/T, ``[N]``.
    gradient : g, ``[N]``. need : which gradients are wanted: hidden, lm_head, bias.

    Returns
    -------
    d_hidden in `arithmetic` ``[N, d]`` (of these columns alone), d_lm_head in lm_head's dtype, d_bias; or None.
    """
    tokens, dtype, device = hidden.shape[0], logits.arithmetic, hidden.device
    d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=device) if need[0] else None
    d_head = torch.zeros_like(lm_head, memory_format=torch.contiguous_format) if need[1] else None
    d_bias = torch.zeros(lm_head.shape[0], dtype=dtype, device=device) if need[2] else None
    local = ids - start
    buffer = torch.empty(_elements(tokens, valid, tile), dtype=dtype, device=device)
    for columns in parts(valid, tile[1]) if tokens else ():
        width = columns.stop - columns.start
        head = logits.prepare(lm_head[columns])
        if d_head is not None:
            in_place = d_head.dtype == dtype
            part = d_head[columns] if in_place else torch.zeros(width, head.shape[1], dtype=dtype, device=device)
        for rows in parts(tokens, tile[0]):
            n = rows.stop - rows.start
            states = logits.prepare(hidden[rows])
            z = logits.tile(states, head, columns, buffer[: n * width].view(n, width))
            capped = z.clone() if logits.softcap is not None else None
            inverse = logits.inverse_temperature(rows)
            if isinstance(inverse, Tensor) or inverse != 1:
                z.mul_(inverse)
            g = (gradient[rows] * _column(inverse))[:, None]
            dz = z.sub_(logsumexp[rows, None]).exp_().mul_(-g)
            inside = (local[rows] - columns.start)[:, None]
            here = (inside >= 0) & (inside < width)
            dz.scatter_add_(1, inside.clamp(0, width - 1), torch.where(here, g, 0.0))
            dx = logits.pull_back(dz, capped)
            if d_bias is not None:
                d_bias[columns] += dx.sum(0)
            dx = dx.to(head.dtype)
            if d_hidden is not None:
                _add_product(d_hidden[rows], dx, head)
            if d_head is not None:
                _add_product(part, dx.t(), states)
        if d_head is not None and not in_place:
            d_head[columns] = part.to(d_head.dtype)
    return d_hidden, d_head, d_bias


def exact_partial(policy: Operands, rollout: Operands, *, kind: str, valid: int, tile: tuple[int, int]) -> Tensor:
    """These columns' part of TV = 1/2 sum_v |mu - pi| ("tv") or KL(mu || pi) ("kl"), ``[N]``.

    In a KL, masses below `KL_FLOOR` count as that inside the logarithms, as in `cppo.divergence.exact_kl`.
    """
    tokens, dtype, device = policy.hidden.shape[0], policy.logits.arithmetic, policy.hidden.device
    total = torch.zeros(tokens, dtype=dtype, device=device)
    both = (policy, rollout)
    buffers = [torch.empty(_elements(tokens, valid, tile), dtype=p.logits.arithmetic, device=device) for p in both]
    floor = math.log(KL_FLOOR)
    for columns in parts(valid, tile[1]):
        heads = [p.logits.prepare(p.lm_head[columns]) for p in both]
        for rows in parts(tokens, tile[0]):
            log_pi, log_mu = (
                _log_probabilities(p, rows, columns, head, buffer)
                for p, head, buffer in zip(both, heads, buffers, strict=True)
            )
            if kind == "tv":
                total[rows] += log_pi.exp_().sub_(log_mu.exp_()).abs_().sum(-1).mul_(0.5)
            else:
                gap = log_mu.clamp(min=floor) - log_pi.clamp_(min=floor)
                total[rows] += torch.linalg.vecdot(log_mu.exp_(), gap)
    return total


def _log_probabilities(p: Operands, rows: slice, columns: slice, head: Tensor, buffer: Tensor) -> Tensor:
    shape = rows.stop - rows.start, columns.stop - columns.start
    z = p.logits.tile(p.logits.prepare(p.hidden[rows]), head, columns, buffer[: math.prod(shape)].view(shape))
    inverse = p.logits.inverse_temperature(rows)
    if isinstance(inverse, Tensor) or inverse != 1:
        z.mul_(inverse)
    return z.sub_(p.logsumexp[rows, None])


def _elements(tokens: int, valid: int, tile: tuple[int, int]) -> int:
    return min(tokens, tile[0]) * min(valid, tile[1])


def _column(inverse: float | Tensor) -> float | Tensor:
    return inverse[:, 0] if isinstance(inverse, Tensor) else inverse


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, added up in `total`'s precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(a, b))


def _block_maxima(z: Tensor) -> Tensor:
    """Largest of each `BLOCK` columns ``[n, ceil(v / BLOCK)]``."""
    rows, width = z.shape
    whole = width // BLOCK * BLOCK
    body = z[:, :whole].unflatten(1, (-1, BLOCK)).amax(-1) if whole else z.new_empty(rows, 0)
    return body if whole == width else torch.cat([body, z[:, whole:].amax(-1, keepdim=True)], 1)


def _fold_top(z: Tensor, blocks: Tensor, best: Tensor, best_ids: Tensor, offset: int) -> None:
    """Update the k largest so far, ``[n, k]``, with a tile; exact.

    The k largest of a row lie in the k blocks with the largest maxima, and only blocks whose maximum beats the k-th
    value so far can add to them. On a CPU those are counted (few after the first tiles); elsewhere that would
    synchronise, and k blocks are taken. Logits of -inf become the lowest finite number, to differ from an empty place.
    """
    k, width, lowest = best.shape[1], z.shape[1], torch.finfo(z.dtype).min
    blocks = blocks.clamp(min=lowest)  # a token at -inf is still better than no token
    count = min(k, blocks.shape[1])
    if z.device.type == "cpu":
        count = min(count, int((blocks > best[:, -1:]).sum(-1).max()))
    if count == 0:
        return
    chosen = blocks.topk(count, -1, sorted=False).indices
    column = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=z.device)).flatten(1)
    beyond = column >= width  # the last block may be short
    values = z.gather(1, column.clamp(max=width - 1)).clamp_(min=lowest).masked_fill_(beyond, -math.inf)
    few = values.topk(min(k, values.shape[1]), -1)
    values = torch.cat([best, few.values], 1)
    ids = torch.cat([best_ids, column.gather(1, few.indices) + offset], 1)
    top = values.topk(k, -1)
    best.copy_(top.values)
    best_ids.copy_(ids.gather(1, top.indices))
