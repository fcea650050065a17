"""The words and tables of the page: facts, what came out, what was run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cppo.config import yaml_io
from cppo.report.source import FINISHED, RunFiles, Source
from cppo.rules import Reason
from cppo.rules.base import HELD
from cppo.runs.records import acted, before_and_after, benchmarks, best_evaluation
from cppo.show.progress import duration
from cppo.show.tables import Cells
from cppo.study.results import MEAN, Results, RunRecord, VariantSummary
from cppo.study.tables import cells, notes, percent

Pairs = list[tuple[str, str]]


def title_of(source: Source) -> str:
    """The page's title: the folder's name."""
    return source.path.resolve().name


def facts_of(source: Source) -> Pairs:
    """The line under the title: (what, value)."""
    if source.plan is not None:
        plan = source.plan
        config = plan.trained[0].config.model_dump(mode="json") if plan.trained else {}
        done = sum(run.state == FINISHED for run in source.runs)
        runs = f"{done} of {len(source.runs)} finished" if done < len(source.runs) else f"{done}, all finished"
        return [
            ("study", plan.kind),
            ("variants", str(len(plan.variants))),
            ("seeds", str(len(plan.seeds))),
            ("runs", runs),
            *_task_facts(config),
        ]
    run = source.runs[0]
    steps = f"{run.step} of {run.steps}" if run.steps else str(run.step)
    return [("rule", run.variant), ("seed", str(run.seed)), ("steps", steps), *_task_facts(run.config)]


def _task_facts(config: Mapping[str, Any]) -> Pairs:
    task = config.get("task")
    if isinstance(task, Mapping):
        options = ", ".join(f"{key}: {_plain(value)}" for key, value in (task.get("options") or {}).items())
        task = f"{task.get('name')}" + (f" ({options})" if options else "")
    rows = [("task", str(task or "-"))]
    if updates := config.get("updates"):
        rows.append(("updates per rollout batch", str(updates)))
    return rows


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def headlines(source: Source) -> list[str]:
    """What came out, in a sentence or two."""
    if source.results is not None:
        return _study_headlines(source.results)
    if source.kind == "run":
        return _run_headlines(source.runs[0])
    return []


def _study_headlines(results: Results) -> list[str]:
    def best(variant: VariantSummary) -> float:
        estimate = variant.best.get(MEAN)
        return -1.0 if estimate is None or estimate.value is None else estimate.value

    ranked = sorted((v for v in results.variants if v.seeds), key=best, reverse=True)
    if not ranked:
        return ["No run of this study is finished yet, so there is no result."]
    first, k = ranked[0], results.samples or "k"
    if len(ranked) == 1:
        return [f"{first.name} alone has finished runs: best Avg@{k} {percent(first.best.get(MEAN))} %."]
    lines = [f"{first.name} has the highest best Avg@{k}: {percent(first.best.get(MEAN))} %."]
    gap = first.difference
    if gap is not None and gap.value is not None:
        text = f"By seed that is {100 * gap.value:+.1f} percentage points over {first.compared_with}"
        if gap.low is None or gap.high is None:
            text += "; one seed has no interval, so it may be chance."
        else:
            apart = "which leaves 0 out" if gap.low > 0 or gap.high < 0 else "so this study cannot tell the two apart"
            text += f", with an interval of [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}], {apart}."
        lines.append(text)
    return lines


def _run_headlines(run: RunFiles) -> list[str]:
    lines = []
    before, after = before_and_after(run.metrics)
    if before is not None and after is not None and before.get("avg/mean") is not None:
        k = after.get("samples") or "k"
        start, end = before["avg/mean"], after.get("avg/mean")
        if end is not None:
            lines.append(
                f"Avg@{k} on held-out problems went from {100 * start:.1f}% (step {before['step']}) to "
                f"{100 * end:.1f}% (step {after['step']})."
            )
    found = acted(run.rows("train"), None if run.rule is None else run.rule.name)
    if found is not None:
        lines.append(found.sentence())
    return lines


# --------------------------------------------------------------------------------------------------------------- tables


def result_tables(source: Source) -> list[Cells]:
    """The tables of `cppo compare`, and one of the runs; of one run, before and after."""
    if source.results is not None:
        return cells(source.results)
    return [table for table in (_accuracy(source.runs[0]),) if table is not None] if source.runs else []


def result_notes(source: Source) -> list[str]:
    """What a reader must know to read them."""
    return notes(source.results) if source.results is not None else []


def _accuracy(run: RunFiles) -> Cells | None:
    before, after = before_and_after(run.metrics)
    if before is None:
        return None
    best = best_evaluation(run.metrics)
    names = benchmarks([row for row in (before, after) if row])
    k = (after or before).get("samples") or "k"

    def share(row: Mapping[str, Any] | None, key: str) -> str:
        value = None if row is None else row.get(key)
        return "-" if value is None else f"{100 * value:.1f}"

    rows = []
    for name in [*names, MEAN] if len(names) > 1 else names:
        key = f"avg/{name}"
        start, end = before.get(key), after.get(key) if after else None
        change = f"{100 * (end - start):+.1f}" if start is not None and end is not None else "-"
        rows.append(
            (name, share(before, key), share(after, key), change, share(best, key), share(after, f"pass/{name}"))
        )
    last = f"step {after['step']}" if after else "no second evaluation"
    columns = (
        "",
        f"before (step {before['step']})",
        f"after ({last})",
        "change",
        f"best (step {best['step']})" if best else "best",
        f"pass@{k} after",
    )
    return Cells(f"Avg@{k} on held-out problems, in %", columns, tuple(rows))


def runs_table(source: Source) -> Cells | None:
    """Every run of a study, whatever has become of it."""
    if source.results is None:
        return None
    rows = tuple(map(_run_row, source.results.records))
    return Cells("Every run", ("run", "state", "step", "best", "final", "masked", "time"), rows)


def _run_row(record: RunRecord) -> tuple[str, ...]:
    def share(scores: Mapping[str, float]) -> str:
        return f"{100 * scores[MEAN]:.1f}" if MEAN in scores else "-"

    state = record.state if record.collapsed_at is None else f"{record.state}, collapsed at step {record.collapsed_at}"
    return (
        record.name,
        state,
        f"{record.step} of {record.steps}",
        share(record.best),
        share(record.final),
        "-" if record.masked_fraction is None else f"{record.masked_fraction:.1%}",
        duration(record.seconds) if record.seconds else "-",
    )


# --------------------------------------------------------------------------------------------------------- what was run


def rules_table(source: Source) -> Cells:
    """The trust regions with all parameters, as they were run."""
    if source.results is not None:
        rows = tuple((variant.name, variant.rule) for variant in source.results.variants)
    else:
        rule = source.runs[0].rule
        shown = ", ".join(f"{key}={value}" for key, value in rule.parameters().items()) if rule is not None else "?"
        rows = ((source.runs[0].variant, f"{source.runs[0].variant}({shown})"),)
    return Cells("Rules as they were run", ("", "with all parameters"), rows)


def configuration(source: Source) -> list[tuple[str, str]]:
    """(title, YAML): what was asked, and the resolved configuration of a run."""
    if source.plan is None:
        return [("Configuration", yaml_io.dump(source.runs[0].config))] if source.runs else []
    plan = source.plan
    asked = {
        "recipe": plan.recipe,
        "settings": list(plan.settings),
        "seeds": list(plan.seeds),
        "threads": plan.threads,
        "variants": {variant.name: list(variant.settings) for variant in plan.variants},
    }
    found = [("What was asked", yaml_io.dump(asked))]
    if plan.trained:
        first = plan.trained[0]
        found.append((f"Resolved configuration of {first.name}", yaml_io.dump(first.config.model_dump(mode="json"))))
    return found


def versions_table(source: Source) -> tuple[Cells | None, str | None]:
    """What was installed, and a sentence where the runs of a study differ in it."""
    with_versions = [run for run in source.runs if run.versions]
    keys = list(dict.fromkeys(key for run in with_versions for key in run.versions))
    if not keys:
        return None, None
    rows, different = [], []
    for key in keys:
        counts = Counter(str(run.versions.get(key, "-")) for run in with_versions)
        rows.append((key, _versions(counts)))
        if len(counts) > 1:
            different.append(key)
    note = f"The runs were not made with the same versions of {', '.join(different)}." if different else None
    return Cells("Versions", ("", "version"), tuple(rows)), note


def _versions(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} runs)" for value, count in counts.items())


def dump_tables(report: Mapping[str, Any]) -> list[Cells]:
    """Of a dump: what it is, what each rule would mask, where rules disagree (`inspect_dump`)."""
    about, D = report["dump"], report["divergence"]
    facts: list[tuple[str, str]] = [
        ("responses", str(about["responses"])),
        ("loss tokens", f"{about['loss_tokens']:,}, {about['longest']} in the longest response"),
        ("mean reward", "-" if about["reward"] is None else f"{about['reward']:.4g}"),
        ("D_t", f"{D['name']}: mean {D['mean']:.4g}, p90 {D['p90']:.4g}, p99 {D['p99']:.4g}, max {D['max']:.4g}"),
    ]
    tables = [Cells("The dump", ("", ""), tuple(facts))]
    rules = report["rules"]
    if rules:
        reasons = [reason.key for reason in (*HELD, Reason.TOWARDS)]
        rows = tuple(
            (name, row["divergence"] or "-", _share(row["masked"]), *(_share(row["reasons"][r]) for r in reasons))
            for name, row in rules.items()
        )
        head = ("", "D_t", "masked", *(reason.replace("_", " ") for reason in reasons))
        tables.append(Cells("What each rule would do: share of the loss tokens", head, rows))
    names: Sequence[str] = report["disagreement"]["rules"]
    if len(names) > 1:
        rows = tuple((n, *map(_share, row)) for n, row in zip(names, report["disagreement"]["share"], strict=True))
        tables.append(Cells("Tokens that one rule keeps and the other drops", ("", *names), rows))
    return tables


def _share(value: float) -> str:
    return f"{100 * value:.2f}%" if value else "0"
