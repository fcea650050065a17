"""The whole V1 trainer with a real vLLM on the CPU as its sampler: mu's top K straight from vLLM's sampler.

Two steps of two updates. That every row belongs to its token and its weights is computed again in plain transformers;
vLLM's CPU kernels round otherwise than torch's, which is the whole mismatch that may be left.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("verl.trainer", reason="verl is not installed here: make setup-vllm")
pytest.importorskip("vllm", reason="vLLM is not installed here: make setup-vllm")

from recompute import assert_recomputed, distributions
from test_trainer import LOSS, ROLLOUT, TARGET, assert_rows_belong, assert_trust, versions
from trainer_runs import Run, train

pytestmark = pytest.mark.vllm

#: vLLM made small. No sleep mode and no prefix cache on a CPU; its server keeps the weights where they are.
VLLM = {
    f"{ROLLOUT}.name": "vllm",
    f"{ROLLOUT}.dtype": "float32",
    f"{ROLLOUT}.enforce_eager": True,
    f"{ROLLOUT}.max_model_len": 96,
    f"{ROLLOUT}.max_num_seqs": 8,
    f"{ROLLOUT}.free_cache_engine": False,
    f"+{ROLLOUT}.enable_sleep_mode": False,
    f"{ROLLOUT}.enable_prefix_caching": False,
}
#: vLLM's float32 against torch's.
TOLERANCE = 2e-4


def test_top_k_from_the_sampler(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    rule = {"delta": 0.1, "delta_b": 0.01}
    overrides = (
        TARGET
        | VLLM
        | {
            "trainer.v1.trainer_mode": "cppo_sync",
            f"{LOSS}.loss_mode": "cppo",
            **{f"+{LOSS}.rule.{name}": value for name, value in rule.items()},
        }
    )
    modules = "cppo_vllm_plugin,cppo_verl_plugin"
    run = train(Run("vllm", overrides), tmp_path, tiny_model, sums, 900, modules=modules)
    assert_trust(run, steps=2, updates=2)
    for call in run.updates:
        found = assert_rows_belong(call, versions(run, tiny_model, 2, call), TOLERANCE)
        # synchronous: every response comes from the weights of its own step
        assert {version for row in found for version in row} == {call.update // 2}
        sampler = next(c for c in run.updates if c.update // 2 == call.update // 2).weights
        mu, pi = distributions(tiny_model, sampler, call), distributions(tiny_model, call.weights, call)
        assert_recomputed(call, mu, pi, "cppo", rule)
    drift = run.updates[0].metrics["actor/trust/first_update_divergence"][0]
    assert drift < 1e-4, f"divergence between vLLM and the trainer before the first step: {drift:.3g}"
    assert max(row["actor/trust/divergence_max"] for row in run.steps) > 100 * drift
