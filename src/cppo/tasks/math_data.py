"""Reads mathematical problems: Parquet, JSON lines or a hub data set, in the schemas of DAPO-Math-17k and AIME.

    prompt    list of chat messages (DAPO-Math-17k) or text (its processed variant); else `problem` or `question`
    answer    reward_model.ground_truth (DAPO-Math-17k); else `answer`; else `solution`: the last \\boxed{...} in it, or
              all of it where it is short (the processed variant holds the bare answer there)

Column names are matched without regard to upper and lower case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cppo.errors import UserError
from cppo.tasks.base import Prompt, require
from cppo.tasks.extract import last_boxed

PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("reward_model", "answer", "solution")
_LONGEST_BARE_SOLUTION = 100  # characters; beyond that a "solution" is a worked one, not an answer
_FILES = (".parquet", ".jsonl")

# What data sets wrap around a problem; removed where problems are compared.
_WRAPPING = re.compile(
    r"Solve the following math problem step by step\. The last line of your response should be of the form .*?"
    r"where \$Answer is the answer to the problem\."
    r"|Remember to put your answer on its own line after .?Answer:.?\.?"
    r"|Please reason step by step, and put your final answer within \\boxed\{\}\.?",
    flags=re.DOTALL,
)


@dataclass(frozen=True)
class Problem:
    """A prompt as the data have it, its answer, and a key that is equal for the same problem in another wrapping."""

    prompt: Prompt
    answer: str
    key: str


@dataclass(frozen=True)
class Source:
    """The different problems of a file or data set, in their order, and how many rows there were."""

    problems: list[Problem]
    rows: int


def load_problems(source: str, split: str = "train") -> Source:
    """Read `source`, each problem once (the first of its rows).

    Args:
        source: path of a .parquet or .jsonl file, or a data set's id on the hub.
        split: for a data set on the hub.

    Raises:
        UserError: an empty or malformed file (with its line or row), or one without prompts or answers.
        UserError: no such file, and no such data set on the hub (or no network).
        MissingDependency: Parquet and hub data sets need pyarrow and datasets.
    """
    problems: dict[str, Problem] = {}
    count = 0
    for place, row in _rows(source, split):
        count += 1
        problem = _problem(row, place)
        problems.setdefault(problem.key, problem)
    if not problems:
        raise UserError(f"{source} holds no problem: give a file with at least one row")
    return Source(list(problems.values()), count)


def _rows(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its place, as in "train.jsonl, line 7"."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".jsonl":
        return _jsonl_rows(path)
    if path.is_file() and path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.exists():
        what = "a folder" if path.is_dir() else f"a {path.suffix or 'file without extension'}"
        raise UserError(f"{source} is {what}: give a {' or '.join(_FILES)} file")
    if path.suffix in _FILES or path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise UserError(f"there is no file {source} (looked at {path.absolute()}): correct the path")
    return _hub_rows(source, split)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{place} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{place} holds a {type(row).__name__}: each line must be one JSON object")
            yield place, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    require("pyarrow", f"reading {path}")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name.lower() in PROMPT_COLUMNS + ANSWER_COLUMNS]
            if not wanted and file.metadata.num_rows:
                wanted = file.schema_arrow.names  # for the message that says which columns there are
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=wanted):  # DAPO-Math-17k has 1.8 million rows
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    require("datasets", f"loading {name} from the hub")
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds, for a missing network alone four
        raise UserError(
            f"{name} is not a local file, and could not be loaded from the hub (split {split!r}): {error}. "
            "Without a network, download its Parquet file elsewhere and give the path"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def _problem(row: Mapping[str, Any], place: str) -> Problem:
    columns = {name.lower(): value for name, value in row.items()}
    prompt = next((columns[name] for name in PROMPT_COLUMNS if columns.get(name)), None)
    if prompt is None:
        raise UserError(_lacks("prompt", row, place, PROMPT_COLUMNS))
    answer = _answer(columns)
    if not answer:
        raise UserError(_lacks("answer", row, place, ("reward_model.ground_truth", *ANSWER_COLUMNS[1:])))
    if isinstance(prompt, str):
        return Problem(prompt, answer, problem_key(prompt))
    messages = _messages(prompt, place)
    return Problem(messages, answer, problem_key(messages[-1]["content"]))


def _messages(prompt: Any, place: str) -> list[dict[str, str]]:
    fields = ("role", "content")
    if not isinstance(prompt, list) or not all(
        isinstance(message, Mapping) and all(isinstance(message.get(name), str) for name in fields)
        for message in prompt
    ):
        raise UserError(f"{place}: the prompt must be text, or a list of messages with the texts 'role' and 'content'")
    if prompt[-1]["role"] != "user":
        raise UserError(f"{place}: the last message of the prompt is by {prompt[-1]['role']!r}; it must be by 'user'")
    return [{name: message[name] for name in fields} for message in prompt]


def _answer(columns: Mapping[str, Any]) -> str | None:
    reward_model = columns.get("reward_model")
    if isinstance(reward_model, Mapping) and _text(reward_model.get("ground_truth")):
        return _text(reward_model["ground_truth"])
    if _text(columns.get("answer")):
        return _text(columns["answer"])
    solution = _text(columns.get("solution"))
    if solution is None:
        return None
    return last_boxed(solution) or (solution if len(solution) <= _LONGEST_BARE_SOLUTION else None)


def _text(value: Any) -> str | None:
    """AIME answers come as 33, 33.0, "033" or "33"; all but whole numbers are left to math-verify."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value).strip() or None


def _lacks(what: str, row: Mapping[str, Any], place: str, accepted: tuple[str, ...]) -> str:
    return (
        f"{place} has no {what}: its columns are {', '.join(row) or 'none'}, and accepted are {', '.join(accepted)} "
        "(not empty). Rename the column, or remove the row"
    )


def problem_key(text: str) -> str:
    """The problem without what data sets wrap around it, and with white space made uniform."""
    return " ".join(_WRAPPING.sub(" ", text).split())
