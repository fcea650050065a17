"""The rules that the token view can switch between, and what each of them says of every token of a response.

Everything comes from the rules themselves on a packed `TokenBatch`; the page computes nothing but c_t's words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cppo.dumps.dump import Array, Dump
from cppo.dumps.scores import Scores
from cppo.report.source import Source
from cppo.rules import CPPO, RULES, Reason, TrustRegion, make_rule

#: Rules at most: an ablation has hundreds of variants.
MOST = 16
#: A coefficient that differs by less is what the reason alone says.
CLOSE = 2e-4


@dataclass(frozen=True)
class Judge:
    """A rule under the name that the report gives it. variant : of the study or run, None: only to compare with."""

    label: str
    rule: TrustRegion
    variant: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Name, parameters in words, and the limits of the ratio for rules that have nothing else."""
        shown = ", ".join(f"{key}={value}" for key, value in self.rule.parameters().items() if value is not None)
        found: dict[str, Any] = {"label": self.label, "rule": self.rule.name, "parameters": shown}
        if self.variant is not None:
            found["variant"] = self.variant
        if (ratios := self.rule.ratio_range()) is not None:
            found["ratio"] = list(ratios)
        return found


def judges_of(source: Source) -> list[Judge]:
    """The rules as they were run, then the others of `cppo.RULES` with their defaults.

    For a run of cppo, dppo takes over its `delta` and `divergence`, and the other way round, as in `cppo compare`:
    else the two would differ in their limit and not in what the prefix adds.
    """
    found: list[Judge] = []
    for variant in source.variants:
        rule = next((run.rule for run in source.of(variant) if run.rule is not None), None)
        if rule is not None and len(found) < MOST:
            found.append(Judge(variant, rule, variant))
    own = next((judge.rule for judge in found if judge.rule.limits_tokens), None)
    for name in sorted(RULES, key=lambda name: name != CPPO.name):  # cppo first, where it was not run
        if name == "none" or len(found) >= MOST or any(judge.rule.name == name for judge in found):
            continue
        found.append(Judge(name, _default(name, own)))
    return found


def _default(name: str, own: TrustRegion | None) -> TrustRegion:
    if own is None or not RULES[name].limits_tokens:
        return make_rule(name)
    taken = own.parameters()
    return make_rule(name, **{key: taken[key] for key in ("divergence", "delta")})


@dataclass(frozen=True, eq=False)
class Judged:
    """What a rule says of all tokens of a dump, ``[N]`` each, None where the rule has no such thing.

    reason : codes of `cppo.Reason`. coefficient : c_t. threshold : the largest D_t within the limits. weight : w_t.
    left : delta + delta_b W_{t-1} - S_{t-1}, what the prefix budget leaves for w_t D_t. delta_b, used : ``[S]``.
    divergence : which it was given.
    """

    reason: Array
    coefficient: Array
    threshold: Array | None
    weight: Array | None
    left: Array | None
    delta_b: Array | None
    used: Array | None
    divergence: str | None


def judge_tokens(rule: TrustRegion, dump: Dump, scores: Scores) -> Judged:
    """One rule on a dump with advantages whose responses all have a loss token."""
    name, D = scores.asked_for(rule)
    batch = dump.packed(D)
    verdict = rule(batch)
    weight = left = None
    if (account := rule.account(batch, verdict)) is not None and verdict.divergence is not None:
        weight = account.weight.numpy()
        if account.allowance is not None:
            spent_before = account.spent - account.weight * verdict.divergence * batch.loss_mask
            left = (account.allowance - spent_before).numpy()
    threshold = None if verdict.threshold is None else verdict.threshold.numpy()
    N = len(dump.mask)
    return Judged(
        verdict.reason.numpy(),
        verdict.coefficient.numpy(),
        None if threshold is None else np.broadcast_to(threshold, (N,)),
        None if weight is None else np.broadcast_to(weight, (N,)),
        left,
        None if verdict.delta_b is None else verdict.delta_b.numpy(),
        None if verdict.budget_used is None else verdict.budget_used.numpy(),
        name,
    )


def recorded(judged: Judged, rows: Iterable[Mapping[str, Any]]) -> Judged:
    """The same with reasons, coefficients and thresholds as the run itself wrote them (samples/, six digits).

    A token within rounding of its limit may be judged otherwise from the file: what happened in training counts.
    """
    codes = {code.key: int(code) for code in Reason}
    reasons, coefficients, thresholds = list[int](), list[float](), list[float]()
    for row in rows:
        length = len(row["reason"])
        reasons += [codes.get(name, int(Reason.OUTSIDE)) for name in row["reason"]]
        coefficients += [np.nan if c is None else c for c in row.get("coefficient") or [None] * length]
        thresholds += [np.nan if c is None else c for c in row.get("threshold") or [None] * length]
    threshold = None if judged.threshold is None else np.array(thresholds)
    return Judged(
        np.array(reasons, dtype=np.uint8),
        np.array(coefficients),
        threshold,
        judged.weight,
        judged.left,
        judged.delta_b,
        judged.used,
        judged.divergence,
    )
