"""Small problems that can be solved exactly: tabular autoregressive policies, by enumeration of every response.

A response is T tokens over a vocabulary of V. With an end-of-sequence token responses differ in length: what follows it
is a chain of absorbing states, in which both policies emit that token with certainty, so that the divergence there is
0, the ratio 1, and every finite sum below is over V^T equally long sequences. The rewards are those of whole sequences.

Everything is float64 and vectorised over prefixes: a prefix of t tokens is the row sum_i y_i V^(t-i) of a ``[V^t]``
array, so that the children of row r are the rows r V .. r V + V - 1 of the next level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cppo.theory.checks import Array, above_0, horizon_of, weights_of
from cppo.theory.schedules import linear

#: T V^T numbers of float64 an array: 0.4 GB.
LARGEST = 50_000_000


@dataclass(frozen=True)
class Constraints:
    """The smallest thresholds that a pair of policies satisfies on every rollout, for some weights.

    delta : w_t D_t <= delta for all t.
    delta_b : S_m <= delta_b W_m for m = 1..T-1 (the prefix constraints of Theorem 1).
    rule_delta_b : with that delta, no token is beyond tau_t of rule (8): S_t <= delta + rule_delta_b W_{t-1}.
    slack : with rule_delta_b, S_m <= rule_delta_b W_m + slack for m = 1..T-1 (Prop. 8; at most delta).
    """

    delta: float
    delta_b: float
    rule_delta_b: float
    slack: float


@dataclass(frozen=True, eq=False)
class TabularProblem:
    """Rollout policy mu, policy pi and rewards, all in tables.

    Parameters
    ----------
    rollout, policy : for t = 1..T an array ``[V^(t-1), V]`` of mu(. | s_t) and pi(. | s_t), each row a distribution.
    rewards : ``[V^T]``, of each response (with `eos`: padded with it).
    eos : the token that ends a response, or None: all have T tokens. Rows of states after it are set to certainty.
    reward_bound : xi >= max |R|; default: that maximum (of responses that mu can give).

    Raises
    ------
    ValueError : shapes that do not fit, rows that are not distributions, rewards beyond xi, a token that pi can emit
        and mu cannot (then no ratio exists), or more than 50 million numbers.
    """

    rollout: tuple[Array, ...]
    policy: tuple[Array, ...]
    rewards: Array
    eos: int | None = None
    reward_bound: float | None = None

    def __post_init__(self) -> None:
        V, T = _check_levels("rollout", self.rollout)
        if _check_levels("policy", self.policy) != (V, T):
            raise ValueError("rollout and policy differ in vocabulary or horizon.")
        if V**T * T > LARGEST:
            raise ValueError(
                f"{V} tokens and {T} positions give {V**T:,} responses, too many to enumerate; take fewer of either."
            )
        if self.eos is not None and not 0 <= self.eos < V:
            raise ValueError(f"eos is {self.eos}, expected a token between 0 and {V - 1}, or None.")
        rewards: Array = np.asarray(self.rewards, dtype=np.float64)
        if rewards.shape != (V**T,):
            raise ValueError(f"rewards have the shape {list(rewards.shape)}, expected [{V**T}]: one for each response.")
        for name in ("rollout", "policy"):
            levels = tuple(self._absorb(np.asarray(p, dtype=np.float64), t) for t, p in enumerate(getattr(self, name)))
            object.__setattr__(self, name, levels)
        object.__setattr__(self, "rewards", rewards)
        mass = self._state_probability(self.rollout)
        for t, (mu, pi) in enumerate(zip(self.rollout, self.policy, strict=True)):
            if bool(((pi > 0) & (mu == 0) & (mass[t][:, None] > 0)).any()):
                raise ValueError(
                    f"at position {t + 1} pi can emit a token that mu cannot: without common support there is no "
                    "ratio. (Rollouts from truncated sampling, top-p or top-k, are of this kind.)"
                )
        largest = float(np.abs(rewards[self.reachable]).max())
        bound = largest if self.reward_bound is None else float(self.reward_bound)
        if not largest <= bound:
            raise ValueError(f"reward_bound is {self.reward_bound}, and the largest reward has the size {largest}.")
        object.__setattr__(self, "reward_bound", bound)

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        vocabulary: int = 3,
        horizon: int = 4,
        *,
        scale: float = 0.3,
        eos: bool = True,
        spread: float = 1.0,
    ) -> TabularProblem:
        """Normal logits of deviation `spread` for mu, plus normal changes of deviation `scale` for pi; rewards
        uniform in [-1, 1]. eos: whether token 0 ends a response.
        """
        above_0(spread=spread)
        rollout, policy = [], []
        for t in range(horizon_of(horizon)):
            logits = spread * rng.standard_normal((vocabulary**t, vocabulary))
            rollout.append(_softmax(logits))
            policy.append(_softmax(logits + scale * rng.standard_normal(logits.shape)))
        rewards = rng.uniform(-1, 1, vocabulary**horizon)
        return cls(tuple(rollout), tuple(policy), rewards, 0 if eos else None, 1.0)

    def with_policy(self, policy: Sequence[Array]) -> TabularProblem:
        """The same rollouts and rewards, another pi."""
        return TabularProblem(self.rollout, tuple(policy), self.rewards, self.eos, self.reward_bound)

    # -- sizes and prefixes --------------------------------------------------------------------------------------

    @property
    def horizon(self) -> int:
        """T."""
        return len(self.rollout)

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(np.shape(self.rollout[0])[1])

    @property
    def xi(self) -> float:
        """The bound of abs(R)."""
        assert self.reward_bound is not None
        return self.reward_bound

    @cached_property
    def _ended(self) -> tuple[Any, ...]:
        """bool ``[V^t]`` for t = 0..T: whether the prefix holds the end-of-sequence token."""
        V = self.vocabulary
        levels = [np.zeros(1, dtype=bool)]
        for _ in range(self.horizon):
            now = np.repeat(levels[-1][:, None], V, axis=1)
            if self.eos is not None:
                now[:, self.eos] = True
            levels.append(now.reshape(-1))
        return tuple(levels)

    def _absorb(self, rows: Array, t: int) -> Array:
        if self.eos is None:
            return rows
        ended = self._ended[t][:, None]
        certain = np.zeros(rows.shape[1])
        certain[self.eos] = 1.0
        return np.where(ended, certain, rows)

    @staticmethod
    def _state_probability(levels: Sequence[Array]) -> list[Array]:
        """Probability of each prefix of t tokens, t = 0..T."""
        mass = [np.ones(1)]
        for p in levels:
            mass.append((mass[-1][:, None] * p).reshape(-1))
        return mass

    @cached_property
    def _rollout_mass(self) -> list[Array]:
        return self._state_probability(self.rollout)

    @cached_property
    def _policy_mass(self) -> list[Array]:
        return self._state_probability(self.policy)

    @cached_property
    def reachable(self) -> Any:
        """bool ``[V^T]``: the responses that mu can give."""
        return self._rollout_mass[-1] > 0

    @cached_property
    def lengths(self) -> Any:
        """int ``[V^T]``: tokens of each response, the end-of-sequence token included."""
        alive = [self._repeat(~ended, t) for t, ended in enumerate(self._ended[:-1])]
        return np.sum(alive, axis=0)

    def _repeat(self, values: Any, tokens: int) -> Any:
        """``[V^tokens]`` of prefixes -> ``[V^T]`` of responses."""
        return np.repeat(values, self.vocabulary ** (self.horizon - tokens))

    def _paths(self, levels: Sequence[Any], tokens: int) -> Array:
        """A value a state (tokens=0) or a token (tokens=1) -> ``[V^T, T]``."""
        columns = [self._repeat(level.reshape(-1), t + tokens) for t, level in enumerate(levels)]
        return np.stack(columns, axis=1)

    # -- divergences ---------------------------------------------------------------------------------------------

    @cached_property
    def divergence(self) -> tuple[Array, ...]:
        """D(s_t) = 1/2 sum_v |mu(v | s_t) - pi(v | s_t)|, for t = 1..T an array ``[V^(t-1)]``."""
        return tuple(np.abs(mu - pi).sum(1) / 2 for mu, pi in zip(self.rollout, self.policy, strict=True))

    @cached_property
    def kl(self) -> tuple[Array, ...]:
        """KL(mu || pi) at each state; inf where pi gives up a token of mu."""
        levels = []
        for mu, pi in zip(self.rollout, self.policy, strict=True):
            with np.errstate(divide="ignore", invalid="ignore"):
                levels.append(np.where(mu > 0, mu * (np.log(mu) - np.log(pi)), 0.0).sum(1).clip(min=0))
        return tuple(levels)

    @cached_property
    def ratio(self) -> tuple[Array, ...]:
        """rho = pi / mu of each token, ``[V^(t-1), V]``; 1 where mu is 0."""
        return tuple(
            np.divide(pi, mu, out=np.ones_like(mu), where=mu > 0)
            for mu, pi in zip(self.rollout, self.policy, strict=True)
        )

    @cached_property
    def path_divergence(self) -> Array:
        """D_t along each response, ``[V^T, T]``."""
        return self._paths(self.divergence, 0)

    @cached_property
    def path_kl(self) -> Array:
        """KL(mu || pi) at s_t along each response, ``[V^T, T]``."""
        return self._paths(self.kl, 0)

    @cached_property
    def path_ratio(self) -> Array:
        """rho_t along each response, ``[V^T, T]``."""
        return self._paths(self.ratio, 1)

    @cached_property
    def rollout_probability(self) -> Array:
        """mu(y), ``[V^T]``."""
        return self._rollout_mass[-1]

    @cached_property
    def policy_probability(self) -> Array:
        """pi(y), ``[V^T]``."""
        return self._policy_mass[-1]

    @cached_property
    def expected_divergence(self) -> Array:
        """u_t = E_mu[D_t], ``[T]``."""
        return np.array([mass @ D for mass, D in zip(self._rollout_mass, self.divergence, strict=False)])

    @cached_property
    def largest_divergence(self) -> Array:
        """l_t, the largest D_t at a state that mu can reach, ``[T]``."""
        return np.array(
            [D[mass > 0].max(initial=0.0) for mass, D in zip(self._rollout_mass, self.divergence, strict=False)]
        )

    @cached_property
    def suffix_tv(self) -> tuple[Array, ...]:
        """For t = 0..T, at each prefix of t tokens: TV between what mu and pi write after it, ``[V^t]`` (Lemma 3)."""
        V, T = self.vocabulary, self.horizon
        mu, pi = np.ones((V**T, 1)), np.ones((V**T, 1))
        levels = [np.zeros(V**T)]
        for t in reversed(range(T)):
            mu = (self.rollout[t][:, :, None] * mu.reshape(V**t, V, -1)).reshape(V**t, -1)
            pi = (self.policy[t][:, :, None] * pi.reshape(V**t, V, -1)).reshape(V**t, -1)
            levels.append(np.abs(mu - pi).sum(1) / 2)
        return tuple(reversed(levels))

    @cached_property
    def largest_suffix_tv(self) -> Array:
        """The largest TV of what follows t tokens that mu can write, for t = 1..T, ``[T]`` (its last entry 0)."""
        levels = zip(self._rollout_mass[1:], self.suffix_tv[1:], strict=True)
        return np.array([tv[mass > 0].max(initial=0.0) for mass, tv in levels])

    @cached_property
    def later_ratio(self) -> Array:
        """prod_{j>t} rho_j along each response, ``[V^T, T]``."""
        rho = self.path_ratio
        later = np.ones_like(rho)
        later[:, :-1] = np.cumprod(rho[:, :0:-1], axis=1)[:, ::-1]
        return later

    # -- objective, surrogate, residual --------------------------------------------------------------------------

    @cached_property
    def gain(self) -> float:
        """J(pi) - J(mu) = sum_y (pi(y) - mu(y)) R(y)."""
        return float((self.policy_probability - self.rollout_probability) @ self.rewards)

    @cached_property
    def surrogate(self) -> float:
        """L'(pi) = E_mu[R sum_t (rho_t - 1)] (Eq. 1)."""
        return float((self.rollout_probability * self.rewards) @ (self.path_ratio - 1).sum(1))

    @cached_property
    def residual(self) -> float:
        """Delta = E_mu[R sum_t (rho_t - 1) (1 - prod_{j>t} rho_j)] (Eq. 12); gain = surrogate - residual (Lemma 2)."""
        change = (self.path_ratio - 1) * (1 - self.later_ratio)
        return float((self.rollout_probability * self.rewards) @ change.sum(1))

    @cached_property
    def ratio_bound(self) -> float:
        """2 xi E_mu[sum_t |rho_t - 1| max(0, 1 - prod_{j>t} rho_j)], between |Delta| and `pathwise_bound`."""
        change = np.abs(self.path_ratio - 1) * np.maximum(0, 1 - self.later_ratio)
        return float(2 * self.xi * self.rollout_probability @ change.sum(1))

    @cached_property
    def pathwise_bound(self) -> float:
        """2 xi E_mu[sum_t |rho_t - 1| sum_{j>t} D_j] >= |Delta|: what `certificate` estimates from rollouts."""
        D = self.path_divergence
        later = np.cumsum(D[:, ::-1], axis=1)[:, ::-1] - D
        return float(2 * self.xi * self.rollout_probability @ (np.abs(self.path_ratio - 1) * later).sum(1))

    # -- constraints ---------------------------------------------------------------------------------------------

    def path_weights(self, weights: Any = None, w_min: float | None = None) -> Array:
        """w_t along each response, ``[V^T, T]``.

        weights : ``[T]``, the same for all (Theorem 1); or w_min : the linear schedule over each response's own length,
        as the rule has it, 0 after its end.
        """
        T = self.horizon
        if (weights is None) == (w_min is None):
            raise ValueError("give either weights [T] or w_min (the linear schedule over each response's own length).")
        if weights is not None:
            return np.broadcast_to(weights_of(weights, T), (self.rewards.size, T))
        assert w_min is not None
        table = np.zeros((T + 1, T))
        for n in range(1, T + 1):
            table[n, :n] = linear(n, w_min)
        return table[self.lengths]

    def constraints(self, weights: Any = None, w_min: float | None = None) -> Constraints:
        """The smallest delta and delta_b for which the constraints hold on every rollout; weights as in
        `path_weights`.
        """
        w = self.path_weights(weights, w_min)[self.reachable]
        Z = w * self.path_divergence[self.reachable]
        S, W = Z.cumsum(1), w.cumsum(1)
        delta = float(Z.max())
        delta_b = float((S[:, :-1] / W[:, :-1]).max(initial=0.0))
        rule_delta_b = float(((S[:, 1:] - delta) / W[:, :-1]).max(initial=0.0))
        slack = float((S[:, :-1] - rule_delta_b * W[:, :-1]).max(initial=0.0))
        return Constraints(delta, delta_b, rule_delta_b, slack)


def _check_levels(name: str, levels: Any) -> tuple[int, int]:
    """(V, T) of a policy's tables."""
    if not isinstance(levels, list | tuple) or not levels:
        raise ValueError(f"{name}: expected a tuple of tables, one for each position, got {type(levels).__name__}.")
    V = np.shape(levels[0])[-1] if np.ndim(levels[0]) == 2 else 0
    for t, table in enumerate(levels):
        p = np.asarray(table, dtype=np.float64)
        if p.shape != (V**t, V) or V < 1:
            raise ValueError(
                f"{name}: the table of position {t + 1} has the shape {list(p.shape)}, expected [{max(V, 1) ** t}, V]: "
                "a row for each prefix, a column for each token."
            )
        if not (np.isfinite(p).all() and (p >= 0).all() and np.allclose(p.sum(1), 1, rtol=0, atol=1e-9)):
            raise ValueError(
                f"{name}: a row of position {t + 1} is not a distribution (numbers >= 0 that add up to 1)."
            )
    return V, len(levels)


def _softmax(logits: Array) -> Array:
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)
