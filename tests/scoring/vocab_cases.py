"""Inputs of the vocabulary-parallel tests, the same in every process, and their dense reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cppo.scoring.parallel import VocabShard, rank_and_size


@dataclass(frozen=True)
class Case:
    """One set of logits. `scale`: standard deviation of the logits. `masked`: share of columns at -inf."""

    name: str
    vocab: int = 301
    tokens: int = 17
    k: int = 6
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    scale: float = 3.0
    masked: float = 0.0
    per_token_temperature: bool = False

    def logits(self) -> Tensor:
        """``[tokens, V]``, in `dtype`."""
        g = torch.Generator().manual_seed(self.vocab)
        z = torch.randn(self.tokens, self.vocab, generator=g) * self.scale
        if self.masked:
            hidden = torch.rand(self.vocab, generator=g) < self.masked
            hidden[torch.randint(self.vocab, (1,), generator=g)] = False  # one token at least can be drawn
            z[:, hidden] = -torch.inf
        return z.to(self.dtype)

    def ids(self, size: int) -> Tensor:
        """``[tokens, K]``: for k = V all; else random, with repetitions, and with the first and last id of each of the
        `size` parts among them.
        """
        if self.k == self.vocab:
            return torch.arange(self.vocab).expand(self.tokens, -1).contiguous()
        g = torch.Generator().manual_seed(1)
        ids = torch.randint(self.vocab, (self.tokens, self.k), generator=g)
        ids[:, -1] = ids[:, 0]
        each = -(-self.vocab // size)
        edges = [e for r in range(1, size + 1) for e in (r * each - 1, r * each) if e < self.vocab]
        edges += [0, self.vocab - 1]
        for row, edge in zip(range(self.tokens), edges, strict=False):
            ids[row, row % self.k] = edge
        return ids

    def temperatures(self) -> float | Tensor:
        if self.per_token_temperature:
            return torch.linspace(0.5, 2.0, self.tokens)
        return self.temperature

    def dense(self) -> tuple[Tensor, Tensor]:
        """log-softmax ``[tokens, V]`` and logsumexp ``[tokens]``, float64, all columns at once."""
        t = self.temperatures()
        z = self.logits().double() / (t.double()[:, None] if isinstance(t, Tensor) else t)
        return z.log_softmax(-1), z.logsumexp(-1)


CASES = (
    Case("divisible", vocab=300),
    Case("not divisible", vocab=301),
    Case("one id", k=1),
    Case("every id", vocab=47, k=47),
    Case("temperature 0.7", temperature=0.7),
    Case("temperature 1.9", temperature=1.9, dtype=torch.bfloat16),
    Case("a temperature for each token", per_token_temperature=True),
    Case("huge logits", scale=1e4, temperature=0.7),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("float16", dtype=torch.float16),
    Case("float64", dtype=torch.float64),
    Case("columns at -inf", masked=0.5),
    Case("all but few columns at -inf", masked=0.98, vocab=60),
    Case("fewer ids than a part may hold", vocab=4, k=2),
    Case("one token", tokens=1),
    Case("large vocabulary", vocab=20_001, tokens=5, dtype=torch.bfloat16),
)


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    """Equal to 1e-6 of the value or absolutely (1e-12 for float64), infinities included."""
    tolerance = 1e-12 if got.dtype == torch.float64 else 1e-6
    ok = torch.isclose(got.double(), want.double(), rtol=tolerance, atol=tolerance)
    assert bool(ok.all()), f"{what}: {got[~ok]} instead of {want[~ok]}"


class Collectives(TorchDispatchMode):
    """What reaches torch's collectives (c10d operators), whichever Python function they were called by.

    `calls` holds (operator, elements, dtype) of each; everything that exchanges data is seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensor = args[0][0]  # the list of tensors that are reduced in place, or of lists that are gathered into
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            self.calls.append((func._opname, tensor.numel(), tensor.dtype))
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block must raise a ValueError whose message holds all words."""
    with pytest.raises(ValueError) as caught:
        yield
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def shards_of(case: Case, size: int, shard: Any) -> Iterator[tuple[str, Any, Callable[[Tensor], Tensor]]]:
    """The ways to split a case's vocabulary: name, this rank's shard, and how to cut its columns out of all.

    Padding columns hold the values that would do most harm if they were looked at.
    """
    each = -(-case.vocab // size)

    def padded(columns: int) -> Callable[[Tensor], Tensor]:
        def cut(z: Tensor) -> Tensor:
            junk = torch.full((*z.shape[:-1], columns * size - case.vocab), 3e4).to(z.dtype)
            junk[..., ::2] = torch.nan
            held = shard.equal(columns, case.vocab)
            return torch.cat([z, junk], -1)[..., held.start : held.stop].contiguous()

        return cut

    yield "equal", shard.equal(each, case.vocab), padded(each)
    # As Megatron does: to a multiple of 128 for each rank, so that whole parts may be padding.
    yield "padded", shard.equal(each + 128, case.vocab), padded(each + 128)
    short = chunked(case.vocab)
    yield "chunked", short, lambda z: z[..., short.start : short.stop].contiguous()


def chunked(vocab: int) -> VocabShard:
    """DTensor's layout over the default group: parts of ceil(V / ranks), the last ones shorter or empty."""
    rank, size = rank_and_size(None)
    each = -(-vocab // size)
    return VocabShard(min(rank * each, vocab), min((rank + 1) * each, vocab), vocab)
