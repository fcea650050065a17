"""The token view's data: sampled responses with what every rule says of each token, within a budget of bytes.

Which responses: of every run some of its sampled steps, the last one first, and of each step the responses with the
most held-back tokens; one of each run in turn, until the budget is used up. A response longer than `LONGEST` tokens is
judged as a whole and shown to there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cppo.dumps.dump import Array, Dump, read_dump
from cppo.dumps.inspect import last_update
from cppo.dumps.scores import Scores
from cppo.errors import UserError
from cppo.files import read_jsonl
from cppo.report.curves import Curve, Metric, chart_of
from cppo.report.judges import CLOSE, Judge, Judged, judge_tokens, judges_of, recorded
from cppo.report.source import RunFiles, Source
from cppo.rules import Reason, TrustRegion
from cppo.rules.base import HELD
from cppo.runs.samples import printable
from cppo.show.charts import Chart, short, short_one

#: Tokens of a response on the page; a browser draws so many at once without a pause.
LONGEST = 3000
#: Characters of a prompt on the page.
LONGEST_PROMPT = 4000
#: Sampled steps that are read: of a single run, and of each run of a study.
STEPS_OF_RUN, STEPS_OF_STUDY = 16, 4
#: Responses of a dump that are read at most.
MOST_OF_DUMP = 200

RELATIVE = Metric(
    "relative",
    "Relative log-prob error",
    "",
    "share",
    "Sum of |log pi - log mu| over sum of |log mu|: rollout against training policy at the last update of a step, over "
    "the responses in samples/, which are those with held-back tokens first.",
    "percent",
    zero=True,
)


@dataclass
class TokenData:
    """The responses of the page, and what was left out. runs : names, in the order of the choice."""

    judges: list[Judge]
    responses: list[dict[str, Any]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    relative: Chart | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain types for the page."""
        return {"judges": [judge.as_json() for judge in self.judges], "runs": self.runs, "responses": self.responses}


@dataclass(frozen=True)
class Candidate:
    """A response that may get onto the page: tokens shown, tokens held back, and its data when it is asked for."""

    shown: int
    held: int
    data: Callable[[], dict[str, Any]]


def token_data(source: Source, budget: int) -> TokenData:
    """Responses of the source's runs in at most `budget` bytes of JSON."""
    found = TokenData(judges_of(source))
    if source.kind == "dump":
        queues = [iter(_of_dump(source, found))]
    else:
        errors: dict[str, Curve] = {}
        queues = [iter(_of_run(source, run, found, errors)) for run in source.runs]
        found.relative = chart_of(source, RELATIVE, lambda run: errors.get(run.name, {}))
    _fill(found, queues, budget)
    return found


def _fill(found: TokenData, queues: list[Iterator[Candidate]], budget: int) -> None:
    """One response of each run in turn; what does not fit is left out and said."""
    left, out, chosen, tokens = budget, 0, list[dict[str, Any]](), 0
    while queues:
        for queue in list(queues):
            candidate = next(queue, None)
            if candidate is None:
                queues.remove(queue)
                continue
            # most of what does not fit is known by its length: encoding it would take longer than all the rest
            if tokens and candidate.shown * (budget - left) / tokens > 1.3 * left:
                out += 1
                continue
            response = candidate.data()
            size = len(json.dumps(response, ensure_ascii=True, separators=(",", ":")))
            if size > left:
                out += 1
                continue
            left, tokens = left - size, tokens + candidate.shown
            chosen.append(response)
    found.responses = sorted(chosen, key=lambda r: (found.runs.index(r["run"]), r["step"] or 0, r["row"]))
    found.runs = [name for name in found.runs if any(r["run"] == name for r in chosen)]
    if out:
        found.notes.append(f"{out} more sampled responses were left out, so that the file stays small.")


def _of_run(source: Source, run: RunFiles, found: TokenData, errors: dict[str, Curve]) -> list[Candidate]:
    """The responses of a run: the most telling of each step, the last step first; then the second of each ..."""
    files = spread(run.samples, STEPS_OF_STUDY if source.kind == "study" else STEPS_OF_RUN)
    if files:
        found.runs.append(run.name)
    by_step: list[list[Candidate]] = []
    empty: list[str] = []
    for file in reversed(files):
        try:
            read = _read(file, run.rule)
        except UserError as problem:
            found.notes.append(f"{run.name}: {problem}")
            continue
        if read is None:
            empty.append(file.stem)
            continue
        dump, rows = read
        errors.setdefault(run.name, {})[int(rows[0]["step"])] = _relative_error(dump)
        made = _candidates(dump, found.judges, run.name, (run.variant, run.rule), rows)
        by_step.append(sorted(made, key=lambda candidate: -candidate.held))
    if empty:
        found.notes.append(
            f"{run.name}: no sampled response of {', '.join(empty)} has a loss token (all rewards of a group equal)."
        )
    most = max(map(len, by_step), default=0)
    return [candidates[at] for at in range(most) for candidates in by_step if at < len(candidates)]


def _of_dump(source: Source, found: TokenData) -> list[Candidate]:
    dump = last_update(read_dump(source.path))
    keep = dump.loss_tokens > 0
    if keep.sum() > MOST_OF_DUMP:
        found.notes.append(f"of {int(keep.sum())} responses the first {MOST_OF_DUMP} were looked at here.")
        keep &= np.cumsum(keep) <= MOST_OF_DUMP
    dump = dump.select(keep)
    if dump.advantages is None:
        found.notes.append("there are no advantages, so what rules would do is unknown: it depends on their sign.")
        return []
    found.runs.append(source.path.name)
    return sorted(_candidates(dump, found.judges, source.path.name), key=lambda c: -c.held)


def spread(files: Sequence[Path], most: int) -> list[Path]:
    """At most `most` of them, evenly, the last one always."""
    if len(files) <= most:
        return list(files)
    return [files[round(at * (len(files) - 1) / (most - 1))] for at in range(most)]


def _read(file: Path, rule: TrustRegion | None) -> tuple[Dump, list[dict[str, Any]]] | None:
    """The responses of a file that have a loss token, and their rows; None where none has."""
    try:
        rows = [row for row in read_jsonl(file) if any(row.get("mask") or ())]
    except ValueError as error:
        raise UserError(str(error)) from error
    if not rows:  # all groups of the step had equal rewards
        return None
    dump = read_dump(file)
    if dump.divergence is not None and dump.divergence_name is None and rule is not None:
        dump = replace(dump, divergence_name=rule.divergence)  # a run without certificates.jsonl
    return dump.select(dump.loss_tokens > 0), rows


def _relative_error(dump: Dump) -> float:
    gap, size = (
        np.abs(values)[dump.mask].sum(dtype=np.float64)
        for values in (dump.policy_logp - dump.rollout_logp, dump.rollout_logp)
    )
    return float(gap / size) if size > 0 else 0.0


# ------------------------------------------------------------------------------------------------------------- encoding


def _candidates(
    dump: Dump,
    judges: Sequence[Judge],
    run: str,
    of: tuple[str | None, TrustRegion | None] = (None, None),
    rows: list[dict[str, Any]] | None = None,
) -> list[Candidate]:
    """The responses of a dump. of : variant and rule of the run that made it, whose thresholds may be its own (`auto`).
    rows : what the run has recorded of them, None for a dump.
    """
    variant, own_rule = of
    scores = Scores(dump)
    own = next((at for at, judge in enumerate(judges) if judge.variant == variant and variant is not None), None)
    extra = None
    if own is None and variant is not None and own_rule is not None:  # one of more variants than there are strips
        extra = Judge(variant, own_rule, variant)
        own, judges = len(judges), [*judges, extra]
    verdicts = []
    for at, judge in enumerate(judges):
        judged = judge_tokens(own_rule if at == own and own_rule is not None else judge.rule, dump, scores)
        verdicts.append(recorded(judged, rows) if at == own and rows is not None else judged)
    measured = dict(scores.of(kind) for kind in ("tv", "kl"))
    head: dict[str, Any] = {"run": run, "variant": variant, "own": own, "main": list(measured).index(scores.main()[0])}
    head |= {} if extra is None else {"extra": extra.as_json()}
    held = np.isin(verdicts[own if own is not None else 0].reason, HELD)
    found = []
    for row, length in enumerate(dump.lengths.tolist()):
        low = int(dump.cu_seqlens[row])
        number = int(rows[row]["row"]) if rows is not None else row
        count = int(held[low : low + length].sum())
        own_head = head | {"row": number, "length": length, "held": count}
        data = functools.partial(_response, dump, row, own_head, measured, verdicts)
        found.append(Candidate(min(length, LONGEST), count, data))
    return found


def _response(
    dump: Dump, row: int, head: dict[str, Any], measured: dict[str, Array], verdicts: Sequence[Judged]
) -> dict[str, Any]:
    """The data of one response for the page."""
    low, high = int(dump.cu_seqlens[row]), int(dump.cu_seqlens[row + 1])
    cut, names = slice(low, min(high, low + LONGEST)), list(measured)
    found = dict(head)
    found |= {name: None if (v := getattr(dump, name)) is None else int(v[row]) for name in ("step", "update")}
    found |= _texts(dump, row, cut) | _numbers(dump, row, cut)
    found["D"] = [{"name": name, "values": _under(dump, cut, D)} for name, D in measured.items()]
    found["verdicts"] = [_verdict(verdict, names, dump, cut, row) for verdict in verdicts]
    return found


def _texts(dump: Dump, row: int, cut: slice) -> dict[str, Any]:
    prompt = "" if dump.prompts is None else dump.prompts[row] or ""
    if len(prompt) > LONGEST_PROMPT:
        prompt = f"{prompt[: LONGEST_PROMPT // 2]}\n[...]\n{prompt[-LONGEST_PROMPT // 2 :]}"
    count = cut.stop - cut.start
    if dump.tokens is not None:
        pieces = [printable(piece) for piece in dump.tokens[row][:count]]
    elif dump.ids is not None:
        pieces = [f"[{int(token)}]" for token in dump.ids[cut]]
    else:
        pieces = ["\u25ab"] * count
    return {"prompt": printable(prompt), "tokens": pieces}


def _numbers(dump: Dump, row: int, cut: slice) -> dict[str, Any]:
    mask = dump.mask[cut]
    A = dump.advantages[cut] if dump.advantages is not None else np.zeros(len(mask))
    inside = A[mask]
    same = len(inside) > 0 and bool((inside == inside[0]).all())
    found: dict[str, Any] = {
        "A": short_one(float(inside[0])) if same else _under(dump, cut, dump.advantages),
        "mu": _under(dump, cut, dump.rollout_logp),
        "log": _under(dump, cut, dump.policy_logp - dump.rollout_logp),
    }
    if not mask.all():
        found["mask"] = "".join("1" if inside else "0" for inside in mask)
    if dump.reward is not None:
        found["reward"] = short_one(float(dump.reward[row]))
    return found


def _under(dump: Dump, cut: slice, values: Array | None) -> list[Any]:
    """Rounded, null outside the mask."""
    if values is None:
        return []
    return short([float(x) if inside else None for x, inside in zip(values[cut], dump.mask[cut], strict=True)])


def _verdict(judged: Judged, names: Sequence[str], dump: Dump, cut: slice, row: int) -> dict[str, Any]:
    """reason : a digit per token. Left out: a constant repeated, a coefficient that follows from reason and ratio."""
    reason, mask = judged.reason[cut], dump.mask[cut]
    found: dict[str, Any] = {"r": "".join(map(str, reason.tolist()))}
    if judged.divergence is not None:
        found["d"] = names.index(judged.divergence)
    if judged.threshold is not None:
        inside = judged.threshold[cut][mask]
        constant = len(inside) > 0 and float(np.ptp(inside)) <= CLOSE * abs(float(inside[0]))
        found["th"] = short_one(float(inside[0])) if constant else _under(dump, cut, judged.threshold)
    for key, values in (("w", judged.weight), ("left", judged.left)):
        if values is not None:
            found[key] = _under(dump, cut, values)
    for key, value in (("db", judged.delta_b), ("used", judged.used)):
        if value is not None:
            found[key] = short_one(float(value[row]))
    ratio = np.exp(dump.policy_logp[cut] - dump.rollout_logp[cut])
    expected = np.where(np.isin(reason, HELD), 0.0, ratio)
    given = np.where(np.isnan(judged.coefficient[cut]), expected, judged.coefficient[cut])
    other = mask & (np.abs(given - expected) > CLOSE * np.maximum(1, np.abs(expected)))
    if other.any():
        found["c"] = {str(at): short_one(float(given[at])) for at in np.flatnonzero(other)}
    return found


#: Words of the reasons by code, for the page.
REASON_CODES = [code.key for code in Reason]
