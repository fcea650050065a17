"""`python`, for Ray: hand the command line over to a process that has imported verl already (`cppo_cpu/forks.py`).

Ray starts each worker with the runtime environment's ``py_executable``; a worker that imports verl needs 12 seconds of
CPU for it, and a run has nine of them. This script sends its arguments, environment, working folder and standard
streams to the process that listens at CPPO_FORKS, and ends with the exit code of the fork that runs them. Where it is
killed, the fork is. It runs with ``python -I -S``, so it imports next to nothing.
"""

import array
import os
import socket
import struct
import sys


def main() -> int:
    request = repr((sys.argv[1:], dict(os.environ), os.getcwd())).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["CPPO_FORKS"])
    streams = array.array("i", [0, 1, 2])
    connection.sendmsg([struct.pack("!I", len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    connection.sendall(request)
    code = connection.recv(4)
    return struct.unpack("!i", code)[0] if len(code) == 4 else 70


sys.exit(main())
