"""The score of each held-out problem at each evaluation: problems.jsonl, a row an evaluation.

Means alone (metrics.jsonl) would do for a curve, but not to say how sure a comparison is: what other problems would
have given can be told from the spread over these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cppo.training import files

PROBLEMS_FILE = "problems.jsonl"


def append_problems(folder: str | Path, step: int, samples: int, scores: Mapping[str, Sequence[float]]) -> None:
    """Append the evaluation of `step`; `scores`: benchmark -> mean over `samples` responses, a number a problem."""
    row = {"step": step, "samples": samples, "scores": {name: list(values) for name, values in scores.items()}}
    files.append_jsonl(Path(folder) / PROBLEMS_FILE, row)


def read_problems(folder: str | Path) -> dict[int, dict[str, list[float]]]:
    """step -> benchmark -> mean score a problem; {} for a run that has none.

    Raises
    ------
    ValueError : a row before the last that is not JSON, or has another shape.
    """
    path = Path(folder) / PROBLEMS_FILE
    found = {}
    for row in files.read_jsonl(path):
        try:
            found[int(row["step"])] = {str(name): list(map(float, values)) for name, values in row["scores"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: a row without step and scores by benchmark ({error!r}): {row}.") from error
    return found


def keep_problems(folder: str | Path, steps: Collection[int]) -> None:
    """Drop the evaluations of all steps but these: those that metrics.jsonl has. A kill between the two files leaves
    one that is made again.
    """
    files.truncate_after(Path(folder) / PROBLEMS_FILE, -1, keep=lambda row: row["step"] in steps)
