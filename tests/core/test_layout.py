"""Operations along a response, in all three layouts, against plain loops and NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cppo.layout import Layout
from cppo.tokens import layout


def boundaries(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def both(values: list[Tensor], fill: float) -> list[tuple[Layout, Tensor, list[slice | tuple[int, slice]]]]:
    """The same sequences padded and packed, with the slice of each."""
    lengths = [len(v) for v in values]
    width = max(lengths)
    padded = torch.full((len(values), width), fill, dtype=values[0].dtype)
    for row, v in zip(padded, values, strict=True):
        row[: len(v)] = v
    edges = boundaries(lengths).tolist()
    return [
        (layout(), padded, [(i, slice(0, n)) for i, n in enumerate(lengths)]),
        (layout(boundaries(lengths)), torch.cat(values), [slice(a, b) for a, b in pairwise(edges)]),
    ]


lengths_of = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda lengths: max(lengths) > 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), lengths_of)
def test_sums_minima_maxima(seed: int, lengths: list[int]) -> None:
    """Restarted at every sequence, empty sequences included."""
    g = torch.Generator().manual_seed(seed)
    values = [torch.rand(n, generator=g, dtype=torch.float64) for n in lengths]
    for where, x, slices in both(values, 0.0):
        before, low = where.exclusive_cumsum(x.clone()), where.exclusive_cummin(x.clone(), 0.4)
        low_inf = where.exclusive_cummin(x.clone(), math.inf)
        total, high = where.total(x.clone()).expand_as(x), where.maximum(x.clone()).expand_as(x)
        for v, at in zip(values, slices, strict=True):
            for t in range(len(v)):
                assert before[at][t].item() == pytest.approx(v[:t].sum().item(), abs=1e-12)
                assert low[at][t].item() == min([0.4, *v[:t].tolist()])
                assert low_inf[at][t].item() == min([math.inf, *v[:t].tolist()])
                assert total[at][t].item() == pytest.approx(v.sum().item(), abs=1e-12)
                assert high[at][t].item() == v.max().item()


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), lengths_of, st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.9, 1.0])))
def test_quantile_is_numpys(seed: int, lengths: list[int], q: float) -> None:
    """Linear interpolation over the masked-in values of each sequence; 0 where there is none."""
    rng = np.random.default_rng(seed)
    values = [torch.tensor(rng.random(n)) for n in lengths]
    masks = [torch.tensor(rng.random(n) < 0.7) for n in lengths]
    for (where, x, slices), (_, mask, _) in zip(both(values, math.nan), both(masks, 0), strict=True):
        x = torch.where(mask, x, torch.zeros_like(x))
        got = where.quantile(x, mask, q).expand_as(x)
        for v, m, at in zip(values, masks, slices, strict=True):
            want = np.quantile(v[m].numpy(), q) if m.any() else 0.0
            assert np.allclose(got[at].numpy(), want, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), lengths_of)
def test_rank(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    values = [torch.tensor(rng.random(n)) for n in lengths]
    masks = [torch.tensor(rng.random(n) < 0.7) for n in lengths]
    for (where, x, slices), (_, mask, _) in zip(both(values, 0.5), both(masks, 0), strict=True):
        got = where.rank(x, mask)
        for v, m, at in zip(values, masks, slices, strict=True):
            want = [int((v[m] < a).sum()) for a in v[m]]
            assert got[at][m].tolist() == want


def test_quantile_beyond_the_limit_of_torch() -> None:
    """torch.quantile refuses more than 2^24 elements; a batch of 16k-token responses has more."""
    rows, width = 1025, 2**14
    x = (torch.arange(width, dtype=torch.float32) / (width - 1)).repeat(rows, 1)
    assert x.numel() > 2**24
    got = layout().quantile(x, torch.ones(rows, width, dtype=torch.bool), 0.9)
    torch.testing.assert_close(got, torch.full_like(got, 0.9))


def test_precision_of_long_prefix_sums() -> None:
    """spec 5.5: 16384 x 1e-3 is 16.384 (bf16 stalls at 0.5); in a pack, what lies before costs no digit."""
    n = 16384
    x = torch.full((n,), 1e-3)
    padded = layout().exclusive_cumsum(x[None].clone())
    assert padded[0, -1].item() + 1e-3 == pytest.approx(16.384, abs=2e-4)
    # 2 million tokens of divergence 1 before the sequence that counts: float32 differences would be off by 0.1.
    ahead = torch.ones(2_000_000)
    packed = layout(boundaries([len(ahead), n])).exclusive_cumsum(torch.cat([ahead, x]))
    assert packed[-1].item() + 1e-3 == pytest.approx(16.384, abs=1e-5)
    assert packed[len(ahead)].item() == 0
    total = layout(boundaries([len(ahead), n])).total(torch.cat([ahead, x]))
    assert total[-1].item() == pytest.approx(16.384, abs=1e-5)
