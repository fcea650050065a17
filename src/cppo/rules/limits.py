"""Thresholds of a rule that can be calibrated: where they may lie, and what loosening one means."""

from __future__ import annotations

from dataclasses import dataclass

#: Looseness between which a threshold is looked for.
TIGHTEST, LOOSEST = 1e-9, 1e6


@dataclass(frozen=True)
class Limit:
    """One threshold as ``base + sign * x`` of a looseness x > 0: the larger x, the fewer tokens are held back.

    loosest : largest x. by_default : whether it is solved for where nobody says which thresholds are asked for.
    """

    base: float = 0.0
    sign: float = 1.0
    loosest: float = LOOSEST
    by_default: bool = True

    def value(self, x: float) -> float:
        # What is written down is what is used: six digits, as everywhere in a run's files; and 1 + 1e-9 stays above 1.
        return float(f"{self.base + self.sign * float(f'{x:.6g}'):.12g}")

    def looseness(self, value: float) -> float:
        return min(max((value - self.base) * self.sign, TIGHTEST), self.loosest)


#: The width of a band of the ratio below 1: a ratio is never negative.
BELOW_ONE = Limit(loosest=1 - 1e-6)
