"""From a recipe and ``key=value`` overrides to a validated `Config`; every mistake becomes a sentence.

Precedence: defaults < recipe < overrides. All problems are found together, before anything is loaded. Short forms:

* ``rule=dppo`` and ``task=math`` name another rule or task and drop what the recipe has set for the one before;
* a parameter of the chosen rule can go without its section: ``delta=0.05`` is ``rule.delta=0.05``;
* an option of the task can go without ``options``: ``task.families=[chain-24]``;
* ``model=<folder or hub id>`` drops the warm-up, which is for ``model=tiny``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from cppo.config import yaml_io
from cppo.config.consistency import problems
from cppo.config.keys import describe, field_at, rule_parameters, similar_keys
from cppo.config.settings import Settings
from cppo.config.trl_kwargs import trl_config_kwargs
from cppo.errors import UserError
from cppo.rules import RULES
from cppo.words import nearest

__all__ = [
    "DEFAULT_RECIPE",
    "Config",
    "ConfigError",
    "find_recipe",
    "load_config",
    "recipes",
    "trl_config_kwargs",
]

#: The recipe of `cppo train` without arguments, and where another model than `tiny` is asked for.
DEFAULT_RECIPE = "arithmetic"
MODEL_RECIPE = "smollm2-135m"


class Config(Settings):
    """All settings of a run, which fit together (`cppo.config.consistency`)."""

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if found := problems(self):
            raise ValueError("\n".join(found))
        return self


class ConfigError(UserError):
    """What is wrong with a configuration: one sentence a problem in `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(dict.fromkeys(problems))
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            text = f"{len(self.problems)} problems in the configuration:\n" + "\n".join(f"- {p}" for p in self.problems)
        super().__init__(text)


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    folder = Path(str(resources.files("cppo") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a shipped one (with or without ``.yaml``).

    Raises
    ------
    ConfigError : there is none; the nearest shipped one is named.
    """
    path, shipped = Path(recipe), recipes()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / yaml_io.CONFIG_FILE).exists():
            raise ConfigError(
                [
                    f"{recipe} is the folder of a run. Go on with it by `cppo train --resume {recipe}`, or repeat it "
                    "by "
                    f"`cppo train {path / yaml_io.CONFIG_FILE} output_dir=null`."
                ]
            )
        raise ConfigError([f"{recipe} is a folder, expected a recipe: a YAML file or one of {', '.join(shipped)}."])
    name = path.name.removesuffix(".yaml").removesuffix(".yml")
    if path.name == str(recipe) and name in shipped:
        return shipped[name]
    raise ConfigError(
        [
            f"there is no recipe {str(recipe)!r}: no such file, and the shipped ones are {', '.join(shipped)}."
            f"{nearest(name, shipped)} (Settings are given as key=value.)"
        ]
    )


def load_config(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run.

    Parameters
    ----------
    recipe : a YAML file or the name of a shipped recipe; None: `DEFAULT_RECIPE`, or `MODEL_RECIPE` where the overrides
        name another model than `tiny`: settings for a model of random weights would ruin a trained one.
    overrides : ``key=value``, values in YAML: ``optimizer.learning_rate=1e-6``, ``task.families=[chain-24]``,
        ``peft=null``.

    Raises
    ------
    ConfigError : what is wrong, one sentence a problem; malformed YAML with file and line.
    """
    path = find_recipe(_default_recipe(overrides) if recipe is None else recipe)
    try:
        raw = yaml_io.read(path)
    except (OSError, ValueError) as error:
        raise ConfigError([str(error)]) from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError([f"{path} holds {_shown(raw)}, expected keys and values such as steps: 30."])
    raw.setdefault("name", path.stem)
    for section in ("rule", "task"):
        if isinstance(raw.get(section), str):
            raw[section] = {"name": raw[section]}
    found = _override(raw, overrides)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([*found, *_sentences(error)]) from None
    if found:
        raise ConfigError(found)
    return config


def _default_recipe(overrides: Sequence[str]) -> str:
    models = [text.partition("=")[2].strip() for text in overrides if text.partition("=")[0].strip() == "model"]
    return MODEL_RECIPE if models and models[-1] != "tiny" else DEFAULT_RECIPE


# -- overrides -------------------------------------------------------------------------------------------------------


def _override(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Put the overrides into `raw`; returns what is wrong with them."""
    found: list[str] = []
    pairs: list[tuple[str, Any]] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        key = {"rule.name": "rule", "task.name": "task"}.get(key.strip(), key.strip())
        if not equals or not key or not all(key.split(".")):
            found.append(
                f"{text!r} is not a setting: expected key=value, such as steps=4.{_did_you_mean(similar_keys(text))}"
            )
        elif not value.strip():
            found.append(f"{key} has no value: write {key}=null if none is meant.")
        else:
            try:
                pairs.append((key, yaml_io.parse(value)))
            except yaml.YAMLError as error:
                if value.lstrip()[0] in "[{\"'":
                    problem = getattr(error, "problem", None) or "not YAML"
                    found.append(
                        f"{key}={value} cannot be read: {problem}. Lists are written as [a, b], texts in quotes."
                    )
                else:
                    pairs.append((key, value))  # a text such as @name or a: b: c
    # Which rule, task and model it is decides what other keys mean, wherever they stand.
    first = [pair for pair in pairs if pair[0] in ("rule", "task", "model")]
    rest = [pair for pair in pairs if pair[0] not in ("rule", "task", "model")]
    for key, value in first:
        if key == "model":
            if value != "tiny" and not any(k.partition(".")[0] == "warmup" for k, _ in rest):
                raw.pop("warmup", None)
            raw[key] = value
        elif isinstance(value, str):
            section = raw.get(key)
            if not (isinstance(section, dict) and section.get("name") == value):
                raw[key] = {"name": value}
                if key == "task":  # the recipe's name would mislead; `name=` wins, it comes later
                    raw["name"] = re.sub(r"\W+", "-", value).strip("-")
        else:
            raw[key] = value
    for key, value in rest:
        path = _full_path(key, raw, found)
        if path:
            _put(raw, path, value, found)
    return found


def _full_path(key: str, raw: Mapping[str, Any], found: list[str]) -> list[str] | None:
    """The place of an override, short forms spelled out."""
    path = key.split(".")
    if path[0] == "task" and path[1] not in ("name", "options"):
        return ["task", "options", *path[1:]]
    if len(path) > 1 or key in Config.model_fields:
        return path
    rule = raw.get("rule") or {"name": "cppo"}
    name = rule.get("name", "cppo") if isinstance(rule, dict) else rule
    if key in rule_parameters(name):
        return ["rule", key]
    owners = [other for other in RULES if key in rule_parameters(other)]
    if owners and name in RULES:
        has = ", ".join(rule_parameters(name)) or "none"
        found.append(f"{key} is a parameter of {', '.join(owners)}, but the rule is {name} (its parameters: {has}).")
        return None
    return path


def _put(raw: dict[str, Any], path: list[str], value: Any, found: list[str]) -> None:
    """Set `path` in nested mappings, making those that are missing or null."""
    where = raw
    for depth, part in enumerate(path[:-1], start=1):
        if where.get(part) is None:
            where[part] = {}
        if not isinstance(where[part], dict):
            name = ".".join(path[:depth])
            found.append(
                f"{'.'.join(path)}: {name} is a single value ({_shown(where[part])}), not a section with keys."
            )
            return
        where = where[part]
    if len(path) == 1 and isinstance(value, dict) and isinstance(where.get(path[-1]), dict):
        # optimizer={...} sets keys of a section; deeper mappings, such as a task's benchmarks, are replaced
        where[path[-1]].update(value)
    else:
        where[path[-1]] = value


# -- sentences -------------------------------------------------------------------------------------------------------


def _sentences(error: ValidationError) -> list[str]:
    """One sentence a problem, with the key as the user writes it."""
    found: list[str] = []
    told: set[str] = set()
    for item in error.errors(include_url=False):
        path, value = [str(part) for part in item["loc"]], item["input"]
        if item["type"] == "value_error":
            found += str(item["ctx"]["error"]).split("\n")
        elif item["type"] == "extra_forbidden":
            found += [_unknown(key) for key in _leaves(path, value)]
        else:
            key, field = field_at(path)
            if key in told:  # several items of one list, or branches of one alternative
                continue
            told.add(key)
            expected = describe(field)
            hint = ""
            if isinstance(value, str) and item["type"] == "literal_error":
                hint = nearest(value, expected.removeprefix("one of ").split(", "))
            elif value == "none" and "null" in expected:
                hint = " (Write null, not none.)"
            found.append(f"{key} is {_shown(value)}, expected {expected}.{hint}")
    return found


def _leaves(path: Sequence[str], value: Any) -> Iterable[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves([*path, str(key)], inner)
    else:
        yield ".".join(path)


def _unknown(key: str) -> str:
    section, _, last = key.rpartition(".")
    if section == "rollout" and last in ("top_p", "top_k", "min_p"):
        return (
            f"there is no setting {key}: training rollouts are sampled from the full softmax, since truncated "
            "sampling breaks every ratio and divergence (the evaluation's own top-p is evaluation.top_p)."
        )
    return f"there is no setting {key!r}.{_did_you_mean(similar_keys(key)) or ' docs/configuration.md lists all.'}"


def _did_you_mean(keys: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(keys)}?" if keys else ""


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(dict(value) if isinstance(value, BaseModel) else value)
    return text if len(text) <= 80 else text[:77] + "..."
