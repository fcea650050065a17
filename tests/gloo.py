"""Start a test's worker module as a group of gloo processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_workers(module: str, processes: int) -> None:
    """Run ``module`` (such as "core.shard_worker") once a rank.

    Each must exit with 0 and print the same line "all equal ...".
    """
    port = free_port()
    workers = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path]),
        }
        command = [sys.executable, "-m", module]
        workers.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    failed = [f"rank {r}:\n{outputs[r]}" for r, worker in enumerate(workers) if worker.returncode != 0]
    assert not failed, "\n".join(failed)  # all of them: where one fails, the others lose their connection
    digests = {next(line for line in output.splitlines() if line.startswith("all equal")) for output in outputs}
    assert len(digests) == 1, f"ranks differ in the last bits: {digests}"
