"""What `cppo compare` costs beside its runs: planning, starting processes, watching them, tables.

    python -m benchmarks.compare_bookkeeping [--json benchmarks/results/compare_bookkeeping.json] [key=value ...]

A comparison of two rules and two seeds runs in a process of its own, one run at a time, and reports the processor time
of that process and of its children (the runs), and its wall-clock time. Then the same runs are started bare, one after
the other, by `cppo train` and the study's own configurations. Processor time tells the bookkeeping apart from the noise
of the runs; wall-clock time shows that runs do not wait for it. Minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cppo import files
from cppo.config import yaml_io
from cppo.study.store import load_plan

SETTINGS = ["steps=6", "warmup.steps=100", "evaluation.problems=16"]
PROGRAM = """
import json, resource, sys, time
from contextlib import redirect_stdout
from pathlib import Path
from cppo.cli.compare import compare
began = time.monotonic()
with open("/dev/null", "w") as nothing, redirect_stdout(nothing):
    compare(sys.argv[3:], rules="dppo,cppo", seeds=2, jobs=1, out=Path(sys.argv[1]))
own, runs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
json.dump({"wall": time.monotonic() - began, "own": own.ru_utime + own.ru_stime,
           "runs": runs.ru_utime + runs.ru_stime}, open(sys.argv[2], "w"))
"""


def measure(folder: Path, settings: list[str]) -> dict[str, Any]:
    """Seconds: processor time of the comparison itself and of its runs, wall-clock time of it and of the bare runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    study, report = folder / "study", folder / "usage.json"
    subprocess.run([sys.executable, "-c", PROGRAM, str(study), str(report), *settings], env=environment, check=True)
    found: dict[str, Any] = json.loads(report.read_text())
    plan = load_plan(study)
    bare = 0.0
    for run in plan.runs:
        config = yaml_io.read(study / "configs" / f"{run.name}.yaml") | {"output_dir": str(folder / "bare" / run.name)}
        path = folder / f"{run.name}.yaml"
        files.atomic_write_text(path, yaml_io.dump(config))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(plan.threads))
        module = ["-m", "cppo.study.warmup"] if run.variant is None else ["-m", "cppo.cli", "train"]
        began = time.monotonic()
        subprocess.run(
            [sys.executable, *module, str(path)], env=environment | threads, check=True, stdout=subprocess.DEVNULL
        )
        bare += time.monotonic() - began
    return found | {
        "bare_wall": bare,
        "processor_time_ratio": found["own"] / found["runs"],
        "wall_ratio": found["wall"] / bare - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("settings", nargs="*", default=SETTINGS, help="of the runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.settings)
    print(
        f"compare itself {found['own']:.1f} s of processor time, its runs {found['runs']:.1f} s: "
        f"{found['processor_time_ratio']:.1%}\n"
        f"wall clock {found['wall']:.1f} s, the same runs bare {found['bare_wall']:.1f} s: {found['wall_ratio']:+.1%} "
        "(target 3%)"
    )
    if options.json:
        files.atomic_write_json(options.json, found)


if __name__ == "__main__":
    main()
