"""One of two processes whose gradients are shards of one model's: only rank 1 holds the infinite part."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from cppo.runs.checkpoints import Checkpoints
from cppo.training.callbacks import NonFiniteGuard
from cppo.training.processes import start_processes

rank = start_processes().process_index
model = torch.nn.Linear(3, 1)
guard = NonFiniteGuard(Checkpoints(Path(sys.argv[1])))
for bad in (True, False):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf") if bad and rank == 1 else 0.5)
    guard.on_pre_optimizer_step(None, SimpleNamespace(global_step=0), None, model=model)
    assert guard.last is bad
    assert all((parameter.grad is None) is bad for parameter in model.parameters())
assert (guard.skipped, guard.in_a_row) == (1, 0)
