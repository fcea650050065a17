"""Answer JSON requests, one per line, within limits of time, memory and rights.

    out  {"ready": true} or {"missing": "package"}           once
    in   {"limit": seconds, ...}                             the rest is handed to HANDLER.handle
    out  {"value": ...}, {"timeout": true} or {"failure": "..."}

Limits, the gentle ones first: a signal after `limit` seconds ends the request; a second timer, which the kernel
enforces, kills the process where C code lets no signal handler run, so nothing is left computing even if the parent is
gone. While a request is handled, an audit hook refuses to write files, start programs or connect to anything: some
scorers `eval` what a model wrote. That hook stops accidents; it is not a sandbox against an adversary.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_MEMORY = 4 << 30  # bytes of address space
_REFUSED = ("os.", "shutil.", "subprocess.", "socket.", "pty.", "ctypes.", "signal.", "tempfile.", "urllib.", "ftplib.")
_ALLOWED = ("os.listdir", "os.scandir", "os.walk")  # what an import in the middle of a request does


class TimeLimit(BaseException):
    """Not an Exception, so that a library's `except Exception` does not swallow it."""


def serve(handler: str) -> None:
    """Answer requests until the input closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the answers

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()

    try:
        handle = importlib.import_module(handler).handle
    except ImportError as error:
        return send({"missing": error.name or str(error)})
    _limit_memory()
    guard = _Guard()
    sys.addaudithook(guard)
    send({"ready": True})
    for line in sys.stdin.buffer:
        send(_answer(handle, json.loads(line), guard))


def _answer(handle: Callable[[dict[str, Any]], Any], request: dict[str, Any], guard: _Guard) -> dict[str, Any]:
    # The order matters: timers are set before the guard is up (it refuses changes of signals) and unset after it.
    limit = request.pop("limit")
    try:
        _set_timers(limit)
        guard.active = True
        answer = {"value": handle(request)}
        json.dumps(answer)
    except TimeLimit:
        answer = {"timeout": True}
    except BaseException as error:  # MemoryError, RecursionError and SystemExit are answers, too
        answer = {"failure": f"{type(error).__name__}: {error}"[:500]}
    finally:
        guard.active = False
        _set_timers(0)
    return answer


class _Guard:
    """An audit hook (PEP 578) that refuses side effects while it is active."""

    active = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            _, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) if isinstance(flags, int) else True
            if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
                raise PermissionError("writing a file is refused while a model's output is scored")
        elif event.startswith(_REFUSED) and event not in _ALLOWED:
            raise PermissionError(f"{event} is refused while a model's output is scored")


def _on_alarm(number: int, frame: object) -> None:
    raise TimeLimit


def _set_timers(seconds: float) -> None:
    """Wall clock with a handler; processor time, one second later, with the default action, which is death."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _on_alarm)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        signal.setitimer(signal.ITIMER_PROF, seconds + 1 if seconds else 0)


def _limit_memory() -> None:
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass  # not on this platform: the time limit remains


if __name__ == "__main__":
    serve(sys.argv[1])
