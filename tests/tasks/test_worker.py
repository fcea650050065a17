"""The helper process, with real processes: it is killed, it dies, it is gone with its parent."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cppo.tasks import MissingDependency
from cppo.tasks.worker import Worker, WorkerPool

ECHO = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("sleep"): time.sleep(request["sleep"])
    if request.get("die"): os._exit(1)
    print(json.dumps({"value": request.get("text"), "pid": os.getpid()}), flush=True)
"""


@pytest.fixture
def worker():
    worker = Worker("", time_limit=0.5, command=[sys.executable, "-c", ECHO])
    yield worker
    worker.close()


def test_text_survives_the_way_there_and_back(worker):
    for text in ("", "\x00", "\ud800 lone surrogate", 'new\nlines "quotes"', "1" * 1_000_000):
        assert worker.ask({"text": text})["value"] == text


def test_a_sleeper_is_killed_counted_and_replaced(worker):
    first = worker.ask({"text": "a"})["pid"]
    started = time.monotonic()
    assert worker.ask({"text": "b", "sleep": 60}) is None
    assert time.monotonic() - started < 30
    assert (worker.timeouts, worker.crashes) == (1, 0)
    reply = worker.ask({"text": "c"})
    assert reply["value"] == "c" and reply["pid"] != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_killed_worker_recovers_and_answers(worker):
    worker.ask({"text": "a"})
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.ask({"text": "b"})["value"] == "b"
    assert (worker.timeouts, worker.crashes) == (0, 1)


def test_a_request_that_kills_its_worker_twice_is_given_up(worker):
    assert worker.ask({"die": True}) is None
    assert (worker.timeouts, worker.crashes) == (0, 2)
    assert worker.ask({"text": "c"})["value"] == "c"


def test_an_interrupted_request_does_not_answer_the_next(worker):
    worker.ask({"text": "started"})
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        worker.ask({"text": "old", "sleep": 0.4})
    assert worker.ask({"text": "new"})["value"] == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_limited():
    worker = Worker("math_judge")
    worker.ask({"completion": "", "answer": "1"})
    with open(f"/proc/{worker.pid}/limits") as file:
        (line,) = (line for line in file if line.startswith("Max address space"))
    worker.close()
    assert int(line.split()[3]) == 4 << 30


def test_a_program_that_cannot_start_says_so():
    with pytest.raises(RuntimeError, match="did not start: run it by hand"):
        Worker("", command=[sys.executable, "-c", "raise SystemExit(3)"]).ask({})


def test_a_missing_package_names_the_extra():
    with pytest.raises(MissingDependency, match=r"'no_such_handler'.*pip install 'cppo\[tasks\]'"):
        Worker("no_such_handler").ask({})


def test_workers_start_only_when_needed_and_order_is_kept():
    pool = WorkerPool("", 3, 5.0, command=[sys.executable, "-c", ECHO])
    for text in "abc":
        pool.ask({"text": text})
    assert sum(worker.pid is not None for worker in pool.workers) == 1
    replies = pool.ask_many([[{"text": str(i), "sleep": 0.05}] for i in range(12)])
    assert [reply["value"] for reply in replies] == [str(i) for i in range(12)]
    assert len({reply["pid"] for reply in replies}) == 3
    pids = [worker.pid for worker in pool.workers]
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_parent_leaves_no_worker_even_one_that_computes():
    """The worker is in a loop in C, which no Python signal handler interrupts, when its parent is killed."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from cppo.tasks.worker import Worker; w = Worker('gym_host', 1.5)\n"
            "entry = {'generator': 'spiral_matrix', 'config': {}, 'seed': 0, 'index': 0}\n"
            "w.ask({'do': 'entry', **entry}); print(w.pid, flush=True)\n"
            "w.ask({'do': 'score', **entry, 'answer': '[sum(range(10**13))]'})",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and _runs(worker):
        time.sleep(0.1)
    left = _runs(worker)
    if left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
