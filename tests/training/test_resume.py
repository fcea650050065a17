"""Kill -9 at any moment, resume, and end with the same bits as a run that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from forks import python

HERE = Path(__file__).parent
SETTINGS = [
    "task=toy_task:Letters",
    "tiny.hidden_size=32",
    "tiny.layers=1",
    "tiny.heads=2",
    "warmup.steps=20",
    "warmup.batch_size=16",
    "rollout.prompts=4",
    "rollout.responses=4",
    "rollout.max_new_tokens=40",
    "rollout.sampler=own",  # auto takes TRL's for the tiny model
    "updates=2",
    "steps=6",
    "save_every=1",
    "rule.delta=0.02",
    "rule.delta_b=0.005",
    "optimizer.learning_rate=0.003",
    "evaluation.every=3",
    "evaluation.problems=4",
    "evaluation.samples=2",
    "samples.every=2",
    "samples.count=2",
]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return subprocess.run([python(), *arguments], capture_output=True, text=True, env=environment, timeout=300)


def cppo(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = start("-m", "cppo.cli", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def rows(path: Path) -> list[dict[str, object]]:
    """Lines of a JSONL file without wall-clock figures."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def same(one: Path, other: Path) -> None:
    assert rows(one / "metrics.jsonl") == rows(other / "metrics.jsonl")
    for name in ("positions.jsonl", "problems.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    for sub in ("samples", "best", "checkpoints"):
        mine = {p.relative_to(one) for p in (one / sub).rglob("*") if p.is_file()}
        assert mine == {p.relative_to(other) for p in (other / sub).rglob("*") if p.is_file()}
    for pattern in ("samples/*.jsonl", "**/model.safetensors"):
        for path in one.glob(pattern):
            assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path


@pytest.mark.slow
def test_killed_at_every_kind_of_moment_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cppo("train", *SETTINGS, f"output_dir={whole}")
    killed.mkdir()
    for name in ("config.yaml", "versions.json"):
        text = (whole / name).read_text().replace(str(whole), str(killed))
        (killed / name).write_text(text)
    for where in ("warmup", "evaluation", "rollout", "updates", "save"):
        done = start(str(HERE / "killed_run.py"), where, str(killed))
        assert done.returncode == -signal.SIGKILL, where + done.stdout + done.stderr
        assert not list(killed.rglob("summary.md"))
    stopped = start(str(HERE / "killed_run.py"), "interrupt", str(killed))
    assert stopped.returncode == 130, stopped.stdout + stopped.stderr
    assert "--resume" in stopped.stdout
    cppo("train", "--resume", str(killed))
    same(whole, killed)
    assert "Avg@2" in (killed / "summary.md").read_text()
    # ... and the run was one in which something happened
    masked = [row.get("trust/masked_fraction", 0) for row in rows(whole / "metrics.jsonl")]
    assert 0 < max(masked) < 1
    start_weights, end_weights = (
        whole / "warmup/model/model.safetensors",
        whole / "checkpoints/step-000006/model.safetensors",
    )
    assert start_weights.read_bytes() != end_weights.read_bytes()


@pytest.mark.slow
def test_two_processes_share_a_run(tmp_path: Path) -> None:
    """Data parallel over gloo: one folder, one set of metrics, an evaluation of all problems, a loadable checkpoint."""
    folder = tmp_path / "two"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cppo.cli", "train"]
    done = start(*launch, *SETTINGS, "steps=2", "evaluation.every=1", "evaluation.problems=3", f"output_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = rows(folder / "metrics.jsonl")
    assert [row["update"] for row in lines if row["kind"] == "train"] == [1, 2, 3, 4]
    assert [row["step"] for row in lines if row["kind"] == "evaluation"] == [0, 1, 2]
    assert done.stdout.count("Results go to") == 1
    # every problem has its score, whichever process judged it
    evaluations = [row for row in lines if row["kind"] == "evaluation"]
    for row, problems in zip(evaluations, rows(folder / "problems.jsonl"), strict=True):
        assert problems["step"] == row["step"] and problems["scores"]
        for name, scores in problems["scores"].items():
            assert len(scores) == 3 and sum(scores) / 3 == pytest.approx(row[f"avg/{name}"])
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "step-000002")


def test_all_processes_skip_what_one_of_them_sees(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = start(*launch, str(HERE / "guard_worker.py"), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
