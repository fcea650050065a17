"""Checks over a group of gloo processes: `run_checks` starts one (`python -m gloo MODULE ...` on each rank)."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from forks import python

FOLDER = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_checks(modules: tuple[str, ...], processes: int) -> None:
    """`check(rank, size)` of each module (such as "core.shard_checks") on every rank of one group.

    A check fails by raising; what it returns must be the same on every rank.
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
        command = [python(), "-m", "gloo", *modules]
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
    assert len(set(outputs)) == 1, f"ranks differ in the last bits: {outputs}"


def main() -> None:
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        print(name, importlib.import_module(name).check(dist.get_rank(), dist.get_world_size()), flush=True)
    dist.barrier()
    os._exit(0)  # taken down in order, gloo's threads now and then abort the interpreter on their peers' goodbye


if __name__ == "__main__":
    main()
