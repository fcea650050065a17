"""Scoring by tiles in Triton, for CUDA: what `torch_backend` computes, with less traffic between memory and processor.

    x = h W^T + b,   u = s x,   z = c tanh(u/c),   log pi = log_softmax(z/T)                  (`cppo.scoring.logits`)

* Forward: one kernel. A program owns a block of tokens and a contiguous part of the vocabulary, makes one tile of z
  after the other, and folds each into a running maximum, a sum of exponentials (shifted by that maximum, rescaled when
  it moves) and, for the entropy, their weighted sum. The few parts are joined in torch.
* Logits at wanted ids come out of the same tiles, so that they carry the same rounding as the sum, and log pi is not
  above 0. Each row's ids are sorted first; a program then only ever compares with the next one. That costs a pass over
  the registers of a tile for each id that a row has in it (about one a tile at 21 ids a token), not one for each id.
* Top k: exact. The k largest of a row lie in the k tiles with the largest maxima. The forward pass keeps the maxima; a
  second kernel makes those tiles again, for all rows that want the same tile at once. That is k * columns / V of a
  product (3% at k = 20), where another pass would be a whole one, and a list of the k largest so far, kept by the first
  kernel, would be compared with all of every tile.
* Backward: a kernel makes z again and writes d loss/dx of a tile [rows, columns] in the inputs' dtype; the two products
  with it are cuBLAS', adding up in float32. Four products altogether, the fewest possible without keeping logits.
* Exact divergences: both policies' tiles in one program, one product each.

Precision. Logits and all sums are float32 whatever the inputs: bfloat16 tiles go to the tensor cores, which add up in
float32; float32 tiles are multiplied in full precision ("ieee": TF32 would round the inputs to 11 bits), which tensor
cores do not do, and that is slow. A softcapped logit has an absolute error of about 1e-7 c. float16 (where d loss/dx
would underflow) and float64 are refused. No atomics: the order of every sum depends on the number of tokens and the
device alone, and results repeat to the last bit.

State. The kernels were run in Triton's interpreter (TRITON_INTERPRET=1), and compiled for Ampere, Hopper and Blackwell
without running there: no speed is claimed, and the sizes in `_gpu_blocks` are those that such products usually want.
They are written for Hopper and later, whose copy engine takes the descriptors that tiles are loaded by; before Hopper
they compile to plain loads that are neither wide nor ahead of time, and `torch_backend` is the better choice.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-not-found,import-untyped]
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-not-found,import-untyped]

from cppo.divergence import KL_FLOOR
from cppo.scoring.logits import LogitMap, Operands, parts
from cppo.scoring.parallel import LocalPart
from cppo.scoring.triton_kernels import (
    INTERPRETED,
    NEVER,
    divergence_kernel,
    forward_kernel,
    gradient_kernel,
    top_kernel,
)

#: Elements of the recomputed tiles of the top k, float32: 2^25 are 128 MiB.
TOP_ELEMENTS = 2**25


class Blocks(NamedTuple):
    """How a kernel is cut up.

    rows, columns : tokens and vocabulary entries of a tile. depth : of the hidden size, in one step of the product.
    warps, stages : a program's threads / 32, and how many steps are loaded ahead. group : how many blocks of rows run
    side by side on the same columns. parts : at least into as many the vocabulary is split, into more where there would
    be fewer `programs`. About group * parts programs run at once; together they read `group` blocks of rows and `parts`
    tiles of columns again and again, which the second-level cache should hold (16 MB at d = 2048, of 50 on an H200).
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int
    parts: int
    programs: int


def blocks_for(device: torch.device, dtype: torch.dtype) -> Blocks:
    """By device and dtype of the inputs."""
    if device.type != "cuda":  # the interpreter
        return Blocks(rows=32, columns=64, depth=32, warps=4, stages=1, group=4, parts=8, programs=1)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _gpu_blocks(torch.cuda.get_device_capability(device)[0], dtype, processors)


def _gpu_blocks(generation: int, dtype: torch.dtype, processors: int) -> Blocks:
    """`generation` is the compute capability's first number: 9 for H100 and H200, 10 for B200."""
    # a program runs for milliseconds: four for each processor, so that the last ones do not leave the others idle
    programs = 4 * processors
    if dtype == torch.float32:
        return Blocks(64, 64, 16, warps=4, stages=2, group=16, parts=8, programs=programs)
    if generation in (9, 10):
        return Blocks(128, 256, 64, warps=8, stages=4, group=16, parts=8, programs=programs)
    return Blocks(128, 128, 32, warps=8, stages=3, group=16, parts=8, programs=programs)


# -- what the scorer calls ---------------------------------------------------------------------------------------------


@torch.no_grad()
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
    """Reduce the logits of N tokens over this process's columns: `torch_backend.forward`, in float32.

    `tile` is not used: no tile of logits leaves the processor. Memory beyond the result: 12 bytes for each token and
    part of the vocabulary (8 parts, more where tokens are few); with `top_k` also 4 bytes for each token and 256
    columns (2.4 kB at V = 151,936) and `TOP_ELEMENTS` floats.

    Raises
    ------
    ValueError : a dtype or device that these kernels do not do; the message names the backend that does.
    """
    _check(hidden, lm_head, logits)
    tokens, device = hidden.shape[0], hidden.device
    local = ids - start
    held = (local >= 0) & (local < valid)
    at_ids = torch.zeros(ids.shape, dtype=torch.float32, device=device)
    if tokens == 0 or valid == 0:
        empty = torch.zeros(tokens, dtype=torch.float32, device=device)
        best, best_ids = _no_top(tokens, top_k, device)
        maximum = torch.full_like(empty, -math.inf)
        return LocalPart(maximum, empty, at_ids, held, empty.clone() if entropy else None, best, best_ids)
    hidden, head = _operand(hidden), _operand(lm_head[:valid])
    blocks = blocks_for(device, hidden.dtype)
    tiles, row_blocks = triton.cdiv(valid, blocks.columns), triton.cdiv(tokens, blocks.rows)
    splits, tiles_per_split = _split(tiles, row_blocks, blocks)
    inverse = _inverse_temperature(logits, tokens, device)
    wanted, order = torch.where(held, local, NEVER.value).to(torch.int32).sort(dim=1)
    in_order = torch.zeros_like(at_ids)
    statistics = torch.empty((3 if entropy else 2, splits, tokens), dtype=torch.float32, device=device)
    maxima = torch.empty((tiles, tokens), dtype=torch.float32, device=device) if top_k else None
    some = ids.shape[1] > 0
    _launch(
        forward_kernel,
        row_blocks * splits,
        blocks,
        _tiled(hidden, blocks.rows, blocks),
        _tiled(head, blocks.columns, blocks),
        _bias(logits),
        inverse,
        wanted if some else None,
        in_order if some else None,
        statistics[0],
        statistics[1],
        statistics[2] if entropy else None,
        maxima,
        tokens,
        valid,
        hidden.shape[1],
        ids.shape[1],
        row_blocks,
        splits,
        tiles_per_split,
        logits.logit_scale,
        logits.softcap,
        GROUP=blocks.group,
    )
    at_ids.scatter_(1, order, in_order)
    maximum, total, weighted = _join(statistics, inverse)
    best, best_ids = (None, None) if maxima is None else _top(hidden, head, maxima, logits, top_k, start, blocks)
    return LocalPart(maximum, total, at_ids, held, weighted, best, best_ids)


@torch.no_grad()
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
    """Gradients of sum_n g_n log pi(y_n) by recomputing the logits: `torch_backend.backward`, in float32.

        d/dx_v = g (1[v = y] - exp(z_v/T - logsumexp)) (1 - (z_v/c)^2) s/T

    Memory beyond the results: d/dx of one `tile` in the inputs' dtype and, for bfloat16, the part of the lm_head's
    gradient that belongs to its columns in float32.

    Raises
    ------
    ValueError : as `forward`.
    """
    _check(hidden, lm_head, logits)
    tokens, device, dtype = hidden.shape[0], hidden.device, hidden.dtype
    d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=device) if need[0] else None
    d_head = torch.zeros_like(lm_head, memory_format=torch.contiguous_format) if need[1] else None
    d_bias = torch.zeros(lm_head.shape[0], dtype=torch.float32, device=device) if need[2] else None
    if tokens == 0 or valid == 0 or not any(need):
        return d_hidden, d_head, d_bias
    states, head = _operand(hidden), _operand(lm_head[:valid])
    blocks = blocks_for(device, dtype)
    inverse, bias = _inverse_temperature(logits, tokens, device), _bias(logits)
    coefficient = gradient.float() * inverse * logits.logit_scale
    logsumexp = logsumexp.float().contiguous()
    tile_rows, tile_columns = min(tile[0], tokens), min(tile[1], valid)
    # rows of whole 16 bytes, as descriptors want them
    scratch = torch.empty((tile_rows, triton.cdiv(tile_columns, 8) * 8), dtype=dtype, device=device)
    for columns in parts(valid, tile_columns):
        width = columns.stop - columns.start
        # A column elsewhere must not turn into one of these, whatever its 64 bits are cut down to.
        y = ids - (start + columns.start)
        y = torch.where((y >= 0) & (y < width), y, -1).to(torch.int32)
        if d_head is not None:
            in_place = dtype == torch.float32
            part = d_head[columns] if in_place else torch.zeros((width, lm_head.shape[1]), device=device)
        for rows in parts(tokens, tile_rows):
            n = rows.stop - rows.start
            dx = scratch[:n, :width]
            row_blocks, column_blocks = triton.cdiv(n, blocks.rows), triton.cdiv(width, blocks.columns)
            _launch(
                gradient_kernel,
                row_blocks * column_blocks,
                blocks,
                _tiled(states[rows], blocks.rows, blocks),
                _tiled(head[columns], blocks.columns, blocks),
                None if bias is None else bias[columns],
                inverse[rows],
                y[rows],
                logsumexp[rows],
                coefficient[rows],
                TensorDescriptor.from_tensor(dx, [blocks.rows, blocks.columns]),
                n,
                width,
                states.shape[1],
                row_blocks,
                column_blocks,
                logits.logit_scale,
                logits.softcap,
                GROUP=blocks.group,
            )
            if d_hidden is not None:
                _add_product(d_hidden[rows], dx, lm_head[columns])
            if d_head is not None:
                _add_product(part, dx.t(), hidden[rows])
            if d_bias is not None:
                d_bias[columns] += dx.sum(0, dtype=torch.float32)
        if d_head is not None and not in_place:
            d_head[columns] = part.to(dtype)
    return d_hidden, d_head, d_bias


@torch.no_grad()
def exact_partial(
    policy: Operands, rollout: Operands, *, kind: str, valid: int, tile: tuple[int, int] | None = None
) -> Tensor:
    """These columns' part of TV = 1/2 sum_v |mu - pi| ("tv") or KL(mu || pi) ("kl"), float32 ``[N]``.

    In a KL, masses below `KL_FLOOR` count as that inside the logarithms, as in `cppo.divergence.exact_kl`. `tile` is
    not used. Memory beyond the result: 4 bytes for each token and part of the vocabulary.

    Raises
    ------
    ValueError : as `forward`, or the policies' dtypes differ.
    """
    for given in (policy, rollout):
        _check(given.hidden, given.lm_head, given.logits)
    if policy.hidden.dtype != rollout.hidden.dtype:
        raise ValueError(
            f"the policy's hidden states are {policy.hidden.dtype}, the rollout policy's {rollout.hidden.dtype}: cast "
            'one of them, or use backend="torch".'
        )
    tokens, device = policy.hidden.shape[0], policy.hidden.device
    if tokens == 0 or valid == 0:
        return torch.zeros(tokens, dtype=torch.float32, device=device)
    # two tiles of logits at a time: half as many columns each, so that both fit into the registers
    blocks = blocks_for(device, policy.hidden.dtype)
    blocks = blocks._replace(columns=blocks.columns // 2)
    tiles, row_blocks = triton.cdiv(valid, blocks.columns), triton.cdiv(tokens, blocks.rows)
    splits, tiles_per_split = _split(tiles, row_blocks, blocks)
    partial = torch.empty((splits, tokens), dtype=torch.float32, device=device)
    arguments: list[Any] = []
    for given in (policy, rollout):
        hidden = _operand(given.hidden)
        arguments += [
            _tiled(hidden, blocks.rows, blocks),
            _tiled(_operand(given.lm_head[:valid]), blocks.columns, blocks),
            _bias(given.logits),
            _inverse_temperature(given.logits, tokens, device),
            given.logsumexp.float().contiguous(),
            hidden.shape[1],
            given.logits.logit_scale,
            given.logits.softcap,
        ]
    _launch(
        divergence_kernel,
        row_blocks * splits,
        blocks,
        *arguments,
        partial,
        tokens,
        valid,
        row_blocks,
        splits,
        tiles_per_split,
        math.log(KL_FLOOR),
        KL=kind == "kl",
        GROUP=blocks.group,
    )
    return partial.sum(0)


# -- around the kernels ------------------------------------------------------------------------------------------------


def _check(hidden: Tensor, lm_head: Tensor, logits: LogitMap) -> None:
    if hidden.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f'hidden is on {hidden.device}, but Triton\'s kernels need CUDA: use backend="torch".')
    for name, dtype in (("hidden", hidden.dtype), ("lm_head", lm_head.dtype)):
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f'{name} is {dtype}, but the Triton kernels take bfloat16 or float32: use backend="torch".'
            )
    if lm_head.dtype != hidden.dtype:
        raise ValueError(f"lm_head is {lm_head.dtype}, but hidden is {hidden.dtype}: cast one of them.")
    if logits.arithmetic != torch.float32:
        raise ValueError(f'logits_dtype is {logits.dtype}, but the Triton kernels add in float32: use backend="torch".')


def _operand(matrix: Tensor) -> Tensor:
    """`matrix` as descriptors want it: rows of whole 16 bytes, side by side. Itself where it is so already (every
    lm_head that is a parameter of its own with d a multiple of 8); else a copy, with zeros behind each row.
    """
    per_16_bytes = 16 // matrix.element_size()
    strides_fit = matrix.stride(1) == 1 and matrix.stride(0) % per_16_bytes == 0 and matrix.stride(0) > 0
    if strides_fit and matrix.data_ptr() % 16 == 0:
        return matrix
    missing = -matrix.shape[1] % per_16_bytes
    return torch.nn.functional.pad(matrix, (0, missing)).clone(memory_format=torch.contiguous_format)


def _tiled(matrix: Tensor, size: int, blocks: Blocks) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [size, blocks.depth])


def _launch(kernel: Any, programs: int, blocks: Blocks, *arguments: Any, **constants: Any) -> None:
    first = next(x for x in arguments if isinstance(x, Tensor))
    with torch.cuda.device_of(first):  # Triton launches on the current device, wherever the tensors are
        kernel[(programs,)](
            *arguments,
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            DEPTH=blocks.depth,
            UPCAST=INTERPRETED,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            **constants,
        )


def _split(tiles: int, row_blocks: int, blocks: Blocks) -> tuple[int, int]:
    """(parts of the vocabulary, tiles in each)."""
    parts = min(tiles, max(blocks.parts, triton.cdiv(blocks.programs, row_blocks)))
    each = triton.cdiv(tiles, parts)
    return triton.cdiv(tiles, each), each


def _bias(logits: LogitMap) -> Tensor | None:
    return None if logits.bias is None else logits.bias.float().contiguous()


def _inverse_temperature(logits: LogitMap, tokens: int, device: torch.device) -> Tensor:
    """1/T, float32 ``[N]``."""
    inverse = logits.inverse_temperature(slice(None))
    if isinstance(inverse, Tensor):
        return inverse.reshape(tokens).contiguous()
    return torch.full((tokens,), inverse, dtype=torch.float32, device=device)


def _join(statistics: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(maximum, total, weighted) of all parts of the vocabulary from ``[2 or 3, splits, N]``."""
    highest, sums = statistics[0], statistics[1]
    maximum = highest.amax(0)
    # a part whose columns are all -inf has sum 0, and its difference to the maximum may be NaN
    fall = torch.where(highest == -math.inf, 0.0, (highest - maximum) * inverse)
    total = (fall.exp() * sums).sum(0)
    if statistics.shape[0] == 2:
        return maximum, total, None
    return maximum, total, (fall.exp() * (statistics[2] + fall * sums)).sum(0)


def _no_top(tokens: int, k: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    if k == 0:
        return None, None
    best = torch.full((tokens, k), -math.inf, dtype=torch.float32, device=device)
    return best, torch.zeros((tokens, k), dtype=torch.int64, device=device)


def _top(
    hidden: Tensor, head: Tensor, maxima: Tensor, logits: LogitMap, k: int, start: int, blocks: Blocks
) -> tuple[Tensor | None, Tensor | None]:
    """The k largest z of every row and their global ids from the maxima of its tiles ``[tiles, N]``.

    The tiles to be made again are sorted, so that rows which want the same one are multiplied together. Nothing here
    looks at values from the host: the number of blocks is bounded from above, and those beyond have no rows.
    """
    tiles, tokens = maxima.shape
    device, valid, width = hidden.device, head.shape[0], blocks.columns
    best, best_ids = _no_top(tokens, k, device)
    assert best is not None and best_ids is not None
    count = min(k, tiles)
    few = min(k, count * width)
    for rows in parts(tokens, max(1, TOP_ELEMENTS // (count * width))):
        n = rows.stop - rows.start
        chosen = maxima[:, rows].topk(count, dim=0, sorted=False).indices.t().contiguous()  # [n, count]
        by_tile, pairs = chosen.flatten().sort()
        edges = torch.searchsorted(by_tile, torch.arange(tiles + 1, device=device))
        first, last = edges[:-1], edges[1:]
        needed = (last - first + (blocks.rows - 1)) // blocks.rows
        needed_before = needed.cumsum(0) - needed
        bound = n * count // blocks.rows + min(tiles, n * count)
        block = torch.arange(bound, device=device)
        tile = torch.searchsorted(needed_before + needed, block, right=True)
        tile.clamp_(max=tiles - 1)
        block_first = first[tile] + (block - needed_before[tile]) * blocks.rows  # at or after `last` where not needed
        candidates = torch.empty((n * count, width), dtype=torch.float32, device=device)
        _launch(
            top_kernel,
            bound,
            blocks,
            hidden[rows],
            hidden.stride(0),
            _tiled(head, blocks.columns, blocks),
            _bias(logits),
            pairs,
            tile,
            block_first,
            last[tile],
            candidates,
            count,
            valid,
            hidden.shape[1],
            logits.logit_scale,
            logits.softcap,
        )
        found = candidates.view(n, count * width).topk(few, dim=1)
        best[rows, :few] = found.values
        column = chosen.gather(1, found.indices // width) * width + found.indices % width
        best_ids[rows, :few] = column.clamp_(max=valid - 1) + start
    return best, best_ids


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, added up in `total`'s float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # the interpreter
        total.addmm_(a.float(), b.float())
