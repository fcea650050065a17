"""What this folder adds to verl's registries, and the recorder of updates."""

from __future__ import annotations

from verl.workers.rollout import base, replica

from cppo_cpu import record


def _replica() -> type[replica.RolloutReplica]:
    from cppo_cpu.rollout import CPUReplica

    return CPUReplica


base._ROLLOUT_REGISTRY["cpu", "async"] = "cppo_cpu.rollout.ServerAdapter"
replica.RolloutReplicaRegistry.register("cpu", _replica)
record.install()
