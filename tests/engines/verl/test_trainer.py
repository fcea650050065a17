"""verl's whole V1 trainer under every rule: five starts, four of them with processes forked from one that has imported
verl (half a minute each on two cores, a minute otherwise).

Each update's log-probabilities, divergences, gradient, loss and metrics are computed again from the recorded weights
(`recompute.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl.trainer", reason="verl is not installed: make test-verl")

import torch
from recompute import assert_recomputed, close, distributions
from torch import Tensor
from trainer_runs import Forks, Result, Run, Update, train

import cppo

pytestmark = pytest.mark.e2e

TIMEOUT_S = 600
LOSS = "actor_rollout_ref.actor.policy_loss"
ROLLOUT = "actor_rollout_ref.rollout"
TARGET = {f"{LOSS}._target_": "cppo.engines.verl.config.TrustRegionLossConfig"}
#: Where mu's K likeliest tokens are compared between sampler and reference.
TOP_K = 20

#: Limits at which the second and third update of this model drop some tokens and keep others.
WITH_TOP_K: dict[str, dict[str, Any]] = {
    "cppo": {"delta": 0.15, "delta_b": 0.02},
    "dppo": {"delta": 0.04},
    "trm_max": {"delta": 0.008},
    "trm_avg": {"delta": 0.03, "divergence": "topk_tv"},
    "trm_max_avg": {"delta": 0.05, "delta_avg": 0.004},
}
WITHOUT: dict[str, dict[str, Any]] = {
    "none": {},
    "ppo_clip": {"eps_low": 0.05, "eps_high": 0.05},
    "cispo": {"ratio_min": 0.95, "ratio_max": 1.05},
    "minpro": {"eps_low": 0.1, "eps_high": 0.1},
    "cppo": {"delta": 0.02, "delta_b": 0.001, "budget": "fixed", "divergence": "binary_tv"},
    "dppo": {"delta": 0.0005, "divergence": "binary_kl"},
}
UPDATES = 3


def phases(rules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Overrides: a step of three updates under each rule."""
    first = next(iter(rules))
    losses = [f"{{loss_mode:{loss_mode(name)},rule:{mapping(parameters)}}}" for name, parameters in rules.items()]
    return TARGET | {
        "trainer.v1.trainer_mode": "phases",
        "+trainer.v1.losses": f"[{','.join(losses)}]",
        "trainer.total_training_steps": len(rules),
        "data.train_batch_size": 2 * UPDATES,
        f"{LOSS}.loss_mode": loss_mode(first),
        f"+{LOSS}.rule": mapping(rules[first]),
    }


def mapping(values: Mapping[str, Any]) -> str:
    """A mapping in hydra's notation."""
    return "{" + ",".join(f"{key}:{value}" for key, value in values.items()) + "}"


def loss_mode(rule: str) -> str:
    return "cppo" if rule == "cppo" else f"cppo_{rule}"


@pytest.fixture(scope="module")
def top_k_run(forks: Forks, tiny_model: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The rules with a divergence, over mu's top K, on packed sequences."""
    folder = tmp_path_factory.mktemp("runs")
    return train(Run("top_k", phases(WITH_TOP_K)), folder, tiny_model, sums, TIMEOUT_S, forks=forks)


@pytest.fixture(scope="module")
def padded_run(forks: Forks, tiny_model: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The rules of the ratio, and binary divergences, on padded sequences, two micro-batches an update."""
    changes = {
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
    }
    folder = tmp_path_factory.mktemp("runs")
    return train(Run("padded", phases(WITHOUT) | changes), folder, tiny_model, sums, TIMEOUT_S, forks=forks)


def test_all_rules_are_here() -> None:
    assert set(WITH_TOP_K) | set(WITHOUT) == set(cppo.RULES)


@pytest.mark.parametrize("rule", WITH_TOP_K)
def test_top_k(rule: str, top_k_run: Result, tiny_model: Path) -> None:
    step = list(WITH_TOP_K).index(rule)
    assert_step(top_k_run, step, rule, WITH_TOP_K[rule], tiny_model)


@pytest.mark.parametrize("rule", WITHOUT)
def test_padded(rule: str, padded_run: Result, tiny_model: Path) -> None:
    step = list(WITHOUT).index(rule)
    assert_step(padded_run, step, rule, WITHOUT[rule], tiny_model)


def assert_step(run: Result, step: int, rule: str, parameters: Mapping[str, Any], model: Path) -> None:
    """Three updates on one rollout batch: all that the loss did, and what the trainer logged of it."""
    calls = [call for call in run.updates if call.update // UPDATES == step]
    assert {call.update % UPDATES for call in calls} == set(range(UPDATES))
    sampler = calls[0].weights  # before the first optimizer step pi is mu
    changed = False
    for call in calls:
        mu, pi = distributions(model, sampler, call), distributions(model, call.weights, call)
        responses = assert_recomputed(call, mu, pi, rule, parameters)
        ratios = [
            (c, r.policy_logp[t] - r.rollout_logp[t])
            for r in responses
            for t, c in enumerate(r.expected.coefficient)
            if r.mask[t]
        ]
        changed |= any(abs(c - torch.tensor(d).exp().item()) > 1e-6 for c, d in ratios)
    assert changed == (rule != "none"), f"{rule} changed {'nothing' if rule != 'none' else 'something'}"
    logged = run.steps[step]
    for name in ("masked_fraction", "ratio_mean", *(["divergence_mean"] if rule in WITH_TOP_K else [])):
        values = [call.metrics[f"actor/trust/{name}"][0] for call in calls]
        assert logged[f"actor/trust/{name}"] == pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-8)
    first, *later = (call.metrics["actor/trust/ratio_max"][0] for call in calls)
    assert abs(first - 1) < 1e-4 < max(later) - 1
    if cppo.RULES[rule].divergence is not None:
        # In float32 on one machine: what is left is rounding.
        assert calls[0].metrics["actor/trust/first_update_divergence"][0] < 1e-5
        assert calls[-1].metrics["actor/trust/divergence_mean"][0] > 1e-4


def test_a_dump_of_a_run_is_inspected(padded_run: Result, tmp_path: Path) -> None:
    """`cppo inspect` on what the actor's loss saw: the same tokens are masked as the trainer logged."""
    from cppo.dumps.dump import read_dump, verl_rows, write_dump
    from cppo.dumps.inspect import inspect_dump

    update = list(WITHOUT).index("cppo") * UPDATES + UPDATES - 1
    calls = [call for call in padded_run.updates if call.update == update]
    rows = []
    for call in calls:
        names = {"responses", "response_mask", "advantages", "rollout_log_probs"}
        batch = {name: call.nested(f"data.{name}") for name in names}
        pi = torch.nested.nested_tensor(call.responses("out.log_probs"), layout=torch.jagged)
        rows += verl_rows(batch, policy_logp=pi, step=1, update=UPDATES - 1)
    write_dump(tmp_path / "dump.parquet", rows)
    dump = read_dump(tmp_path / "dump.parquet")
    assert dump.loss_tokens.sum() == calls[0].tokens
    found = inspect_dump(dump, [cppo.CPPO(**WITHOUT["cppo"])])
    assert found["divergence"]["name"] == "binary_tv"
    tokens = [int(call.tensors["data.response_mask"].sum()) for call in calls]
    masked = [call.metrics["actor/trust/masked_fraction"][0] for call in calls]
    expected = sum(m * n for m, n in zip(masked, tokens, strict=True)) / sum(tokens)
    assert 0 < expected == pytest.approx(found["rules"]["cppo"]["masked"], rel=1e-5)


# -- samplers: resumed generations, turns, separate replicas, servers without a top K ----------------------------------


def versions(run: Result, model: Path, updates_per_version: int, call: Update) -> list[list[Tensor]]:
    """The distributions at every response token under each version of the weights that a sampler has had."""
    first = {c.update // updates_per_version: c for c in reversed(run.updates)}
    return [distributions(model, first[version].weights, call) for version in sorted(first)]


def assert_rows_belong(call: Update, known: list[list[Tensor]], tolerance: float = 2e-5) -> list[list[int]]:
    """Every loss token's log mu and top K come from one and the same version: of which, by response.

    A row that were shifted by one, or came from other weights, would fit none.
    """
    offsets = call.tensors["data.teacher_ids.offsets"].tolist()
    found = []
    for row, tokens in enumerate(call.rows("data.responses")):
        rows = slice(offsets[row + 1] - len(tokens) - 1, offsets[row + 1] - 1)
        ids, logp = (call.tensors[f"data.teacher_{name}"][rows] for name in ("ids", "logprobs"))
        inside = call.rows("data.response_mask")[row].bool()
        assert torch.equal(ids[inside, 0].long(), tokens[inside])
        close(logp[inside, 0], call.rows("data.old_log_probs")[row][inside], 1e-6, "log mu in the top K's column 0")
        wanted = [torch.cat([d[row].gather(-1, tokens[:, None]), d[row].topk(TOP_K).values], -1)[inside] for d in known]
        off = torch.stack([(w - logp[inside].double()).abs().amax(-1) for w in wanted])  # [versions, tokens]
        assert bool((off.amin(0) < tolerance).all()), f"a row fits no version: off by {off.amin(0).max():.3g}"
        version = off.argmin(0)
        for t, v in enumerate(version.tolist()):  # the ids, too, but for the order of equal ones
            again = known[v][row][inside][t].gather(-1, ids[inside][t, 1:].long())
            close(logp[inside][t, 1:], again, tolerance, "log mu at the top K's ids")
        found.append(version.tolist())
    return found


def asynchronous(mode: str) -> dict[str, Any]:
    """Overrides: three steps of two updates; every other generation is aborted once, and resumed."""
    return TARGET | {
        "trainer.v1.trainer_mode": mode,
        "trainer.total_training_steps": 3,
        f"{LOSS}.loss_mode": "cppo",
        f"+{ROLLOUT}.custom.interrupt_after": 3,
    }


def test_colocated_async_in_turns(forks: Forks, tiny_model: Path, tmp_path: Path) -> None:
    """Two turns with a tool's answer in between, generations interrupted and resumed in both."""
    from trainer_runs import sums as make_sums

    agents = tmp_path / "agents.yaml"
    agents.write_text("- name: two_turns\n  _target_: cppo_cpu.agents.TwoTurns\n")
    overrides = asynchronous("cppo_colocate_async") | {
        f"{ROLLOUT}.agent.agent_loop_config_path": agents,
        "data.max_response_length": 64,
    }
    data = make_sums(tmp_path / "sums.parquet", agent="two_turns")
    run = train(Run("colocated", overrides), tmp_path / "runs", tiny_model, data, TIMEOUT_S, forks=forks)
    assert "aborted after 3 tokens" in run.log
    for call in run.updates:
        masks = call.rows("data.response_mask")
        assert all(0 < int(mask.sum()) < len(mask) for mask in masks), "every response holds tokens of the tool"
        assert_rows_belong(call, versions(run, tiny_model, 2, call))
    assert_trust(run, steps=3, updates=2)


def test_separate_async(forks: Forks, tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    """Sampler and trainer apart: the weights travel by a checkpoint engine, samples are up to two versions old."""
    overrides = asynchronous("cppo_separate_async") | {
        "trainer.v1.separate_async.parameter_sync_step": 2,
        f"{ROLLOUT}.nnodes": 1,
        f"{ROLLOUT}.checkpoint_engine.backend": "cpu_files",
        f"{ROLLOUT}.checkpoint_engine.custom_backend_module": "cppo_cpu.weights",
        f"+{ROLLOUT}.checkpoint_engine.engine_kwargs.cpu_files.folder": tmp_path / "weights",
    }
    run = train(Run("separate", overrides), tmp_path / "runs", tiny_model, sums, TIMEOUT_S, forks=forks)
    assert "aborted after 3 tokens" in run.log
    seen = set()
    for call in run.updates:
        for row in assert_rows_belong(call, versions(run, tiny_model, 2, call)):
            seen |= set(row)
            assert row == sorted(row), "a later token of a response never comes from older weights"
    assert len(seen) > 1, "every sample came from the first weights"
    assert_trust(run, steps=3, updates=2)


def test_entry_point_and_rescoring(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    """Found by the entry point `verl.plugins` alone; a server without top K scores the finished sequences.

    Every process of this run starts in the ordinary way.
    """
    points = metadata.entry_points(group="verl.plugins")
    if "cppo_verl_plugin" not in {point.value for point in points}:
        pytest.fail("the package is not installed in this environment, or without its entry point: make test-verl")
    overrides = TARGET | {
        "trainer.v1.trainer_mode": "cppo_sync",
        f"{LOSS}.loss_mode": "cppo",
        f"+{LOSS}.top_k": TOP_K,
        f"+{ROLLOUT}.custom.no_direct_top_k": True,
    }
    run = train(Run("entry_point", overrides), tmp_path / "runs", tiny_model, sums, TIMEOUT_S, modules=None)
    for call in run.updates:
        assert_rows_belong(call, versions(run, tiny_model, 2, call))
    assert run.updates[0].metrics["actor/trust/first_update_divergence"][0] < 1e-5
    assert_trust(run, steps=2, updates=2)


def assert_trust(run: Result, steps: int, updates: int) -> None:
    """All steps ran, and report a divergence that later updates have."""
    assert [row["step"] for row in run.steps] == list(range(1, steps + 1))
    assert len(run.updates) == steps * updates
    for row in run.steps:
        assert 0 <= row["actor/trust/masked_fraction"] < 1
        assert 1e-4 < row["actor/trust/divergence_mean"] < 0.5
        assert row["actor/grad_norm"] > 0
