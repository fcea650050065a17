"""The other weight schedules of CPPO: those of `cppo.theory.schedules`, and their prefix sums, in both layouts."""

from __future__ import annotations

import pytest
import torch

import cppo
from cppo.rules.weights import SHAPES
from cppo.theory.schedules import make_schedule

from .cases import pack, pad, random_responses

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
