"""verl's command line: settings in hydra's grammar, and a check of all of them before anything starts.

``python -m verl.trainer.main_ppo key=value ...`` finds a mistake after Ray has started and models are loaded, or never.
Here the same configuration is composed from verl's own files and judged by verl's own classes; `checks` then
asks what verl asks late (do the GPUs divide the batch?) or not at all (is the trust region still there?).

* `Setting`, `read`, `setting`: one ``key=value`` with hydra's prefixes ``+ ++ ~`` and its quoting;
* `merge`: the user's settings over composed ones;
* `shell_command`: the command for a shell, one setting a line;
* `check`: everything that is wrong, as sentences. Needs neither GPUs nor Ray nor the model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from cppo.errors import UserError
from cppo.launch.checks import count_problems, problems, select
from cppo.words import nearest_keys

#: The version whose configuration files and code this was written from.
WRITTEN_FOR = "0.9.1"

#: The plug-in's module. verl loads what VERL_USE_EXTERNAL_MODULES names in every process, and fails if it cannot; the
#: entry point does the same but hides errors.
PLUGIN = "cppo_verl_plugin"

#: Top-level sections of verl's configuration and hydra's own: a setting that begins with one is not a recipe's.
SECTIONS = (
    "actor_rollout_ref",
    "algorithm",
    "critic",
    "custom_reward_function",
    "data",
    "distillation",
    "global_profiler",
    "hydra",
    "model_engine",
    "ray_kwargs",
    "reward",
    "reward_model",
    "sandbox_fusion",
    "skip",
    "trainer",
    "transfer_queue",
)

_PREFIXES = ("++", "+", "~")
_BARE = re.compile(r"[A-Za-z_/][\w./:@-]*", re.ASCII)  # what hydra reads as text without quotes
_NOT_TEXT = {"null", "true", "false", "nan", "inf"}  # what it does not, although it looks like it


@dataclass(frozen=True)
class Setting:
    """One argument of verl's command line.

    Attributes
    ----------
    key : dotted name, such as ``trainer.nnodes``.
    value : as it is written, in hydra's grammar; None where ``~key`` deletes.
    prefix : "", "+" (adds a key), "++" (adds or sets), "~" (deletes).
    origin : the key of a recipe that it follows from, for messages; "" for a setting that stands for itself.
    """

    key: str
    value: str | None
    prefix: str = ""
    origin: str = ""

    def __str__(self) -> str:
        return self.prefix + self.key + ("" if self.value is None else f"={self.value}")


def is_verl(text: str) -> bool:
    """Whether an argument of a command line is one of verl's settings: by its prefix or its first section."""
    return text.startswith(_PREFIXES) or re.split(r"[.=@]", text, maxsplit=1)[0] in SECTIONS


def read(text: str) -> Setting:
    """A setting as the user has written it.

    Raises
    ------
    UserError : no ``=`` (but for ``~key``), or no key.
    """
    prefix = next((p for p in _PREFIXES if text.startswith(p)), "")
    key, equals, value = text[len(prefix) :].partition("=")
    if not key.strip(" .") or (not equals and prefix != "~"):
        raise UserError(f"{text!r} is not a setting of verl: expected key=value, such as trainer.save_freq=10.")
    return Setting(key.strip(), value if equals else None, prefix)


def setting(key: str, value: Any, origin: str = "", add: bool = False) -> Setting:
    """A setting from a Python value (text, number, bool, None, list, dict). `add`: verl's files lack the key."""
    return Setting(key, written(value), "+" if add else "", origin)


def written(value: Any) -> str:
    """`value` in hydra's grammar: hydra reads the same value back.

    Raises
    ------
    UserError : a text with ``${``, which would become a reference to another setting.
    """
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{written(str(k))}:{written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(written, value)) + "]"
    text = str(value)
    if "${" in text:
        raise UserError(f"{text!r} holds '${{', which verl takes for a reference to another setting. Use another name.")
    if _BARE.fullmatch(text) and text.lower() not in _NOT_TEXT:
        return text
    # Within quotes a backslash counts as itself, but not in front of a quote.
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def merge(settings: dict[str, Setting], given: Iterable[Setting]) -> list[str]:
    """Put the user's settings over composed ones, in place. Returns remarks on those that replace a recipe's.

    A key that verl's own files lack keeps its "+", whether or not the user wrote it.
    """
    notes = []
    for new in given:
        old = settings.get(new.key)
        if old is None:
            settings[new.key] = new
            continue
        if new.prefix == "~" and old.prefix:
            del settings[new.key]  # it was only going to be added
        else:
            settings[new.key] = replace(new, prefix=new.prefix if new.prefix in ("++", "~") else old.prefix)
        if old.origin and old.value != new.value:
            notes.append(f"{new} replaces {old.value}, which follows from {old.origin}.")
    return notes


def arguments(settings: Iterable[Setting]) -> list[str]:
    """What comes after the Python program."""
    return ["-m", "verl.trainer.main_ppo", *map(str, settings)]


def shell_command(settings: Iterable[Setting], environment: Mapping[str, str], python: str = "python") -> str:
    """The command for a POSIX shell, quoted, one setting a line."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    option, module, *rest = arguments(settings)
    program = " ".join([*variables, shlex.quote(python), option, module])
    return " \\\n    ".join([program, *map(shlex.quote, rest)])


# -- the check -------------------------------------------------------------------------------------------------------


@dataclass
class Checked:
    """What a check found.

    Attributes
    ----------
    problems : what is wrong, one sentence or two each.
    notes : remarks.
    version : verl's version; None: verl is not installed, and nothing was checked.
    config : the composed configuration (omegaconf's DictConfig); None where there is none.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    version: str | None = None
    config: Any = None


def check(settings: Mapping[str, Setting]) -> Checked:
    """Compose the configuration as verl does and look for everything that verl, or the trust region, would refuse.

    Without verl only ``version=None`` comes back. Ray is not started and no model is loaded.
    """

    folder = config_folder()
    if folder is None:
        return Checked()
    try:
        version = metadata.version("verl")
    except metadata.PackageNotFoundError:  # a source checkout on PYTHONPATH
        version = "of unknown version"
    found = Checked(version=version)
    if not version.startswith(WRITTEN_FOR.rpartition(".")[0] + "."):
        found.notes.append(f"the command was written for verl {WRITTEN_FOR}; installed is {version}.")
    found.config = _compose(folder, list(settings.values()), found.problems)
    if found.config is None:
        return found
    origins = {entry.key: entry.origin for entry in settings.values() if entry.origin}
    found.problems = count_problems(found.config, origins)
    if not found.problems:  # everything else counts with these
        found.problems = [*problems(found.config, origins), *_trust_region_problems(found.config)]
    if not found.problems:  # the same in verl's own words would only repeat it
        found.problems = verls_own_problems(found.config)
    if found.config.actor_rollout_ref.rollout.name == "vllm" and importlib.util.find_spec("vllm") is None:
        found.notes.append("vLLM, which makes the rollouts, is not installed here.")
    return found


def _trust_region_problems(config: Any) -> list[str]:
    """What the trainers of ours would refuse when they start."""
    try:
        from cppo.engines.verl.checks import check_config
    except ImportError:
        return []  # verl's own classes cannot be imported; `verls_own_problems` says why
    try:
        check_config(config)
    except UserError as error:
        first, *listed = str(error).splitlines()
        return [line.strip().removeprefix("- ") for line in listed] or [first]
    return []


def config_folder() -> Path | None:
    """verl's folder of configuration files; None where verl, or hydra, which comes with it, is not installed."""
    spec = importlib.util.find_spec("verl") if importlib.util.find_spec("hydra") else None
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place).resolve() / "trainer" / "config"
        if (folder / "ppo_trainer.yaml").is_file():  # any folder called verl is a package to Python
            return folder
    return None


def _compose(folder: Path, settings: Sequence[Setting], found: list[str]) -> Any:
    """The composed configuration, or None with what is wrong added to `found`."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    found += [text for entry in settings if (text := _grammar_problem(entry))]
    if found:
        return None
    try:
        with initialize_config_dir(config_dir=str(folder), version_base=None):
            known = _known(tuple(str(entry) for entry in settings if _is_group(entry)))
            found += [text for entry in settings if (text := _key_problem(entry, known))]
            if found:
                return None
            config = compose("ppo_trainer", overrides=[str(entry) for entry in settings])
            OmegaConf.to_container(config, resolve=True)  # fails at references to what does not exist
            found += [text for e in settings if (text := _type_problem(e, known.get(e.key), select(config, e.key)))]
            return None if found else config
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        options = [line for line in lines if re.fullmatch(r"\w+", line)]
        known_options = f" There are {', '.join(options)}." if options else ""
        found.append(f"verl's configuration cannot be composed: {lines[0].rstrip('.')}.{known_options}")
        return None


@lru_cache(maxsize=8)
def _known(groups: tuple[str, ...]) -> Mapping[str, Any]:
    """Every key that verl's files have, with its value, for a choice among the files; hydra must be initialised."""
    from hydra import compose
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(compose("ppo_trainer", overrides=list(groups)), resolve=False)
    assert isinstance(tree, dict)
    return dict(_items(tree))


def _is_group(entry: Setting) -> bool:
    """Whether a setting chooses among verl's files, as model_engine=megatron does."""
    return entry.key == "model_engine" or "@" in entry.key or "/" in entry.key


def _grammar_problem(entry: Setting) -> str | None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        (override,) = OverridesParser.create().parse_overrides([str(entry)])
    except HydraException:
        return (
            f"{entry.key}: hydra, verl's configuration library, cannot read {entry.value}. A text with other signs "
            f"than letters, digits and ./:@_- is quoted twice, for the shell and for hydra: '{entry.key}=\"...\"'."
        )
    if override.is_sweep_override():
        return f"{entry.key}={entry.value} is a choice of values to hydra. A list is written [{entry.value}]."
    return None


def _items(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of nested mappings with its value, sections before what they hold."""
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _items(value, f"{prefix}{key}.")


def _type_problem(entry: Setting, usual: Any, value: Any) -> str | None:
    """verl itself does not look at types: a text for a number is found in the middle of a run."""
    number = isinstance(usual, int | float) and not isinstance(usual, bool)
    fits = isinstance(value, int | float) if number else isinstance(value, bool)
    if value is None or fits or not isinstance(usual, int | float):
        return None
    return f"{entry}: expected {'a number' if number else 'True or False'}, as in verl's own {entry.key}={usual}."


def _key_problem(entry: Setting, known: Iterable[str]) -> str | None:
    """What is wrong with a key, given those that verl's files have."""
    if _is_group(entry) or entry.key.startswith("hydra."):
        return None
    exists = entry.key in known
    if entry.prefix == "+" and exists:
        return f"{entry}: verl has the setting {entry.key}, so it cannot be added. Write it without the +."
    if entry.prefix in ("", "~") and not exists:
        near = nearest_keys(entry.key, known)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Write +{entry.key}=... to add it nevertheless."
        return f"verl has no setting {entry.key!r}. {hint}"
    return None


def verls_own_problems(config: Any) -> list[str]:
    """What verl's own checks say of a composed configuration: `validate_config`, its dataclasses, its registries.

    Left out: classes that load a model's files, as the critic's do, and the reward's, which verl 0.9.1 never builds.
    """
    said = io.StringIO()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return list(_verls_own(config))
    finally:
        logging.disable(level)


def _verls_own(config: Any) -> Iterator[str]:
    try:
        from verl.trainer.ppo.utils import need_reference_policy
        from verl.utils.config import omega_conf_to_dataclass, validate_config

        importlib.import_module(PLUGIN)
    except ImportError as error:
        yield (
            f"verl cannot be imported here: {error}. If that is one of its own requirements: pip install 'cppo[verl]'. "
            "Modules that VERL_USE_EXTERNAL_MODULES names must be on PYTHONPATH."
        )
        return
    if importlib.util.find_spec("vllm") is None:  # verl asks vLLM which ranks of LoRA it can serve
        config = copy.deepcopy(config)
        config.actor_rollout_ref.model.lora_rank = 0
    try:
        validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=False)
        sections = ["actor_rollout_ref.rollout", "algorithm", "skip"]
        for section in [*sections, *(["distillation"] if config.distillation.enabled else [])]:
            omega_conf_to_dataclass(select(config, section))
    except Exception as error:  # assertions and whatever the classes raise
        yield f"verl refuses the configuration: {_plain(error)}"
    yield from _registry_problems(config)


def _registry_problems(config: Any) -> Iterator[str]:
    """Whether verl knows the policy loss and the trainer by their names."""
    try:
        from verl.trainer.ppo.core_algos import get_policy_loss_fn

        get_policy_loss_fn(config.actor_rollout_ref.actor.policy_loss.loss_mode)
        from verl.trainer.ppo.v1 import get_trainer_cls

        get_trainer_cls(config.trainer.v1.trainer_mode)
    except ImportError as error:
        yield (
            f"verl's trainer cannot be imported: {error}. It comes with verl's rollout engine: install vLLM for your "
            "GPUs (docs/verl.md)."
        )
    except ValueError as error:
        yield f"verl refuses the configuration: {_plain(error)}"


def _plain(error: BaseException) -> str:
    """The sentence in an exception, without what hydra wraps around it."""
    cause = error.__cause__ if error.__cause__ is not None and "Error in call to target" in str(error) else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    text = text if isinstance(cause, AssertionError | ValueError) else f"{type(cause).__name__}: {text}"
    return text if text.endswith((".", "!", "?")) else text + "."
