"""Tinker: the SDK's `forward_backward_custom` against the slow reference and the contract, and a loop with a server.

Top-K is tested with the SDK and a model in this process (`tinker_client`): the only server that installs here, SkyRL's,
takes targets ``[L]`` only. The loop with that server is therefore one with a binary divergence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cppo
from core import reference
from cppo.engines.support import EngineChangedError, EngineVersionWarning
from cppo.errors import UserError

from . import contract
from .contract import Outcome, Sample, make, standard

tinker = pytest.importorskip("tinker", reason="make setup-engines")

from tinker import types  # noqa: E402

from cppo.engines import tinker as adapter  # noqa: E402
from cppo.engines.tinker import PolicyLoss, Rollout, make_datum  # noqa: E402

from .tinker_client import LocalClient  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")  # torch about the SDK's sparse weights
COLUMNS = 3  # of unused top-K ids, in the layout with them


class Tinker(contract.Engine):
    """Sample i's response consists of tokens i + 1; one more token 0 in front, since a prompt cannot be empty."""

    name = "Tinker"
    layouts = ("[L]", "[L, 1 + K]")
    anchor_setting = "SampledSequence.logprobs"
    not_applicable: ClassVar = {"shards": "log-probabilities come back whole, whatever the service does"}

    def run(
        self,
        samples: Sequence[Sample],
        rule: Any,
        *,
        layout: str,
        micro_batches: Sequence[Sequence[int]],
        max_on_policy_divergence: float | None = None,
    ) -> Outcome:
        policy = [s.response.policy.clone().requires_grad_() for s in samples]

        def log_probabilities(datum: types.Datum) -> Tensor:
            targets = datum.loss_fn_inputs["target_tokens"].to_torch()
            column = targets if targets.dim() == 1 else targets[:, 0]
            response = policy[int(column[-1]) - 1]
            prompt = torch.full((len(column) - len(response),), -7.5)
            logp = torch.cat([prompt, response])
            return logp if targets.dim() == 1 else torch.cat([logp[:, None], torch.full((len(logp), COLUMNS), -3.0)], 1)

        client, loss = LocalClient(log_probabilities), PolicyLoss(rule, max_on_policy_divergence)
        tokens = float(sum(int(s.response.mask.sum()) for s in samples))
        metrics: dict[str, Any] = {}
        for indices in micro_batches:
            pairs = [self.datum(samples[i], i, layout) for i in indices]
            data, rollouts = [d for d, _ in pairs], [r for _, r in pairs]
            constant = None if len(indices) == len(samples) else tokens
            metrics = client.forward_backward_custom(data, loss(rollouts, constant)).result().metrics
        ours = {key: value for key, value in metrics.items() if key.startswith("trust/")}  # the rest is the service's
        return Outcome([p.grad for p in policy], [tokens] * len(samples), ours)

    def datum(self, s: Sample, i: int, layout: str) -> tuple[types.Datum, Rollout]:
        r, top = s.response, None if layout == "[L]" else torch.zeros(len(s.response), COLUMNS)
        prompt, tokens = [0] * (s.prompt + 1), [i + 1] * len(r)
        return make_datum(prompt, tokens, r.rollout.tolist(), s.advantage, r.mask.tolist(), top, top)

    def run_without_rollout(self, samples: Sequence[Sample], rule: Any) -> None:
        make_datum([0], [1, 2], None, 1.0)


@contract.suite(Tinker())
def test_contract(check: Callable[[], None]) -> None:
    check()


# --------------------------------------------------------------------------------------------------------------- Top-K

VOCABULARY, K = 11, 4


class Bigram(nn.Module):
    """A language model: logits of the next token from the present one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=g))

    def rows(self, tokens: Sequence[int]) -> Tensor:
        """log pi(. | token), ``[L, V]``."""
        return self.logits[torch.tensor(list(tokens))].log_softmax(-1)

    def log_probabilities(self, datum: types.Datum) -> Tensor:
        rows = self.rows(datum.model_input.to_ints())
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        return rows.gather(1, targets.reshape(len(rows), -1)).reshape(targets.shape)


def rollouts_of(mu: Bigram, lengths: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Samples of mu with its top K, as `make_datum` takes them."""
    g = torch.Generator().manual_seed(seed)
    out = []
    with torch.no_grad():
        for length in lengths:
            tokens, prompt = [], [1, 2]
            for _ in range(length):
                row = mu.rows([(tokens or prompt)[-1]])[0]
                tokens.append(int(torch.multinomial(row.exp(), 1, generator=g)))
            rows = mu.rows([prompt[-1], *tokens[:-1]])
            top = rows.topk(K)
            out.append(
                {
                    "prompt": prompt,
                    "tokens": tokens,
                    "logprobs": rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(),
                    "advantage": float(torch.randn(1, generator=g)),
                    "mask": (torch.rand(length, generator=g) > 0.2).tolist(),
                    "topk_ids": top.indices,
                    "topk_logprobs": top.values,
                }
            )
    return out


def drifted(mu: Bigram, scale: float) -> Bigram:
    """mu after some updates."""
    pi = Bigram(0)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        pi.logits.copy_(mu.logits + scale * torch.randn(mu.logits.shape, generator=g))
    return pi


def step(pi: Bigram, given: Sequence[dict[str, Any]], rule: Any, **options: Any) -> tuple[Tensor, dict[str, float]]:
    """The gradient of one `forward_backward_custom`, and its metrics."""
    pairs = [make_datum(**one) for one in given]
    loss = PolicyLoss(rule, max_on_policy_divergence=None)([r for _, r in pairs], **options)
    result = LocalClient(pi.log_probabilities).forward_backward_custom([d for d, _ in pairs], loss).result()
    return pi.logits.grad, result.metrics


def by_hand(
    pi: Bigram, mu: Bigram, given: Sequence[dict[str, Any]], name: str, kind: str
) -> tuple[Tensor, float, float]:
    """The same gradient from full distributions and the slow loops, a delta that divides what it limits, and the
    share of loss tokens held back.
    """
    divergences, policies, rollouts = [], [], []
    for one in given:
        before = [one["prompt"][-1], *one["tokens"][:-1]]
        p, m = pi.rows(before), mu.rows(before)
        rows = zip(m.double().exp().tolist(), p.double().exp().tolist(), one["tokens"], strict=True)
        divergences.append([reference.divergence(kind, a, b, sampled, K) for a, b, sampled in rows])
        chosen = torch.tensor(one["tokens"])[:, None]
        policies.append(p.gather(1, chosen)[:, 0])
        rollouts.append(m.gather(1, chosen)[:, 0].tolist())
    masked = [
        [x for x, kept in zip(d, o["mask"], strict=True) if kept] for d, o in zip(divergences, given, strict=True)
    ]
    limited = [max(d) for d in masked if d] if name == "trm_max" else [x for d in masked for x in d]
    distinct = sorted(
        {round(x, 9) for x in limited}
    )  # states repeat, and so do divergences: delta must be none of them
    upper = itertools.pairwise(distinct[len(distinct) // 2 - 1 :])
    delta = next((low + high) / 2 for low, high in upper if high - low > 1e-4)
    held, tokens, loss = 0, 0, torch.zeros(())
    for one, d, logp, mu_logp in zip(given, divergences, policies, rollouts, strict=True):
        advantages = [one["advantage"]] * len(d)
        result = reference.rule(name, logp.tolist(), mu_logp, advantages, one["mask"], d, delta=delta)
        assert result.margin > 1e-5
        c, mask = torch.tensor(result.coefficient), torch.tensor(one["mask"])
        held, tokens = held + int((mask & (c == 0)).sum()), tokens + int(mask.sum())
        loss = loss - (c * one["advantage"] * logp)[mask].sum()
    (gradient,) = torch.autograd.grad(loss / tokens, pi.logits)
    return gradient, delta, held / tokens


@pytest.mark.parametrize("kind", ["topk_tv", "topk_kl", "topk_tv_upper", "binary_tv", "binary_kl"])
@pytest.mark.parametrize("name", ["cppo", "dppo", "trm_max"])
def test_divergences_from_top_k_targets(name: str, kind: str) -> None:
    """The rule's own `divergence` decides: all from one [L, 1 + K] forward pass, equal to full distributions."""
    mu = Bigram(1)
    pi = drifted(mu, 0.25)
    given = rollouts_of(mu, [13, 1, 20, 6, 9, 3, 4, 2, 5, 3])
    want, delta, held = by_hand(pi, mu, given, name, kind)
    got, metrics = step(pi, given, cppo.make_rule(name, delta=delta, divergence=kind))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    assert metrics["trust/masked_fraction"] == pytest.approx(held)
    assert 0.05 < held < 0.95
    assert metrics["loss:sum"] != 0  # the service's own


def test_top_k_covers_the_sampled_token_inside_and_outside() -> None:
    given = rollouts_of(Bigram(1), [13, 1, 20, 6, 9])
    inside = [t in ids for one in given for t, ids in zip(one["tokens"], one["topk_ids"].tolist(), strict=True)]
    assert 3 < sum(inside) < len(inside) - 3


@pytest.mark.parametrize("unused", [-99999.0, -np.inf, np.nan])
def test_unused_slots_count_for_nothing(unused: float) -> None:
    """The API fills them with id 0 and -99999: id 0 is a token like others."""
    mu = Bigram(1)
    given = rollouts_of(mu, [9, 14])
    padded = [dict(one) for one in given]
    for one in padded:
        count = len(one["tokens"])
        one["topk_ids"] = np.concatenate([one["topk_ids"].numpy(), np.zeros((count, 2), np.int32)], 1)
        one["topk_logprobs"] = np.concatenate(
            [one["topk_logprobs"].numpy(), np.full((count, 2), unused, np.float32)], 1
        )
    rule = cppo.CPPO(delta=0.1)
    plain, metrics = step(drifted(mu, 0.25), given, rule)
    other, same_metrics = step(drifted(mu, 0.25), padded, rule)
    torch.testing.assert_close(other, plain)
    assert same_metrics["trust/divergence_mean"] == pytest.approx(metrics["trust/divergence_mean"], rel=1e-6)


def test_on_policy_the_divergence_is_zero_and_all_is_kept() -> None:
    mu = Bigram(1)
    _, metrics = step(drifted(mu, 0.0), rollouts_of(mu, [9, 14]), cppo.CPPO())
    assert metrics["trust/first_update_divergence"] < 1e-6 and metrics["trust/masked_fraction"] == 0


def test_a_bare_matrix_of_targets_would_fail() -> None:
    """Why `make_datum` builds its TensorData: the SDK makes a mostly-zero matrix sparse, then cannot weight it."""
    datum, rollout = make_datum([0] * 9, [1, 2], [-1.0, -1.0], 1.0, None, [[2], [3]], [[-1.0], [-1.0]])
    targets = datum.loss_fn_inputs["target_tokens"]
    assert targets.sparse_crow_indices is None and targets.shape == [10, 2]
    bare = types.Datum(datum.model_input, {"target_tokens": targets.to_torch()})
    client = LocalClient(Bigram(0).log_probabilities)
    client.forward_backward_custom([datum], PolicyLoss(cppo.CPPO(), None)([rollout])).result()
    with pytest.raises(ValueError):
        client.forward_backward_custom([bare], PolicyLoss(cppo.CPPO(), None)([rollout]))


# ------------------------------------------------------------------------------------------------- data, normalisation


def test_make_datum_shifts_by_one() -> None:
    datum, rollout = make_datum(
        [5, 6, 7], [8, 9], [-0.5, -0.25], 2.0, [True, False], [[1, 2], [3, 4]], [[-1, -2], [-3, -4]]
    )
    assert datum.model_input.to_ints() == [5, 6, 7, 8]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [[6, 0, 0], [7, 0, 0], [8, 1, 2], [9, 3, 4]]
    assert set(datum.loss_fn_inputs) == {"target_tokens"}  # the SDK allows no more
    assert rollout.logprobs.tolist() == [0, 0, -0.5, -0.25]
    assert rollout.mask.tolist() == [False, False, True, False]
    assert rollout.advantages.tolist() == [2.0] * 4
    assert rollout.topk_logprobs.tolist() == [[0, 0], [0, 0], [-1, -2], [-3, -4]]
    flat, bare = make_datum([5], [8], [-0.5], 1.0)
    assert flat.loss_fn_inputs["target_tokens"].tolist() == [8] and bare.topk_logprobs is None
    assert bare.mask.tolist() == [True]


def test_advantages_may_differ_from_token_to_token() -> None:
    """For those who build rollouts themselves."""
    mu = Bigram(1)
    given = rollouts_of(mu, [6])
    datum, rollout = make_datum(**given[0])
    varied = replace(rollout, advantages=torch.linspace(-1, 1, len(rollout.mask)))
    pi = drifted(mu, 0.1)
    loss = PolicyLoss(cppo.NoTrustRegion(), None)([varied])
    LocalClient(pi.log_probabilities).forward_backward_custom([datum], loss).result()
    logp = pi.rows(datum.model_input.to_ints()).gather(1, datum.loss_fn_inputs["target_tokens"].to_torch()[:, :1])[:, 0]
    rho = (logp - rollout.logprobs).exp().detach()
    want = -(rho * varied.advantages * logp)[rollout.mask].sum() / rollout.mask.sum()
    torch.testing.assert_close(pi.logits.grad, torch.autograd.grad(want, pi.logits)[0])


def test_normalisation_is_over_the_whole_list() -> None:
    mu = Bigram(1)
    given = rollouts_of(mu, [9, 14])
    tokens = sum(sum(one["mask"]) for one in given)
    rule = cppo.CPPO(delta=0.1)
    mean, metrics = step(drifted(mu, 0.25), given, rule)
    total, _ = step(drifted(mu, 0.25), given, rule, denominator=1.0)
    torch.testing.assert_close(mean * tokens, total)
    assert metrics["trust/masked_fraction"] > 0  # and rejected tokens are in the denominator


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logprobs": [-1.0]}, "logprobs has 1 entries, but there are 2 sampled tokens"),
        ({"mask": [True] * 3}, "mask has 3 entries"),
        ({"topk_ids": [[1]]}, "topk_ids has 1 entries"),
        ({"topk_logprobs": [[-1.0]]}, "topk_logprobs has 1 entries"),
        ({"logprobs": None}, "SampledSequence.logprobs"),
    ],
)
def test_what_make_datum_refuses(change: dict[str, Any], message: str) -> None:
    given = {"prompt": [0], "tokens": [1, 2], "logprobs": [-1.0, -1.0], "advantage": 1.0}
    with pytest.raises(UserError, match=message):
        make_datum(**{**given, **change})


def test_what_the_loss_refuses() -> None:
    mu = Bigram(1)
    given = rollouts_of(mu, [5, 6])
    pairs = [make_datum(**one) for one in given]
    data, rollouts = [d for d, _ in pairs], [r for _, r in pairs]
    client = LocalClient(mu.log_probabilities)
    loss = PolicyLoss(cppo.CPPO())
    with pytest.raises(UserError, match="in the same order"):
        client.forward_backward_custom(data, loss(rollouts[::-1]))
    with pytest.raises(UserError, match="in the same order"):
        client.forward_backward_custom(data, loss(rollouts[:1]))
    with pytest.raises(UserError, match=r"takes targets \[L\] only"):
        LocalClient(mu.log_probabilities, flat=True).forward_backward_custom(data, loss(rollouts))
    some = [rollouts[0], replace(rollouts[1], topk_logprobs=None)]
    with pytest.raises(UserError, match="of every datum"):
        client.forward_backward_custom(data, loss(some))
    with pytest.raises(UserError, match=r"divergence='exact_tv' needs topk_ids.*divergence='binary_tv'"):
        client.forward_backward_custom(data, PolicyLoss(cppo.CPPO(divergence="exact_tv"))(rollouts))


def test_another_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.30.1")
    with pytest.warns(EngineVersionWarning, match=r"written for tinker 0\.22\.0, installed is 0\.30\.1"):
        PolicyLoss(cppo.CPPO())
    monkeypatch.setattr(adapter.TrainingClient, "forward_backward_custom", lambda self, data: None)
    with pytest.warns(EngineVersionWarning), pytest.raises(EngineChangedError, match="no longer takes loss_fn"):
        PolicyLoss(cppo.CPPO())


def test_the_first_update_is_looked_at_once() -> None:
    """One object per run: its first batch must be on-policy, later ones need not."""
    samples = standard(["dppo"])
    engine, loss = Tinker(), PolicyLoss(make("dppo"))
    client_data = [engine.datum(s, i, "[L]") for i, s in enumerate(samples)]
    far = [torch.cat([torch.full((s.prompt,), -1.0), s.response.policy]).requires_grad_() for s in samples]
    near = [r.logprobs.clone().requires_grad_() for _, r in client_data]
    data, rollouts = [d for d, _ in client_data], [r for _, r in client_data]
    assert "trust/first_update_divergence" in loss(rollouts)(data, near)[1]
    assert "trust/first_update_divergence" not in loss(rollouts)(data, far)[1]
    with pytest.raises(UserError, match="not the same policy"):
        PolicyLoss(make("dppo"))(rollouts)(data, far)


# ------------------------------------------------------------------------------------------------------ a whole loop


@pytest.mark.slow
def test_a_loop_with_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyRL's Tinker server, the SDK and a language model: sample, two updates under CPPO, sample again ...

    Reward: the share of characters below 'P'. It rises, and before the first update of a batch pi is mu.
    """
    pytest.importorskip("skyrl", reason="make setup-engines")
    pytest.importorskip("jax", reason="make setup-engines")
    from . import tinker_server

    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    tinker_server.write_model(tmp_path / "model")
    history = []
    with tinker_server.running(tmp_path) as address:
        try:
            history = train(address, str(tmp_path / "model"), steps=8)
        finally:
            print((tmp_path / "server.log").read_text()[-6000:])  # pytest shows it if the test fails
    print(*history, sep="\n")
    rewards = [line["reward"] for line in history]
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.25
    assert max(line["gap"] for line in history) < 1e-3  # largest abs(log pi - log mu) of a first pass
    assert all(line["first"]["trust/divergence_mean"] < 1e-4 for line in history)
    assert all(line["first"]["trust/masked_fraction"] == 0 for line in history)
    assert max(line["second"]["trust/divergence_mean"] for line in history) > 0.01
    assert max(line["second"]["trust/masked_fraction"] for line in history) > 0  # the trust region had work


def train(address: str, model: str, steps: int) -> list[dict[str, Any]]:
    """CPPO with two updates per batch; one line of figures per step."""
    from .tinker_server import CHARACTERS

    service = tinker.ServiceClient(base_url=address, api_key="tml-none")
    client = service.create_lora_training_client(base_model=model, rank=8, seed=0)
    prompt = [CHARACTERS.index(character) for character in "say a:"]
    policy_loss = PolicyLoss(cppo.CPPO(delta=0.2, divergence="binary_tv"))
    out = []
    for number in range(steps):
        sampler = client.save_weights_and_get_sampling_client()
        parameters = types.SamplingParams(max_tokens=8, temperature=1.0, seed=number)
        answer = sampler.sample(types.ModelInput.from_ints(prompt), 64, parameters).result()
        rewards = torch.tensor([sum(t < 48 for t in s.tokens) / len(s.tokens) for s in answer.sequences])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        pairs = [
            make_datum(prompt, s.tokens, s.logprobs, float(a))
            for s, a in zip(answer.sequences, advantages, strict=True)
        ]
        data, rollouts = [d for d, _ in pairs], [r for _, r in pairs]
        results = []
        for _ in range(2):
            update = client.forward_backward_custom(data, policy_loss(rollouts))
            client.optim_step(types.AdamParams(learning_rate=4e-2)).result()
            results.append(update.result())
        gaps = [
            (torch.tensor(told["logprobs"].data) - r.logprobs)[r.mask].abs().max().item()
            for told, r in zip(results[0].loss_fn_outputs, rollouts, strict=True)
        ]
        out.append({"reward": rewards.mean().item(), "gap": max(gaps)})
        out[-1] |= {"first": results[0].metrics, "second": results[1].metrics}
    # This server returns one log-probability a position, where it does not fail (more targets than its row is wide).
    top = torch.full((8, 1), -1.0)
    pairs = [
        make_datum(prompt, s.tokens, s.logprobs, 1.0, None, -top, top) for s in answer.sequences if len(s.tokens) == 8
    ]
    with pytest.raises(UserError, match=r"takes targets \[L\] only"):
        client.forward_backward_custom([d for d, _ in pairs], PolicyLoss(cppo.CPPO())([r for _, r in pairs]))
    return out
