"""`cppo calibrate`: thresholds from the divergences of a dump, for any rule.

The same solver as that of `rule.delta=auto` in a run (`cppo.thresholds.solve`), on the tokens of a dump: it asks the
rule itself, and counts what the run's metrics count. Every update of every step has the same weight, as in the mean of
``trust/masked_fraction`` over updates. A run that is trained under other thresholds moves differently, so these are the
thresholds to start from; docs/inspect.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cppo.dumps.dump import Dump
from cppo.dumps.inspect import last_update
from cppo.dumps.scores import Scores
from cppo.errors import UserError, as_user_error
from cppo.rules import DPPO, PPOClip, Reason, TrustRegion, make_rule
from cppo.rules.base import held_back, rule_class
from cppo.thresholds import Sample, Unreachable, check_automatic, solve

#: Clip ranges at which that side of PPO's clip holds nothing back.
OPEN = {"eps_low": 1 - 1e-6, "eps_high": 1e6}


def thresholds_asked(name: str, given: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """(thresholds to solve for, the parameters that are given) of a rule: those with the value "auto"; where there are
    none, all thresholds that are not given.

    Raises
    ------
    UserError : an unknown rule, "auto" for what is not a threshold, or nothing is left to solve for.
    """
    with as_user_error():
        rule = rule_class(name)
    asked = check_automatic(name, given)
    fixed = {key: value for key, value in given.items() if key not in asked}
    if not asked:
        idle = rule.idle_limits(fixed)
        asked = [key for key, limit in rule.limits.items() if limit.by_default and key not in {*fixed, *idle}]
    if not asked:
        has = ", ".join(rule.limits)
        raise UserError(f"rule {name} has {f'no threshold left: {has} are given' if has else 'no threshold'}.")
    return asked, fixed


def calibrate_dump(
    dump: Dump,
    rules: Mapping[str, Mapping[str, Any]],
    target: float = 0.01,
    update: str = "last",
    *,
    translated: bool = False,
    delta: float | None = None,
) -> dict[str, Any]:
    """What `cppo calibrate` says of a dump, as plain numbers; the keys are described in docs/inspect.md.

    Parameters
    ----------
    rules : parameters that are given, by rule; see `thresholds_asked`. target : share of the loss tokens to hold back
        (cispo, minpro: to clamp). update : "last": the responses seen at the last update of their step; "all".
    translated : every rule is given the dump's main divergence (its own, else top-K TV, else binary TV), and the limits
        of others that correspond to `delta` are added; `rules` has "cppo" then. False: a rule is given the TV or the KL
        that it asks for. delta : default the one that is found for "cppo".

    Raises
    ------
    UserError : the dump has no advantages, none of the rules can be given a threshold, or `delta` holds back nothing.
    """
    if update not in ("last", "all"):
        raise UserError(f"--update is {update!r}, expected last or all.")
    notes = list(dump.notes)
    if dump.excerpt:
        notes.append(
            "thresholds from responses that were chosen because tokens were held back in them are too loose: export "
            "whole batches (dump_observer, docs/inspect.md), or let a run find them: rule.<threshold>=auto."
        )
    if update == "last":
        dump = last_update(dump)
    dump = dump.select(dump.loss_tokens > 0)
    if not len(dump.lengths):
        raise UserError(f"{dump.path} has no loss token.")
    scores, seen = Scores(dump), _updates(dump)
    found: dict[str, Any] = {}
    for name, given in rules.items():
        asked, fixed = thresholds_asked(name, given)
        with as_user_error():
            rule = make_rule(name, **fixed)
        kind, D = scores.main() if translated else scores.asked_for(rule)
        found[name] = _solved(rule, asked, Sample.of(dump.padded(D), seen), target) | {
            "divergence": kind,
            "given": fixed,
        }
    if all(entry["problem"] for entry in found.values()):
        raise UserError("\n".join(entry["problem"] for entry in found.values()))
    if translated and delta is None:
        delta = (found["cppo"]["thresholds"] or {}).get("delta", found["cppo"]["given"].get("delta"))
        if delta is None:
            raise UserError(found["cppo"]["problem"])
    tokens = int(dump.mask.sum())
    about = {"dump": str(dump.path), "responses": len(dump.lengths), "loss_tokens": tokens}
    corresponding = translate(_samples(scores, seen), scores.main()[0], delta) if delta is not None else None
    return about | {"update": update, "target": target, "rules": found, "translation": corresponding, "notes": notes}


def _solved(rule: TrustRegion, asked: list[str], sample: Sample, target: float) -> dict[str, Any]:
    """Thresholds, the share that they hold back, the same by reason; or the problem."""
    try:
        solution = solve(rule, asked, sample, target)
    except Unreachable as problem:
        return {"thresholds": None, "share": None, "reasons": None, "problem": str(problem)}
    solved = replace(rule, **solution.thresholds)  # type: ignore[type-var]
    verdict = solved(sample.batch)
    held = held_back(verdict.reason)
    reasons = {
        Reason(code).key: float(sample.weight[held & (verdict.reason == code)].sum())
        for code in verdict.reason[held].unique().tolist()
    }
    return {"thresholds": solution.thresholds, "share": solution.share, "reasons": reasons, "problem": None}


def _samples(scores: Scores, update: torch.Tensor | None) -> dict[str, Sample]:
    """The dump's tokens with every divergence that it allows, by its name."""
    topk = ["topk_kl", "topk_tv"] if scores.dump.topk_ids is not None else []
    found = [*(scores.computed(kind) for kind in ("binary_kl", "binary_tv", *topk)), scores.main()]
    return {name: Sample.of(scores.dump.padded(D), update) for name, D in found}


def translate(samples: Mapping[str, Sample], reference: str, delta: float) -> dict[str, Any]:
    """The limit of each divergence, and the clip range of the ratio, that drop the share of tokens which DPPO's rule,
    away from mu and D_t > delta, drops with one of them.

    Parameters
    ----------
    samples : the same tokens with each divergence, by its name. reference : the divergence that `delta` is for.

    Returns
    -------
    "divergence", "delta": as given; "limits" by divergence; "clip" with "eps_low" and "eps_high": each drops the share
    that the reference drops on its side of the ratio, None where that is none.

    Raises
    ------
    UserError : no such divergence, or its limit drops no token.
    """
    if reference not in samples:
        raise UserError(f"the reference is {reference!r}, and there are {', '.join(samples) or 'no divergences'}.")
    sample, rule = samples[reference], DPPO(delta=delta)
    dropped = held_back(rule(sample.batch).reason)
    share = float(sample.weight[dropped].sum())
    if share == 0:
        raise UserError(
            f"no token moves away from the rollout policy with {reference} > {delta:g}: give a smaller one."
        )
    limits = {
        name: delta if name == reference else solve(DPPO(), ["delta"], other, share).thresholds["delta"]
        for name, other in samples.items()
    }
    positive = sample.batch.token_advantages() > 0
    clip = {
        side: _clip_range(side, sample, float(sample.weight[dropped & above].sum()))
        for side, above in (("eps_low", ~positive), ("eps_high", positive))
    }
    return {"divergence": reference, "delta": delta, "limits": limits, "clip": clip}


def _clip_range(side: str, sample: Sample, share: float) -> float | None:
    """The width on one side of PPO's clip that drops `share` of the tokens."""
    try:
        return solve(PPOClip(**OPEN), [side], sample, share).thresholds[side] if share > 0 else None
    except Unreachable:
        return None


def _updates(dump: Dump) -> torch.Tensor | None:
    """The (step, update) of each response, numbered ``[S, 1]``; None where the dump says neither."""
    columns = [values for values in (dump.step, dump.update) if values is not None]
    if not columns:
        return None
    number = np.unique(np.stack(columns), axis=1, return_inverse=True)[1].reshape(-1)
    return torch.from_numpy(number)[:, None]
