"""Checkpoints that are whole or not there, and what of a run folder belongs to which.

transformers' Trainer writes into ``<folder>/.saving``; once it is done, and only then, the result is renamed to
``<folder>/step-000010``. A kill, a full disk or a crash in a save therefore never leaves a checkpoint that looks
usable, and the one before it stays.

The Trainer stores optimizer, scheduler and random states with torch.save; they are read with ``weights_only=True``.
Weights are safetensors.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cppo.files import disk_full_as_sentence, fsync_folder

SAVING = ".saving"


class Checkpoints:
    """The checkpoints below one folder, named by step.

    Parameters
    ----------
    folder : where they lie.
    keep : how many of the newest stay.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    @property
    def saving(self) -> Path:
        """Where an unfinished checkpoint is written; the Trainer's ``output_dir``."""
        return self.folder / SAVING

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        found = []
        for entry in self.folder.glob("step-*"):
            number = entry.name.removeprefix("step-")
            if entry.is_dir() and number.isdigit():
                found.append(int(number))
        return sorted(found)

    def latest(self) -> int | None:
        steps = self.steps()
        return steps[-1] if steps else None

    def clear_unfinished(self) -> None:
        """Remove what an interrupted save left."""
        shutil.rmtree(self.saving, ignore_errors=True)

    def publish(self, written: Path, step: int) -> Path:
        """Make the finished folder `written` the checkpoint of `step`, then drop the oldest beyond `keep`.

        Raises
        ------
        DiskFullError : no room; the checkpoints of before are intact.
        """
        target = self.path(step)
        with disk_full_as_sentence(target):
            for root, _, names in os.walk(written):
                for name in names:
                    with open(os.path.join(root, name), "rb") as file:
                        os.fsync(file.fileno())
                fsync_folder(Path(root))
            if target.exists():  # the same step again after a resume: it holds the same state
                shutil.rmtree(target)
            os.replace(written, target)
            fsync_folder(self.folder)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return target
