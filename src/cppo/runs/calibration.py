"""What a calibration leaves in a run folder: calibration.json, the tokens it has seen, and the rule they give.

Schemas: docs/runs.md.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cppo import files
from cppo.config.load import load_config
from cppo.config.settings import RuleSettings
from cppo.errors import UserError
from cppo.rules import TrustRegion
from cppo.runs.folder import RunFolder
from cppo.thresholds import Sample
from cppo.tokens import TokenBatch

#: One update's tokens: packed "policy_logp", "rollout_logp", "advantages", perhaps "divergence", and "lengths".
Part = dict[str, Tensor]


def joined(parts: Sequence[Part]) -> Part:
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def show(thresholds: Mapping[str, float]) -> str:
    """ "delta=0.0812 delta_b=0.0101"."""
    return " ".join(f"{name}={value:.4g}" for name, value in thresholds.items())


def read_sample(folder: str | Path, steps: Sequence[int]) -> Sample:
    """The tokens of some batches of a run, every update of every batch with the same weight.

    Raises
    ------
    UserError : a file is missing or cannot be read.
    """
    parts: list[Part] = []
    for step in steps:
        path = RunFolder(folder).calibration_data(step)
        try:
            tensors = load_file(path)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); it holds what the calibration has seen. Restore it, or begin anew."
            ) from error
        numbers = sorted({int(key.partition("/")[0]) for key in tensors})
        parts += [{k.partition("/")[2]: x for k, x in tensors.items() if k.startswith(f"{n}/")} for n in numbers]
    return sample_of(parts)


def sample_of(parts: Sequence[Part]) -> Sample:
    """The tokens of some updates, each update with the same weight."""
    whole = joined(parts)
    lengths = whole.pop("lengths")
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]
    rows: Part = {}
    for name, values in whole.items():  # as the run's own batches are: padded is several times as fast as packed
        rows[name] = torch.zeros(mask.shape).masked_scatter_(mask, values)
    batch = TokenBatch(
        rows["policy_logp"], rows["rollout_logp"], rows["advantages"], mask, None, rows.get("divergence")
    )
    sizes = torch.tensor([len(part["lengths"]) for part in parts])
    return Sample.of(batch, torch.arange(len(parts)).repeat_interleave(sizes)[:, None])


def latest_thresholds(history: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Those that were solved last; None: none yet."""
    return next((dict(entry["thresholds"]) for entry in reversed(history) if entry["thresholds"] is not None), None)


def is_final(history: Sequence[Mapping[str, Any]], steps: int) -> bool:
    """Whether enough batches have counted."""
    return sum(bool(entry["tokens"]) for entry in history) >= steps and history[-1]["thresholds"] is not None


def write_calibration(folder: Path, rule: str, target: float, steps: int, history: list[dict[str, Any]]) -> None:
    """`calibration.json`: "thresholds" are the final ones, null as long as there are none."""
    final = latest_thresholds(history) if is_final(history, steps) else None
    record = {"rule": rule, "target": target, "steps": steps, "thresholds": final, "history": history}
    files.atomic_write_json(RunFolder(folder).calibration_file, record)


def read_calibration(folder: str | Path) -> dict[str, Any] | None:
    """`calibration.json` of a run; None: it has none.

    Raises
    ------
    UserError : the file cannot be read.
    """
    path = RunFolder(folder).calibration_file
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if missing := {"rule", "target", "steps", "thresholds", "history"} - record.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: it was changed by something other than CPPO ({error}).") from error
    return record


def truncate_calibration(folder: str | Path, step: int) -> None:
    """Cut back to the checkpoint of `step` (0: none).

    Raises
    ------
    UserError : the run is beyond its calibration, and what was chosen is gone.
    """
    root = Path(folder)
    for path in RunFolder(root).calibration_data(0).parent.glob("step-*.safetensors"):
        number = path.stem.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            path.unlink()
    record = read_calibration(root)
    if record is None:
        return
    history = [entry for entry in record["history"] if entry["step"] <= step]
    if not history:
        RunFolder(root).calibration_file.unlink()
    elif history != record["history"]:
        write_calibration(root, record["rule"], record["target"], record["steps"], history)


def rule_of_run(folder: str | Path) -> TrustRegion:
    """The rule of a run with the thresholds that it has found.

    Raises
    ------
    UserError : there is no run, or its thresholds are not known yet.
    """
    run = RunFolder(folder)
    if not run.exists:
        raise UserError(f"{folder} is not the folder of a run: it has no {run.config_file.name}.")
    config = load_config(run.config_file)
    if not config.rule.automatic:
        return config.make_rule()
    record = read_calibration(folder)
    if record is None or record["thresholds"] is None:
        seen = 0 if record is None else sum(bool(entry["tokens"]) for entry in record["history"])
        raise UserError(
            f"the run {folder} has seen {seen} of the {config.calibration.steps} batches of its calibration."
        )
    return config.rule.make(record["thresholds"])


def rule_as_run(rule: RuleSettings, folders: Sequence[str | Path]) -> str:
    """A rule on one line, as the runs in `folders` had it: "cppo(delta=auto (0.08-0.11), delta_b=0.01, ...)".

    What set itself is followed by the smallest and the largest value of the runs that have found it; a record that
    cannot be read is none.
    """
    found = []
    for folder in folders if rule.automatic else ():
        with contextlib.suppress(UserError):
            record = read_calibration(folder)
            found += [record["thresholds"]] if record and record["thresholds"] else []

    def shown(name: str, value: Any) -> str:
        if name not in rule.automatic or not found:
            return f"{name}={value}"
        low, high = (f"{pick(thresholds[name] for thresholds in found):.3g}" for pick in (min, max))
        return f"{name}=auto ({low if low == high else f'{low}-{high}'})"

    return f"{rule.name}({', '.join(shown(name, value) for name, value in rule.parameters.items())})"
