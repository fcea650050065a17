"""A plan on the disk: `study.yaml`, what was asked, and `configs/<run>.yaml`, what each run does to the last key.

A study that is gone on with reads these alone, whatever has become of the recipe in the meantime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cppo import files
from cppo.config import yaml_io
from cppo.config.load import load_config
from cppo.errors import UserError, as_user_error
from cppo.study.plan import Plan, PlannedRun, Variant

STUDY_FILE = "study.yaml"
CONFIGS = "configs"
VERSION = 1


def open_study(plan: Plan, versions: dict[str, Any]) -> Plan:
    """Write the plan into its folder, or find the same plan there: then that one, with its threads, is returned.

    Raises
    ------
    UserError : the folder holds another study, or something else.
    """
    folder = plan.folder
    if (folder / STUDY_FILE).is_file():
        before = load_plan(folder)
        if difference := differences(before, plan):
            raise UserError(
                f"{folder} holds another study: {difference}. Choose another folder by --out, or go on with that study "
                f"by --resume {folder} without recipe, rules and settings."
            )
        return before
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; choose a new or empty folder.")
    if folder.is_dir() and any(entry.name != CONFIGS for entry in folder.iterdir()):
        raise UserError(f"--out {folder} holds other files and no study; choose a new or empty folder.")
    for run in plan.runs:
        files.atomic_write_text(folder / CONFIGS / f"{run.name}.yaml", run.config.to_yaml())
    # last, since it says that the plan is whole
    files.atomic_write_text(folder / STUDY_FILE, yaml_io.dump(_asked(plan) | {"versions": versions}))
    return plan


def _asked(plan: Plan) -> dict[str, Any]:
    return {
        "study": VERSION,
        "kind": plan.kind,
        "recipe": plan.recipe,
        "settings": list(plan.settings),
        "variants": [{"name": v.name, "settings": list(v.settings)} for v in plan.variants],
        "seeds": list(plan.seeds),
        "baseline": plan.baseline,
        "threads": plan.threads,
        "runs": [{"name": r.name, "variant": r.variant, "seed": r.seed, "after": r.after} for r in plan.runs],
    } | ({"details": dict(plan.details)} if plan.details else {})


def load_plan(folder: Path) -> Plan:
    """The plan that lies in a study's folder.

    Raises
    ------
    UserError : there is none, or it cannot be read.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        raise UserError(f"{folder}: there is no study ({path} is missing).")
    try:
        with as_user_error():
            raw = yaml_io.read(path)
        if raw["study"] != VERSION:
            raise UserError(f"{path} is of version {raw['study']}, this program reads {VERSION}.")
        runs = tuple(
            PlannedRun(
                run["name"],
                run["variant"],
                run["seed"],
                load_config(folder / CONFIGS / f"{run['name']}.yaml"),
                run["after"],
            )
            for run in raw["runs"]
        )
        return Plan(
            raw["kind"],
            folder,
            raw["recipe"],
            tuple(raw["settings"]),
            tuple(Variant(v["name"], tuple(v["settings"])) for v in raw["variants"]),
            tuple(raw["seeds"]),
            raw["threads"],
            runs,
            raw["baseline"],
            raw.get("details", {}),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a plan of a study ({error!r}); it was changed by something else.") from error


def differences(before: Plan, now: Plan) -> str | None:
    """What sets two plans of one folder apart, as half a sentence; None: they run the same.

    Threads and baseline do not count: the first are kept from before, the second changes no run.
    """
    for field in ("kind", "recipe", "settings", "seeds"):
        one, other = getattr(before, field), getattr(now, field)
        if one != other:
            return f"its {field} {'are' if field in ('settings', 'seeds') else 'is'} {_shown(one)}, not {_shown(other)}"
    names = [tuple(v.name for v in plan.variants) for plan in (before, now)]
    if names[0] != names[1]:
        return f"it compares {_shown(names[0])}, not {_shown(names[1])}"
    if dict(before.details) != dict(now.details):
        return "it groups the same configurations in another way"
    then = {run.name: run.config for run in before.runs}
    for run in (*now.trained, *now.runs):  # warm-ups last: their files name a rule, which does nothing there
        if run.name not in then:
            return f"it has no run {run.name}"
        one, other = then[run.name].model_dump(), run.config.model_dump()
        changed = [key for key in other if one[key] != other[key]]
        if changed:
            key = changed[0]
            return f"{key} of {run.name} is {_shown(one[key])}, not {_shown(other[key])}"
    return None


def _shown(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)
