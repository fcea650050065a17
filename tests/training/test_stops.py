"""What stops a run in the middle: a full disk, Ctrl-C; and that it goes on from there."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import HERE, LETTERS, TINY, loads_and_generates, rows, train, untimed

from cppo.config.load import load_config
from cppo.files import DiskFullError
from cppo.runs.checkpoints import Checkpoints
from cppo.training import run as run_module


@contextlib.contextmanager
def file_size_limit(folder: Path, size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: like a quota, for the whole process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def filled(folder: Path, size: int) -> Iterator[None]:
    """Fill the disk of `folder` up to `size` bytes."""
    filler = folder / "filler"
    with open(filler, "wb") as file:
        file.write(b"\0" * (shutil.disk_usage(folder).free - size))
    try:
        yield
    finally:
        filler.unlink()


@pytest.fixture(params=["limit", "tmpfs"])
def disk(request, tmp_path) -> Iterator[tuple[Path, Any]]:
    """(a folder, what makes it full)."""
    if request.param == "limit":
        yield tmp_path, file_size_limit
        return
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield folder, filled
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_in_a_save(disk, policy, monkeypatch, invoke, no_plots):
    folder, full = disk
    run, stack = folder / "run", contextlib.ExitStack()
    publish = Checkpoints.publish

    def publish_then_fill(self, written, step):
        target = publish(self, written, step)
        stack.enter_context(full(folder, 30_000))
        return target

    monkeypatch.setattr(Checkpoints, "publish", publish_then_fill)
    with stack:
        done = invoke("train", f"model={policy}", *LETTERS, "steps=2", f"output_dir={run}")
        assert done.exit_code == 1, done.output
        assert isinstance(done.exception, SystemExit) and "Traceback" not in done.output
        assert done.stderr.startswith("Error: Cannot write") and "resume" in done.stderr
        assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000001"]
        loads_and_generates(run / "checkpoints" / "step-000001")
    monkeypatch.setattr(Checkpoints, "publish", publish)
    done = invoke("train", "--resume", run)
    assert done.exit_code == 0, done.output
    assert [row["update"] for row in rows(run, "train")] == [1, 2, 3, 4]
    loads_and_generates(run / "checkpoints" / "step-000002")


def test_disk_full_error_is_one_of_ours():
    assert issubclass(DiskFullError, OSError) and DiskFullError.__module__.startswith("cppo.")


def test_ctrl_c_in_the_warm_up_stops_between_two_rows_of_metrics(monkeypatch, tmp_path, no_plots):
    from transformers import Trainer

    settings = [*LETTERS, *TINY, "warmup.steps=100", "warmup.batch_size=2", "steps=1"]  # a row each second update
    train(*settings, f"output_dir={tmp_path / 'whole'}")
    original, calls = Trainer.training_step, 0

    def training_step(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(run_module.Interrupted, match="cppo train --resume"):
        train(*settings, f"output_dir={tmp_path / 'stopped'}")
    assert rows(tmp_path / "stopped")[-1]["update"] == 14
    run_module.train(load_config(tmp_path / "stopped" / "config.yaml"), resume=tmp_path / "stopped")
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")


def test_stopped_while_the_best_policy_is_saved(monkeypatch, policy, tmp_path):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "save_best", stop)
    with pytest.raises(run_module.Interrupted):
        train(f"model={policy}", *LETTERS, "task.equal=true", "steps=1", f"output_dir={tmp_path / 'run'}")
    monkeypatch.undo()
    done = run_module.train(load_config(tmp_path / "run" / "config.yaml"), resume=tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run", "evaluation")] == [0, 1]
    assert done.best["step"] == 0, "the first of equals"
    loads_and_generates(tmp_path / "run" / "best" / "step-000000")


@pytest.mark.slow
def test_ctrl_c_stops_on_a_step_boundary_and_resume_finishes(policy, tmp_path, invoke):
    run = tmp_path / "a run"
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "cppo.cli", "train", f"model={policy}", *LETTERS, "steps=8", f"output_dir={run}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        limit = time.monotonic() + 120
        while not ((run / "metrics.jsonl").exists() and rows(run, "train")):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert err.strip().splitlines()[-1].endswith(f"cppo train --resume '{run}'") and "Traceback" not in err
    newest = Checkpoints(run / "checkpoints").latest()
    assert newest is not None and newest < 8
    state = json.loads((run / "checkpoints" / f"step-{newest:06d}" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 * newest
    assert not (run / "summary.md").exists()
    done = invoke("train", "--resume", run)
    assert done.exit_code == 0, done.output
    assert [row["update"] for row in rows(run, "train")] == list(range(1, 17))
