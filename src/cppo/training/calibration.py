"""`rule.delta: auto` in a run: thresholds from its first rollout batches, recorded, and the same after a resume.

* Batch 1 runs with the rule's defaults. At the end of each of the first `calibration.steps` batches the thresholds are
  solved anew (`cppo.thresholds.solve`) and used from the next batch on; those of the last of these batches
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

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save

from cppo import files
from cppo.config.load import Config
from cppo.errors import UserError
from cppo.files import rounded
from cppo.rules import TrustRegion, Verdict
from cppo.runs.calibration import (
    Part,
    is_final,
    joined,
    latest_thresholds,
    read_calibration,
    read_sample,
    sample_of,
    show,
    write_calibration,
)
from cppo.runs.folder import RunFolder
from cppo.thresholds import Unreachable, solve
from cppo.tokens import TokenBatch
from cppo.training.processes import from_all, from_main

#: Loss tokens that are kept in all, over batches, updates and processes (16 bytes each).
MAX_TOKENS = 1 << 18


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
                f"{RunFolder(folder).calibration_file} is missing: the thresholds with which this run came to step "
                f"{step} are not known. Restore it, or begin a new run."
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
        mine = {update: joined(parts) for update, parts in sorted(self._parts.items())}
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
        seen = [joined([parts[update] for parts in gathered if update in parts]) for update in updates]
        seen = [part for part in seen if part["lengths"].numel()]
        entry: dict[str, Any] = {"step": step, "tokens": 0, "thresholds": None, "share": None}
        if not seen:
            return entry | {"why": "no token was trained on, so this batch does not count."}, None
        if not sample_of(seen).moved:
            return entry | {"why": "the policy has not moved, so this batch does not count."}, None
        named = {f"{number}/{name}": x for number, part in enumerate(seen) for name, x in part.items()}
        files.atomic_write_bytes(RunFolder(self.folder).calibration_data(step), save(named))
        steps = [*(entry["step"] for entry in self.history if entry["tokens"]), step]
        sample = read_sample(self.folder, steps[1:] or steps)
        entry["tokens"] = sample.tokens
        try:
            found = solve(self.rules.make(), self.names, sample, self.settings.target)
        except Unreachable as problem:
            text = f"calibration.target={self.settings.target:g} cannot be reached. {problem}"
            return entry | {"why": text}, text if len(steps) >= self.settings.steps else None
        return entry | {"thresholds": found.thresholds, "share": rounded(found.share)}, None


# ---------------------------------------------------------------------------------------------------------- the files
