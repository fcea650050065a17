"""Trainer callbacks of a run: metrics, checkpoints and evaluation at the end of updates and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cppo.engines.trl import ALL_EQUAL
from cppo.training.callbacks import NonFiniteGuard, split_clock
from cppo.training.processes import any_process
from cppo.training.recorder import RunRecorder, judged
from cppo.training.warmup import logging_steps

if TYPE_CHECKING:
    from cppo.engines.trl import TrustRegionTrainer
    from cppo.training.calibration import Calibration
    from cppo.training.config import Config
    from cppo.training.run import Run


class WarmupCallback(TrainerCallback):
    """Metrics and checkpoints of the warm-up."""

    def __init__(self, run: Run, guard: NonFiniteGuard) -> None:
        self.run, self.guard = run, guard
        self.logging = logging_steps(run.config.warmup.steps)
        self.every = self.logging * max(1, run.config.warmup.steps // (5 * self.logging))
        self.skipped = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.run.progress.advance(1)
        if state.global_step % self.logging:
            return  # between two rows of metrics, each the mean since the one before: no point from which to resume
        if any_process(self.run.stop.requested):
            control.should_save = control.should_training_stop = True
        elif state.global_step % self.every == 0 and state.global_step < state.max_steps:
            control.should_save = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if "loss" in logs:
            self.run.progress.advance(0, loss=logs["loss"])
            row = split_clock(logs)
            if self.guard.skipped > self.skipped:
                row["skipped_nonfinite"] = self.guard.skipped - self.skipped
                self.skipped = self.guard.skipped
            self.run.log(step=0, update=state.global_step, kind="warmup", **row)


class StepCallback(TrainerCallback):
    """What happens at the end of each update and of each step of RL."""

    def __init__(
        self,
        run: Run,
        recorder: RunRecorder,
        guard: NonFiniteGuard,
        tokenizer: PreTrainedTokenizerBase,
        trainer: TrustRegionTrainer,
        calibration: Calibration,
    ) -> None:
        self.run, self.recorder, self.guard, self.tokenizer, self.trainer = run, recorder, guard, tokenizer, trainer
        self.calibration, self.thresholds = calibration, calibration.thresholds
        self.figures: dict[str, Any] = {}
        self.masked: list[float] = []
        self.told_all_equal = False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if "loss" not in logs:  # the closing summary of the Trainer
            return
        row = split_clock(logs)
        if self.guard.last:
            row["skipped_nonfinite"] = 1
        updates = self.run.config.updates
        step = -(-state.global_step // updates)
        if state.global_step % updates == 0:
            row |= self.recorder.figures
        row |= {f"rule/{name}": value for name, value in self.thresholds.items()}
        self.run.log(step=step, update=state.global_step, kind="train", **row)
        if row.get("frac_reward_zero_std") == 1 and not self.told_all_equal:
            self.told_all_equal = True
            self.run.progress.note(f"Warning, step {step}: {ALL_EQUAL}")
        if "reward" in row:
            self.figures["reward"] = row["reward"]
        self.masked += [float(seen["trust/masked_fraction"]) for seen in judged([{**row, "kind": "train"}])]
        if state.global_step % updates == 0:
            skipped = {"skipped": self.guard.skipped} if self.guard.skipped else {}
            figures = {**self.figures, "masked": sum(self.masked) / max(len(self.masked), 1), **skipped}
            self.run.progress.advance(1, **figures)
            self.masked.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        config, run = self.run.config, self.run
        control.should_log = True
        # within a rollout batch there is no point from which to resume
        control.should_save = False
        self.thresholds = self.calibration.thresholds  # as they were in this update; `on_log` comes later
        if state.global_step % config.updates:
            return
        step = state.global_step // config.updates
        final = step == config.steps
        if run.main:
            self.recorder.end_of_step(step, last=final)
        if (rule := self.calibration.end_of_step(step)) is not None:
            self.trainer.set_rule(rule)
        if any_process(run.stop.requested) and not final:
            control.should_save = control.should_training_stop = True
        elif final or step % config.save_every == 0 or due_for_evaluation(config, step):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # After the checkpoint of this step, not before: a long evaluation that is killed costs no training. Its row
        # carries the step, and a resume evaluates again where the row is missing.
        run, step = self.run, state.global_step // self.run.config.updates
        stopping = control.should_training_stop and step < run.config.steps
        if due_for_evaluation(run.config, step) and not stopping:
            run.evaluate(run.policy_of(self.trainer), self.tokenizer, step, self.trainer)
            run.start_rl_phase(step)


def due_for_evaluation(config: Config, step: int) -> bool:
    """Whether a step between the first and the last is evaluated."""
    return bool(config.evaluation.every) and 0 < step < config.steps and step % config.evaluation.every == 0
