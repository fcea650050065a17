"""The suites of `cppo ablate`, each from the recipe's own values; `frontier` has its own file.

What a suite holds fixed, and the choices that the paper leaves open, stand in the docstring of its function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cppo.config.load import Config
from cppo.errors import UserError
from cppo.rules import RULES
from cppo.study.ablate.frontier import frontier
from cppo.study.ablate.suite import RULE, RULES_COMPARED, Base, Entry, Options, Suite, stale

LENGTHS = (6, 12, 24, 48)
STALENESS = (1, 2, 4, 8, 16)
TARGETS = (0.003, 0.01, 0.03, 0.1)
#: Thresholds of each rule that has any, under the field's name for it: `auto` calibrates them to a target.
THRESHOLDS: dict[str, tuple[str, ...]] = {
    next(iter(rule.aliases), name): tuple(key for key, limit in rule.limits.items() if limit.by_default)
    for name, rule in RULES.items()
    if rule.limits
}
#: The paper's thresholds for total variation and for KL (its Table 3 and its ablation).
PAPER_TV = {"delta": 0.15, "delta_b": 0.02}
PAPER_KL = {"delta": 0.1, "delta_b": 0.002}


def mechanisms(base: Base, options: Options) -> Suite:
    """CPPO with one part taken out or exchanged (the paper's Figure 5).

    KL scores need other thresholds. The paper has delta = 0.1 and delta_b = 0.002 nats beside 0.15 and 0.02 of total
    variation; a KL grows with the square of a TV, so the recipe's thresholds are translated by that square: 0.1 (delta
    / 0.15)^2 and 0.002 (delta_b / 0.02)^2, the paper's own where the recipe has the paper's. `trm_max_avg` gets the
    same two: its maximum and its mean, over the same KL.
    """
    rule = base.config.rule.parameters
    kl = {key: PAPER_KL[key] * (_number(base, "mechanisms", key) / PAPER_TV[key]) ** 2 for key in PAPER_KL}
    scored = ("rule.divergence=topk_kl", "topk_store=float32", f"rule.delta={kl['delta']:.4g}")
    fixed = rule["budget"] == "fixed"
    changes: dict[str, tuple[str, ...]] = {
        RULE: (),
        "without weights": ("rule.weights=none",),
        "without budget": ("rule.prefix_budget=false",),
        "shuffled weights": ("rule.weights=shuffled",),
        "soft gate": ("rule.gate=reciprocal",),
        f"{'adaptive' if fixed else 'fixed'} budget": (f"rule.budget={'adaptive' if fixed else 'fixed'}",),
        "KL": (*scored, f"rule.delta_b={kl['delta_b']:.4g}"),
        "binary TV": ("rule.divergence=binary_tv",),
        "top-K TV": ("rule.divergence=topk_tv",),
        "exact TV": ("rule.divergence=exact_tv",),
    }
    entries = [Entry(label, base.with_rule(RULE, *change)) for label, change in changes.items()]
    trm = ("rule=trm_max_avg", *scored, f"rule.delta_avg={kl['delta_b']:.4g}")
    entries.insert(7, Entry("TRM Max&Avg", trm))
    return Suite("mechanisms", "What does each part of CPPO do?", _different(base, entries), RULE)


def grid(base: Base, options: Options) -> Suite:
    """delta_b x w_min around the recipe's values (the paper's Figure 6), all else the recipe's."""
    delta_b, w_min = (_number(base, "grid", key) for key in ("delta_b", "w_min"))
    budgets = [delta_b if factor == 1 else float(f"{delta_b * factor:.3g}") for factor in (0.25, 0.5, 1, 2, 4)]
    weights = sorted({0.4, 0.6, 0.8, 1.0, w_min})
    entries = [
        Entry(
            f"delta_b {b:g}, w_min {w:g}",
            base.with_rule(RULE, f"rule.delta_b={b!r}", f"rule.w_min={w!r}"),
            {"delta_b": b, "w_min": w},
        )
        for b in dict.fromkeys(budgets)
        for w in weights
    ]
    own = next(e.label for e in entries if e.at == {"delta_b": delta_b, "w_min": w_min})
    return Suite("grid", "How much do delta_b and w_min matter?", tuple(entries), own)


def shapes(base: Base, options: Options) -> Suite:
    """Weight schedules at the recipe's w_min: linear, constant, cosine, reversed, and matched to T - t.

    The matched one comes twice: with the recipe's w_min as its floor, and with a floor of 0.05, which follows T - t
    almost to the end (and lets the last tokens move further).
    """
    names = {"linear": "linear", "constant": "none", "cosine": "cosine", "reversed": "reversed", "matched": "matched"}
    entries = [Entry(label, base.with_rule(RULE, f"rule.weights={name}")) for label, name in names.items()]
    low = ("rule.weights=matched", "rule.w_min=0.05")
    entries.append(Entry("matched, floor 0.05", base.with_rule(RULE, *low)))
    return Suite("shapes", "Which schedule of the weights?", tuple(entries), "linear")


def delta(base: Base, options: Options) -> Suite:
    """Every rule's limits at the same share of masked tokens: `auto` thresholds, calibrated to a few targets.

    Rules are then compared by which tokens they hold back and not by how many. A clamped token counts as masked for
    the rules that clamp.
    """
    targets = options.targets or TARGETS
    rules = options.rules or tuple(THRESHOLDS)
    if unknown := [rule for rule in rules if rule not in THRESHOLDS]:
        raise UserError(f"--rules names {unknown[0]}, which has no threshold; suite delta has {', '.join(THRESHOLDS)}.")
    if wrong := [target for target in targets if not 0 < target < 1]:
        raise UserError(f"--targets has {wrong[0]:g}: expected shares of the tokens, such as 0.01.")
    entries = [
        Entry(
            f"{rule}@{target:g}",
            base.with_rule(rule, *(f"rule.{key}=auto" for key in THRESHOLDS[rule]), f"calibration.target={target!r}"),
            {"rule": rule, "target": target},
        )
        for rule in rules
        for target in targets
    ]
    return Suite("delta", "Which rule holds back the right tokens, at the same share of them?", tuple(entries))


def length(base: Base, options: Options) -> Suite:
    """Does CPPO's advantage grow with the horizon? chain-6 to chain-48 under three rules, each from its own warm-up.

    So that the lengths differ in length alone, as far as that goes, from a recipe of chain-m: the response limit is the
    recipe's times the ratio of the right answers' lengths; the teacher's ignorance the recipe's times m / n, so that it
    solves the same share of the problems (each of n facts must be known); and warm-ups are n / m times as long for
    longer chains, whose students learn slower. Where they start in fact is in the table.
    """
    config = base.config
    if config.task.name != "arithmetic":
        raise UserError(
            f"suite length makes the problems longer, which it can with task=arithmetic only; the recipe's is "
            f"{config.task.name}. Leave it out: --only {','.join(name for name in SUITES if name != 'length')}."
        )
    entries = [
        Entry(f"{rule}, chain-{n}", base.with_rule(rule, *_longer(config, n)), {"rule": rule, "length": n})
        for n in LENGTHS
        for rule in options.rules or RULES_COMPARED
    ]
    return Suite("length", "Does the advantage grow with the horizon?", tuple(entries))


def _longer(config: Config, n: int) -> tuple[str, ...]:
    from cppo.tasks import make_task

    def longest(options: dict[str, Any]) -> int:
        made: Any = make_task("arithmetic", **options)
        return int(made.max_response_tokens)

    options = dict(config.task.options)
    task: Any = make_task("arithmetic", **options)
    if list(task.families) == [f"chain-{n}"]:
        return ()
    chains = [int(family.removeprefix("chain-")) for family in task.families if family.startswith("chain-")]
    m = max(chains, default=12)
    ignorance = min(1.0, task.ignorance * m / n)
    right = longest(options | {"families": [f"chain-{n}"]})
    limit = math.ceil(config.rollout.max_new_tokens * right / longest(options))
    made = [f"task.families=[chain-{n}]", f"task.ignorance={ignorance:.4g}", f"rollout.max_new_tokens={limit}"]
    if n > m and config.model == "tiny":
        made.append(f"warmup.steps={math.ceil(config.warmup.steps * n / m)}")
    if config.evaluation.max_new_tokens is not None:
        scale = limit / config.rollout.max_new_tokens
        made.append(f"evaluation.max_new_tokens={math.ceil(config.evaluation.max_new_tokens * scale)}")
    return tuple(made)


def staleness(base: Base, options: Options) -> Suite:
    """Updates a rollout batch, M = 1 ... 16, at the recipe's learning rate: M minibatches of the same batch in turn.

    More updates are more steps of the optimizer, on smaller minibatches, from an older policy. With M = 1 nothing is
    old and no rule acts, so all rules are the same run (`none`).
    """
    entries = [
        stale(base, f"{rule}, M {m}", {"rule": rule, "updates": m})
        for m in options.updates or STALENESS
        for rule in options.rules or RULES_COMPARED
    ]
    return Suite("staleness", "How many updates does a rollout batch stand?", tuple(entries))


SUITES: dict[str, Callable[[Base, Options], Suite]] = {
    suite.__name__: suite for suite in (mechanisms, grid, shapes, delta, length, staleness, frontier)
}


def make_suites(base: Base, names: Sequence[str], options: Options) -> list[Suite]:
    """The suites of these names."""
    return [SUITES[name](base, options) for name in names]


def _number(base: Base, suite: str, key: str) -> float:
    value = base.config.rule.parameters[key]
    if not isinstance(value, int | float) or value == 0:
        raise UserError(
            f"suite {suite} starts from the recipe's {key}, which is {value!r}: set rule.{key} to a number above 0."
        )
    return float(value)


def _different(base: Base, entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Without those that the recipe makes the same as an earlier one (its own divergence, say)."""
    kept: list[tuple[Config, Entry]] = []
    for entry in entries:
        config = base.resolve(entry.settings)
        if all(config != other for other, _ in kept):
            kept.append((config, entry))
    return tuple(entry for _, entry in kept)
