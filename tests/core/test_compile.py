"""torch.compile(fullgraph=True) of batch + rule + loss equals eager: the core never branches on a tensor's value."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cppo

from .cases import CASES, Response, make, pack, pad, random_responses

REPRESENTATIVES = (
    *("none", "ppo_clip dual", "cispo", "minpro", "dppo", "trm_max", "trm_avg", "trm_max_avg"),
    *("cppo adaptive", "cppo shuffled", "cppo soft"),
)
#: Through the code generator, which is slow: a rule for each layout. The others stop at the autograd graph.
INDUCTOR = [("cppo adaptive", "pad"), ("dppo", "pack")]
#: Every rule in both layouts, and every variant of CPPO in one.
TRACED = [
    *((case, layout) for case in REPRESENTATIVES for layout in ("pad", "pack") if (case, layout) not in INDUCTOR),
    *((case, "pad" if i % 2 else "pack") for i, case in enumerate(c for c in CASES if c not in REPRESENTATIVES)),
]
COMPILER = next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(rule: Any) -> Any:
    """What an engine would compile: everything from log-probabilities to the loss."""

    def function(
        policy: Tensor, rollout: Tensor, advantages: Tensor, mask: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = cppo.TokenBatch(policy, rollout, advantages, mask, cu_seqlens=cu_seqlens)
        verdict = rule(batch)
        return cppo.token_loss(batch, verdict.coefficient), verdict.reason, verdict.coefficient

    return function


def responses_for_layout() -> list[Response]:
    return random_responses(21, [33, 18, 1, 26], 0.4, 0.25)


@pytest.mark.parametrize(
    "case, layout, backend", [*((*at, "inductor") for at in INDUCTOR), *((*at, "aot_eager") for at in TRACED)]
)
def test_compiled_equals_eager(case: str, layout: str, backend: str) -> None:
    if backend == "inductor" and COMPILER is None:
        pytest.skip("no C++ compiler (g++, c++ or clang++) on this machine: inductor cannot generate code")
    tokens = (pad if layout == "pad" else pack)(responses_for_layout(), grad=True).tokens
    arguments = (tokens.policy_logp, tokens.rollout_logp, tokens.advantages, tokens.mask, tokens.cu_seqlens)
    eager = step(make(case))
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=backend)
    want_loss, want_reason, want_coefficient = eager(*arguments)
    loss, reason, coefficient = compiled(*arguments)
    assert torch.equal(reason, want_reason)
    torch.testing.assert_close(coefficient, want_coefficient, rtol=1e-5, atol=0)
    inside = tokens.mask
    torch.testing.assert_close(loss[inside], want_loss[inside], rtol=1e-5, atol=0)
    assert (loss[~inside] == 0).all()
    (want,) = torch.autograd.grad(want_loss.sum(), tokens.policy_logp)
    (got,) = torch.autograd.grad(loss.sum(), tokens.policy_logp)
    assert got.isfinite().all()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_divergences_trace() -> None:
    """The top-K and exact scores, which engines compile together with the model's head."""
    g = torch.Generator().manual_seed(0)
    p, m = (torch.randn(7, 11, generator=g).log_softmax(-1) for _ in range(2))

    def scores(p: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        top = m.topk(4, -1).indices
        pk, mk, own_p, own_m = p.gather(-1, top), m.gather(-1, top), p[:, 0], m[:, 0]
        inside = (top == 0).any(-1)
        d = cppo.divergence
        return (
            d.topk_tv(pk, mk, own_p, own_m, inside),
            d.topk_kl(pk, mk, own_p, own_m, inside),
            d.topk_tv_upper(pk, mk, own_p, own_m, inside),
            d.exact_tv(p, m),
            d.exact_kl(p, m),
            d.binary_kl(own_p, own_m),
        )

    compiled = torch.compile(scores, fullgraph=True, dynamic=False, backend="aot_eager")
    for got, want in zip(compiled(p, m), scores(p, m), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("packed", [False, True])
def test_no_device_is_mixed_and_nothing_synchronises(packed: bool) -> None:
    """Fake tensors on another device: a constant made on the CPU, `.item()` or a branch on a value would raise."""
    device = torch.device("meta")
    with FakeTensorMode():
        shape = (9,) if packed else (3, 5)
        logp, divergence = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        cu = torch.zeros(4, device=device, dtype=torch.int32) if packed else None
        batch = cppo.TokenBatch(logp, logp, torch.zeros(3, device=device), torch.ones(shape, device=device), cu)
        for case in CASES:
            for each in (batch, batch.with_divergence(divergence)):
                verdict = make(case)(each)
                loss = cppo.token_loss(each, verdict.coefficient)
                total = cppo.aggregate(loss, each, "seq-mean-token-mean")
                for value in (loss, total, verdict.coefficient, verdict.reason, verdict.threshold, verdict.delta_b):
                    assert value is None or value.device == device, case
        top, inside = torch.zeros((*shape, 4), device=device), torch.ones(shape, device=device, dtype=torch.bool)
        for name in ("topk_tv", "topk_kl", "topk_tv_upper"):
            assert getattr(cppo.divergence, name)(top, top, logp, logp, inside).device == device
        for name in ("exact_tv", "exact_kl"):
            assert getattr(cppo.divergence, name)(top, top).device == device
