"""summary.md: what a run was, what came out, what the trust region did, and what to type next.

Reads the run folder alone (config.yaml, versions.json, metrics.jsonl, samples/), so it can be written again at any
time, also for a run that was killed.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cppo.errors import UserError
from cppo.files import atomic_write_text
from cppo.rules import Reason
from cppo.rules.base import HELD
from cppo.runs.calibration import read_calibration, show
from cppo.runs.folder import RunFolder
from cppo.runs.records import acted, before_and_after, benchmarks, best_evaluation, judged
from cppo.runs.samples import legend, mark_response, pick_response, printable
from cppo.show.progress import duration
from cppo.show.tables import Cells

Row = Mapping[str, Any]

EXCERPT_TOKENS = 200
STEP_TIME, ROLLOUT_TIME = "time/step_time", "time/rollout_time"
# running totals and rates, not parts that add up
NOT_ADDITIVE = tuple(
    f"time/{name}"
    for name in (
        *("step_time", "rollout_time", "step", "elapsed", "total", "total_flos"),
        *("train_runtime", "train_samples_per_second", "train_steps_per_second"),
    )
)
SKIPPED = ("skipped_nonfinite", "skipped")
ZERO_SPREAD = ("zero_spread_fraction", "trust/zero_spread_fraction", "frac_reward_zero_std")


def write_summary(folder: str | Path) -> str:
    """Write `folder`/summary.md and return its text; missing data is said. Raises: files.DiskFullError."""
    run = RunFolder(folder)
    rows = run.metrics()
    parts = [
        f"# {_heading(run)}",
        _what(run, rows),
        "## Accuracy on held-out problems",
        _accuracy(run, rows),
        "## What the trust region did",
        _bound(run, rows),
        _trust(rows),
        _excerpt(run),
        "## Time",
        _time(run, rows),
        "## Where things are, and what to type next",
        _where(run, rows),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    atomic_write_text(run.summary_file, text)
    return text


def _config(run: RunFolder) -> dict[str, Any]:
    try:
        return run.config()
    except UserError:
        return {}  # what is missing is left out


def _described(value: Any, name_keys: Sequence[str] = ("name", "path", "spec")) -> str:
    """A part of the configuration on one line: "cppo (delta=0.15, delta_b=0.02)"."""
    if not isinstance(value, Mapping):
        return "-" if value is None else str(value)
    name = next((str(value[key]) for key in name_keys if value.get(key) is not None), "")
    rest = [
        f"{key}={_short(entry)}" for key, entry in value.items() if key not in name_keys and entry not in (None, {}, [])
    ]
    inside = ", ".join(rest)
    return f"{name} ({inside})" if name and inside else name or inside or "-"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}={_short(entry)}" for key, entry in value.items() if entry is not None) + "}"
    return json.dumps(value, default=str) if isinstance(value, list) else str(value)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [[printable(text) for text in line] for line in lines]
    return Cells("", head, rows, text=1 if len(head) > 2 else 2).markdown()


def _heading(run: RunFolder) -> str:
    config = _config(run)
    rule, task = (_described(config.get(key)).split(" (")[0] for key in ("rule", "task"))
    return f"{rule} on {task}" if "-" not in (rule, task) else f"Run {run.path.name}"


def _what(run: RunFolder, rows: Sequence[Row]) -> str:
    config, versions = _config(run), run.versions()
    train = [row for row in rows if row.get("kind") == "train"]
    steps = len({row["step"] for row in train})
    lines: list[tuple[str, str]] = [
        (name, _described(config.get(name))) for name in ("model", "task", "rule", "seed") if name in config
    ]
    steps_before = (config.get("warmup") or {}).get("steps")
    if config.get("model") != "tiny" and steps_before:
        lines.append(("warm-up", f"{steps_before} updates on the task's own answers before RL (the paper has none)"))
    if calibrated := _calibrated(run):
        lines.append(("thresholds that set themselves", calibrated))
    made = f"{steps} (rollout batches), {len(train)} updates" if train else "none yet"
    lines.append(("steps done", made))
    if versions:
        lines.append(("versions", ", ".join(f"{key} {_short(value)}" for key, value in versions.items())))
    return _table(("", ""), lines)


def _calibrated(run: RunFolder) -> str:
    """What `auto` was, from calibration.json; "" in a run without it."""
    record = read_calibration(run.path)
    if record is None or not record["history"]:
        return ""
    last = record["history"][-1]
    if record["thresholds"] is None:
        return f"not found yet: {last.get('why', 'the calibration goes on')}"
    return (
        f"{show(record['thresholds'])}, from step {last['step'] + 1} on: of the {last['tokens']:,} tokens they were "
        f"solved on they would have held back {last['share']:.2%} (target {record['target']:.2%})"
    )


def _three(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def _accuracy(run: RunFolder, rows: Sequence[Row]) -> str:
    before, after = before_and_after(rows)
    if before is None:
        return "No evaluation in this run."
    k = (after or before).get("samples") or "k"
    names = benchmarks([row for row in (before, after) if row])
    lines = []
    for name in [*names, "mean"] if len(names) != 1 else names:
        start, end = before.get(f"avg/{name}"), after and after.get(f"avg/{name}")
        change = f"{end - start:+.3f}" if start is not None and end is not None else "-"
        passes = [_three(row and row.get(f"pass/{name}")) for row in (before, after)]
        lines.append((name, _three(start), _three(end), change, *passes))
    head = ("benchmark", f"Avg@{k} before", f"Avg@{k} after", "change", f"pass@{k} before", f"pass@{k} after")
    text = _table(head, lines)
    if after is None:
        text += f"\n\nOne evaluation only (step {before['step']}), so there is no before and after."
    else:
        text += f"\n\nBefore: step {before['step']}; after: step {after['step']}."
        if before.get("samples") != after.get("samples"):
            text += f" They took {before.get('samples')} and {after.get('samples')} samples per problem."
    best = best_evaluation(rows)
    if best is not None:
        name = f"step-{int(best['step']):06d}"
        saved = [path for path in (run.best / name, run.checkpoints / name) if path.exists()]
        lies = f", saved in `{saved[0].relative_to(run.path)}`" if saved else ""
        samples = f" (Avg@{best['samples']})" if best.get("samples") else ""
        text += (
            f"\nBest validation score within the budget: {best['avg/mean']:.3f}{samples} at step {best['step']}{lies}."
        )
    return text


def _values(rows: Sequence[Row], *keys: str) -> list[float]:
    """The values of the first of `keys` that a row has."""
    found = (next((row[key] for key in keys if row.get(key) is not None), None) for row in rows)
    return [float(value) for value in found if value is not None]


def _bound(run: RunFolder, rows: Sequence[Row]) -> str:
    """Whether the rule bound at all; "" where there is no rule or nothing to judge."""
    rule = _config(run).get("rule")
    found = acted(rows, rule.get("name") if isinstance(rule, Mapping) else rule)
    if found is None:
        return ""
    return f"**{found.sentence()}**" if found.warns else found.sentence()


def _trust(rows: Sequence[Row]) -> str:
    train = [row for row in rows if row.get("kind") == "train"]
    if not train:
        return "No training update has been logged."
    with_tokens = judged(train)

    def mean(*keys: str, of: Sequence[Row] = with_tokens) -> float | None:
        values = _values(of, *keys)
        return sum(values) / len(values) if values else None

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    lines = [("tokens held back (masked fraction)", share(mean("trust/masked_fraction")))]
    for reason in HELD:
        value = mean(f"trust/{reason.key}_fraction")
        if value:
            lines.append((f"- {reason.caption}", share(value)))
    towards = mean("trust/towards_fraction")
    if towards:
        lines.append((f"tokens {Reason.TOWARDS.caption}", share(towards)))
    highest = max(_values(train, "trust/divergence_max"), default=None)
    parts = [number(mean("trust/divergence_mean")), number(mean("trust/divergence_p90")), number(highest)]
    lines.append(("divergence: mean / p90 (means over updates) / largest", " / ".join(parts)))
    floor = mean("trust/first_update_divergence")
    lines.append(("divergence of the first update of a batch (rollout/training mismatch, near 0)", number(floor)))
    resolved = mean("trust/resolved_fraction")
    if resolved is not None:
        lines.append(
            ("tokens whose exact divergence was needed (of the others D counts as its lower end)", share(resolved))
        )
    stored = mean("trust/divergence_bytes_per_token")
    if stored is not None:
        lines.append(("bytes per token that the divergence keeps of the rollout policy", number(stored)))
    gain, bound = mean("trust/surrogate_gain", of=train), mean("trust/residual_bound", of=train)
    if gain is not None:
        lines.append(
            ("last update of a batch: gain of the surrogate / bound of its error", f"{number(gain)} / {number(bound)}")
        )
    used = mean("trust/budget_used")
    if used is not None:
        lines.append(("prefix budget used at the end of a response", share(used)))
    spread = mean(*ZERO_SPREAD, of=train)
    lines.append(("groups left out since all their rewards were equal", share(spread)))
    skipped = sum(_values(train, *SKIPPED))
    lines.append(("updates skipped (NaN or infinity in loss or gradient)", f"{skipped:.0f} of {len(train)}"))
    means = f"Means over the {len(with_tokens)} of {len(train)} updates that had a loss token."
    return means + "\n\n" + _table(("", ""), lines)


def _excerpt(run: RunFolder) -> str:
    record = pick_response(run.samples())
    if record is None:
        return "No response was sampled into samples/."
    prompt, text = printable(str(record["prompt"])), mark_response(record, EXCERPT_TOKENS)
    longest = max((len(ticks) for ticks in re.findall(r"`+", prompt + text)), default=0)
    fence = "`" * max(3, longest + 1)
    update = int(record.get("update", 0)) + 1
    block = f"{fence}text\n{prompt.rstrip()}\n--------\n{text}\n{fence}"
    return (
        f"A sampled response of step {record['step']}, as update {update} of its rollout batch saw it; tokens "
        f"that were held back stand in `[[ ]]` ({legend(record)}):\n\n{block}"
    )


def _times(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds by part. TRL times whole updates; the first of a rollout batch holds the rollout, too."""
    sums: defaultdict[str, float] = defaultdict(float)
    by_step: defaultdict[int, list[float]] = defaultdict(list)
    rollout: dict[int, float] = {}
    for row in rows:
        for key, value in row.items():
            if key == STEP_TIME and value is not None and row.get("kind") == "train":
                by_step[int(row["step"])].append(float(value))
            elif key == ROLLOUT_TIME and value is not None:
                rollout[int(row["step"])] = float(value)
            elif key.startswith("time/") and key not in NOT_ADDITIVE and isinstance(value, int | float):
                sums[key.removeprefix("time/")] += value
    names = {"rollout": "rollouts (first update of each batch less the median of its others)"}
    for step, seconds in by_step.items():
        known = rollout.get(step)
        for part, spent in _split(seconds, known).items():
            sums[part if known is not None else names.get(part, part)] += spent
    return sums


def _split(seconds: Sequence[float], rollout: float | None = None) -> dict[str, float]:
    """Rollout and updates of one rollout batch, from the seconds of its updates, the first of which holds the rollout.

    rollout : its own seconds, where they were measured; else the first update less the median of the others.
    """
    if rollout is not None:
        return {"rollout": rollout, "updates": sum(seconds) - rollout}
    first, *others = seconds
    if not others:
        return {"rollouts and updates": first}
    update = statistics.median(others)
    return {"rollout": max(0.0, first - update), "updates": sum(others) + min(first, update)}


def split_seconds(seconds: Sequence[float], rollout: float | None) -> dict[str, str]:
    """The same as words, for the line of a step."""
    return {part: duration(spent) for part, spent in _split(seconds, rollout).items()} if sum(seconds) else {}


def _tokens_per_second(config: Mapping[str, Any], rows: Sequence[Row]) -> float | None:
    """Tokens of responses over the time of rollouts and updates."""
    rollout = config.get("rollout") or {}
    each = (rollout.get("prompts") or 0) * (rollout.get("responses") or 0)
    train = [row for row in rows if row.get("kind") == "train"]
    tokens = each * sum(_values(train, "completions/mean_length"))
    spent = sum(_values(train, STEP_TIME))
    return tokens / spent if tokens and spent else None


def _time(run: RunFolder, rows: Sequence[Row]) -> str:
    sums = _times(rows)
    total = sum(sums.values())
    if total <= 0:
        return "No times were logged."
    ordered = sorted(sums.items(), key=lambda part: -part[1])
    lines = [(name, duration(spent), f"{spent / total:.0%}") for name, spent in ordered]
    text = _table(("part", "time", "share"), [*lines, ("all of these", duration(total), "100%")])
    speed = _tokens_per_second(_config(run), rows)
    return text if speed is None else f"{text}\n\nRollouts and updates together: {speed:.3g} response tokens a second."


def _where(run: RunFolder, rows: Sequence[Row]) -> str:
    known = (
        ("best/", "the model with the best validation score"),
        ("checkpoints/", "models to load and to resume from"),
        ("samples/", "sampled responses with the reason of each token"),
        (run.metrics_file.name, "every update and evaluation, one JSON object per line"),
        (run.positions_file.name, "divergence by position in the response"),
        (run.calibration_file.name, "thresholds that set themselves, and on what they were found"),
        (run.certificates_file.name, "how large the surrogate's error can be: `cppo bound --run` shows it"),
        ("plots/", "reward, Avg@k, held-back tokens, divergence by position, certificates"),
        (run.config_file.name, "the resolved configuration: `cppo train config.yaml` repeats the run"),
    )
    lines = [f"- `{name}`: {text}" for name, text in known if (run.path / name).exists() or name == "plots/"]
    saved = run.saved()
    model = saved[-1] if saved else None
    text = "\n".join(lines)
    if model is not None:
        text += (
            "\n\nLoad the model:\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{model}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{model}")\n```'
        )
    else:
        text += "\n\nNo checkpoint was saved."
    return text + f"\n\nResume after an interruption or a kill:\n\n```sh\ncppo train --resume {run.path}\n```"
