"""`delta=auto` in real runs: what is chosen and recorded, killed and resumed, and shared by two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import cppo
from cppo.config.load import load_config
from cppo.errors import UserError
from cppo.runs.calibration import read_calibration, read_sample, rule_as_run, rule_of_run, truncate_calibration
from cppo.thresholds import solve
from cppo.training import run as run_module
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
    "rollout.max_new_tokens=12",
    "updates=2",
    "steps=4",
    "optimizer.learning_rate=0.003",
    "evaluation.problems=4",
    "evaluation.samples=2",
    "rule=cppo",
    "rule.delta=auto",
    "rule.delta_b=auto",
    "calibration.target=0.05",
    "calibration.steps=2",
]
#: The rule of the first batch: the recipe's, with the defaults of what sets itself.
FIRST = cppo.CPPO(budget="fixed")


def train(*settings: str, resume: Path | None = None) -> Any:
    return run_module.train(load_config(None, [*SETTINGS, *settings]), resume)


def rows(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Metrics without wall-clock figures."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines if kind in (None, row["kind"])]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """As the other processes below: sums over threads have other last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("auto") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "write_plots", lambda folder: None)
        train(f"output_dir={folder}")
    return folder


def test_a_run_chooses_records_and_uses_its_thresholds(whole: Path) -> None:
    record = read_calibration(whole)
    assert record is not None and (record["rule"], record["target"], record["steps"]) == ("cppo", 0.05, 2)
    assert [entry["step"] for entry in record["history"]] == [1, 2]
    first, second = record["history"]
    assert record["thresholds"] == second["thresholds"] != first["thresholds"]
    # the first batch has the rule's defaults, the second what the first gave, all others what the second gave
    used = [(row["rule/delta"], row["rule/delta_b"]) for row in rows(whole, "train")]
    assert used[:2] == [(0.15, 0.02)] * 2
    assert used[2:4] == [tuple(first["thresholds"].values())] * 2
    assert used[4:] == [tuple(second["thresholds"].values())] * 4
    assert rule_of_run(whole) == cppo.CPPO(budget="fixed", **record["thresholds"])
    assert rule_as_run(load_config(whole / "config.yaml").rule, [whole, whole]).startswith(
        f"cppo(delta=auto ({record['thresholds']['delta']:.3g}), delta_b=auto ("
    )
    summary = (whole / "summary.md").read_text()
    assert "thresholds that set themselves" in summary and f"delta={record['thresholds']['delta']:.4g}" in summary


def test_what_was_collected_is_what_the_run_judged(whole: Path) -> None:
    """The stored tokens of batch 1 under the rule of batch 1 give its metrics, update by update."""
    sample = read_sample(whole, [1])
    trained = rows(whole, "train")[:2]
    masked = sum(row["trust/masked_fraction"] for row in trained) / 2
    assert sample.share(FIRST) == pytest.approx(masked, abs=1e-12)
    positions = [json.loads(line) for line in (whole / "positions.jsonl").read_text().splitlines()]
    assert sample.tokens == sum(positions[0]["tokens"])
    # ... and what was chosen is what they give: the first batch a first guess, then all but the first
    record = read_calibration(whole)
    assert record is not None
    for entry, positions_row in zip(record["history"], positions, strict=False):
        found = solve(FIRST, ["delta", "delta_b"], read_sample(whole, [entry["step"]]), 0.05)
        assert found.thresholds == entry["thresholds"] and entry["tokens"] == sum(positions_row["tokens"])
        assert found.share == pytest.approx(entry["share"], rel=1e-5)


def killed(where: str, folder: Path) -> None:
    """Go on with the run in another process, which is killed at that moment."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONPATH": path}
    command = [python(), str(HERE / "killed_run.py"), where, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL, where + done.stdout + done.stderr


@pytest.mark.slow
def test_killed_while_it_calibrates_it_ends_with_the_same_bytes(whole: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_module, "write_plots", lambda folder: None)
    folder = tmp_path / "killed"
    shutil.copytree(whole, folder)
    (folder / "config.yaml").write_text((whole / "config.yaml").read_text().replace(str(whole), str(folder)))
    shutil.rmtree(folder / "checkpoints")  # back to the end of the warm-up
    # after batch 1 was calibrated, before its checkpoint is whole: what it has chosen must not count
    killed("save", folder)
    assert [entry["step"] for entry in (read_calibration(folder) or {})["history"]] == [1]
    assert not list((folder / "checkpoints").glob("step-*"))
    # in the middle of batch 2: what batch 1 has shown is still there
    killed("updates", folder)
    assert [entry["step"] for entry in (read_calibration(folder) or {})["history"]] == [1]
    run_module.train(load_config(folder / "config.yaml"), folder)
    assert rows(folder) == rows(whole)
    for name in ("calibration.json", "calibration/step-000001.safetensors", "calibration/step-000002.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    final = "checkpoints/step-000004/model.safetensors"
    assert (folder / final).read_bytes() == (whole / final).read_bytes()


def test_a_resume_after_the_calibration_takes_what_is_recorded(whole: Path, tmp_path: Path, monkeypatch) -> None:
    """Back to the checkpoint of step 3, with another number in the record: that is the one that is used."""
    monkeypatch.setattr(run_module, "write_plots", lambda folder: None)
    folder = tmp_path / "later"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints/step-000004")
    record = json.loads((folder / "calibration.json").read_text())
    record["thresholds"]["delta"] = record["history"][-1]["thresholds"]["delta"] = 0.123456
    (folder / "calibration.json").write_text(json.dumps(record))
    written = (folder / "calibration.json").read_bytes()
    run_module.train(load_config(folder / "config.yaml"), folder)
    assert [row["rule/delta"] for row in rows(folder, "train") if row["step"] == 4] == [0.123456] * 2
    assert (folder / "calibration.json").read_bytes() == written
    # without the record nobody knows with which thresholds the run came here
    (folder / "calibration.json").unlink()
    shutil.rmtree(folder / "checkpoints/step-000004")
    with pytest.raises(UserError, match=r"calibration\.json is missing"):
        run_module.train(load_config(folder / "config.yaml"), folder)


def test_cut_back_to_a_checkpoint(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    truncate_calibration(folder, 1)
    record = read_calibration(folder)
    assert record is not None and record["thresholds"] is None and len(record["history"]) == 1
    assert [path.name for path in (folder / "calibration").iterdir()] == ["step-000001.safetensors"]
    with pytest.raises(UserError, match="has seen 1 of the 2 batches"):
        rule_of_run(folder)
    truncate_calibration(folder, 0)
    assert read_calibration(folder) is None and not list((folder / "calibration").iterdir())
    (folder / "calibration.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        read_calibration(folder)


def test_batches_that_show_nothing_do_not_count(tmp_path: Path, monkeypatch) -> None:
    """All rewards equal: nothing moves, nothing is chosen, the rule keeps its defaults and the run says so."""
    monkeypatch.setattr(run_module, "write_plots", lambda folder: None)
    folder = tmp_path / "equal"
    train("task.equal=true", "steps=3", "warmup.steps=0", "evaluation.samples=1", f"output_dir={folder}")
    record = read_calibration(folder)
    assert record is not None and record["thresholds"] is None and len(record["history"]) == 3
    assert all(entry["tokens"] == 0 and "does not count" in entry["why"] for entry in record["history"])
    assert {row["rule/delta"] for row in rows(folder, "train")} == {0.15}
    assert "not found yet" in (folder / "summary.md").read_text()


def test_a_target_that_cannot_be_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    settings = ["rule=dppo", "rule.delta=auto", "calibration.target=0.95", "calibration.steps=1", "steps=2"]
    common = [text for text in SETTINGS if not text.startswith(("rule", "calibration", "steps")) or "rollout" in text]
    config = load_config(None, [*common, *settings, "warmup.steps=0", f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"calibration.target=0.95 cannot be reached.*tightest limit holds back"):
        run_module.train(config)


@pytest.mark.slow
def test_two_processes_choose_together(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONPATH": path}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cppo.cli", "train"]
    settings = [*SETTINGS, "calibration.steps=1", "steps=2", "warmup.steps=0", f"output_dir={folder}"]
    done = subprocess.run([python(), *launch, *settings], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_calibration(folder)
    assert record is not None and record["thresholds"] is not None
    # the tokens of both processes: positions.jsonl has those of the main one
    main = [json.loads(line) for line in (folder / "positions.jsonl").read_text().splitlines()]
    sample = read_sample(folder, [1])
    assert sample.tokens > sum(main[0]["tokens"])
    # trust/... are means over the tokens of both, and so is what was collected
    masked = sum(row["trust/masked_fraction"] for row in rows(folder, "train")[:2]) / 2
    assert sample.share(FIRST) == pytest.approx(masked, abs=1e-12)
    # the rule in force judged the tokens of both: the metrics of the last batch carry its thresholds
    assert rows(folder, "train")[-1]["rule/delta"] == record["thresholds"]["delta"]
