"""`rule.delta: auto` in a run: thresholds from its first rollout batches, recorded, and the same after a resume.

* Batch 1 runs with the rule's defaults. At the end of each of the first `calibration.steps` batches the thresholds are
  solved anew (`cppo.training.thresholds.solve`) and used from the next batch on; those of the last of these batches
  stay. So no batch runs without a trust region, and one only with thresholds that are not its own.
* They are solved on the tokens of all batches so far but the first, which is all there is for batch 2 and is left out
  afterwards: an optimizer without history moves the policy further than it will later (docs/configuration.md).
* The target is what ``trust/masked_fraction`` is to be as a mean over the updates of a batch.
* Tokens are kept by whole responses, each process and update its share of `MAX_TOKENS`; the main process solves.
* `calibration/step-000001.safetensors` holds the tokens of a batch and `calibration.json` what was chosen. Both are
  written before the batch's checkpoint and cut back to the checkpoint by a resume, which therefore neither calibrates
  again nor forgets what it had seen. Schemas: docs/runs.md.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cppo.errors import UserError
from cppo.rules import TrustRegion, Verdict
from cppo.tokens import TokenBatch
from cppo.training import files
from cppo.training.config import Config, load_config
from cppo.training.positions import rounded
from cppo.training.processes import from_all, from_main
from cppo.training.settings import RuleSettings
from cppo.training.thresholds import Sample, Unreachable, solve

CALIBRATION_FILE = "calibration.json"
DATA_FOLDER = "calibration"
#: Loss tokens that are kept in all, over batches, updates and processes (16 bytes each).
MAX_TOKENS = 1 << 18

#: One update's tokens: packed "policy_logp", "rollout_logp", "advantages", perhaps "divergence", and "lengths".
Part = dict[str, Tensor]


class Calibration:
    """Watches a run's losses (an observer of the TRL engine, on every process) and sets its rule.

    config : its rule may have no threshold to set; then nothing is watched or written. folder : of the run, cut back
    to the checkpoint of `step`, from which it goes on. note : shows a line to the user.

    Raises
    ------
    UserError : the run goes on, and what it had chosen is gone.
    """

    def __init__(self, config: Config, folder: Path, step: int, note: Callable[[str], None]) -> None:
        self.names, self.settings, self.rules = config.rule.automatic, config.calibration, config.rule
        self.folder, self.note = folder, note
        record = from_main(read_calibration(folder) if self.names and PartialState().is_main_process else None)
        if self.names and step and record is None:
            raise UserError(
                f"{folder / CALIBRATION_FILE} is missing: the thresholds with which this run came to step {step} are "
                "not known. Restore it, or begin a new run."
            )
        self.history: list[dict[str, Any]] = list(record["history"]) if record else []
        self.done = not self.names or (record is not None and record["thresholds"] is not None)
        shares = self.settings.steps * config.updates * PartialState().num_processes
        self.most = max(1, MAX_TOKENS // shares)
        self._parts: dict[int, list[Part]] = defaultdict(list)
        self._taken: dict[int, int] = defaultdict(int)

    @property
    def thresholds(self) -> dict[str, float]:
        """The thresholds that set themselves, as they are now: solved ones, else the rule's defaults."""
        chosen = latest_thresholds(self.history)
        return {name: getattr(self.rules.make(chosen), name) for name in self.names}

    @property
    def rule(self) -> TrustRegion:
        """The rule as it acts now."""
        return self.rules.make(latest_thresholds(self.history))

    def __call__(self, batch: TokenBatch, verdict: Verdict, inputs: Mapping[str, Any], update: int) -> None:
        """Observe one loss: keep whole responses of it as long as there is room for the update."""
        if self.done:
            return
        mask = batch.loss_mask
        divergence = verdict.divergence
        values = {"policy_logp": batch.policy_logp, "rollout_logp": batch.rollout_logp}
        values["advantages"] = batch.token_advantages().expand(mask.shape)
        if divergence is not None:
            values["divergence"] = divergence
        finite = torch.stack([value.isfinite() for value in values.values()]).all(0) | ~mask
        usable = mask & finite.all(1, keepdim=True)  # of a response with a NaN nothing is known
        lengths = usable.sum(1).cpu()
        fits = lengths.cumsum(0) <= self.most - self._taken[update]
        if not self._taken[update]:
            fits |= (lengths > 0).cumsum(0) <= 1  # one response at least, however long
        chosen = usable & fits.to(usable.device)[:, None]
        part = {name: value.detach()[chosen].float().cpu() for name, value in values.items()}
        part["lengths"] = lengths[fits & (lengths > 0)]
        self._taken[update] += int(part["lengths"].sum())
        self._parts[update].append(part)

    def end_of_step(self, step: int) -> TrustRegion | None:
        """A rollout batch is used up: the rule from now on, or None where it stays. Call it on every process, before
        the checkpoint of the batch.

        Raises
        ------
        UserError : on the last of the batches, where no threshold gives the target.
        """
        if self.done:
            return None
        mine = {update: _joined(parts) for update, parts in sorted(self._parts.items())}
        self._parts.clear()
        self._taken.clear()
        gathered = from_all(mine)
        entry, problem = from_main(self._solve(step, gathered) if PartialState().is_main_process else ({}, None))
        if problem is not None:
            raise UserError(problem)
        self.history.append(entry)
        self.done = is_final(self.history, self.settings.steps)
        if PartialState().is_main_process:
            write_calibration(self.folder, self.rules.name, self.settings.target, self.settings.steps, self.history)
        if entry["thresholds"] is None:
            self.note(f"Calibration, step {step}: {entry['why']}")
            return None
        self.note(
            f"Calibration, step {step}: {show(entry['thresholds'])} {'holds' if len(self.names) == 1 else 'hold'} back "
            f"{entry['share']:.2%} of {entry['tokens']:,} tokens (target {self.settings.target:.2%})"
            f"{'; so it stays.' if self.done else ', for the next batch.'}"
        )
        return self.rule

    def _solve(self, step: int, gathered: Sequence[Mapping[int, Part]]) -> tuple[dict[str, Any], str | None]:
        """(entry of the history, why the run cannot go on), on the main process; writes the batch's tokens."""
        updates = sorted({update for parts in gathered for update in parts})
        seen = [_joined([parts[update] for parts in gathered if update in parts]) for update in updates]
        seen = [part for part in seen if part["lengths"].numel()]
        entry: dict[str, Any] = {"step": step, "tokens": 0, "thresholds": None, "share": None}
        if not seen:
            return entry | {"why": "no token was trained on, so this batch does not count."}, None
        if not sample_of(seen).moved:
            return entry | {"why": "the policy has not moved, so this batch does not count."}, None
        named = {f"{number}/{name}": x for number, part in enumerate(seen) for name, x in part.items()}
        files.atomic_write_bytes(data_path(self.folder, step), save(named))
        steps = [*(entry["step"] for entry in self.history if entry["tokens"]), step]
        sample = read_sample(self.folder, steps[1:] or steps)
        entry["tokens"] = sample.tokens
        try:
            found = solve(self.rules.make(), self.names, sample, self.settings.target)
        except Unreachable as problem:
            text = f"calibration.target={self.settings.target:g} cannot be reached. {problem}"
            return entry | {"why": text}, text if len(steps) >= self.settings.steps else None
        return entry | {"thresholds": found.thresholds, "share": rounded(found.share)}, None


def _joined(parts: Sequence[Part]) -> Part:
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def show(thresholds: Mapping[str, float]) -> str:
    """ "delta=0.0812 delta_b=0.0101"."""
    return " ".join(f"{name}={value:.4g}" for name, value in thresholds.items())


# ---------------------------------------------------------------------------------------------------------- the files


def data_path(folder: str | Path, step: int) -> Path:
    """Where the tokens of a batch lie: calibration/step-000001.safetensors."""
    return Path(folder) / DATA_FOLDER / f"step-{step:06d}.safetensors"


def read_sample(folder: str | Path, steps: Sequence[int]) -> Sample:
    """The tokens of some batches of a run, every update of every batch with the same weight.

    Raises
    ------
    UserError : a file is missing or cannot be read.
    """
    parts: list[Part] = []
    for step in steps:
        path = data_path(folder, step)
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
    whole = _joined(parts)
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
    files.atomic_write_json(folder / CALIBRATION_FILE, record)


def read_calibration(folder: str | Path) -> dict[str, Any] | None:
    """`calibration.json` of a run; None: it has none.

    Raises
    ------
    UserError : the file cannot be read.
    """
    path = Path(folder) / CALIBRATION_FILE
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
    for path in (root / DATA_FOLDER).glob("step-*.safetensors"):
        number = path.stem.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            path.unlink()
    record = read_calibration(root)
    if record is None:
        return
    history = [entry for entry in record["history"] if entry["step"] <= step]
    if not history:
        (root / CALIBRATION_FILE).unlink()
    elif history != record["history"]:
        write_calibration(root, record["rule"], record["target"], record["steps"], history)


def rule_of_run(folder: str | Path) -> TrustRegion:
    """The rule of a run with the thresholds that it has found.

    Raises
    ------
    UserError : there is no run, or its thresholds are not known yet.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no folder of a run: it has no config.yaml.")
    config = load_config(path)
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
