"""What a dump of rollouts shows: divergence by position, what each rule would do, budgets, and the certificate.

`inspect_dump` gives one plain dictionary, which is what `cppo inspect --json` prints, what the tables
(`cppo.cli.inspect`) show and what the figures (`cppo.dumps.figures`) draw. Keys: docs/inspect.md.

Every number comes from the package's own functions (`cppo.divergence`, the rules, `by_position`, `certificate_row`) on
packed `TokenBatch`es of whole responses, at most 2^18 tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cppo.dumps.dump import Array, Dump
from cppo.dumps.scores import Scores, certificate_of
from cppo.errors import UserError
from cppo.files import rounded
from cppo.rules import CPPO, RULES, Reason, TrustRegion, make_rule
from cppo.runs.positions import by_position

#: Shares of the tokens that quantiles are given at.
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, eq=False)
class Judged:
    """What one rule does to the loss tokens of a dump, in their order (n of them, S responses).

    dropped : coefficient 0, bool ``[n]``. reason : codes of `cppo.Reason`, uint8 ``[n]``. delta_b, budget_used : as in
    `cppo.Verdict`, ``[S]``. share : S_t / (delta + delta_b W_{t-1}), the part of the budget spent after t, ``[n]``.
    The last three are None for rules without prefix budget.
    """

    dropped: Array
    reason: Array
    delta_b: Array | None
    budget_used: Array | None
    share: Array | None


def inspect_dump(dump: Dump, rules: Sequence[TrustRegion] | None = None, update: str | int = "last") -> dict[str, Any]:
    """Everything `cppo inspect` says about a dump, as plain numbers, texts, lists and dictionaries.

    Parameters
    ----------
    rules : what is compared, by default every rule of `cppo.RULES` with its default parameters. A rule that asks for a
        TV (KL) is given the dump's TV (KL), its own, else top-K, else binary: which one it was is part of the result.
    update : where the dump says at which update of a rollout batch each response was seen: "last" (the last of each
        step, where pi has moved furthest), "all", or a number.

    Raises
    ------
    UserError : the dump has no such update, or two of the rules have the same name.
    """
    judges = [make_rule(name) for name in RULES] if rules is None else list(rules)
    if len({rule.name for rule in judges}) < len(judges):
        raise UserError(f"a rule is given twice: {', '.join(rule.name for rule in judges)}.")
    whole, chosen = dump, _at_update(dump, update)
    dump = chosen.select(chosen.loss_tokens > 0)
    if not len(dump.lengths):
        raise UserError(f"{dump.path} has no loss token at update {update}.")
    scores = Scores(dump)
    notes, judged = list(dump.notes), {}
    if dump.divergence is not None and dump.divergence_name is None:
        notes.append("the dump does not say which divergence it holds (divergence_name): taken as a total variation.")
    if dump.advantages is None:
        notes.append("there are no advantages: what rules would do depends on their sign and is left out.")
    else:
        judged = {rule.name: judge(rule, dump, scores.asked_for(rule)[1]) for rule in judges}
    name, D = scores.main()
    cppo = next((rule for rule in judges if isinstance(rule, CPPO)), None)
    certificate = certificate_of(chosen, notes)
    return {
        "dump": _about(whole, chosen, dump, update),
        "divergence": {"name": name} | _spread(D[dump.mask]) | {"by_position": _positions(dump, D[dump.mask])},
        "mismatch": _mismatch(whole),
        "rules": {rule.name: _rule(rule, judged[rule.name], dump, scores) for rule in judges if judged},
        "disagreement": _disagreement(judged),
        "budget": _budget(cppo, judged[cppo.name], dump) if cppo is not None and judged else None,
        "certificate": certificate,
        "notes": notes,
    }


def last_update(dump: Dump) -> Dump:
    """The responses seen at the last update of their step, where pi has moved furthest; all where no update is said."""
    if dump.update is None:
        return dump
    step = dump.step if dump.step is not None else np.zeros_like(dump.update)
    index = np.unique(step, return_inverse=True)[1]
    last = np.full(int(index.max()) + 1, dump.update.min())
    np.maximum.at(last, index, dump.update)
    return dump.select(dump.update == last[index])


def _at_update(dump: Dump, update: str | int) -> Dump:
    """The responses seen at that update of their step."""
    if update == "all":
        return dump
    if update == "last":
        return last_update(dump)
    if dump.update is None:
        raise UserError(f"{dump.path} does not say at which update a response was seen: --update {update} cannot be.")
    keep = dump.update == update
    if not keep.any():
        raise UserError(f"{dump.path} has the updates {np.unique(dump.update).tolist()}, not {update}.")
    return dump.select(keep)


def judge(rule: TrustRegion, dump: Dump, divergence: Array | None) -> Judged:
    """One rule on a dump with advantages, whose responses all have a loss token. divergence : ``[N]`` or None."""
    parts: dict[str, list[Any]] = {name: [] for name in ("dropped", "reason", "delta_b", "budget_used", "share")}
    for block in replace(dump, divergence=divergence).blocks():
        batch = block.packed(block.divergence)
        verdict = rule(batch)
        inside = batch.loss_mask
        parts["dropped"].append((verdict.coefficient == 0)[inside])
        parts["reason"].append(verdict.reason[inside])
        account = rule.account(batch, verdict)
        if account is not None and account.allowance is not None:
            parts["share"].append((account.spent / account.allowance)[inside])
            parts["delta_b"].append(verdict.delta_b)
            parts["budget_used"].append(verdict.budget_used)
    joined: dict[str, Any] = {name: torch.cat(found).numpy() if found else None for name, found in parts.items()}
    return Judged(**joined)


# ------------------------------------------------------------------------------------------------------------- sections


def _about(whole: Dump, chosen: Dump, dump: Dump, update: str | int) -> dict[str, Any]:
    loss = dump.loss_tokens
    return {
        "path": str(dump.path),
        "responses": len(dump.lengths),
        "without_loss_tokens": len(chosen.lengths) - len(dump.lengths),
        "at_other_updates": len(whole.lengths) - len(chosen.lengths),
        "update": None if dump.update is None else update if update == "all" else int(dump.update.max()),
        "loss_tokens": int(loss.sum()),
        "other_tokens": len(dump.mask) - int(loss.sum()),
        "longest": int(loss.max()),
        "mean_length": rounded(float(loss.mean())),
        "groups": None if dump.group is None else len(np.unique(dump.group)),
        "steps": None if dump.step is None else [int(dump.step.min()), int(dump.step.max())],
        "reward": _mean_reward(dump),
        "top_k": None if dump.topk_ids is None else dump.topk_ids.shape[1],
    }


def _mean_reward(dump: Dump) -> float | None:
    known = dump.reward[np.isfinite(dump.reward)] if dump.reward is not None else np.empty(0)
    return rounded(float(known.mean())) if len(known) else None


def _spread(values: Array) -> dict[str, Any]:
    """Mean, quantiles and maximum."""
    quantiles = np.quantile(values, QUANTILES)
    found = {f"p{round(100 * q)}": rounded(float(x)) for q, x in zip(QUANTILES, quantiles, strict=True)}
    return {"mean": rounded(float(values.mean(dtype=np.float64)))} | found | {"max": rounded(float(values.max()))}


def _positions(dump: Dump, values: Array) -> dict[str, Any]:
    """Mean and top-10% tail of a number a loss token, by its position (`cppo.runs.positions.by_position`)."""
    positions = torch.from_numpy(dump.positions()[dump.mask])
    row = by_position(positions, torch.from_numpy(values).double(), torch.zeros(len(values)))
    return {name: row[name] for name in ("width", "count", "mean", "tail_mean")}


def _mismatch(dump: Dump) -> dict[str, Any]:
    """How far pi and mu are apart before any update: at update 0 where it was dumped, else a median stands for it."""
    first = None if dump.update is None else dump.update == 0
    if first is not None and first.any() and dump.select(first).mask.any():
        start = dump.select(first)
        name, D = Scores(start).main()
        gap = np.abs(start.policy_logp - start.rollout_logp)[start.mask]
        numbers = (float(gap.mean(dtype=np.float64)), float(D[start.mask].mean(dtype=np.float64)))
        source = "mean of update 0, before the policy was changed"
    else:
        name, D = Scores(dump).main()
        gap = np.abs(dump.policy_logp - dump.rollout_logp)[dump.mask]
        numbers = (float(np.median(gap)), float(np.median(D[dump.mask])))
        source = "median of all loss tokens (the dump has no update 0)"
    return {"source": source, "abs_log_ratio": rounded(numbers[0]), "divergence": rounded(numbers[1]), "name": name}


def _rule(rule: TrustRegion, found: Judged, dump: Dump, scores: Scores) -> dict[str, Any]:
    n = len(found.reason)
    counts = np.bincount(found.reason, minlength=len(Reason))
    per_response = np.bincount(dump.owner[dump.mask][found.dropped], minlength=len(dump.lengths))
    plain = {
        k: v if isinstance(v, int | float | str | bool) or v is None else str(v) for k, v in rule.parameters().items()
    }
    return {
        "parameters": plain,
        "divergence": scores.asked_for(rule)[0],
        "kept": 1 - int(found.dropped.sum()) / n,
        "masked": int(found.dropped.sum()) / n,
        "reasons": {code.name.lower(): int(counts[code]) / n for code in Reason if code != Reason.OUTSIDE},
        "responses_with_masked": int((per_response > 0).sum()) / len(per_response),
    }


def _disagreement(judged: dict[str, Judged]) -> dict[str, Any]:
    """Share of the loss tokens that one rule keeps and the other drops, for each pair."""
    names = list(judged)
    table = [
        [int((judged[a].dropped != judged[b].dropped).sum()) / len(judged[a].dropped) for b in names] for a in names
    ]
    return {"rules": names, "share": table}


def _budget(rule: CPPO, found: Judged, dump: Dump) -> dict[str, Any] | None:
    if found.delta_b is None or found.budget_used is None or found.share is None:
        return None
    most = rule.delta_b * (rule.budget_max if rule.budget == "adaptive" else 1.0)
    return {
        "delta_b": _spread(found.delta_b),
        "at_minimum": float((found.delta_b <= np.float32(rule.delta_b)).mean()),
        "at_maximum": float((found.delta_b >= np.float32(most)).mean()),
        "budget_used": _spread(found.budget_used),
        "overdrawn": float((found.budget_used > 1).mean()),
        "share_by_position": _positions(dump, found.share),
    }
