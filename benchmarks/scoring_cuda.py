"""The table of `benchmarks.scoring` on a GPU: N = 32,768 tokens, V = 151,936, d = 2,048 and 4,096, bfloat16 inputs.

All methods in one process, in turns; peak memory is PyTorch's own count, less what was there before and the gradients.
The floor is four bfloat16 products of these sizes, the fewest that give a log-probability and its two gradients without
keeping the logits: h W^T twice, and the two with the logits' gradient. Methods of packages that are not installed, or
that fail, say so. **This has not been run**: no GPU was at hand.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.scoring_methods import ALL, LOGP, METHODS, Call, Inputs, Method, make_inputs, ours

TOKENS, VOCABULARY, WIDTHS = 32_768, 151_936, (2048, 4096)


def verl_kernel(x: Inputs) -> Call:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(x.hidden, x.lm_head, x.tokens, 1.0, "none")[0]


CUDA_METHODS: dict[str, Method] = {
    "torch": METHODS["ours"],
    "torch, log-prob only": METHODS["ours, log-prob only"],
    "triton": Method(partial(ours, everything=True, backend="triton"), ALL),
    "triton, log-prob only": Method(partial(ours, everything=False, backend="triton"), LOGP),
    "full logits (Stable-RL's way)": METHODS["naive"],
    "verl's kernel": Method(verl_kernel, "log-prob, entropy"),
    "verl, fused torch": METHODS["verl, fused"],
    "TRL": METHODS["TRL"],
    "Liger, scaled cross-entropy": METHODS["Liger, scaled cross-entropy"],
    "torch linear_cross_entropy": METHODS["torch linear_cross_entropy"],
    "exact TV, logsumexps known": METHODS["exact TV, logsumexps known"],
}

#: claim, methods (their times added up) over another ("floor" is the four products), at most
CUDA_TARGETS: tuple[tuple[str, tuple[str, ...], str, float], ...] = (
    ("torch, all outputs / four products", ("torch",), "floor", 1.25),
    ("triton, all outputs / four products", ("triton",), "floor", 1.25),
    ("torch: 20 ids, entropy / log-prob only", ("torch",), "torch, log-prob only", 1.02),
    ("triton: 20 ids, entropy / log-prob only", ("triton",), "triton, log-prob only", 1.02),
    ("scoring with the exact TV / scoring", ("torch", "exact TV, logsumexps known"), "torch", 1.5),
)


def floor(x: Inputs) -> Call:
    """Four products; their results are not used."""
    hidden, head = x.hidden.detach(), x.lm_head.detach()

    def call() -> Tensor:
        torch.mm(hidden, head.t())
        logits = torch.mm(hidden, head.t())
        torch.mm(logits.t(), hidden)
        return torch.mm(logits, head)[:, 0]

    return call


def measure(
    repeats: int,
    device: str = "cuda",
    tokens: int = TOKENS,
    vocabulary: int = VOCABULARY,
    widths: tuple[int, ...] = WIDTHS,
) -> dict[str, Any]:
    cuda = device == "cuda"
    name = torch.cuda.get_device_name() if cuda else device
    shape = {"tokens": tokens, "vocabulary": vocabulary, "dtype": "bfloat16"}
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "repeats": repeats, **shape, "widths": {}}
    for width in widths:
        x = make_inputs(tokens, vocabulary, width, torch.bfloat16, rollout=True, device=device)
        calls: dict[str, Callable[[], object]] = {"floor": floor(x)}
        rows: dict[str, dict[str, Any]] = {"floor": {"gives": "four products"}}
        for label, method in CUDA_METHODS.items():
            rows[label] = {"gives": method.gives}
            try:
                calls[label] = partial(run, method.make(x), x, method.backward)
                rows[label]["peak_mib"] = peak_mib(calls[label], x, cuda)  # also compiles kernels
            except Exception as error:  # of other people's packages, on devices that we have not seen
                rows[label]["left_out"] = (
                    f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
                )
                calls.pop(label, None)
        times: dict[str, list[float]] = {label: [] for label in calls}
        for _ in range(repeats):
            for label, call in calls.items():
                times[label].append(seconds(call, cuda))
        for label, values in times.items():
            rows[label] |= {"seconds": statistics.median(values), "all_seconds": values}
        result["widths"][str(width)] = rows
    return result


def run(call: Call, x: Inputs, backward: bool) -> None:
    x.hidden.grad = x.lm_head.grad = None
    if backward:
        scores = call()
        scores.backward(x.gradient.to(scores.dtype))
    else:
        with torch.no_grad():
            call()


def peak_mib(call: Callable[[], object], x: Inputs, cuda: bool) -> float | None:
    x.hidden.grad = x.lm_head.grad = None
    if not cuda:
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    left = sum(p.grad.numel() * p.grad.element_size() for p in (x.hidden, x.lm_head) if p.grad is not None)
    return (torch.cuda.max_memory_allocated() - before - left) / 2**20


def seconds(call: Callable[[], object], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['device']}, PyTorch {result['torch']}, median of {result['repeats']}", ""]
    for width, rows in result["widths"].items():
        four = rows["floor"]["seconds"]
        lines += [f"**bfloat16, V = {result['vocabulary']:,}, N = {result['tokens']:,}, d = {width}**", ""]
        lines += ["| | gives | ms | / four products | MiB |", "|---|---|---|---|---|"]
        for label, row in rows.items():
            if "left_out" in row:
                lines.append(f"| {label} | {row['gives']} | {row['left_out']} | | |")
                continue
            memory = "" if row.get("peak_mib") is None else f"{row['peak_mib']:,.0f}"
            time_, ratio = row["seconds"] * 1e3, row["seconds"] / four
            lines.append(f"| {label} | {row['gives']} | {time_:.1f} | {ratio:.2f} | {memory} |")
        lines += ["", "| claim | measured | target | |", "|---|---|---|---|"]
        for claim, labels, other, limit in CUDA_TARGETS:
            if all("seconds" in rows[label] for label in (*labels, other)):
                value = sum(rows[label]["seconds"] for label in labels) / rows[other]["seconds"]
                met = "met" if value <= limit else "**missed**"
                lines.append(f"| {claim} | {value:.3f} | at most {limit} | {met} |")
        lines.append("")
    return lines
