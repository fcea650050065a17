"""CPPO: trust regions for LLM reinforcement learning. The public names; `docs/` explains them.

They are imported when they are first asked for: `import cppo.theory` and `import cppo.tasks` need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cppo import advantages, divergence
    from cppo.layout_sharded import Shard
    from cppo.objective import aggregate, metrics, token_loss
    from cppo.rules import (
        CISPO,
        CPPO,
        DPPO,
        RULES,
        MinPRO,
        NoTrustRegion,
        PPOClip,
        Reason,
        TRMAvg,
        TRMMax,
        TRMMaxAvg,
        TrustRegion,
        Verdict,
        make_rule,
    )
    from cppo.tokens import TokenBatch

__version__ = "0.1.0"

__all__ = [
    "CISPO",
    "CPPO",
    "DPPO",
    "RULES",
    "MinPRO",
    "NoTrustRegion",
    "PPOClip",
    "Reason",
    "Shard",
    "TRMAvg",
    "TRMMax",
    "TRMMaxAvg",
    "TokenBatch",
    "TrustRegion",
    "Verdict",
    "advantages",
    "aggregate",
    "divergence",
    "make_rule",
    "metrics",
    "token_loss",
]

#: Where what is not a rule is defined.
_HOMES = {"Shard": "layout_sharded", "TokenBatch": "tokens"} | dict.fromkeys(
    ("aggregate", "metrics", "token_loss"), "objective"
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cppo' has no attribute {name!r}")
    if name in ("advantages", "divergence"):
        return importlib.import_module(f"cppo.{name}")
    value = getattr(importlib.import_module(f"cppo.{_HOMES.get(name, 'rules')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
