"""The compact store of mu's top-K: what comes back, how far off, in how many bytes, and what is refused."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cppo.divergence import exact_tv, topk_tv, topk_tv_upper
from cppo.scoring.store import RaggedTopK, contains, pack_topk, topk_error_bound, unpack_topk

INF = math.inf
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
#: Everything a float32 log-probability can be: 0, subnormal, below the lowest float16, -inf.
LOGP = st.one_of(st.floats(max_value=0, width=32, allow_nan=False), st.floats(-20, 0, width=32), st.just(-INF))


@st.composite
def entries(draw: st.DrawFn, shape: st.SearchStrategy = SHAPES, most: int = 6) -> tuple[Tensor, Tensor]:
    """Any ids and log-probabilities ``[..., K]``."""
    full = (*draw(shape), draw(st.integers(1, most)))
    count = math.prod(full)
    ids = draw(st.lists(st.integers(0, 2**24 - 1), min_size=count, max_size=count))
    logp = draw(st.lists(LOGP, min_size=count, max_size=count))
    return torch.tensor(ids, dtype=torch.int64).view(full), torch.tensor(logp, dtype=torch.float32).view(full)


def policies(seed: int, count: int, vocabulary: int, scale: float, drift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Full rows of log mu and log pi, float64 ``[count, V]``, and sampled ids, half of them mu's, half uniform."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(count, vocabulary, generator=g, dtype=torch.float64) * scale
    mu = z.log_softmax(-1)
    pi = (z + drift * torch.randn(count, vocabulary, generator=g, dtype=torch.float64)).log_softmax(-1)
    tokens = torch.multinomial(mu.exp(), 1, generator=g)[:, 0]
    tokens[::2] = torch.randint(vocabulary, tokens[::2].shape, generator=g)
    return mu, pi, tokens


def at(rows: Tensor, ids: Tensor) -> Tensor:
    return rows.gather(-1, ids if ids.dim() == 2 else ids[:, None]).view(ids.shape)


def interval(ids: Tensor, logp: Tensor, mu: Tensor, pi: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """TV_K and its upper end in float64, the way engines are to take them from a store."""
    policy = at(pi, ids).masked_fill(logp == -INF, -INF)
    given_to = (policy, logp.double(), at(pi, tokens), at(mu, tokens), contains(ids, logp, tokens))
    return topk_tv(*given_to), topk_tv_upper(*given_to)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- what comes back -----------------------------------------------------------------------------------------------


@given(entries())
def test_round_trip(sample: tuple[Tensor, Tensor]) -> None:
    ids, logp = sample
    packed = pack_topk(ids, logp)
    assert packed.dtype == torch.uint8 and packed.shape == (*ids.shape[:-1], 5 * ids.shape[-1])
    got_ids, got = unpack_topk(packed)
    assert got_ids.dtype == torch.int64 and got.dtype == torch.float32
    unused = logp == -INF
    assert torch.equal(got_ids, torch.where(unused, 0, ids))
    assert torch.equal(got == -INF, unused)
    wide, back = logp.double()[~unused].clamp(min=-65504), got.double()[~unused]
    error = (wide - back).abs()
    assert (error <= 2.0**-11 * torch.minimum(wide.abs(), back.abs()) + 2.0**-25).all()
    assert (back <= 0).all()


def test_every_float16_comes_back_unchanged() -> None:
    bits = torch.arange(-32768, -1024, dtype=torch.int32).to(torch.int16)  # 0x8000 ... 0xFC00 excluded: -0.0 to -65504
    logp = bits.view(torch.float16).float()
    assert logp.isfinite().all() and logp.min() == -65504
    ids = torch.arange(logp.numel()) * 528 + 3
    assert ids.max() < 2**24
    assert same(unpack_topk(pack_topk(ids, logp)), (ids, logp))
    # Half-way to the neighbour is the worst that rounding meets.
    between = (logp[1:] + logp[:-1]) / 2
    got = unpack_topk(pack_topk(ids[1:], between))[1]
    assert ((got - between).abs() <= 2.0**-11 * got.abs() + 2.0**-25).all()


def test_layout_of_an_entry() -> None:
    packed = pack_topk(torch.tensor([0x030201, 2**24 - 1, 7]), torch.tensor([-1.0, -2.5, -INF]))
    assert packed.tolist() == [0x00, 0xBC, 1, 2, 3, 0x00, 0xC1, 255, 255, 255, 0x00, 0xFC, 0, 0, 0]


def test_a_used_slot_stays_used() -> None:
    logp = torch.tensor([[-65504.0, -65519.0, -65536.0, -1e30, -1e-8, -1e-30, 0.0, 1e-4]])
    ids = torch.arange(1, 9)[None]
    for got_ids, got in (unpack_topk(pack_topk(ids, logp)), RaggedTopK.pack(ids.flip(-1), logp.flip(-1)).unpack()):
        assert got.isfinite().sum() >= 1 and (got <= 0).all()
        assert got_ids[got == -INF].eq(0).all()
    got = unpack_topk(pack_topk(ids, logp))[1]
    torch.testing.assert_close(got, torch.tensor([[-65504.0] * 4 + [0.0] * 4]), rtol=0, atol=2.0**-25)
    got_ids, got = RaggedTopK.pack(ids, logp, epsilon=0).unpack()  # nothing is cut, however unlikely
    assert got.isfinite().all() and set(got_ids[0].tolist()) == set(range(1, 9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("integers", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_dtypes_and_strides(dtype: torch.dtype, integers: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(127, (7, 4, 5), generator=g).to(integers)
    logp = (-9 * torch.rand(7, 4, 5, generator=g)).to(dtype)
    want = pack_topk(ids.long(), logp.float())
    assert torch.equal(pack_topk(ids, logp), want)
    scattered = pack_topk(ids.mT.contiguous().mT, torch.stack([logp, logp], -1)[..., 0])
    assert torch.equal(scattered, want)
    assert same(unpack_topk(want.mT.contiguous().mT), unpack_topk(want))
    odd = torch.cat([torch.zeros(7, 4, 1, dtype=torch.uint8), want], -1)[..., 1:]  # starts at an odd byte
    assert same(unpack_topk(odd), unpack_topk(want))
    ragged = RaggedTopK.pack(ids.transpose(0, 1), logp.transpose(0, 1))
    assert same(ragged.unpack(), RaggedTopK.pack(*(x.transpose(0, 1).contiguous() for x in (ids, logp))).unpack())


def test_without_gradient() -> None:
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    ids = torch.tensor([[3, 4]])
    assert not unpack_topk(pack_topk(ids, logp))[1].requires_grad
    assert not RaggedTopK.pack(ids, logp).unpack()[1].requires_grad
    assert not topk_error_bound(logp).requires_grad


def test_shuffled_and_split_as_a_tensor() -> None:
    """The dense store is a tensor whose rows engines may move about."""
    g = torch.Generator().manual_seed(1)
    ids, logp = torch.randint(2**24, (6, 3, 4), generator=g), -torch.rand(6, 3, 4, generator=g)
    packed, order = pack_topk(ids, logp), torch.randperm(6, generator=g)
    moved = torch.cat(packed[order].split(4))
    assert same(unpack_topk(moved), unpack_topk(pack_topk(ids[order], logp[order])))


# -- bytes ---------------------------------------------------------------------------------------------------------


def test_bytes_a_token() -> None:
    mu, _, _ = policies(2, 64, 1000, 3.0, 0.0)
    top = mu.topk(20)
    assert pack_topk(top.indices, top.values).nbytes == 64 * 100
    ragged = RaggedTopK.pack(top.indices, top.values)
    assert ragged.nbytes == ragged.counts.nbytes + ragged.entries.nbytes
    assert ragged.bytes_per_token == 1 + 5 * ragged.counts.double().mean().item() <= 101
    # Peaked, as a trained language model's: four tokens in five are certain.
    peaked = torch.where(torch.arange(64)[:, None] % 5 > 0, mu * 30, mu).log_softmax(-1).topk(20)
    few = RaggedTopK.pack(peaked.indices, peaked.values)
    assert few.bytes_per_token < 30
    assert few.bytes_per_token > 6  # a count and one entry


def test_without_tokens() -> None:
    ids, logp = torch.zeros(0, 3, 20, dtype=torch.int64), torch.zeros(0, 3, 20)
    made = RaggedTopK.pack(ids, logp)
    assert made.nbytes == made.bytes_per_token == 0 and made.shape == (0, 3) and made.k == 20
    for ids_and_logp in (made.unpack(), unpack_topk(pack_topk(ids, logp))):
        assert [x.shape for x in ids_and_logp] == [(0, 3, 20)] * 2
    assert made.cat([made, made]).shape == (0, 3)


# -- error bounds --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(2, 60), st.integers(1, 30), st.floats(0.1, 12), st.floats(0, 2))
def test_rounding_moves_the_tv_within_its_bound(seed: int, vocab: int, k: int, scale: float, drift: float) -> None:
    mu, pi, tokens = policies(seed, 20, vocab, scale, drift)
    top = mu.float().topk(min(k, vocab))
    ids, logp = unpack_topk(pack_topk(top.indices, top.values))
    moved = (logp.double().exp() - top.values.double().exp()).abs().sum(-1)
    for bound in (topk_error_bound(logp), topk_error_bound(top.values)):
        assert (moved <= bound + 1e-12).all()
        before = interval(top.indices, top.values, mu, pi, tokens)
        after = interval(ids, logp, mu, pi, tokens)
        for x, y in zip(before, after, strict=True):
            assert ((x - y).abs() <= bound + 1e-12).all()
    low, high = after
    exact = exact_tv(pi, mu)
    bound = topk_error_bound(logp) + 1e-7 * ids.shape[-1]  # float32's own rounding of log mu
    assert (low - bound <= exact).all() and (exact <= high + bound).all()


@pytest.mark.parametrize("value", [-1.0, -0.5, -2.0, -4.0])
def test_the_bound_is_not_larger_than_it_must_be(value: float) -> None:
    """Half-way above a power of two rounding is at its worst, and a single class has "other" move with it."""
    true = torch.tensor([[value * (1 + 2.0**-11)]])
    logp = unpack_topk(pack_topk(torch.tensor([[5]]), true))[1]
    assert logp.item() == value
    p, own, outside = torch.tensor([[-0.1]]).double(), torch.full((1,), -INF).double(), torch.tensor([False])
    moved = (topk_tv(p, true.double(), own, own, outside) - topk_tv(p, logp.double(), own, own, outside)).abs()
    for bound in (topk_error_bound(logp), topk_error_bound(true)):
        assert (moved <= bound).all() and (bound <= 1.01 * moved).all()


def test_bound_of_small_and_unused() -> None:
    got = topk_error_bound(torch.tensor([[-INF, -INF], [0.0, -INF], [-65504.0, -1e30], [-200.0, -1.0]]))
    want = [0.0, math.expm1(2.0**-25), 0.0, math.exp(-1) * math.expm1(2.0**-11 + 2.0**-25)]
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=0)
    logp = torch.randn(3, 20).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(topk_error_bound(logp), entropy * 2.0**-11, rtol=2e-3, atol=1e-7)
    assert topk_error_bound(logp.double()).dtype == torch.float64


# -- ragged --------------------------------------------------------------------------------------------------------


def kept(logp: list[float], epsilon: float) -> int:
    """The fewest of `logp`, likeliest first, whose mass reaches 1 - epsilon; without those of no mass."""
    mass, count = 0.0, 0
    for value in sorted(logp, reverse=True):
        if mass >= 1 - epsilon or value == -INF:
            break
        mass, count = mass + math.exp(value), count + 1
    return count


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 30), st.floats(0.1, 12), st.sampled_from([1e-4, 1e-3, 1e-2, 0.3]))
def test_fewest_entries_that_cover(seed: int, k: int, scale: float, epsilon: float) -> None:
    mu, _, _ = policies(seed, 20, 30, scale, 0.0)
    top = mu.topk(k)
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(20, k, generator=g).argsort(-1)  # any order
    made = RaggedTopK.pack(top.indices.gather(-1, order), top.values.gather(-1, order), epsilon=epsilon)
    # float32's sums decide: a row that comes within their rounding of 1 - epsilon may go either way
    sums = top.values.exp().cumsum(-1)
    clear = ((sums - (1 - epsilon)).abs() > 1e-6).all(-1)
    want = torch.tensor([kept(row, epsilon) for row in top.values.tolist()])
    assert torch.equal(made.counts[clear], want[clear].to(torch.uint8))
    assert (made.counts >= 1).all() and (made.counts <= k).all()
    ids, logp = made.unpack()
    first = torch.arange(k) < made.counts[:, None]
    assert torch.equal(ids, torch.where(first, top.indices, 0))
    assert torch.equal(logp, torch.where(first, unpack_topk(pack_topk(top.indices, top.values))[1], -INF))


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(1, 30),
    st.floats(0.1, 12),
    st.floats(0, 2),
    st.sampled_from([1e-3, 1e-2, 0.1, 0.5]),
)
def test_cutting_lowers_the_tv_by_epsilon_at_most(
    seed: int, k: int, scale: float, drift: float, epsilon: float
) -> None:
    mu, pi, tokens = policies(seed, 20, 40, scale, drift)
    top = mu.topk(k)
    ragged = RaggedTopK.pack(top.indices, top.values, epsilon=epsilon).unpack()
    low, high = interval(*ragged, mu, pi, tokens)
    exact = exact_tv(pi, mu)
    bound = topk_error_bound(ragged[1]) + 1e-7 * k
    assert (low - bound <= exact).all() and (exact <= high + bound).all()
    # Cutting alone, without the rounding (which leaves masses that sum to a little more or less than 1)
    used = ragged[1] != -INF
    low, high = interval(ragged[0], top.values.masked_fill(~used, -INF), mu, pi, tokens)
    dense_low, dense_high = interval(top.indices, top.values, mu, pi, tokens)
    rest = 1 - top.values.exp().where(used, 0.0).sum(-1)
    most = torch.where(used.all(-1), 0.0, rest) + 1e-9
    assert (most <= epsilon + 1e-6).all()  # the mass is measured in float32
    assert (low <= dense_low + 1e-9).all() and (dense_low <= low + most).all()
    assert (dense_high <= high + 1e-9).all() and (high <= dense_high + most).all()


def test_the_most_that_cutting_can_hide() -> None:
    """mu and pi each put epsilon where the other puts nothing: the whole of it disappears in "other"."""
    mu = torch.tensor([[0.9, 0.1, 1e-30, 1e-30]]).double().log()
    pi = torch.tensor([[0.9, 1e-30, 0.1, 1e-30]]).double().log()
    top, tokens = mu.topk(2), torch.tensor([0])
    whole = interval(*unpack_topk(pack_topk(top.indices, top.values)), mu, pi, tokens)
    cut = interval(*RaggedTopK.pack(top.indices, top.values, epsilon=0.11).unpack(), mu, pi, tokens)
    assert abs(whole[0].item() - 0.1) < 1e-3 and abs(cut[0].item()) < 1e-3 and abs(cut[1].item() - 0.1) < 1e-3


def test_at_most_k_and_unused_rows() -> None:
    mu, _, _ = policies(4, 8, 30, 0.2, 0.0)
    top = mu.topk(20)
    made = RaggedTopK.pack(top.indices, top.values, k=3)
    assert made.k == 3 and made.counts.eq(3).all() and same(made.unpack(), RaggedTopK.pack(*_first(top, 3)).unpack())
    wider = RaggedTopK.pack(top.indices, top.values, k=25)  # more than there are
    assert wider.k == 25 and wider.counts.eq(20).all() and wider.unpack()[1].shape == (8, 25)
    masked = top.values.masked_fill((torch.arange(8) % 2 == 0)[:, None], -INF)  # tokens outside of the loss
    made = RaggedTopK.pack(top.indices, masked)
    assert made.counts[::2].eq(0).all() and made.counts[1::2].eq(20).all()
    ids, logp = made.unpack()
    assert ids[::2].eq(0).all() and logp[::2].eq(-INF).all()


def _first(top: torch.return_types.topk, k: int) -> tuple[Tensor, Tensor]:
    return top.indices[:, :k], top.values[:, :k]


def test_pi_must_be_masked_in_unused_slots() -> None:
    """Id 0 in an unused slot is a real token: with pi's log-probability left there its mass would count again."""
    mu, pi, tokens = policies(5, 40, 30, 4.0, 0.5)
    mu[:, 0] += 6  # id 0 is likely, and often sampled
    pi[:, 0] += 6
    mu, pi = mu.log_softmax(-1), pi.log_softmax(-1)
    tokens[:10] = 0
    top = mu.topk(12)
    made = RaggedTopK.pack(top.indices, top.values, epsilon=1e-2)
    ids, logp = made.unpack()
    low, high = interval(ids, logp, mu, pi, tokens)
    for i, count in enumerate(made.counts.tolist()):
        row = slice(i, i + 1)
        want = interval(ids[row, :count], logp[row, :count], mu[row], pi[row], tokens[row])
        assert abs(low[i] - want[0].item()) < 1e-12 and abs(high[i] - want[1].item()) < 1e-12
    wrong = topk_tv(at(pi, ids), logp.double(), at(pi, tokens), at(mu, tokens), contains(ids, logp, tokens))
    assert (made.counts < 12).any() and ((wrong - low).abs() > 0.1).any()


def test_contains() -> None:
    ids = torch.tensor([[3, 0, 0], [0, 7, 0], [4, 0, 0], [1, 2, 3]])
    logp = torch.tensor([[-0.1, -INF, -INF], [-0.1, -3.0, -INF], [-0.1, -INF, -INF], [-0.1, -3.0, -4.0]])
    assert contains(ids, logp, torch.tensor([0, 0, 4, 5])).tolist() == [False, True, True, False]
    assert contains(ids, logp, torch.tensor([3, 7, 0, 3])).tolist() == [True, True, False, True]
    assert contains(ids.view(2, 2, 3), logp.view(2, 2, 3), torch.zeros(2, 2, dtype=torch.int32)).shape == (2, 2)
    with pytest.raises(ValueError, match="tokens"):
        contains(ids, logp, torch.zeros(3, dtype=torch.int64))


# -- rows ----------------------------------------------------------------------------------------------------------


def batch(*shape: int, k: int = 6) -> tuple[Tensor, Tensor]:
    """Rows of various peakedness, a few without any entry."""
    g = torch.Generator().manual_seed(len(shape))
    scale = torch.rand(*shape, 1, generator=g) * 12
    top = (torch.randn(*shape, 40, generator=g) * scale).log_softmax(-1).topk(k)
    return top.indices, top.values.masked_fill(torch.rand(*shape, 1, generator=g) < 0.1, -INF)


def equal(a: RaggedTopK, b: RaggedTopK) -> bool:
    return a.k == b.k and torch.equal(a.counts, b.counts) and torch.equal(a.entries, b.entries)


@pytest.mark.parametrize("shape", [(9,), (9, 4), (9, 2, 3), (9, 0)])
@pytest.mark.parametrize("sizes", [1, 4, 9, [2, 0, 7]], ids=str)
def test_split_and_cat(shape: tuple[int, ...], sizes: int | list[int]) -> None:
    ids, logp = batch(*shape)
    made = RaggedTopK.pack(ids, logp)
    parts = made.split(sizes)
    for part, i, x in zip(parts, ids.split(sizes), logp.split(sizes), strict=True):
        assert equal(part, RaggedTopK.pack(i, x))
    assert equal(RaggedTopK.cat(parts), made)
    # An engine whose batches are lists shuffles a list of rows.
    order = list(range(9))
    random.Random(0).shuffle(order)
    rows = made.split(1)
    assert equal(RaggedTopK.cat([rows[i] for i in order]), RaggedTopK.pack(ids[order], logp[order]))


def test_rows_that_do_not_fit() -> None:
    made = RaggedTopK.pack(*batch(9, 4))
    scalar = RaggedTopK.pack(torch.tensor([1, 2]), torch.tensor([-1.0, -2.0]))
    for others in ([], [RaggedTopK.pack(*batch(9, 5))], [RaggedTopK.pack(*batch(9, 4, k=5))], [scalar]):
        with pytest.raises(ValueError, match="must be the same"):
            RaggedTopK.cat([made, *others] if others else [])
    with pytest.raises(ValueError, match="must be the same"):
        RaggedTopK.cat([scalar, scalar])


# -- refusals ------------------------------------------------------------------------------------------------------

IDS, LOGPS = torch.tensor([[1, 2]]), torch.tensor([[-1.0, -2.0]])


@pytest.mark.parametrize("pack", [pack_topk, RaggedTopK.pack])
@pytest.mark.parametrize(
    "ids, logp, message",
    [
        (torch.tensor([[1, 2**24]]), LOGPS, "1 of 2 ids are outside .* such as 16777216"),
        (torch.tensor([[-1, 2]]), LOGPS, "such as -1"),
        (IDS, torch.tensor([[-1.0, math.nan]]), "1 are NaN"),
        (IDS, torch.tensor([[-1.0, 0.01]]), "1 are above 0"),
        (IDS, torch.tensor([[-1.0, INF]]), "1 are above 0"),
        (IDS.float(), LOGPS, "expected integers"),
        (IDS.bool(), LOGPS, "expected integers"),
        (IDS, LOGPS.long(), "expected floating point"),
        (IDS[0], LOGPS, "the same shape"),
        (IDS[:, :0], LOGPS[:, :0], "K of at least 1"),
        (IDS[0, 0], LOGPS[0, 0], "K of at least 1"),
        (IDS, LOGPS.to("meta"), "is on"),
    ],
)
def test_refused(pack: Callable, ids: Tensor, logp: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(ids, logp)


def test_unused_slots_may_hold_any_id() -> None:
    ids, logp = torch.tensor([[5, -1, 2**40]]), torch.tensor([[-1.0, -INF, -INF]])
    assert unpack_topk(pack_topk(ids, logp))[0].tolist() == [[5, 0, 0]]
    assert RaggedTopK.pack(ids, logp).unpack()[0].tolist() == [[5, 0, 0]]


def test_values_are_looked_at_where_that_is_free() -> None:
    bad = torch.tensor([[2**24 + 9, 2]]), torch.tensor([[0.5, -2.0]])
    ids, logp = unpack_topk(pack_topk(*bad, check=False))
    assert ids.tolist() == [[9, 2]] and logp.tolist() == [[0.0, -2.0]]
    # A tensor on "meta" has no values: anything that would synchronise an accelerator fails there.
    meta = torch.empty(2, 3, 4, device="meta", dtype=torch.int64), torch.empty(2, 3, 4, device="meta")
    ids, logp = unpack_topk(pack_topk(*meta))
    assert ids.shape == logp.shape == (2, 3, 4) and ids.is_meta
    assert contains(ids, logp, ids[..., 0]).shape == topk_error_bound(logp).shape == (2, 3)
    with pytest.raises(RuntimeError):
        pack_topk(*meta, check=True)


def test_parameters_out_of_range() -> None:
    for epsilon in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="epsilon"):
            RaggedTopK.pack(IDS, LOGPS, epsilon=epsilon)
    for k in (0, 256):
        with pytest.raises(ValueError, match="1 to 255"):
            RaggedTopK.pack(IDS, LOGPS, k=k)
    with pytest.raises(ValueError, match="1 to 255"):
        RaggedTopK.pack(IDS.expand(150, 2).reshape(1, 300), LOGPS.expand(150, 2).reshape(1, 300))
    most = RaggedTopK.pack(IDS[:, :1].expand(1, 255), torch.full((1, 255), -8.0))
    assert most.counts.tolist() == [255] and most.unpack()[1].eq(-8).all()
    byte = torch.zeros(2, 12, dtype=torch.uint8)
    for packed in (byte, byte[:, :0], byte[:, :10].int(), byte[0, 0]):
        with pytest.raises(ValueError, match=r"expected uint8 \[..., 5K\]"):
            unpack_topk(packed)
    with pytest.raises(ValueError, match="entries has shape"):
        RaggedTopK(byte, byte, 3)
    with pytest.raises(ValueError, match="expected uint8"):
        RaggedTopK(byte.int(), byte[:, :5], 3)
