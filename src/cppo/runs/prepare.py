"""The run folder: choosing it, refusing another run's, and cutting it back to a state from which a run resumes
exactly.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cppo import files
from cppo.config.load import Config
from cppo.errors import UserError
from cppo.runs.calibration import truncate_calibration
from cppo.runs.checkpoints import Checkpoints
from cppo.runs.folder import RunFolder


def prepare_folder(config: Config, resume: Path | None, model: Mapping[str, str] | None = None) -> Path:
    """Make the folder of a new run, or check the one to resume. model : where it comes from, for versions.json.

    Raises
    ------
    UserError : the folder holds another run, or none although one is to be resumed.
    """
    if resume is not None:
        run = RunFolder(resume)
        if not run.exists:
            raise UserError(f"--resume {resume}: there is no run ({run.config_file} is missing).")
        files.remove_temporaries(resume)
        return resume
    if config.output_dir is None:
        with _as_sentence("the folder runs"):
            folder = _numbered(Path("runs"), f"{config.name}-{config.rule.name}")
    else:
        folder = Path(config.output_dir)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"output_dir={folder} is a file; choose an empty or new folder.")
        if folder.exists() and any(folder.iterdir()):
            what = "another run" if RunFolder(folder).exists else "other files"
            how = f", or go on with it: cppo train --resume {folder}" if what == "another run" else ""
            raise UserError(f"output_dir={folder} holds {what}; choose an empty or new folder{how}.")
        with _as_sentence(f"output_dir={folder}"):
            folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    source = {} if model is None else {"model": dict(model)}
    files.atomic_write_json(run.versions_file, versions() | source)
    files.atomic_write_text(run.config_file, config.to_yaml())
    return folder


def drop_unused(folder: Path) -> None:
    """Remove the folder of a run that failed before anything of worth was in it, so that the corrected command may have
    its name.
    """
    run = RunFolder(folder)
    made = {run.versions_file, run.config_file, run.checkpoints}
    if {*folder.iterdir()} <= made and not Checkpoints(run.checkpoints).steps():
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _as_sentence(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be made: {error.strerror} ({error.filename}). Set output_dir.") from error


def _numbered(parent: Path, name: str) -> Path:
    """The first of name-001, name-002 ... that is free, made at once so that two runs cannot share it."""
    number = 1
    while True:
        folder = parent / f"{name}-{number:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def versions() -> dict[str, Any]:
    """What the figures of a run depend on beside its configuration."""
    found = {}
    for package in (
        "cppo",
        "torch",
        "trl",
        "transformers",
        "accelerate",
        "datasets",
        "peft",
        "reasoning-gym",
        "math-verify",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"python": platform.python_version(), **found, "device": device, "threads": torch.get_num_threads()}


def latest_state(folder: Path, checkpoints: Checkpoints, warmup: Checkpoints) -> list[dict[str, Any]]:
    """Cut what grew (metrics, positions, samples, calibration) back to the newest whole checkpoint; returns the metrics
    that stay.

    Three stages: RL has a checkpoint at step s (rows up to s stay); the warm-up is done (its rows stay, and the
    evaluation before RL); the warm-up has a checkpoint at update u (its rows up to u stay).
    """
    run = RunFolder(folder)
    for unfinished in (checkpoints, warmup):
        unfinished.clear_unfinished()
    step = checkpoints.latest()
    if step is None:
        done = run.warmup_model.exists()
        last = warmup.latest() or 0

        def stays(row: dict[str, Any]) -> bool:
            if row["kind"] == "warmup":
                return done or row["update"] <= last
            return row["kind"] == "evaluation" and row["step"] == 0  # made after the warm-up, if there is one

        files.truncate_after(run.metrics_file, -1, keep=stays)
    else:
        files.truncate_after(run.metrics_file, step)
    run.truncate_records(step or 0)
    truncate_calibration(folder, step or 0)
    rows = run.metrics()
    run.keep_problems({row["step"] for row in rows if row["kind"] == "evaluation"})
    return rows
