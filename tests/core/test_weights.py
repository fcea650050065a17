"""CPPO's weights: shapes as in `cppo.theory.schedules`; shuffled ones keep the multiset of w_1..w_T, not its order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cppo
from cppo.rules.weights import SHAPES
from cppo.theory.schedules import make_schedule

from . import reference
from .cases import Response, pack, pad, random_responses

shapes = st.lists(st.integers(1, 20), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)
few = settings(max_examples=12, deadline=None)


def shuffled(responses: list[Response], lay: Any = pad, seed: int = 0, **more: Any) -> list[torch.Tensor]:
    """The weights of each response's loss tokens, read off the thresholds of the rule without budget."""
    batch = lay(responses, **more)
    rule = cppo.CPPO(delta=0.1, w_min=0.2, weights="shuffled", prefix_budget=False, divergence="binary_tv", seed=seed)
    verdict: Any = rule(batch.tokens)
    thresholds = batch.split(verdict.threshold.expand_as(verdict.divergence))
    return [0.1 / t[r.mask] for t, r in zip(thresholds, responses, strict=True)]


@few
@given(seed=seeds, lengths=shapes, holes=st.sampled_from([0.0, 0.4]))
def test_shuffled_weights(seed: int, lengths: list[int], holes: float) -> None:
    """The same multiset in each response, whatever the padding, packing, order, split and holes."""
    responses = random_responses(seed, lengths, 0.3, holes)
    weights = shuffled(responses)
    for w, r in zip(weights, responses, strict=True):
        linear = torch.tensor(reference.linear_weights(int(r.mask.sum()), 0.2), dtype=torch.float32)
        torch.testing.assert_close(w.sort(descending=True).values, linear, rtol=1e-5, atol=1e-6)
    others = [
        shuffled(responses, right=9),
        shuffled(responses, left=3, garbage=math.nan),
        shuffled(responses, pack),
        shuffled(responses[::-1], pack)[::-1],
        [shuffled([r])[0] for r in responses],
        shuffled([r.columns(r.mask) for r in responses], pack),
    ]
    for other in others:
        for w, v in zip(weights, other, strict=True):
            torch.testing.assert_close(w, v, rtol=1e-6, atol=0)


def test_shuffles_depend_on_the_seed_and_the_response_but_not_on_the_policy() -> None:
    responses = random_responses(9, [60, 60], 0.3)
    first, second = shuffled(responses)
    linear = torch.tensor(reference.linear_weights(60, 0.2))
    assert not torch.allclose(first, linear) and not torch.allclose(first, second)
    assert not torch.allclose(first, shuffled(responses, seed=1)[0])
    assert torch.equal(first, shuffled(responses)[0])
    # mu is fixed while a rollout batch is reused, pi is not: the permutation holds over its updates.
    later = [Response(r.policy - 0.3, r.rollout, r.advantage, r.mask) for r in responses]
    torch.testing.assert_close(shuffled(later)[0], first)


def test_shuffles_are_uniform() -> None:
    """Over many responses, every position gets every rank equally often (chi-square far below its 1e-6 tail)."""
    responses = random_responses(10, [5] * 4000, 0.3)
    weights = torch.stack(shuffled(responses))
    rank = ((1 - weights) / 0.2).round().long()  # w = 1 - 0.8 k / 4
    counts = torch.stack([(rank == k).sum(0) for k in range(5)]).double()
    assert counts.sum() == 5 * 4000
    chi_square = ((counts - 800) ** 2 / 800).sum().item()
    assert chi_square < 55  # 16 degrees of freedom
    # Repeated tokens (equal log-probabilities) are still told apart by their position.
    constant = Response(torch.full((50,), -1.0), torch.full((50,), -1.2), torch.ones(50), torch.ones(50).bool())
    assert len(shuffled([constant])[0].unique()) == 50


NAMES = {"linear": "linear", "none": "constant", **{shape: shape for shape in SHAPES}}


@pytest.mark.parametrize("weights", NAMES)
def test_weights_are_those_of_the_theory(weights: str) -> None:
    responses = random_responses(3, [1, 2, 3, 17, 40], holes=0.3)
    rule = cppo.CPPO(weights=weights, w_min=0.3, divergence="binary_tv")
    for batch in (pad(responses, left=2, right=3), pack(responses)):
        found = [batch.split(x.expand(batch.tokens.loss_mask.shape)) for x in rule.position_weights(batch.tokens)]
        for response, w, before, last in zip(responses, *found, strict=True):
            count = int(response.mask.sum())
            if not count:
                continue
            expected = torch.tensor(make_schedule(NAMES[weights], count, 0.3), dtype=torch.float32)
            sums = torch.cat([torch.zeros(1), expected.cumsum(0)])
            torch.testing.assert_close(w[response.mask], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(before[response.mask], sums[:-1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(last[response.mask], sums[-2].expand(count), rtol=1e-5, atol=1e-5)


def test_the_shapes_differ() -> None:
    """At a floor of 0.3 no two of them are the same, and all but the reversed one fall."""
    tables = {name: make_schedule(name, 9, 0.3) for name in SHAPES}
    assert not any((tables[a] == tables[b]).all() for a in tables for b in tables if a < b)
    with pytest.raises(ValueError, match="Did you mean 'reversed'"):
        cppo.CPPO(weights="reverse")
