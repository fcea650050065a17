"""Parts 2 and 3 of `benchmarks.scale`: gloo processes that hold slices of the tokens, or columns of the vocabulary.

RANK=... WORLD_SIZE=... MASTER_ADDR=... MASTER_PORT=... python -m benchmarks.scale_ranks context|vocabulary
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cppo
from benchmarks.core import inputs
from cppo.layout_sharded import Shard
from cppo.scoring import VocabShard, score_ids

RULES: dict[str, dict[str, Any]] = {
    "dppo": {"name": "dppo", "divergence": "binary_tv"},
    "cppo fixed": {"name": "cppo", "divergence": "binary_tv", "budget": "fixed"},
    "cppo adaptive": {"name": "cppo", "divergence": "binary_tv", "budget": "adaptive"},
}
CONTEXT = (32, 16384)
VOCABULARY, TOKENS, TOP_K = 151_936, 128, 20
LAYOUTS: dict[str, Callable[[], Shard]] = {"zigzag": Shard.zigzag, "contiguous": Shard.contiguous}


def child(module: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A module of ours in a fresh process with one thread."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> Any:
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"a measurement failed (exit status {process.returncode}): {' '.join(map(str, process.args))}")  # type: ignore[arg-type]
    return json.loads(output.splitlines()[-1])


class Exchange(TorchDispatchMode):
    """Counts collectives and what this rank puts into them, at torch's c10d operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # all-gather: (outputs, inputs, ...); all-reduce: (tensors, ...)
            own = args[1] if func._opname.startswith("allgather") else args[0]
            self.calls.append((func._opname, sum(x.numel() * x.element_size() for x in own)))
        return func(*args, **(kwargs or {}))

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.calls)


def timed(call: Callable[[], object], repeats: int) -> float:
    """Median seconds; all processes start together, the slowest counts."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        call()
        elapsed = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        times.append(elapsed.item())
    return statistics.median(times[1:])


def all_sum(value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def context_formula(rule: str, chunks: int, rows: int, local: int) -> int:
    """Bytes that a rank puts in: sums and prefix sums 8 a chunk and row; the quantile 4 + 1 a token; chunk numbers."""
    gathers = {"dppo": 0, "cppo fixed": 4, "cppo adaptive": 4}[rule]
    quantile = 5 * rows * local if rule == "cppo adaptive" else 0
    orders = 8 * chunks * (gathers + (2 if quantile else 0))
    return 8 * gathers * chunks * rows + quantile + orders


def context_worker() -> dict[str, Any]:
    """One rank of part 2."""
    dist.init_process_group("gloo")
    size, (rows, columns) = dist.get_world_size(), CONTEXT
    policy, rollout, advantages, mask = inputs(rows, columns)
    # Rows that have drifted by different amounts, so that budgets run out here and there: else equality says nothing.
    drift = torch.linspace(0.3, 3, rows)[:, None]
    policy = (rollout + drift * (policy.detach() - rollout)).clamp(max=-1e-6)
    result: dict[str, Any] = {}
    for layout, make in LAYOUTS.items():
        shard = make()
        chunks = len(shard.chunks)

        def mine(x: Tensor, shard: Shard = shard, chunks: int = chunks) -> Tensor:
            parts = x.chunk(size * chunks, dim=1)
            return torch.cat([parts[c] for c in shard.chunks], 1)

        local = mine(policy), mine(rollout), advantages, mine(mask)
        for name, parameters in RULES.items():
            rule = cppo.make_rule(**parameters)
            batch = cppo.TokenBatch(*local, None, None, shard)
            whole_batch = cppo.TokenBatch(policy, rollout, advantages, mask)
            whole = rule(whole_batch)
            with Exchange() as exchange:
                verdict = rule(batch)
            differ = (verdict.reason != mine(whole.reason)).sum().item()
            gap = (verdict.coefficient - mine(whole.coefficient)).abs()[verdict.reason == mine(whole.reason)]
            contributed, collectives = exchange.bytes, len(exchange.calls)
            shares = {r.name: (whole.reason == int(r)).sum().item() / mask.sum().item() for r in cppo.Reason}
            result[f"{name}, {layout}"] = {
                "token_limit_share": shares["TOKEN_LIMIT"],
                "prefix_budget_share": shares["PREFIX_BUDGET"],
                "tokens_judged_differently": all_sum(differ),
                "largest_coefficient_gap": all_sum(gap.max().item()),
                "collectives_a_call": collectives,
                "bytes_contributed_a_rank": contributed,
                "bytes_by_formula": context_formula(name, chunks, rows, local[0].shape[1]),
                "bytes_received_a_rank": contributed * (size - 1),
                "bytes_received_a_row": contributed * (size - 1) / rows,
                "seconds": timed(partial(rule, batch), 5),
                "seconds_unsharded": timed(partial(rule, whole_batch) if dist.get_rank() == 0 else int, 5),
            }
    return result


def vocabulary_worker() -> dict[str, Any]:
    """One rank of part 3."""
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(TOKENS, VOCABULARY, generator=g) * 3).bfloat16()
    ids = torch.randint(VOCABULARY, (TOKENS, TOP_K + 1), generator=g)
    want = logits[:16].double().log_softmax(-1).gather(-1, ids[:16])
    shard = VocabShard.equal(-(-VOCABULARY // size), VOCABULARY)
    stop = min(shard.stop, VOCABULARY)
    mine = torch.nn.functional.pad(logits[:, shard.start : stop], (0, shard.stop - stop))
    del logits
    with Exchange() as exchange:
        got = score_ids(mine, ids, shard=shard).logp
    first = got.clone()
    dist.broadcast(first, 0)
    # what a merge of gathered logits would exchange
    naive = mine.shape[1] * mine.element_size() * (size - 1)
    return {
        "collectives_a_call": len(exchange.calls),
        "bytes_contributed_a_token": exchange.bytes / TOKENS,
        "bytes_by_formula": 4 + 4 * (TOP_K + 2),
        "bytes_received_a_token_if_logits_were_gathered": naive,
        "largest_error_against_float64": (got[:16].double() - want).abs().max().item(),
        "ranks_that_differ_from_rank_0": all_sum(float(not torch.equal(first, got))),
        "seconds": timed(partial(score_ids, mine, ids, shard=shard), 3),
    }


WORKERS = {"context": context_worker, "vocabulary": vocabulary_worker}


def on_ranks(worker: str, size: int) -> Any:
    """What rank 0 of `size` processes measured."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [child("benchmarks.scale_ranks", worker, RANK=str(rank), **common) for rank in range(size)]
    try:
        return [answer(rank) for rank in ranks][0]  # noqa: RUF015 (all must end well)
    finally:
        for rank in ranks:
            rank.kill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(WORKERS[sys.argv[1]]()))
    dist.destroy_process_group()
