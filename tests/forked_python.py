#!/usr/bin/env -S python -IS
"""`python`, where importing is what takes the time: the command line is handed to a process that has imported already.

Sends its arguments, environment, working folder and standard streams to the process of `forks.py` that listens at
CPPO_FORKS, or else at ``socket`` beside this file, passes signals on, and ends as the fork that runs them does. Where
it is killed, the fork is. With ``-I -S`` it imports next to nothing.
"""

import array
import os
import signal
import socket
import struct
import sys


def main() -> int:
    here = os.path.realpath(__file__)
    beside = os.path.join(os.path.dirname(here), "socket")
    path = os.environ.get("CPPO_FORKS", beside)
    request = repr((sys.argv[1:], dict(os.environ), os.getcwd(), here if path == beside else None)).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: connection.send(bytes([number])) and None)
    streams = array.array("i", [0, 1, 2])
    connection.sendmsg([struct.pack("!I", len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    connection.sendall(request)
    answer = connection.recv(4)
    code = struct.unpack("!i", answer)[0] if len(answer) == 4 else 70
    if code < 0:  # killed by this signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


sys.exit(main())
