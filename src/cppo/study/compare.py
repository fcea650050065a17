"""`cppo compare`: does it help on my task? The same run under several rules, seed by seed.

What rules share comes from the recipe; a rule's own parameters are, in this order,

1. what the command line says of it alone: ``dppo.delta=0.05``;
2. the recipe's, for the recipe's own rule (``rule.delta=0.1`` changes these);
3. for `dppo` in a recipe of `cppo`, or the other way round: the recipe's token limit `delta` and `divergence`. The two
   limit a token's divergence alike and differ in what the prefix adds; with another delta the comparison would be about
   delta;
4. the rule's defaults, which are the paper's settings.

`execute` is not about rules: it runs and reports any plan, of named configurations times seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from cppo import files
from cppo.config.keys import rule_parameters
from cppo.config.load import Config, load_config
from cppo.errors import UserError
from cppo.rules.base import RULES
from cppo.show.progress import RunProgress
from cppo.study import tables
from cppo.study.plan import Plan, Variant, check_names
from cppo.study.results import Results, read_results
from cppo.study.runner import Runner
from cppo.words import nearest

#: Names that the field uses for a rule with certain parameters, and the settings that they stand for.
ALIASES: dict[str, tuple[str, ...]] = {
    alias: (f"rule={name}", *(f"rule.{key}={value}" for key, value in parameters.items()))
    for name, rule in RULES.items()
    for alias, parameters in rule.aliases.items()
}
#: The rows of the paper's Table 1.
TABLE_1 = ("grpo", "minpro", "cispo", "dppo", "trm_max", "trm_avg", "cppo")

RESULTS_FILE = "results.json"
TABLE_FILE = "table.md"


def rule_variants(recipe: str, settings: Sequence[str], rules: Sequence[str]) -> tuple[list[str], list[Variant]]:
    """(settings of all runs, one variant a rule) for what was typed.

    Parameters
    ----------
    recipe, settings : as of `load_config`; also ``LABEL.parameter=value`` for one of `rules`.
    rules : names of rules, or `grpo`.

    Raises
    ------
    UserError : an unknown rule, one given twice, settings that are wrong.
    """
    check_names(rules)
    for label in rules:
        if label not in RULES and label not in ALIASES:
            known = [*ALIASES, *RULES]
            raise UserError(f"--rules names {label!r}; there are {', '.join(known)}.{nearest(label, known)}")
    own: dict[str, list[str]] = {label: [] for label in rules}
    common: list[str] = []
    for text in settings:
        key, _, value = text.partition("=")
        label, _, parameter = key.strip().partition(".")
        if label in own and parameter:
            own[label].append(f"rule.{parameter}={value}")
        elif parameter and (label in ALIASES or label in RULES):
            raise UserError(f"{text} is about {label}, which --rules does not name.")
        else:
            common.append(text)
    base = load_config(recipe, common)
    about_rule = [text for text in common if _is_about_rule(text, base.rule.name)]
    shared = [text for text in common if text not in about_rule]
    variants = []
    for label in rules:
        start = ALIASES.get(label, (f"rule={label}",))
        name = start[0].removeprefix("rule=")
        made = list(start)
        if name == base.rule.name:
            made += about_rule
        elif RULES[name].limits_tokens and RULES[base.rule.name].limits_tokens:
            made += [f"rule.{key}={base.rule.parameters[key]}" for key in ("divergence", "delta")]
        variants.append(Variant(label, (*made, *own[label])))
    return shared, variants


def _is_about_rule(text: str, rule: str) -> bool:
    key = text.partition("=")[0].strip()
    # a key of the run itself wins, as in `load_config`: `seed` is the run's and not that of shuffled weights
    return key.startswith("rule.") or (key not in Config.model_fields and key in rule_parameters(rule))


def execute(plan: Plan, jobs: int, console: Console) -> tuple[Results, bool]:
    """Run what is not finished, write `results.json` and `table.md` and print the table; (results, nothing failed).

    Raises
    ------
    UserError, KeyboardInterrupt : as of `Runner.run`; the files are written also then.
    """
    results, errors = run_all(plan, jobs, console, write_results)
    console.print(tables.rich_tables(results))
    console.print(f"Written: {plan.folder / TABLE_FILE}, {plan.folder / RESULTS_FILE}", highlight=False, soft_wrap=True)
    return results, not errors


Written = TypeVar("Written")


def run_all(
    plan: Plan, jobs: int, console: Console, write: Callable[[Plan], Written]
) -> tuple[Written, dict[str, str]]:
    """Run what is not finished, then `write` the results, also after Ctrl-C; (what it returned, errors by run)."""
    with RunProgress(console) as progress:
        progress.note(f"{len(plan.trained)} runs, {jobs} at a time, {plan.threads} threads each; in {plan.folder}")
        try:
            errors = Runner(plan, jobs, progress).run()
        except KeyboardInterrupt:
            write(plan)
            raise
    return write(plan), errors


def write_results(plan: Plan) -> Results:
    """Read the runs and write `results.json` and `table.md` into the study's folder."""
    results = read_results(plan)
    files.atomic_write_json(plan.folder / RESULTS_FILE, results.as_json())
    files.atomic_write_text(plan.folder / TABLE_FILE, tables.markdown(results))
    return results


def free_folder(parent: Path, name: str) -> Path:
    """The first of name-001, name-002 ... that does not exist."""
    number = 1
    while (parent / f"{name}-{number:03d}").exists():
        number += 1
    return parent / f"{name}-{number:03d}"
