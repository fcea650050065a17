"""`metrics()` against NumPy loops over responses; the same for every layout; reduced over processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cppo
from cppo import Reason

from .cases import CASES, NEEDS_DIVERGENCE, Batch, make, pack, pad, random_responses

HELD = (Reason.TOKEN_LIMIT, Reason.PREFIX_BUDGET, Reason.SEQUENCE_LIMIT, Reason.RATIO_CLIP, Reason.CLAMPED)


def slow(batch: Batch, verdict: Any) -> dict[str, float]:
    """The definitions, a response at a time."""
    masks = [r.mask.numpy() for r in batch.responses]

    def rows(x: Tensor) -> list[Any]:
        split = batch.split(x.expand(verdict.reason.shape))
        return [row.double().numpy()[m] for row, m in zip(split, masks, strict=True)]

    reasons, coefficients = rows(verdict.reason), rows(verdict.coefficient)
    ratios = [
        (r.policy.double() - r.rollout.double()).clamp(max=20).exp().numpy()[m]
        for r, m in zip(batch.responses, masks, strict=True)
    ]
    flat = np.concatenate(reasons)
    out = {f"{reason.name.lower()}_fraction": float((flat == reason).mean()) for reason in Reason}
    del out["outside_fraction"]
    out["masked_fraction"] = float((np.concatenate(coefficients) == 0).mean())
    out["ratio_mean"], out["ratio_max"] = np.concatenate(ratios).mean(), np.concatenate(ratios).max()
    if verdict.divergence is not None:
        d = np.concatenate(rows(verdict.divergence))
        out |= {"divergence_mean": d.mean(), "divergence_p90": np.quantile(d, 0.9), "divergence_max": d.max()}
    filled = [i for i, m in enumerate(masks) if m.any()]
    for name in ("delta_b", "budget_used"):
        value = getattr(verdict, name)
        if value is not None:
            out[name] = float(np.mean([value[i].item() for i in filled]))
    first = [1 + int(np.isin(r, HELD).argmax()) for r in reasons if np.isin(r, HELD).any()]
    if first:
        out["first_rejected_position"] = float(np.mean(first))
    if verdict.capped is not None:
        out["capped_fraction"] = float(np.concatenate(rows(verdict.capped)).mean())
    return {f"trust/{key}": float(value) for key, value in out.items()}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    holes=st.sampled_from([0.0, 0.3]),
    empty=st.booleans(),
)
def test_equals_numpy_padded_and_packed(case: str, seed: int, lengths: list[int], holes: float, empty: bool) -> None:
    responses = random_responses(seed, lengths, 0.4, holes)
    responses[0].mask[0] = True
    responses[0].policy[0], responses[0].rollout[0] = -1.0, -1.1
    if empty and len(responses) > 1:
        responses[1].mask[:] = False
    seen = []
    for batch in (pad(responses, left=1, right=2, garbage=float("nan")), pack(responses)):
        verdict = make(case)(batch.tokens)
        got = cppo.metrics(batch.tokens, verdict)
        want = slow(batch, verdict)
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert isinstance(got[key], float)
            assert got[key] == pytest.approx(value, rel=2e-5, abs=1e-6), key
        seen.append(got)
    for key in seen[0]:  # a token at a limit may fall either way between layouts: then the fractions jump by a token
        tokens = sum(int(r.mask.sum()) for r in responses)
        if key.endswith("fraction"):
            assert seen[0][key] == pytest.approx(seen[1][key], abs=1.01 / tokens), key


@pytest.mark.parametrize("case", CASES)
def test_fractions_add_up(case: str) -> None:
    batch = pad(random_responses(1, [40, 20], 0.4, 0.2)).tokens
    got = cppo.metrics(batch, make(case)(batch))
    reasons = [f"trust/{r.name.lower()}_fraction" for r in Reason if r != Reason.OUTSIDE]
    assert sum(got[key] for key in reasons) == pytest.approx(1)
    if CASES[case][0] not in ("cispo", "minpro") and "soft" not in case:  # these three reduce, they do not drop
        dropped = sum(got[f"trust/{r.name.lower()}_fraction"] for r in HELD)
        assert got["trust/masked_fraction"] == pytest.approx(dropped)


def test_first_update() -> None:
    """The divergence before any step on a rollout batch: 0 where sampler and trainer agree, else their mismatch."""
    for scale, low, high in ((0.0, 0.0, 1e-7), (0.01, 1e-4, 1e-2)):
        batch = pad(random_responses(3, [50, 20], scale)).tokens
        verdict = make("cppo adaptive")(batch)
        got = cppo.metrics(batch, verdict, first_update=True)
        assert low <= got["trust/first_update_divergence"] <= high
        assert got["trust/first_update_divergence"] == got["trust/divergence_mean"]
        assert "trust/first_update_divergence" not in cppo.metrics(batch, verdict)


@pytest.mark.parametrize("case", ["none", *NEEDS_DIVERGENCE])
def test_reduced_over_processes(case: str) -> None:
    """Two processes with half the responses each report what one process with all of them does (P90 is an average)."""
    responses = random_responses(4, [30, 12, 25, 9], 0.4, 0.2)
    rule = make(case)
    halves = [pad(responses[:2]).tokens, pack(responses[2:]).tokens]
    sent: list[tuple[Tensor, Tensor]] = []

    def record(sums: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
        sent.append((sums.clone(), maxima.clone()))
        return sums, maxima

    alone = [cppo.metrics(half, rule(half), reduce=record) for half in halves]
    sums, maxima = sent[0][0] + sent[1][0], torch.maximum(sent[0][1], sent[1][1])
    whole = pad(responses).tokens
    want = cppo.metrics(whole, rule(whole))
    for half in halves:
        got = cppo.metrics(half, rule(half), reduce=lambda *_: (sums, maxima))
        assert got.keys() == want.keys()
        for key in want:
            if key != "trust/divergence_p90":
                assert got[key] == pytest.approx(want[key], rel=1e-5, abs=1e-9), key
            else:
                low, high = sorted(a[key] for a in alone)
                assert low <= got[key] <= high


def test_a_batch_without_loss_tokens() -> None:
    """All groups dropped: zeros, no division by zero, no NaN."""
    for lay in (pad, pack):
        responses = random_responses(5, [6, 3], 0.3)
        for r in responses:
            r.mask[:] = False
        for case in CASES:
            batch = lay(responses).tokens
            got = cppo.metrics(batch, make(case)(batch))
            assert all(np.isfinite(value) for value in got.values())
            assert got["trust/masked_fraction"] == 0 and "trust/first_rejected_position" not in got
