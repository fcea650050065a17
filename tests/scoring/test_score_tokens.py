"""`score_tokens` against whole logits in float64: every output, every gradient, all shapes of tiles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from cppo.scoring import TokenScores, VocabShard, score_tokens

from . import dense
from .dense import HEADS, Head
from .vocab_cases import LargestTensor, refused

#: Ragged against every size above; smaller than a block of the top k, and larger than everything.
TILES = [(4, 64), (5, 37), (1, 300), (64, 1000)]


def close(got: Tensor, want: Tensor, scale: float, what: str) -> None:
    """Equal to a few roundings of logits of this size."""
    tolerance = (1e-13 if got.dtype == torch.float64 else 3e-6) * max(scale, 1.0)
    assert got.shape == want.shape, f"{what}: {list(got.shape)} instead of {list(want.shape)}"
    both = (got.double() - want).abs()
    both[(got == want) | (got.double() == want)] = 0  # infinities
    assert bool((both <= tolerance * (1 + want.abs().nan_to_num(posinf=0.0) / max(scale, 1.0))).all()), (
        f"{what}: {got[both > tolerance]} instead of {want[both > tolerance]}"
    )


def close_gradient(got: Tensor, want: Tensor, scale: float, what: str) -> None:
    """The same, in units of the largest element."""
    largest = max(want.abs().max().item() if want.numel() else 0.0, 0.1)
    if got.dtype == torch.bfloat16:
        assert bool(((got.double() - want).abs() <= 0.01 * largest).all()), what
    else:
        close(got / largest, want / largest, scale, what)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
def test_every_output_and_gradient(case: Head, tile: tuple[int, int]) -> None:
    hidden, head, ids, candidates = case.inputs()
    options = case.settings()
    wanted = [x.clone().double().requires_grad_() for x in (hidden, head)]
    z = dense.logits(*wanted, **options)
    logp = z.log_softmax(-1)
    top = min(7, case.vocab)

    given = [x.clone().requires_grad_() for x in (hidden, head)]
    got = score_tokens(*given, ids, candidates, want_top_k=top, entropy=True, tile=tile, **options)

    assert got.candidate_logp is not None and got.logsumexp is not None and got.entropy is not None
    assert got.top_ids is not None and got.top_logp is not None
    size = case.scale * 4 / min([1.0] if case.temperature == "each" else [float(case.temperature), 1.0])
    close(got.logp.detach(), logp.gather(1, ids[:, None])[:, 0].detach(), size, "logp")
    close(got.candidate_logp, logp.gather(1, candidates).detach(), size, "candidates")
    close(got.logsumexp, z.logsumexp(-1).detach(), size, "logsumexp")
    close(got.entropy, dense.entropy(logp).detach(), size, "entropy")
    close(got.top_logp, logp.topk(top, -1).values.detach(), size, "top k")
    close(got.top_logp, logp.gather(1, got.top_ids).detach(), size, "ids of the top k")
    for row in got.top_ids.tolist():
        assert len(set(row)) == top
    assert not (got.candidate_logp.requires_grad or got.logsumexp.requires_grad or got.entropy.requires_grad)
    for value in (got.logp, got.candidate_logp, got.entropy, got.top_logp):
        assert not value.isnan().any() and bool((value <= 0).all() or value is got.entropy)

    weights = torch.randn(case.tokens, generator=case.generator(), dtype=torch.float64)
    weights[3:7] = 0  # dropped by a rule
    possible = torch.isfinite(logp.gather(1, ids[:, None])[:, 0].detach())
    weights = torch.where(possible, weights, 0.0)  # a token of probability 0 has no gradient
    (torch.where(possible, logp.gather(1, ids[:, None])[:, 0], 0.0) * weights).sum().backward()
    got.logp.backward(weights.to(got.logp.dtype))
    for found, expected, what in zip(given, wanted, ("hidden", "lm_head"), strict=True):
        assert found.grad is not None and expected.grad is not None and found.grad.dtype == case.dtype
        close_gradient(found.grad, expected.grad, size, f"gradient of {what}")


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap: float | None) -> None:
    """Numerical derivatives at ragged tile sizes: 5 rows by 2, 23 columns by 7."""
    g = torch.Generator().manual_seed(0)
    hidden, head, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (23, 3), (23,))
    )
    ids, temperature = torch.randint(23, (5,), generator=g), torch.linspace(0.5, 2, 5, dtype=torch.float64)

    def logp(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        options: Any = {"temperature": temperature, "softcap": softcap, "logit_scale": 0.8, "tile": (2, 7)}
        return score_tokens(h, w, ids, bias=b, **options).logp

    assert gradcheck(logp, (hidden, head, bias))


@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 6), st.integers(1, 12), st.integers(1, 45), st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_tile(tokens: int, vocab: int, size: int, rows: int, columns: int, seed: int) -> None:
    """Chunk invariance: the tile changes nothing."""
    g = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(tokens, size, generator=g), torch.randn(vocab, size, generator=g)
    ids, k = torch.randint(vocab, (tokens,), generator=g), min(4, vocab)
    logp = dense.logits(hidden, head).log_softmax(-1)
    got = score_tokens(hidden, head, ids, entropy=True, want_top_k=k, tile=(rows, columns))
    assert got.entropy is not None and got.top_logp is not None
    close(got.logp, logp.gather(1, ids[:, None])[:, 0], 4, "logp")
    close(got.entropy, dense.entropy(logp), 4, "entropy")
    close(got.top_logp, logp.topk(k).values, 4, "top k")


@pytest.mark.parametrize("k", [1, 20, 64, 1000])
def test_top_k_over_many_blocks(k: int) -> None:
    """Winners in one block, in many, in the short last one; tied blocks."""
    g = torch.Generator().manual_seed(k)
    head = torch.randn(5003, 4, generator=g)
    head[4100:4140] *= 5
    head[5000:] *= 7
    hidden = torch.randn(33, 4, generator=g)
    got = score_tokens(hidden, head, torch.zeros(33, dtype=torch.int64), want_top_k=k, tile=(10, 1111))
    assert got.top_logp is not None and got.top_ids is not None
    want = dense.logits(hidden, head).log_softmax(-1).topk(k)
    close(got.top_logp, want.values, 20, "values")
    assert (got.top_ids == want.indices).float().mean() > 0.999  # near ties may change places


def test_leading_dimensions() -> None:
    hidden, head, ids, candidates = Head("", tokens=12).inputs()
    flat = score_tokens(hidden, head, ids, candidates, want_top_k=3, entropy=True)
    rows = score_tokens(
        hidden.view(3, 4, -1), head, ids.view(3, 4), candidates.view(3, 4, -1), want_top_k=3, entropy=True
    )
    for name in ("logp", "candidate_logp", "logsumexp", "entropy", "top_ids", "top_logp"):
        assert torch.equal(getattr(flat, name), getattr(rows, name).flatten(0, 1)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    """float32 logits by default: as exact as the rounded inputs allow. bfloat16 logits only when asked for."""
    hidden, head, ids, candidates = Head("", tokens=40, size=64, vocab=1000, scale=8, dtype=dtype).inputs()
    logp = dense.logits(hidden, head).log_softmax(-1)
    hidden.requires_grad_(), head.requires_grad_()
    got = score_tokens(hidden, head, ids, candidates, tile=(16, 300))
    assert got.logp.dtype == torch.float32 and got.candidate_logp is not None
    close(got.logp.detach(), logp.gather(1, ids[:, None])[:, 0].detach(), 8, "logp")
    got.logp.sum().backward()
    want = [x.detach().double().requires_grad_() for x in (hidden, head)]
    dense.logits(*want).log_softmax(-1).gather(1, ids[:, None]).sum().backward()
    for found, expected in zip((hidden, head), want, strict=True):
        assert found.grad is not None and expected.grad is not None and found.grad.dtype == dtype
        error = (found.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error < 0.004, f"relative error {error:.2g}: half a unit of bfloat16 is 0.002"
    coarse = score_tokens(hidden, head, ids, candidates, logits_dtype=torch.bfloat16, tile=(16, 300))
    error = (coarse.logp.double() - logp.gather(1, ids[:, None])[:, 0]).abs().max().item()
    assert 1e-3 < error < 0.2, error


def test_masked_rows_cost_nothing() -> None:
    """Counted operations: forward N V d; backward three times that for the rows whose gradient is not 0."""
    case = Head("", tokens=12)
    hidden, head, ids, _ = case.inputs()
    hidden.requires_grad_(), head.requires_grad_()
    product = 2 * case.tokens * case.vocab * case.size

    def in_place(total: Any, a: Any, b: Any, **_: Any) -> int:  # the counter does not know it
        return 2 * a[0] * a[1] * b[1]

    for kept in (12, 4, 0):
        with FlopCounterMode(display=False) as forward:
            logp = score_tokens(hidden, head, ids, tile=(3, 100)).logp
        assert forward.get_total_flops() == product
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as backward:
            logp.backward(torch.tensor([1.0] * kept + [0.0] * (12 - kept)))
        assert backward.get_total_flops() == 3 * product * kept // 12, kept


def test_no_gradient_wanted() -> None:
    hidden, head, ids, _ = Head("").inputs()
    assert not score_tokens(hidden, head, ids).logp.requires_grad
    hidden.requires_grad_()
    score_tokens(hidden, head, ids).logp.sum().backward()
    assert hidden.grad is not None and head.grad is None
    with torch.no_grad():
        assert not score_tokens(hidden, head, ids).logp.requires_grad


def test_autocast_changes_nothing() -> None:
    hidden, head, ids, _ = Head("", tokens=20, size=32).inputs()
    hidden.requires_grad_()
    plain = score_tokens(hidden, head, ids)
    (want,) = torch.autograd.grad(plain.logp.sum(), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        cast = score_tokens(hidden, head, ids)
        (got,) = torch.autograd.grad(cast.logp.sum(), hidden)
    assert torch.equal(plain.logp, cast.logp) and torch.equal(want, got)


def test_largest_tensor_does_not_grow_with_the_tokens() -> None:
    """Beside results and gradients: two tiles, forward and backward."""
    sizes = []
    for tokens in (64, 256):
        hidden, head, ids, candidates = Head("", tokens=tokens, size=4, vocab=4001).inputs()
        hidden.requires_grad_(), head.requires_grad_()
        with LargestTensor() as largest:
            found = score_tokens(hidden, head, ids, candidates, want_top_k=3, entropy=True, tile=(16, 1000))
            found.logp.sum().backward()
        sizes.append(largest.bytes)
    tile, gradient = 16 * 1000 * 4, 4001 * 4 * 4
    assert sizes[0] == sizes[1] <= max(tile, gradient), sizes


def scores(**changes: Any) -> TokenScores:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "lm_head": torch.zeros(9, 4),
        "token_ids": torch.zeros(3, dtype=torch.int64),
    }
    return score_tokens(**(arguments | changes))


def test_refusals() -> None:
    with refused("lm_head has shape [4, 9]", "[V, 4]", "transposed"):
        scores(lm_head=torch.zeros(4, 9))
    with refused("lm_head has shape [36]"):
        scores(lm_head=torch.zeros(36))
    with refused("lm_head has dtype torch.bfloat16", "torch.float32"):
        scores(lm_head=torch.zeros(9, 4, dtype=torch.bfloat16))
    with refused("lm_head is on meta"):
        scores(lm_head=torch.zeros(9, 4, device="meta"))
    with refused("token_ids is on meta"):
        scores(token_ids=torch.zeros(3, dtype=torch.int64, device="meta"))
    with refused("hidden has dtype torch.int64"):
        scores(hidden=torch.zeros(3, 4, dtype=torch.int64))
    with refused("token_ids has shape [4]", "[3]"):
        scores(token_ids=torch.zeros(4, dtype=torch.int64))
    with refused("candidate_ids has shape [3]", "[3, K]"):
        scores(candidate_ids=torch.zeros(3, dtype=torch.int64))
    with refused("token_ids has dtype torch.float32"):
        scores(token_ids=torch.zeros(3))
    with refused("token_ids has dtype torch.int16", "ends at 32767", "40000", "overflowed"):
        scores(lm_head=torch.zeros(40001, 4), token_ids=torch.zeros(3, dtype=torch.int16))
    with refused("candidate_ids has dtype torch.uint8"):
        scores(lm_head=torch.zeros(300, 4), candidate_ids=torch.zeros(3, 2, dtype=torch.uint8))
    with refused("1 of 3 token_ids are outside [0, 9)", "such as 9"):
        scores(token_ids=torch.tensor([0, 9, 1]))
    with refused("candidate_ids are outside", "-100"):
        scores(candidate_ids=torch.full((3, 2), -100))
    with refused("bias has dtype torch.float32 and shape [3]", "[9]"):
        scores(bias=torch.zeros(3))
    for name in ("temperature", "softcap", "logit_scale"):
        for value in (0.0, -1.0, math.nan, math.inf):
            with refused(name, "above 0"):
                scores(**{name: value})
    with refused("temperature has shape [2]"):
        scores(temperature=torch.ones(2))
    with refused("want_top_k is 10", "0 to 9"):
        scores(want_top_k=10)
    with refused("logits_dtype is torch.int8"):
        scores(logits_dtype=torch.int8)
    with refused("tile is (0, 5)"):
        scores(tile=(0, 5))
    with refused("lm_head has 9 rows here", "0 to 5"):
        scores(shard=VocabShard(0, 5, 9))
    unchecked = scores(token_ids=torch.tensor([0, 9, -1]), check=False)
    assert unchecked.logp.isnan().tolist() == [False, True, True]


def test_padding_rows_of_a_head() -> None:
    """Rows beyond vocab_size hold anything and get no gradient."""
    hidden, head, ids, _ = Head("", vocab=50).inputs()
    padded = torch.cat([head, torch.full((14, head.shape[1]), torch.nan)]).requires_grad_()
    got = score_tokens(hidden, padded, ids, entropy=True, shard=VocabShard(0, 64, 50), tile=(4, 30))
    want = score_tokens(hidden, head, ids, entropy=True, tile=(4, 30))
    assert torch.equal(got.logp, want.logp) and got.entropy is not None and want.entropy is not None
    assert torch.equal(got.entropy, want.entropy)
    got.logp.sum().backward()
    assert padded.grad is not None and bool((padded.grad[50:] == 0).all()) and bool(padded.grad[:50].any())
