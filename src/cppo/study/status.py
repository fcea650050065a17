"""Where the runs of a study stand, as their folders and logs tell it; and what the machine has for them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from cppo.runs.folder import RunFolder
from cppo.study.plan import Plan, PlannedRun

STATUS_FILE = "status.json"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs() -> int:
    """Runs at a time: one per GPU where there are any, else half of the cores."""
    return len(devices()) or max(1, cores() // 2)


def devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    import torch

    return list(map(str, range(torch.cuda.device_count())))


def finished(plan: Plan, run: PlannedRun) -> bool:
    """Whether nothing of a run is left to do."""
    folder = RunFolder(plan.folder_of(run))
    if run.variant is None:
        return folder.warmup_model.exists()
    # the summary comes last; alone it says little, for it can be written at any time (docs/runs.md)
    return folder.summary_file.exists() and folder.finished(run.config.steps)


def read_errors(folder: Path) -> dict[str, str]:
    """The last error line of each run that failed, by name."""
    try:
        errors = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))["errors"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {str(name): str(text) for name, text in errors.items()}


def last_error(text: str, status: int) -> str:
    """What went wrong, on one line: the last ``Error: ...``, else the last line, else what the status says."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    sentences = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    if status < 0:
        name = signal.Signals(-status).name if -status in list(signal.Signals) else f"signal {-status}"
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return (sentences or lines or [f"ended with status {status} and said nothing"])[-1]
