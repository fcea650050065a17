"""The growing files of a run and their readers: metrics, positions, samples, scores of held-out problems.

* metrics.jsonl: a row an update or evaluation. problems.jsonl: the score of each held-out problem at each evaluation;
  means alone would do for a curve, but not to say how sure a comparison is.
* Schemas: docs/runs.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cppo import files
from cppo.rules import Reason
from cppo.runs.certificates import CERTIFICATES_FILE

Row = Mapping[str, Any]

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


METRICS_FILE = "metrics.jsonl"


POSITIONS_FILE = "positions.jsonl"


SAMPLES_FOLDER = "samples"


def append_metrics(folder: str | Path, *rows: Mapping[str, Any]) -> None:
    """Append rows to `folder`/metrics.jsonl; NaN and infinity become null.

    A row needs "step" (int >= 0), "update" (int) and "kind" ("train", "warmup", "evaluation"); everything else is flat
    numbers, text or null.  Raises: ValueError (a key is missing), files.DiskFullError.
    """
    for row in rows:
        missing = [key for key in ("step", "update", "kind") if key not in row]
        if missing:
            raise ValueError(
                f"A row of metrics without {', '.join(map(repr, missing))} cannot be resumed or plotted; got the keys "
                f"{sorted(row)}. Give step, update and kind."
            )
    files.append_jsonl(Path(folder) / METRICS_FILE, *rows)


def read_metrics(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of `folder`/metrics.jsonl (of one `kind`), oldest first; [] when there are none yet."""
    return [row for row in files.read_jsonl(Path(folder) / METRICS_FILE) if kind is None or row.get("kind") == kind]


def judged(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The training rows of updates that had a loss token: those a share of tokens has a meaning for.

    An update whose groups all have equal rewards has none (`advantages.zero_spread_filter`), and its shares are logged
    as 0. In any other each token has one reason, so the shares of the reasons sum to 1 (averaged over micro-batches: to
    more than 0).
    """
    names = [f"trust/{code.key}_fraction" for code in Reason if code != Reason.OUTSIDE]
    return [
        row
        for row in rows
        if row.get("kind") == "train"
        and row.get("trust/masked_fraction") is not None
        and any(row.get(name) for name in names)
    ]


def samples_path(folder: str | Path, step: int) -> Path:
    """Where the sampled responses of a step lie: samples/step-000010.jsonl."""
    return Path(folder) / SAMPLES_FOLDER / f"step-{step:06d}.jsonl"


def truncate_records(folder: str | Path, step: int) -> None:
    """Cut positions.jsonl, certificates.jsonl and samples/ back to `step` (resume from the checkpoint of `step`)."""
    for name in (POSITIONS_FILE, CERTIFICATES_FILE):
        files.truncate_after(Path(folder) / name, step)
    for path in (Path(folder) / SAMPLES_FOLDER).glob("step-*.jsonl"):
        number = path.stem.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            path.unlink()


def before_and_after(rows: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """The first and the last evaluation among those with the most samples per problem; (row, None) if there is one.

    Evaluations along the way often take fewer samples, and Avg@4 is not to be compared with Avg@16.
    """
    evaluations = [row for row in rows if row.get("kind") == "evaluation" and benchmarks([row])]
    if not evaluations:
        return None, None
    most = max(row.get("samples") or 0 for row in evaluations)
    full = [row for row in evaluations if (row.get("samples") or 0) == most]
    chosen = full if len(full) > 1 else evaluations
    return chosen[0], chosen[-1] if len(chosen) > 1 else None


def benchmarks(rows: Sequence[Row]) -> list[str]:
    """Names of the benchmarks evaluated, without "mean"."""
    names = (key.removeprefix("avg/") for row in rows for key in row if key.startswith("avg/"))
    return [name for name in dict.fromkeys(names) if name != "mean"]


def best_evaluation(rows: Sequence[Row]) -> Row | None:
    """The evaluation with the highest "avg/mean" (the first of equals): the best validation score within the budget."""
    scored = [row for row in rows if row.get("kind") == "evaluation" and row.get("avg/mean") is not None]
    return max(scored, key=lambda row: (row["avg/mean"], -int(row["step"])), default=None)
