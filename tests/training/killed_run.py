"""Run or resume a training run and kill this process (SIGKILL) at a chosen moment: `killed_run.py WHERE FOLDER`.

A helper of test_resume.py. Only the moment is arranged here; what runs is the real thing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from cppo.config.load import load_config
from cppo.engines.trl.trainer import TrustRegionTrainer
from cppo.training import run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(cls: Any, name: str, count: int, action: Callable[[], None] = die, after: bool = False) -> None:
    """Let the `count`-th call of a method be the last thing that this process does."""
    original, calls = getattr(cls, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            action()
        result = original(*args, **kwargs)
        if calls == count and after:
            action()
        return result

    setattr(cls, name, wrapped)


def arrange(where: str) -> None:
    if where == "warmup":  # after its first checkpoint, between two others
        on_call(run.WarmupCallback, "on_step_end", 13)
    elif where == "rollout":
        on_call(TrustRegionTrainer, "_generate_and_score_completions", 2, after=True)
    elif where == "updates":  # the third rollout batch is half used
        on_call(TrustRegionTrainer, "training_step", 3)
    elif where == "save":  # the weights are written, the optimizer is not
        on_call(torch, "save", 1)
    elif where == "evaluation":
        on_call(run.Run, "evaluate", 1)
    elif where == "interrupt":  # Ctrl-C in the middle of a rollout batch
        on_call(Trainer, "training_step", 2, action=lambda: os.kill(os.getpid(), signal.SIGINT))
    else:
        raise SystemExit(f"unknown moment {where!r}")


if __name__ == "__main__":
    where, folder = sys.argv[1], Path(sys.argv[2])
    arrange(where)
    config = load_config(folder / "config.yaml", [])
    try:
        run.train(config, resume=folder)
    except run.Interrupted as stop:
        print(stop)
        raise SystemExit(130) from stop
