"""The kernels that `triton_backend` launches; what they compute, and why so, is said there.

* Matrices are descriptors of row-major [rows, d] and [columns, d]: loads beyond an edge give zeros, stores there do
  nothing, and addresses are 64 bits wide.
* UPCAST is for the interpreter, whose `dot` of bfloat16 silently multiplies the bit patterns.
* Annotations are looked up by Triton's compiler, which knows nothing but `tl`; a `tl.tensor` here may be a number, a
  pointer, a descriptor or None.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found,import-untyped]
import triton.language as tl  # type: ignore[import-not-found,import-untyped]

#: In a sorted list of wanted columns: no further one here.
NEVER = tl.constexpr(2**31 - 1)

#: Arguments that change from batch to batch. Compiling a kernel again whenever one of them becomes or ceases to be a
#: multiple of 16 (or 1) would cost seconds each time and gain nothing.
COUNTS = (
    "tokens",
    "valid",
    "width",
    "ids_per_row",
    "tiles_per_row",
    "row_blocks",
    "column_blocks",
    "splits",
    "tiles_per_split",
)
#: Parts of larger arrays, aligned by chance: likewise.
SLICES = ("bias", "inverse_temperature", "sampled", "logsumexp", "coefficient", "maximum", "total", "weighted")


@triton.jit
def _place(program: tl.tensor, row_blocks: tl.tensor, others: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """The program's block of rows and which of the `others`; neighbours share the other for GROUP blocks of rows."""
    group = program // (GROUP * others)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = program - group * (GROUP * others)
    return first + inside % size, inside // size


@triton.jit
def _product(
    hidden: tl.tensor,
    head: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    d: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """h W^T of one tile, float32 [ROWS, COLUMNS]."""
    x = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(0, d, DEPTH):
        h = hidden.load([row, k])
        w = head.load([column, k])
        if UPCAST:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        x = tl.dot(h, w.T, x, input_precision="ieee")
    return x


@triton.jit
def _logits(
    x: tl.tensor, bias: tl.tensor, columns: tl.tensor, valid: tl.tensor, scale: tl.tensor, softcap: tl.tensor
) -> tl.tensor:
    """z of a tile, and dz/du. Columns beyond `valid` hold anything."""
    if bias is not None:
        x += tl.load(bias + columns, mask=columns < valid, other=0.0)[None, :]
    u = x * scale
    if softcap is None:
        return u, 1.0
    else:
        e = tl.exp(tl.abs(u) * (-2.0 / softcap))  # in [0, 1]: nothing overflows
        r = 1.0 / (1.0 + e)
        tanh = (1.0 - e) * r
        return softcap * tl.where(u < 0, -tanh, tanh), 4.0 * e * r * r


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SLICES)
def forward_kernel(
    hidden: tl.tensor,
    head: tl.tensor,
    bias: tl.tensor,
    inverse_temperature: tl.tensor,  # [N]
    wanted: tl.tensor,  # [N, J] sorted local columns, NEVER where an id is not here; or None
    at_wanted: tl.tensor,  # [N, J]
    maximum: tl.tensor,  # [splits, N]
    total: tl.tensor,  # [splits, N]
    weighted: tl.tensor,  # [splits, N] or None
    tile_maxima: tl.tensor,  # [tiles, N] or None
    tokens: tl.tensor,
    valid: tl.tensor,
    d: tl.tensor,
    ids_per_row: tl.tensor,
    row_blocks: tl.tensor,
    splits: tl.tensor,
    tiles_per_split: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    row_block, split = _place(tl.program_id(0), row_blocks, splits, GROUP)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    inside = rows < tokens
    inverse = tl.load(inverse_temperature + rows, mask=inside, other=1.0)
    highest = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    sums = tl.zeros((ROWS,), dtype=tl.float32)
    weighted_sums = tl.zeros((ROWS,), dtype=tl.float32)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(valid, COLUMNS))
    if wanted is not None:
        mine = rows.to(tl.int64) * ids_per_row
        taken = tl.zeros((ROWS,), dtype=tl.int32)
        following = tl.load(wanted + mine + taken, mask=inside, other=NEVER)
        while tl.min(following) < first_tile * COLUMNS:
            taken += (following < first_tile * COLUMNS).to(tl.int32)
            following = tl.load(wanted + mine + taken, mask=inside & (taken < ids_per_row), other=NEVER)
    for tile in range(first_tile, last_tile):
        column = tile * COLUMNS
        columns = column + tl.arange(0, COLUMNS)
        x = _product(hidden, head, row_block * ROWS, column, d, ROWS, COLUMNS, DEPTH, UPCAST)
        z, _ = _logits(x, bias, columns, valid, scale, softcap)
        z = tl.where((columns < valid)[None, :], z, -float("inf"))
        if wanted is not None:
            while tl.min(following) < column + COLUMNS:
                here = following < column + COLUMNS
                value = tl.sum(tl.where(columns[None, :] == following[:, None], z, 0.0), 1)
                tl.store(at_wanted + mine + taken, value, mask=here)
                taken += here.to(tl.int32)
                following = tl.load(wanted + mine + taken, mask=inside & (taken < ids_per_row), other=NEVER)
        largest = tl.max(z, 1)
        if tile_maxima is not None:
            tl.store(tl.cast(tile, tl.int64) * tokens + (tile_maxima + rows), largest, mask=inside)
        new = tl.maximum(highest, largest)
        # A row that is -inf so far (all its tokens masked by the bias) must give 0, not NaN.
        shift = tl.where(new == -float("inf"), 0.0, new)
        fall = (highest - shift) * inverse
        y = (z - shift[:, None]) * inverse[:, None]
        e = tl.exp(y)
        if weighted is not None:
            moved = tl.where(sums > 0, tl.exp(fall) * (weighted_sums + fall * sums), 0.0)
            weighted_sums = moved + tl.sum(tl.where(e > 0, e * y, 0.0), 1)
        sums = sums * tl.exp(fall) + tl.sum(e, 1)
        highest = new
    to = split.to(tl.int64) * tokens + rows
    tl.store(maximum + to, highest, mask=inside)
    tl.store(total + to, sums, mask=inside)
    if weighted is not None:
        tl.store(weighted + to, weighted_sums, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def top_kernel(
    hidden: tl.tensor,  # pointer to [N, d]
    hidden_stride: tl.tensor,
    head: tl.tensor,
    bias: tl.tensor,
    pairs: tl.tensor,  # [n * tiles a row]: flat positions (row, place), those of one tile side by side
    block_tile: tl.tensor,  # [blocks]
    block_first: tl.tensor,  # [blocks] a block's first position in `pairs`, and the one after its last
    block_last: tl.tensor,
    candidates: tl.tensor,  # [n * tiles a row, COLUMNS]
    tiles_per_row: tl.tensor,
    valid: tl.tensor,
    d: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    positions = tl.load(block_first + block) + tl.arange(0, ROWS)
    inside = positions < tl.load(block_last + block)
    column = tl.load(block_tile + block).to(tl.int32) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    pair = tl.load(pairs + positions, mask=inside, other=0)
    states = hidden + (pair // tiles_per_row)[:, None] * hidden_stride
    x = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(0, d, DEPTH):
        depth = k + tl.arange(0, DEPTH)
        h = tl.load(states + depth[None, :], mask=inside[:, None] & (depth < d)[None, :], other=0.0)
        w = head.load([column, k])
        if UPCAST:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        x = tl.dot(h, w.T, x, input_precision="ieee")
    z, _ = _logits(x, bias, columns, valid, scale, softcap)
    z = tl.where((columns < valid)[None, :], z, -float("inf"))
    to = candidates + pair[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(to, z, mask=inside[:, None])


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SLICES)
def gradient_kernel(
    hidden: tl.tensor,
    head: tl.tensor,
    bias: tl.tensor,
    inverse_temperature: tl.tensor,  # [N]
    sampled: tl.tensor,  # [N] column of y, counted from the first of these; others lie elsewhere
    logsumexp: tl.tensor,  # [N]
    coefficient: tl.tensor,  # [N] g s/T
    gradient: tl.tensor,  # descriptor of d loss/dx [N, width]
    tokens: tl.tensor,
    width: tl.tensor,
    d: tl.tensor,
    row_blocks: tl.tensor,
    column_blocks: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    row_block, column_block = _place(tl.program_id(0), row_blocks, column_blocks, GROUP)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    inside = rows < tokens
    column = column_block * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    x = _product(hidden, head, row_block * ROWS, column, d, ROWS, COLUMNS, DEPTH, UPCAST)
    z, slope = _logits(x, bias, columns, width, scale, softcap)
    inverse = tl.load(inverse_temperature + rows, mask=inside, other=1.0)
    log_total = tl.load(logsumexp + rows, mask=inside, other=0.0)
    g = tl.load(coefficient + rows, mask=inside, other=0.0)
    y = tl.load(sampled + rows, mask=inside, other=-1)
    p = tl.exp(z * inverse[:, None] - log_total[:, None])
    dx = g[:, None] * (tl.where(columns[None, :] == y[:, None], 1.0, 0.0) - p) * slope
    gradient.store([row_block * ROWS, column], dx.to(gradient.dtype))


@triton.jit(do_not_specialize=COUNTS)
def divergence_kernel(
    policy_hidden: tl.tensor,
    policy_head: tl.tensor,
    policy_bias: tl.tensor,
    policy_inverse: tl.tensor,
    policy_logsumexp: tl.tensor,
    policy_d: tl.tensor,
    policy_scale: tl.tensor,
    policy_softcap: tl.tensor,
    rollout_hidden: tl.tensor,
    rollout_head: tl.tensor,
    rollout_bias: tl.tensor,
    rollout_inverse: tl.tensor,
    rollout_logsumexp: tl.tensor,
    rollout_d: tl.tensor,
    rollout_scale: tl.tensor,
    rollout_softcap: tl.tensor,
    partial: tl.tensor,  # [splits, N]
    tokens: tl.tensor,
    valid: tl.tensor,
    row_blocks: tl.tensor,
    splits: tl.tensor,
    tiles_per_split: tl.tensor,
    log_floor: tl.tensor,
    KL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    row_block, split = _place(tl.program_id(0), row_blocks, splits, GROUP)
    row = row_block * ROWS
    rows = row + tl.arange(0, ROWS)
    inside = rows < tokens
    inverse_pi = tl.load(policy_inverse + rows, mask=inside, other=1.0)
    inverse_mu = tl.load(rollout_inverse + rows, mask=inside, other=1.0)
    total_pi = tl.load(policy_logsumexp + rows, mask=inside, other=0.0)
    total_mu = tl.load(rollout_logsumexp + rows, mask=inside, other=0.0)
    sums = tl.zeros((ROWS,), dtype=tl.float32)
    first_tile = split * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(valid, COLUMNS))):
        column = tile * COLUMNS
        columns = column + tl.arange(0, COLUMNS)
        x = _product(policy_hidden, policy_head, row, column, policy_d, ROWS, COLUMNS, DEPTH, UPCAST)
        z, _ = _logits(x, policy_bias, columns, valid, policy_scale, policy_softcap)
        log_pi = z * inverse_pi[:, None] - total_pi[:, None]
        x = _product(rollout_hidden, rollout_head, row, column, rollout_d, ROWS, COLUMNS, DEPTH, UPCAST)
        z, _ = _logits(x, rollout_bias, columns, valid, rollout_scale, rollout_softcap)
        log_mu = z * inverse_mu[:, None] - total_mu[:, None]
        if KL:
            # NaN stays NaN: a floor must not turn a broken row into a number.
            above_mu = tl.maximum(log_mu, log_floor, propagate_nan=tl.PropagateNan.ALL)
            above_pi = tl.maximum(log_pi, log_floor, propagate_nan=tl.PropagateNan.ALL)
            term = tl.exp(log_mu) * (above_mu - above_pi)
        else:
            term = 0.5 * tl.abs(tl.exp(log_pi) - tl.exp(log_mu))
        sums += tl.sum(tl.where((columns < valid)[None, :], term, 0.0), 1)
    tl.store(partial + split.to(tl.int64) * tokens + rows, sums, mask=inside)


#: Whether TRITON_INTERPRET=1 was set when this module was imported.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
