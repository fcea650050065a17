"""Seconds and memory of `cppo inspect` on a dump of 1,000 responses x 1,000 tokens, JSONL and parquet.

    python -m benchmarks.inspect_dump [--json PATH] [--repeats 3] [--responses 1000] [--tokens 1000]

Claims: under 20 s and under 2 GB, all rules, figures and the certificate included. Also timed, without a target: the
same dump with a top K of 20, sixteen times as large, as parquet.

How: the dump is written once; each measurement is a fresh process, from its start to its end, imports included, with
its processor time beside it (on a busy machine the first says more about the others). Memory is its peak resident set.
Formats are interleaved; seconds are medians, memory is the largest.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core import write_json
from cppo.dumps.dump import write_dump

TARGET = {"seconds": 20.0, "gigabytes": 2.0}
WORKER = """
import re, resource, sys
from pathlib import Path
from contextlib import redirect_stdout
from cppo.cli.inspect import inspect
with open("/dev/null", "w") as nothing, redirect_stdout(nothing):
    inspect(Path(sys.argv[1]), out=Path(sys.argv[2]))
used = resource.getrusage(resource.RUSAGE_SELF)
# ru_maxrss begins at what the parent held
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1], used.ru_utime + used.ru_stime)
"""


def rows(responses: int, tokens: int, K: int) -> list[dict[str, Any]]:
    """Responses of one length with everything that a trainer can dump; pi drifts from mu as the response goes on."""
    rng, made = np.random.default_rng(0), []
    drift = 0.05 * np.linspace(0.5, 2.0, tokens)
    for at in range(responses):
        ids = rng.integers(0, 150_000, tokens)
        mu = -rng.exponential(0.5, tokens).astype(np.float32)
        pi = np.minimum(mu + drift * rng.normal(size=tokens), 0).astype(np.float32)
        row: dict[str, Any] = {
            "ids": ids,
            "rollout_logp": mu,
            "policy_logp": pi,
            "mask": np.ones(tokens, dtype=np.int8),
        }
        row |= {"advantage": float(rng.normal()), "reward": float(rng.integers(2)), "group": at // 8, "step": 1}
        if K:
            mass = rng.dirichlet(np.full(K + 1, 0.3), size=(2, tokens))[:, :, :K]
            top = np.sort(np.log(np.maximum(mass, 1e-12)), axis=2)[:, :, ::-1].astype(np.float32)
            names = rng.integers(150_000, 200_000, (tokens, K))  # the sampled token is never among them
            row |= {"topk_ids": names, "topk_rollout_logp": top[0], "topk_policy_logp": top[1]}
        made.append(row)
    return made


def measure(path: Path, out: Path) -> tuple[float, float, float]:
    """(seconds, seconds of processor time, gigabytes) of one fresh process."""
    began = time.perf_counter()
    command = [sys.executable, "-c", WORKER, str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr)
    kilobytes, processor = done.stdout.split()[-2:]
    return seconds, float(processor), int(kilobytes) * 1024 / 1e9


def compare(paths: dict[str, Path], out: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Medians over interleaved repeats."""
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in paths}
    for _ in range(repeats):
        for name, path in paths.items():
            seen[name].append(measure(path, out))
    return {
        name: {
            "seconds": round(statistics.median(s for s, _, _ in found), 2),
            "processor_seconds": round(statistics.median(p for _, p, _ in found), 2),
            "gigabytes": round(max(g for *_, g in found), 3),
            "file_megabytes": round(paths[name].stat().st_size / 1e6, 1),
        }
        for name, found in seen.items()
    }


def main() -> None:
    """Measure, print, and write the figures where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--responses", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--top-k", type=int, default=20, help="0: without that part")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "tokens": options.responses * options.tokens,
        "targets": TARGET,
    }
    with tempfile.TemporaryDirectory() as folder:
        parts = {"log-probabilities": 0} | ({f"with top {options.top_k}": options.top_k} if options.top_k else {})
        for part, K in parts.items():
            made = rows(options.responses, options.tokens, K)
            paths = {
                kind: write_dump(Path(folder) / f"k{K}.{kind}", made)
                for kind in (("parquet",) if K else ("jsonl", "parquet"))
            }
            del made
            result[part] = compare(paths, Path(folder) / "out", options.repeats if not K else 1)
            for kind, row in result[part].items():
                times = f"{row['seconds']:.1f} s ({row['processor_seconds']:.1f} s of processor time)"
                print(f"{part}, {kind}, {row['file_megabytes']:.0f} MB: {times}, {row['gigabytes']:.2f} GB")
    met = all(row[name] <= limit for row in result["log-probabilities"].values() for name, limit in TARGET.items())
    print(f"Targets (20 s, 2 GB): {'met' if met else 'NOT met'}.")
    result["met"] = met
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
