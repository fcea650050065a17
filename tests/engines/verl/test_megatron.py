"""The logits hook in the layouts of verl's Megatron engine: vocabulary split over two ranks, rows over two ranks.

verl's own `preprocess_thd_engine` and Megatron-Core's process groups are real, over gloo on the CPU. What is not: a
Megatron model and its engine, which need GPUs; here the logits are given.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl.trainer", reason="verl is not installed here: make setup-verl")

# Beside the environment, not in it: verl would load its Megatron engine in every process of every test.
MEGATRON = Path(sys.prefix) / "megatron"


@pytest.mark.skipif(
    not MEGATRON.is_dir() and importlib.util.find_spec("megatron") is None,
    reason="Megatron-Core is not installed here: make setup-verl",
)
def test_vocabulary_and_context_parallel_rows() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [str(MEGATRON), str(Path(__file__).parent / "support"), str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(f for f in folders if f), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    worker = str(Path(__file__).parent / "support" / "megatron_worker.py")
    processes = [
        subprocess.Popen(
            [sys.executable, worker],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
        assert "tensor parallel: 25 rows agree" in output, output[-3000:]  # every rank has every row
    shares = [int(n) for output in outputs for n in re.findall(r"context parallel: (\d+) rows agree", output)]
    assert len(shares) == 2 and sum(shares) == 25, shares  # each rank its own
