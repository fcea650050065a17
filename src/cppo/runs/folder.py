"""`RunFolder`: what lies in the folder of a run, every name and every reader. Schemas: docs/runs.md.

Nothing else spells these names. Reading needs neither torch nor a training library.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cppo import files
from cppo.config import yaml_io
from cppo.errors import UserError

#: Bytes at the end of metrics.jsonl in which the newest step is looked for.
TAIL = 65536


class RunFolder:
    """The folder of one run, whatever of it is there.

    path : the folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # -- names ---------------------------------------------------------------------------------------------------

    @property
    def config_file(self) -> Path:
        return self.path / yaml_io.CONFIG_FILE

    @property
    def versions_file(self) -> Path:
        return self.path / "versions.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def positions_file(self) -> Path:
        return self.path / "positions.jsonl"

    @property
    def certificates_file(self) -> Path:
        return self.path / "certificates.jsonl"

    @property
    def problems_file(self) -> Path:
        return self.path / "problems.jsonl"

    @property
    def calibration_file(self) -> Path:
        return self.path / "calibration.json"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.md"

    @property
    def samples_folder(self) -> Path:
        return self.path / "samples"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def warmup(self) -> Path:
        return self.path / "warmup"

    @property
    def warmup_model(self) -> Path:
        """The policy after the warm-up; there once that is done."""
        return self.warmup / "model"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def samples_file(self, step: int) -> Path:
        """Sampled responses of a step: samples/step-000010.jsonl."""
        return self.samples_folder / f"step-{step:06d}.jsonl"

    def calibration_data(self, step: int) -> Path:
        """Tokens that a calibration has seen: calibration/step-000001.safetensors."""
        return self.path / "calibration" / f"step-{step:06d}.safetensors"

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        """Whether a run lies here."""
        return self.config_file.is_file()

    def finished(self, steps: int) -> bool:
        """Whether the policy of the last of `steps` has been evaluated: then every figure of the run is there."""
        return self.newest_step("evaluation") == steps

    def newest_step(self, kind: str = "train") -> int | None:
        """The last step that metrics.jsonl has a row of this kind for; None: none. Reads the end of the file only."""
        try:
            with open(self.metrics_file, "rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
                lines = stream.read().split(b"\n")
        except OSError:
            return None
        for line in reversed(lines):
            with contextlib.suppress(ValueError, TypeError, KeyError):  # the first and the last may be torn
                row = json.loads(line)
                if row["kind"] == kind:
                    return int(row["step"])
        return None

    def policy(self) -> Path | None:
        """The best policy, else the newest checkpoint, else None."""
        found = sorted(self.best.glob("step-*")) or sorted(self.checkpoints.glob("step-*"))
        return found[-1] if found else None

    def saved(self) -> list[Path]:
        """Every policy that can be loaded: checkpoints, then the best."""
        return [*sorted(self.checkpoints.glob("step-*")), *sorted(self.best.glob("step-*"))]

    # -- readers -------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """config.yaml as plain types.

        Raises
        ------
        UserError : it is missing, cannot be read, or holds no settings.
        """
        try:
            raw = yaml_io.read(self.config_file)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.config_file} cannot be read: {error}") from error
        if not isinstance(raw, dict):
            raise UserError(f"{self.config_file} holds no configuration of a run.")
        return raw

    def versions(self) -> dict[str, Any]:
        """versions.json; {} where there is none that can be read."""
        try:
            found = json.loads(self.versions_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl (of one `kind`: "train", "warmup", "evaluation"), oldest first; [] without any."""
        return [row for row in files.read_jsonl(self.metrics_file) if kind is None or row.get("kind") == kind]

    def positions(self) -> list[dict[str, Any]]:
        """The rows of positions.jsonl, oldest first; [] without any."""
        return files.read_jsonl(self.positions_file)

    def certificates(self) -> list[dict[str, Any]]:
        """The rows of certificates.jsonl, oldest first; [] without any."""
        return files.read_jsonl(self.certificates_file)

    def sample_files(self) -> list[Path]:
        """The files of sampled responses, oldest first."""
        return sorted(self.samples_folder.glob("step-*.jsonl"))

    def samples(self, step: int | None = None) -> list[dict[str, Any]]:
        """The sampled responses of `step`, or of the last step that has any; [] without any."""
        for path in reversed(self.sample_files()):
            if (step is None or path == self.samples_file(step)) and (rows := files.read_jsonl(path)):
                return rows
        return []

    def problems(self) -> dict[int, dict[str, list[float]]]:
        """step -> benchmark -> mean score of each held-out problem; {} for a run that has none.

        Raises
        ------
        UserError : a row before the last that is not JSON, or has another shape.
        """
        found = {}
        for row in files.read_jsonl(self.problems_file):
            try:
                scores = {str(name): list(map(float, values)) for name, values in row["scores"].items()}
                found[int(row["step"])] = scores
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{self.problems_file}: a row without step and scores by benchmark ({error!r}): {row}."
                ) from error
        return found

    # -- writers -------------------------------------------------------------------------------------------------

    def append_metrics(self, *rows: Mapping[str, Any]) -> None:
        """Append rows to metrics.jsonl; NaN and infinity become null.

        A row needs "step" (int >= 0), "update" (int) and "kind"; everything else is flat numbers, text or null.

        Raises
        ------
        ValueError : one of these keys is missing. files.DiskFullError : no room.
        """
        for row in rows:
            missing = [key for key in ("step", "update", "kind") if key not in row]
            if missing:
                raise ValueError(
                    f"A row of metrics without {', '.join(map(repr, missing))} cannot be resumed or plotted; got the "
                    f"keys {sorted(row)}. Give step, update and kind."
                )
        files.append_jsonl(self.metrics_file, *rows)

    def append_problems(self, step: int, samples: int, scores: Mapping[str, Sequence[float]]) -> None:
        """Append the evaluation of `step`; `scores`: benchmark -> mean over `samples` responses for each problem."""
        row = {"step": step, "samples": samples, "scores": {name: list(values) for name, values in scores.items()}}
        files.append_jsonl(self.problems_file, row)

    # -- cutting back --------------------------------------------------------------------------------------------

    def keep_problems(self, steps: Collection[int]) -> None:
        """Drop the scores of all evaluations but these: those that metrics.jsonl has. A kill between the two files
        leaves one that is made again.
        """
        files.truncate_after(self.problems_file, -1, keep=lambda row: row["step"] in steps)

    def truncate_records(self, step: int) -> None:
        """Cut positions, certificates and samples back to `step` (resume from the checkpoint of `step`)."""
        for path in (self.positions_file, self.certificates_file):
            files.truncate_after(path, step)
        for path in self.sample_files():
            number = path.stem.removeprefix("step-")
            if number.isdigit() and int(number) > step:
                path.unlink()
