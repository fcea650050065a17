"""Thresholds for any rule from a dump: `cppo calibrate DUMP --rule R`.

The same solver as that of `rule.delta=auto` in a run (`cppo.thresholds.solve`), on the tokens of a dump: it
asks the rule itself, and counts what the run's metrics count. Every update of every step has the same weight, as in the
mean of ``trust/masked_fraction`` over updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cppo.dumps.dump import Dump
from cppo.dumps.inspect import last_update
from cppo.dumps.scores import Scores
from cppo.errors import UserError
from cppo.rules import make_rule
from cppo.rules.base import rule_class
from cppo.thresholds import AUTO, LIMITS, Sample, Unreachable, check_automatic, solve

#: Thresholds that are left at their default where nobody asks for them: CISPO bounds the ratio from above alone.
LEFT_ALONE = {"cispo": ("ratio_min",)}


def thresholds_asked(name: str, given: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """(thresholds to solve for, the parameters that are given) of a rule: those with the value "auto"; where there are
    none, all thresholds that are not given.

    Raises
    ------
    ValueError : an unknown rule, or "auto" for what is no threshold. UserError : nothing is left to solve for.
    """
    rule_class(name)
    asked = check_automatic(name, given)
    fixed = {key: value for key, value in given.items() if key not in asked}
    if not asked:
        asked = [key for key in LIMITS.get(name, {}) if key not in fixed and key not in LEFT_ALONE.get(name, ())]
        if name == "cppo" and fixed.get("prefix_budget") is False and "delta_b" in asked:
            asked.remove("delta_b")
    if not asked:
        has = ", ".join(LIMITS.get(name, {}))
        raise UserError(f"rule {name} has {f'no threshold left: {has} are given' if has else 'no threshold'}.")
    return asked, fixed


def propose_rules(
    dump: Dump, rules: Mapping[str, Mapping[str, Any]], target: float = 0.01, update: str = "last"
) -> dict[str, Any]:
    """What `cppo calibrate DUMP --rule R` says, as plain numbers.

    Parameters
    ----------
    rules : parameters that are given, by rule; see `thresholds_asked`. target : share of the loss tokens to hold back
        (cispo, minpro: to clamp). update : "last": the responses seen at the last update of their step; "all".

    Returns
    -------
    "rules": for each "thresholds", "share" (that is held back with them), "divergence" (the dump's that the rule was
    given: a TV where it asks for one, else a KL), "given", and "problem" where no threshold gives the target (the
    others are None then); "dump", "responses", "loss_tokens", "update", "target", "notes".

    Raises
    ------
    UserError : the dump has no advantages, or none of the rules can be given a threshold.
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
        rule = make_rule(name, **fixed)
        kind, D = scores.asked_for(rule)
        entry: dict[str, Any] = {"thresholds": None, "share": None, "divergence": kind, "given": fixed, "problem": None}
        try:
            solution = solve(rule, asked, Sample.of(dump.padded(D), seen), target)
            entry |= {"thresholds": solution.thresholds, "share": solution.share}
        except Unreachable as problem:
            entry["problem"] = str(problem)
        found[name] = entry
    if all(entry["problem"] for entry in found.values()):
        raise UserError("\n".join(entry["problem"] for entry in found.values()))
    tokens = int(dump.mask.sum())
    about = {"dump": str(dump.path), "responses": len(dump.lengths), "loss_tokens": tokens}
    return about | {"update": update, "target": target, "rules": found, "notes": notes}


def _updates(dump: Dump) -> torch.Tensor | None:
    """The (step, update) of each response, numbered ``[S, 1]``; None where the dump says neither."""
    columns = [values for values in (dump.step, dump.update) if values is not None]
    if not columns:
        return None
    number = np.unique(np.stack(columns), axis=1, return_inverse=True)[1].reshape(-1)
    return torch.from_numpy(number)[:, None]


__all__ = ["AUTO", "propose_rules", "thresholds_asked"]
