"""Time and memory of rollout batches of the recipe smollm2-135m, as ratios in one run.

    python -m benchmarks.llm [--base CHECKOUT] [--rounds 2] [--steps 3] [--cases NAME ...] [--json PATH] [--docs PAGE]

Cases, in turns, each a process of its own on the same float32 weights in a folder:

* `topk_tv`: the recipe. `binary_tv`, `adaptive_tv`, `exact_tv`, `compact`, `ragged`: other divergences and stores.
* `... , idle`: with limits that no token reaches, so that all of them train on the same responses.
* `trl`: plain `trl.GRPOTrainer` with its own clip and its own sampler; same prompts, batch, precision and updates.
* `trl sampler`: ours with TRL's sampler (`rollout.sampler=trl`).
* `base`: another checkout of this repository (`--base`), such as the commit before.

Compared is the time of whole rollout batches (rollout and updates, TRL's own clock) after the first, medians over all
of a case; memory is the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import write_json
from cppo.config.load import load_config
from cppo.config.trl_kwargs import trl_config_kwargs
from cppo.show.tables import Cells
from cppo.training.arguments import reward_function
from cppo.training.models import load_model, load_tokenizer
from pages.scoring import fill

RECIPE = "smollm2-135m"
#: The recipe's settings by their names at commit 94dfc8d, which had no recipe for a trained model.
SETTINGS = (
    "task=reasoning_gym:chain_sum",
    "task.options={config: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2}}",
    "rule={name: cppo, delta: 0.15, delta_b: 0.015, budget: fixed, w_min: 0.8, divergence: topk_tv}",
    "rollout={prompts: 8, responses: 8, max_new_tokens: 32}",
    "updates=4",
    "optimizer.learning_rate=1e-5",
    "warmup.steps=0",
)
QUIET = ("evaluation={every: 0, problems: 2, samples: 1, batch_size: 2}", "samples.every=0", "save_every=1000")
#: Limits that no token reaches: every divergence then makes the same updates and rollouts, batch by batch.
IDLE = ("rule.delta=1", "rule.delta_b=1")
CASES: dict[str, tuple[str, ...]] = {
    "topk_tv": (),
    "binary_tv": ("rule.divergence=binary_tv",),
    "adaptive_tv": ("rule.divergence=adaptive_tv",),
    "exact_tv": ("rule.divergence=exact_tv",),
    "compact": ("topk_store=compact",),
    "ragged": ("topk_store=ragged",),
    "trl sampler": ("rollout.sampler=trl",),
    "binary_tv, idle": ("rule.divergence=binary_tv", *IDLE),
    "topk_tv, idle": IDLE,
    "exact_tv, idle": ("rule.divergence=exact_tv", *IDLE),
}
#: What each case is compared with: the first is the target's, as the issue of the real model states them.
AGAINST = {
    "topk_tv": ("base", "trl", "binary_tv"),
    "adaptive_tv": ("topk_tv",),
    "exact_tv": ("binary_tv",),
    "compact": ("topk_tv",),
    "ragged": ("topk_tv",),
    "trl sampler": ("topk_tv",),
    "topk_tv, idle": ("binary_tv, idle",),
    "exact_tv, idle": ("binary_tv, idle",),
}


def command(case: str, model: Path, folder: Path, steps: int) -> list[str]:
    """What a case runs."""
    if case == "trl":
        return [sys.executable, "-m", "benchmarks.llm", "--plain", str(model), str(folder), str(steps)]
    settings = [f"model={model}", f"steps={steps}", f"output_dir={folder}", *QUIET]
    recipe = SETTINGS if case == "base" else (RECIPE, *CASES[case])
    return [sys.executable, "-m", "cppo.cli", "train", *recipe, *settings]


def measure(case: str, model: Path, folder: Path, steps: int, base: Path | None) -> tuple[list[float], int]:
    """(seconds of each rollout batch after the first, bytes of the largest resident set)."""
    source = (base if case == "base" else Path.cwd()) or Path.cwd()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(source / "src"), str(Path.cwd())])}
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        process = subprocess.Popen(command(case, model, folder, steps), env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{case} failed: {(folder.parent / f'{folder.name}.log').read_text()[-2000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    spent: dict[int, float] = {}
    for row in rows:
        if row["kind"] == "train":
            spent[row["step"]] = spent.get(row["step"], 0.0) + row["time/step_time"]
    return [seconds for step, seconds in spent.items() if step > 1], usage.ru_maxrss * 1024


def plain(model: Path, folder: Path, steps: int) -> None:
    """`trl.GRPOTrainer` as its documentation has it, with the recipe's numbers; writes rows like a run's."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from cppo.tasks import make_task

    config = load_config(RECIPE, [f"model={model}", f"steps={steps}"])
    task = make_task(config.task.name, **config.task.options)
    examples = task.train(steps * config.rollout.prompts, seed=config.seed)
    given = trl_config_kwargs(config, folder / "trl")
    arguments = {key: value for key, value in given.items() if key not in ("save_strategy", "save_steps")}
    trainer = GRPOTrainer(
        load_model(str(model), torch.float32),
        reward_function(task, examples),
        GRPOConfig(**arguments | {"save_strategy": "no", "report_to": "none", "logging_steps": 1}),
        train_dataset=Dataset.from_list([{"prompt": e.prompt, "index": i} for i, e in enumerate(examples)]),
        processing_class=load_tokenizer(str(model)),
    )
    trainer.train()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in trainer.state.log_history if "step_time" in row]
    lines = [
        {"kind": "train", "step": at // config.updates + 1, "time/step_time": row["step_time"]}
        for at, row in enumerate(rows)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def table(cases: dict[str, Any]) -> Cells:
    """Seconds and ratios."""
    rows = []
    for name, case in cases.items():
        ratios = [f"{ratio:.2f} x {other}" for other, ratio in case.get("over", {}).items()]
        rows.append((name, f"{case['median']:.1f}", f"{case['peak_gb']:.2f}", ", ".join(ratios) or "-"))
    return Cells("", ("case", "seconds a rollout batch", "memory, GB", "ratio"), rows)


def summarise(times: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, Any]:
    """Medians, ratios, memory."""
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    found: dict[str, Any] = {}
    for name, seconds in times.items():
        over = {other: medians[name] / medians[other] for other in AGAINST.get(name, ()) if other in medians}
        found[name] = {"seconds": seconds, "median": medians[name], "peak_gb": peaks[name] / 1e9, "over": over}
    return found


def main() -> None:
    if sys.argv[1:2] == ["--plain"]:
        plain(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="another checkout, for the case `base`")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=["topk_tv", "trl", "binary_tv", "adaptive_tv", "exact_tv"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, help="write the table into this page, between its markers")
    options = parser.parse_args()
    cases: Sequence[str] = [*options.cases, *(["base"] if options.base else [])]
    times: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        source = load_config(RECIPE, []).model
        load_model(source, torch.float32).save_pretrained(model)
        load_tokenizer(source).save_pretrained(model)
        for number in range(options.rounds):
            for case in cases if number % 2 == 0 else reversed(cases):
                folder = Path(temporary) / f"{case.replace(' ', '-')}-{number}"
                seconds, peak = measure(case, model, folder, options.steps, options.base)
                times.setdefault(case, []).extend(seconds)
                peaks[case] = max(peak, peaks.get(case, 0))
                shown = ", ".join(f"{value:.1f}" for value in seconds)
                print(f"round {number + 1}: {case}: {shown} s, {peak / 1e9:.2f} GB", file=sys.stderr, flush=True)
    found = summarise({case: times[case] for case in cases}, peaks)
    print(table(found).markdown())
    if options.json:
        write_json(options.json, {"threads": torch.get_num_threads(), "torch": torch.__version__, "cases": found})
    if options.docs:
        fill(options.docs, "llm", table(found).markdown())


if __name__ == "__main__":
    main()
