"""Small plans, and a program in place of `cppo train` that writes what a run would."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from cppo.show.progress import RunProgress
from cppo.study import runner as runner_module
from cppo.study.compare import rule_variants
from cppo.study.plan import make_plan
from cppo.study.runner import Runner
from cppo.study.store import open_study

TRAINING = Path(__file__).parents[1] / "training"
STEPS = 3


def plan_of(folder, rules=("dppo", "cppo"), seeds=2, settings=(f"steps={STEPS}",), baseline=None):
    common, variants = rule_variants("arithmetic", settings, rules)
    return make_plan("compare", folder, "arithmetic", common, variants, seeds, 1, baseline)


def rule_of(plan, variant):
    return next(run.config.rule for run in plan.runs if run.variant == variant)


PROGRAM = """
import json, os, pathlib, signal, sys, time
name, folder, steps, how, start = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
events = folder.parent.parent / "events.jsonl"
def event(what):
    with open(events, "a") as stream:
        stream.write(json.dumps([name, what, time.time(), os.environ["OMP_NUM_THREADS"]]) + "\\n")
def checkpoint(*_):
    event("checkpoint")
    sys.exit(130)
signal.signal(signal.SIGINT, checkpoint)
event(start)
folder.mkdir(parents=True, exist_ok=True)
if name.startswith("warmup"):
    if how == "fail":
        sys.exit("Error: no demonstrations")
    (folder / "warmup" / "model").mkdir(parents=True)
    sys.exit()
(folder / "config.yaml").write_text("")
with open(folder / "metrics.jsonl", "a") as stream:
    def row(**row):
        stream.write(json.dumps(row) + "\\n")
        stream.flush()
    if start == "begin":
        row(step=0, update=0, kind="evaluation", samples=2, **{"avg/mean": 0.1, "avg/a": 0.1})
        row(step=1, update=1, kind="train", reward=0.5)
    if how == "fail":
        print("some text")
        print("Error: the disk is full", flush=True)
        print("and a last line")
        sys.exit(1)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60 if how == "hang" else 0.2)
    for step in range(2, steps + 1):
        row(step=step, update=step, kind="train", reward=0.5)
    row(step=steps, update=steps, kind="evaluation", samples=2, **{"avg/mean": 0.4, "avg/a": 0.4})
(folder / "summary.md").write_text("done")
event("end")
"""


def programmed(tmp_path, monkeypatch):
    """(plan, run(jobs=1, **how of a run by name) -> errors, events() -> [[run, what]]) with the program above."""
    plan = open_study(plan_of(tmp_path), {})
    hows: dict[str, str] = {}

    def command(self, run):
        begun = (self.plan.folder_of(run) / "config.yaml").exists()
        how = hows.get(run.name.replace("-", "_"), "fine")
        return [
            "-S",
            "-c",
            PROGRAM,
            run.name,
            str(self.plan.folder_of(run)),
            str(STEPS),
            how,
            "resume" if begun else "begin",
        ]

    monkeypatch.setattr(Runner, "command", command)
    monkeypatch.setattr(runner_module, "POLL", 0.02)
    written = io.StringIO()

    def go(jobs=1, **how):
        hows.clear()
        hows.update(how)
        with RunProgress(Console(file=written, width=200)) as progress:
            return Runner(plan, jobs, progress).run()

    def events():
        files = list(tmp_path.glob("**/events.jsonl"))
        found = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        return sorted(found, key=lambda event: event[2])

    go.written, go.mend = written, hows.clear
    return plan, go, events
