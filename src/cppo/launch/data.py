"""`cppo launch verl --prepare-data`: the task `math` as the Parquet files that verl reads.

One file for training (``train.parquet``) and one per benchmark (``AIME24.parquet`` ...), each problem once, training
problems that are validation problems removed, instructions added as `cppo train` does. A row, in verl's schema::

    data_source    the benchmark's name, under which verl reports its score; "math" for training
    prompt         chat messages
    ability        "math"
    reward_model   {"style": "rule", "ground_truth": the answer}
    extra_info     {"index": row, "split": "train" or "test"}
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cppo import __version__
from cppo.config.load import Config
from cppo.errors import UserError
from cppo.files import atomic_write_bytes, atomic_write_text
from cppo.tasks.base import Example, Task, make_task, require

_MANY = 10**9  # more problems than any data set has


@dataclass(frozen=True)
class Prepared:
    """Files with their numbers of problems, and remarks on what was left out."""

    files: dict[Path, int]
    notes: tuple[str, ...]


def prepare(config: Config, folder: Path) -> Prepared:
    """Write the data of a recipe into `folder`, each file as a whole or not at all, and `data.json` on what they hold.

    Raises
    ------
    UserError : the recipe's task is another one, or it has no training or no validation problems.
    UserError : as `cppo.tasks.math.Math`.
    """
    if config.task.name != "math":
        raise UserError(f"task.name is {config.task.name!r}: --prepare-data writes the data of the task math.")
    options = dict(config.task.options)
    for key in ("train", "validation"):
        if not options.get(key):
            raise UserError(f"task.options.{key} is not set: give a file or a hub id.")
    require("pyarrow", "writing Parquet files")
    task = make_task("math", **options)
    sets = {"train": _each_once(task, config.seed)}
    sets |= {name: list(examples) for name, examples in task.validation(config.evaluation.problems).items()}
    files = {}
    for name, examples in sets.items():
        path = folder / f"{name}.parquet"
        atomic_write_bytes(path, _parquet(examples, name))
        files[path] = len(examples)
    notes = tuple(getattr(task, "notes", ()))
    about = {
        "cppo": __version__,
        "task": options,
        "problems": {p.name: n for p, n in files.items()},
        "notes": notes,
    }
    atomic_write_text(folder / "data.json", json.dumps(about, indent=2, default=str) + "\n")
    return Prepared(files, notes)


def _each_once(task: Task, seed: int) -> list[Example]:
    """All training problems in the order of the source: a task gives them shuffled, pass after pass."""
    seen: dict[str, Example] = {}
    for example in task.train(_MANY, seed):
        if example.id in seen:
            break
        seen[example.id] = example
    return sorted(seen.values(), key=lambda example: int(example.id.rpartition("/")[2]))


def _parquet(examples: Iterable[Example], name: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    training = name == "train"
    rows: list[dict[str, Any]] = [
        {
            "data_source": "math" if training else name,
            "prompt": example.prompt,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": example.answer},
            "extra_info": {"index": index, "split": "train" if training else "test"},
        }
        for index, example in enumerate(examples)
    ]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()
