"""The supervised warm-up of a model made from scratch: demonstrations of the task, up to a middling accuracy.

RL needs a policy that is right sometimes. The demonstrations come from the task and may be imperfect on purpose (a
fixed share of facts that the teacher does not know), which pins the accuracy after the warm-up well below 1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cppo.config.load import Config
from cppo.errors import UserError
from cppo.tasks import Example, Task
from cppo.training.prompts import PromptFormat


class Demonstrations(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Token ids and labels of the i-th demonstration, a pure function of (seed, i); the prompt carries no loss."""

    def __init__(self, task: Task, examples: Sequence[Example], prompts: PromptFormat, seed: int) -> None:
        self.task, self.examples, self.prompts, self.seed = task, examples, prompts, seed
        demonstrate = getattr(task, "demonstration", None)
        if demonstrate is None or demonstrate(examples[0], random.Random(0)) is None:
            raise UserError(
                f"task {task.name!r} has no demonstrations, so there is nothing to warm up on: "
                "set warmup.steps=0 and model=<a trained model>."
            )
        self.demonstrate = demonstrate

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        text = self.demonstrate(example, random.Random(f"{self.seed}:{index}"))
        prompt, tokenizer = self.prompts.ids(example.prompt), self.prompts.tokenizer
        response = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}


def logging_steps(steps: int) -> int:
    """Updates between two rows of metrics. Checkpoints lie on multiples, since a row holds the mean loss in between."""
    return max(1, steps // 50)


def collate(pad: int) -> Any:
    """Rows padded on the right."""

    def join(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])

        attention = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
        return {"input_ids": padded("input_ids", pad), "labels": padded("labels", -100), "attention_mask": attention}

    return join


def warmup_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: Config,
    output_dir: Path,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """transformers' Trainer over the demonstrations: AdamW, cosine decay, bfloat16 only where training uses it."""
    settings = config.warmup
    examples = task.train(settings.steps * settings.batch_size, seed=config.seed + 1)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=-(-settings.batch_size // PartialState().num_processes),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, settings.steps // 10),
        logging_steps=logging_steps(settings.steps),
        logging_nan_inf_filter=False,
        save_strategy="no",  # the callback decides
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        seed=config.seed,
        dataloader_num_workers=0,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Demonstrations(task, examples, PromptFormat(tokenizer, config.prompt), config.seed),
        data_collator=collate(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    for quiet in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(quiet)
    return trainer
