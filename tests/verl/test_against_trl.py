"""verl and TRL on the same rollouts, weights and rewards: the same coefficient for every token.

A rollout batch of a real run of verl (three updates) is replayed through the TRL engine, in a process of its own: verl
0.9 does not load models where it finds a current TRL, so TRL lies beside the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl.trainer", reason="verl is not installed: make test-verl")

import torch
from recompute import close
from safetensors.torch import save_file
from test_trainer import LOSS, TARGET, TIMEOUT_S, TOP_K
from trainer_runs import SUPPORT, Run, train
from trainer_runs import sums as make_sums

pytestmark = pytest.mark.e2e

TRL = Path(sys.prefix) / "lib" / "trl-only"
RULE = {"delta": 0.1, "delta_b": 0.015, "budget": "adaptive"}


@pytest.mark.skipif(not TRL.is_dir(), reason="TRL is not beside this environment: make setup-verl")
def test_coefficients_are_those_of_the_trl_engine(tiny_model: Path, tmp_path: Path) -> None:
    data = make_sums(tmp_path / "sums.parquet", count=10)  # ten different prompts: a prompt names its group
    overrides = TARGET | {
        "trainer.v1.trainer_mode": "cppo_sync",
        "trainer.total_training_steps": 1,
        "data.train_batch_size": 6,
        f"{LOSS}.loss_mode": "cppo",
        **{f"+{LOSS}.rule.{name}": value for name, value in RULE.items()},
    }
    run = train(Run("verl", overrides), tmp_path / "runs", tiny_model, data, TIMEOUT_S)
    assert len(run.updates) == 3

    groups: dict[str, Any] = {}
    verls: list[dict[str, torch.Tensor]] = []
    for call in run.updates:
        found = {}
        columns = ("data.prompts", "data.responses", "data.old_log_probs", "data.advantages")
        rows = zip(*(call.rows(name) for name in columns), call.responses("grad.log_probs"), strict=True)
        for prompt, ids, mu, advantages, gradient in rows:
            key = [prompt.tolist(), ids.tolist()]
            reward = float(advantages[0])  # of a centred group: the same up to a scale
            group = groups.setdefault(json.dumps(key[0]), {"prompt": key[0], "responses": []})
            group["responses"].append({"ids": key[1], "logp": mu.tolist(), "reward": reward})
            if reward != 0:  # verl's token mean: gradient = -c_t A_t / tokens
                found[json.dumps(key)] = -gradient * call.tokens / reward
        verls.append(found)
    assert {len(group["responses"]) for group in groups.values()} == {4}

    tensors = {f"{k}.{name}": value for k, call in enumerate(run.updates) for name, value in call.weights.items()}
    request = {
        "model": str(tiny_model),
        "rule": {"name": "cppo", **RULE},
        "top_k": TOP_K,
        "groups": list(groups.values()),
    }
    save_file(tensors, tmp_path / "request.safetensors", metadata={"request": json.dumps(request)})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    environment |= {"PYTHONPATH": str(TRL), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "trl_coefficients.py"), "request.safetensors", "answer.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trls = json.loads((tmp_path / "answer.json").read_text())

    compared, dropped, undecided = 0, 0, 0
    for k, (ours, theirs) in enumerate(zip(verls, trls, strict=True)):
        assert ours, f"no response of update {k} has an advantage"
        for key, coefficients in ours.items():
            wanted = torch.tensor(theirs[key])
            if bool(((coefficients == 0) != (wanted == 0)).any()):
                undecided += 1  # a token on the edge of a limit, by rounding; there is none in most runs
                continue
            close(coefficients, wanted, 1e-4, f"coefficients of update {k}")
            compared += 1
            dropped += int((wanted == 0).sum())
    assert undecided <= 1 and compared >= 8 and dropped > 0
    assert all(abs(c - 1) < 1e-3 for key in verls[0] for c in trls[0][key]), "before the first step every ratio is 1"
