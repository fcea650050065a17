"""Speed and memory of verdict + loss on [512, 8192] float32, as ratios measured in one run.

    python benchmarks/core.py [--json PATH] [--rows 512] [--columns 8192] [--repeats 5]

Claims: CPPO with a fixed budget costs at most 3 x DPPO and with the adaptive budget at most 12 x; it is at least 10 x
faster than a loop over responses; and its memory peaks at most 8 x one input tensor above the inputs. All with the
binary divergence, so that it is part of the cost. Two loops are timed: Algorithm 1 as it is printed, a token at a
time; and one with torch operations along each response (there the gain is the overhead of a response, so it depends
on their length: see the same at 512 columns). Eager PyTorch is bound by memory traffic, so the package is timed under
torch.compile, too.

How: repeats are interleaved (a slow moment of the machine hits all rules alike), each figure is the median. Memory is
the growth of the peak resident set of a fresh process from "inputs exist" to "verdict and loss were computed", with
glibc told to return freed tensors at once (MALLOC_MMAP_THRESHOLD_): by default it keeps one or two, differently from
run to run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cppo

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "dppo": ("dppo", {"divergence": "binary_tv"}),
    "cppo fixed": ("cppo", {"divergence": "binary_tv", "budget": "fixed"}),
    "cppo adaptive": ("cppo", {"divergence": "binary_tv", "budget": "adaptive"}),
    "cppo fixed, soft gate": ("cppo", {"divergence": "binary_tv", "budget": "fixed", "gate": "reciprocal"}),
    "cppo fixed, shuffled": ("cppo", {"divergence": "binary_tv", "budget": "fixed", "weights": "shuffled"}),
    "none": ("none", {}),
    "ppo_clip": ("ppo_clip", {}),
    "cispo": ("cispo", {}),
    "minpro": ("minpro", {}),
    "trm_max": ("trm_max", {"divergence": "binary_kl"}),
    "trm_avg": ("trm_avg", {"divergence": "binary_kl"}),
    "trm_max_avg": ("trm_max_avg", {"divergence": "binary_kl"}),
}
LOOPS = ("cppo fixed", "cppo adaptive")


def inputs(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of an update in the middle of a rollout batch; lengths uniform over the upper half."""
    g = torch.Generator().manual_seed(0)
    rollout = torch.empty(rows, columns).exponential_(2.0, generator=g).neg_()
    policy = torch.randn(rows, columns, generator=g).mul_(0.05).add_(rollout).clamp_(max=-1e-6)
    lengths = torch.randint(columns // 2, columns + 1, (rows, 1), generator=g)
    mask = torch.arange(columns) < lengths
    return policy.requires_grad_(), rollout, torch.randn(rows, generator=g), mask


def verdict_and_loss(rule: Any, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """What an engine calls in every micro-batch; the loss keeps its graph, as in training."""
    batch = cppo.TokenBatch(*data)
    return cppo.token_loss(batch, rule(batch).coefficient)


def loop_over_responses(rule: cppo.CPPO, data: tuple[Tensor, Tensor, Tensor, Tensor], rows: int) -> Tensor:
    """The same formulas a response at a time, vectorised along the response and no further: what people write first."""
    policy, rollout, advantages, mask = data
    losses = torch.zeros_like(policy)
    for i in range(rows):
        inside = mask[i]
        logp, mu = policy[i][inside], rollout[i][inside]
        count = logp.shape[0]
        with torch.no_grad():
            log_ratio = (logp - mu).clamp(max=20.0)
            d = (logp.exp() - mu.exp()).abs()
            w = 1 - (1 - rule.w_min) * torch.arange(count) / max(count - 1, 1)
            z = w * d
            delta_b = torch.tensor(rule.delta_b)
            if rule.budget == "adaptive":
                delta_b = torch.quantile(d, rule.quantile).clamp(rule.delta_b, 2 * rule.delta_b)
            limit = (rule.delta + delta_b * (w.cumsum(0) - w) - (z.cumsum(0) - z)).clamp(max=rule.delta)
            keep = (advantages[i].sign() * log_ratio <= 0) | (z <= limit)
            coefficient = keep * log_ratio.exp()
        losses[i, inside] = -coefficient * advantages[i] * logp
    return losses


def token_by_token(rule: cppo.CPPO, data: tuple[Tensor, Tensor, Tensor, Tensor], rows: int) -> list[list[float]]:
    """Algorithm 1 as printed: the recursions of S and W in Python. Its figure is seconds per token times all tokens."""
    policy, rollout, advantages, mask = data
    losses = []
    for i in range(rows):
        inside = mask[i]
        logp, mu = policy[i].detach()[inside].tolist(), rollout[i][inside].tolist()
        a, count = advantages[i].item(), len(logp)
        d = [abs(math.exp(p) - math.exp(m)) for p, m in zip(logp, mu, strict=True)]
        delta_b = rule.delta_b
        if rule.budget == "adaptive":
            ordered, at = sorted(d), rule.quantile * (count - 1)
            below = int(at)
            above = min(below + 1, count - 1)
            delta_b = min(2 * delta_b, max(delta_b, ordered[below] + (at - below) * (ordered[above] - ordered[below])))
        spent = total = 0.0
        row = []
        for t in range(count):
            w = 1 - (1 - rule.w_min) * t / max(count - 1, 1)
            z = w * d[t]
            keep = a * (logp[t] - mu[t]) <= 0 or z <= min(rule.delta, rule.delta + delta_b * total - spent)
            spent += z
            total += w
            row.append(-a * math.exp(min(logp[t] - mu[t], 20.0)) * logp[t] if keep else 0.0)
        losses.append(row)
    return losses


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call over rounds in which every call runs once."""
    times: dict[str, list[float]] = {label: [] for label in calls}
    for repeat in range(repeats + 1):
        for label, call in calls.items():
            elapsed = seconds(call)
            if repeat:  # the first round warms the allocator up
                times[label].append(elapsed)
    return {label: statistics.median(values) for label, values in times.items()}


def relative_to_loops(rows: int, columns: int, repeats: int) -> dict[str, dict[str, float]]:
    """How many times longer the loops take than the package, on the same responses."""
    data = inputs(rows, columns)
    few = max(rows // 256, 1)  # responses for the loop over tokens
    tokens = data[3].sum().item() / data[3][:few].sum().item()
    result: dict[str, dict[str, float]] = {}
    for label in LOOPS:
        name, parameters = RULES[label]
        rule = cppo.make_rule(name, **parameters)
        assert isinstance(rule, cppo.CPPO)
        got, want = verdict_and_loss(rule, data), loop_over_responses(rule, data, rows)
        differ = (~torch.isclose(got, want, rtol=1e-4, atol=1e-6)).float().mean().item()
        assert differ < 1e-4, f"{label}: the loop computes something else ({differ:.2%} of the tokens differ)"
        calls: dict[str, Callable[[], object]] = {
            "package": partial(verdict_and_loss, rule, data),
            "compiled": partial(torch.compile(verdict_and_loss, fullgraph=True, dynamic=False), rule, data),
            "torch, a response at a time": partial(loop_over_responses, rule, data, rows),
            "a token at a time": partial(token_by_token, rule, data, few),
        }
        median = interleaved(calls, repeats)
        package, compiled = median.pop("package"), median.pop("compiled")
        median["a token at a time"] *= tokens
        result[label] = {loop: value / package for loop, value in median.items()}
        result[label] |= {f"{loop}, package compiled": value / compiled for loop, value in median.items()}
    return result


def speed(rows: int, columns: int, repeats: int) -> dict[str, Any]:
    """Median seconds of every rule and their ratios."""
    data = inputs(rows, columns)
    rules = {label: cppo.make_rule(name, **parameters) for label, (name, parameters) in RULES.items()}
    median = interleaved({label: partial(verdict_and_loss, rule, data) for label, rule in rules.items()}, repeats)
    return {
        "seconds": median,
        "relative to dppo": {label: value / median["dppo"] for label, value in median.items()},
        "slower by a loop": relative_to_loops(rows, columns, repeats),
        "slower by a loop, 512 columns": relative_to_loops(rows, 512, repeats),
    }


def peak_kib() -> int:
    """Largest resident set of this process so far, KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def memory_of_this_process(label: str, rows: int, columns: int) -> None:
    """Print the growth of the peak from the inputs to after verdict + loss, in multiples of one input tensor."""
    name, parameters = RULES[label]
    rule = cppo.make_rule(name, **parameters)
    verdict_and_loss(rule, inputs(2, 16))  # lazy imports and thread pools are not the rule's memory
    data = inputs(rows, columns)
    before = peak_kib()
    loss = verdict_and_loss(rule, data)
    print((peak_kib() - before) * 1024 / (loss.numel() * loss.element_size()))


def memory(rows: int, columns: int) -> dict[str, float]:
    result = {}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for label in ("dppo", *LOOPS, "cppo fixed, soft gate", "cppo fixed, shuffled", "minpro"):
        command = [sys.executable, __file__, "--memory-of", label, "--rows", str(rows), "--columns", str(columns)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        result[label] = float(run.stdout)
    return result


def graded(targets: Iterable[tuple[str, float, str, float]]) -> list[dict[str, Any]]:
    """(claim, value, "<=" or ">=", limit) as rows with whether they are met."""
    return [
        {
            "claim": claim,
            "value": value,
            "target": f"{sign} {limit:g}",
            "met": value <= limit if sign == "<=" else value >= limit,
        }
        for claim, value, sign, limit in targets
    ]


def write_json(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the core, as ratios.")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=RULES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        memory_of_this_process(options.memory_of, options.rows, options.columns)
        return
    peaks = memory(options.rows, options.columns)
    result: dict[str, Any] = {
        "shape": [options.rows, options.columns],
        "repeats": options.repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        **speed(options.rows, options.columns, options.repeats),
        "peak memory in input tensors": peaks,
    }
    relative, loops = result["relative to dppo"], result["slower by a loop"]
    targets = [
        ("CPPO fixed / DPPO", relative["cppo fixed"], "<=", 3.0),
        ("CPPO adaptive / DPPO", relative["cppo adaptive"], "<=", 12.0),
        *(
            (f"loop ({loop}) / {label.upper()}", value, ">=", 10.0)
            for label in LOOPS
            for loop, value in loops[label].items()
        ),
        ("peak memory, CPPO fixed (input tensors)", peaks["cppo fixed"], "<=", 8.0),
        ("peak memory, CPPO adaptive (input tensors)", peaks["cppo adaptive"], "<=", 8.0),
    ]
    result["targets"] = graded(targets)
    print(f"verdict + loss on {result['shape']} float32, {result['threads']} threads, median of {options.repeats}")
    for row in result["targets"]:
        print(
            f"  {row['claim']:55s} {row['value']:7.2f}   target {row['target']:6s} {'met' if row['met'] else 'MISSED'}"
        )
    print("relative to DPPO:")
    for label, value in relative.items():
        print(f"  {label:25s} {value:6.2f}   ({result['seconds'][label]:.3f} s)")
    print("loops on responses of up to 512 tokens, times the package:")
    for label, values in result["slower by a loop, 512 columns"].items():
        print(f"  {label:25s} " + ", ".join(f"{loop}: {value:.1f}" for loop, value in values.items()))
    print("peak memory in input tensors:")
    for label, value in peaks.items():
        print(f"  {label:25s} {value:6.2f}")
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
