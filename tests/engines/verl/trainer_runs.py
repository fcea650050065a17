"""Whole runs of verl's V1 trainer on a CPU, in a subprocess, with what they logged and recorded.

Ray, FSDP2 over gloo, TransferQueue, agent loops, rewards, updates and the synchronisation of weights are verl's own.
What verl lacks on a CPU is in `support/cppo_cpu`: the platform, a rollout server, a checkpoint engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor

SUPPORT = Path(__file__).parent / "support"
TESTS = Path(__file__).parents[2]
SOURCE = Path(__file__).parents[3] / "src"
#: One for all runs of this process: Ray's workers read it when they are imported, in `Forks` before there is a cluster.
RAY_TOKEN = secrets.token_hex(32)
#: Logical devices of the Ray session: one for the trainer, one for a separate rollout replica.
DEVICES = 2


@dataclass(frozen=True)
class Run:
    """One configuration. `overrides` go on top of `BASE`; a value of None removes a key."""

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """One recorded call of the loss (`support/cppo_cpu/record.py`): a micro-batch of an optimizer update.

    `update`: number of the optimizer update, from 0. `tokens`: loss tokens of the update's whole mini-batch.
    """

    tensors: dict[str, Tensor]
    loss: float
    metrics: dict[str, Any]
    update: int
    tokens: int

    def rows(self, name: str) -> list[Tensor]:
        """A ragged field as one tensor a sequence."""
        return list(self.tensors[name].tensor_split(self.tensors[f"{name}.offsets"][1:-1].tolist()))

    def nested(self, name: str) -> Tensor:
        """A ragged field as verl has it."""
        return torch.nested.nested_tensor(self.rows(name), layout=torch.jagged)

    def responses(self, name: str) -> list[Tensor]:
        """A field over whole sequences, ``out.*`` or ``grad.*``, cut to what belongs to the response's tokens.

        Position t of a packed sequence holds what was computed for token t + 1.
        """
        offsets = self.tensors["data.input_ids.offsets"]
        lengths = [len(row) for row in self.rows("data.responses")]
        ends = offsets[1:].tolist()
        return [self.tensors[name][end - n - 1 : end - 1] for end, n in zip(ends, lengths, strict=True)]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's weights in this update's forward."""
        return {name[8:]: tensor for name, tensor in self.tensors.items() if name.startswith("weights.")}


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    folder: Path
    log: str

    @cached_property
    def steps(self) -> list[dict[str, float]]:
        """verl's metrics, one dictionary a step."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [{"step": row["step"], **row["data"]} for row in map(json.loads, lines)]

    @cached_property
    def updates(self) -> list[Update]:
        """The recorded calls of the loss, in order."""
        updates = []
        for file in sorted((self.folder / "record").glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                about = {name: json.loads(text) for name, text in opened.metadata().items()}
                updates.append(Update({name: opened.get_tensor(name) for name in opened.keys()}, **about))  # noqa: SIM118
        return updates

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        """Prompts, responses and scores of every step, as verl dumps them."""
        files = sorted((self.folder / "rollouts").glob("*.jsonl"), key=lambda file: int(file.stem))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


#: A rollout that fails is only logged by verl, and in asynchronous modes tried again for ever.
FATAL = "Error in _run_prompt"


class RunFailed(AssertionError):
    """A run ended with an error, or not at all; `str()` holds the end of its log."""


#: verl's trainer made small: one process, float32, a rollout of 2 prompts x 4 responses, 2 updates per step.
BASE: dict[str, Any] = {
    "trainer.device": "cpu",
    "trainer.n_gpus_per_node": 1,
    "trainer.nnodes": 1,
    "trainer.logger": "[file]",
    "trainer.total_training_steps": 2,
    "trainer.total_epochs": 1000,
    "trainer.save_freq": -1,
    "trainer.test_freq": -1,
    "trainer.val_before_train": False,
    "trainer.resume_mode": "disable",
    "ray_kwargs.ray_init.num_cpus": 16,
    "+ray_kwargs.ray_init.num_gpus": DEVICES,
    "+ray_kwargs.ray_init.include_dashboard": False,
    "+ray_kwargs.ray_init.object_store_memory": 200_000_000,
    "+ray_kwargs.ray_init._node_ip_address": "127.0.0.1",
    "data.train_batch_size": 4,
    "data.max_prompt_length": 32,
    "data.max_response_length": 12,
    "data.dataloader_num_workers": 0,
    "algorithm.adv_estimator": "grpo",
    "algorithm.rollout_correction.bypass_mode": True,
    "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    "actor_rollout_ref.model.use_remove_padding": True,
    "actor_rollout_ref.model.enable_gradient_checkpointing": False,
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 8,
    "actor_rollout_ref.actor.optim.lr": 1e-3,
    "actor_rollout_ref.actor.use_torch_compile": False,
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
    "actor_rollout_ref.actor.fsdp_config.model_dtype": "fp32",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": "fp32",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype": "fp32",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.buffer_dtype": "fp32",
    "actor_rollout_ref.rollout.name": "cpu",
    "actor_rollout_ref.rollout.n": 4,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.n_gpus_per_node": 1,
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 8,
    "actor_rollout_ref.rollout.agent.num_workers": 1,
    "actor_rollout_ref.rollout.load_format": "auto",
    "reward.num_workers": 1,
    "reward.custom_reward_function.path": str(SUPPORT / "cppo_cpu" / "rewards.py"),
    "reward.custom_reward_function.name": "digits",
    "reward.reward_model.rollout.name": "vllm",  # a required name; no reward model is started
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    "transfer_queue.backend.SimpleStorage.total_storage_size": 4000,
}


def environment(modules: str | None) -> dict[str, str]:
    """Environment of a run: nothing of the machine's but PATH and HOME, one thread a process, no network.

    `modules`: what VERL_USE_EXTERNAL_MODULES adds to the CPU platform; None: verl finds plug-ins by entry points.
    """
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {
        "PYTHONPATH": os.pathsep.join((str(SUPPORT), str(SOURCE))),
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_USE_EXTERNAL_MODULES": ",".join(filter(None, ("cppo_cpu_plugin", modules))),
        "VERL_USE_EXTERNAL_PLUGINS": "auto" if modules is None else "none",
        "OMP_NUM_THREADS": "1",
        "TQ_NUM_THREADS": "1",
        "TQ_CLIENT_ZMQ_IO_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HYDRA_FULL_ERROR": "1",
        "WANDB_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": RAY_TOKEN,
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_worker_niceness": "0",
        "RAY_prestart_worker_first_driver": "0",  # 16 idle processes
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",
    }


def overrides(run: Run, folder: Path, model: Path, data: Path) -> list[str]:
    """Hydra overrides of `run`, whose results go to ``folder/<run.name>``."""
    own = {
        "hydra.run.dir": folder / run.name / "hydra",
        "trainer.default_local_dir": folder / run.name / "checkpoints",
        "trainer.rollout_data_dir": folder / run.name / "rollouts",
        "data.train_files": data,
        "data.val_files": data,
        "actor_rollout_ref.model.path": model,
        "+actor_rollout_ref.rollout.custom.run": run.name,
        "+actor_rollout_ref.rollout.custom.record": folder / run.name / "record",
    }
    merged = {key: value for key, value in {**BASE, **own, **run.overrides}.items() if value is not None}
    return [f"{key}={value}" for key, value in merged.items()]


def train(
    run: Run,
    folder: Path,
    model: Path,
    data: Path,
    timeout: float,
    modules: str | None = "cppo_verl_plugin,cppo_cpu_phases",
    forks: Forks | None = None,
) -> Result:
    """Run one configuration by verl's own command line, and return what it left behind.

    `forks`: where the run's processes are forked from, started with the same `modules`; None: each imports verl itself.

    Raises
    ------
    RunFailed : the run failed, or took longer than `timeout` seconds.
    """
    own = folder / run.name
    own.mkdir(parents=True)
    python, changes = [sys.executable], {}
    if forks is not None:
        python = forks.python
        changes = {"+ray_kwargs.ray_init.runtime_env.py_executable": f"'{' '.join(python)}'"}
    settings = overrides(Run(run.name, {**run.overrides, **changes}), folder, model, data)
    log = own / "log.txt"
    with log.open("w") as output, ray_folder() as temporary:
        env = environment(modules) | {"RAY_TMPDIR": temporary, "VERL_FILE_LOGGER_PATH": str(own / "metrics.jsonl")}
        if forks is not None:
            env["CPPO_FORKS"] = str(forks.socket)
        code = run_group([*python, "-m", "verl.trainer.main_ppo", *settings], env, output, timeout)
    text = log.read_text(errors="replace")
    if code != 0:
        what = f"took longer than {timeout:.0f} s" if code is None else f"ended with code {code}"
        raise RunFailed(f"{run.name} {what}; {log}:\n{excerpt(text)}")
    return Result(own, text)


class Forks:
    """The process of `support/cppo_cpu/forks.py`, while the context lasts.

    Raises
    ------
    RunFailed : it ended, or took longer than `timeout` seconds to import verl.
    """

    def __init__(self, modules: str = "cppo_verl_plugin,cppo_cpu_phases", timeout: float = 300) -> None:
        self.modules, self.timeout = modules, timeout
        self.folder = Path(tempfile.mkdtemp(prefix="forks", dir="/tmp"))
        self.socket = self.folder / "socket"
        self.python = [sys.executable, "-I", "-S", str(TESTS / "forked_python.py")]

    def __enter__(self) -> Forks:
        log = self.folder / "log.txt"
        command = [sys.executable, "-m", "cppo_cpu.forks", str(self.socket)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env=environment(self.modules),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                preexec_fn=_die_with_parent,
            )
        until = time.monotonic() + self.timeout
        while not self.socket.exists():
            if self.process.poll() is not None or time.monotonic() > until:
                text = log.read_text(errors="replace")
                self.__exit__()
                raise RunFailed(f"importing verl failed:\n{excerpt(text)}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def ray_folder() -> Iterator[str]:
    """A short folder for Ray's sockets (their paths may have 107 bytes)."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _die_with_parent() -> None:
    """In a new process: be killed when the tests are, whatever kills them (Linux). Ray's daemons follow the driver."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_group(command: list[str], env: dict[str, str], output: Any, timeout: float) -> int | None:
    """The exit code of `command`, None after a time-out. Every process that it started is gone afterwards.

    Ray's daemons leave the process group; they are found by RAY_TMPDIR, which is this run's alone.
    """
    process = subprocess.Popen(
        command,
        env=env,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    until = time.monotonic() + timeout
    try:
        while time.monotonic() < until:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(1)
            if FATAL in Path(output.name).read_text(errors="replace"):
                time.sleep(2)  # for the rest of the message
                return -1
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        kill_users(env["RAY_TMPDIR"])


def users(folder: str) -> list[psutil.Process]:
    """Processes whose RAY_TMPDIR is `folder`, or that have a file in it open.

    Some of Ray's agents write their title over their environment; all of them write logs.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            files = Path(f"/proc/{process.pid}/fd")
            if process.environ().get("RAY_TMPDIR") == folder or any(
                os.readlink(file).startswith(f"{folder}/") for file in files.iterdir()
            ):
                found.append(process)
    return found


def kill_users(folder: str, patience: float = 10.0) -> None:
    """Kill the `users` of a run's folder until none is left."""
    until = time.monotonic() + patience
    while left := users(folder):
        if time.monotonic() > until:
            raise RuntimeError(f"processes of a run in {folder} cannot be killed: {left}")
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)


def excerpt(text: str, lines: int = 60) -> str:
    """What is worth reading of a long log: lines with an error, and its end."""
    all_lines = text.splitlines()
    errors = [line for line in all_lines[:-lines] if re.search(r"Error|Exception|Traceback", line)]
    return "\n".join([*(line[:300] for line in errors[-20:]), "...", *(line[:2000] for line in all_lines[-lines:])])


def tiny_model(folder: Path, seed: int = 0) -> Path:
    """A Qwen3 of 0.1M parameters with random weights and a character tokenizer in ChatML, for shapes and plumbing.

    The initial scale makes the policy peaked enough that ratios and divergences differ from token to token. Heads of
    width 32: vLLM's CPU attention takes no smaller ones.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    special = ["<pad>", "<|im_end|>", "<|im_start|>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(vocabulary),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=32,
                max_position_embeddings=512,
                initializer_range=0.1,
                tie_word_embeddings=False,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=None,
            )
        )
    model.generation_config.eos_token_id = 1
    fast.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    """A data file as verl reads it."""
    import pandas as pd

    pd.DataFrame(rows).to_parquet(file)
    return file


def sums(file: Path, count: int = 16, agent: str = "single_turn_agent") -> Path:
    """Sums of two digits, in verl's columns."""
    return parquet(
        file,
        [
            {
                "data_source": "sums",
                "prompt": [{"role": "user", "content": f"{i % 10}+{7 * i % 10}="}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(i % 10 + 7 * i % 10)},
                "extra_info": {"index": i},
                "agent_name": agent,
            }
            for i in range(count)
        ],
    )
