"""What the upper end of `cppo.divergence.topk_interval` certifies (docs/theory.md, "Certified divergences")."""

from __future__ import annotations

import numpy as np
import torch

from cppo import theory
from cppo.divergence import topk_interval
from cppo.theory import make_schedule

from . import reference
from .cases import CHUNK, at_most, every_chunk, instance


def upper_end(mu: np.ndarray, pi: np.ndarray) -> np.ndarray:
    """From mu's likeliest token and the rest, ``[..., V]`` -> ``[...]``; the sampled token is the former."""
    first = torch.from_numpy(mu.argmax(-1))[..., None]
    log_pi, log_mu = (torch.from_numpy(p).log().gather(-1, first) for p in (pi, mu))
    inside = torch.ones(first.shape[:-1], dtype=torch.bool)
    return topk_interval(log_pi, log_mu, log_pi[..., 0], log_mu[..., 0], inside)[1].numpy()


@every_chunk
def test_thresholds_that_the_upper_end_satisfies(chunk: int) -> None:
    """Hold for the exact TV: the constraints of Theorem 1 and of rule (8), and so the bounds."""
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        case, p = instance(seed)
        T, xi = p.horizon, p.xi
        ends = [upper_end(mu, pi) for mu, pi in zip(p.rollout, p.policy, strict=True)]
        repeats = [p.vocabulary ** (T - t) for t in range(T)]
        above = np.stack([np.repeat(upper, n) for upper, n in zip(ends, repeats, strict=True)], axis=1)
        w_min = 0.3 if seed % 2 else 0.8
        w = make_schedule("linear", T, w_min)
        W = w.cumsum()
        Z = (w * above)[p.reachable]
        S = Z.cumsum(1)
        delta, delta_b = float(Z.max()), float((S / W)[:, :-1].max())
        rule_delta_b = max(0.0, float(((S[:, 1:] - delta) / W[:-1]).max()))
        c, bit = p.constraints(w), 1 + 1e-12
        assert c.delta <= delta * bit and c.delta_b <= delta_b * bit
        given_ = reference.paths(case, w.tolist())
        assert reference.obeys_theorem_1(given_, delta * bit, delta_b * bit)
        assert reference.obeys_rule_8(given_, delta * bit, rule_delta_b * bit + 1e-12 * delta)
        L = min(1.0, delta / w_min)
        spent = theory.coefficients(T, L, xi=xi) @ p.expected_divergence
        assert at_most(spent, theory.theorem_1(T, delta_b, L, weights=w, xi=xi), xi)
        assert at_most(abs(p.residual), theory.tightest_residual(w, delta * bit, delta_b * bit, xi=xi).bound, xi)


def test_the_lower_end_certifies_nothing() -> None:
    """Two tokens beyond the first class change places: top-1 TV is 0, the exact one 0.4; the upper end says 0.5."""
    mu, pi = (torch.tensor(p, dtype=torch.float64).log() for p in ([[0.5, 0.45, 0.05]], [[0.5, 0.05, 0.45]]))
    lower, upper = topk_interval(pi[:, :1], mu[:, :1], pi[:, 0], mu[:, 0], torch.tensor([True]))
    assert abs(lower.item()) < 1e-12 and abs(upper.item() - 0.5) < 1e-12
