"""One engine in several gloo processes, each with its share of the tokens: for the contract's shards."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch

from core.cases import Response
from engines.contract import Outcome, Sample
from forks import python


def in_processes(
    function: Callable[[list[Sample], list[str]], list[Outcome]],
    samples: Sequence[Sample],
    cases: Sequence[str],
    size: int,
) -> list[Outcome]:
    """Run a module-level `function` in `size` gloo processes; gradients of the processes are added up.

    `function` sees all samples in every process and returns gradients of full length with zeros where it holds nothing.
    """
    target = f"{inspect.getmodule(function).__name__}:{function.__name__}"  # type: ignore[union-attr]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        request = [
            {"prompt": s.prompt, **{k: getattr(s.response, k) for k in ("policy", "rollout", "advantage", "mask")}}
            for s in samples
        ]
        torch.save({"samples": request, "cases": list(cases)}, Path(folder) / "request.pt")
        roots = [str(Path(__file__).parents[1]), *sys.path]
        environment = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(roots)}
        workers = [
            subprocess.Popen(
                [python(), "-m", "engines.contract_processes", target, folder],
                env={**environment, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            outputs = [worker.communicate(timeout=180)[0] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        for rank, (worker, output) in enumerate(zip(workers, outputs, strict=True)):
            assert worker.returncode == 0, f"rank {rank}:\n{output}"
        parts = [torch.load(Path(folder) / f"part{rank}.pt", weights_only=True) for rank in range(size)]
    out = []
    for of_case in zip(*parts, strict=True):
        assert all(part["denominators"] == of_case[0]["denominators"] for part in of_case)
        gradients = [sum(columns) for columns in zip(*(part["gradients"] for part in of_case), strict=True)]
        out.append(Outcome(gradients, of_case[0]["denominators"]))  # type: ignore[arg-type]
    return out


def _worker(target: str, folder: str) -> None:
    """One process of `in_processes`."""
    module, name = target.split(":")
    function = getattr(import_module(module), name)
    request = torch.load(Path(folder) / "request.pt", weights_only=True)
    samples = [
        Sample(Response(s["policy"], s["rollout"], s["advantage"], s["mask"]), s["prompt"]) for s in request["samples"]
    ]
    torch.distributed.init_process_group("gloo")
    outcomes = function(samples, request["cases"])
    rank = torch.distributed.get_rank()
    part = [{"gradients": o.gradients, "denominators": o.denominators} for o in outcomes]
    torch.save(part, Path(folder) / f"part{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _worker(*sys.argv[1:])
