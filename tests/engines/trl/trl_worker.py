"""One of two gloo processes: started by `test_trl_runs.py`; writes what it saw as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from engines.trl.trl_setup import drift, gradients, make, mixed_reward, trainer


def joint(run: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The minibatches of all processes as one: padded to a common width (prompts on the left) and concatenated."""
    together = {}
    for key, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            together[key] = value
            continue
        if value.dim() > 1:
            value = run.accelerator.pad_across_processes(value, dim=1, pad_first=key.startswith("prompt"))
        together[key] = run.accelerator.gather(value)
    return together


def main(out: str, *kinds: str) -> None:
    for kind in kinds:
        Path(f"{out}.{kind}.{os.environ['RANK']}.json").write_text(json.dumps(report(kind)))


def report(kind: str) -> dict[str, Any]:
    # 18 responses per process in groups of 4: one group spans both processes.
    run = trainer(
        make("cppo", kind),
        reward=mixed_reward,
        per_device_train_batch_size=9,
        num_generations=4,
        steps_per_generation=2,
        max_steps=4,
        logging_steps=1,
        learning_rate=3e-3,
    )
    run.train()
    logs = [entry for entry in run.state.log_history if "trust/masked_fraction" in entry]
    fingerprint = [float(p.detach().double().norm()) for p in run.model.parameters()]

    # Gradients of DDP (averaged over processes) against one process on the joint minibatch.
    run.model.train()
    inputs = run._buffered_inputs[0]
    drift(run.model, 0.1)
    run.model_wrapped.zero_grad()
    distributed = run._compute_loss(run.model_wrapped, inputs)
    distributed.backward()
    averaged = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    whole = joint(run, inputs)
    single = gradients(run.model, run._compute_loss(run.model, whole))
    largest = max(float(g.abs().max()) for g in single.values())
    gap = max(float((single[name] - averaged[name]).abs().max()) for name in single) / largest
    return {
        "processes": run.accelerator.num_processes,
        "logs": [{k: v for k, v in entry.items() if k.startswith("trust/")} for entry in logs],
        "parameters": fingerprint,
        "gap": gap,
        "largest": largest,
        "rows": whole["completion_ids"].shape[0],
        "dropped": int((inputs["tool_mask"].sum(1) == 0).sum()) if "tool_mask" in inputs else 0,
        "finite": bool(distributed.isfinite()),
        # trust/... of the last two losses: distributed, then joint
        "masked": run._metrics["train"]["trust/masked_fraction"][-2:],
        "divergence": run._metrics["train"]["trust/divergence_mean"][-2:],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
