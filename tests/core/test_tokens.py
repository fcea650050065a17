"""TokenBatch: which shapes are accepted, which errors name which argument, what `check()` sees."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import cppo

SHAPE = (3, 5)


def padded(**changes: Any) -> cppo.TokenBatch:
    arguments: dict[str, Any] = {
        "policy_logp": torch.full(SHAPE, -1.0),
        "rollout_logp": torch.full(SHAPE, -1.1),
        "advantages": torch.ones(3),
        "mask": torch.ones(SHAPE, dtype=torch.bool),
    }
    return cppo.TokenBatch(**{**arguments, **changes})


def packed(**changes: Any) -> cppo.TokenBatch:
    arguments: dict[str, Any] = {
        "policy_logp": torch.full((9,), -1.0),
        "rollout_logp": torch.full((9,), -1.1),
        "advantages": torch.ones(3),
        "mask": torch.ones(9, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 2, 5, 9], dtype=torch.int32),
    }
    return cppo.TokenBatch(**{**arguments, **changes})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("advantages", [(3,), (3, 1), (3, 5)])
@pytest.mark.parametrize("mask", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_accepted_padded(dtype: torch.dtype, advantages: tuple[int, ...], mask: torch.dtype) -> None:
    batch = padded(policy_logp=torch.full(SHAPE, -1.0, dtype=dtype), advantages=torch.ones(advantages))
    verdict = cppo.NoTrustRegion()(batch)
    assert verdict.coefficient.shape == SHAPE
    assert verdict.coefficient.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert verdict.reason.dtype == torch.uint8 and verdict.reason.shape == SHAPE
    loss = cppo.token_loss(batch, verdict.coefficient)
    assert loss.shape == SHAPE and loss.dtype == verdict.coefficient.dtype
    assert padded(mask=torch.ones(SHAPE).to(mask)).check() is not None


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("advantages", [(3,), (9,)])
def test_accepted_packed(index: torch.dtype, advantages: tuple[int, ...]) -> None:
    values = torch.arange(1.0, 1 + math.prod(advantages)).reshape(advantages)
    batch = packed(advantages=values, cu_seqlens=torch.tensor([0, 2, 5, 9]).to(index))
    loss = cppo.token_loss(batch, cppo.NoTrustRegion()(batch).coefficient)
    each = values if advantages == (9,) else values.repeat_interleave(torch.tensor([2, 3, 4]))
    torch.testing.assert_close(loss, -each * math.exp(0.1) * batch.policy_logp)
    assert batch.check() is batch


def test_per_sequence_advantages_broadcast_along_rows() -> None:
    """[B] and [B, 1] and [B, T] mean the same, also where B = T."""
    square = (4, 4)
    a = torch.tensor([1.0, 2.0, -3.0, 4.0])
    losses = []
    for advantages in (a, a[:, None], a[:, None].expand(square)):
        batch = cppo.TokenBatch(torch.full(square, -1.0), torch.full(square, -1.0), advantages, torch.ones(square))
        losses.append(cppo.token_loss(batch, cppo.NoTrustRegion()(batch).coefficient))
    assert torch.equal(losses[0], a[:, None].expand(square))  # -c A log pi with log pi = -1
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


BAD_PADDED: list[tuple[str, dict[str, Any]]] = [
    ("policy_logp", {"policy_logp": torch.zeros(15)}),
    ("policy_logp", {"policy_logp": torch.zeros(3, 5, 1)}),
    ("policy_logp", {"policy_logp": torch.zeros(SHAPE, dtype=torch.int64)}),
    ("rollout_logp", {"rollout_logp": torch.zeros(3, 6)}),
    ("rollout_logp", {"rollout_logp": torch.zeros(3, 1)}),
    ("rollout_logp", {"rollout_logp": torch.zeros(SHAPE, dtype=torch.int32)}),
    ("rollout_logp", {"rollout_logp": None}),
    ("rollout_logp", {"rollout_logp": torch.zeros(SHAPE, device="meta")}),
    ("advantages", {"advantages": torch.zeros(5)}),
    ("advantages", {"advantages": torch.zeros(1, 5)}),
    ("advantages", {"advantages": torch.zeros(())}),
    ("advantages", {"advantages": torch.zeros(3, dtype=torch.int64)}),
    ("advantages", {"advantages": torch.zeros(3, device="meta")}),
    ("mask", {"mask": torch.ones(3)}),
    ("mask", {"mask": torch.ones(5, 3)}),
    ("mask", {"mask": torch.ones(SHAPE, device="meta")}),
    ("mask", {"mask": torch.ones(SHAPE, dtype=torch.complex64)}),
    ("divergence", {"divergence": torch.zeros(3, 4)}),
    ("divergence", {"divergence": torch.zeros(SHAPE, dtype=torch.int64)}),
    ("divergence", {"divergence": torch.zeros(SHAPE, device="meta")}),
]
BAD_PACKED: list[tuple[str, dict[str, Any]]] = [
    ("policy_logp", {"policy_logp": torch.zeros(1, 9)}),
    ("rollout_logp", {"rollout_logp": torch.zeros(8)}),
    ("advantages", {"advantages": torch.zeros(4)}),
    ("advantages", {"advantages": torch.zeros(3, 1)}),
    ("mask", {"mask": torch.ones(10)}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 9.0])}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([[0, 9]])}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0])}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 2, 5, 9], device="meta")}),
    ("shard", {"shard": cppo.Shard(None, (0,))}),
]


def is_a_sentence(error: Exception, name: str) -> None:
    text = str(error)
    assert name in text and len(text) > 30 and text.rstrip()[-1] in ".?)"


@pytest.mark.parametrize("name, changes", BAD_PADDED)
def test_the_constructor_names_the_argument_padded(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        padded(**changes)
    is_a_sentence(error.value, name)


@pytest.mark.parametrize("name, changes", BAD_PACKED)
def test_the_constructor_names_the_argument_packed(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        packed(**changes)
    is_a_sentence(error.value, name)


@pytest.mark.parametrize("argument", ["policy_logp", "advantages", "mask", "cu_seqlens", "divergence"])
def test_something_that_is_no_tensor(argument: str) -> None:
    """A list or an array in place of a tensor is named, too."""
    with pytest.raises((ValueError, TypeError)) as error:
        packed(**{argument: [0.0] * 9})
    assert argument in str(error.value)


def test_missing_rollout_log_probabilities_say_what_to_set() -> None:
    with pytest.raises(ValueError, match=r"rollout_logp is None.*sampler") as error:
        padded(rollout_logp=None)
    is_a_sentence(error.value, "rollout_logp")


def test_columns_that_do_not_split_into_chunks() -> None:
    with pytest.raises(ValueError, match="chunks"):
        padded(shard=cppo.Shard(None, (0, 3)))


def test_the_constructor_looks_at_no_value() -> None:
    """On the meta device there are no values: nothing may synchronise."""
    meta: dict[str, Any] = {"device": "meta"}
    batch = cppo.TokenBatch(
        torch.zeros(SHAPE, **meta), torch.zeros(SHAPE, **meta), torch.zeros(3, **meta), torch.ones(SHAPE, **meta)
    )
    for rule in (cppo.DPPO(divergence="binary_tv"), cppo.CPPO(divergence="binary_tv"), cppo.MinPRO(), cppo.PPOClip()):
        assert cppo.token_loss(batch, rule(batch).coefficient).shape == SHAPE
    cu = torch.tensor([0, 2, 5, 9]).to("meta")
    cppo.TokenBatch(torch.zeros(9, **meta), torch.zeros(9, **meta), torch.zeros(3, **meta), torch.ones(9, **meta), cu)


def changed(shape: tuple[int, ...], at: tuple[int, ...], value: float, fill: float = -1.0) -> torch.Tensor:
    x = torch.full(shape, fill)
    x[at] = value
    return x


BAD_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("policy_logp", {"policy_logp": changed(SHAPE, (1, 2), math.nan)}),
    ("policy_logp", {"policy_logp": changed(SHAPE, (1, 2), 0.5)}),
    ("policy_logp", {"policy_logp": changed(SHAPE, (1, 2), math.inf)}),
    ("rollout_logp", {"rollout_logp": changed(SHAPE, (0, 0), math.nan)}),
    ("rollout_logp", {"rollout_logp": changed(SHAPE, (0, 0), 2.0)}),
    ("rollout_logp", {"rollout_logp": changed(SHAPE, (0, 0), -math.inf)}),
    ("advantages", {"advantages": torch.tensor([1.0, math.nan, 0.0])}),
    ("advantages", {"advantages": changed(SHAPE, (2, 4), math.inf)}),
    ("mask", {"mask": changed(SHAPE, (2, 4), 0.5, fill=1.0)}),
    ("mask", {"mask": torch.full(SHAPE, 2)}),
    ("divergence", {"divergence": changed(SHAPE, (0, 1), -0.1, fill=0.1)}),
    ("divergence", {"divergence": changed(SHAPE, (0, 1), math.nan, fill=0.1)}),
    ("divergence", {"divergence": changed(SHAPE, (0, 1), math.inf, fill=0.1)}),
]
BAD_BOUNDARIES = [[0, 2, 5, 8], [1, 2, 5, 9], [0, 5, 2, 9], [0, 2, 5, 10], [0, 10, 5, 9]]


@pytest.mark.parametrize("name, changes", BAD_VALUES)
def test_check_names_the_argument(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        padded(**changes).check()
    is_a_sentence(error.value, name)


@pytest.mark.parametrize("name, changes", BAD_VALUES)
def test_check_ignores_what_the_mask_leaves_out(name: str, changes: dict[str, Any]) -> None:
    if name == "mask":
        return
    value = changes[name]
    if value.dim() == 1:
        value = value[:, None].expand(SHAPE)
    bad = ~value.isfinite() | (value > 0.3) | (value < -1) | ((value < 0) if name == "divergence" else False)
    batch = padded(**{name: value}, mask=~bad)
    assert batch.check() is batch


@pytest.mark.parametrize("boundaries", BAD_BOUNDARIES)
def test_check_of_the_boundaries(boundaries: list[int]) -> None:
    with pytest.raises(ValueError) as error:
        packed(cu_seqlens=torch.tensor(boundaries, dtype=torch.int32)).check()
    is_a_sentence(error.value, "cu_seqlens")


def test_check_accepts_what_is_right() -> None:
    """-inf from the policy, exact zeros, rounding above 0 of a half-precision engine, no loss token at all."""
    for changes in (
        {"policy_logp": changed(SHAPE, (0, 0), -math.inf)},
        {"policy_logp": changed(SHAPE, (0, 0), 0.0), "rollout_logp": changed(SHAPE, (0, 0), 0.0)},
        {"rollout_logp": changed(SHAPE, (0, 0), 1e-5)},
        {"mask": torch.zeros(SHAPE)},
        {"divergence": torch.zeros(SHAPE)},
    ):
        batch = padded(**changes)
        assert batch.check() is batch
    assert packed().check().check()


def test_a_batch_is_immutable_and_with_divergence_copies() -> None:
    batch = padded()
    with pytest.raises(AttributeError):
        batch.mask = torch.zeros(SHAPE)  # type: ignore[misc]
    d = torch.full(SHAPE, 0.1)
    other = batch.with_divergence(d)
    assert batch.divergence is None and other.divergence is d and other.policy_logp is batch.policy_logp


@pytest.mark.parametrize("make", [padded, packed])
def test_inputs_are_never_written_to(make: Any) -> None:
    """Rules work in place on their own tensors only: float32 inputs with a full mask are the risky case."""
    for full in (True, False):
        batch = make()
        if not full:
            batch.mask.flatten()[::3] = False
        d = torch.rand_like(batch.policy_logp) * 0.3
        batch = batch.with_divergence(d)
        before = [x.clone() for x in (batch.policy_logp, batch.rollout_logp, batch.advantages, batch.mask, d)]
        for name in cppo.RULES:
            verdict = cppo.make_rule(name)(batch)
            cppo.token_loss(batch, verdict.coefficient)
            cppo.metrics(batch, verdict)
        after = (batch.policy_logp, batch.rollout_logp, batch.advantages, batch.mask, d)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
