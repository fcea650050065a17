"""Ablations whose runs are written as `cppo train` would write them, with chosen figures."""

from __future__ import annotations

from cppo import files
from cppo.runs.folder import RunFolder
from cppo.study.ablate.suite import Options, base_of, plan_of
from cppo.study.ablate.suites import make_suites
from cppo.study.store import open_study

STEPS = 12


def study(folder, only, settings=(), seeds=2, recipe="arithmetic", **options):
    """A plan of suites in its folder, without runs."""
    base = base_of(recipe, [f"steps={STEPS}", *settings])
    suites = make_suites(base, only.split(","), Options(**options))
    return open_study(plan_of(base, suites, folder, seeds, 1), {})


def write_run(plan, run, final, before=0.25, rewards=None, masked=0.02, clipped=0.0, problems=True):
    """One finished run: evaluations of two problems at 0 and the end, and a training row per step."""
    folder, steps = plan.folder_of(run), run.config.steps
    benchmark = run.config.task.options["families"][0]
    for step, score in ((0, before), (steps, final)):
        row = {"step": step, "update": step, "kind": "evaluation", "samples": 4, "time/evaluation": 2.0}
        RunFolder(folder).append_metrics(row | {f"avg/{benchmark}": score, "avg/mean": score})
        if problems:  # half of it is how hard the problem is
            RunFolder(folder).append_problems(step, 4, {benchmark: [score / 2, score * 3 / 2]})
        if step == 0:
            for at in range(1, steps + 1):
                reward = rewards[at - 1] if rewards else 0.5
                trust = {"trust/masked_fraction": masked, "trust/token_limit_fraction": masked}
                trust |= {"trust/ratio_clip_fraction": clipped, "time/step_time": 1.0}
                RunFolder(folder).append_metrics({"step": at, "update": at, "kind": "train", "reward": reward} | trust)
    files.atomic_write_text(folder / "summary.md", "done")


def fail(plan, errors):
    """Let runs have failed with these errors, by name; those that had begun keep what they have."""
    files.atomic_write_json(plan.folder / "status.json", {"errors": errors})
