"""A fork is ``python <file> <arguments>`` with the caller's environment, folder and streams, and shares its end."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from forks import python

SCRIPT = """
import os, signal, sys, time
if __name__ == "__main__":
    print(sys.argv[1:], os.environ["WORD"], os.getcwd(), "torch" in sys.modules, sys.executable, flush=True)
    sys.stderr.write("err")
    if sys.argv[1] == "sleep":
        time.sleep(60)
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(sys.argv[1] if sys.argv[1] == "say" else int(sys.argv[1]))
"""


@pytest.fixture
def start(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*arguments: str) -> subprocess.Popen[str]:
        command = [python(), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env={"WORD": "w"}, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)

    return run


@pytest.mark.parametrize(
    ("argument", "code", "err"), [("3", 3, "err"), ("say", 1, "errsay\n"), ("die", -signal.SIGKILL, "err")]
)
def test_streams_and_exit_codes(start, tmp_path, argument, code, err):
    process = start("script.py", argument)
    out, errors = process.communicate(timeout=60)
    assert out == f"{[argument]} w {tmp_path} True {python()}\n"
    assert (process.returncode, errors) == (code, err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(start, number):
    process = start("script.py", "sleep")
    assert process.stdout.readline()
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    if number == signal.SIGINT:
        assert process.returncode == 1 and errors.endswith("KeyboardInterrupt\n")
    else:
        assert process.returncode == -number


def test_where_the_caller_is_killed_the_fork_is(start):
    process = start("script.py", "sleep")
    assert process.stdout.readline()
    process.kill()
    assert process.stdout.read() == ""  # the other end of the pipe is closed, by the fork, too


def test_code_and_options_get_an_interpreter(start):
    process = start("-I", "-c", "import sys; print('torch' in sys.modules); sys.exit(4)")
    assert process.communicate(timeout=60)[0] == "False\n" and process.returncode == 4
