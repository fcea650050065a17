"""How many runs an ablation is, and about how long they take: what `cppo ablate --list` prints before anything runs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Group
from rich.markup import escape

from cppo.config.load import Config
from cppo.show.progress import duration
from cppo.show.tables import Cells
from cppo.study.ablate.suite import Base, Suite, compose
from cppo.study.plan import make_plan
from cppo.study.status import cores, devices

#: Of the speed of a bare matrix product, what a tiny model's run reaches: measured with the default recipe, on a CPU.
EFFICIENCY = 0.15
SETTINGS_SHOWN = 40  # configurations whose settings are listed one by one


def work(config: Config) -> float | None:
    """Floating-point operations of a run of a tiny model, roughly; None for any other model.

    With P = layers (4 h^2 + 3 h m) weights (h hidden, m intermediate): 2 P a sampled token, 8 P a trained one (forward,
    backward, and mu's distribution), prompts as long as responses and all responses as long as the limit. Evaluations
    count their samples, the warm-up 6 P per token.
    """
    rollout = config.rollout
    if config.model != "tiny":
        return None
    sampled = config.steps * rollout.prompts * rollout.responses * rollout.max_new_tokens
    evaluation, limit = config.evaluation, config.evaluation.max_new_tokens or rollout.max_new_tokens
    families = config.task.options.get("families")
    problems = (evaluation.problems or 256) * (len(families) if isinstance(families, list) else 1)
    evaluations = 2 + ((config.steps - 1) // evaluation.every if evaluation.every else 0)
    judged = evaluations * problems * evaluation.samples * limit
    return _weights(config) * (2.0 * (sampled + judged) + 8.0 * 2 * sampled)


def warmup_work(config: Config) -> float | None:
    """The same of a warm-up."""
    if config.model != "tiny":
        return None
    tokens = config.warmup.steps * config.warmup.batch_size * 2 * config.rollout.max_new_tokens
    return 6.0 * _weights(config) * tokens


def _weights(config: Config) -> int:
    h = config.tiny.hidden_size
    return config.tiny.layers * (4 * h * h + 3 * h * (config.tiny.intermediate_size or 4 * h))


def speed(tries: int = 50) -> float:
    """Floating-point operations a second of a float32 matrix product of a tiny model's size on one thread, at its best
    (other programs slow a product down, and none makes it faster).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.randn(1024, 128), torch.randn(128, 512)
        best = math.inf
        for _ in range(tries):
            start = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2.0 * 1024 * 128 * 512 / best


def listing(base: Base, suites: Sequence[Suite], seeds: int, jobs: int) -> Group:
    """What would be run: configurations of each suite, runs, and about how long they take on this machine."""
    variants, bound = compose(base, suites)
    plan = make_plan("ablate", Path("list"), base.recipe, base.shared, variants, 1, 1)  # nothing is written
    configs = {variant.name: base.resolve(variant.settings) for variant in variants}
    rate = None if devices() else EFFICIENCY * speed() * max(1, min(cores(), jobs * max(1, cores() // jobs)))

    def estimate(works: Sequence[float | None]) -> str:
        known = [work for work in works if work is not None]
        if rate is None or len(known) < len(works):
            return "unknown"
        return duration(seeds * sum(known) / rate)

    rows = []
    seen: set[str] = set()
    for suite in bound:
        names = dict.fromkeys(entry.variant for entry in suite.entries)
        new = [name for name in names if name not in seen]
        seen.update(new)
        works = [work(configs[name]) for name in new]
        counts = (str(len(names)), str(len(new)), str(seeds * len(new)))
        rows.append((suite.name, suite.question, *counts, estimate(works)))
    columns = ("suite", "question", "configurations", "new", "runs", "time")
    table = Cells(f"cppo ablate: {seeds} seeds, {jobs} runs at a time", columns, rows, text=2).rich()
    warmups = [run for run in plan.runs if run.variant is None]
    total = [*(work(configs[name]) for name in seen), *(warmup_work(run.config) for run in warmups)]
    lines = [
        f"In all {seeds * len(seen)} runs and {seeds * len(warmups)} warm-ups, about {estimate(total)}. New: not in a "
        "suite above, since a configuration of several suites runs once.",
        "The time is a guess from the size of the runs and the speed of a matrix product here, good to a factor of two "
        "or three; the progress bar knows better after the first steps."
        if rate is not None
        else "How long they take cannot be told for a GPU; the progress bar can after the first steps.",
    ]
    if len(seen) <= SETTINGS_SHOWN:
        lines += ["", *(f"{variant.name}: {' '.join(variant.settings)}" for variant in variants)]
    return Group(table, *map(escape, lines))
