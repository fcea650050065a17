"""vLLM on a CPU inside verl, for the tests: name it in VERL_USE_EXTERNAL_MODULES after `cppo_cpu_plugin`.

verl's worker extension makes vLLM's own processes import verl, and with it this module, before a model is loaded.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")


def keep_weights() -> None:
    """Linear layers that multiply with their weights as they are.

    vLLM repacks them for the CPU at loading and drops the originals, so weights that arrive later would go nowhere.
    """
    from vllm.model_executor.layers import utils

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = plain
    utils.dispatch_cpu_unquantized_gemm = plain


if "vllm" in sys.modules:
    keep_weights()
