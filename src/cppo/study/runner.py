"""Run what a plan holds: processes in parallel, resumable, and one that fails does not stop the others.

* Every run is a process of its own (``cppo train``), so that it is an ordinary run and its memory goes with it.
* Finished runs are left alone, begun ones go on by ``cppo train --resume``, failed ones are tried again.
* `status.json` keeps what a run's own files do not: the last error of a run that failed.
* A lock on the study's folder, which the runs inherit, keeps a second study process out as long as any of them lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cppo import files
from cppo.errors import UserError
from cppo.runs.folder import RunFolder
from cppo.show.progress import RunProgress
from cppo.study.plan import Plan, PlannedRun
from cppo.study.status import STATUS_FILE, devices, finished, last_error, read_errors
from cppo.study.store import CONFIGS

LOCK_FILE = ".lock"
POLL = 0.5  # seconds between two looks at the processes


@dataclass
class _Process:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    slot: int
    log_start: int
    step: int


@dataclass
class Runner:
    """One pass over a plan: starts what is ready, `jobs` at a time, and keeps the books.

    jobs: processes at a time.  progress: shows steps of all runs, and what has failed.
    """

    plan: Plan
    jobs: int
    progress: RunProgress
    errors: dict[str, str] = field(default_factory=dict)
    _running: list[_Process] = field(default_factory=list)
    _lock: int = -1
    _training: bool = False  # whether a run has been started, and not only warm-ups
    _before: dict[str, str] = field(default_factory=dict)  # errors of an earlier pass, of runs not yet tried again

    def run(self) -> dict[str, str]:
        """Run everything that is not finished; the errors of the runs that failed, by name.

        Raises
        ------
        UserError : another process works on this study, or the folder was moved and has unfinished runs.
        KeyboardInterrupt : Ctrl-C; all runs have written a checkpoint, and `str()` says how to go on.
        """
        pending = [run for run in self.plan.runs if not finished(self.plan, run)]
        # a warm-up whose runs are all finished is not needed, even if someone has deleted it
        needed = {run.after for run in pending}
        pending = [run for run in pending if run.variant is not None or run.name in needed]
        self.errors, left = {}, {run.name for run in pending}
        self._before = {name: text for name, text in read_errors(self.plan.folder).items() if name in left}
        if not pending:
            self._write_status()
            return {}
        self._check_place(pending[0])
        with _locked(self.plan.folder) as self._lock, _terminated_as_interrupt():
            warmups = sum(run.variant is None for run in pending)
            if warmups:  # a phase of their own: they would spoil the estimate of the steps
                self.progress.start_phase("warm-up", warmups)
            self._training = False
            try:
                while pending or self._running:
                    self._start_ready(pending)
                    time.sleep(POLL)
                    self._look()
            except KeyboardInterrupt:
                self._stop()
                self._write_status()
                raise KeyboardInterrupt(
                    "Stopped; every run keeps its newest checkpoint. To go on: cppo "
                    f"{self.plan.kind} --resume {shlex.quote(str(self.plan.folder))}"
                ) from None
            except BaseException:  # such as a full disk: leave no processes behind
                self._stop()
                raise
            self._write_status()
        return self.errors

    def _check_place(self, run: PlannedRun) -> None:
        planned, found = Path(str(run.config.output_dir)), self.plan.folder_of(run).resolve()
        if planned != found:
            raise UserError(
                f"the study in {self.plan.folder} was made in {planned.parent.parent} and moved, and its unfinished "
                "runs are bound to their paths. Move it back to go on, or show what it has so far with --show."
            )

    def _done(self, run: PlannedRun) -> int:
        if finished(self.plan, run):
            return run.config.steps
        return min(RunFolder(self.plan.folder_of(run)).newest_step() or 0, run.config.steps)

    # -- processes ---------------------------------------------------------------------------------------------------

    def _start_ready(self, pending: list[PlannedRun]) -> None:
        for run in list(pending):
            if run.after in self.errors:
                pending.remove(run)
                self._failed(run, f"{run.after} failed: {self.errors[run.after]}")
            elif len(self._running) < self.jobs and (run.after is None or self._has_started_model(run)):
                pending.remove(run)
                self._start(run)

    def _has_started_model(self, run: PlannedRun) -> bool:
        if any(process.run.name == run.after for process in self._running):
            return False
        return any(other.name == run.after and finished(self.plan, other) for other in self.plan.runs)

    def _start(self, run: PlannedRun) -> None:
        self._before.pop(run.name, None)
        if run.variant is not None and not self._training:
            self._training = True
            total = sum(run.config.steps for run in self.plan.trained)
            self.progress.start_phase(self.plan.kind, total, done=sum(map(self._done, self.plan.trained)))
        folder, log = self.plan.folder_of(run), self.plan.log_of(run)
        if run.variant is not None and not RunFolder(folder).exists:
            shutil.rmtree(folder, ignore_errors=True)  # killed before it had written its configuration: nothing is lost
        command = self.command(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        slot = min(set(range(self.jobs)) - {process.slot for process in self._running})
        with open(log, "ab") as stream:
            stream.write(f"$ {shlex.join(['python', *command])}\n".encode())
            stream.flush()
            process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                start_new_session=True,  # Ctrl-C reaches the runs through `_stop` alone, once
                pass_fds=(self._lock,),
            )
            self._running.append(_Process(run, process, slot, stream.tell(), self._done(run)))

    def command(self, run: PlannedRun) -> list[str]:
        """Arguments of Python that begin a run or go on with it."""
        folder = self.plan.folder_of(run)
        config = str(self.plan.folder / CONFIGS / f"{run.name}.yaml")
        if run.variant is None:
            return ["-m", "cppo.study.warmup", config]
        begun = RunFolder(folder).exists
        return ["-m", "cppo.cli", "train", *(["--resume", str(folder)] if begun else [config])]

    def _environment(self, slot: int) -> dict[str, str]:
        threads = str(self.plan.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        found = {**os.environ, **dict.fromkeys(names, threads), "TERM": "dumb", "NO_COLOR": "1"}
        found["PYTHONUNBUFFERED"] = "1"
        if gpus := devices():
            found["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return found

    def _look(self) -> None:
        """Take note of what the processes have done since."""
        for process in list(self._running):
            status = process.process.poll()
            self._advance(process)
            if status is None:
                continue
            self._running.remove(process)
            if status == 0 and finished(self.plan, process.run):
                if process.run.variant is None and not self._training:
                    self.progress.advance(1)
                self.progress.note(f"{process.run.name}: done")
            else:
                self._failed(process.run, self._error_of(process, status))

    def _advance(self, process: _Process) -> None:
        if process.run.variant is None:
            return  # counted when it is done
        step = RunFolder(self.plan.folder_of(process.run)).newest_step() or 0
        if step > process.step:
            failed = {"failed": len(self.errors)} if self.errors else {}
            self.progress.advance(step - process.step, running=len(self._running), **failed)
            process.step = step

    def _error_of(self, process: _Process, status: int) -> str:
        with open(self.plan.log_of(process.run), "rb") as stream:
            stream.seek(process.log_start)
            return last_error(stream.read().decode("utf-8", errors="replace"), status)

    def _failed(self, run: PlannedRun, error: str) -> None:
        self.errors[run.name] = error
        self._write_status()
        self.progress.note(f"{run.name}: failed: {error} (all of it: {self.plan.log_of(run)})")

    def _write_status(self) -> None:
        files.atomic_write_json(self.plan.folder / STATUS_FILE, {"errors": {**self._before, **self.errors}})

    def _stop(self) -> None:
        """Ctrl-C: the runs finish their rollout batch and write a checkpoint; again: at once; a third time: killed."""
        if not self._running:
            return
        self.progress.note(
            f"Stopping: {len(self._running)} runs finish their rollout batch and write a checkpoint "
            "(Ctrl-C again: at once)."
        )
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    if number == signal.SIGKILL:
                        os.killpg(process.process.pid, number)
                    elif process.process.poll() is None:
                        process.process.send_signal(number)
            try:
                for process in self._running:
                    process.process.wait()
                return
            except KeyboardInterrupt:
                continue


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the study's lock; its descriptor. flock belongs to the open file, so processes that inherit it hold it."""
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process works on the study in {folder}, or runs of one that was killed are still going. Wait "
                "for it, or end it; --show prints what there is so far."
            ) from None
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """`kill` and a closed terminal do what Ctrl-C does, so that no runs are left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before: Any = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
