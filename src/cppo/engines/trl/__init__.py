"""Trust regions in TRL's GRPO trainer (docs/trl.md)."""

from cppo.engines.trl.settings import trust_region_config
from cppo.engines.trl.trainer import TrustRegionTrainer

__all__ = ["TrustRegionTrainer", "trust_region_config"]
