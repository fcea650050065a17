"""Compiles the Triton kernels for GPUs that are not here, as `triton_backend` launches them; prints a JSON line each.

The interpreter accepts much that the compiler refuses. Nothing is run: kernels are compiled to machine code and their
results stay unset.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped]
from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found,import-untyped]
from triton.runtime.driver import driver  # type: ignore[import-not-found,import-untyped]

from cppo.scoring import triton_backend
from cppo.scoring.logits import LogitMap, Operands
from cppo.scoring.triton_backend import backward, exact_partial, forward

#: compute capability, dtype, and whether bias, softcap and one temperature a row are given
TARGETS = ((90, torch.bfloat16, False), (100, torch.bfloat16, True), (80, torch.float32, True))
KERNELS = ("forward_kernel", "top_kernel", "gradient_kernel", "divergence_kernel")


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """In place of a kernel: a launch compiles and reports."""

    def __init__(self, kernel: Any, what: str) -> None:
        self.kernel, self.what = kernel, what

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            ptx = compiled.asm["ptx"]
            names = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "fma.rn.f32", "cp.async.bulk.tensor")
            report: dict[str, Any] = {name: ptx.count(name) for name in names}
            report |= {"target": self.what, "kernel": self.kernel.__name__}
            report |= {"shared": compiled.metadata.shared, "stack": stack_bytes(compiled.asm["cubin"])}
            print(json.dumps(report), flush=True)

        return launch


def stack_bytes(cubin: bytes) -> int:
    """A thread's stack: what did not fit into registers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", output)
    assert found, output
    return int(found[1])


def main() -> None:
    originals = {name: getattr(triton_backend, name) for name in KERNELS}
    triton_backend._check = lambda *_: None  # the tensors are on the CPU
    tokens, d, vocabulary = 48, 128, 1024
    for capability, dtype, every in TARGETS:
        driver.set_active(AbsentGpu(capability))
        blocks = triton_backend._gpu_blocks(capability // 10, dtype, 132)
        triton_backend.blocks_for = lambda *_, blocks=blocks: blocks  # type: ignore[misc]
        for name, kernel in originals.items():
            setattr(triton_backend, name, Compiled(kernel, f"sm_{capability} {str(dtype)[6:]}"))
        hidden, head = torch.zeros(tokens, d, dtype=dtype), torch.zeros(vocabulary, d, dtype=dtype)
        ids, zeros = torch.zeros(tokens, 21, dtype=torch.int64), torch.zeros(tokens)
        logits = LogitMap(torch.ones(tokens), torch.zeros(vocabulary), 30.0, 0.5) if every else LogitMap()
        options: dict[str, Any] = {"start": 0, "valid": vocabulary, "tile": (48, 512)}
        forward(hidden, head, ids, logits, entropy=True, top_k=20, **options)
        backward(hidden, head, ids[:, 0], zeros, zeros, logits, need=(False, False, True), **options)
        one = Operands(hidden, head, logits, zeros)
        exact_partial(one, one, kind="kl" if every else "tv", valid=vocabulary)


if __name__ == "__main__":
    main()
