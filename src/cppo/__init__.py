"""CPPO: trust regions for LLM reinforcement learning. The public names; `docs/` explains them."""

from cppo import advantages, divergence
from cppo.objective import aggregate, metrics, token_loss
from cppo.prefix import Shard
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
