"""What `cppo launch verl` brings along, in verl's hands: prepared data, the verifier, and a whole run."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl.trainer", reason="make setup-verl")
pytest.importorskip("hydra", reason="make setup-verl")

from omegaconf import OmegaConf

from cppo.config.load import load_config
from cppo.launch import data as launch_data
from cppo.launch import verl as launch
from cppo.launch.checks import problems


@pytest.fixture(scope="module")
def composed() -> Any:
    """verl's configuration of a recipe."""
    return launch.plan("qwen3-8b-base").composed


# -- data and rewards in verl's hands --------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> Path:
    """Prepared data of 40 + 2 problems."""
    pytest.importorskip("math_verify", reason="make setup-verl")
    rows = [{"problem": f"What is {i}+{i}?", "answer": 2 * i} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"problem": "What is 1/2+1/4?", "answer": "3/4"}, {"problem": "What is 2+3?", "answer": 5}]
    (tmp_path / "aime.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        f"task.train={tmp_path / 'train.jsonl'}",
        "task.validation={AIME24: " + str(tmp_path / "aime.jsonl") + "}",
    ]
    launch_data.prepare(load_config("qwen3-8b-base", options), tmp_path / "data")
    return tmp_path / "data"


def test_verls_data_set_reads_what_was_prepared(composed, data):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from verl.trainer.ppo.utils import create_rl_dataset

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "What": 1, "is": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    settings = composed.data.copy()
    files = [str(data / "train.parquet"), str(data / "AIME24.parquet")]
    rows = create_rl_dataset(files, settings, tokenizer, None, is_train=True)
    assert len(rows) == 42
    assert rows[3]["raw_prompt"][0]["content"].startswith("What is 3+3?")
    assert rows[3]["reward_model"]["ground_truth"] == "6" and rows[3]["index"] == 3
    assert [rows[i]["data_source"] for i in (0, 40)] == ["math", "AIME24"]
    settings.max_prompt_length = 3  # shorter than any prompt
    assert len(create_rl_dataset(files, settings, tokenizer, None, is_train=True)) == 0


def test_a_data_file_is_looked_into(composed, data, tmp_path):
    import pyarrow
    import pyarrow.parquet

    config = composed.copy()
    for path, words in (
        (data / "train.parquet", "has only 40. Set data.train_batch_size to 40 or less"),
        (tmp_path / "bad.parquet", "no column data_source and no reward_model (it has prompt, answer)"),
        (tmp_path / "broken.parquet", "is not a readable Parquet file"),
    ):
        if path.name == "bad.parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "p", "answer": "1"}]), path)
        elif path.name == "broken.parquet":
            path.write_bytes(b"PAR1")
        OmegaConf.update(config, "data.train_files", [str(path)])
        assert words in "\n".join(problems(config, {}))


def test_verl_calls_our_verifier(composed):
    """By verl's own loader and reward manager, several at a time."""
    pytest.importorskip("math_verify", reason="make setup-verl")
    import numpy as np
    import torch
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    answers = {0: "The answer is \\boxed{\\frac{3}{4}}", 1: "\\boxed{0.75}", 2: "Answer: 4/3", 3: ""}

    class Decoder:
        """Stands for a tokenizer: one token a response."""

        def decode(self, ids, skip_special_tokens):
            return answers[int(ids[0])]

    config = composed.copy()
    OmegaConf.set_struct(config, False)
    config.reward.custom_reward_function.reward_kwargs = {"time_limit": 20.0, "workers": 1}

    async def score():
        manager = load_reward_manager(config, Decoder())
        calls = []
        for token in answers:
            tensors = {"responses": torch.tensor([[token]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
            row = {"data_source": "AIME24", "reward_model": {"ground_truth": "3/4"}, "extra_info": {"index": token}}
            extra = {key: np.array([value], dtype=object) for key, value in row.items()}
            calls.append(manager.run_single(DataProto.from_dict(tensors=tensors, non_tensors=extra)))
        return await asyncio.gather(*calls)

    found = asyncio.run(score())
    assert [one["reward_score"] for one in found] == [1.0, 1.0, 0.0, 0.0]
    assert [one["reward_extra_info"]["acc"] for one in found] == [1.0, 1.0, 0.0, 0.0]  # what verl averages to Avg@16


def test_the_verifier_is_one_a_process():
    pytest.importorskip("math_verify", reason="make setup-verl")
    from cppo.engines.verl import reward

    reward._verifiers.clear()
    threads = [
        threading.Thread(target=reward.compute_score, args=("math", "\\boxed{1}", "1", None, 20.0, 1)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(reward._verifiers) == [(20.0, 1)]
    reward._verifiers.popitem()[1].close()


# -- the whole of it -------------------------------------------------------------------------------------------------

#: Of the settings that make verl's trainer run on a CPU (`trainer_runs.BASE`), those that a recipe does not decide.
DEVICE = (
    "trainer.device",
    "ray_kwargs.",
    "data.dataloader_num_workers",
    "actor_rollout_ref.model.override_config",
    "actor_rollout_ref.actor.use_torch_compile",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile",
    "actor_rollout_ref.rollout.name",
    "actor_rollout_ref.rollout.agent.",
    "actor_rollout_ref.rollout.load_format",
    "reward.num_workers",
    "reward.reward_model.",
    "transfer_queue.",
)


@pytest.mark.e2e
def test_a_recipe_trains(tmp_path):
    """`--prepare-data` and `cppo launch verl`: two steps of the 1.7B recipe with a tiny model on the CPU.

    Everything but sizes, devices and the sampler is as composed: data, verifier, rule, top-K, validation, checkpoints.
    """
    pytest.importorskip("math_verify", reason="make setup-verl")
    import trainer_runs

    model = trainer_runs.tiny_model(tmp_path / "model")
    rows = [{"problem": f"{i}+1=?", "answer": i + 1} for i in range(8)]
    for name, part in (("train", rows), ("aime", rows[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    recipe = [
        f"model={model}",
        f"task.train={tmp_path / 'train.jsonl'}",
        "task.validation={AIME24: " + str(tmp_path / "aime.jsonl") + "}",
        "task.instruction=''",
        "precision=float32",
        "rollout.prompts=4",
        "rollout.responses=4",
        "rollout.max_new_tokens=12",
        "rollout.vllm_max_model_length=64",
        "micro_batch=8",
        "steps=2",
        "evaluation.samples=2",
        "evaluation.top_p=1.0",  # the CPU's server draws from the full softmax only
        "evaluation.every=0",
        "save_every=2",
        f"output_dir={tmp_path / 'out'}",
    ]
    device = [
        f"{'++' if key.startswith('+') else ''}{key.lstrip('+')}={value}"
        for key, value in trainer_runs.BASE.items()
        if key.lstrip("+").startswith(DEVICE)
    ]
    device.append("+actor_rollout_ref.rollout.custom.run=launch")  # the CPU's rollout server is called by it
    program = [sys.executable, "-m", "cppo.cli", "launch", "verl", "--recipe", "qwen3-1.7b-base", *recipe]
    log = tmp_path / "log.txt"
    with trainer_runs.ray_folder() as temporary, log.open("w") as output:
        environment = {**trainer_runs.environment(""), "RAY_TMPDIR": temporary}
        data = str(tmp_path / "data")
        for words in (["--prepare-data", data], ["--data-dir", data, "--gpus-per-node", "1", *device]):
            status = trainer_runs.run_group([*program, *words], environment, output, timeout=500)
            assert status == 0, trainer_runs.excerpt(log.read_text(errors="replace"))

    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    figures = {row["step"]: row["data"] for row in map(json.loads, lines)}
    assert sorted(figures) == [0, 1, 2]
    for step in (0, 2):  # before and after
        assert 0 <= figures[step]["val-core/AIME24/acc/mean@2"] <= 1
    for step in (1, 2):
        assert figures[step]["actor/trust/first_update_divergence"] < 1e-3
        assert figures[step]["actor/lr"] == pytest.approx(1e-6)
        assert "actor/trust/prefix_budget_fraction" in figures[step]
    checkpoints = tmp_path / "out" / "checkpoints"
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (checkpoints / "global_step_2" / "actor").is_dir()
