"""Soft gates for CPPO (Eq. 19-20): how fast a token fades once it exceeds its limit.

A gate g maps the relative excess x_t = max(w_t D_t / delta, S_t / (delta + delta_b W_{t-1})) to a weight. Admissible
is a non-increasing g with g(x) = 1 for x <= 1 and x g(x) <= 1 beyond: then g(x_t) w_t D_t <= delta, so the mixture
policy that the gate stands for stays inside the region (Eq. 21).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cppo.words import nearest

Gate = Callable[[Tensor], Tensor]


def reciprocal(x: Tensor) -> Tensor:
    """g(x) = min(1, 1/x): the largest admissible gate (the paper's choice)."""
    return x.clamp(min=1.0).reciprocal()


def sapo(x: Tensor) -> Tensor:
    """g(x) = min(1/x, 4 s (1 - s)) with s = sigmoid(x - 1), for x > 1; else 1.

    SAPO's gate (2511.20347) with temperature 1. On its own it is not admissible (close to 1 it falls slower than
    1/x), so the smaller of both is taken.
    """
    y = x.clamp(min=1.0) - 1
    return torch.minimum(reciprocal(x), 4 * torch.sigmoid(y) * torch.sigmoid(-y))


GATES: dict[str, Gate] = {"reciprocal": reciprocal, "sapo": sapo}


def resolve(gate: str | Gate | None) -> Gate | None:
    """The gate by name or as given, checked.

    Raises
    ------
    ValueError : unknown name, or a gate that is not admissible (which condition fails, and at which x).
    """
    if gate is None:
        return None
    if isinstance(gate, str):
        if gate not in GATES:
            raise ValueError(
                f"cppo: gate is {gate!r}, expected none, {', '.join(GATES)} or a function.{nearest(gate, GATES)}"
            )
        return GATES[gate]
    if not callable(gate):
        raise ValueError(f"cppo: gate is {gate!r}, expected none, {', '.join(GATES)} or a function of x.")
    check_gate(gate)
    return gate


def check_gate(gate: Gate) -> None:
    """Refuse a gate that is not admissible, on a dense grid of x in [0, 1e4].

    Raises
    ------
    ValueError : g(x) != 1 for some x <= 1, x g(x) > 1 for some x > 1, g increases, is negative or not finite.
    """
    x = torch.cat([torch.linspace(0, 1, 101), 1 + torch.logspace(-6, 4, 4001)]).double()
    g = gate(x)
    if not isinstance(g, Tensor) or g.shape != x.shape:
        raise ValueError("cppo: a gate must map a tensor of x to a tensor of weights of the same shape.")
    problems = (
        (~g.isfinite(), "is not finite"),
        (g < 0, "is negative"),
        ((x <= 1) & ((g - 1).abs() > 1e-6), "is not 1 although x <= 1"),
        ((x > 1) & (x * g > 1 + 1e-6), "exceeds 1/x"),
        (torch.cat([g.new_zeros(1), g[1:] - g[:-1]]) > 1e-9, "increases"),
    )
    for bad, what in problems:
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(
                f"cppo: the gate is not admissible: at x = {x[at].item():.6g} it {what} (g = {g[at].item():.6g}). "
                "Needed: non-increasing, g(x) = 1 for x <= 1 and x g(x) <= 1 beyond (CPPO Eq. 19-20)."
            )
