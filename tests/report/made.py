"""Studies and runs for the tests: random tokens, judged by the real rules and written by the real writers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import synthetic
from cppo.cli import report as cli_report
from cppo.config.load import Config
from cppo.files import atomic_write_json, atomic_write_text
from cppo.runs.folder import RunFolder
from cppo.study.compare import rule_variants
from cppo.study.plan import Plan, make_plan
from cppo.study.store import open_study
from cppo.training.recorder import RunRecorder

STEPS, UPDATES, EVERY = 8, 4, 4
#: What a model or a prompt could say to break out of the page.
EVIL = "</script><img src=x onerror=document.title='broken'>"
LIMITS = ("rule.divergence=binary_tv", "rule.delta=0.15", "rule.delta_b=0.02", "rule.budget=adaptive")
SETTINGS = (f"steps={STEPS}", f"updates={UPDATES}", *LIMITS)


class EvilTokenizer(synthetic.CharTokenizer):
    """Every id is a character but for one, which is markup."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(EVIL if int(i) == 7 else synthetic.ALPHABET[int(i)] for i in token_ids)


def plan_of(
    folder: Path, rules: tuple[str, ...] = ("dppo", "cppo"), seeds: int = 2, extra: tuple[str, ...] = ()
) -> Plan:
    common, variants = rule_variants("arithmetic", [*SETTINGS, *extra], rules)
    return open_study(make_plan("compare", folder, "arithmetic", common, variants, seeds, 1), {"python": "3"})


def write_run(folder: Path, config: Config, last: int = STEPS, length: int = 40, shift: float = 0.0) -> Path:
    """A run folder of `last` steps; evaluations at 0, every EVERY steps, and after the last planned one."""
    atomic_write_text(folder / "config.yaml", config.to_yaml())
    atomic_write_json(folder / "versions.json", {"python": "3.12.3", "cppo": "0.1.0"})
    rule = config.make_rule()
    recorder = RunRecorder(folder, EvilTokenizer(), EVERY, 3, UPDATES, rule.divergence)
    for step in range(last + 1):
        if step:
            rows = synthetic.observe_step(recorder, rule, step, UPDATES, length=length)
            for row in rows:
                more = {"completions/mean_length": 20.0 + step + config.seed, "entropy": 1 / (1 + step)}
                RunFolder(folder).append_metrics(row | more | {"reward": row["reward"] + shift + 0.01 * config.seed})
            recorder.end_of_step(step, last=step == config.steps)
        if step % EVERY == 0 or step == config.steps:
            RunFolder(folder).append_metrics(evaluation(step, shift + 0.02 * config.seed))
    return folder


def evaluation(step: int, shift: float) -> dict[str, Any]:
    scores = {"chain-12": 0.4 + 0.04 * step + shift, "add-4": 0.2 + 0.05 * step + shift}
    scores["mean"] = sum(scores.values()) / 2
    row: dict[str, Any] = {"step": step, "update": step * UPDATES, "kind": "evaluation", "samples": 4}
    row |= {f"avg/{name}": value for name, value in scores.items()}
    return row | {f"pass/{name}": min(1.0, value + 0.1) for name, value in scores.items()} | {"time/evaluation": 1.0}


def write_study(folder: Path, plan: Plan | None = None, skip: tuple[str, ...] = ()) -> Plan:
    """All runs of a plan but those named."""
    plan = plan or plan_of(folder)
    for run in plan.trained:
        if run.name not in skip:
            write_run(plan.folder_of(run), run.config, shift=0.1 if run.variant == "cppo" else 0.0)
    return plan


def page_of(source: Path, out: Path | None = None) -> Path:
    """The page that `cppo report` writes."""
    cli_report.report(source, out)
    return out or cli_report.default_page(source)
