"""`cppo launch verl`: from a recipe to a run of verl on a cluster.

* `split`: the user's ``key=value`` into those of the recipe and those of verl;
* `plan`: recipe and both, composed and checked, with the environment and the folder of the results;
* `run`: starts it, passes signals on, returns its exit status.

What verl cannot express is refused; where it does something else than `cppo train`, a remark says so.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cppo.config import yaml_io
from cppo.config.load import Config, ConfigError, load_config
from cppo.errors import UserError
from cppo.files import atomic_write_text
from cppo.launch import command
from cppo.launch.checks import listed
from cppo.launch.command import Setting, setting
from cppo.launch.settings import Cluster, environment, verl_settings
from cppo.runs.folder import RunFolder

#: Keys of a recipe that mean nothing to verl, and why; on the command line they are refused.
WITHOUT_MEANING: Mapping[str, str] = {
    "tiny": "verl trains a model folder or a hub id",
    "warmup": "verl starts from the model as it is",
    "trl": "it holds arguments of TRL; verl's settings are given by their own names, such as trainer.save_freq=10",
    "topk_anchor": "with verl the top K come from the sampler",
    "topk_store": "verl keeps the top K with the responses in a format of its own",
    "rollout.vllm": "verl's rollouts come from an engine of its own (actor_rollout_ref.rollout.name)",
    "rollout.vllm_mode": "--mode says where the rollout engine runs",
    "rollout.vllm_enable_sleep_mode": "verl's is actor_rollout_ref.rollout.free_cache_engine",
    "evaluation.batch_size": "the rollout engine schedules the validation itself",
    "evaluation.problems": "the data files decide it: give it together with --prepare-data",
    "samples": "verl writes no per-token reasons; its own samples are trainer.log_val_generations",
}

_ACTOR, _MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.model"


# -- the user's settings ---------------------------------------------------------------------------------------------


def split(arguments: Sequence[str]) -> tuple[list[str], list[Setting]]:
    """(settings of the recipe, settings of verl) of a command line.

    Raises
    ------
    UserError : a word that is neither, or a recipe's setting that means nothing to verl.
    """
    ours: list[str] = []
    theirs: list[Setting] = []
    found: list[str] = []
    for text in arguments:
        if command.is_verl(text):
            theirs.append(command.read(text))
            continue
        key = text.partition("=")[0]
        if "=" not in text:
            found.append(f"{text!r} is not a setting: expected key=value. A recipe is given as --recipe {text}.")
        for prefix, why in WITHOUT_MEANING.items():
            if key == prefix or key.startswith(prefix + "."):
                found.append(f"{key} means nothing to `cppo launch verl`: {why}.")
        if key.partition(".")[0] in ("actor", "ref"):
            found.append(f"there is no setting {key!r}. verl's is actor_rollout_ref.{key}.")
        ours.append(text)
    if found:
        raise ConfigError(found)
    return ours, theirs


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return result


# -- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start.

    Attributes
    ----------
    recipe, config : the recipe's name and its settings.
    settings, environment : verl's settings by key, and the variables that go with them.
    output : folder of the results.
    notes : where verl does something else, and which settings have been replaced.
    checked : the version of verl whose own classes have accepted it; None: verl is not installed here.
    composed : verl's whole configuration (omegaconf), where it has been checked.
    """

    recipe: str
    config: Config
    settings: dict[str, Setting]
    environment: dict[str, str]
    output: Path
    notes: list[str]
    checked: str | None
    composed: Any = None

    def shell(self) -> str:
        """The command for a shell."""
        return command.shell_command(self.settings.values(), self.environment) + "\n"

    def remarks(self, dry_run: bool) -> list[str]:
        """`notes`, and for a dry run what would stop the real one here."""
        found = list(self.notes)
        if dry_run and self.checked is None:
            found.append(
                "verl is not installed here, so the command has not been checked with verl's own classes: "
                "pip install 'cppo[verl]'."
            )
        if dry_run and (missing := missing_files(self)):
            found.append(missing)
        return found


def plan(
    recipe: str | Path, arguments: Sequence[str] = (), cluster: Cluster | None = None, data_dir: Path | None = None
) -> Plan:
    """Compose and check.

    Raises
    ------
    UserError : everything that is wrong, together.
    """
    cluster = cluster or Cluster()
    ours, theirs = split(arguments)
    config = load_config(recipe, ours)
    found = list(_refused(config, theirs))
    if found:
        raise ConfigError(found)
    engine = next((entry.value or "dp" for entry in theirs if entry.key == "model_engine"), "dp")
    output = Path(config.output_dir or Path("runs") / f"{config.name}-{config.rule.name}-verl").absolute()
    metrics = _free_name(RunFolder(output).metrics_file)
    folder = (data_dir or Path("data") / "verl").expanduser().absolute()
    settings = verl_settings(config, cluster, folder, output, engine, metrics.name)
    token_limit = settings[f"{_ACTOR}.ppo_max_token_len_per_gpu"]
    given = {text.partition("=")[0].strip() for text in ours}
    given |= {f"rule.{key}" for key in given}  # delta=0.2 is short for rule.delta=0.2
    notes = [*_remarks(config), *_recipes_verl(settings, config, given, engine)]
    if clashes := _clashes(settings, theirs, given):
        raise ConfigError(clashes)
    notes += command.merge(settings, theirs)
    _token_limit(settings, token_limit, config)
    checked = command.check(settings)
    if checked.problems:
        raise ConfigError(checked.problems)
    notes += checked.notes
    variables = environment(metrics)
    return Plan(str(recipe), config, settings, variables, output, notes, checked.version, checked.config)


def prepare_data(recipe: str | Path, arguments: Sequence[str], folder: Path) -> Iterator[str]:
    """Write the data of a recipe as verl reads them (`launch_data.prepare`); yields what there is to say.

    Raises
    ------
    UserError : settings of verl, which have no part in this; and as `launch_data.prepare`.
    """
    from cppo.launch.data import prepare

    theirs = [text for text in arguments if command.is_verl(text)]
    if theirs:
        raise UserError(f"--prepare-data writes the recipe's data and takes no settings of verl (got {theirs[0]}).")
    prepared = prepare(load_config(recipe, arguments), folder)
    yield from prepared.notes
    for path, problems in prepared.files.items():
        yield f"{path}: {problems:,} problems"


def _refused(config: Config, theirs: Sequence[Setting]) -> Iterator[str]:
    """What a recipe lacks for verl."""
    keys = {entry.key for entry in theirs}
    own_data = {"data.train_files", "data.val_files", "reward.custom_reward_function.path"} <= keys
    if config.model == "tiny" and f"{_MODEL}.path" not in keys:
        yield (
            "model is 'tiny', which `cppo train` makes from scratch; verl needs a model folder or a hub id. Set "
            "model=Qwen/Qwen3-1.7B-Base, or the folder of a checkpoint."
        )
    if config.task.name != "math" and not own_data:
        yield (
            f"task.name is {config.task.name!r}: data and rewards are composed for the task math. Set task=math, or "
            "give verl your own: data.train_files=[...] data.val_files=[...] reward.custom_reward_function.path=FILE."
        )


def _remarks(config: Config) -> Iterator[str]:
    """Where verl does something else than `cppo train` with the same recipe."""
    if config.advantages.zero_spread_filter and config.aggregation != "dr_grpo":
        yield (
            "advantages.zero_spread_filter: in verl, prompts whose responses have equal rewards move nothing, but stay "
            f"in the denominator of aggregation={config.aggregation}; that of dr_grpo is constant."
        )
    warmup = 0 if config.optimizer.lr_scheduler == "constant" else config.optimizer.warmup_steps
    if warmup % config.updates:
        yield f"optimizer.warmup_steps={warmup} updates are rounded up to whole rollout batches of {config.updates}."


def _clashes(settings: Mapping[str, Setting], theirs: Sequence[Setting], given: set[str]) -> list[str]:
    """A recipe's setting and verl's for the same thing, both on the command line."""
    first = {entry.origin: key for key, entry in reversed(list(settings.items()))}  # the others only follow
    return [
        f"{settings[entry.key].origin} (of the recipe) and {entry.key} (of verl) are both given, for the same thing. "
        "Give one of them."
        for entry in theirs
        if entry.key in settings
        and settings[entry.key].origin in given
        and first[settings[entry.key].origin] == entry.key
    ]


def _recipes_verl(settings: dict[str, Setting], config: Config, given: set[str], engine: str) -> list[str]:
    """Put the section `verl` of a recipe over what follows from its other keys; what the user gave comes later."""
    notes, merged = [], []
    for key, value in flat(config.verl).items():
        if engine == "megatron" and ".fsdp_config." in key:
            notes.append(f"model_engine=megatron: the recipe's {key}={value} is left out.")
        elif key not in settings or settings[key].origin not in given:
            merged.append(setting(key, value, f"the recipe's section verl ({key})"))
    command.merge(settings, merged)
    return notes


def _token_limit(settings: dict[str, Setting], composed: Setting, config: Config) -> None:
    """GPUs that share a sequence share the tokens of a micro-batch, too: recompute its limit, unless it was given."""
    sizes = (
        f"{_ACTOR}.fsdp_config.ulysses_sequence_parallel_size",
        f"{_ACTOR}.ulysses_sequence_parallel_size",
        f"{_ACTOR}.megatron.context_parallel_size",
    )
    if settings.get(composed.key) is not composed:
        return
    try:
        share = max(int(settings[size].value or 1) if size in settings else 1 for size in sizes)
        longest = sum(int(settings[f"data.max_{part}_length"].value or 0) for part in ("prompt", "response"))
    except (KeyError, ValueError):
        return  # no numbers: the check says so
    limit = -(-(config.micro_batch or 1) * longest // max(share, 1))
    settings[composed.key] = setting(composed.key, limit, composed.origin)


def _free_name(path: Path) -> Path:
    """`path`, or with -2, -3 ... where it exists: verl empties the file that it writes metrics to."""
    candidates = (path if i == 1 else path.with_stem(f"{path.stem}-{i}") for i in range(1, 1_000_000))
    return next(candidate for candidate in candidates if not candidate.exists())


# -- the run ---------------------------------------------------------------------------------------------------------

#: Signals that are for the run: Ctrl-C, `kill`, and the terminal that closes.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(ready: Plan, resume: bool = False, say: Callable[[str], None] = print) -> int:
    """Start verl, pass signals on, wait; returns its exit status (128 + n where signal n ended it).

    The command and the recipe's settings are written into the output folder first. verl saves its own checkpoints
    there and, started again with the same folder, goes on from the newest; `resume` says that this is meant.

    Raises
    ------
    UserError : verl is not installed, data files are missing, or the folder holds a run and `resume` is False.
    """
    if ready.checked is None:
        raise UserError("verl is not installed here: pip install 'cppo[verl]', or print the command with --dry-run.")
    missing = missing_files(ready)
    if missing:
        raise UserError(missing)
    _guard(ready, resume, say)
    atomic_write_text(ready.output / "command.sh", "#!/bin/sh\n" + ready.shell())
    atomic_write_text(RunFolder(ready.output).config_file, ready.config.to_yaml())
    atomic_write_text(ready.output / "verl.json", json.dumps(_saved(ready), indent=2) + "\n")
    say(f"Checkpoints, metrics and the command itself: {ready.output}")
    status = supervise(
        [sys.executable, *command.arguments(ready.settings.values())], {**os.environ, **ready.environment}
    )
    if status == 0:
        metrics = ready.environment["VERL_FILE_LOGGER_PATH"]
        say(f"Done. Checkpoints are in {ready.output / 'checkpoints'}, metrics in {metrics}.")
    else:
        say(
            f"verl ended with status {status}; its own words are above, and docs/verl.md explains the usual ones. "
            "The same command with --resume goes on from the newest checkpoint."
        )
    return status


def supervise(program: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run a program in a process group of its own and hand every signal on to all of the group, once."""
    process = subprocess.Popen(list(program), env=dict(variables), process_group=0)

    def forward(number: int, frame: object) -> None:
        if process.poll() is None:
            os.killpg(process.pid, number)

    before = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def missing_files(ready: Plan) -> str | None:
    """A sentence on data files that are not on this machine; None if there are none (remote ones are verl's affair)."""
    names = [name for key in ("data.train_files", "data.val_files") for name in _files(ready.settings[key])]
    absent = [name for name in names if "://" not in name and not Path(name).expanduser().is_file()]
    if not absent:
        return None
    return (
        f"there is no data file {' and no '.join(absent)}. Write them with `cppo launch verl --recipe {ready.recipe} "
        f"--prepare-data {shlex.quote(str(Path(absent[0]).parent))}`, or give others by --data-dir or "
        "data.train_files=[...]."
    )


def _files(entry: Setting) -> list[str]:
    try:
        return listed(yaml_io.parse(entry.value or ""))  # hydra's lists are YAML's, but for odd quotes
    except yaml.YAMLError:
        return []


def _saved(ready: Plan) -> dict[str, str]:
    return {key: str(entry.value) for key, entry in ready.settings.items()}


def _guard(ready: Plan, resume: bool, say: Callable[[str], None]) -> None:
    """Do not go on with a run unasked: verl would, whatever has changed."""
    newest = ready.output / "checkpoints" / "latest_checkpointed_iteration.txt"
    if not newest.is_file():
        return
    step = newest.read_text(encoding="utf-8").strip()
    if not resume:
        raise UserError(
            f"{ready.output} holds a run with a checkpoint of step {step}, from which verl would go on. Say --resume "
            "if that is meant, or set output_dir=... for another run."
        )
    try:
        before = json.loads((ready.output / "verl.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    now = _saved(ready)
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    changed = [text for text in changed if "VERL_FILE_LOGGER_PATH" not in text]
    say(f"Going on from step {step}." + (f" Changed since: {'; '.join(changed)}." if changed else ""))
