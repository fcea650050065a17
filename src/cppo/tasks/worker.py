"""Scoring in another process, so that no model output can hang or crash a run.

Why a process: math-verify and reasoning_gym hand model output to sympy, and some of reasoning_gym's scorers to `eval`.
`\\boxed{9^{9^{9^9}}}` computes until the memory is full, `[sum(range(10**12))]` loops in C code that no Python time-out
interrupts, and deep nesting can overflow the stack. A process has limits of its own, and can be killed.

Requests and answers are JSON, one object per line. A `Worker` is started on first use, kept, and replaced when it ran
past the limit or died. It ends with this process, even if this process is killed: its input then closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cppo.errors import UserError
from cppo.tasks.base import MissingDependency

# Run by path, not by `-m`: importing the package would import torch, seconds and hundreds of megabytes a worker.
_PROGRAM = Path(__file__).parent / "worker_process"
_GRACE = 1.0  # seconds that the worker has beyond its own time limit to say so itself
_START_LIMIT = 120.0  # seconds; importing sympy from a cold network disk can take long

# PYTHONHASHSEED: some generators iterate over sets of strings. Threads: BLAS reserves memory a core.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Worker:
    """One helper process that answers requests one at a time.

    Args:
        handler: name of a module in `worker_process/`, whose `handle(request)` answers.
        time_limit: seconds a request, for requests that do not bring their own "limit".
        command: the program to run instead (tests).

    Attributes:
        timeouts: requests that were given up because of the time limit.
        crashes: times that the process died by itself.
    """

    def __init__(self, handler: str, time_limit: float = 5.0, command: Sequence[str] | None = None) -> None:
        if not time_limit > 0:
            raise UserError(f"time_limit={time_limit} is in seconds: set it above 0")
        self.time_limit = time_limit
        self.timeouts = 0
        self.crashes = 0
        self._command = list(command or (sys.executable, str(_PROGRAM), handler))
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the running helper, if any."""
        return self._process.pid if self._process else None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer, `{"value": ...}` or `{"failure": text}`; None if there was none in time, or only a crash.

        A request whose process died is sent once more: it may have been killed by something else.

        Raises:
            MissingDependency: the helper cannot import what it needs.
            RuntimeError: the helper does not start.
        """
        limit = request.get("limit", self.time_limit)
        line = json.dumps({**request, "limit": limit}).encode() + b"\n"  # ASCII: surrogates, NULs travel as escapes
        with self._lock:
            for _ in range(2):
                process = self._running()
                started = time.monotonic()
                answer = self._exchange(process, line, limit + _GRACE)
                if answer is not None and not answer.get("timeout"):
                    return answer
                if answer is not None or time.monotonic() - started >= limit:
                    self.timeouts += 1
                    return None
                self.crashes += 1
        return None

    def close(self) -> None:
        """End the process. The next `ask` would start another."""
        with self._lock:
            self._discard()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # after a fork: that process and its pipes belong to the parent
            self._process, self._owner = None, os.getpid()
        if self._process is not None and self._process.poll() is not None:
            self.crashes += 1
            self._discard()
        if self._process is None:
            self._process = self._start()
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,  # Ctrl-C is for the run, which then decides what to do
        )
        weakref.finalize(self, _end, process, os.getpid())  # also at exit
        greeting = self._exchange(process, b"", _START_LIMIT)
        if greeting is None:
            raise RuntimeError(f"the scoring process did not start: run it by hand to see why: {self._command}")
        if "missing" in greeting:
            raise MissingDependency(
                f"scoring needs the package {greeting['missing']!r}, which cannot be imported: "
                "run pip install 'cppo[tasks]'"
            )
        return process

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, limit: float) -> dict[str, Any] | None:
        """Send a line and read one; None if the process died, or was killed here at the limit."""
        assert process.stdin is not None and process.stdout is not None
        # A timer that kills, rather than a read with a time-out: it frees a blocked write, too, on every platform.
        timer = threading.Timer(limit, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:  # broken pipe
            answer = b""
        except BaseException:  # Ctrl-C: the answer would be taken for that of the next request
            self._discard(process)
            raise
        finally:
            timer.cancel()
        if not answer.endswith(b"\n"):
            self._discard(process)
            return None
        return json.loads(answer)

    def _discard(self, process: subprocess.Popen[bytes] | None = None) -> None:
        process = process or self._process
        if process is not None:
            _end(process, self._owner)
        self._process = None


class WorkerPool:
    """Up to `size` workers, each started when there is work for it. Thread-safe."""

    def __init__(
        self, handler: str, size: int = 1, time_limit: float = 5.0, command: Sequence[str] | None = None
    ) -> None:
        if size < 1:
            raise UserError(f"workers={size}: set it to at least 1")
        self.workers = [Worker(handler, time_limit, command) for _ in range(size)]
        # Last in, first out: requests that come one by one all go to one worker, and the others never start.
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self.workers:
            self._idle.put(worker)

    @property
    def timeouts(self) -> int:
        return sum(worker.timeouts for worker in self.workers)

    @property
    def crashes(self) -> int:
        return sum(worker.crashes for worker in self.workers)

    def ask(self, *steps: Mapping[str, Any]) -> dict[str, Any] | None:
        """As `Worker.ask`, by whichever worker is free. Several steps go to the same worker; the last is answered."""
        worker = self._idle.get()
        try:
            return [worker.ask(step) for step in steps][-1]
        finally:
            self._idle.put(worker)

    def ask_many(self, jobs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any] | None]:
        """The answers to jobs, each the steps of an `ask`, in their order."""
        if len(self.workers) == 1 or len(jobs) < 2:
            return [self.ask(*steps) for steps in jobs]
        with ThreadPoolExecutor(len(self.workers)) as threads:
            return list(threads.map(lambda steps: self.ask(*steps), jobs))

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.close()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()
    process.wait()
