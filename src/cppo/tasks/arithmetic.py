"""The built-in task: arithmetic on a scratchpad, for models small enough to train on two cores.

prompt      3+8-2+5-1+6-4=          (family chain-6)
completion  1,9,4,3,9,5#935         scratchpad '#' answer; scored 1.0 if what follows the last '#' is right
"""

from __future__ import annotations

from collections.abc import Sequence

from cppo.tasks.arithmetic_families import ALPHABET, make_family
from cppo.tasks.scratchpad import Scratchpad


class Arithmetic(Scratchpad):
    """Arithmetic families, mixed in equal parts.

    Args:
        families: names such as "chain-24" or "add-4" (a list, or one string with commas).
        ignorance: share of the facts that the teacher of `demonstration` does not know, in [0, 1].
        validation_count: validation problems a family unless `validation` is told otherwise.

    Raises:
        UserError: unknown, repeated or no family; `ignorance` or `validation_count` out of range.
    """

    def __init__(
        self,
        families: str | Sequence[str] = ("chain-24",),
        ignorance: float = 0.05,
        validation_count: int = 256,
    ) -> None:
        super().__init__("arithmetic", make_family, ALPHABET, 10, families, ignorance, validation_count)
