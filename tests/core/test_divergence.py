"""Divergences against float64 loops, their order, their ends and their numerics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cppo.divergence as cd

from . import reference

KINDS = ("exact_tv", "exact_kl", "topk_tv", "topk_kl", "topk_tv_upper", "binary_tv", "binary_kl")


def rows(seed: int, count: int, vocabulary: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities of mu and pi [count, V] and sampled ids [count]."""
    rng = np.random.default_rng(seed)
    mu = rng.normal(size=(count, vocabulary)) * 2
    pi = mu + scale * rng.normal(size=mu.shape)
    mu, pi = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (mu, pi))
    return mu, pi, rng.integers(vocabulary, size=count)


def measured(
    kind: str, mu: np.ndarray, pi: np.ndarray, sampled: np.ndarray, k: int, variant: str, dtype: torch.dtype
) -> torch.Tensor:
    """The package's value on rows [count, V]."""
    m, p = torch.tensor(mu).to(dtype), torch.tensor(pi).to(dtype)
    ids = torch.tensor(sampled)[:, None]
    own_m, own_p = m.gather(-1, ids)[:, 0], p.gather(-1, ids)[:, 0]
    if kind.startswith("exact"):
        return getattr(cd, kind)(p, m)
    if kind.startswith("binary"):
        return getattr(cd, kind)(own_p, own_m)
    top = torch.tensor(mu).argsort(-1, descending=True)[:, :k]
    inside = (top == ids).any(-1)
    return getattr(cd, kind)(p.gather(-1, top), m.gather(-1, top), own_p, own_m, inside, variant=variant)


def test_every_divergence_has_a_score_or_decides_by_others() -> None:
    assert set(cd.DIVERGENCES) == {*KINDS, "adaptive_tv"}


@pytest.mark.parametrize("variant", ["append", "replace_last"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary, k", [(5, 2), (5, 5), (40, 20), (3, 1)])
def test_equals_the_loops(kind: str, variant: str, vocabulary: int, k: int) -> None:
    mu, pi, sampled = rows(3, 60, vocabulary, 0.8)
    want = [
        reference.divergence(kind, np.exp(m), np.exp(p), int(y), k, variant)
        for m, p, y in zip(mu, pi, sampled, strict=True)
    ]
    got = measured(kind, mu, pi, sampled, k, variant, torch.float64)
    # 1 - sum and fsum differ by rounding of the class "other"; a KL of it is as exact as the mass.
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-11)
    got32 = measured(kind, mu, pi, sampled, k, variant, torch.float32)
    torch.testing.assert_close(got32, torch.tensor(want), rtol=1e-4, atol=5e-6, check_dtype=False)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(1, 30), st.floats(0.01, 3))
def test_order_of_the_partitions(seed: int, vocabulary: int, k: int, scale: float) -> None:
    """binary <= replace_last <= append <= exact <= upper (TV); Pinsker; ranges."""
    k = min(k, vocabulary)
    mu, pi, sampled = rows(seed, 20, vocabulary, scale)
    slack = 1e-9
    for measure in ("tv", "kl"):
        binary = measured(f"binary_{measure}", mu, pi, sampled, k, "append", torch.float64)
        replace = measured(f"topk_{measure}", mu, pi, sampled, k, "replace_last", torch.float64)
        append = measured(f"topk_{measure}", mu, pi, sampled, k, "append", torch.float64)
        exact = measured(f"exact_{measure}", mu, pi, sampled, k, "append", torch.float64)
        assert (binary <= replace + slack).all()
        assert (replace <= append + slack).all()
        assert (append <= exact + slack).all()
    tv = measured("exact_tv", mu, pi, sampled, k, "append", torch.float64)
    for variant in ("append", "replace_last"):
        upper = measured("topk_tv_upper", mu, pi, sampled, k, variant, torch.float64)
        assert (tv <= upper + slack).all() and (upper <= 1).all()
    assert (tv <= (exact / 2).sqrt() + slack).all()  # Pinsker: exact is the KL here
    assert (tv >= 0).all() and (tv <= 1).all() and (binary >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_policies_have_none(kind: str, dtype: torch.dtype) -> None:
    mu, _, sampled = rows(5, 40, 30, 0.0)
    got = measured(kind, mu, mu, sampled, 20, "append", dtype)
    if kind == "topk_tv_upper":  # the two rests may still differ from each other inside
        assert (got <= 0.5).all()
        return
    assert got.dtype == torch.float32
    assert (got.abs() < 1e-6).all() and (got >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computed_in_float32_or_better(dtype: torch.dtype) -> None:
    """Half-precision inputs are widened first: the same as widening them by hand."""
    mu, pi, sampled = rows(6, 30, 30, 0.5)
    mu, pi = (torch.tensor(x).to(dtype).double().numpy() for x in (mu, pi))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for kind in KINDS:
        got = measured(kind, mu, pi, sampled, 20, "append", dtype)
        assert got.dtype == wide
        assert torch.equal(got, measured(kind, mu, pi, sampled, 20, "append", wide))


def test_without_gradient() -> None:
    p = torch.tensor([-1.0, -2.0], requires_grad=True)
    m = torch.tensor([-1.5, -2.5])
    assert not cd.binary_tv(p, m).requires_grad
    assert not cd.binary_kl(p, m).requires_grad
    row = torch.randn(2, 4, requires_grad=True)
    assert not cd.exact_tv(row, torch.randn(2, 4)).requires_grad
    assert not cd.exact_kl(row, torch.randn(2, 4)).requires_grad
    assert not cd.topk_tv(row, row.detach(), p, m, torch.tensor([True, False])).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_of_the_binary_scores(dtype: torch.dtype) -> None:
    """Log-probabilities of 0 and -inf, tiny positives by rounding: never NaN, never negative, TV at most 1."""
    ends = torch.tensor([0.0, 1e-7, -1e-7, -1e-4, -1.0, -30.0, -95.0, -1e4, -math.inf], dtype=dtype)
    p, m = (x.flatten() for x in torch.meshgrid(ends, ends, indexing="ij"))
    tv, kl = cd.binary_tv(p, m), cd.binary_kl(p, m)
    for value in (tv, kl):
        assert value.isfinite().all()
        assert (value >= 0).all()
    assert (tv <= 1).all()
    same = p == m
    assert (tv[same] == 0).all() and (kl[same].abs() < 1e-6).all()
    # mu certain of a token that pi gave up: TV is 1 and KL is large, not lost to the clamp.
    assert cd.binary_tv(ends[-1:], ends[:1]).item() == 1
    assert cd.binary_kl(ends[-1:], ends[:1]).item() > 20


@pytest.mark.parametrize("variant", ["append", "replace_last"])
def test_ends_of_the_top_k_scores(variant: Any) -> None:
    """Mass 1 on the K ids (other = 0 or a tiny negative by rounding), -inf slots, certain and impossible samples."""
    inf = math.inf
    mu = torch.tensor([[0.0, -inf, -inf], [-0.6931472, -0.6931471, -inf], [-0.1, -3.0, -4.0], [-1e-8, -20.0, -30.0]])
    pi = torch.tensor([[-inf, 0.0, -inf], [-0.1, -2.3, -9.0], [0.0, -inf, -inf], [-30.0, -20.0, -1e-8]])
    for own in (0, 1, 2):
        for inside in (True, False):
            flags = torch.full((4,), inside)
            p, m = (pi[:, own], mu[:, own]) if inside else (torch.full((4,), -inf), torch.full((4,), -50.0))
            for f in (cd.topk_tv, cd.topk_kl, cd.topk_tv_upper):
                value = f(pi, mu, p, m, flags, variant=variant)
                assert value.isfinite().all() and (value >= 0).all(), (f.__name__, value)
                if "tv" in f.__name__:
                    assert (value <= 1).all()
    assert cd.topk_tv(pi[:1], mu[:1], pi[:1, 0], mu[:1, 0], torch.tensor([True]), variant=variant).item() == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 30))
def test_the_interval_is_both_ends(seed: int, sharpness: float) -> None:
    """`topk_interval` holds the exact TV, and its ends are the loops' values."""
    mu, pi, sampled = rows(seed, 20, 12, 1.0)
    mu, pi = ((x * sharpness) - np.log(np.exp(x * sharpness).sum(-1, keepdims=True)) for x in (mu, pi))
    m, p, ids = torch.tensor(mu), torch.tensor(pi), torch.tensor(sampled)[:, None]
    top = m.argsort(-1, descending=True)[:, :4]
    inside = (top == ids).any(-1)
    lower, upper = cd.topk_interval(
        p.gather(-1, top), m.gather(-1, top), p.gather(-1, ids)[:, 0], m.gather(-1, ids)[:, 0], inside
    )
    exact = cd.exact_tv(p, m)
    assert (lower <= exact + 1e-12).all() and (exact <= upper + 1e-12).all()
    narrower = torch.zeros_like(exact), torch.ones_like(exact)  # with more classes, until it is one number
    for k in range(1, m.shape[1] + 1):
        at = m.argsort(-1, descending=True)[:, :k]
        own = (at == ids).any(-1)
        ends = cd.topk_interval(
            p.gather(-1, at), m.gather(-1, at), p.gather(-1, ids)[:, 0], m.gather(-1, ids)[:, 0], own
        )
        assert (narrower[0] <= ends[0] + 1e-12).all() and (ends[1] <= narrower[1] + 1e-12).all()
        narrower = ends
    for end in narrower:
        torch.testing.assert_close(end, exact, rtol=1e-9, atol=1e-11)
    for kind, got in (("topk_tv", lower), ("topk_tv_upper", upper)):
        want = [
            reference.divergence(kind, np.exp(a), np.exp(b), int(y), 4) for a, b, y in zip(mu, pi, sampled, strict=True)
        ]
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 30))
def test_never_nan_for_peaked_rows(seed: int, sharpness: float) -> None:
    mu, pi, sampled = rows(seed, 20, 12, 3.0)
    mu, pi = ((x * sharpness) - np.log(np.exp(x * sharpness).sum(-1, keepdims=True)) for x in (mu, pi))
    for kind in KINDS:
        for variant in ("append", "replace_last"):
            got = measured(kind, mu, pi, sampled, 4, variant, torch.float32)
            assert got.isfinite().all() and (got >= 0).all()
            assert "tv" not in kind or (got <= 1).all()


def test_exact_takes_logits_or_log_probabilities_and_infinite_ones() -> None:
    logits = torch.randn(3, 6, dtype=torch.float64)
    other = torch.randn(3, 6, dtype=torch.float64)
    for f in (cd.exact_tv, cd.exact_kl):
        torch.testing.assert_close(f(logits + 7, other - 3), f(logits.log_softmax(-1), other.log_softmax(-1)))
    # A vocabulary padded with -inf logits on both sides (Megatron) adds nothing.
    pad = torch.full((3, 2), -math.inf, dtype=torch.float64)
    for f in (cd.exact_tv, cd.exact_kl):
        torch.testing.assert_close(f(torch.cat([logits, pad], -1), torch.cat([other, pad], -1)), f(logits, other))


def test_numerics_of_the_specification() -> None:
    """spec 5.5: m = 1 - 1e-7 against p = 1 - 2e-7, and a token that pi gave up."""
    # log-probabilities carry 1 - p to full precision even in float32, so the exact figure is within reach.
    p, m = math.log1p(-2e-7), math.log1p(-1e-7)
    exact = (1 - 1e-7) * (m - p) + 1e-7 * math.log(0.5)
    assert exact == pytest.approx(3.07e-8, rel=2e-3)
    got = cd.binary_kl(torch.tensor([p], dtype=torch.float64), torch.tensor([m], dtype=torch.float64)).item()
    assert got == pytest.approx(exact, rel=1e-4)
    got = cd.binary_kl(torch.tensor([p], dtype=torch.float32), torch.tensor([m], dtype=torch.float32)).item()
    assert got == pytest.approx(exact, abs=1e-7)
    got = cd.binary_kl(torch.tensor([math.log(1e-9)]), torch.tensor([math.log(0.3)])).item()
    assert got == pytest.approx(5.606115, abs=1e-5)


def test_wrong_shapes_are_named() -> None:
    k, t = torch.zeros(4, 3), torch.zeros(4)
    inside = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="inside"):
        cd.topk_tv(k, k, t, t, torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="topk_logp"):
        cd.topk_kl(k, torch.zeros(4, 2), t, t, inside)
    with pytest.raises(ValueError, match="variant"):
        cd.topk_tv(k, k, t, t, inside, variant="prepend")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row"):
        cd.exact_tv(torch.zeros(2, 5), torch.zeros(2, 6))
