"""Processes without the seconds that importing torch, transformers and TRL takes: forks of one that has done it.

    subprocess.run([python(), "-m", "cppo.cli", "train", ...])

What runs in a fork starts as ``python <arguments>`` does: the same environment, folder, streams and ``__main__``, and
an exit code of its own. Only modules are there already, imported under the environment of the tests. Anything but a
module or a file (``-c``, further options) is a new interpreter.
"""

from __future__ import annotations

import array
import ast
import atexit
import contextlib
import functools
import gc
import importlib
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: What `cppo train` imports, sooner or later.
MODULES = ("cppo.training.run", "torch.distributed.run", "matplotlib.pyplot", "tokenizers", "datasets")

#: What is read at the start of a process or of a library. A hash seed of its own makes a new interpreter.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}


@functools.cache
def python(*modules: str) -> str:
    """In place of `sys.executable`; the process behind it starts with the first call and ends with this process.

    modules : what it imports, by default what `cppo train` does.
    """
    folder = Path(tempfile.mkdtemp(prefix="forks"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    client = (HERE / "forked_python.py").read_text(encoding="utf-8").partition("\n")[2]
    (folder / "python").write_text(f"#!{sys.executable} -IS\n{client}", encoding="utf-8")
    (folder / "python").chmod(0o755)
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    server = subprocess.Popen(
        [sys.executable, "-m", "forks", str(folder / "socket"), *(modules or MODULES)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        stdin=subprocess.PIPE,  # its end is our end
    )
    until = time.monotonic() + 120
    while not (folder / "socket").exists():
        assert server.poll() is None and time.monotonic() < until, "importing for the forks failed"
        time.sleep(0.02)
    return str(folder / "python")


def serve(path: str, modules: Sequence[str], watched: int | None = None) -> None:
    """Import, listen at `path` (which appears when all is imported), fork. Ends when `watched` ends, or killed."""
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):  # environments of other engines have no TRL
            importlib.import_module(module)
    for lazy in ("AutoModelForCausalLM", "AutoTokenizer", "Qwen3ForCausalLM", "Trainer"):
        getattr(sys.modules.get("transformers"), lazy, None)
    gc.collect()
    gc.freeze()  # the forks' garbage collections leave shared pages alone
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".part")
    listener.listen(64)
    os.rename(path + ".part", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
    while True:
        ready, _, _ = select.select([listener, *([] if watched is None else [watched])], [], [])
        if listener not in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os._exit(supervise(connection))
        connection.close()


def supervise(connection: socket.socket) -> int:
    """Fork once more, into the worker; pass signals and its exit code on, and kill it where the caller is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, rights, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(12))
    streams = array.array("i", rights[0][2])
    size = struct.unpack("!I", header)[0]
    text = b""
    while len(text) < size:
        text += connection.recv(size - len(text))
    worker = os.fork()
    if worker == 0:
        connection.close()
        become(streams, *ast.literal_eval(text.decode()))
    for stream in streams:
        os.close(stream)
    watched = os.pidfd_open(worker)
    while watched not in select.select([watched, connection], [], [])[0]:
        sent = connection.recv(1)
        os.kill(worker, sent[0] if sent else signal.SIGKILL)  # nothing: the caller is gone
        if not sent:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    connection.send(struct.pack("!i", code))
    return 0


def become(
    streams: array.array[int], arguments: list[str], environment: dict[str, str], folder: str, executable: str | None
) -> None:
    """Be ``python <arguments>``. Does not return."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    hash_seed = os.environ.get("PYTHONHASHSEED")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    while arguments[0] == "-u":
        arguments = arguments[1:]
    option = arguments[0] != "-m" and arguments[0].startswith("-")
    if option or environment.get("PYTHONHASHSEED", hash_seed) != hash_seed:
        os.execv(sys.executable, [sys.executable, *arguments])
    sys.executable = executable or sys.executable
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    code: int | str | None = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path[:1] = [folder, *added]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[:1] = [os.path.dirname(os.path.abspath(arguments[0])), *added]
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:], watched=0)
