"""What verl finds out late, or never, in a composed configuration: batches, GPUs, memory limits, files.

Each problem is a sentence or two: what is set, what it would do, what to set. Whether the trust region is still there
is asked by `checks.check_config`. Written for verl 0.9.1's V1 trainer.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

_ACTOR, _ROLLOUT, _MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"

#: Whole numbers that the questions below count with, and the least that each may be.
_COUNTS = {
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 1,
    "data.train_batch_size": 1,
    "data.max_prompt_length": 1,
    "data.max_response_length": 1,
    f"{_ROLLOUT}.n": 1,
    f"{_ROLLOUT}.nnodes": 0,
    f"{_ROLLOUT}.n_gpus_per_node": 1,
    f"{_ROLLOUT}.tensor_model_parallel_size": 1,
    f"{_ROLLOUT}.data_parallel_size": 1,
    f"{_ROLLOUT}.pipeline_model_parallel_size": 1,
    f"{_ACTOR}.ppo_mini_batch_size": 1,
    f"{_ACTOR}.ppo_max_token_len_per_gpu": 1,
}


class View:
    """A configuration's values by dotted key, and a key's name in messages."""

    def __init__(self, config: Any, origins: Mapping[str, str]) -> None:
        self._config, self._origins = config, origins

    def __getitem__(self, key: str) -> Any:
        """The value at `key`; None where there is none."""
        return select(self._config, key)

    def shown(self, key: str) -> str:
        """``key=value``, with the recipe's key that it follows from."""
        origin = self._origins.get(key)
        return f"{key}={self[key]}" + (f" (from {origin})" if origin else "")

    def name(self, key: str) -> str:
        """The key to change: the recipe's where it follows from one."""
        return self._origins.get(key) or key

    @property
    def megatron(self) -> bool:
        return self[f"{_ACTOR}.strategy"] == "megatron"

    @property
    def gpus(self) -> int:
        """GPUs of the trainer."""
        return self["trainer.nnodes"] * self["trainer.n_gpus_per_node"]

    @property
    def sequence_parallel(self) -> int:
        """GPUs that share one sequence's tokens: Ulysses, or Megatron's context parallelism."""
        if self.megatron:
            return self[f"{_ACTOR}.megatron.context_parallel_size"] or 1
        keys = (f"{_ACTOR}.ulysses_sequence_parallel_size", f"{_ACTOR}.fsdp_config.ulysses_sequence_parallel_size")
        return max(self[key] or 1 for key in keys)

    @property
    def model_parallel(self) -> int:
        """GPUs that work on one and the same micro-batch."""
        if not self.megatron:
            return self.sequence_parallel
        prefix = f"{_ACTOR}.megatron."
        tensor, pipeline = self[f"{prefix}tensor_model_parallel_size"], self[f"{prefix}pipeline_model_parallel_size"]
        return (tensor or 1) * (pipeline or 1) * self.sequence_parallel


def count_problems(config: Any, origins: Mapping[str, str]) -> list[str]:
    """Numbers of a composed configuration that are none; `origins`: the recipe's keys that settings follow from."""
    view = View(config, origins)
    return [
        f"{view.shown(key)}, expected a whole number of at least {least}."
        for key, least in _COUNTS.items()
        if not isinstance(value := view[key], int) or isinstance(value, bool) or value < least
    ]


def problems(config: Any, origins: Mapping[str, str]) -> list[str]:
    """Everything else that is wrong with it; `count_problems` must have found none."""
    view = View(config, origins)
    questions = (_batches, _lengths, _replicas, _separate, _trainer, _data, _model)
    return [problem for question in questions for problem in question(view)]


def _batches(view: View) -> Iterator[str]:
    """Can the GPUs share an update, and the updates per rollout batch?"""
    prompts, each = view["data.train_batch_size"], view[f"{_ACTOR}.ppo_mini_batch_size"]
    if each > prompts:
        yield (
            f"{view.shown(f'{_ACTOR}.ppo_mini_batch_size')} prompts per update, but a rollout batch has "
            f"{view.shown('data.train_batch_size')}. Set the former to {prompts} or less."
        )
    elif prompts % each:
        yield (
            f"{view.shown('data.train_batch_size')} prompts cannot be split into updates of "
            f"{view.shown(f'{_ACTOR}.ppo_mini_batch_size')}: verl would fill the last one up with empty responses. Set "
            f"the latter to a divisor of {prompts}."
        )
    gpus, parallel = view.gpus, view.model_parallel
    machines = f"{view['trainer.nnodes']} x {view['trainer.n_gpus_per_node']} = {gpus} GPUs"
    if gpus % parallel:
        yield (
            f"{machines} cannot be split into groups of {parallel} that work on one micro-batch "
            f"({'tensor, pipeline and context' if view.megatron else 'Ulysses sequence'} parallel). Set a group that "
            f"divides {gpus}."
        )
        return
    ranks, responses = gpus // parallel, each * view[f"{_ROLLOUT}.n"]
    update = f"{view.shown(f'{_ACTOR}.ppo_mini_batch_size')}, {view.shown(f'{_ROLLOUT}.n')}"
    if responses % ranks:
        fitting = [n for n in range(1, ranks) if responses % n == 0]
        yield (
            f"an update has {each} x {view[f'{_ROLLOUT}.n']} = {responses} responses ({update}), which {ranks} "
            f"data-parallel ranks ({machines}) cannot share equally. Use {max(fitting) * parallel} GPUs, or responses "
            f"that {ranks} divides."
        )


def _lengths(view: View) -> Iterator[str]:
    """Does the longest response fit?"""
    longest = view["data.max_prompt_length"] + view["data.max_response_length"]
    shown = f"{view.shown('data.max_prompt_length')} and {view.shown('data.max_response_length')}"
    limit = view[f"{_ROLLOUT}.max_model_len"]
    if limit is not None and limit < longest:
        yield (
            f"{view.shown(f'{_ROLLOUT}.max_model_len')} tokens do not hold the longest prompt and response, {longest} "
            f"tokens ({shown}). Set {_ROLLOUT}.max_model_len={longest}."
        )
    if view[f"{_ACTOR}.use_dynamic_bsz"]:
        room = view[f"{_ACTOR}.ppo_max_token_len_per_gpu"] * view.sequence_parallel
        if room < longest:
            yield (
                f"{view.shown(f'{_ACTOR}.ppo_max_token_len_per_gpu')}: a micro-batch holds {room} tokens, but the "
                f"longest prompt and response are {longest} ({shown}), at which verl stops. Set it to at least "
                f"{-(-longest // view.sequence_parallel)}."
            )


def _replicas(view: View) -> Iterator[str]:
    """Do the rollout engine's replicas fit on the GPUs?"""
    sizes = [view[f"{_ROLLOUT}.{kind}_parallel_size"] for kind in ("tensor_model", "data", "pipeline_model")]
    replica = sizes[0] * sizes[1] * sizes[2]
    key = f"{_ROLLOUT}.tensor_model_parallel_size"
    pools = []
    if not (_is_separate(view) and view["actor_rollout_ref.hybrid_engine"] is False):
        pools.append(("the trainer", view["trainer.nnodes"], view["trainer.n_gpus_per_node"]))
    if _is_separate(view) and view[f"{_ROLLOUT}.nnodes"]:
        pools.append(("the rollout", view[f"{_ROLLOUT}.nnodes"], view[f"{_ROLLOUT}.n_gpus_per_node"]))
    for whose, nodes, per_node in pools:
        gpus, where = nodes * per_node, f"{nodes} x {per_node} = {nodes * per_node} GPUs of {whose}"
        if replica > gpus:
            yield (
                f"{view.shown(key)}: one replica of the rollout engine takes {replica} GPUs, but there are {where}. "
                f"Set {view.name(key)} to {gpus} or less."
            )
        elif gpus % replica or (per_node % replica and replica % per_node):
            yield (
                f"{view.shown(key)}: replicas of {replica} GPUs do not fill {where} evenly, node by node. Set "
                f"{view.name(key)} to a divisor of {per_node}."
            )
    share = view[f"{_ROLLOUT}.gpu_memory_utilization"]
    if not isinstance(share, int | float) or not 0 < share < 1:
        yield f"{view.shown(f'{_ROLLOUT}.gpu_memory_utilization')}, expected a share of the memory above 0 and below 1."


def _is_separate(view: View) -> bool:
    return str(view["trainer.v1.trainer_mode"]).removeprefix("cppo_") == "separate_async"


def _separate(view: View) -> Iterator[str]:
    """Separate trainer and rollout: are there GPUs for the rollout, and a way to send it weights?"""
    if not _is_separate(view):
        return
    mode = view.shown("trainer.v1.trainer_mode")
    if not view[f"{_ROLLOUT}.nnodes"]:
        yield f"{mode} needs nodes of its own for the rollout. Set {_ROLLOUT}.nnodes and {_ROLLOUT}.n_gpus_per_node."
    if view[f"{_ROLLOUT}.checkpoint_engine.backend"] == "naive":
        yield (
            f"{mode} sends weights from GPU to GPU, which {_ROLLOUT}.checkpoint_engine.backend=naive cannot. Set it to "
            "nccl."
        )
    steps = view["trainer.v1.separate_async.parameter_sync_step"]
    prompts, each = view["data.train_batch_size"], view[f"{_ACTOR}.ppo_mini_batch_size"]
    if prompts != steps * each:
        yield (
            f"{mode} makes one update of {view.shown(f'{_ACTOR}.ppo_mini_batch_size')} prompts at a time and sends the "
            f"weights after trainer.v1.separate_async.parameter_sync_step={steps} of them, which must make up "
            f"{view.shown('data.train_batch_size')}. Set parameter_sync_step={max(1, prompts // each)}."
        )


def _trainer(view: View) -> Iterator[str]:
    """The loss refuses a trainer that has not checked the anchor."""
    mode, checks = view["trainer.v1.trainer_mode"], f"{_ACTOR}.policy_loss.trainer_checks"
    if str(view[f"{_ACTOR}.policy_loss.rule.divergence"]).startswith("topk_"):
        return  # `checks.check_config` refuses that mode, whatever the loss insists on
    if not str(mode).startswith("cppo_") and view[checks] is not False:
        yield (
            f"{view.shown('trainer.v1.trainer_mode')}: the loss insists on one of CPPO's trainers, which check the "
            f"anchor. Set trainer.v1.trainer_mode=cppo_sync (or leave it to --mode), or, if you see to the anchor "
            f"yourself, +{checks}=False."
        )


def _data(view: View) -> Iterator[str]:
    """Are local data files what verl reads? Files that are not here may be elsewhere; the launcher asks for those."""
    for key in ("data.train_files", "data.val_files"):
        rows = 0
        for name in listed(view[key]):
            path = Path(name).expanduser()
            if path.suffix not in (".parquet", ".json", ".jsonl"):
                yield f"{key}: verl reads .parquet, .json and .jsonl files, not {name}."
            elif path.suffix == ".parquet" and path.is_file():
                rows += yield from _parquet(key, path)
        if key == "data.train_files" and 0 < rows < view["data.train_batch_size"]:
            yield (
                f"{view.shown('data.train_batch_size')} prompts per rollout batch, but {key} has only {rows}. Set "
                f"{view.name('data.train_batch_size')} to {rows} or less."
            )


def listed(files: Any) -> list[str]:
    """A setting that holds one file or several, as a list."""
    return [files] if isinstance(files, str) else [str(name) for name in files or []]


def _parquet(key: str, path: Path) -> Generator[str, None, int]:
    """Problems of a file; returns its rows, 0 for one that cannot be used."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns, rows = file.schema_arrow.names, file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        yield f"{key}: {path} is not a readable Parquet file: {error}."
        return 0
    missing = [name for name in ("prompt", "data_source", "reward_model") if name not in columns]
    if missing:
        yield (
            f"{key}: {path} has no column {' and no '.join(missing)} (it has {', '.join(columns)}). "
            "`cppo launch verl --prepare-data FOLDER` writes files that verl reads."
        )
        return 0
    return rows


def _model(view: View) -> Iterator[str]:
    """What a local model's config.json rules out."""
    folder = Path(str(view[f"{_MODEL}.path"])).expanduser()
    try:
        model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a hub id, or a folder on another machine; verl says so itself
    longest = model.get("max_position_embeddings")
    limit = view[f"{_ROLLOUT}.max_model_len"]
    if isinstance(longest, int) and isinstance(limit, int) and limit > longest:
        yield (
            f"{view.shown(f'{_ROLLOUT}.max_model_len')}, but {folder} was made for {longest} tokens. Set "
            f"{view.name(f'{_ROLLOUT}.max_model_len')} to {longest} or less, and the limits of prompt and response."
        )
    heads = model.get("num_attention_heads")
    tensor = f"{_ROLLOUT}.tensor_model_parallel_size"
    sizes = {tensor: view[tensor], "the Ulysses sequence parallel size": 1 if view.megatron else view.sequence_parallel}
    for key, size in sizes.items():
        if isinstance(heads, int) and heads % size:
            yield f"{key}={size} does not divide the {heads} attention heads of {folder}. Set a divisor of {heads}."


def select(config: Any, key: str) -> Any:
    """The value at a dotted key of a configuration (omegaconf); None where there is none."""
    from omegaconf import OmegaConf

    return OmegaConf.select(config, key)
