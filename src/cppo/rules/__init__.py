"""Trust regions: one file per family, one frozen dataclass per rule."""

from cppo.rules.base import RULES, Reason, TrustRegion, Verdict, make_rule, register
from cppo.rules.clip import CISPO, MinPRO, NoTrustRegion, PPOClip
from cppo.rules.cppo import CPPO
from cppo.rules.dppo import DPPO
from cppo.rules.trm import TRMAvg, TRMMax, TRMMaxAvg

__all__ = [
    "CISPO",
    "CPPO",
    "DPPO",
    "RULES",
    "MinPRO",
    "NoTrustRegion",
    "PPOClip",
    "Reason",
    "TRMAvg",
    "TRMMax",
    "TRMMaxAvg",
    "TrustRegion",
    "Verdict",
    "make_rule",
    "register",
]
