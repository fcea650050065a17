"""The plan of a study: named configurations times seeds, resolved and checked before anything runs.

* A *variant* is a name and the settings that make it: ``cppo compare`` has one per rule, an ablation any list of them.
* Within a seed all variants start from the same model: where the recipe makes and warms up a tiny model, that is done
  once for each seed (the seed decides the initial weights, so seeds differ in their start) and each run gets
  ``model=<the result>``. Any other model is the same file for all runs as it is.
* What is planned is written to `study.yaml` and, resolved to the last key, to `configs/<run>.yaml`. A study that is
  resumed reads these alone, whatever has become of the recipe in the meantime.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cppo.config.load import Config, load_config
from cppo.errors import UserError
from cppo.runs.folder import RunFolder

#: Settings that the study gives each run itself, and what to say instead.
OWN = {
    "seed": "--seeds (the recipe's seed is the first of them)",
    "output_dir": "--out, the folder of the whole study",
    "rule": "--rules",
    "rule.name": "--rules",
}


@dataclass(frozen=True)
class Variant:
    """One named configuration: settings (``key=value``) on top of the recipe and what all variants share."""

    name: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """One process: a run of a variant and seed, or (`variant` None) the warm-up that the runs of a seed start from."""

    name: str
    variant: str | None
    seed: int
    config: Config
    after: str | None = None
    """The warm-up that must be there first."""


@dataclass(frozen=True)
class Plan:
    """What was asked, and the runs that follow from it (warm-ups first)."""

    kind: str
    folder: Path
    recipe: str
    settings: tuple[str, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    threads: int
    """CPU threads of each run. Part of the plan: sums in another order give other digits."""
    runs: tuple[PlannedRun, ...]
    baseline: str | None = None
    """The variant that all others are measured against; None: the best of the others."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What a kind of study knows beside its runs, as plain types: which suites an ablation has."""

    def folder_of(self, run: PlannedRun) -> Path:
        """The run folder. Not read from the configuration, so that a study which was moved can be read."""
        return self.folder / place_of(run.name, run.variant)

    def log_of(self, run: PlannedRun) -> Path:
        """The file that takes what the process of a run prints."""
        return self.folder / "logs" / f"{run.name}.log"

    @property
    def trained(self) -> tuple[PlannedRun, ...]:
        """The runs that count, without the warm-ups."""
        return tuple(run for run in self.runs if run.variant is not None)


def place_of(name: str, variant: str | None) -> Path:
    """A run's folder inside the study's."""
    return Path("warmup", name.removeprefix("warmup-")) if variant is None else Path("runs", name)


def make_plan(
    kind: str,
    folder: Path,
    recipe: str,
    settings: Sequence[str],
    variants: Sequence[Variant],
    seeds: int,
    threads: int,
    baseline: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> Plan:
    """Resolve every run of a study.

    Parameters
    ----------
    kind : "compare", ...: names the study.
    folder : of the study; the runs' paths are absolute, so that they can be resumed from anywhere.
    recipe : a shipped recipe or a YAML file.
    settings : ``key=value`` for all variants; a variant's own come after them and win.
    seeds : how many; the first is the recipe's.  details : see `Plan.details`.

    Raises
    ------
    UserError : no seeds or variants, two of one name, a setting that the study gives itself, or what `load_config`
        finds.
    """
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}, expected at least 1 (5 for intervals that mean something).")
    check_names([variant.name for variant in variants])
    for text in settings:
        key = text.partition("=")[0].strip()
        if key in OWN:
            raise UserError(f"{text}: in a study {key} is given by {OWN[key]}.")
    root = folder.resolve()
    first = load_config(recipe, list(settings)).seed
    warmups: dict[str, PlannedRun] = {}
    runs: list[PlannedRun] = []
    resolved = {variant.name: load_config(recipe, [*settings, *variant.settings]) for variant in variants}
    # all variants of a seed before the next seed: a study that is stopped half way has whole comparisons
    for seed in range(first, first + seeds):
        for variant in variants:
            name = f"{variant.name}-seed{seed}"
            own = {"seed": seed, "output_dir": str(root / place_of(name, variant.name))}
            config = resolved[variant.name].model_copy(update=own)
            after = None
            if config.model == "tiny":
                after = _warmup(config, root, warmups)
                config = _started_from(config, RunFolder(root / place_of(after, None)).warmup_model)
            runs.append(PlannedRun(name, variant.name, seed, config, after))
    if baseline is not None and baseline not in [variant.name for variant in variants]:
        raise UserError(f"--baseline is {baseline!r}, expected one of {', '.join(v.name for v in variants)}.")
    everything = (*warmups.values(), *runs)
    return Plan(
        kind,
        folder,
        recipe,
        tuple(settings),
        tuple(variants),
        tuple(range(first, first + seeds)),
        threads,
        everything,
        baseline,
        dict(details or {}),
    )


def check_names(names: Sequence[str]) -> None:
    """Names of variants become folders and must differ.

    Raises
    ------
    UserError : none are given, two are the same, or one is not a name.
    """
    if not names:
        raise UserError("a study needs at least one configuration to run.")
    for at, name in enumerate(names):
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(f"{name!r} is not a name of a configuration: letters, digits and any of _ . + - are.")
        if name in names[:at]:
            raise UserError(f"{name} is given twice: every configuration is run once a seed.")


def _warmup(config: Config, root: Path, warmups: dict[str, PlannedRun]) -> str:
    """The name of the warm-up that makes this run's starting model; planned if it is new."""

    def makes(c: Config) -> tuple[Any, ...]:
        return (c.tiny, c.task, c.warmup, c.seed)

    for name, run in warmups.items():
        if makes(run.config) == makes(config):
            return name
    same_seed = sum(run.seed == config.seed for run in warmups.values())
    name = f"warmup-seed{config.seed}" + (f"-{same_seed + 1}" if same_seed else "")
    placed = config.model_copy(update={"output_dir": str(root / place_of(name, None))})
    warmups[name] = PlannedRun(name, None, config.seed, placed)
    return name


def _started_from(config: Config, model: Path) -> Config:
    """The same run from a model on the disk, with what ``auto`` means for a tiny one written out."""
    raw = config.model_dump(mode="python")
    raw["model"] = str(model)
    raw["warmup"]["steps"] = 0
    for key, value in (("precision", "float32"), ("gradient_checkpointing", False)):
        raw[key] = value if raw[key] == "auto" else raw[key]
    return Config.model_validate(raw)
