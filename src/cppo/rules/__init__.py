"""Trust regions: one file a family, one frozen dataclass a rule."""

from cppo.rules.base import RULES, Reason, TrustRegion, Verdict, make_rule, register
from cppo.rules.divergence import DPPO
from cppo.rules.prefix import CPPO, MinPRO
from cppo.rules.ratio import CISPO, NoTrustRegion, PPOClip
from cppo.rules.sequence import TRMAvg, TRMMax, TRMMaxAvg

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
