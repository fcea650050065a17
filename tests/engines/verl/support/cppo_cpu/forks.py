"""A process that imports verl once, and forks for every command line that `forked_python.py` hands over.

    python -m cppo_cpu.forks SOCKET

What runs in a fork starts as ``python <arguments>`` does: the same environment, folder, streams and ``__main__``. Only
modules are there already, imported under the environment that this process was started with.
"""

from __future__ import annotations

import array
import ast
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import struct
import sys


def serve(path: str) -> None:
    """Import, listen at `path` (which appears when all is imported), fork. Ends when it is killed."""
    # Ray's C++ part reads these two when it is imported, and never again. The first job of a cluster has this number;
    # workers that watch this process instead of Ray's daemon are killed by whoever started the run.
    os.environ |= {"RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": str(os.getpid())}
    # What verl's processes import sooner or later. By name: nothing here uses them.
    for module in ("verl.trainer.main_ppo", "verl.trainer.ppo.v1", "datasets", "peft", "transformers"):
        importlib.import_module(module)
    for lazy in ("AutoModelForCausalLM", "AutoTokenizer", "Qwen3ForCausalLM"):
        getattr(sys.modules["transformers"], lazy)
    gc.collect()
    gc.freeze()  # the forks' garbage collections leave shared pages alone
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".part")
    listener.listen(64)
    os.rename(path + ".part", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os._exit(supervise(connection))
        connection.close()


def supervise(connection: socket.socket) -> int:
    """Fork once more, into the worker; pass its exit code on, and kill it where the caller is gone."""
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
    ready, _, _ = select.select([watched, connection], [], [])
    if watched not in ready:  # nothing is ever sent: the caller is gone
        os.kill(worker, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    connection.send(struct.pack("!i", code if code >= 0 else 128 - code))
    return 0


def become(streams: array.array[int], arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Be ``python <arguments>``. Does not return."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    code: int | str | None = 0
    try:
        while arguments[0] == "-u":
            arguments = arguments[1:]
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        import traceback

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
    serve(sys.argv[1])
