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
import shlex
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
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

from cppo import files
from cppo.config.load import Config
from cppo.config.precision import choose
from cppo.config.trl_kwargs import trl_config_kwargs
from cppo.engines.trl.trainer import ALL_EQUAL, TrustRegionTrainer, trust_region_config
from cppo.errors import UserError
from cppo.runs.checkpoints import Checkpoints
from cppo.runs.folder import RunFolder
from cppo.runs.plots import write_plots
from cppo.runs.prepare import drop_unused, latest_state, prepare_folder
from cppo.runs.records import acted, before_and_after, best_evaluation, judged
from cppo.runs.samples import render_sample
from cppo.runs.summary import split_seconds, write_summary
from cppo.show.progress import RunProgress, accuracy_table
from cppo.tasks import Task, make_task
from cppo.tasks.chance import check_chance
from cppo.training.arguments import observers, peft_config, reward_function, sampler_of
from cppo.training.calibration import Calibration
from cppo.training.callbacks import NonFiniteGuard, SaveOnBoundary, StopRequest, split_clock
from cppo.training.evaluate import evaluate, held_out
from cppo.training.memory import check_memory
from cppo.training.models import build_policy, load_checkpoint, load_tokenizer, plain_sampling, save_best
from cppo.training.processes import any_process, from_main, is_sharded, start_processes, whole_weights
from cppo.training.prompts import PromptFormat
from cppo.training.recorder import RunRecorder
from cppo.training.saving import SavePolicy, check_space, state_bytes
from cppo.training.sources import find_source
from cppo.training.trackers import check_trackers, tensorboard_in
from cppo.training.warmup import logging_steps, warmup_trainer


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
        self.files = RunFolder(folder)
        self.main = PartialState().is_main_process
        self.benchmarks = held_out(task, config)
        self.warmup_checkpoints = Checkpoints(self.files.warmup, keep=1)
        self.checkpoints = Checkpoints(self.files.checkpoints, keep=config.keep_checkpoints)

    # -- files ---------------------------------------------------------------------------------------------------

    def log(self, **row: Any) -> None:
        if self.main:
            self.files.append_metrics(row)

    def interrupted(self) -> Interrupted:
        return Interrupted(_how_to_resume(self.folder))

    # -- stages --------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        step: int,
        trainer: TrustRegionTrainer | None = None,
    ) -> None:
        """Evaluate (all processes share the problems), log the row, and keep the policy if it is the best so far.

        `trainer` is needed where it has sharded the model: weights are then gathered through it.
        """
        total = sum(map(len, self.benchmarks.values())) * self.config.evaluation.samples
        name = "evaluation" if step in (0, self.config.steps) else f"evaluation at step {step}"
        self.progress.start_phase(name, total)
        began, done = time.monotonic(), 0

        def on_batch(count: int) -> None:
            nonlocal done
            if self.stop.requested and PartialState().num_processes == 1:
                raise self.interrupted()
            count = min(count, total)  # processes round their shares up
            self.progress.advance(count - done)
            done = count

        together = trainer is not None and is_sharded(trainer.accelerator)
        figures, scores = evaluate(model, tokenizer, self.task, self.benchmarks, self.config, on_batch, together)
        seconds = {"time/evaluation": time.monotonic() - began}
        row: dict[str, Any] = {"step": step, "update": step * self.config.updates, "kind": "evaluation", **figures}
        self.progress.note(f"step {step}: Avg@{self.config.evaluation.samples} {row['avg/mean']:.3f}")
        best = best_evaluation([*self.files.metrics(), row]) if self.main else None
        if from_main(best is not None and best["step"] == step):
            weights = None if trainer is None else whole_weights(trainer.accelerator, trainer.model_wrapped)
            if self.main:
                save_best(self.folder, model, tokenizer, step, weights)
        if self.main:
            self.files.append_problems(step, self.config.evaluation.samples, scores)
        # Last: a run that is killed before this line evaluates again, so the best policy is never missing.
        self.log(**row, **seconds)
        PartialState().wait_for_everyone()

    def warm_up(self) -> Path:
        """Train on demonstrations; returns the folder of the resulting model. Goes on where a killed warm-up
        stopped.
        """
        result = self.files.warmup_model
        if from_main(result.exists()):
            return result
        model, tokenizer = build_policy(self.config, getattr(self.task, "alphabet", None))
        if self.config.warmup.steps:
            guard = NonFiniteGuard(self.warmup_checkpoints, advice="Lower warmup.learning_rate")
            callbacks = [guard, SaveOnBoundary(self.warmup_checkpoints), WarmupCallback(self, guard)]
            trainer = warmup_trainer(
                model, tokenizer, self.task, self.config, self.warmup_checkpoints.saving, callbacks
            )
            done = self.warmup_checkpoints.latest()
            self.progress.start_phase("warm-up", self.config.warmup.steps, done=done or 0)
            began = time.monotonic()
            with files.disk_full_as_sentence(self.warmup_checkpoints.folder):
                trainer.train(resume_from_checkpoint=None if done is None else str(self.warmup_checkpoints.path(done)))
            if any_process(self.stop.requested):
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
        if self.config.model == "tiny" or self.config.warmup.steps:
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
        # Exactly as many rows as are used: in a second pass over fewer ones, a resumed run would see another order.
        rows = [i % len(examples) for i in range(config.steps * config.rollout.prompts)]
        kwargs = trl_config_kwargs(config, str(self.checkpoints.saving), PartialState().num_processes)
        kwargs.setdefault("run_name", self.folder.name)  # in trackers
        prompts = PromptFormat(tokenizer, config.prompt)
        if config.prompt.template:
            kwargs["chat_template_kwargs"] = dict(config.prompt.template)
        if config.model != "tiny":
            precision = choose(config, gpu=PartialState().device.type == "cuda")
            self.progress.note(f"Precision of forward and backward: {precision}")
        if config.model != "tiny" and examples:
            self.progress.note(f"The first prompt as the model reads it:\n{prompts.text(examples[0].prompt)}")
        calibration = Calibration(config, self.folder, self.checkpoints.latest() or 0, self.progress.note)
        rule = calibration.rule
        samples = config.samples
        recorder = RunRecorder(self.folder, tokenizer, samples.every, samples.count, config.updates, rule.divergence)
        guard = NonFiniteGuard(self.checkpoints)
        guard.restore([row.get("skipped_nonfinite", 0) for row in self.files.metrics("train")])
        trainer = TrustRegionTrainer(
            model=model,
            reward_funcs=reward_function(self.task, examples),
            args=trust_region_config(**kwargs),
            train_dataset=Dataset.from_list([{"prompt": prompts.of(examples[i].prompt), "index": i} for i in rows]),
            processing_class=tokenizer,
            rule=rule,
            top_k=config.top_k,
            topk_variant=config.topk_variant,
            topk_anchor=config.topk_anchor,
            topk_store=config.topk_store,
            max_on_policy_divergence=config.max_on_policy_divergence,
            sampler=sampler_of(config, PartialState()),
            zero_spread_filter=config.advantages.zero_spread_filter,
            observer=observers(*([recorder] if self.main else []), *([] if calibration.done else [calibration])),
            peft_config=peft_config(config),
            callbacks=[guard],
        )
        trainer.add_callback(SaveOnBoundary(self.checkpoints, lambda update: update // config.updates))
        trainer.add_callback(StepCallback(self, recorder, guard, tokenizer, trainer, calibration))
        for quiet in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(quiet)
        return trainer

    def start_rl_phase(self, done: int) -> None:
        name = f"{self.config.rule.name}: rollout + {self.config.updates} updates"
        self.progress.start_phase(name, self.config.steps, done)

    @staticmethod
    def policy_of(trainer: TrustRegionTrainer) -> PreTrainedModel:
        """The model to generate with: as it is where sharded, else without what wraps it."""
        accelerator = trainer.accelerator
        return trainer.model_wrapped if is_sharded(accelerator) else accelerator.unwrap_model(trainer.model)

    def reinforce(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """RL from the newest checkpoint to the last step, and the evaluation after it."""
        with tensorboard_in(self.files.tensorboard):
            trainer = self.trainer(model, tokenizer)
        done = self.checkpoints.latest()
        self.start_rl_phase(done or 0)
        with files.disk_full_as_sentence(self.checkpoints.folder):
            trainer.train(resume_from_checkpoint=None if done is None else str(self.checkpoints.path(done)))
        if (self.checkpoints.latest() or 0) < self.config.steps:
            raise self.interrupted()
        self.evaluate(self.policy_of(trainer), tokenizer, self.config.steps, trainer)


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
    warnings.filterwarnings("ignore", message="all responses to each prompt")  # StepCallback says it
    process = start_processes()
    console = console or Console(quiet=not process.is_main_process)
    check_trackers(config.report_to)
    task = make_task(config.task.name, **config.task.options)
    # before a folder is made: a wrong task leaves nothing behind
    benchmarks = held_out(task, config).values()
    chances = [] if resume is not None else [check_chance(task, problems) for problems in benchmarks]
    source = None if config.model == "tiny" or resume is not None else find_source(config.model)
    if source is not None and process.num_processes == 1 and process.device.type == "cpu":
        check_memory(source, config)
    told = None if source is None else source.described()
    folder = from_main(prepare_folder(config, resume, told) if process.is_main_process else Path())
    progress = RunProgress(console, results=folder)
    stop = StopRequest(
        lambda: progress.note("Stopping at the end of this rollout batch, with a checkpoint (Ctrl-C again: at once).")
    )
    with progress, stop, _interruptible(folder), _undone(folder, new=resume is None and process.is_main_process):
        progress.note(f"Results go to {folder}")
        for said in filter(None, chances):
            progress.note(said)
        run = Run(config, task, folder, progress, stop)
        rows = latest_state(run.folder, run.checkpoints, run.warmup_checkpoints) if process.is_main_process else []
        evaluated = from_main({row["step"] for row in rows if row["kind"] == "evaluation"})
        model, tokenizer = run.policy()
        if dropped := plain_sampling(model):
            progress.note(
                f"The model's generation_config has {', '.join(dropped)}: left out, also of what is saved, since "
                "rollouts come from the full softmax and evaluation has settings of its own."
            )
        if run.main and config.peft is None:  # an adapter's checkpoints are small
            check_space(folder, *state_bytes(model), config.keep_checkpoints)
        resumed = run.checkpoints.latest()
        if resumed is None and 0 not in evaluated:
            run.evaluate(_placed(model), tokenizer, 0)
        elif resumed and resumed not in evaluated and (due_for_evaluation(config, resumed) or resumed == config.steps):
            # the run was killed between this checkpoint and its evaluation
            run.evaluate(_placed(load_checkpoint(run.checkpoints.path(resumed))), tokenizer, resumed)
        if (resumed or 0) < config.steps:
            run.reinforce(model, tokenizer)
        return finish(run, console)


def _how_to_resume(folder: Path) -> str:
    return f"Stopped. To go on from the newest checkpoint: cppo train --resume {shlex.quote(str(folder))}"


@contextlib.contextmanager
def _interruptible(folder: Path) -> Iterator[None]:
    """A second Ctrl-C stops at once; also then the user is told how to go on."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(_how_to_resume(folder)) from None


@contextlib.contextmanager
def _undone(folder: Path, new: bool) -> Iterator[None]:
    """A new run that fails on what the user gave leaves no empty folder, which would refuse the corrected command."""
    try:
        yield
    except UserError:
        if new:
            drop_unused(folder)
        raise


def _placed(model: PreTrainedModel) -> PreTrainedModel:
    return model.to(PartialState().device)


def finish(run: Run, console: Console) -> RunResult:
    """Plots, summary and the closing tables, from the files of the run."""
    if not run.main:
        return RunResult(run.folder, {}, {}, {})
    rows = run.files.metrics("evaluation")
    run.progress.pause()
    for checkpoints in (run.checkpoints, run.warmup_checkpoints):
        checkpoints.clear_unfinished()
    write_plots(run.folder)
    write_summary(run.folder)
    before, after = (dict(row or {}) for row in before_and_after(rows))
    best = dict(best_evaluation(rows) or {})
    render_sample(run.folder, console)
    if (found := acted(run.files.metrics("train"), run.config.rule.name)) is not None:
        console.print(found.sentence(), style="bold" if found.warns else None, highlight=False, soft_wrap=True)
    console.print(accuracy_table(before, after))
    console.print(
        f"Best validation score: Avg@{run.config.evaluation.samples} {best['avg/mean']:.3f} at step {best['step']} "
        f"({run.files.best})",
        highlight=False,
        soft_wrap=True,
    )
    return RunResult(run.folder, before, after, best)


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
        self.saving = SavePolicy(run.config.save_every, state_bytes(trainer.model)[1])
        self.figures: dict[str, Any] = {}
        self.masked: list[float] = []
        self.seconds: list[float] = []  # of each update; the first holds the rollout, too
        self.tokens = 0.0
        self.rollout: float | None = None
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
        if "completions/mean_length" in row:
            batch = self.run.config.rollout
            self.tokens = float(row["completions/mean_length"]) * batch.prompts * batch.responses
        self.seconds.append(float(row.get("time/step_time", 0.0)))
        self.rollout = row.get("time/rollout_time", self.rollout)
        self.masked += [float(seen["trust/masked_fraction"]) for seen in judged([{**row, "kind": "train"}])]
        if state.global_step % updates == 0:
            skipped = {"skipped": self.guard.skipped} if self.guard.skipped else {}
            figures = {**self.figures, "masked": sum(self.masked) / max(len(self.masked), 1), **skipped}
            self.run.progress.advance(1, **figures, **split_seconds(self.seconds, self.rollout), **self.speed())
            self.masked.clear()
            self.seconds.clear()

    def speed(self) -> dict[str, str]:
        """Tokens of responses a second, over rollout and updates."""
        spent = sum(self.seconds)
        return {"tokens/s": f"{self.tokens / spent:.3g}"} if self.tokens and spent else {}

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
        elif final or due_for_evaluation(config, step) or from_main(self.saving.due(step)):
            control.should_save = True
        if control.should_save:
            self.saving.starts()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # After the checkpoint of this step, not before: a long evaluation that is killed costs no training. Its row
        # carries the step, and a resume evaluates again where the row is missing.
        self.saving.ends()
        run, step = self.run, state.global_step // self.run.config.updates
        stopping = control.should_training_stop and step < run.config.steps
        if due_for_evaluation(run.config, step) and not stopping:
            run.evaluate(run.policy_of(self.trainer), self.tokenizer, step, self.trainer)
            run.start_rl_phase(step)


def due_for_evaluation(config: Config, step: int) -> bool:
    """Whether a step between the first and the last is evaluated."""
    return bool(config.evaluation.every) and 0 < step < config.steps and step % config.evaluation.every == 0
