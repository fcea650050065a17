"""Writes down what the actor's loss saw and did, one file a micro-batch, so that a test can compute it again.

Switched on by ``rollout.custom.record`` (a folder). The loss function is passed through untouched: it gets the same
arguments, its result is returned, it runs once.

A file ``<update>-<micro-batch>.safetensors`` holds, as flat values with ``<name>.offsets`` for ragged ones: ``data.*``
(the fields of the micro-batch), ``out.*`` (what the model's forward gave the loss), ``grad.log_probs`` (d loss / d
log-probability of each position of the packed sequences), ``weights.*`` (the model as it was in that forward), and as
JSON metadata the loss, its metrics, the number of the update and of the loss tokens of its whole mini-batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from verl.workers.engine_workers import ActorRolloutRefWorker


class Recorder:
    """Wraps one engine's `train_batch` (one optimizer update)."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self.engine, self.folder, self.count = engine, folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.train_batch = engine.train_batch
        engine.train_batch = self

    def __call__(self, data: Any, loss_function: Callable[..., Any]) -> Any:
        weights = {
            f"weights.{name}": (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
            for name, tensor in self.engine.module.state_dict().items()
        }

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("model_output") is None:  # the engine's logits hook calls the same function
                return loss_function(*args, **kwargs)
            tensors = dict(weights)
            add(tensors, "data", kwargs["data"])
            add(tensors, "out", kwargs["model_output"])
            outputs = dict(kwargs["model_output"])
            ragged = outputs["log_probs"]
            values = ragged.values()  # a node of its own, so that a hook sees its gradient
            values.register_hook(lambda gradient: tensors.update({"grad.log_probs": gradient.detach().clone()}))
            offsets = ragged.offsets()
            outputs["log_probs"] = torch.nested.nested_tensor_from_jagged(values, offsets=offsets)
            loss, metrics = loss_function(*args, **{**kwargs, "model_output": outputs})
            about = {"loss": float(loss), "metrics": {name: number(value) for name, value in metrics.items()}}
            pending.append((tensors, about | {"update": self.count, "tokens": int(kwargs["data"]["batch_num_tokens"])}))
            return loss, metrics

        pending: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
        result = self.train_batch(data, loss_function=recorded)
        for part, (tensors, about) in enumerate(pending):  # after the backward passes
            saved = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            file = self.folder / f"{self.count:03d}-{part}.safetensors"
            save_file(saved, file, metadata={name: json.dumps(value) for name, value in about.items()})
        self.count += 1
        return result


def add(tensors: dict[str, Tensor], prefix: str, fields: Mapping[str, Any]) -> None:
    """Flat copies of the tensors among `fields`."""
    for name, value in fields.items():
        if isinstance(value, Tensor) and value.is_nested:
            tensors[f"{prefix}.{name}"] = value.values().detach().clone()
            tensors[f"{prefix}.{name}.offsets"] = value.offsets().clone()
        elif isinstance(value, Tensor):
            tensors[f"{prefix}.{name}"] = value.detach().clone()


def number(value: Any) -> Any:
    """A float out of verl's `Metric` or a tensor; anything else as text."""
    values = getattr(value, "values", value)
    if isinstance(values, list):
        return [float(item) for item in values]
    return float(values) if isinstance(values, int | float | Tensor) else str(values)


_init_model = ActorRolloutRefWorker.init_model


def init_and_record(self: Any) -> None:
    """`ActorRolloutRefWorker.init_model`, then a recorder where one is asked for.

    A function of the module, not of `install`: verl copies it into a class that Ray pickles.
    """
    _init_model(self)
    folder = (self.config.rollout.get("custom") or {}).get("record")
    if folder:
        Recorder(self.actor.engine, Path(folder))


def install() -> None:
    """Let every actor that is told to record its updates."""
    vars(init_and_record).update(vars(_init_model))  # verl's marks of how to dispatch the method
    ActorRolloutRefWorker.init_model = init_and_record
