"""`cppo ablate`: what CPPO's parts do. Suites of configurations that run as one study.

* A *suite* asks one question and lists *entries*: a label, settings on top of the recipe, and coordinates (``length:
  24``) for its tables and figures. `ablate_suites` and `frontier` define them.
* Entries of different suites that come to the same configuration (CPPO as the recipe has it is in all of them) are one
  variant of the plan, so they run once; so do the warm-ups of a seed that make the same model.
* The suites are kept in the plan's details, so that a study can be gone on with and read without its recipe. A suite is
  read by looking at the plan through it (`view`), which makes it an ordinary study for `cppo.study.results`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cppo.config.load import Config, load_config
from cppo.errors import UserError
from cppo.rules.base import RULES
from cppo.show.tables import Cells
from cppo.study.compare import ALIASES, rule_variants
from cppo.study.plan import Plan, Variant, make_plan
from cppo.study.results import Results

KIND = "ablate"
#: The rule that the suites take apart and measure against others.
RULE = "cppo"
#: What it is measured against where the question is how far training can be pushed.
RULES_COMPARED = ("grpo", "dppo", RULE)


@dataclass(frozen=True)
class Entry:
    """One configuration of a suite. settings: on top of what all runs share. at: its place in tables and figures."""

    label: str
    settings: tuple[str, ...] = ()
    at: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    """The plan's variant that it is; bound by `compose`, before that a name to give it (default: from the label)."""


@dataclass(frozen=True)
class Suite:
    """A question and the configurations that answer it. baseline: the label that the others are measured against."""

    name: str
    question: str
    entries: tuple[Entry, ...]
    baseline: str | None = None

    def values(self, key: str) -> list[Any]:
        """The values of a coordinate, in the order of the entries."""
        return list(dict.fromkeys(entry.at[key] for entry in self.entries))

    def where(self, **at: Any) -> tuple[Entry, ...]:
        """The entries at these coordinates."""
        return tuple(entry for entry in self.entries if all(entry.at.get(key) == value for key, value in at.items()))


@dataclass(frozen=True)
class Base:
    """What was typed: the recipe, settings of all runs, and for each rule the settings that make it (`rule_variants`).

    `config` is the recipe under CPPO, which the suites vary.
    """

    recipe: str
    shared: tuple[str, ...]
    rules: Mapping[str, tuple[str, ...]]
    config: Config
    _resolved: dict[tuple[str, ...], Config] = field(default_factory=dict, compare=False, repr=False)

    def resolve(self, settings: Iterable[str]) -> Config:
        """The configuration of these settings on top of what all runs share."""
        key = tuple(settings)
        if key not in self._resolved:  # suites are looked at several times, and reading a recipe takes 10 ms
            self._resolved[key] = load_config(self.recipe, [*self.shared, *key])
        return self._resolved[key]

    def with_rule(self, rule: str, *settings: str) -> tuple[str, ...]:
        """Settings of a rule as the recipe and the command line have it, and more."""
        return (*self.rules[rule], *settings)


@dataclass(frozen=True)
class Options:
    """What the command line says of single suites; None: the suite's default."""

    rules: tuple[str, ...] | None = None
    learning_rates: tuple[float, ...] | None = None
    updates: tuple[int, ...] | None = None
    targets: tuple[float, ...] | None = None


def base_of(recipe: str, settings: Sequence[str]) -> Base:
    """The base of all suites; `settings` as of `cppo compare`, ``dppo.delta=0.05`` for one of the rules included.

    Raises
    ------
    UserError : wrong settings; a rule given, which is the suites' to choose.
    """
    for text in settings:
        key = text.partition("=")[0].strip()
        if key in ("rule", "rule.name"):
            raise UserError(f"{text}: an ablation is about {RULE} and chooses the rules itself; leave it out.")
    shared, variants = rule_variants(recipe, settings, [*ALIASES, *RULES])
    rules = {variant.name: variant.settings for variant in variants}
    return Base(recipe, tuple(shared), rules, load_config(recipe, [*shared, *rules[RULE]]))


def stale(base: Base, label: str, at: Mapping[str, Any], *settings: str) -> Entry:
    """The entry of rule at["rule"] with at["updates"] a rollout batch, and more settings.

    With one update the policy that is updated is the one that sampled, so no rule can act: all are then the same run,
    of rule `none`. Not so with vLLM, whose log-probabilities are not the trainer's.
    """
    more = (f"updates={at['updates']}", *settings)
    if at["updates"] == 1 and not base.config.rollout.vllm:
        return Entry(label, ("rule=none", *more), at, variant=_slug(label.replace(at["rule"], "none", 1)))
    return Entry(label, base.with_rule(at["rule"], *more), at)


def compose(base: Base, suites: Sequence[Suite]) -> tuple[list[Variant], list[Suite]]:
    """(the variants to run, the suites with each entry bound to its variant).

    Raises
    ------
    UserError : a configuration of a suite is not possible; which, and why.
    """
    found: list[tuple[dict[str, Any], Variant]] = []
    bound = []
    for suite in suites:
        entries = []
        for entry in suite.entries:
            try:
                resolved = base.resolve(entry.settings).model_dump()
            except UserError as error:
                raise UserError(f"suite {suite.name}, {entry.label}: {error}") from error
            variant = next((variant for other, variant in found if other == resolved), None)
            if variant is None:
                variant = Variant(_name(suite, entry, {variant.name for _, variant in found}), entry.settings)
                found.append((resolved, variant))
            entries.append(replace(entry, variant=variant.name))
        bound.append(replace(suite, entries=tuple(entries)))
    return [variant for _, variant in found], bound


def _name(suite: Suite, entry: Entry, taken: set[str]) -> str:
    """The label as the name of a folder; the suite's name in front where another suite has it already."""
    name = entry.variant or _slug(entry.label)
    return f"{suite.name}-{name}" if name in taken else name


def _slug(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", label).strip("-")


def plan_of(base: Base, suites: Sequence[Suite], folder: Path, seeds: int, threads: int) -> Plan:
    """The plan of these suites."""
    variants, bound = compose(base, suites)
    kept = [
        {
            "name": suite.name,
            "question": suite.question,
            "baseline": suite.baseline,
            "entries": [{"label": e.label, "variant": e.variant, "at": dict(e.at)} for e in suite.entries],
        }
        for suite in bound
    ]
    return make_plan(KIND, folder, base.recipe, base.shared, variants, seeds, threads, details={"suites": kept})


def suites_of(plan: Plan) -> list[Suite]:
    """The suites of a plan, as `plan_of` has kept them.

    Raises
    ------
    UserError : the plan is not an ablation.
    """
    if plan.kind != KIND or "suites" not in plan.details:
        raise UserError(f"{plan.folder} holds a study of `cppo {plan.kind}`, not of `cppo {KIND}`.")
    settings = {variant.name: variant.settings for variant in plan.variants}
    try:
        return [
            Suite(
                raw["name"],
                raw["question"],
                tuple(Entry(e["label"], settings[e["variant"]], e["at"], e["variant"]) for e in raw["entries"]),
                raw["baseline"],
            )
            for raw in plan.details["suites"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"the suites of {plan.folder} cannot be read ({error!r}): they were changed.") from error


def view(plan: Plan, suite: Suite, entries: Sequence[Entry] | None = None, baseline: str | None = None) -> Plan:
    """The plan as a suite sees it: its entries (or some of them) are the variants, under their labels.

    baseline : a label; default: the suite's own. For reading only: the runs' names and folders are the plan's.
    """
    chosen = suite.entries if entries is None else entries
    return replace(
        plan,
        kind=f"{plan.kind} {suite.name}",
        variants=tuple(Variant(entry.label, entry.settings) for entry in chosen),
        runs=tuple(
            replace(run, variant=entry.label) for entry in chosen for run in plan.runs if run.variant == entry.variant
        ),
        baseline=suite.baseline if baseline is None else baseline,
    )


@dataclass
class SuiteReport:
    """One suite as far as it has come."""

    suite: Suite
    results: Results
    tables: list[Cells] = field(default_factory=list)
    """Of the question itself; those of all studies come from `results`."""
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    """The same as plain types, for results.json."""
    drawings: dict[str, Callable[[], Figure]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain types."""
        entries = [{"label": e.label, "at": dict(e.at), "settings": list(e.settings)} for e in self.suite.entries]
        asked = {"suite": self.suite.name, "question": self.suite.question, "entries": entries}
        return asked | {"answer": self.data, "results": self.results.as_json()}
