"""`python -m cppo.study.warmup CONFIG`: the warm-up of a run and nothing else, for the runs of a study that share it.

Leaves `<output_dir>/warmup/model`. Started again after a kill it goes on from its newest checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from cppo import files
from cppo.config.load import load_config
from cppo.errors import StopError, UserError
from cppo.runs.folder import RunFolder
from cppo.runs.prepare import latest_state, versions
from cppo.show.progress import RunProgress
from cppo.tasks import make_task
from cppo.training.callbacks import StopRequest
from cppo.training.processes import start_processes
from cppo.training.run import Interrupted, Run


def main(path: Path) -> int:
    """Warm up the model of the configuration in `path`; returns the exit status."""
    config = load_config(path)
    folder = Path(str(config.output_dir))
    disable_progress_bar()  # transformers' own, for each file it writes
    start_processes()
    task = make_task(config.task.name, **config.task.options)
    files.remove_temporaries(folder)
    if not RunFolder(folder).exists:
        files.atomic_write_json(RunFolder(folder).versions_file, versions())
        files.atomic_write_text(RunFolder(folder).config_file, config.to_yaml())
    progress = RunProgress(Console(), plain=True)
    stop = StopRequest(lambda: progress.note("Stopping, with a checkpoint."))
    try:
        with progress, stop:
            run = Run(config, task, folder, progress, stop)
            latest_state(folder, run.checkpoints, run.warmup_checkpoints)
            run.warm_up()
    except Interrupted:
        return 130
    except (UserError, StopError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
