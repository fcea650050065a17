"""Random problems with fixed seeds, drawn as dictionaries (`reference.Case`) and turned into the package's tables.

They differ in vocabulary (2-4), horizon (2-6), the end-of-sequence token (none, or any), the size of the divergences
(1e-6 to 1, per position) and rewards, and in some of them mu or pi never emits certain tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest

from cppo.theory import TabularProblem

from . import reference
from .reference import Case, Tokens

INSTANCES, CHUNK = 320, 20
JUNK_REWARD = 99.0  # of sequences that go on after their end

every_chunk = pytest.mark.parametrize("chunk", range(INSTANCES // CHUNK))


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    p = [math.exp(x - top) for x in logits]
    return [x / math.fsum(p) for x in p]


def without(p: list[float], token: int) -> list[float]:
    """The distribution given that it is not this token."""
    rest = math.fsum(x for v, x in enumerate(p) if v != token)
    return [0.0 if v == token else x / rest for v, x in enumerate(p)]


def draw(seed: int) -> Case:
    """A random case; every number of it follows from the seed."""
    rng = random.Random(seed)
    V, T = rng.randint(2, 4), rng.randint(2, 6)
    eos = rng.choice([None, rng.randrange(V)])
    scale = 10 ** rng.uniform(-6, 1)
    scales = [scale * 10 ** rng.choice([0.0, rng.uniform(-1.5, 0)]) for _ in range(T)]
    gives_up = rng.choice([0.0, 0.0, 0.3])
    mu: reference.Policy = {}
    pi: reference.Policy = {}
    for s in reference.prefixes(V, T, eos):
        logits = [rng.gauss(0, 1) for _ in range(V)]
        m, p = softmax(logits), softmax([x + scales[len(s)] * rng.gauss(0, 1) for x in logits])
        unreachable = reference.probability(mu, s) == 0
        if s and rng.random() < gives_up:
            token = rng.randrange(V)
            m, p = without(m, token), without(p, token)
        elif rng.random() < gives_up:
            p = without(p, rng.randrange(V))
        if unreachable:  # as different as can be, so that whoever counts it is found out
            m, p = [1 / V] * V, [1.0] + [0.0] * (V - 1)
        mu[s], pi[s] = m, p
    size = rng.choice([1.0, 1.0, 0.5, 10.0])
    binary = rng.random() < 0.3
    reward = {
        y: size * (float(rng.random() < 0.5) if binary else rng.uniform(-1, 1)) for y in reference.endings(V, T, eos)
    }
    reward[next(y for y in reward if reference.probability(mu, y) > 0)] = size
    return Case(V, T, eos, mu, pi, reward)


def draw_exact(seed: int) -> Case:
    """A small case whose numbers are fractions."""
    rng = random.Random(seed)
    V, T = rng.randint(2, 3), rng.randint(2, 4)
    eos = rng.choice([None, rng.randrange(V)])

    def row() -> list[Fraction]:
        counts = [rng.randint(1, 9) for _ in range(V)]
        return [Fraction(n, sum(counts)) for n in counts]

    states = list(reference.prefixes(V, T, eos))
    reward = {y: Fraction(rng.randint(-8, 8), 8) for y in reference.endings(V, T, eos)}
    return Case(V, T, eos, {s: row() for s in states}, {s: row() for s in states}, reward)


def rows_of(vocabulary: int, tokens: int) -> Iterator[Tokens]:
    """The prefixes of a level of the package's tables in the order of its rows."""
    return itertools.product(range(vocabulary), repeat=tokens)


def tabular(case: Case, reward_bound: float | None = None) -> TabularProblem:
    """The package's problem. What follows the end of a response holds junk, which it must not look at."""
    V, T = case.vocabulary, case.horizon
    junk: dict[str, Any] = {"mu": [1 / V] * V, "pi": [0.0] * (V - 1) + [1.0]}

    def levels(name: str) -> tuple[Any, ...]:
        policy = getattr(case, name)
        return tuple(np.array([[float(x) for x in policy.get(s, junk[name])] for s in rows_of(V, t)]) for t in range(T))

    def reward(y: Tokens) -> float:
        if case.eos is None or case.eos not in y:
            return float(case.reward[y])
        end = y.index(case.eos) + 1
        return float(case.reward[y[:end]]) if set(y[end:]) <= {case.eos} else JUNK_REWARD

    rewards = np.array([reward(y) for y in rows_of(V, T)])
    return TabularProblem(levels("mu"), levels("pi"), rewards, case.eos, reward_bound)


@cache
def instance(seed: int) -> tuple[Case, TabularProblem]:
    case = draw(seed)
    return case, tabular(case)


def problems(chunk: int) -> Iterator[TabularProblem]:
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        yield instance(seed)[1]


def constant_divergence(horizon: int, divergence: float, reward: float = 1.0) -> TabularProblem:
    """Two tokens and D = `divergence` at every state: mu is fair, pi prefers the first token. Rewards: their share."""
    mu = tuple(np.full((2**t, 2), 0.5) for t in range(horizon))
    pi = tuple(np.tile([0.5 + divergence, 0.5 - divergence], (2**t, 1)) for t in range(horizon))
    rewards = np.array([reward * y.count(0) / horizon for y in rows_of(2, horizon)])
    return TabularProblem(mu, pi, rewards)


def at_most(value: Any, bound: Any, xi: float = 1.0) -> bool:
    """value <= bound, up to the rounding of sums whose terms are of the size xi."""
    value, bound = np.asarray(value), np.asarray(bound)
    return bool((value <= bound * (1 + 1e-12) + 1e-14 * xi).all())
