"""What exact and adaptive divergences add to the time of the default job (`cppo train`), in turns in one run.

    python -m benchmarks.job_divergences --model RUN/warmup/model [--rounds 3] [--steps 6] [--json PATH]

Each round trains a few rollout batches with every divergence, from the same warmed-up model, in a process of its own.
What is compared is the time of the rollout batches (generation, old log-probabilities, updates) after the first one;
warm-up and evaluation, which take longer than them, know no divergence. With the default vocabulary of 18 tokens the
top 20 are the whole distribution, and `adaptive_tv` is `topk_tv`; hence also K = 5, where it is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.core import write_json

CASES = (("topk_tv", 20), ("adaptive_tv", 20), ("exact_tv", 20), ("topk_tv", 5), ("adaptive_tv", 5))
QUIET = ("evaluation.samples=1", "evaluation.problems=8", "samples.every=0", "save_every=100")


def seconds(run: Path) -> tuple[float, float | None]:
    """(time of the rollout batches after the first, mean share of resolved tokens) of a run folder."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    resolved = [row["trust/resolved_fraction"] for row in train if row.get("trust/resolved_fraction") is not None]
    spent = sum(row["time/step_time"] for row in train if row["step"] > 1)
    return spent, statistics.mean(resolved) if resolved else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the warmed-up model of a run: RUN/warmup/model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    times: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for divergence, k in CASES:
                name, run = f"{divergence}, K = {k}", Path(folder) / f"{divergence}-{k}-{number}"
                settings = (
                    f"model={options.model}",
                    f"divergence={divergence}",
                    f"top_k={k}",
                    f"steps={options.steps}",
                )
                command = [sys.executable, "-m", "cppo.cli", "train", *settings, *QUIET, f"output_dir={run}"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                spent, resolved = seconds(run)
                times.setdefault(name, []).append(spent)
                if resolved is not None:
                    shares.setdefault(name, []).append(resolved)
                print(f"round {number + 1}: {name}: {spent:.2f} s", file=sys.stderr, flush=True)
    rows = {}
    for divergence, k in CASES:
        name, base = f"{divergence}, K = {k}", times[f"topk_tv, K = {k}"]
        rows[name] = {
            "seconds": times[name],
            "over_topk": statistics.median(times[name]) / statistics.median(base),
            "resolved_fraction": statistics.mean(shares[name]) if name in shares else None,
        }
        print(f"{name}: {rows[name]['over_topk']:.3f} x top-K")
    if options.json:
        write_json(options.json, {"steps": options.steps, "rounds": options.rounds, "divergences": rows})


if __name__ == "__main__":
    main()
