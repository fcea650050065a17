"""When a run saves, and whether there is room for it.

With `save_every: auto` at most `SHARE` of the time goes into checkpoints, whatever their size: a checkpoint of a model
of 0.5M parameters takes a tenth of a second, one of 135M with Adam's moments (1.6 GB) as long as an update.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from cppo.errors import UserError

#: Of the time of a run, at most this share is spent on saving.
SHARE = 0.05
#: Bytes per second that a first save is guessed to write: a slow disk.
GUESS = 200e6


class SavePolicy:
    """Says after which steps a checkpoint is written.

    every : steps between two, or "auto". size : bytes of one, for the guess before the first. clock : seconds.
    """

    def __init__(self, every: int | Literal["auto"], size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self.clock = every, clock
        self.began = clock()
        self.spent, self.next = 0.0, size / GUESS
        self._saving_since: float | None = None

    def due(self, step: int) -> bool:
        """Whether to save after `step` (1-based): with "auto", if the time for it then still is within `SHARE`."""
        if self.every != "auto":
            return step % self.every == 0
        return self.spent + self.next <= SHARE * (self.clock() - self.began)

    def starts(self) -> None:
        """A save begins."""
        self._saving_since = self.clock()

    def ends(self) -> None:
        """It is done: the next one is expected to take as long."""
        if self._saving_since is not None:
            self.next = self.clock() - self._saving_since
            self.spent += self.next
            self._saving_since = None


def state_bytes(model: Any) -> tuple[int, int]:
    """(bytes of the weights, bytes of a checkpoint): a checkpoint has the weights and, of what is trained, Adam's two
    moments in float32.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights, weights + sum(8 * p.numel() for p in model.parameters() if p.requires_grad)


def check_space(folder: Path, weights: int, checkpoint: int, keep: int) -> None:
    """Refuse a run that will fill the disk.

    Needed at once: `keep` checkpoints, one more while it is written, and the best policy twice while it is replaced.

    Raises
    ------
    UserError : less is free; says how much.
    """
    need, free = (keep + 1) * checkpoint + 2 * weights, shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, and the run needs about {need / 1e9:.1f} GB: "
            f"{keep + 1} checkpoints of {checkpoint / 1e9:.1f} GB (keep_checkpoints={keep}, and one that is being "
            f"written), and the best policy twice ({weights / 1e9:.1f} GB each) while it is replaced. Free some space, "
            "lower keep_checkpoints, or set output_dir to another disk."
        )
