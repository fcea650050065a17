"""Avg@k and pass@k of a policy on a task's held-out problems, and the score of each problem.

* Sampling at the evaluation's own temperature and top-p (0.7 / 0.95 in the paper), apart from training, which samples
  from the full softmax.
* The global random state is put back afterwards: evaluating does not change what a training run does next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from cppo.config.precision import autocast
from cppo.errors import UserError
from cppo.tasks import Example, Task, make_task, score_all
from cppo.training.processes import from_all, start_processes
from cppo.training.prompts import PromptFormat

if TYPE_CHECKING:
    from cppo.config.load import Config
    from cppo.show.progress import RunProgress

#: Called after each batch of sampled responses with the number of responses done.
OnBatch = Callable[[int], None]


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    on_batch: OnBatch | None = None,
    together: bool = False,
) -> list[list[str]]:
    """`samples` responses per prompt, as text without special tokens; deterministic by `seed` on one kind of machine.

    `prompts` : token ids (`cppo.training.prompts.PromptFormat.ids`).

    `together`: the model is sharded, so all processes must make the same number of forward passes.
    """
    ids = [prompt for prompt in prompts for _ in range(samples)]
    generation = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )
    was_training = model.training
    model.eval()
    texts: list[str] = []
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for start in range(0, len(ids), batch_size):
                rows = tokenizer.pad({"input_ids": ids[start : start + batch_size]}, return_tensors="pt").to(
                    model.device
                )
                output = model.generate(
                    input_ids=rows["input_ids"],
                    attention_mask=rows["attention_mask"],
                    generation_config=generation,
                    synced_gpus=together,
                )
                texts += tokenizer.batch_decode(output[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)
                if on_batch is not None:
                    on_batch(len(texts))
    finally:
        model.train(was_training)
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    benchmarks: dict[str, Sequence[Example]],
    config: Config,
    on_batch: OnBatch | None = None,
    together: bool = False,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(Avg@k and pass@k for each benchmark and their unweighted mean, mean score of each problem), k =
    ``evaluation.samples``.

    Called by all processes, each of which takes its share of the problems; all return the same figures.
    Avg@k is the mean score over problems and samples; pass@k the share of problems with a response of full score among
    the k. Keys: ``avg/<benchmark>``, ``pass/<benchmark>``, ``avg/mean``, ``pass/mean``, ``samples``. The scores of
    problems are in the order of `benchmarks`, whatever the number of processes.
    """
    settings, process = config.evaluation, PartialState()
    prompts = PromptFormat(tokenizer, config.prompt)
    rank, size = process.process_index, process.num_processes
    row: dict[str, float] = {"samples": settings.samples}
    by_problem: dict[str, list[float]] = {}
    done = 0
    for name, examples in benchmarks.items():
        offset = done
        share = list(examples[rank::size])
        # equal shares, so that sharded models make the same number of passes on every process
        filled = share + [examples[0]] * (-(-len(examples) // size) - len(share))
        # In training's precision, also before it: else the same weights would score differently before and after.
        with autocast(config, process.device.type):
            responses = sample_responses(
                model,
                tokenizer,
                [prompts.ids(example.prompt) for example in filled],
                samples=settings.samples,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_new_tokens=settings.max_new_tokens or config.rollout.max_new_tokens,
                batch_size=settings.batch_size,
                seed=config.seed + 1_000_003 * rank,
                on_batch=None if on_batch is None else lambda n, offset=offset: on_batch(offset + n * size),  # type: ignore[misc]
                together=together,
            )
        done += len(examples) * settings.samples
        pairs = [(example, text) for example, texts in zip(share, responses, strict=False) for text in texts]
        flat = [score for part in from_all(score_all(task, pairs)) for score in part]
        scores = [flat[start : start + settings.samples] for start in range(0, len(flat), settings.samples)]
        row[f"avg/{name}"] = sum(flat) / len(flat)
        row[f"pass/{name}"] = sum(max(line) >= 1.0 for line in scores) / len(scores)
        order = [i for process in range(size) for i in range(process, len(examples), size)]  # as the shares were joined
        means = {i: sum(line) / len(line) for i, line in zip(order, scores, strict=True)}
        by_problem[name] = [means[i] for i in range(len(examples))]
    for measure in ("avg", "pass"):
        row[f"{measure}/mean"] = sum(row[f"{measure}/{name}"] for name in benchmarks) / len(benchmarks)
    return row, by_problem


def held_out(task: Task, config: Config) -> dict[str, Sequence[Example]]:
    """The benchmarks that a run is judged by: at most ``evaluation.problems`` problems each.

    Raises
    ------
    UserError : the task has no validation problems.
    """
    benchmarks = {
        name: problems for name, problems in task.validation(config.evaluation.problems).items() if len(problems)
    }
    if not benchmarks:
        raise UserError(
            f"task {task.name!r} has no validation problems, so no accuracy can be measured. Give it some "
            "(for math: task.options.validation={name: file})."
        )
    return benchmarks


def evaluate_model(model: str, config: Config, progress: RunProgress | None = None) -> dict[str, Any]:
    """Load a model (folder or hub id) and evaluate it with the task and the settings of `config`."""
    from cppo.training.models import evaluation_dtype, load_model, load_tokenizer, plain_sampling

    device = start_processes().device
    disable_progress_bar()  # transformers' own, for each file it reads
    task = make_task(config.task.name, **config.task.options)
    benchmarks = held_out(task, config)
    tokenizer = load_tokenizer(model)
    policy = load_model(model, evaluation_dtype()).to(device)
    plain_sampling(policy)  # as a run does: the same weights score the same
    total = sum(map(len, benchmarks.values())) * config.evaluation.samples
    done = 0

    def on_batch(count: int) -> None:
        nonlocal done
        if progress is not None:
            progress.advance(min(count, total) - done)
        done = min(count, total)

    if progress is not None:
        progress.start_phase("evaluation", total)
    figures, _ = evaluate(policy, tokenizer, task, benchmarks, config, on_batch)
    return figures
