"""What keys there are, what each expects in words, and which one a mistyped key may have meant."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cppo.config.settings import Settings
from cppo.rules import RULES
from cppo.words import nearest_keys

#: What people call things elsewhere.
ALIASES: Mapping[str, str] = {
    "lr": "optimizer.learning_rate",
    "batch_size": "rollout.prompts",
    "train_batch_size": "rollout.prompts",
    "group_size": "rollout.responses",
    "num_generations": "rollout.responses",
    "n": "rollout.responses",
    "max_completion_length": "rollout.max_new_tokens",
    "max_tokens": "rollout.max_new_tokens",
    "epochs": "updates",
    "ppo_epochs": "updates",
    "num_iterations": "updates",
    "max_steps": "steps",
    "lora": "peft",
    "use_vllm": "rollout.vllm",
    "bf16": "precision",
    "dtype": "precision",
    "loss_type": "aggregation",
    "scale_rewards": "advantages.kind",
    "dataset": "task.options.train",
    "algorithm": "rule",
    "method": "rule",
    "loss": "rule",
}


def dotted_keys(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its field, sections before what they hold."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if section := section_of(field.annotation):
            yield from dotted_keys(section, f"{prefix}{name}.")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model behind an annotation (``Tiny``, ``Peft | None``), None for a plain value."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def field_at(path: Sequence[str]) -> tuple[str, FieldInfo | None]:
    """The key and field at which an error's path ends; what follows it (list index, branch of a union) is left out."""
    model: type[BaseModel] | None = Settings
    key: list[str] = []
    field: FieldInfo | None = None
    for part in path:
        if model is None or part not in model.model_fields:
            break
        key.append(part)
        field = model.model_fields[part]
        model = section_of(field.annotation)
    return ".".join(key) or "the configuration", field


def rule_parameters(name: Any) -> list[str]:
    """Names of a rule's parameters; none for a rule that does not exist."""
    rule = RULES.get(name) if isinstance(name, str) else None
    return [] if rule is None else [field.name for field in dataclasses.fields(rule)]  # type: ignore[arg-type]


def similar_keys(key: str) -> list[str]:
    """At most two keys that `key` may have meant, the likelier one first."""
    last = key.rpartition(".")[2]
    if last in ALIASES:
        return [ALIASES[last]]
    known = [name for name, _ in dotted_keys()]
    known += dict.fromkeys(f"rule.{parameter}" for rule in RULES for parameter in rule_parameters(rule))
    return nearest_keys(key, known)


def describe(field: FieldInfo | None) -> str:
    """What a field expects, in words."""
    if field is None:
        return "keys and values"
    return _words(field.annotation, list(field.metadata))


def _words(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for item in arguments[1:] for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _words(arguments[0], [*metadata, *inner])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _words(a, metadata) for a in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in arguments)
    if section := section_of(annotation):
        return f"a section with the keys {', '.join(section.model_fields)}"
    if annotation is bool:
        return "true or false"
    if annotation is str:
        return "a text"
    if origin is list:
        lengths = [m.min_length for m in metadata if hasattr(m, "min_length")]
        return f"a list of {lengths[0]} numbers" if lengths else "a list of texts"
    if origin is dict:
        return "keys and values"
    kind = "a whole number" if annotation is int else "a number"
    return " ".join([kind, *_bounds(metadata)])


def _bounds(metadata: list[Any]) -> list[str]:
    limits = {name: getattr(m, name) for m in metadata for name in ("gt", "ge", "lt", "le") if hasattr(m, name)}
    signs = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    words = [f"{signs[name]} {value}" for name, value in limits.items() if value is not None]
    return [" and ".join(words)] if words else []
