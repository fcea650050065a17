"""Checks that the functions of `cppo.theory` share: each says what was given, what is wrong, and what to set."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


class AssumptionError(ValueError):
    """A theorem was asked about numbers for which it does not hold."""


def horizon_of(horizon: int) -> int:
    """T, an integer of at least 1."""
    try:
        found = operator.index(horizon)
    except TypeError:
        raise ValueError(f"horizon is {horizon!r}, expected a whole number of tokens.") from None
    if found < 1:
        raise ValueError(f"horizon is {found}, expected at least 1 token.")
    return found


def at_least_0(**numbers: float) -> None:
    """Finite and >= 0."""
    for name, value in numbers.items():
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}, expected a finite number of at least 0.")


def above_0(**numbers: float) -> None:
    """Finite and > 0."""
    for name, value in numbers.items():
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}, expected a finite number above 0.")


def at_most_1(**numbers: float) -> None:
    """In (0, 1]."""
    for name, value in numbers.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}, expected a number above 0 and at most 1.")


def total_variations(name: str, values: Any, length: int | None = None) -> Array:
    """`values` as float64 ``[T]`` of numbers in [0, 1]."""
    found: Array = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or (length is not None and found.size != length):
        shape = "[T]" if length is None else f"[{length}]"
        raise ValueError(f"{name} has the shape {list(found.shape)}, expected {shape}: one number per position.")
    bad = ~((found >= 0) & (found <= 1 + 1e-9))
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(
            f"{name} is {found[at]} at position {at + 1}: a total variation distance lies between 0 and 1. (A KL "
            "divergence D is turned into one by sqrt(D / 2), Pinsker.)"
        )
    return np.minimum(found, 1.0)


def weights_of(weights: Any, horizon: int) -> Array:
    """w_1..w_T as float64, finite and above 0."""
    found: Array = np.asarray(weights, dtype=np.float64)
    if found.shape != (horizon,):
        raise ValueError(f"weights have the shape {list(found.shape)}, expected [{horizon}]: one for each position.")
    bad = ~(np.isfinite(found) & (found > 0))
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(f"the weight at position {at + 1} is {found[at]}, expected a finite number above 0.")
    return found
