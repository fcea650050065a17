"""SkyRL: the registered losses as SkyRL's own policy worker calls them, against the slow reference and the contract."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import cppo
from cppo.engines.support import EngineChangedError, EngineVersionWarning
from cppo.errors import UserError

from . import contract
from .contract import Outcome, Sample, make, make_samples, same, standard, wanted

pytest.importorskip("skyrl", reason="make setup-engines")
pytest.importorskip("ray", reason="make setup-engines")

from .skyrl_import import make_importable

make_importable()

from skyrl.backends.skyrl_train.utils import ppo_utils  # noqa: E402
from skyrl.backends.skyrl_train.workers.worker_utils import BaseBatchIterator  # noqa: E402
from skyrl.train.config import SkyRLTrainConfig  # noqa: E402
from skyrl.train.entrypoints import main_base  # noqa: E402

from cppo.engines import skyrl as adapter  # noqa: E402

from . import skyrl_worker  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'"),
    pytest.mark.filterwarnings("ignore:CUDA is not available"),
]
#: Settings of a run on one process; what a user would write on the command line.
BASE = ["trainer.algorithm.use_kl_loss=false", "trainer.logger=console", "trainer.policy.model.path=none"]


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyRL's worker moves tensors to CUDA's current device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    adapter.register()
    yield
    for name in adapter.LOSSES:
        if name in ppo_utils.PolicyLossRegistry.list_available():
            ppo_utils.PolicyLossRegistry.unregister(name)


def config(rule: Any = None, *arguments: str, limit: float | None = None, reduction: str = "token_mean") -> Any:
    """A config from the command line's words; `rule` becomes policy_loss_type and trust_region."""
    words = [*BASE, f"trainer.algorithm.loss_reduction={reduction}", *arguments]
    words.append(f"trainer.algorithm.max_seq_len={skyrl_worker.MAX_SEQ_LEN}")
    if rule is not None:
        name = "cppo" if rule.name == "cppo" else f"cppo_{rule.name}"
        words.append(f"trainer.algorithm.policy_loss_type={name}")
        parameters = {**rule.parameters(), "max_on_policy_divergence": limit}
        words += [f"trainer.algorithm.trust_region.{key}={json.dumps(value)}" for key, value in parameters.items()]
    return adapter.TrustRegionConfig.from_cli_overrides(words)


class SkyRL(contract.Engine):
    """SkyRL's worker; its three reductions take the place of layouts."""

    name = "SkyRL"
    layouts = ("token_mean", "sequence_mean", "seq_mean_token_sum_norm")
    anchor_setting = "generator.sampling_params.logprobs"
    not_applicable: ClassVar = {
        "shards": "SkyRL gathers log-probabilities along the sequence before the loss (Ulysses and Megatron alike)"
    }

    def run(
        self,
        samples: Sequence[Sample],
        rule: Any,
        *,
        layout: str,
        micro_batches: Sequence[Sequence[int]],
        max_on_policy_divergence: float | None = None,
    ) -> Outcome:
        return self.step(samples, config(rule, limit=max_on_policy_divergence, reduction=layout), layout, micro_batches)

    def step(
        self,
        samples: Sequence[Sample],
        cfg: Any,
        reduction: str,
        micro_batches: Sequence[Sequence[int]],
        rollout: bool = True,
    ) -> Outcome:
        model = skyrl_worker.table(samples)
        worker, batch = skyrl_worker.worker(cfg, model), skyrl_worker.batch(samples, reduction, rollout)
        metrics: dict[str, Any] = {}
        for indices in micro_batches:
            experience = BaseBatchIterator.batch_to_experience(skyrl_worker.rows(batch, indices))
            metrics = worker._forward_backward_micro(experience, len(indices) / len(samples))
        grad = model.logp.grad
        return Outcome(
            [row[-len(s.response) :] for row, s in zip(grad, samples, strict=True)],
            skyrl_worker.denominators(samples, reduction),
            {k: v for k, v in metrics.items() if k.startswith("loss_metrics/") or k == "policy_loss"},
        )

    def run_without_rollout(self, samples: Sequence[Sample], rule: Any) -> None:
        self.step(samples, config(rule), "token_mean", [range(len(samples))], rollout=False)


@contract.suite(SkyRL())
def test_contract(check: Callable[[], None]) -> None:
    check()


# ---------------------------------------------------------------------------------------------------- the whole worker


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    """One process; SkyRL reduces metrics over it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize(
    "batching", ["trainer.micro_train_batch_size_per_gpu=2", "trainer.max_tokens_per_microbatch=30"]
)
def test_a_whole_forward_backward(batching: str) -> None:
    """SkyRL's own split into micro-batches, its backward and its reduction of losses and metrics."""
    samples = standard(["cppo adaptive"])
    model = skyrl_worker.table(samples)
    worker = skyrl_worker.worker(config(make("cppo adaptive"), batching), model)
    out = worker.forward_backward(skyrl_worker.batch(samples, "token_mean"))
    tokens = sum(int(s.response.mask.sum()) for s in samples)
    want = [wanted(s, "cppo adaptive") / tokens for s in samples]
    same([row[-len(s.response) :] for row, s in zip(model.logp.grad, samples, strict=True)], want, batching)
    loss = sum(
        float((w[s.response.mask] * s.response.policy.double()[s.response.mask]).sum())
        for w, s in zip(want, samples, strict=True)
    )
    assert out.metrics["policy_loss"] == pytest.approx(loss, rel=1e-5)
    largest = max(float((s.response.policy - s.response.rollout)[s.response.mask].exp().max()) for s in samples)
    assert out.metrics["loss_metrics/trust/ratio_max"] == pytest.approx(largest, rel=1e-5)  # a maximum stays one
    assert 0 < out.metrics["loss_metrics/clip_ratio"] < 1


def test_every_batch_has_the_same_metrics() -> None:
    """SkyRL all-reduces metric by metric in the order of the dictionary: processes must not differ in it."""
    samples = standard(["dppo"])
    rule = make("dppo")
    loss = adapter.PolicyLoss("dppo")
    cfg = config(rule, limit=None).trainer.algorithm
    names = set()
    for sample in samples:
        for policy in (sample.response.policy, sample.response.rollout):  # the second is rejected nowhere
            r = sample.response
            for mask in (r.mask, torch.zeros_like(r.mask)):  # a micro-batch of padding
                tensors = (x[None] for x in (policy, r.rollout, r.advantage, mask))
                logp, rollout, advantages, mask = tensors
                stats = loss(logp, None, advantages, config=cfg, loss_mask=mask, rollout_logprobs=rollout)[1]
                assert all(isinstance(value, float) for value in stats.values())
                names.add(tuple(stats))
    assert len(names) == 1


def test_autocast_changes_nothing() -> None:
    """The worker calls the loss under bfloat16 autocast."""
    r = standard(["cppo adaptive"])[2].response
    cfg = config(make("cppo adaptive")).trainer.algorithm
    grads = []
    for enabled in (False, True):
        logp = r.policy[None].clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, _ = adapter.PolicyLoss("cppo")(logp, None, r.advantage[None], cfg, r.mask[None], r.rollout[None])
        grads.append(torch.autograd.grad(loss, logp)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_zero_mask_and_no_mask() -> None:
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    args = (logp, None, torch.ones(2, 3), config(cppo.NoTrustRegion()).trainer.algorithm)
    loss, _ = adapter.PolicyLoss("none")(*args, None, torch.full((2, 3), -1.0))
    assert loss.item() == 6.0  # every token counts
    loss, _ = adapter.PolicyLoss("none")(*args, torch.zeros(2, 3), torch.full((2, 3), -1.0))
    loss.backward()
    assert loss.item() == 0 and (logp.grad == 0).all()


# ------------------------------------------------------------------------------------------------ names and parameters


def test_names_do_not_collide_and_all_rules_are_there() -> None:
    assert set(adapter.LOSSES.values()) == set(cppo.RULES)
    own = {loss.value for loss in ppo_utils.PolicyLossType}
    assert not own & set(adapter.LOSSES)
    adapter.register()  # again: nothing happens
    known = ppo_utils.PolicyLossRegistry.list_available()
    assert own | set(adapter.LOSSES) == set(known) and len(known) == len(set(known))
    assert ppo_utils.PolicyLossRegistry.get("dppo") is not ppo_utils.PolicyLossRegistry.get("cppo_dppo")


def test_parameters_come_from_the_command_line() -> None:
    cfg = adapter.TrustRegionConfig.from_cli_overrides(
        [
            *BASE,
            "trainer.algorithm.policy_loss_type=cppo",
            "trainer.algorithm.trust_region.delta=0.07",
            "trainer.algorithm.trust_region.budget=fixed",
            "trainer.algorithm.trust_region.prefix_budget=false",
            "trainer.algorithm.trust_region.max_on_policy_divergence=null",
        ]
    )
    judge = adapter.PolicyLoss("cppo").prepare(cfg.trainer.algorithm)
    assert judge.rule == cppo.CPPO(delta=0.07, budget="fixed", prefix_budget=False, divergence="binary_tv")
    assert judge.max_on_policy_divergence is None


def test_a_stock_config_gives_the_defaults() -> None:
    cfg = SkyRLTrainConfig.from_cli_overrides([*BASE, "trainer.algorithm.policy_loss_type=cppo_trm_max"])
    judge = adapter.PolicyLoss("trm_max").prepare(cfg.trainer.algorithm)
    assert judge.rule == cppo.TRMMax(divergence="binary_kl") and judge.max_on_policy_divergence == 0.03


def test_the_rule_is_kept_until_its_parameters_change() -> None:
    loss, cfg = adapter.PolicyLoss("cppo"), config(make("cppo adaptive")).trainer.algorithm
    first = loss.prepare(cfg)
    assert loss.prepare(cfg) is first
    cfg.trust_region = {**cfg.trust_region, "delta": 0.3}
    assert loss.prepare(cfg).rule.delta == 0.3


@pytest.mark.parametrize(
    "word, message",
    [
        ("trust_region.dleta=0.1", "dleta.*Did you mean 'delta'"),
        ("trust_region.delta=-1", "delta is -1"),
        ("trust_region.divergence=topk_tv", "divergence='binary_tv'"),
        ("trust_region.name=dppo", "policy_loss_type names the rule"),
        ("off_policy_correction.tis_ratio_type=token", "off_policy_correction would correct a second time"),
        ("off_policy_correction.outlier_token_is_threshold_low=1e-4", "off_policy_correction"),
    ],
)
def test_what_the_loss_refuses(word: str, message: str) -> None:
    cfg = adapter.TrustRegionConfig.from_cli_overrides(
        [*BASE, "trainer.algorithm.policy_loss_type=cppo", f"trainer.algorithm.{word}"]
    )
    with pytest.raises(UserError, match=message):
        adapter.check_config(cfg)
    ones = torch.ones(1, 2)
    with pytest.raises(UserError, match=message):  # in the worker too, for those with an entry point of their own
        adapter.PolicyLoss("cppo")(-ones, None, ones, cfg.trainer.algorithm, ones, -ones)


@pytest.mark.parametrize(
    "words, setting",
    [
        (["sampling_params.logprobs=null"], "sampling_params.logprobs=1"),
        (["sampling_params.top_p=0.95"], "sampling_params.top_p=1.0"),
        (["sampling_params.top_k=20"], "sampling_params.top_k=-1"),
        (["sampling_params.min_p=0.1"], "sampling_params.min_p=0.0"),
        (["sampling_params.repetition_penalty=1.1"], "sampling_params.repetition_penalty=1.0"),
        (["sampling_params.temperature=0.7"], "engine_init_kwargs.logprobs_mode=processed_logprobs"),
        (["use_conversation_multi_turn=false"], "use_conversation_multi_turn=true"),
    ],
)
def test_check_config_names_what_to_set(words: list[str], setting: str) -> None:
    cfg = config(make("cppo adaptive"), *(f"generator.{word}" for word in words))
    with pytest.raises(UserError, match=setting):
        adapter.check_config(cfg)


def test_check_config_accepts() -> None:
    adapter.check_config(config(make("cppo adaptive")))
    mode = "generator.inference_engine.engine_init_kwargs.logprobs_mode=processed_logprobs"
    adapter.check_config(config(make("cppo adaptive"), "generator.sampling_params.temperature=0.7", mode))
    adapter.check_config(config(None, "trainer.algorithm.policy_loss_type=dppo"))  # SkyRL's own


def test_check_config_names_everything_at_once() -> None:
    cfg = config(make("dppo"), "generator.sampling_params.top_p=0.9", "generator.sampling_params.logprobs=null")
    with pytest.raises(UserError, match=r"logprobs=1, generator\.sampling_params\.top_p=1\.0"):
        adapter.check_config(cfg)


# ------------------------------------------------------------------------------------------------- the package's shape


def test_skyrl_has_the_shape_that_the_adapter_was_written_for() -> None:
    """How the worker calls a loss, and that the reduction is in the advantages."""
    own = inspect.signature(ppo_utils.dppo_policy_loss).parameters
    assert list(own) == list(inspect.signature(adapter.PolicyLoss.__call__).parameters)[1:]
    assert list(inspect.signature(ppo_utils.reduce_loss).parameters) == ["loss", "loss_mask"]
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert ppo_utils.reduce_loss(x, torch.tensor([[1.0, 0.0], [1.0, 1.0]])).item() == 8.0


def test_another_signature_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(log_probs: Any, advantages: Any, loss_mask: Any) -> None: ...

    monkeypatch.setattr(ppo_utils, "dppo_policy_loss", moved)
    with pytest.raises(EngineChangedError, match="rollout_logprobs"):
        adapter.register()


def test_another_version_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.0")
    with pytest.warns(EngineVersionWarning, match=r"written for skyrl 0\.3\.0, installed is 0\.4\.0"):
        adapter.register()


# ------------------------------------------------------------------------------------------------------------ with Ray


@pytest.mark.slow
def test_the_losses_reach_ray_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyRL's entry point with ours as override: SkyRL parses, validates, starts Ray and hands over its registry.

    Only `skyrl_entrypoint`, which needs GPUs, is replaced: by a task that asks the registry as SkyRL's worker does.
    """
    ray = main_base.ray
    places = os.pathsep.join([str(Path(__file__).parents[1]), *(p for p in sys.path if p)])
    monkeypatch.setenv("PYTHONPATH", places)
    monkeypatch.setenv("RAY_RUNTIME_ENV_HOOK", "engines.skyrl_import.ray_hook")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setattr(main_base, "skyrl_entrypoint", ray.remote(skyrl_worker.ask_the_registry))
    words = [
        *BASE,
        "trainer.override_entrypoint=cppo.engines.skyrl",
        "trainer.algorithm.policy_loss_type=cppo_dppo",
        "trainer.algorithm.trust_region.delta=0.123",
        f"trainer.log_path={tmp_path}",
        *(f"trainer.placement.{name}_num_gpus_per_node=1" for name in ("policy", "critic", "ref")),
    ]
    monkeypatch.setattr(sys, "argv", ["main_base", *words])
    try:
        main_base.main()
    finally:
        ray.shutdown()
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["pid"] != os.getpid()
    assert told["rule"] == repr(cppo.DPPO(delta=0.123, divergence="binary_tv"))
    assert told["loss"] == -2.0 and told["metrics"]["trust/masked_fraction"] == 0


def test_samples_are_ragged() -> None:
    """The suite is about ragged right-aligned responses: SkyRL's batch really is."""
    samples = make_samples(3, [4, 9], [2, 5])
    mask = skyrl_worker.batch(samples, "token_mean")["response_mask"]
    assert mask.tolist() == [[0] * 5 + [1] * 4, [1] * 9]
