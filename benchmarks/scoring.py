"""Time, memory and error of scoring tokens at language-model scale, against the ways of others, as ratios in one run.

    python -m benchmarks.scoring [--plan quick|default|full] [--json PATH] [--docs docs] [--repeats 5]
    python -m benchmarks.scoring --device cuda [--json PATH] [--docs docs]

Every way (`benchmarks.scoring_methods`) runs in a process of its own, on two threads, and is told when: in each round
every one runs once, so a slow moment of the machine hits all alike. The first call of each gives its peak memory, the
others its time (wall clock; the median). Errors are against float64 on 16 of the tokens.

CPUs without instructions for bfloat16 multiply it 10 to 300 times slower than float32, so that one call of a way that
does so would take up to an hour. Where that is measured, these are compared at 16 tokens, with ours at 16 tokens. Ours
multiplies float32 copies of tiles; so does "naive, float32 products", with a copy of the whole head.

--device cuda (never run so far): `benchmarks.scoring_cuda`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import write_json
from benchmarks.scoring_methods import METHODS, Inputs, make_inputs
from cppo.scoring import Distributions, exact_divergence, score_tokens
from pages.scoring import cost_table, fill, targets, to_markdown

ROOT = Path(__file__).resolve().parent.parent
WIDTH, SHOWN = 1024, 16
SIZES = SMALL, LARGE = 32_768, 151_936
SLOW, SLOW_TOKENS = 3.0, 16

TORCH, LARGE_CHUNKS = "torch linear_cross_entropy", "the same, large chunks"  # the second for float32 alone
OTHERS = ("TRL", "verl, full logits", "verl, fused", "Liger, chunked loss", "Liger, scaled cross-entropy", TORCH)
OURS = ("ours", "ours, log-prob only", "ours, half of the rows masked")
FORWARD = ("forward, log-prob", "forward, all", "forward, own top 20")
KNOWN = "exact TV, logsumexps known"
EXACT = (KNOWN, "exact TV", "naive exact TV")
ADAPTIVE = ("top-K TV", "adaptive TV")
NAIVE = ("naive", "naive, float32 products")
NAIVE_EXACT = "naive exact TV, float32 products"


@dataclass(frozen=True)
class Comparison:
    """Methods that run in turns on the same inputs; `timed` False: memory alone, one call each."""

    dtype: str
    vocabulary: int
    tokens: int
    methods: tuple[str, ...]
    timed: bool = True


SHORT_TAILS = ("top-K TV, short tails", "adaptive TV, short tails")
PLANS: dict[str, tuple[Comparison, ...]] = {
    "quick": (
        Comparison("float32", SMALL, 512, (*OURS, "naive", *OTHERS, LARGE_CHUNKS)),
        Comparison("bfloat16", SMALL, 512, ("ours", "naive, float32 products")),
        Comparison("float32", SMALL, 512, (*FORWARD, *EXACT, *ADAPTIVE)),
    ),
    "default": (
        Comparison("float32", LARGE, 2048, ("ours", "naive")),
        Comparison("float32", LARGE, 2048, (*FORWARD, KNOWN, "naive exact TV", *ADAPTIVE)),
        Comparison("bfloat16", LARGE, 2048, ("ours", "naive, float32 products")),
        Comparison("bfloat16", SMALL, 2048, (*FORWARD, *EXACT, NAIVE_EXACT, *ADAPTIVE)),
        Comparison("float32", SMALL, 8192, ("ours", "naive"), timed=False),
        Comparison("float32", SMALL, 2048, (*OURS, "naive", *OTHERS, LARGE_CHUNKS)),
        Comparison("bfloat16", SMALL, 2048, ("ours", "ours, log-prob only", *NAIVE, *OTHERS)),
        Comparison("float32", LARGE, 2048, SHORT_TAILS),
    ),
    "full": (
        *(Comparison("float32", vocabulary, 2048, (*OURS, "naive", *OTHERS, LARGE_CHUNKS)) for vocabulary in SIZES),
        *(Comparison("bfloat16", vocabulary, 2048, (*OURS, *NAIVE, *OTHERS)) for vocabulary in SIZES),
        Comparison("float32", SMALL, 8192, ("ours", "naive")),
        Comparison("bfloat16", SMALL, 8192, ("ours", "naive, float32 products")),
        Comparison("float32", LARGE, 8192, ("ours", "naive"), timed=False),
        *(Comparison("float32", vocabulary, 2048, (*FORWARD, *EXACT, *ADAPTIVE)) for vocabulary in SIZES),
        *(Comparison("bfloat16", vocabulary, 2048, (*FORWARD, *EXACT, NAIVE_EXACT, *ADAPTIVE)) for vocabulary in SIZES),
    ),
}


# -- running -----------------------------------------------------------------------------------------------------------


class Worker:
    """A method's process."""

    def __init__(self, label: str, where: Comparison, threads: int) -> None:
        environment = METHODS[label].environment
        python = str(ROOT / environment / "bin" / "python") if environment else sys.executable
        shape = [str(size) for size in (where.tokens, where.vocabulary, WIDTH)]
        self.label = label
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.scoring_worker", label, *shape, where.dtype],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label!r} failed:\n{self.process.stderr.read()[-2000:]}")
        return json.loads(line)  # type: ignore[no-any-return]

    def run(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.communicate()


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no MemAvailable in /proc/meminfo: these measurements need Linux.")


def left_out(label: str, where: Comparison) -> str | None:
    """Why a method is not run here."""
    method = METHODS[label]
    if method.environment and not (ROOT / method.environment / "bin" / "python").exists():
        return f"needs {method.environment} (make setup{method.environment.removeprefix('.venv')})"
    needed = method.full_logits * 4 * where.tokens * where.vocabulary
    if needed > 0.75 * available_bytes():
        return f"does not fit: about {needed / 2**30:.0f} GiB"
    return None


def compare(where: Comparison, repeats: int, threads: int) -> dict[str, Any]:
    """All methods of a comparison, in turns."""
    missing = {label: reason for label in where.methods if (reason := left_out(label, where))}
    workers = [Worker(label, where, threads) for label in where.methods if label not in missing]
    for worker in workers:
        worker.answer()  # ready
    found: dict[str, dict[str, Any]] = {worker.label: worker.run() for worker in workers}
    times: dict[str, list[float]] = {worker.label: [] for worker in workers}
    for _ in range(repeats if where.timed else 0):
        for worker in workers:
            times[worker.label].append(worker.run()["seconds"])
    for worker in workers:
        worker.close()
    truth = reference(where) if found else {}
    rows: dict[str, Any] = {}
    for label, first in found.items():
        row: dict[str, Any] = {"gives": METHODS[label].gives, "peak_mib": first["peak_bytes"] / 2**20}
        if where.timed:
            row |= {"seconds": statistics.median(times[label]), "all_seconds": times[label]}
        row |= errors(first, METHODS[label].gives, truth)
        if "resolved" in first:
            row["resolved_fraction"] = first["resolved"]
            row["tv_quantiles"] = {name: first[f"tv_{name}"] for name in ("p50", "p90", "p99")}
            row["tail"] = first["tail"]
        rows[label] = row
    rows |= {label: {"gives": METHODS[label].gives, "left_out": reason} for label, reason in missing.items()}
    shape = {"dtype": where.dtype, "vocabulary": where.vocabulary, "tokens": where.tokens, "width": WIDTH}
    return {**shape, "methods": rows}


@torch.no_grad()
def reference(where: Comparison) -> dict[str, Tensor]:
    """log-prob, its gradient in the hidden states, and TV of the first `SHOWN` tokens, in float64."""
    rollout = any(METHODS[label].rollout for label in where.methods)
    x = make_inputs(where.tokens, where.vocabulary, WIDTH, getattr(torch, where.dtype), rollout)
    truth: dict[str, Tensor] = {}
    logp = log_probabilities(x, x.hidden, x.lm_head)
    ids, weight = x.tokens[:SHOWN, None], x.gradient[:SHOWN, None].double()
    truth["log-prob"] = logp.gather(1, ids)[:, 0]
    backward = logp.exp().mul_(-weight).scatter_add_(1, ids, weight)
    truth["gradient"] = sum(
        backward[:, first : first + 8192] @ x.lm_head[first : first + 8192].double()
        for first in range(0, where.vocabulary, 8192)
    )  # type: ignore[assignment]
    if x.rollout_head is not None:
        mu = log_probabilities(x, x.rollout_hidden, x.rollout_head)
        truth["TV"] = 0.5 * (logp.exp() - mu.exp()).abs().sum(-1)
    return truth


def log_probabilities(x: Inputs, hidden: Tensor, head: Tensor) -> Tensor:
    states = hidden[:SHOWN].double()
    pieces = [states @ head[first : first + 8192].double().t() for first in range(0, head.shape[0], 8192)]
    return torch.cat(pieces, 1).log_softmax(-1)


def errors(first: dict[str, Any], gives: str, truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of what a method returned, and the relative one of its gradient."""
    found: dict[str, float] = {}
    kind = "TV" if gives == "TV" else "log-prob" if gives.startswith("log-prob") else None
    if kind:
        found["error"] = (torch.tensor(first["values"], dtype=torch.float64) - truth[kind]).abs().max().item()
    if first["hidden_gradient"] is not None:
        gradient = torch.tensor(first["hidden_gradient"], dtype=torch.float64)
        rows = gradient.abs().sum(-1) > 0  # masked ones have none
        difference = (gradient - truth["gradient"])[rows].norm()
        found["gradient_error"] = (difference / truth["gradient"][rows].norm()).item()
    return found


def bfloat16_slowdown() -> float:
    """How many times longer this CPU takes for a bfloat16 product than for a float32 one (the slowest of the three that
    a linear layer needs: the gradient of its input).
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(32, 4096, dtype=dtype), torch.ones(4096, WIDTH, dtype=dtype)
        torch.mm(a[:, :64], b[:64])
        began = time.perf_counter()
        torch.mm(a, b)
        seconds[dtype] = time.perf_counter() - began
    return seconds[torch.bfloat16] / seconds[torch.float32]


def divided(plan: tuple[Comparison, ...], slowdown: float) -> list[Comparison]:
    """`plan`, with what multiplies bfloat16 slowly at fewer tokens."""
    result = []
    for c in plan:
        slow = [m for m in c.methods if not METHODS[m].own_products] if c.dtype == "bfloat16" else []
        if not slow or slowdown < SLOW:
            result.append(c)
            continue
        result.append(replace(c, methods=tuple(m for m in c.methods if m not in slow)))
        ours = dict.fromkeys("ours" if METHODS[m].backward else KNOWN for m in slow)
        result.append(replace(c, tokens=SLOW_TOKENS, methods=(*ours, *slow)))
    return result


@torch.no_grad()
def bfloat16_logits() -> dict[str, float]:
    """What logits in bfloat16 do to a log-probability, and to the total variation between a policy and itself."""
    x = make_inputs(256, SMALL, WIDTH, torch.bfloat16, rollout=False)
    exact = score_tokens(x.hidden, x.lm_head, x.tokens)
    rounded = score_tokens(x.hidden, x.lm_head, x.tokens, logits_dtype=torch.bfloat16)
    error = (exact.logp - rounded.logp).abs()
    policy = Distributions(x.hidden, x.lm_head, exact.logsumexp)
    tv = exact_divergence(policy, replace(policy, logsumexp=rounded.logsumexp, logits_dtype=torch.bfloat16))
    found = {"logp": error, "tv": tv}
    return {f"{name}_{at}": getattr(v, at)().item() for name, v in found.items() for at in ("mean", "max")}


def machine(threads: int) -> dict[str, Any]:
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = {}
    for package in ("torch", "trl", "liger-kernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    verl = list((ROOT / ".venv-verl").glob("lib/*/site-packages/verl-*.dist-info"))
    versions["verl"] = verl[0].name.removeprefix("verl-").removesuffix(".dist-info") if verl else "not installed"
    return {"cpu": cpu[0] if cpu else "unknown", "cores": os.cpu_count(), "threads": threads, "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="default")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too (the other device's stay)")
    parser.add_argument("--docs", type=Path, help="write the tables into the pages in this folder, between markers")
    parser.add_argument("--repeats", type=int, default=5, help="calls that are timed, of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="measure these comparisons (1,4,7) again and keep the others in --json")
    parser.add_argument("--only-docs", action="store_true", help="measure nothing: tables from the file of --json")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
    if options.device == "cuda" and not options.only_docs:
        from benchmarks.scoring_cuda import measure

        result["cuda"] = measure(options.repeats)
    elif not options.only_docs:
        torch.set_num_threads(options.threads)
        load, slowdown = os.getloadavg()[0], bfloat16_slowdown()
        only = {int(number) for number in options.only.split(",")} if options.only else set()
        if only and (result.get("cpu") or {}).get("plan") != options.plan:
            parser.error(f"--only {options.only} needs a --json file with all of --plan {options.plan}.")
        if not only:
            result["cpu"] = {
                "machine": machine(options.threads),
                "plan": options.plan,
                "repeats": options.repeats,
                "load_before": load,
                "bfloat16_product_over_float32": slowdown,
                "bfloat16_logits": bfloat16_logits(),
                "comparisons": [],
            }
        done: list[dict[str, Any]] = result["cpu"]["comparisons"]
        if load > 0.5:
            print(f"other programs keep {load:.1f} cores busy: times below are not to be trusted", file=sys.stderr)
        plan = divided(PLANS[options.plan], slowdown)
        for count, where in enumerate(plan, 1):
            if only and count not in only:
                continue
            shape = f"{where.dtype}, V = {where.vocabulary:,}, N = {where.tokens}"
            print(f"{count} of {len(plan)}: {shape}: {', '.join(where.methods)}", file=sys.stderr, flush=True)
            began = time.monotonic()
            done[count - 1 : count] = [compare(where, options.repeats, options.threads)]
            result["cpu"]["targets"] = targets(result["cpu"])
            if options.json:  # what is measured is kept, however this ends
                write_json(options.json, result)
            print(f"    {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    text = to_markdown(result)
    print(text)
    if options.json and not options.only_docs:
        write_json(options.json, result)
    if options.docs:
        fill(options.docs / "speed.md", "scoring", text)
        fill(options.docs / "divergences.md", "cost", cost_table(result["cpu"]))


if __name__ == "__main__":
    main()
