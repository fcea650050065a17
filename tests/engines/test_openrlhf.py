"""OpenRLHF: the contract with its real loss module, aggregation and step normaliser (loaded by stubs_openrlhf.py)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from cppo.engines import openrlhf
from cppo.engines.support import RULE_VARIABLE, EngineChangedError, EngineVersionWarning
from cppo.errors import UserError

from . import contract
from .contract import Outcome, Sample
from .stubs import openrlhf as stubs_openrlhf

if find_spec("openrlhf") is None:
    pytest.skip("OpenRLHF is not installed: make setup-engines", allow_module_level=True)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hook installed as Ray would, then OpenRLHF's modules executed anew."""
    monkeypatch.setenv(RULE_VARIABLE, '{"name": "cppo"}')
    finders = list(sys.meta_path)
    openrlhf.install()
    stubs_openrlhf.load()
    yield
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.split(".")[0] == "openrlhf"]:
        del sys.modules[name]


def policy_loss(rule: Any, limit: float | None, **settings: Any) -> Any:
    """OpenRLHF's PolicyLoss as its trainer makes it (ppo_actor.py), with the rule in the environment."""
    settings = {"is_correction_level": "token", "clip_eps_low": 0.2, "clip_eps_high": 0.2, "dual_clip": None} | settings
    os.environ[RULE_VARIABLE] = json.dumps({"name": rule.name, **rule.parameters(), "max_on_policy_divergence": limit})
    return sys.modules["openrlhf.models.loss"].PolicyLoss(**settings)


def rows(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """OpenRLHF's experience: action columns ``[B, A]``; prompts lie outside of them, padding behind."""
    width = max(len(s.response) for s in samples)
    out = {}
    for name, fill in (("policy", -4.0), ("rollout", 0.0), ("advantage", 0.0), ("mask", 0.0)):
        row = torch.full((len(samples), width), fill)
        for line, s in zip(row, samples, strict=True):
            line[: len(s.response)] = getattr(s.response, name).float()
        out[name] = row
    return out


class OpenRLHF(contract.Engine):
    name = "OpenRLHF"
    anchor_setting = "--algo.advantage.is_correction_level token"
    not_applicable: ClassVar = {"shards": "ring attention gathers log-probabilities before the loss"}
    token_mean: ClassVar[bool] = True

    def run(
        self,
        samples: Sequence[Sample],
        rule: Any,
        *,
        layout: str,
        micro_batches: Sequence[Sequence[int]],
        max_on_policy_divergence: float | None = None,
    ) -> Outcome:
        loss = policy_loss(rule, max_on_policy_divergence, token_level_loss=self.token_mean)
        experiences = [rows([samples[i] for i in indices]) for indices in micro_batches]
        normalised = sys.modules["openrlhf.utils.loss_utils"].iter_grad_accum_global_norm(
            experiences, SimpleNamespace(), len(experiences), lambda experience: experience["mask"]
        )
        gradients: dict[int, Tensor] = {}
        figures: Any = ()
        for indices, (e, sizes) in zip(micro_batches, normalised, strict=True):
            policy = e["policy"].requires_grad_()
            old = torch.full_like(policy, -2.0)  # recomputed by OpenRLHF; no rule may read it
            value, *figures = loss(policy, old, e["advantage"], e["mask"], rollout_log_probs=e["rollout"], **sizes)
            (grad,) = torch.autograd.grad(value / len(experiences), policy)  # DeepSpeed scales by 1 / accumulation
            for i, row in zip(indices, grad, strict=True):
                n = len(samples[i].response)
                gradients[i] = row[:n]
                assert (row[n:] == 0).all()
        counts = [int(s.response.mask.sum()) for s in samples]
        full = [sum(counts)] * len(samples) if self.token_mean else [c * sum(x > 0 for x in counts) for c in counts]
        metrics = dict(zip(("clip_ratio", "ppo_kl", "vllm_kl", "is_filter_ratio"), figures, strict=True))
        return Outcome([gradients[i] for i in range(len(samples))], [float(d) for d in full], metrics)

    def run_without_rollout(self, samples: Sequence[Sample], rule: Any) -> None:
        e = rows(samples)
        with pytest.raises(UserError, match="is_correction_level token"):
            policy_loss(rule, None, is_correction_level="off")  # OpenRLHF's default
        policy_loss(rule, None)(e["policy"], e["policy"], e["advantage"], e["mask"], rollout_log_probs=None)


class OpenRLHFSampleMean(OpenRLHF):
    """``--actor.loss_agg_mode`` other than token-mean: mean over samples of the mean over tokens."""

    token_mean = False


@contract.suite(OpenRLHF())
def test_contract(check: Callable[[], None]) -> None:
    check()


@contract.suite(OpenRLHFSampleMean())
def test_contract_sample_mean(check: Callable[[], None]) -> None:
    check()


def test_the_class_is_replaced_where_it_is_imported_from() -> None:
    """Whoever imports it later gets ours; whoever has it already, when the hook runs late."""
    module = sys.modules["openrlhf.models.loss"]
    ours = module.PolicyLoss
    assert ours.__name__ == "TrustRegionPolicyLoss" and ours.__mro__[1].__module__ == "openrlhf.models.loss"
    openrlhf.install()  # twice changes nothing
    assert module.PolicyLoss is ours
    module.PolicyLoss = ours.__mro__[1]
    sys.modules["openrlhf.models"].PolicyLoss = ours.__mro__[1]  # type: ignore[attr-defined]
    openrlhf.install()
    assert module.PolicyLoss.__name__ == "TrustRegionPolicyLoss"
    assert sys.modules["openrlhf.models"].PolicyLoss is module.PolicyLoss  # type: ignore[attr-defined]


def test_figures_that_openrlhf_logs() -> None:
    samples = contract.make_samples(3, [12, 5, 30], [1, 1, 1])
    outcome = OpenRLHF().go(samples, contract.make("cppo fixed"))
    inside = [s.response.mask for s in samples]
    total = sum(int(m.sum()) for m in inside)
    dropped = sum(int((g[m] == 0).sum()) for g, m in zip(outcome.gradients, inside, strict=True))
    gap = sum(float((s.response.rollout - s.response.policy)[s.response.mask].sum()) for s in samples)
    assert outcome.metrics["clip_ratio"].item() == pytest.approx(dropped / total)
    assert outcome.metrics["vllm_kl"].item() == pytest.approx(gap / total, abs=1e-6)
    assert 0 < outcome.metrics["is_filter_ratio"].item() < outcome.metrics["clip_ratio"].item()


def test_wrong_settings_say_what_would_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    make = sys.modules["openrlhf.models.loss"].PolicyLoss
    for text, message in (
        ("", "CPPO_RULE"),
        ("cppo", "expected a rule with its parameters"),
        ('{"name": "cppo", "detla": 1}', "Did you mean 'delta'"),
    ):
        monkeypatch.setenv(RULE_VARIABLE, text)
        with pytest.raises(UserError, match=message):
            make(is_correction_level="token")
    monkeypatch.setenv(RULE_VARIABLE, '{"name": "dppo"}')
    with pytest.raises(UserError, match="Set it to ppo"):
        make(is_correction_level="token", policy_loss_type="gspo")


def test_another_shape_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class PolicyLoss(torch.nn.Module):
        def forward(self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> None: ...

    module = SimpleNamespace(PolicyLoss=PolicyLoss, aggregate_loss=lambda: None)
    with pytest.raises(EngineChangedError, match="rollout_log_probs"):
        openrlhf.replace(module)
    monkeypatch.setattr(openrlhf, "WRITTEN_FOR", "0.10.0")
    with pytest.raises(EngineChangedError), pytest.warns(EngineVersionWarning, match="openrlhf 0.10.0"):
        openrlhf.replace(module)


@pytest.mark.slow
def test_rays_worker_hook() -> None:
    """A real Ray worker, started with the hook and the rule as a job would give them, imports our class."""
    ray = pytest.importorskip("ray", reason="make setup-engines")
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root.parent / "src"), str(root), os.environ.get("PYTHONPATH", "")])
    variables = {RULE_VARIABLE: '{"name": "dppo", "delta": 0.2}', "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    hook = {"worker_process_setup_hook": "cppo.engines.openrlhf.install", "env_vars": variables}
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False, runtime_env=hook)
    try:

        @ray.remote
        def made() -> tuple[str, str]:
            from engines.stubs import openrlhf as stubs_openrlhf

            loss = stubs_openrlhf.load()[0].PolicyLoss(is_correction_level="token")
            return type(loss).__name__, str(loss.judge.rule)

        name, rule = ray.get(made.remote(), timeout=120)
    finally:
        ray.shutdown()
    assert name == "TrustRegionPolicyLoss" and "DPPO(delta=0.2, divergence='binary_tv'" in rule
