"""The Triton backend where there is no GPU: its results in Triton's interpreter, and that it compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton, in the version that torch names")

HERE = Path(__file__).parent


def run(*command: str, **environment: str) -> str:
    """Its output; triton reads its environment when it is imported, so each of these needs a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, *command],
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        cwd=HERE.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def test_results_in_the_interpreter() -> None:
    """triton_interpreted.py: everything that the kernels compute, against float64."""
    options = ("-q", "-x", "-W", "ignore", "-p", "no:xdist", "-p", "no:cacheprovider")
    output = run("-m", "pytest", *options, str(HERE / "triton_interpreted.py"), TRITON_INTERPRET="1")
    assert " passed" in output and "skipped" not in output, output[-2000:]


def test_kernels_compile(tmp_path: Path) -> None:
    """triton_compile.py: for Ampere, Hopper and Blackwell. bfloat16 goes to the tensor cores, float32 does not."""
    output = run("-m", "tests.scoring.triton_compile", TRITON_CACHE_DIR=str(tmp_path))
    reports = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    instruction = {"sm_90 bfloat16": "wgmma.mma_async", "sm_100 bfloat16": "tcgen05.mma", "sm_80 float32": "fma.rn.f32"}
    room = {"sm_90 bfloat16": 227, "sm_100 bfloat16": 227, "sm_80 float32": 99}
    kernels = {"forward_kernel", "top_kernel", "gradient_kernel", "divergence_kernel"}
    assert {(r["target"], r["kernel"]) for r in reports} == {(t, k) for t in instruction for k in kernels}
    for report in reports:
        assert report[instruction[report["target"]]] > 0, report
        assert report["shared"] <= room[report["target"]] * 1024, report
        if report["target"] == "sm_80 float32":  # TF32 would round the inputs
            assert report["mma.sync"] == 0, report
        if report["target"] == "sm_90 bfloat16":  # loads by the copy engine, and nothing falls out of the registers
            assert report["cp.async.bulk.tensor"] > 0 and report["stack"] == 0, report


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: the interpreter takes CPUs")
def test_a_cpu_is_refused() -> None:
    from cppo.scoring.logits import LogitMap
    from cppo.scoring.triton_backend import forward

    ids = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r'hidden is on cpu.*backend="torch"'):
        forward(
            torch.ones(2, 8), torch.ones(3, 8), ids, LogitMap(), start=0, valid=3, entropy=False, top_k=0, tile=(4, 4)
        )
