"""`exact_divergence` against two whole rows of probabilities in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cppo import divergence
from cppo.scoring import Distributions, exact_divergence, score_tokens

from . import dense
from .dense import HEADS, Head
from .vocab_cases import LargestTensor, refused


def pair(case: Head, drift: float = 0.3) -> tuple[Distributions, Distributions, Tensor, Tensor]:
    """pi and mu with heads of their own, and their log-probabilities ``[N, V]`` in float64."""
    hidden, head, _, _ = case.inputs()
    g = torch.Generator().manual_seed(2)
    other = (hidden.double() + drift * torch.randn(hidden.shape, generator=g)).to(case.dtype)
    other_head = (head.double() * (1 + drift * torch.randn(head.shape, generator=g) / 5)).to(case.dtype)
    options = case.settings()
    logp = [dense.logits(h, w, **options).log_softmax(-1) for h, w in ((hidden, head), (other, other_head))]
    return Distributions(hidden, head, **options), Distributions(other, other_head, **options), *logp


def total_variation(log_pi: Tensor, log_mu: Tensor) -> Tensor:
    return 0.5 * (log_pi.exp() - log_mu.exp()).abs().sum(-1)


@pytest.mark.parametrize("tile", [(4, 64), (1, 37), (64, 1000)], ids=str)
@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
def test_both_kinds(case: Head, tile: tuple[int, int]) -> None:
    pi, mu, log_pi, log_mu = pair(case)
    # rounding of a logit moves a probability by as much, relatively
    tolerance = max((1e-12 if case.dtype == torch.float64 else 1e-6) * case.scale, 1e-6)
    got = exact_divergence(pi, mu, tile=tile)
    assert got.shape == (case.tokens,) and not got.isnan().any()
    torch.testing.assert_close(got.double(), total_variation(log_pi, log_mu), atol=tolerance, rtol=0)
    kl = exact_divergence(pi, mu, kind="kl", tile=tile)
    want = divergence.exact_kl(log_pi, log_mu)
    torch.testing.assert_close(kl.double(), want, atol=30 * tolerance, rtol=1e-5)
    known = [replace(p, logsumexp=dense_logsumexp(p)) for p in (pi, mu)]
    torch.testing.assert_close(exact_divergence(*known, tile=tile), got, atol=2 * tolerance, rtol=0)


def dense_logsumexp(p: Distributions) -> Tensor:
    z = dense.logits(
        p.hidden, p.lm_head, temperature=p.temperature, bias=p.bias, softcap=p.softcap, logit_scale=p.logit_scale
    )
    return z.logsumexp(-1)


def test_the_same_policy_is_at_zero() -> None:
    pi, _, _, _ = pair(Head("", tokens=50, size=32, vocab=2000, scale=6))
    for kind in ("tv", "kl"):
        assert exact_divergence(pi, pi, kind=kind).abs().max() < 1e-6


def test_known_logsumexp_from_the_scorer_and_a_choice_of_rows() -> None:
    case = Head("", tokens=24, temperature="each", bias="finite")
    pi, mu, log_pi, log_mu = pair(case)
    ids = case.inputs()[2]
    options = case.settings()
    scored = [score_tokens(p.hidden, p.lm_head, ids, **options).logsumexp for p in (pi, mu)]
    rows = torch.tensor([5, 0, 23, 5])
    known = [replace(p, logsumexp=lse).at(rows) for p, lse in zip((pi, mu), scored, strict=True)]
    got = exact_divergence(*known)
    torch.testing.assert_close(got.double(), total_variation(log_pi, log_mu)[rows], atol=2e-6, rtol=0)
    whole = exact_divergence(*(replace(p, hidden=p.hidden.view(4, 6, -1), temperature=1.0) for p in (pi, mu)))
    assert whole.shape == (4, 6)


def test_interval_of_the_top_k_holds_the_exact_value() -> None:
    """lower <= TV <= upper, rest >= 0: from the scorer's own top k, float32 throughout."""
    for scale in (1.0, 5.0, 15.0):
        case = Head("", tokens=200, size=8, vocab=500, scale=scale)
        pi, mu, _, _ = pair(case)
        ids = case.inputs()[2]
        rollout = score_tokens(mu.hidden, mu.lm_head, ids, want_top_k=20)
        assert rollout.top_ids is not None and rollout.top_logp is not None
        policy = score_tokens(pi.hidden, pi.lm_head, ids, rollout.top_ids)
        assert policy.candidate_logp is not None
        inside = (rollout.top_ids == ids[:, None]).any(-1)
        arguments = (policy.candidate_logp, rollout.top_logp, policy.logp, rollout.logp, inside)
        lower, upper = divergence.topk_tv(*arguments), divergence.topk_tv_upper(*arguments)
        exact = exact_divergence(pi, mu)
        rounding = 1e-6 * max(scale, 1)  # of float32 logits as large as this
        assert bool((lower <= exact + rounding).all()) and bool((exact <= upper + rounding).all())
        assert bool((rollout.top_logp.exp().sum(-1) <= 1 + rounding).all())
        assert bool((upper - lower > 1e-3).any()) and bool((upper > lower).any())


def test_memory_is_two_tiles() -> None:
    sizes = []
    for tokens in (64, 256):
        pi, mu, _, _ = pair(Head("", tokens=tokens, size=4, vocab=4001))
        with LargestTensor() as largest:
            exact_divergence(pi, mu, kind="kl", tile=(16, 1000))
        sizes.append(largest.bytes)
    assert sizes[0] == sizes[1] <= 16 * 1000 * 4, sizes


def test_refusals() -> None:
    pi, mu, _, _ = pair(Head(""))
    changes: list[tuple[Any, Any, tuple[str, ...]]] = [
        ({}, {"hidden": mu.hidden[:5]}, ("[5, 6]", "same states")),
        ({}, {"lm_head": mu.lm_head[:100]}, ("[100, 6]", "same states and vocabulary")),
        ({"logsumexp": torch.zeros(3)}, {}, ("policy.logsumexp has shape [3]", "[13]")),
        ({}, {"temperature": 0.0}, ("temperature is 0.0",)),
        ({"lm_head": pi.lm_head.T}, {}, ("lm_head has shape [6, 301]", "transposed")),
    ]
    for left, right, words in changes:
        with refused(*words):
            exact_divergence(replace(pi, **left), replace(mu, **right))
    with refused("kind is 'js'"):
        exact_divergence(pi, mu, kind="js")
