"""What lies at a path: a study, a run or a dump, as far as it has come, with a sentence for all that is not as it
should be.

Only finished runs count in means and intervals, as in the tables; the others are shown as what they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cppo.config.yaml_io import CONFIG_FILE
from cppo.dumps.read import SUFFIXES
from cppo.errors import UserError
from cppo.rules import TrustRegion
from cppo.runs.calibration import rule_of_run
from cppo.runs.folder import RunFolder
from cppo.study.plan import Plan
from cppo.study.results import Results, read_results
from cppo.study.store import STUDY_FILE, load_plan

Row = Mapping[str, Any]

#: The file that makes a folder a run.

FINISHED, FAILED, IN_PROGRESS, NOT_STARTED = "finished", "failed", "in progress", "not started"


@dataclass
class RunFiles:
    """A run folder, read. state : as of `cppo.study.results.RunRecord`."""

    name: str
    variant: str
    seed: int | None
    folder: Path
    state: str
    step: int
    steps: int | None
    error: str | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    positions: list[dict[str, Any]] = field(default_factory=list)
    certificates: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    rule: TrustRegion | None = None
    """The rule with its parameters, found ones too; None where they are not known or this program has no such rule."""

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl of one kind."""
        return [row for row in self.metrics if row.get("kind") == kind]

    @property
    def samples(self) -> list[Path]:
        """The files of sampled responses, oldest first."""
        return RunFolder(self.folder).sample_files()


@dataclass
class Source:
    """What a report is about. kind : "study", "run" or "dump" (whose runs are empty)."""

    kind: str
    path: Path
    variants: list[str] = field(default_factory=list)
    runs: list[RunFiles] = field(default_factory=list)
    plan: Plan | None = None
    results: Results | None = None
    marks: list[str] = field(default_factory=list)
    """Sentences for the top of the report: what is not complete."""

    def of(self, variant: str) -> list[RunFiles]:
        """The runs of a variant."""
        return [run for run in self.runs if run.variant == variant]

    def counted(self, variant: str) -> list[RunFiles]:
        """Its runs that means are over: the finished ones; where there are none, those that have any figure."""
        runs = self.of(variant)
        return [run for run in runs if run.state == FINISHED] or [run for run in runs if run.step > 0]


def open_source(path: Path) -> Source:
    """Read what a path holds.

    Raises
    ------
    UserError : it is neither a study nor a run nor a dump, or its description cannot be read.
    """
    if (path / STUDY_FILE).is_file():
        return _study(path)
    if RunFolder(path).exists:
        return _run(path)
    if path.suffix in SUFFIXES and path.is_file():
        return Source("dump", path)
    if path.is_dir() and any(entry.suffix in SUFFIXES for entry in path.iterdir()):
        if RunFolder(path).metrics_file.is_file():
            raise UserError(f"{path} looks like a run, but its {CONFIG_FILE} is missing: what was run cannot be told.")
        return Source("dump", path)
    if not path.exists():
        raise UserError(f"there is nothing at {path}; give the folder of a run or of a study.")
    raise UserError(
        f"{path} is neither a run ({CONFIG_FILE} is missing), nor a study ({STUDY_FILE} is missing), nor a dump of "
        "rollouts (.jsonl or .parquet)."
    )


def _study(path: Path) -> Source:
    plan = load_plan(path)
    results = read_results(plan)
    source = Source("study", path, [variant.name for variant in plan.variants], plan=plan, results=results)
    planned = {run.name: run for run in plan.trained}
    for record in results.records:
        run = planned[record.name]
        folder = plan.folder_of(run)
        found = RunFiles(
            record.name, record.variant, record.seed, folder, record.state, record.step, record.steps, record.error
        )
        found.config = run.config.model_dump(mode="json")
        if not run.config.rule.automatic:
            found.rule = run.config.make_rule()
        else:  # thresholds that set themselves are known when the run has found them, and only there
            with contextlib.suppress(UserError):
                found.rule = rule_of_run(folder)
        _read_logs(found, source.marks)
        source.runs.append(found)
    _mark_study(source)
    return source


def _mark_study(source: Source) -> None:
    left = [run for run in source.runs if run.state != FINISHED]
    if not left:
        return
    total, done = len(source.runs), len(source.runs) - len(left)
    counts = [f"{sum(run.state == state for run in left)} {state}" for state in (FAILED, IN_PROGRESS, NOT_STARTED)]
    shown = ", ".join(text for text in counts if not text.startswith("0 "))
    source.marks.insert(
        0,
        f"This study is not complete: {done} of {total} runs are finished ({shown}). Tables, means and intervals are "
        "of the finished runs; curves of the others are thin and dashed.",
    )
    source.marks += [f"{run.name} failed: {run.error}" for run in left if run.state == FAILED and run.error]
    for variant in source.variants:
        if not any(run.state == FINISHED for run in source.of(variant)) and source.counted(variant):
            source.marks.append(f"{variant} has no finished run: its curves are means of what there is so far.")


def _run(path: Path) -> Source:
    raw = RunFolder(path).config()
    chosen = raw.get("rule")
    name = str(chosen.get("name", "?") if isinstance(chosen, Mapping) else chosen)
    folder_name = path.resolve().name
    steps = raw.get("steps")
    run = RunFiles(folder_name, name, raw.get("seed"), path, IN_PROGRESS, 0, steps, config=raw)
    source = Source("run", path, [name], [run])
    try:
        run.rule = rule_of_run(path)
    except ValueError as error:
        source.marks.append(f"The run's rule cannot be made here, so the token view shows others only: {error}")
    _read_logs(run, source.marks)
    run.step = max((int(row["step"]) for row in run.rows("train")), default=0)
    if run.step and RunFolder(path).finished(run.step if steps is None else steps):
        run.state = FINISHED
    if run.state != FINISHED:
        source.marks.append(_how_far(run))
    return source


def _how_far(run: RunFiles) -> str:
    if run.step:
        return (
            f"This run is in progress or was stopped: step {run.step} of {run.steps}. "
            "The figures are what there is so far."
        )
    where = "it is in its warm-up" if run.rows("warmup") else "nothing has been logged"
    return f"This run has not begun to train: {where}. There is nothing to show but its configuration."


def _read_logs(run: RunFiles, marks: list[str]) -> None:
    """metrics, positions, certificates, versions; a file that cannot be read is a mark and not the end."""
    folder = RunFolder(run.folder)
    readers = (
        ("metrics", folder.metrics),
        ("positions", folder.positions),
        ("certificates", folder.certificates),
    )
    for name, read in readers:
        try:
            setattr(run, name, read())
        except (OSError, ValueError) as error:
            marks.append(f"{run.name}: {error}")
    run.versions = folder.versions()
