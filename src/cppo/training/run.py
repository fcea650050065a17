"""`train`: warm-up, evaluation, reinforcement learning under a trust region, evaluation; resumable at any moment.

* One *step* is one rollout batch, used for ``updates`` optimizer updates. Checkpoints lie on step boundaries only:
  within a rollout batch the responses and their rollout log-probabilities would have to be stored, too.
* What a run writes is a function of its configuration (wall-clock figures apart, under ``time/``). Killed at any moment
  and resumed, it ends with the same files; on a CPU bit for bit. To that end a resume cuts the growing files back to
  the newest whole checkpoint, and random states are part of the checkpoint.
* The engine is TRL (`cppo.engines.trl`); everything here is configuration, callbacks and files around it.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from cppo.engines.trl import TrustRegionTrainer, trust_region_config
from cppo.errors import UserError
from cppo.tasks import Example, Task, make_task
from cppo.training import files
from cppo.training.callbacks import NonFiniteGuard, SaveOnBoundary, StopRequest, split_clock
from cppo.training.checkpoints import Checkpoints
from cppo.training.config import Config
from cppo.training.evaluate import evaluate, held_out, score_all
from cppo.training.folder import latest_state, prepare_folder, save_best
from cppo.training.models import build_policy, load_tokenizer
from cppo.training.plots import before_and_after, write_plots
from cppo.training.progress import RunProgress, accuracy_table
from cppo.training.recorder import RunRecorder, append_metrics, read_metrics
from cppo.training.samples import render_sample
from cppo.training.summary import write_summary
from cppo.training.trl_kwargs import trl_config_kwargs
from cppo.training.warmup import warmup_trainer


class Interrupted(KeyboardInterrupt):
    """The run was stopped on request; `str()` says how to go on."""


@dataclass(frozen=True)
class RunResult:
    """Where a run lies and how accurate the policy was before and after (rows of metrics.jsonl)."""

    folder: Path
    before: dict[str, Any]
    after: dict[str, Any]
    best: dict[str, Any]


class Run:
    """The parts of one run that its stages share."""

    def __init__(self, config: Config, task: Task, folder: Path, progress: RunProgress, stop: StopRequest) -> None:
        self.config, self.task, self.folder, self.progress, self.stop = config, task, folder, progress, stop
        self.main = PartialState().is_main_process
        self.benchmarks = held_out(task, config)
        self.warmup_checkpoints = Checkpoints(folder / "warmup", keep=1)
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints)

    # -- files ---------------------------------------------------------------------------------------------------

    def log(self, **row: Any) -> None:
        if self.main:
            append_metrics(self.folder, row)

    def interrupted(self) -> Interrupted:
        return Interrupted(_how_to_resume(self.folder))

    # -- stages --------------------------------------------------------------------------------------------------

    def evaluate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, step: int) -> dict[str, Any]:
        """Evaluate on the main process; the others wait. The row is logged and the best policy so far is kept."""
        row: dict[str, Any] = {}
        if self.main:
            total = sum(map(len, self.benchmarks.values())) * self.config.evaluation.samples
            name = "evaluation" if step in (0, self.config.steps) else f"evaluation at step {step}"
            self.progress.start_phase(name, total)
            began, done = time.monotonic(), 0

            def on_batch(count: int) -> None:
                nonlocal done
                if self.stop.requested:
                    raise self.interrupted()
                self.progress.advance(count - done)
                done = count

            row = evaluate(model, tokenizer, self.task, self.benchmarks, self.config, on_batch)
            row = {"step": step, "update": step * self.config.updates, "kind": "evaluation", **row}
            self.log(**row, **{"time/evaluation": time.monotonic() - began})
            self.progress.note(f"step {step}: Avg@{self.config.evaluation.samples} {row['avg/mean']:.3f}")
            best = max((r for r in read_metrics(self.folder) if r["kind"] == "evaluation"), key=_score)
            if best["step"] == step:
                save_best(self.folder, model, tokenizer, step)
        PartialState().wait_for_everyone()
        return row

    def warm_up(self) -> Path:
        """Train on demonstrations; returns the folder of the resulting model. Goes on where a killed warm-up
        stopped.
        """
        result = self.folder / "warmup" / "model"
        if result.exists():
            return result
        model, tokenizer = build_policy(self.config, getattr(self.task, "alphabet", None))
        if self.config.warmup.steps:
            callbacks = [SaveOnBoundary(self.warmup_checkpoints), WarmupCallback(self)]
            trainer = warmup_trainer(
                model, tokenizer, self.task, self.config, self.warmup_checkpoints.saving, callbacks
            )
            done = self.warmup_checkpoints.latest()
            self.progress.start_phase("warm-up", self.config.warmup.steps, done=done or 0)
            began = time.monotonic()
            with files.disk_full_as_sentence(self.warmup_checkpoints.folder):
                trainer.train(resume_from_checkpoint=None if done is None else str(self.warmup_checkpoints.path(done)))
            if self.stop.requested:
                raise self.interrupted()
            seconds = {"time/warmup": time.monotonic() - began}
            self.log(step=0, update=self.config.warmup.steps, kind="warmup", **seconds)
            model = trainer.accelerator.unwrap_model(trainer.model)
        if self.main:
            with files.atomic_folder(result) as temporary:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
        PartialState().wait_for_everyone()
        return result

    def policy(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model that RL starts from, always read from its files, so that a resumed run starts from the same
        bits.
        """
        if self.config.model == "tiny":
            folder = self.warm_up()
            tokenizer = load_tokenizer(str(folder))
            return AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), tokenizer
        return build_policy(self.config, None)

    def trainer(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TrustRegionTrainer:
        """TRL's GRPO trainer with the rule of the configuration."""
        config = self.config
        examples = self.task.train(config.steps * config.rollout.prompts, seed=config.seed)
        for note in getattr(self.task, "notes", ()):
            self.progress.note(note)
        if len(examples) < config.rollout.prompts:
            raise UserError(
                f"task {self.task.name!r} has {len(examples)} training problems, fewer than rollout.prompts="
                f"{config.rollout.prompts}: lower rollout.prompts or give it more data."
            )
        kwargs = trl_config_kwargs(config, str(self.checkpoints.saving), PartialState().num_processes)
        recorder = RunRecorder(self.folder, tokenizer, config.samples.every, config.samples.count, config.updates)
        guard = NonFiniteGuard(last_good=self.last_good)
        trainer = TrustRegionTrainer(
            model=model,
            reward_funcs=reward_function(self.task, examples),
            args=trust_region_config(**kwargs),
            train_dataset=Dataset.from_list([{"prompt": e.prompt, "index": i} for i, e in enumerate(examples)]),
            processing_class=tokenizer,
            rule=config.make_rule(),
            top_k=config.top_k,
            topk_variant=config.topk_variant,
            topk_anchor=config.topk_anchor,
            zero_spread_filter=config.advantages.zero_spread_filter,
            observer=recorder if self.main else None,
            peft_config=peft_config(config),
            callbacks=[guard],
        )
        trainer.add_callback(SaveOnBoundary(self.checkpoints, lambda update: update // config.updates))
        trainer.add_callback(StepCallback(self, recorder, guard, tokenizer, trainer))
        for quiet in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(quiet)
        return trainer

    def last_good(self) -> Path | None:
        step = self.checkpoints.latest()
        return None if step is None else self.checkpoints.path(step)

    def reinforce(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """RL from the newest checkpoint to the last step; returns the policy."""
        trainer = self.trainer(model, tokenizer)
        done = self.checkpoints.latest()
        self.progress.start_phase(
            f"{self.config.rule.name}: rollout + {self.config.updates} updates", self.config.steps, done or 0
        )
        with files.disk_full_as_sentence(self.checkpoints.folder):
            trainer.train(resume_from_checkpoint=None if done is None else str(self.checkpoints.path(done)))
        if self.stop.requested and (self.checkpoints.latest() or 0) < self.config.steps:
            raise self.interrupted()
        return trainer.accelerator.unwrap_model(trainer.model)


class WarmupCallback(TrainerCallback):
    """Metrics and checkpoints of the warm-up."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.every = max(1, run.config.warmup.steps // 5)
        self.shown = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.run.progress.advance(1)
        if self.run.stop.requested:
            control.should_save = control.should_training_stop = True
        elif state.global_step % self.every == 0 and state.global_step < state.max_steps:
            control.should_save = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if "loss" in logs:
            self.run.progress.advance(0, loss=logs["loss"])
            self.run.log(step=0, update=state.global_step, kind="warmup", **split_clock(logs))


class StepCallback(TrainerCallback):
    """What happens at the end of each update and of each step of RL."""

    def __init__(
        self,
        run: Run,
        recorder: RunRecorder,
        guard: NonFiniteGuard,
        tokenizer: PreTrainedTokenizerBase,
        trainer: TrustRegionTrainer,
    ) -> None:
        self.run, self.recorder, self.guard, self.tokenizer, self.trainer = run, recorder, guard, tokenizer, trainer
        self.figures: dict[str, Any] = {}
        self.masked: list[float] = []
        self.began = time.monotonic()

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
        self.run.log(step=step, update=state.global_step, kind="train", **row)
        if "reward" in row:
            self.figures["reward"] = row["reward"]
        self.masked.append(float(row.get("trust/masked_fraction", 0.0)))
        if state.global_step % updates == 0:
            skipped = {"skipped": self.guard.skipped} if self.guard.skipped else {}
            figures = {**self.figures, "masked": sum(self.masked) / len(self.masked), **skipped}
            self.run.progress.advance(1, **figures)
            self.masked.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        config, run = self.run.config, self.run
        control.should_log = True
        if state.global_step % config.updates:
            return  # within a rollout batch: no point from which to resume
        step = state.global_step // config.updates
        final = step == config.steps
        if run.main:
            self.recorder.end_of_step(step, last=final)
        if run.stop.requested and not final:
            control.should_save = control.should_training_stop = True
        elif final or step % config.save_every == 0 or due_for_evaluation(config, step):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # After the checkpoint of this step, not before: a long evaluation that is killed costs no training. Its row
        # carries the step, and a resume evaluates again where the row is missing.
        run, step = self.run, state.global_step // self.run.config.updates
        if due_for_evaluation(run.config, step) and not control.should_training_stop:
            run.evaluate(self.trainer.accelerator.unwrap_model(self.trainer.model), self.tokenizer, step)
            run.progress.start_phase(
                f"{run.config.rule.name}: rollout + {run.config.updates} updates", run.config.steps, step
            )


def due_for_evaluation(config: Config, step: int) -> bool:
    """Whether a step between the first and the last is evaluated."""
    return bool(config.evaluation.every) and 0 < step < config.steps and step % config.evaluation.every == 0


def reward_function(task: Task, examples: Sequence[Example]) -> Any:
    """The task's score as a TRL reward function; ``index`` is the dataset's column."""

    def reward(completions: list[Any], index: list[int], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return score_all(task, [(examples[i], text) for i, text in zip(index, texts, strict=True)])

    return reward


def peft_config(config: Config) -> Any:
    """LoRA settings of the recipe, or None."""
    if config.peft is None:
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **config.peft.model_dump(exclude_none=True))


def _score(row: dict[str, Any]) -> tuple[float, int]:
    # the earliest of equally good ones
    return row["avg/mean"], -row["step"]


def train(config: Config, resume: Path | None = None, console: Console | None = None) -> RunResult:
    """Run `config` from the beginning, or go on with the run in the folder `resume`.

    Raises
    ------
    UserError : something in the configuration or on the disk that the user can change.
    Interrupted : stopped by Ctrl-C, after a checkpoint; says how to resume.
    NonFiniteError : ten updates in a row had a NaN or infinite gradient.
    files.DiskFullError : no room; the checkpoints of before are intact.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    disable_progress_bar()  # transformers' own, for each file it reads or writes
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl")
    process = PartialState()
    console = console or Console(quiet=not process.is_main_process)
    task = make_task(config.task.name, **config.task.options)
    held_out(task, config)  # before a folder is made: a wrong task leaves nothing behind
    names = [str(prepare_folder(config, resume)) if process.is_main_process else ""]
    folder = Path(broadcast_object_list(names)[0] if process.num_processes > 1 else names[0])
    progress = RunProgress(console, results=folder)
    stop = StopRequest(
        lambda: progress.note("Stopping at the end of this rollout batch, with a checkpoint (Ctrl-C again: at once).")
    )
    with progress, stop, _interruptible(folder):
        progress.note(f"Results go to {folder}")
        run = Run(config, task, folder, progress, stop)
        rows = latest_state(run.folder, run.checkpoints, run.warmup_checkpoints) if process.is_main_process else []
        process.wait_for_everyone()
        model, tokenizer = run.policy()
        evaluated = {row["step"] for row in rows if row["kind"] == "evaluation"}
        resumed = run.checkpoints.latest()
        if process.is_main_process and resumed is None and 0 not in evaluated:
            run.evaluate(_placed(model), tokenizer, 0)
        elif process.is_main_process and resumed and due_for_evaluation(config, resumed) and resumed not in evaluated:
            # the run was killed between this checkpoint and its evaluation
            checkpoint = AutoModelForCausalLM.from_pretrained(run.checkpoints.path(resumed), dtype=model.dtype)
            run.evaluate(_placed(checkpoint), tokenizer, resumed)
        process.wait_for_everyone()
        if (resumed or 0) < config.steps:
            model = run.reinforce(model, tokenizer)
        else:
            model = AutoModelForCausalLM.from_pretrained(run.checkpoints.path(config.steps), dtype=model.dtype)
        if config.steps not in evaluated:
            run.evaluate(_placed(model), tokenizer, config.steps)
        return finish(run, console)


def _how_to_resume(folder: Path) -> str:
    return f"Stopped. To go on from the newest checkpoint: cppo train --resume {folder}"


@contextlib.contextmanager
def _interruptible(folder: Path) -> Iterator[None]:
    """A second Ctrl-C stops at once; also then the user is told how to go on."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(_how_to_resume(folder)) from None


def _placed(model: PreTrainedModel) -> PreTrainedModel:
    return model.to(PartialState().device)


def finish(run: Run, console: Console) -> RunResult:
    """Plots, summary and the closing tables, from the files of the run."""
    rows = [row for row in read_metrics(run.folder) if row["kind"] == "evaluation"] if run.main else []
    if not run.main:
        return RunResult(run.folder, {}, {}, {})
    run.progress.pause()
    write_plots(run.folder)
    write_summary(run.folder)
    before, after = (dict(row or {}) for row in before_and_after(rows))
    best = max(rows, key=_score)
    render_sample(run.folder, console)
    console.print(accuracy_table(before, after))
    console.print(
        f"Best validation score: Avg@{run.config.evaluation.samples} {best['avg/mean']:.3f} at step {best['step']} "
        f"({run.folder / 'best'})",
        highlight=False,
        soft_wrap=True,
    )
    return RunResult(run.folder, before, after, best)
