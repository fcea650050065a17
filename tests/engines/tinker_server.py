"""SkyRL's Tinker server (JAX on a CPU) on a free port of this machine, and a tiny model for it.

`running` starts it in a process group of its own and ends the whole group; its log shows on failure. As a script this
file is the server: SkyRL starts its engine with `uv run`, which is replaced by this environment's Python. That is all
that is changed, next to what `skyrl_import` says.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

#: Characters of the tiny model; its token ids are indices into this.
CHARACTERS = "".join(chr(code) for code in range(32, 127))
BACKEND = {"max_lora_adapters": 3, "max_lora_rank": 8}


def write_model(folder: Path) -> None:
    """A random one-layer Qwen3 over characters, with a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*CHARACTERS, *special])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=vocabulary["<eos>"],
        pad_token_id=vocabulary["<pad>"],
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # larger than the usual 0.02, so that a low-rank adapter can move the logits in few steps
        model.lm_head.weight.mul_(12)
        model.model.embed_tokens.weight.mul_(12)
    model.save_pretrained(folder)


@contextlib.contextmanager
def running(folder: Path, limit_s: float = 240) -> Iterator[str]:
    """A server for the model in `folder`/model; yields its address. RuntimeError, with its log: it did not come up."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = folder / "server.log"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    # Nearly all of the time is XLA's compiler; this model needs none of its optimisations.
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, __file__, "api", str(folder), str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + limit_s
        while not _answers(address):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Tinker server did not come up ({server.poll()}):\n{log.read_text()[-6000:]}")
            time.sleep(0.3)
        yield address
    finally:
        _end(server)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/v1/healthz", timeout=2) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and its engine: the group that they, and nothing else, are in."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=10)


def _end_with(parent: int) -> None:
    """End this process group when the process that started it is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def _api(folder: Path, port: int) -> None:
    import uvicorn
    from skyrl.tinker import api
    from skyrl.tinker.config import EngineConfig, config_to_argv

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    command = [sys.executable, __file__, "engine"]
    api._build_uv_run_cmd_engine = lambda parent, config: [*command, *config_to_argv(config)]
    api.app.state.engine_config = EngineConfig(
        base_model=str(folder / "model"),
        backend="jax",
        backend_config=BACKEND,
        checkpoints_base=str(folder / "checkpoints"),
        database_url=f"sqlite:///{folder}/tinker.db",
    )
    uvicorn.run(api.app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    from skyrl_import import make_importable  # a script's own folder is on its path

    make_importable()
    what, *arguments = sys.argv[1:]
    if what == "api":
        _api(Path(arguments[0]), int(arguments[1]))
    else:
        sys.argv = ["skyrl.tinker.engine", *arguments]
        runpy.run_module("skyrl.tinker.engine", run_name="__main__", alter_sys=True)
