"""One way to score tokens in a process of its own: `benchmarks.scoring` starts it and tells it when to run.

    python -m benchmarks.scoring_worker METHOD N V d DTYPE

Prints one line of JSON when it is ready, and one for each line "run" that it reads: seconds (wall), cpu_seconds, and
the first time peak_bytes: by how much the peak resident set grew, in the forward pass or in the backward pass less the
gradients that it leaves behind, whichever is more. For that call glibc is told to return freed tensors at once; for the
others to do what it does by default (memory above 32 MiB is returned, below it is kept).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.scoring_methods import METHODS, Call, Inputs, make_inputs

#: glibc's M_MMAP_THRESHOLD
MMAP_THRESHOLD = -3
#: Tokens whose results are sent along, to be compared.
SHOWN = 16


def system_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {key} in /proc/self/status: the memory figures need Linux.")


def run(call: Call, x: Inputs, backward: bool, between: Callable[[], None] = lambda: None) -> torch.Tensor:
    """One call; gradients end up in `x.hidden.grad` and `x.lm_head.grad`. `between` is called before the backward."""
    x.hidden.grad = x.lm_head.grad = None
    if not backward:
        with torch.no_grad():
            return call()
    result = call()
    between()
    result.backward(x.gradient.to(result.dtype))
    return result.detach()


def main() -> None:
    name, (tokens, vocabulary, width), dtype = sys.argv[1], map(int, sys.argv[2:5]), getattr(torch, sys.argv[5])
    # results go where stdout went; what libraries print there does not
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    method = METHODS[name]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    small = make_inputs(16, 64, width, dtype, method.rollout)
    run(method.make(small), small, method.backward)  # lazy imports and thread pools are not the method's
    x = make_inputs(tokens, vocabulary, width, dtype, method.rollout, lead=method.lead)
    call = method.make(x)
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)

    def measure(peak: bool) -> dict[str, Any]:
        libc.mallopt(MMAP_THRESHOLD, 65536 if peak else 32 * 2**20)
        peaks: list[int] = []

        def note_peak() -> None:
            if peak:
                peaks.append(system_bytes("VmHWM"))
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here

        note_peak()
        before = system_bytes("VmRSS")
        began, cpu = time.perf_counter(), time.process_time()
        result = run(call, x, method.backward, note_peak)
        found: dict[str, Any] = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        if peak:
            note_peak()
            gradients = [p.grad for p in (x.hidden, x.lm_head) if p.grad is not None]
            left = sum(g.numel() * g.element_size() for g in gradients)
            forward, last = peaks[1], peaks[-1]
            found["peak_bytes"] = max(forward - before, last - before - left) if gradients else last - before
            found["values"] = result[:SHOWN].double().tolist()
            found["hidden_gradient"] = x.hidden.grad[:SHOWN].double().tolist() if gradients else None  # type: ignore[index]
            found |= x.notes
        return found

    answers.write(json.dumps({"ready": True}) + "\n")
    for count, _ in enumerate(sys.stdin):
        answers.write(json.dumps(measure(peak=count == 0)) + "\n")


if __name__ == "__main__":
    main()
