"""Seconds, memory and size of `cppo report` on a study of 35 runs: seven rules x five seeds, 40 steps of 8 updates.

    python -m benchmarks.report [--json PATH] [--repeats 3] [--tokens 40 1000] [--run RUN]

Claims: under 30 s and at most 5 MB, also with responses of 1,000 tokens (eight a sampled step, four sampled steps a
run: 1.1 million tokens in all).

How: the plan is that of `cppo compare`; the first run folder of each rule is written by the real recorder, from random
tokens that are judged by the rule, and copied for the other seeds, with other rewards and accuracies. With --run a real
run's folder is copied 35 times instead, which keeps its own lengths. Each measurement is a fresh process, from its
start to its end, imports included, with its processor time beside it (on a busy machine the first says more about the
others); medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import cppo
from benchmarks.core import write_json
from cppo.engines.trl.batch import attach_rewards
from cppo.files import atomic_write_json, atomic_write_text, read_jsonl
from cppo.study.compare import TABLE_1, rule_variants
from cppo.study.plan import Plan, PlannedRun, make_plan
from cppo.study.store import open_study
from cppo.training.recorder import RunRecorder

TARGET = {"seconds": 30.0, "megabytes": 5.0}
STEPS, UPDATES, EVERY, COUNT, ROWS, SEEDS = 40, 8, 10, 8, 16, 5
#: The sampled token's divergence: there are no top-K rows of a model here.
SETTINGS = (f"steps={STEPS}", f"updates={UPDATES}", "rule.divergence=binary_tv")
WORKER = """
import re, resource, sys
from pathlib import Path
from contextlib import redirect_stdout
from cppo.cli.report import report
with open("/dev/null", "w") as nothing, redirect_stdout(nothing):
    report(Path(sys.argv[1]), Path(sys.argv[2]))
used = resource.getrusage(resource.RUSAGE_SELF)
# ru_maxrss begins at what the parent held
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1], used.ru_utime + used.ru_stime)
"""


class Words:
    """Ids as words of a few letters, as a tokenizer has them."""

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str:
        return "".join(f" {int(i):x}" for i in token_ids)


def batch_of(tokens: int, drift: float, seed: int) -> tuple[cppo.TokenBatch, dict[str, Any]]:
    """Responses of half to all of `tokens` whose policy has moved from the sampler's, the more the later."""
    generator = torch.Generator().manual_seed(seed)
    mu = -torch.rand(ROWS, tokens, generator=generator) * 2 - 0.05
    growth = torch.linspace(0.2, 1.8, tokens)
    pi = (mu + drift * growth * torch.randn(ROWS, tokens, generator=generator)).clamp(max=-1e-3)
    lengths = torch.randint(tokens // 2, tokens + 1, (ROWS,), generator=generator)
    mask = torch.arange(tokens)[None] < lengths[:, None]
    ids = torch.randint(0, 50_000, (ROWS, tokens), generator=generator)
    inputs = {"completion_ids": ids, "completion_mask": mask.long(), "prompt_ids": ids[:, : min(tokens, 60)]}
    attach_rewards(inputs, torch.rand(ROWS, 1, generator=generator), torch.ones(1), ROWS // 4, 0)
    return cppo.TokenBatch(pi, mu, torch.randn(ROWS, generator=generator), mask), inputs


def write_run(plan: Plan, run: PlannedRun, tokens: int) -> None:
    """One run folder as training leaves it, without checkpoints."""
    folder, rule = plan.folder_of(run), run.config.make_rule()
    atomic_write_text(folder / "config.yaml", run.config.to_yaml())
    atomic_write_json(folder / "versions.json", {"cppo": "0.1.0", "torch": torch.__version__})
    recorder = RunRecorder(folder, Words(), EVERY, COUNT, UPDATES, getattr(rule, "divergence", None))
    rows: list[dict[str, Any]] = [evaluation(0)]
    for step in range(1, STEPS + 1):
        for update in range(UPDATES):
            # only what the recorder keeps needs all responses: the last update of a step
            length = tokens if update == UPDATES - 1 else 16
            batch, inputs = batch_of(length, 0.01 + 0.02 * update, 1000 * step + update + 7919 * run.seed)
            D = cppo.divergence.binary_tv(batch.policy_logp, batch.rollout_logp)
            batch = batch if rule.divergence is None else batch.with_divergence(D)
            verdict = rule(batch)
            recorder(batch, verdict, inputs, update)
            head = {"step": step, "update": (step - 1) * UPDATES + update + 1, "kind": "train", "time/step_time": 1.0}
            more = {"reward": 0.5 + 0.01 * step, "completions/mean_length": 0.7 * tokens, "entropy": 1 / step}
            rows.append(head | more | cppo.metrics(batch, verdict, first_update=update == 0))
        recorder.end_of_step(step, last=step == STEPS)
        if step % EVERY == 0:
            rows.append(evaluation(step))
    atomic_write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def evaluation(step: int) -> dict[str, Any]:
    """A row with eight benchmarks and their mean."""
    scores = {f"benchmark-{at}": min(1.0, 0.3 + 0.01 * step + 0.02 * at) for at in range(8)}
    scores["mean"] = sum(scores.values()) / 8
    head = {"step": step, "update": step * UPDATES, "kind": "evaluation", "samples": 16, "time/evaluation": 1.0}
    return head | {f"avg/{k}": v for k, v in scores.items()} | {f"pass/{k}": v for k, v in scores.items()}


def copy_run(plan: Plan, run: PlannedRun, real: Path) -> None:
    """A run's folder in the place of a planned one, a little better or worse."""
    folder = plan.folder_of(run)
    shutil.copytree(real, folder, ignore=shutil.ignore_patterns("checkpoints", "best", "warmup", "plots"))
    atomic_write_text(folder / "config.yaml", run.config.to_yaml())
    shift = 0.01 * run.seed + 0.01 * list(TABLE_1).index(str(run.variant))
    rows = [
        {key: value + shift if key == "reward" or key.startswith("avg/") else value for key, value in row.items()}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]
    atomic_write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def make_study(folder: Path, tokens: int, real: Path | None) -> Path:
    """A study of 35 finished runs."""
    last = max(row["step"] for row in read_jsonl(real / "metrics.jsonl")) if real is not None else STEPS
    common, variants = rule_variants("arithmetic", [*SETTINGS, f"steps={last}"], list(TABLE_1))
    plan = open_study(make_plan("compare", folder, "arithmetic", common, variants, SEEDS, 1), {})
    first: dict[str | None, Path] = {}
    for run in plan.trained:
        source = real or first.get(run.variant)
        if source is None:
            write_run(plan, run, tokens)
            first[run.variant] = plan.folder_of(run)
        else:
            copy_run(plan, run, source)
    return folder


def measure(study: Path, out: Path) -> tuple[float, float, float]:
    """(seconds, seconds of processor time, gigabytes) of one fresh process."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(study), str(out)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr)
    kilobytes, processor = done.stdout.split()[-2:]
    return seconds, float(processor), int(kilobytes) * 1024 / 1e9


def report_on(study: Path, repeats: int) -> dict[str, float]:
    """Medians, and the size of the page."""
    out = study / "report.html"
    found = [measure(study, out) for _ in range(repeats)]
    return {
        "seconds": round(statistics.median(s for s, _, _ in found), 2),
        "processor_seconds": round(statistics.median(p for _, p, _ in found), 2),
        "gigabytes": round(max(g for *_, g in found), 3),
        "megabytes": round(out.stat().st_size / 1e6, 2),
        "samples_megabytes": round(sum(f.stat().st_size for f in study.glob("runs/*/samples/*")) / 1e6, 1),
    }


def main() -> None:
    """Measure, print, and write the figures where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[40, 1000], help="longest responses of the studies")
    parser.add_argument("--run", type=Path, help="copy this run 35 times instead")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "targets": TARGET,
        "studies": {},
    }
    kinds = {"copies of a run": 0} if options.run else {f"{tokens} tokens": tokens for tokens in options.tokens}
    for name, tokens in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            row = report_on(make_study(Path(folder) / "study", tokens, options.run), options.repeats)
        result["studies"][name] = row
        times = f"{row['seconds']:.1f} s ({row['processor_seconds']:.1f} s of processor time)"
        print(f"35 runs, {name}: {times}, {row['gigabytes']:.2f} GB, page {row['megabytes']:.2f} MB", flush=True)
    met = all(row[key] <= limit for row in result["studies"].values() for key, limit in TARGET.items())
    print(f"Targets (30 s, 5 MB): {'met' if met else 'NOT met'}.")
    result["met"] = met
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
