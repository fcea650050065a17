"""How cost grows: the rule against tokens, context- and vocabulary-parallel exchange, bytes of a rollout's top K.

    python -m benchmarks.scale [--json PATH] [--figure PATH] [--parts rules ...] [--largest 1e8]

1. Rules. Time and memory of verdict + loss (float32, rows of 8192 as in `benchmarks.core`) from 1e5 to 1e8 tokens. Each
   point is a fresh process with one thread for either. Memory is the growth of the peak resident set from "inputs
   exist" to "the loss exists" (Linux: VmHWM, reset before; glibc returns freed tensors at once). Time is the median CPU
   time of calls, with glibc told to keep freed tensors, as PyTorch does on GPUs; by default it asks the kernel for new
   pages for every tensor above 32 MiB, which one series shows. What would not fit into the limit in one piece is left
   out and says so; micro-batches of 64 rows show what a trainer does instead. Linear means: slope 1 of log time (log
   memory) against log tokens.
2. Context parallelism. 2, 4 and 8 gloo processes hold slices of [32, 16384]. Verdicts are compared with the unsharded
   ones; what crosses the network is counted at torch's c10d operators and compared with the formula. Times say little:
   all processes share the cores of this machine.
3. Vocabulary parallelism. The same for `cppo.scoring.score_ids` with the vocabulary of Qwen3 (151,936).
4. Top-K records. Bytes a token of mu's top 20 as tensors, as pickled Python lists and as Python lists in memory, and
   what float16 log-probabilities do to the divergence.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import cppo
from benchmarks.core import inputs, write_json
from benchmarks.scale_ranks import CONTEXT, RULES, TOKENS, TOP_K, VOCABULARY, answer, child, on_ranks
from cppo.divergence import topk_tv

#: Part 1: rule, layout, and how glibc treats freed tensors while time is measured.
SERIES = {
    **{name: (name, "padded", "kept") for name in RULES},
    "cppo fixed, packed": ("cppo fixed", "packed", "kept"),
    "cppo adaptive, packed": ("cppo adaptive", "packed", "kept"),
    "cppo adaptive, micro-batches": ("cppo adaptive", "micro-batches", "kept"),
    "cppo adaptive, packed micro-batches": ("cppo adaptive", "packed micro-batches", "kept"),
    "cppo adaptive, default malloc": ("cppo adaptive", "padded", "default"),
}
MALLOC = {
    "returned": {"MALLOC_MMAP_THRESHOLD_": "65536"},
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)},
    "default": {},
}
COLOURS = ("#666666", "#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#000000")
PARTS = ("rules", "context", "vocabulary", "records")
COLUMNS = 8192
MICRO_BATCH = 64
RANKS = (2, 4, 8)


# -- 1. the rule against tokens --------------------------------------------------------------------------------------


def system_bytes(file: str, key: str) -> int:
    """A figure of /proc: VmRSS and VmHWM of this process (/proc/self/status), MemAvailable (/proc/meminfo)."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {key} in {file}: the memory figures need Linux.")


def prepare(series: str, tokens: int) -> tuple[Callable[[], object], list[Tensor]]:
    """The call to measure, and its inputs. `tokens` counts places of padded rows and tokens of packs."""
    rule_name, layout, _ = SERIES[series]
    rule = cppo.make_rule(**RULES[rule_name])
    packed, pieces = layout.startswith("packed"), layout.endswith("micro-batches")
    # lengths are uniform over the upper half of a row: three quarters of the places are tokens
    policy, rollout, advantages, mask = inputs(max(1, round(tokens / (0.75 if packed else 1) / COLUMNS)), COLUMNS)
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    rows = advantages.shape[0]
    if packed:
        policy, rollout = policy.detach()[mask].requires_grad_(), rollout[mask]
        mask = torch.ones(policy.shape[0], dtype=torch.bool)

    def judge(first: int, end: int) -> Tensor:
        start, stop = (int(edges[first]), int(edges[end])) if packed else (first, end)
        boundaries = edges[first : end + 1] - start if packed else None
        data = policy[start:stop], rollout[start:stop], advantages[first:end], mask[start:stop]
        batch = cppo.TokenBatch(*data, boundaries)
        return cppo.token_loss(batch, rule(batch).coefficient)

    def call() -> None:
        size = MICRO_BATCH if pieces else rows
        for first in range(0, rows, size):
            judge(first, min(first + size, rows))

    return call, [policy, rollout, advantages, mask]


def measure_memory(series: str, tokens: int) -> dict[str, float]:
    """Bytes of the peak of one call above the inputs, in this process."""
    torch.set_num_threads(1)
    prepare(series, 1_000_000)[0]()  # lazy imports and pages of the libraries are not the rule's memory
    call, data = prepare(series, tokens)
    before = system_bytes("/proc/self/status", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    call()
    return {
        "tokens": data[0].numel(),
        "peak_bytes": system_bytes("/proc/self/status", "VmHWM") - before,
        "input_bytes": sum(x.numel() * x.element_size() for x in data),
    }


def measure_time(series: str, tokens: int) -> dict[str, float]:
    """CPU seconds of a call: other programs on the machine do not count, as wall time would have them."""
    torch.set_num_threads(1)
    prepare(series, 20_000)[0]()
    call = prepare(series, tokens)[0]
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 2 and len(times) < 100):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return {"seconds": statistics.median(times[1:])}  # the first call finds no memory to reuse


MEASURES = {"memory": measure_memory, "time": measure_time}


def slope(points: Sequence[dict[str, float]], key: str) -> float:
    """Least squares of log(value) against log(tokens)."""
    x = [math.log(p["tokens"]) for p in points]
    y = [math.log(p[key]) for p in points]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def rule_cost(
    largest: float, limit_gib: float, step: Callable[[str], None], done: Callable[[], object]
) -> dict[str, Any]:
    """Every series at 1e5, 1e6, ... tokens; a point that would need more than `limit_gib` is left out."""
    result: dict[str, Any] = {}
    for series, (_, _, malloc) in SERIES.items():
        points: list[dict[str, float]] = []
        left_out = []
        for exponent in range(5, round(math.log10(largest)) + 1):
            step(f"{series}, 1e{exponent} tokens")
            needed = 10 * (points[-1]["peak_bytes"] + points[-1]["input_bytes"]) / 2**30 if points else 0.0
            if needed > min(limit_gib, 0.7 * system_bytes("/proc/meminfo", "MemAvailable") / 2**30):
                left_out.append({"tokens": 10**exponent, "estimated_gib": needed})
                done()
                continue
            what = ("--series", series, "--tokens", str(10**exponent))
            memory = answer(child("benchmarks.scale", "--measure", "memory", *what, **MALLOC["returned"]))
            points.append({**memory, **answer(child("benchmarks.scale", "--measure", "time", *what, **MALLOC[malloc]))})
            done()
        for point in points:
            point["ns_per_token"] = point["seconds"] / point["tokens"] * 1e9
            point["bytes_per_token"] = point["peak_bytes"] / point["tokens"]
        result[series] = {
            "points": points,
            "left_out": left_out,
            "slope_seconds": slope(points, "seconds"),
            "slope_peak": slope(points, "peak_bytes"),
        }
    return result


# -- 4. records of mu's top K ------------------------------------------------------------------------------------------


def vllm_containers(ids: Tensor, top: Tensor) -> dict[str, float]:
    """Bytes a token in vLLM's own two containers of log-probabilities; nothing where vLLM is not installed."""
    try:
        from vllm.logprobs import (  # type: ignore[import-not-found, unused-ignore]
            append_logprobs_for_next_position,
            create_sample_logprobs,
        )
    except ImportError:
        return {}
    found = {}
    for kind in ("dictionaries", "dictionaries_with_strings", "flat_lists", "flat_lists_with_strings"):
        tracemalloc.start()
        kept = create_sample_logprobs(kind.startswith("flat"))
        for row, values in zip(ids.tolist(), top.tolist(), strict=True):
            strings = [f"word{i}" for i in [row[-1], *row]] if kind.endswith("strings") else [None] * (TOP_K + 1)
            append_logprobs_for_next_position(kept, [row[-1], *row], [values[-1], *values], strings, TOP_K, TOP_K)
        found[kind] = tracemalloc.get_traced_memory()[0] / len(kept)
        tracemalloc.stop()
    return found


def topk_records() -> dict[str, float]:
    """Bytes a token of mu's top 20 in the forms it takes on its way, and the error that float16 makes in D."""
    g = torch.Generator().manual_seed(0)
    tokens = 512
    logits = torch.randn(tokens, VOCABULARY, generator=g) * 2
    logits += torch.arange(VOCABULARY).add(1).log().neg() * 1.5  # a long tail: mu's top 20 hold most of the mass
    mu = logits.log_softmax(-1)
    pi = (logits + 0.3 * torch.randn(tokens, VOCABULARY, generator=g)).log_softmax(-1)
    top, ids = mu.topk(TOP_K)
    ids = torch.randperm(VOCABULARY, generator=g)[ids]  # in a real vocabulary likely ids are spread
    sampled = mu.exp().multinomial(1, generator=g)
    at = mu.topk(TOP_K).indices
    inside = (at == sampled).any(-1)
    own, theirs = pi.gather(-1, sampled)[:, 0], mu.gather(-1, sampled)[:, 0]
    exact = topk_tv(pi.gather(-1, at), top, own, theirs, inside)
    rounded = topk_tv(pi.gather(-1, at), top.half(), own, theirs, inside)
    error = (exact - rounded).abs()
    tracemalloc.start()
    as_lists = (ids.tolist(), top.tolist())
    in_memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    containers = {f"vllm_{kind}_in_memory": size for kind, size in vllm_containers(ids, top).items()}
    return {
        **containers,
        "tensors_int32_float32": (ids.int().nbytes + top.nbytes) / tokens,
        "packed_3_bytes_float16": TOP_K * (3 + 2),
        "pickled_python_lists": len(pickle.dumps(as_lists, protocol=5)) / tokens,
        "python_lists_in_memory": in_memory / tokens,
        "mean_tv": exact.mean().item(),
        "mean_error_of_tv_by_float16": error.mean().item(),
        "largest_error_of_tv_by_float16": error.max().item(),
    }


# -- report ------------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> None:
    print(f"verdict + loss, one thread, rows of {COLUMNS}; ns and bytes per token above the inputs")
    for name, series in result.get("rules", {}).items():
        cells = "  ".join(
            f"{p['tokens']:.0e}: {p['ns_per_token']:5.1f} ns {p['bytes_per_token']:5.1f} B" for p in series["points"]
        )
        print(f"  {name:35s} {cells}   slopes {series['slope_seconds']:.3f}, {series['slope_peak']:.3f}")
        for p in series["left_out"]:
            print(f"  {'':35s} {p['tokens']:.0e}: about {p['estimated_gib']:.0f} GiB in one piece, left out")
    print(f"context parallel, {list(CONTEXT)}: tokens judged differently, collectives, bytes received a row, seconds")
    for size, cases in result.get("context", {}).items():
        for name, case in cases.items():
            agrees = "as the formula" if case["bytes_contributed_a_rank"] == case["bytes_by_formula"] else "NOT formula"
            print(
                f"  {size} ranks, {name:26s} {case['tokens_judged_differently']:3.0f} {case['collectives_a_call']:3d} "
                f"{case['bytes_received_a_row']:9.0f} ({agrees}) {case['seconds']:.3f}"
            )
    print(f"vocabulary parallel, V = {VOCABULARY}, {TOP_K} + 1 ids: collectives, bytes per token, error, ms a token")
    for size, case in result.get("vocabulary", {}).items():
        print(
            f"  {size} ranks {case['collectives_a_call']} {case['bytes_contributed_a_token']:.0f} "
            f"(formula {case['bytes_by_formula']}, gathered logits "
            f"{case['bytes_received_a_token_if_logits_were_gathered']}) {case['largest_error_against_float64']:.1e} "
            f"{case['seconds'] / TOKENS * 1e3:.2f}"
        )
    print("mu's top 20, a token:")
    for name, value in result.get("records", {}).items():
        print(f"  {name:35s} {value:.4g}")


def draw(result: dict[str, Any], path: Path) -> None:
    """Time and memory against tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    styles = zip(COLOURS, "os^PvDX*", strict=True)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for (name, series), (colour, marker) in zip(result["rules"].items(), styles, strict=True):
        tokens = [p["tokens"] for p in series["points"]]
        for axes, key, unit in ((panels[0], "seconds", 1), (panels[1], "peak_bytes", 2**20)):
            values = [p[key] / unit for p in series["points"]]
            axes.loglog(tokens, values, color=colour, marker=marker, label=name, markersize=5, linewidth=1.2)
    for axes, title in zip(panels, ("seconds, one CPU thread", "peak memory above the inputs, MiB"), strict=True):
        axes.set(xlabel="tokens", title=title)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too (parts not run keep theirs)")
    parser.add_argument("--figure", type=Path, help="draw part 1 into this PNG")
    parser.add_argument("--largest", type=float, default=1e8, help="tokens of the last point of part 1")
    parser.add_argument("--limit-gib", type=float, default=6.0, help="memory that one process may need")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--series", choices=SERIES, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options.series, options.tokens)))
        return
    steps = {"rules": len(SERIES) * (round(math.log10(options.largest)) - 4), "records": 1}
    steps |= {"context": len(RANKS), "vocabulary": len(RANKS)}
    columns = (TextColumn("{task.description:45s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    result: dict[str, Any] = {}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
    result |= {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(steps[part] for part in options.parts))

        def step(what: str) -> None:
            bar.update(task, description=what)
            if not bar.console.is_terminal:
                bar.console.print(what)

        done = partial(bar.advance, task)
        if "rules" in options.parts:
            result["rules"] = rule_cost(options.largest, options.limit_gib, step, done)
        for part in ("context", "vocabulary"):
            for size in RANKS if part in options.parts else ():
                step(f"{part} parallel, {size} ranks")
                result.setdefault(part, {})[str(size)] = on_ranks(part, size)
                done()
        if "records" in options.parts:
            step("records of mu's top K")
            result["records"] = result.get("records", {}) | topk_records()
    report(result)
    if options.json:
        write_json(options.json, result)
    if options.figure:
        draw(result, options.figure)


if __name__ == "__main__":
    main()
