"""Group-relative advantages against NumPy, and the zero-spread filter down to the denominators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cppo
from cppo.advantages import group_advantages, zero_spread

groups = st.tuples(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 9))


@settings(max_examples=50, deadline=None)
@given(groups)
def test_equals_numpy(shape: tuple[int, int, int]) -> None:
    seed, prompts, n = shape
    rewards = np.random.default_rng(seed).normal(size=(prompts, n))
    centred = rewards - rewards.mean(1, keepdims=True)
    want = {
        "centred": centred,
        "zscore": centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-6),
        "zscore_population": centred / (rewards.std(1, keepdims=True) + 1e-6),
    }
    for kind, values in want.items():
        got = group_advantages(torch.tensor(rewards).flatten(), n, kind)  # type: ignore[arg-type]
        assert got.shape == (prompts * n,)
        np.testing.assert_allclose(got.numpy(), values.flatten(), atol=1e-12)
        narrow = group_advantages(torch.tensor(rewards, dtype=torch.float32).flatten(), n, kind)  # type: ignore[arg-type]
        assert narrow.dtype == torch.float32
        np.testing.assert_allclose(narrow.numpy(), values.flatten(), atol=1e-4)


def test_eps_and_pairs() -> None:
    """n = 2: +-.7071 (unbiased); eps is added to the std."""
    r = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert group_advantages(r, 2).tolist() == pytest.approx([2**-0.5, -(2**-0.5)], abs=1e-5)
    assert group_advantages(r, 2, eps=1.0).tolist() == pytest.approx([0.5 / (2**-0.5 + 1), -0.5 / (2**-0.5 + 1)])


@pytest.mark.parametrize("kind", ["zscore", "zscore_population"])
def test_a_group_of_one(kind: Any) -> None:
    """verl: mean 0 and std 1 are assumed, A = R / (1 + 1e-6)."""
    r = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)
    assert group_advantages(r, 1, kind).tolist() == pytest.approx([1 / (1 + 1e-6), -0.5 / (1 + 1e-6), 0.0])
    assert group_advantages(r, 1, "centred").tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["zscore", "zscore_population", "centred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_no_advantage(kind: Any, dtype: torch.dtype) -> None:
    """Exactly zero, not the rounding error of the mean divided by eps (0.1 and 0.7 have no finite binary fraction)."""
    for n in (2, 3, 7, 8, 16):
        for reward in (0.0, 1.0, 0.1, 0.7, -3.3, 1e-8, 1234.567):
            r = torch.full((n,), reward, dtype=dtype)
            assert (group_advantages(r, n, kind) == 0).all(), (n, reward)
            assert zero_spread(r, n).all()


def test_groups_do_not_mix() -> None:
    r = torch.tensor([1.0, 0.0, 5.0, 5.0, 0.0, 1.0])
    together = group_advantages(r, 2)
    apart = torch.cat([group_advantages(r[i : i + 2], 2) for i in (0, 2, 4)])
    assert torch.equal(together, apart)
    assert zero_spread(r, 2).tolist() == [False, False, True, True, False, False]


def test_dtypes() -> None:
    for dtype in (torch.bool, torch.int64, torch.float16, torch.bfloat16):
        r = torch.tensor([1, 0, 0, 1]).to(dtype)
        assert group_advantages(r, 4).dtype == torch.float32
        assert group_advantages(r, 4).tolist() == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024], abs=1e-6)
        assert zero_spread(r, 2).tolist() == [False] * 4


def test_errors_are_sentences() -> None:
    r = torch.zeros(6)
    for bad in (lambda: group_advantages(r, 4), lambda: zero_spread(r, 4), lambda: group_advantages(r.view(2, 3), 3)):
        with pytest.raises(ValueError, match="group_size"):
            bad()
    with pytest.raises(ValueError, match="group_size"):
        group_advantages(r, 0)
    with pytest.raises(ValueError, match="zscore"):
        group_advantages(r, 3, "z-score")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_dropped_groups_leave_loss_and_denominators(how: Any) -> None:
    """The aggregate with a zero-spread group masked out equals that of the batch without the group."""
    g = torch.Generator().manual_seed(1)
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])  # the second of three groups is useless
    policy, rollout = (-torch.rand(6, 5, generator=g) - 0.2 for _ in range(2))
    mask = torch.rand(6, 5, generator=g) < 0.8
    keep = ~zero_spread(rewards, 2)
    advantages = group_advantages(rewards, 2)
    rule = cppo.CPPO(divergence="binary_tv")

    def total(rows: torch.Tensor, loss_mask: torch.Tensor) -> float:
        batch = cppo.TokenBatch(policy[rows], rollout[rows], advantages[rows], loss_mask)
        return cppo.aggregate(cppo.token_loss(batch, rule(batch).coefficient), batch, how, horizon=16).item()

    everything = torch.ones(6, dtype=torch.bool)
    masked = total(everything, mask & keep[:, None])
    assert masked == pytest.approx(total(keep, mask[keep]), rel=1e-6)
    assert masked != pytest.approx(total(everything, mask), rel=1e-3)  # it does matter
