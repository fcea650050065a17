"""What a run does around transformers' training loop: metrics, evaluation, whole checkpoints, Ctrl-C, non-finite
updates.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cppo.errors import StopError
from cppo.runs.checkpoints import Checkpoints
from cppo.training.processes import any_process

#: What transformers and TRL report in seconds; kept apart from what a seed determines.
_CLOCK = (
    "step_time",
    "rollout_time",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
)


class StopRequest:
    """First Ctrl-C: stop at the next point from which the run resumes exactly. Second: stop at once.

    A context manager that takes over SIGINT (in the main thread) and SIGTERM's first delivery, and puts both back.
    """

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.requested = False
        self._on_request = on_request
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(RuntimeError):  # the signal may have come in the middle of a print
            self._on_request()


class NonFiniteError(StopError, RuntimeError):
    """Too many updates in a row had a NaN or infinite gradient."""


class NonFiniteGuard(TrainerCallback):
    """Skip an update whose gradient holds NaN or infinity: its gradients are dropped before the optimizer sees them.

    Works with any transformers Trainer, TRL's included, on one or several processes: all of them skip where one sees a
    bad gradient, which under FSDP may lie in the shard of one process alone. DeepSpeed steps inside its own engine and
    has its own overflow handling.

    Parameters
    ----------
    checkpoints : the newest is named when the run stops.
    limit : this many in a row stop it.
    advice : what to try, as the beginning of a sentence.

    Attributes
    ----------
    skipped : updates skipped so far; last : whether the newest one was; in_a_row.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        limit: int = 10,
        advice: str = "Lower optimizer.learning_rate, set rule.ratio_cap, or look at the rewards",
    ) -> None:
        self.checkpoints, self.limit, self.advice = checkpoints, limit, advice
        self.skipped = self.in_a_row = 0
        self.last = False

    def restore(self, skipped: Sequence[float]) -> None:
        """Go on counting after the updates of a resumed run, 1 where one was skipped."""
        self.skipped = int(sum(skipped))
        self.in_a_row = next((n for n, one in enumerate(reversed(skipped)) if not one), len(skipped))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = [p for p in kwargs["model"].parameters() if p.grad is not None]
        gradients = [g.to_local() if hasattr(g, "to_local") else g for p in parameters if (g := p.grad) is not None]
        norms = torch._foreach_norm([g for g in gradients if g.numel()], float("inf")) if gradients else ()
        finite = not norms or bool(torch.stack([norm.float() for norm in norms]).isfinite().all())
        self.last = any_process(not finite)
        if not self.last:
            self.in_a_row = 0
            return
        for p in parameters:
            p.grad = None  # optimizers leave parameters without gradient alone, their moments included
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            good = self.checkpoints.latest()
            where = "There is no checkpoint yet"
            if good is not None:
                where = f"The last good checkpoint is {self.checkpoints.path(good)}"
            raise NonFiniteError(
                f"{self.in_a_row} updates in a row had a NaN or infinite gradient (the last: update "
                f"{state.global_step + 1}); each was skipped, and the run stops. {where}; the weights are as they "
                f"were before these updates. {self.advice}."
            )


class SaveOnBoundary(TrainerCallback):
    """Turn what the Trainer saved into a whole checkpoint (see `Checkpoints`), named by step.

    `step_of` maps the Trainer's update counter to the step in the checkpoint's name.
    """

    def __init__(self, checkpoints: Checkpoints, step_of: Callable[[int], int] = lambda update: update) -> None:
        self.checkpoints, self.step_of = checkpoints, step_of

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():  # every process has written its random state
            torch.distributed.barrier()
        if state.is_world_process_zero:
            written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.checkpoints.publish(written, self.step_of(state.global_step))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()


def split_clock(logs: dict[str, Any]) -> dict[str, Any]:
    """Log entries with wall-clock figures under ``time/``, so that the rest is a function of the seed."""
    row: dict[str, Any] = {}
    for name, value in logs.items():
        if name in _CLOCK:
            row[f"time/{name}"] = value
        elif isinstance(value, int | float):
            row[name] = value
    return row
